//! Any bytes as the ledgers in a state directory. Every entry that is read can be written and is read again the same.
#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use memtrace::store::ledger::{self, Ledger, LedgerEntry};
use memtrace_incident::{KillLine, SigkillEntry};

fn read_and_write<E: LedgerEntry + PartialEq + std::fmt::Debug>(bytes: &[u8], dir: &Path) {
    std::fs::write(dir.join(E::FILE), bytes).expect("no room for a ledger");
    let read = ledger::read::<E>(dir).expect("a ledger cannot be read");
    std::fs::remove_file(dir.join(E::FILE)).expect("a ledger cannot be removed");
    let mut again = Ledger::<E>::open(dir).expect("a ledger cannot be opened");
    again.append(&read.entries).expect("a ledger cannot be written");
    let entries = ledger::read::<E>(dir).expect("a ledger cannot be read").entries;
    assert_eq!(entries, read.entries);
    std::fs::remove_file(dir.join(E::FILE)).expect("a ledger cannot be removed");
}

fuzz_target!(|bytes: &[u8]| {
    let dir = std::env::temp_dir().join(format!("memtrace-fuzz-ledger-{}", std::process::id()));
    std::fs::create_dir_all(&dir).expect("no directory");
    read_and_write::<KillLine>(bytes, &dir);
    read_and_write::<SigkillEntry>(bytes, &dir);
});
