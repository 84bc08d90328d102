//! The ledgers: files of one line of JSON for each entry, appended to. A file that reaches its cap is renamed and a new
//! one begun, so that a ledger is two files at most. While no new one can be made, the old one grows to twice its cap.
//!
//! `kills.jsonl` is synced with every entry: a kill is on disk before anything else is done about it. `sigkills.jsonl`
//! is not, since there may be hundreds of SIGKILLs a second.

use std::collections::VecDeque;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::{atomic, own_dir};
use memtrace_incident::{KillEntry, SigkillEntry};

/// Entries that wait to be written; beyond it the oldest are given up.
const MAX_UNWRITTEN: usize = 4096;

/// An entry of a ledger, and how its ledger is kept.
pub trait LedgerEntry: Clone + Serialize + DeserializeOwned {
    /// Name of the file in the state directory.
    const FILE: &'static str;
    /// Name of the file after it has reached its cap.
    const FILE_BEFORE: &'static str;
    /// Name of the next file until it takes the place of the one that has reached its cap.
    const FILE_NEXT: &'static str;
    /// Size at which the file is renamed, bytes.
    const MAX_BYTES: u64;
    /// Whether each append is synced to the disk.
    const SYNCED: bool;

    /// Identity of the entry: boot time of the event, pid, and start of the process.
    fn key(&self) -> (u64, u32, u64);
}

impl LedgerEntry for KillEntry {
    const FILE: &'static str = "kills.jsonl";
    const FILE_BEFORE: &'static str = "kills.jsonl.1";
    const FILE_NEXT: &'static str = "kills.jsonl.next";
    const MAX_BYTES: u64 = 8 << 20;
    const SYNCED: bool = true;

    fn key(&self) -> (u64, u32, u64) {
        (self.boot_ns, self.pid, self.start_boot_ns)
    }
}

impl LedgerEntry for SigkillEntry {
    const FILE: &'static str = "sigkills.jsonl";
    const FILE_BEFORE: &'static str = "sigkills.jsonl.1";
    const FILE_NEXT: &'static str = "sigkills.jsonl.next";
    const MAX_BYTES: u64 = 2 << 20;
    const SYNCED: bool = false;

    fn key(&self) -> (u64, u32, u64) {
        (self.boot_ns, self.pid, self.start_boot_ns)
    }
}

/// A ledger open for appending.
#[derive(Debug)]
pub struct Ledger<E> {
    dir: PathBuf,
    file: File,
    /// Bytes in whole lines.
    bytes: u64,
    max_bytes: u64,
    torn_bytes: u64,
    /// Entries that could not be written, oldest first. Cap: [`MAX_UNWRITTEN`].
    unwritten: VecDeque<E>,
    /// Entries given up because too many could not be written.
    given_up: u64,
}

/// A ledger read back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LedgerLines<E> {
    /// The entries, oldest first.
    pub entries: Vec<E>,
    /// Lines that are not an entry.
    pub bad_lines: u64,
}

impl<E: LedgerEntry> Ledger<E> {
    /// Opens the ledger in `dir`, creating it. A last line that a crash left incomplete is removed.
    pub fn open(dir: &Path) -> io::Result<Self> {
        Self::with_cap(dir, E::MAX_BYTES)
    }

    fn with_cap(dir: &Path, max_bytes: u64) -> io::Result<Self> {
        let mut file = open(dir, E::FILE)?;
        let whole = whole_lines(&mut file)?;
        let torn_bytes = file.metadata()?.len().saturating_sub(whole);
        if torn_bytes > 0 {
            file.set_len(whole)?;
            file.sync_data()?;
        }
        let (unwritten, given_up) = (VecDeque::new(), 0);
        Ok(Self { dir: dir.to_owned(), file, bytes: whole, max_bytes, torn_bytes, unwritten, given_up })
    }

    /// The state directory that the ledger is in.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Bytes of an incomplete last line that opening removed.
    pub fn torn_bytes(&self) -> u64 {
        self.torn_bytes
    }

    /// Appends the entries, after those that could not be written before, and syncs them if [`LedgerEntry::SYNCED`]. When
    /// that fails, all wait for the next call.
    pub fn append(&mut self, entries: &[E]) -> io::Result<()> {
        self.unwritten.extend(entries.iter().cloned());
        let excess = self.unwritten.len().saturating_sub(MAX_UNWRITTEN);
        self.unwritten.drain(..excess);
        self.given_up = self.given_up.saturating_add(excess as u64);
        self.write_unwritten()
    }

    /// Tries again to write what could not be written.
    pub fn write_unwritten(&mut self) -> io::Result<()> {
        if self.unwritten.is_empty() {
            return Ok(());
        }
        let mut lines = Vec::new();
        for entry in &self.unwritten {
            serde_json::to_writer(&mut lines, entry)?;
            lines.push(b'\n');
        }
        self.write(&lines)?;
        self.unwritten.clear();
        Ok(())
    }

    /// Entries that wait to be written.
    pub fn unwritten(&self) -> u64 {
        self.unwritten.len() as u64
    }

    /// Entries that were never written, because too many waited.
    pub fn given_up(&self) -> u64 {
        self.given_up
    }

