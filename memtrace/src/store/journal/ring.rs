//! The files that the journal has finished: its own closed segments and those of the run before. The oldest go when
//! the journal is as large as it may be, or when its file system is full.

use std::collections::VecDeque;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::{PREVIOUS, file_name, segments};

/// Files given up between two flushes at most. A flush follows each batch of 4 MiB: this many of the smallest segments
/// make room for one.
const GIVEN_UP_A_FLUSH: u32 = 64;

/// Closed segments of the ring, and the segments of the run before.
#[derive(Debug)]
pub(super) struct Ring {
    dir: PathBuf,
    /// Segments of the run before, in `previous/`, the oldest last. Cap: the files of the directory.
    previous: Vec<u64>,
    /// Closed segments of this run, oldest first: sequence and bytes. Cap: the journal's total size.
    closed: VecDeque<(u64, u64)>,
    /// Files that may still be given up before the next flush.
    may_give_up: u32,
}

impl Ring {
    /// What is in `dir` and its `previous/`.
    pub(super) fn open(dir: &Path) -> io::Result<Self> {
        let mut closed = VecDeque::new();
        for sequence in segments(dir)?.into_iter().rev() {
            closed.push_back((sequence, fs::symlink_metadata(dir.join(file_name(sequence)))?.len()));
        }
        // What cannot be listed cannot be given up.
        let previous = segments(&dir.join(PREVIOUS)).unwrap_or_default();
        Ok(Self { dir: dir.to_owned(), previous, closed, may_give_up: GIVEN_UP_A_FLUSH })
    }

    /// Path of a segment of this run.
    pub(super) fn path(&self, sequence: u64) -> PathBuf {
        self.dir.join(file_name(sequence))
    }

    /// Number of the newest closed segment.
    pub(super) fn newest(&self) -> Option<u64> {
        self.closed.back().map(|(sequence, _)| *sequence)
    }

    /// Size of the closed segments, bytes.
    pub(super) fn bytes(&self) -> u64 {
        self.closed.iter().map(|(_, bytes)| bytes).sum()
    }

    /// Adds a segment that was just closed.
    pub(super) fn push(&mut self, sequence: u64, bytes: u64) {
        self.closed.push_back((sequence, bytes));
    }

    /// Deletes a segment that could not be begun.
    pub(super) fn discard(&mut self, sequence: u64) {
        let _ = fs::remove_file(self.path(sequence));
        self.closed.retain(|(closed, _)| *closed != sequence);
    }

    /// Deletes the oldest closed segment; false when there is none.
    pub(super) fn remove_oldest(&mut self) -> io::Result<bool> {
        let Some((sequence, _)) = self.closed.front() else {
            return Ok(false);
        };
        match fs::remove_file(self.path(*sequence)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => {
                self.closed.pop_front();
                Ok(true)
            }
        }
    }

    /// Makes room in a full file system: deletes the oldest file, of the run before first. False when nothing is left
    /// to give up, or enough was before this flush.
    pub(super) fn give_up_oldest(&mut self) -> bool {
        while let Some(left) = self.may_give_up.checked_sub(1) {
            self.may_give_up = left;
            let Some(oldest) = self.previous.pop() else {
                return self.remove_oldest().unwrap_or(false);
            };
            // One that cannot be deleted stays, and gives no room.
            if fs::remove_file(self.dir.join(PREVIOUS).join(file_name(oldest))).is_ok() {
                return true;
            }
        }
        false
    }

    /// A flush: as many files as ever may be given up until the next.
    pub(super) fn renew(&mut self) {
        self.may_give_up = GIVEN_UP_A_FLUSH;
    }
}
