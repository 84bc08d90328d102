//! The ledgers: files of one line of JSON for each entry, appended to. A file that reaches its cap is renamed and a new
//! one begun, so that a ledger is two files at most. While no new one can be made, the old one grows to twice its cap.
//!
//! A line is written at once and outlives the agent. `kills.jsonl` is then synced, by who has the time to wait for a disk
//! ([`Ledger::take_unsynced`]), and before the incident that the kill belongs to. `sigkills.jsonl` is not, since there may be hundreds of SIGKILLs a second. Whoever sends them fills only a share of it (`shares`).

use std::collections::VecDeque;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::{atomic, own_dir};
use memtrace_incident::{KillLine, MoreSigkills, SigkillEntry, UnwatchedEntry};

mod shares;

const FILE_MODE: u32 = 0o640;
/// Entries that wait to be written; beyond it the oldest are given up.
const MAX_UNWRITTEN: usize = 4096;
/// How often a reader that a rotation overtakes begins again; each one is after megabytes of entries.
const MAX_READS: usize = 16;

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

    /// What is kept of all entries, oldest first, when the file has reached its cap: at most about half as much as the
    /// cap. `None` when it is simply the newest.
    fn keep(_entries: impl FnOnce() -> io::Result<Vec<Self>>) -> io::Result<Option<Vec<Self>>> {
        Ok(None)
    }

    /// Whether this entry stands for others too, which have no lines of their own.
    fn stands_for_others(&self) -> bool {
        false
    }

    /// Whether this entry stands for another one too, which has no line of its own.
    fn stands_for(&self, _other: &Self) -> bool {
        false
    }
}

impl LedgerEntry for KillLine {
    const FILE: &'static str = "kills.jsonl";
    const FILE_BEFORE: &'static str = "kills.jsonl.1";
    const FILE_NEXT: &'static str = "kills.jsonl.next";
    const MAX_BYTES: u64 = 8 << 20;
    const SYNCED: bool = true;

    fn key(&self) -> (u64, u32, u64) {
        match self {
            Self::Kill(kill) => (kill.boot_ns, kill.pid, kill.start_boot_ns),
            Self::Unwatched(UnwatchedEntry::NotWatched(gap)) => (gap.to.boot_ns, 0, gap.from.boot_ns),
            Self::Unwatched(UnwatchedEntry::KernelLog(kill)) => (kill.boot_ns, kill.pid, u64::MAX),
            Self::Unwatched(UnwatchedEntry::Counter(counted)) => (counted.boot_ns, 0, counted.cgroup_id),
            Self::Unwatched(UnwatchedEntry::UnwatchedKills(kills)) => (kills.boot_ns, 0, u64::MAX),
        }
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

    fn keep(entries: impl FnOnce() -> io::Result<Vec<Self>>) -> io::Result<Option<Vec<Self>>> {
        Ok(Some(shares::keep(entries()?, Self::MAX_BYTES / 2)))
    }

    fn stands_for_others(&self) -> bool {
        self.more.is_some()
    }

    fn stands_for(&self, other: &Self) -> bool {
        let same = self.sender_uid == other.sender_uid && self.sender_cgroup_path == other.sender_cgroup_path;
        let within =
            |more: &MoreSigkills| (same || !more.same_sender) && (&more.from..=&more.until).contains(&&other.wall);
        self.more.as_ref().is_some_and(within)
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
    /// Written to since [`Ledger::take_unsynced`].
    written: bool,
    /// What a rotation has left to be synced: the file before and the directory. Cap: 2 for each rotation since
    /// [`Ledger::take_unsynced`], which is called at least as often.
    rotated: Vec<File>,
}

/// A ledger read back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LedgerLines<E> {
    /// The entries, oldest first.
    pub entries: Vec<E>,
    /// Lines that are not an entry.
    pub bad_lines: u64,
}

impl<E: LedgerEntry> LedgerLines<E> {
    /// The entries in the bytes of a ledger.
    pub fn parse(bytes: &[u8]) -> Self {
        let mut ledger = Self { entries: Vec::new(), bad_lines: 0 };
        // Nothing fails that reads from memory.
        let _ = ledger.take(bytes);
        ledger
    }

    fn take(&mut self, mut lines: impl BufRead) -> io::Result<()> {
        let mut line = Vec::new();
        while lines.read_until(b'\n', &mut line)? > 0 {
            match serde_json::from_slice(&line) {
                Ok(entry) => self.entries.push(entry),
                Err(_) => self.bad_lines += 1,
            }
            line.clear();
        }
        Ok(())
    }
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
        let (unwritten, given_up, written, rotated) = (VecDeque::new(), 0, false, Vec::new());
        Ok(Self {
            dir: dir.to_owned(),
            file,
            bytes: whole,
            max_bytes,
            torn_bytes,
            unwritten,
            given_up,
            written,
            rotated,
        })
    }

    /// The state directory that the ledger is in.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Bytes of an incomplete last line that opening removed.
    pub fn torn_bytes(&self) -> u64 {
        self.torn_bytes
    }