    /// Writes lines, all or none.
    fn write(&mut self, lines: &[u8]) -> io::Result<()> {
        let with = self.bytes.saturating_add(lines.len() as u64);
        let rotated = if self.bytes > 0 && with > self.max_bytes { self.rotate() } else { Ok(()) };
        if let Err(error) = rotated.as_ref()
            && with > self.max_bytes.saturating_mul(2)
        {
            return Err(io::Error::new(
                error.kind(),
                format!("the ledger is full and no new one can be made: {error}"),
            ));
        }
        let written = self.file.write_all(lines).and_then(|()| if E::SYNCED { self.file.sync_data() } else { Ok(()) });
        if let Err(error) = written {
            // On a full disk part of a line may be written: the next entry must not continue it.
            let _ = self.file.set_len(self.bytes);
            return Err(error);
        }
        // They are written even if there is no new file yet: the next append tries again.
        self.bytes = self.bytes.saturating_add(lines.len() as u64);
        Ok(())
    }

    /// Begins a new file. It is made before the old one is renamed, so that a failure leaves everything as it was.
    fn rotate(&mut self) -> io::Result<()> {
        let [file, before, next] = [E::FILE, E::FILE_BEFORE, E::FILE_NEXT].map(|name| self.dir.join(name));
        let fresh = append_to(&next)?;
        fresh.set_len(0)?;
        match fs::rename(&file, &before) {
            // Somebody has taken it away: what was in it is gone, and there is room for the next.
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        if let Err(error) = fs::rename(&next, &file) {
            let _ = fs::rename(&before, &file);
            return Err(error);
        }
        self.file = fresh;
        self.bytes = 0;
        atomic::sync_dir(&self.dir)
    }
}

/// Reads the ledger in a state directory; one that does not exist is empty.
pub fn read<E: LedgerEntry>(dir: &Path) -> io::Result<LedgerLines<E>> {
    let mut ledger = LedgerLines { entries: Vec::new(), bad_lines: 0 };
    for name in [E::FILE_BEFORE, E::FILE] {
        let file = match own_dir::read(&dir.join(name)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            file => file?,
        };
        let mut lines = BufReader::new(file.take(E::MAX_BYTES.saturating_mul(2)));
        let mut line = Vec::new();
        while lines.read_until(b'\n', &mut line)? > 0 {
            match serde_json::from_slice(&line) {
                Ok(entry) => ledger.entries.push(entry),
                Err(_) => ledger.bad_lines += 1,
            }
            line.clear();
        }
    }
    Ok(ledger)
}

fn open(dir: &Path, name: &str) -> io::Result<File> {
    let path = dir.join(name);
    let existed = path.exists();
    let file = append_to(&path)?;
    if !existed {
        atomic::sync_dir(dir)?;
    }
    Ok(file)
}

fn append_to(path: &Path) -> io::Result<File> {
    own_dir::open(path, 0o640, OpenOptions::new().read(true).append(true))
}

/// Bytes up to and including the last line feed.
fn whole_lines(file: &mut File) -> io::Result<u64> {
    const PIECE: u64 = 4096;
    let mut end = file.metadata()?.len();
    let mut piece = Vec::new();
    while end > 0 {
        let begin = end.saturating_sub(PIECE);
        file.seek(SeekFrom::Start(begin))?;
        piece.clear();
        file.take(end - begin).read_to_end(&mut piece)?;
        if let Some(at) = piece.iter().rposition(|byte| *byte == b'\n') {
            return Ok(begin.saturating_add(at as u64).saturating_add(1));
        }
        end = begin;
    }
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use memtrace_incident::SigkillCause;

    type Kills = Ledger<KillEntry>;

    fn kill(pid: u32) -> KillEntry {
        KillEntry {
            incident: "01ARZ3NDEKTSV4RRFFQ69G5FAV".into(),
            boot_ns: 1,
            wall: "2026-03-01T03:12:45Z".into(),
            pid,
            start_boot_ns: 2,
            comm: "a\nb".into(),
            cgroup_path: None,
            usage_bytes: Some(u64::MAX),
            limit_bytes: None,
            trigger_pid: 3,
            killed: true,
        }
    }

    fn sigkill(pid: u32) -> SigkillEntry {
        SigkillEntry {
            boot_ns: 1,
            wall: "2026-03-01T03:12:45Z".into(),
            pid,
            start_boot_ns: 2,
            comm: "a\nb".into(),
            cgroup_id: Some(7),
            cgroup_path: None,
            cause: SigkillCause::Process,
            sender_pid: 3,
            sender_start_boot_ns: 4,
            sender_comm: "sh".into(),
            incident: None,
        }
    }

    fn pids(dir: &Path) -> Vec<u32> {
        read::<KillEntry>(dir).unwrap().entries.iter().map(|kill| kill.pid).collect()
    }

    #[test]
    fn appends_over_restarts_each_ledger_its_own() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(read::<KillEntry>(dir.path()).unwrap(), LedgerLines { entries: Vec::new(), bad_lines: 0 });
        Kills::open(dir.path()).unwrap().append(&[kill(1)]).unwrap();
        Kills::open(dir.path()).unwrap().append(&[kill(2)]).unwrap();
        Ledger::open(dir.path()).unwrap().append(&[sigkill(3), sigkill(4)]).unwrap();
        Ledger::<SigkillEntry>::open(dir.path()).unwrap().append(&[]).unwrap();
        assert_eq!(read::<KillEntry>(dir.path()).unwrap().entries, [kill(1), kill(2)]);
        assert_eq!(read::<SigkillEntry>(dir.path()).unwrap().entries, [sigkill(3), sigkill(4)]);
    }

