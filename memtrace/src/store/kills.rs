//! The kill ledger: one line of JSON a kill, on disk before anything else is done about it.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::atomic;
use crate::engine::input::KillEntry;

/// Name of the ledger in the state directory.
pub const FILE: &str = "kills.jsonl";
/// Name of the ledger before this one.
pub const FILE_BEFORE: &str = "kills.jsonl.1";
/// Size at which the ledger becomes the one before.
pub const MAX_BYTES: u64 = 8 << 20;

/// Appends kills.
#[derive(Debug)]
pub struct Kills {
    dir: PathBuf,
    file: File,
    /// Bytes in whole lines.
    bytes: u64,
    max_bytes: u64,
    torn_bytes: u64,
}

/// The ledger read back.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ledger {
    /// Every kill, oldest first.
    pub kills: Vec<KillEntry>,
    /// Lines that are not one.
    pub bad_lines: u64,
}

impl Kills {
    /// Opens the ledger in `dir`, creating it; a last line that a crash cut short is cut off.
    pub fn open(dir: &Path) -> io::Result<Self> {
        Self::with_cap(dir, MAX_BYTES)
    }

    fn with_cap(dir: &Path, max_bytes: u64) -> io::Result<Self> {
        let mut file = open(dir)?;
        let whole = whole_lines(&mut file)?;
        let torn_bytes = file.metadata()?.len().saturating_sub(whole);
        if torn_bytes > 0 {
            file.set_len(whole)?;
            file.sync_data()?;
        }
        Ok(Self { dir: dir.to_owned(), file, bytes: whole, max_bytes, torn_bytes })
    }

    /// The state directory it is in.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Bytes of a torn last line that opening cut off.
    pub fn torn_bytes(&self) -> u64 {
        self.torn_bytes
    }

    /// Adds a kill; when this returns `Ok` it is on the disk.
    pub fn append(&mut self, kill: &KillEntry) -> io::Result<()> {
        let mut line = serde_json::to_vec(kill)?;
        line.push(b'\n');
        let rotated = if self.bytes > 0 && self.bytes.saturating_add(line.len() as u64) > self.max_bytes {
            self.rotate()
        } else {
            Ok(())
        };
        if let Err(error) = self.file.write_all(&line) {
            // A full disk: no half line for the next one to continue.
            let _ = self.file.set_len(self.bytes);
            return Err(error);
        }
        self.bytes = self.bytes.saturating_add(line.len() as u64);
        self.file.sync_data()?;
        // The kill is safe either way; that the ledger outgrew its cap is still worth telling.
        rotated
    }

    fn rotate(&mut self) -> io::Result<()> {
        fs::rename(self.dir.join(FILE), self.dir.join(FILE_BEFORE))?;
        self.file = open(&self.dir)?;
        self.bytes = 0;
        atomic::sync_dir(&self.dir)
    }
}

/// Reads the ledger of a state directory; one that does not exist is empty.
pub fn read(dir: &Path) -> io::Result<Ledger> {
    let mut ledger = Ledger::default();
    for name in [FILE_BEFORE, FILE] {
        let file = match File::open(dir.join(name)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            file => file?,
        };
        let mut lines = BufReader::new(file.take(MAX_BYTES.saturating_mul(2)));
        let mut line = Vec::new();
        while lines.read_until(b'\n', &mut line)? > 0 {
            match serde_json::from_slice(&line) {
                Ok(kill) => ledger.kills.push(kill),
                Err(_) => ledger.bad_lines += 1,
            }
            line.clear();
        }
    }
    Ok(ledger)
}

fn open(dir: &Path) -> io::Result<File> {
    let path = dir.join(FILE);
    let existed = path.exists();
    let file = OpenOptions::new().read(true).append(true).create(true).mode(0o640).open(path)?;
    if !existed {
        atomic::sync_dir(dir)?;
    }
    Ok(file)
}

/// Bytes up to and with the last line end.
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

    fn pids(dir: &Path) -> Vec<u32> {
        read(dir).unwrap().kills.iter().map(|kill| kill.pid).collect()
    }

    #[test]
    fn appends_over_restarts() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(read(dir.path()).unwrap(), Ledger::default());
        Kills::open(dir.path()).unwrap().append(&kill(1)).unwrap();
        Kills::open(dir.path()).unwrap().append(&kill(2)).unwrap();
        assert_eq!(read(dir.path()).unwrap().kills, [kill(1), kill(2)]);
    }

    #[test]
    fn a_torn_line_is_cut_off_and_a_bad_one_skipped() {
        let dir = tempfile::tempdir().unwrap();
        Kills::open(dir.path()).unwrap().append(&kill(1)).unwrap();
        let mut file = OpenOptions::new().append(true).open(dir.path().join(FILE)).unwrap();
        file.write_all(b"not json\n{\"incident\":").unwrap();
        file.write_all(&[0; 9000]).unwrap();
        let mut kills = Kills::open(dir.path()).unwrap();
        assert_eq!(kills.torn_bytes(), 9012);
        kills.append(&kill(2)).unwrap();
        assert_eq!(pids(dir.path()), [1, 2]);
        assert_eq!(read(dir.path()).unwrap().bad_lines, 1);
    }

    #[test]
    fn a_file_without_a_line_end_is_all_torn() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(FILE), vec![b'x'; 5000]).unwrap();
        assert_eq!(Kills::open(dir.path()).unwrap().torn_bytes(), 5000);
        assert_eq!(fs::metadata(dir.path().join(FILE)).unwrap().len(), 0);
    }

    #[test]
    fn the_ledger_before_is_kept_once() {
        let dir = tempfile::tempdir().unwrap();
        let mut kills = Kills::with_cap(dir.path(), 1000).unwrap();
        for pid in 0..20 {
            kills.append(&kill(pid)).unwrap();
        }
        assert!(fs::metadata(dir.path().join(FILE)).unwrap().len() <= 1000);
        assert!(fs::metadata(dir.path().join(FILE_BEFORE)).unwrap().len() <= 1000);
        let pids = pids(dir.path());
        assert_eq!(*pids.last().unwrap(), 19);
        assert!(pids.windows(2).all(|pair| pair[1] == pair[0] + 1));
    }
}