    /// Appends the entries, after those that could not be written before. When that fails, all wait for the next call.
    /// They outlive this process; see [`Self::take_unsynced`] for a loss of power.
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
        let lines = lines(&self.unwritten)?;
        self.write(&lines)?;
        self.unwritten.clear();
        Ok(())
    }

    /// What is to be synced beside the loop, if this is a ledger whose entries are ([`LedgerEntry::SYNCED`]): the file
    /// if it was written to since the last call, and what a rotation has left.
    pub fn take_unsynced(&mut self) -> Vec<File> {
        let mut files = std::mem::take(&mut self.rotated);
        let file = self.written.then(|| self.file.try_clone().ok()).flatten();
        // Without a descriptor for it the next call tries again.
        self.written &= file.is_none();
        files.extend(file);
        files
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
        if let Err(error) = self.file.write_all(lines) {
            // On a full disk part of a line may be written: the next entry must not continue it.
            let _ = self.file.set_len(self.bytes);
            return Err(error);
        }
        // They are written even if there is no new file yet: the next append tries again.
        self.bytes = self.bytes.saturating_add(lines.len() as u64);
        self.written = E::SYNCED;
        Ok(())
    }

    /// Begins a new file. It is made before the old one is renamed, so that a failure leaves everything as it was.
    fn rotate(&mut self) -> io::Result<()> {
        let [file, before, next] = [E::FILE, E::FILE_BEFORE, E::FILE_NEXT].map(|name| self.dir.join(name));
        let fresh = append_to(&next)?;
        fresh.set_len(0)?;
        if let Some(kept) = E::keep(|| Ok(read::<E>(&self.dir)?.entries))? {
            // Until the next rename the entries are in both files; who reads them leaves the second out.
            atomic::replace(&before, &lines(&kept)?, FILE_MODE)?;
            fs::rename(&next, &file)?;
        } else {
            match fs::rename(&file, &before) {
                // Somebody has taken it away: what was in it is gone, and there is room for the next.
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            if let Err(error) = fs::rename(&next, &file) {
                let _ = fs::rename(&before, &file);
                return Err(error);
            }
        }
        let full = std::mem::replace(&mut self.file, fresh);
        self.bytes = 0;
        if E::SYNCED {
            self.rotated.push(full);
            self.rotated.extend(File::open(&self.dir));
        }
        Ok(())
    }
}

/// Reads the ledger in a state directory; one that does not exist is empty. It may be written to, and
/// rotated, meanwhile.
pub fn read<E: LedgerEntry>(dir: &Path) -> io::Result<LedgerLines<E>> {
    read_with::<E>(dir, || {})
}

/// The same, with something that happens between the first file and the second.
fn read_with<E: LedgerEntry>(dir: &Path, between: impl FnMut()) -> io::Result<LedgerLines<E>> {
    let mut ledger = LedgerLines { entries: Vec::new(), bad_lines: 0 };
    for file in files::<E>(dir, between)?.into_iter().flatten() {
        ledger.take(BufReader::new(file.take(E::MAX_BYTES.saturating_mul(2))))?;
    }
    Ok(ledger)
}

/// The newest lines of the ledger as they stand in its files, oldest first, at most `most` bytes of them.
pub fn newest_lines<E: LedgerEntry>(dir: &Path, most: u64) -> io::Result<Vec<u8>> {
    let (mut parts, mut left) = (Vec::new(), most);
    for mut file in files::<E>(dir, || {})?.into_iter().rev().flatten() {
        let bytes = whole_lines(&mut file)?;
        let mut begin = bytes.saturating_sub(left);
        // The line feed before it, to see whether a line begins there.
        file.seek(SeekFrom::Start(begin.saturating_sub(1)))?;
        let mut lines = BufReader::new(file.take(bytes - begin.saturating_sub(1)));
        if begin > 0 {
            begin = begin - 1 + lines.skip_until(b'\n')? as u64;
        }
        let mut part = Vec::with_capacity(usize::try_from(bytes - begin).unwrap_or(0));
        lines.read_to_end(&mut part)?;
        left = left.saturating_sub(part.len() as u64);
        parts.push(part);
        if begin > 0 {
            break;
        }
    }
    parts.reverse();
    Ok(if parts.len() == 1 { parts.remove(0) } else { parts.concat() })
}

/// The older file and the one that is appended to, both of one moment. `between` happens after the first is opened.
fn files<E: LedgerEntry>(dir: &Path, mut between: impl FnMut()) -> io::Result<[Option<File>; 2]> {
    let mut tries = 0;
    loop {
        let before = open_if_there(dir, E::FILE_BEFORE)?;
        between();
        let file = open_if_there(dir, E::FILE)?;
        tries += 1;
        // A rotation changes the older file first. If it is the same still, both are of one moment.
        let is_same = identity(before.as_ref())? == identity(open_if_there(dir, E::FILE_BEFORE)?.as_ref())?;
        if is_same || tries >= MAX_READS {
            return Ok([before, file]);
        }
    }
}

fn open_if_there(dir: &Path, name: &str) -> io::Result<Option<File>> {
    match own_dir::read(&dir.join(name)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        file => file.map(Some),
    }
}

/// Device and inode of a file. While it is open, no other one has them.
fn identity(file: Option<&File>) -> io::Result<Option<(u64, u64)>> {
    file.map(|file| file.metadata().map(|data| (data.dev(), data.ino()))).transpose()
}

fn lines<'a, E: LedgerEntry + 'a>(entries: impl IntoIterator<Item = &'a E>) -> io::Result<Vec<u8>> {
    let mut lines = Vec::new();
    for entry in entries {
        serde_json::to_writer(&mut lines, entry)?;
        lines.push(b'\n');
    }
    Ok(lines)
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
    own_dir::open(path, FILE_MODE, OpenOptions::new().read(true).append(true))
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
mod tests;