    #[test]
    fn a_torn_line_is_cut_off_and_a_bad_one_skipped() {
        let dir = tempfile::tempdir().unwrap();
        Kills::open(dir.path()).unwrap().append(&[kill(1)]).unwrap();
        let mut file = OpenOptions::new().append(true).open(dir.path().join(KillEntry::FILE)).unwrap();
        file.write_all(b"not json\n{\"incident\":").unwrap();
        file.write_all(&[0; 9000]).unwrap();
        let mut kills = Kills::open(dir.path()).unwrap();
        assert_eq!(kills.torn_bytes(), 9012);
        kills.append(&[kill(2)]).unwrap();
        assert_eq!(pids(dir.path()), [1, 2]);
        assert_eq!(read::<KillEntry>(dir.path()).unwrap().bad_lines, 1);
    }

    #[test]
    fn a_file_without_a_line_end_is_all_torn() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(KillEntry::FILE), vec![b'x'; 5000]).unwrap();
        assert_eq!(Kills::open(dir.path()).unwrap().torn_bytes(), 5000);
        assert_eq!(fs::metadata(dir.path().join(KillEntry::FILE)).unwrap().len(), 0);
    }

    #[test]
    fn a_rotation_that_fails_loses_nothing_and_is_done_later() {
        let dir = tempfile::tempdir().unwrap();
        let mut kills = Kills::with_cap(dir.path(), 1000).unwrap();
        // No new file can be made, as without an inode.
        let next = dir.path().join(KillEntry::FILE_NEXT);
        fs::create_dir(&next).unwrap();
        let mut pid = 0;
        let refused = loop {
            pid += 1;
            if let Err(error) = kills.append(&[kill(pid)]) {
                break error.to_string();
            }
        };
        assert!(refused.contains("no new one can be made"), "{refused}");
        let size = fs::metadata(dir.path().join(KillEntry::FILE)).unwrap().len();
        assert!((1000..=2000).contains(&size), "{size} bytes");
        assert_eq!(pids(dir.path()), (1..pid).collect::<Vec<_>>(), "all before are there");
        assert!(kills.write_unwritten().is_err() && kills.unwritten() == 1);
        fs::remove_dir(&next).unwrap();
        kills.append(&[kill(pid + 1)]).unwrap();
        assert_eq!(pids(dir.path()), (1..pid + 2).collect::<Vec<_>>(), "and the one that could not be written");
        assert_eq!((kills.unwritten(), kills.given_up()), (0, 0));
        assert!(dir.path().join(KillEntry::FILE_BEFORE).exists() && !next.exists());
        // A file that was taken away is begun anew at the next rotation.
        fs::remove_file(dir.path().join(KillEntry::FILE)).unwrap();
        for pid in 100..110 {
            kills.append(&[kill(pid)]).unwrap();
        }
        assert_eq!(pids(dir.path()).last(), Some(&109));
    }

    #[test]
    fn entries_that_cannot_be_written_wait_and_the_oldest_are_given_up() {
        let dir = tempfile::tempdir().unwrap();
        let mut kills = Kills::open(dir.path()).unwrap();
        let file = std::mem::replace(&mut kills.file, OpenOptions::new().write(true).open("/dev/full").unwrap());
        let all: Vec<KillEntry> = (0..MAX_UNWRITTEN as u32 + 3).map(kill).collect();
        for some in [&all[..1], &all[1..MAX_UNWRITTEN], &all[MAX_UNWRITTEN..]] {
            assert!(kills.append(some).is_err());
        }
        assert_eq!((kills.unwritten(), kills.given_up()), (MAX_UNWRITTEN as u64, 3));
        kills.file = file;
        kills.write_unwritten().unwrap();
        assert_eq!(pids(dir.path()), (3..MAX_UNWRITTEN as u32 + 3).collect::<Vec<_>>());
    }

    #[test]
    fn the_ledger_before_is_kept_once() {
        let dir = tempfile::tempdir().unwrap();
        let mut kills = Kills::with_cap(dir.path(), 1000).unwrap();
        for pid in 0..20 {
            kills.append(&[kill(pid)]).unwrap();
        }
        assert!(fs::metadata(dir.path().join(KillEntry::FILE)).unwrap().len() <= 1000);
        assert!(fs::metadata(dir.path().join(KillEntry::FILE_BEFORE)).unwrap().len() <= 1000);
        let pids = pids(dir.path());
        assert_eq!(*pids.last().unwrap(), 19);
        assert!(pids.windows(2).all(|pair| pair[1] == pair[0] + 1));
    }
}
