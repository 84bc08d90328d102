//! Any bytes as a record of /dev/kmsg.
#![no_main]

use libfuzzer_sys::fuzz_target;
use memtrace::kernel::log;

fuzz_target!(|bytes: &[u8]| {
    let text = String::from_utf8_lossy(bytes);
    let _ = log::parse_kmsg(&text);
    let _ = log::parse_kmsg(&format!("6,1,2,-;{text}"));
});
