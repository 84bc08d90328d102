//! Writes the journal: whole frames, one segment after another, within a total size.

use std::collections::VecDeque;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::{KIND_FACT, KIND_PREAMBLE, KIND_RECORD, MAGIC, VERSION, encode, file_name, sequence};
use memtrace_engine::input::{Fact, Input};

/// Frames are written in pieces of about this size, bytes.
const BUFFER_BYTES: usize = 64 << 10;

/// Appends inputs to the journal in a directory.
///
/// Before each input: `if writer.rotate_needed() { writer.begin_segment(&engine.preamble(now))? }`. An error loses
/// frames (see [`JournalWriter::lost`]) and closes the segment; nothing more is written until the next
/// [`JournalWriter::flush`], so that a full disk costs one attempt a tick, and then a new segment begins.
#[derive(Debug)]
pub struct JournalWriter {
    dir: PathBuf,
    segment_bytes: u64,
    total_bytes: u64,
    next: u64,
    /// Closed segments, oldest first: sequence and bytes. Cap: `total_bytes`.
    closed: VecDeque<(u64, u64)>,
    open: Option<Segment>,
    /// A write has failed: nothing is tried until the next flush.
    resting: bool,
    lost: u64,
    scratch: Vec<u8>,
}

#[derive(Debug)]
struct Segment {
    sequence: u64,
    file: File,
    /// Bytes in the file, all of them whole frames.
    written: u64,
    /// Header and preamble.
    head: u64,
    /// Whole frames not yet in the file. Cap: `BUFFER_BYTES` and one frame.
    buffer: Vec<u8>,
    buffered_frames: u64,
}

impl JournalWriter {
    /// Creates `dir` if needed and continues after the segments in it. The directory never holds more than
    /// `total_bytes` and one frame, in segments of about `segment_bytes`.
    pub fn open(dir: &Path, segment_bytes: u64, total_bytes: u64) -> io::Result<Self> {
        DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
        let mut closed = Vec::new();
        for entry in fs::read_dir(dir)? {
            let entry = entry?;
            if let Some(sequence) = entry.file_name().to_str().and_then(sequence) {
                closed.push((sequence, entry.metadata()?.len()));
            }
        }
        closed.sort_unstable();
        Ok(Self {
            dir: dir.to_owned(),
            segment_bytes,
            total_bytes: total_bytes.max(segment_bytes),
            next: closed.last().map_or(1, |(sequence, _)| sequence.saturating_add(1)),
            closed: closed.into(),
            open: None,
            resting: false,
            lost: 0,
            scratch: Vec::new(),
        })
    }

    /// Whether a new segment is to be begun before the next input.
    pub fn rotate_needed(&self) -> bool {
        match &self.open {
            None => !self.resting,
            // Otherwise a preamble larger than a segment would give every input a segment of its own.
            Some(open) => open.size() >= self.segment_bytes.max(open.head.saturating_mul(2)),
        }
    }

    /// Closes the segment, deletes the oldest segments beyond the total size and begins a new one with `preamble`.
    pub fn begin_segment(&mut self, preamble: &[Fact]) -> io::Result<()> {
        let closed = self.close();
        let begun = self.begin(preamble);
        self.resting = begun.is_err();
        closed.and(begun)
    }

    /// Appends one input. It is written with the next [`JournalWriter::flush`] at the latest.
    pub fn append(&mut self, input: &Input<'_>) -> io::Result<()> {
        let Some(open) = &mut self.open else {
            self.lost = self.lost.saturating_add(1);
            return Err(io::Error::other("no journal segment is open"));
        };
        let fits = match input {
            Input::Record(bytes) => encode(KIND_RECORD, bytes, &mut open.buffer),
            Input::Fact(fact) => encode_fact(KIND_FACT, fact, &mut self.scratch, &mut open.buffer)?,
        };
        if !fits {
            self.lost = self.lost.saturating_add(1);
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "longer than a journal frame may be"));
        }
        open.buffered_frames = open.buffered_frames.saturating_add(1);
        if open.buffer.len() >= BUFFER_BYTES {
            return self.write_out();
        }
        Ok(())
    }

    /// Writes everything appended so far, and lets a failed writer try again.
    pub fn flush(&mut self) -> io::Result<()> {
        self.resting = false;
        self.write_out()
    }

    /// Frames that could not be written.
    pub fn lost(&self) -> u64 {
        self.lost
    }

    /// Number of the segment that will begin next; it changes whenever one begins.
    pub fn next_segment(&self) -> u64 {
        self.next
    }

    /// Size of the journal, bytes: its files and the buffer.
    pub fn bytes(&self) -> u64 {
        let closed: u64 = self.closed.iter().map(|(_, bytes)| bytes).sum();
        closed.saturating_add(self.open.as_ref().map_or(0, Segment::size))
    }

    fn begin(&mut self, preamble: &[Fact]) -> io::Result<()> {
        self.make_room()?;
        let sequence = self.next;
        let path = self.dir.join(file_name(sequence));
        let file = OpenOptions::new().append(true).create_new(true).mode(0o600).open(&path)?;
        self.next = self.next.saturating_add(1);
        let mut buffer = Vec::with_capacity(BUFFER_BYTES);
        buffer.extend_from_slice(&MAGIC);
        buffer.extend_from_slice(&VERSION.to_le_bytes());
        for fact in preamble {
            if !encode_fact(KIND_PREAMBLE, fact, &mut self.scratch, &mut buffer)? {
                self.lost = self.lost.saturating_add(1);
            }
        }
        let head = buffer.len() as u64;
        self.open = Some(Segment { sequence, file, written: 0, head, buffer, buffered_frames: 0 });
        // Written at once: a full disk is found here, and leaves no segment without a header.
        let written = self.write_out();
        if written.is_err() {
            let _ = fs::remove_file(&path);
            self.closed.retain(|(closed, _)| *closed != sequence);
        }
        written
    }

    fn make_room(&mut self) -> io::Result<()> {
        while self.bytes().saturating_add(self.segment_bytes) > self.total_bytes {
            let Some((sequence, _)) = self.closed.front() else {
                break;
            };
            match fs::remove_file(self.dir.join(file_name(*sequence))) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => self.closed.pop_front(),
            };
        }
        Ok(())
    }

    fn close(&mut self) -> io::Result<()> {
        let written = self.write_out();
        if let Some(open) = self.open.take() {
            self.closed.push_back((open.sequence, open.written));
        }
        written
    }

    fn write_out(&mut self) -> io::Result<()> {
        let Some(open) = &mut self.open else {
            return Ok(());
        };
        if let Err(error) = open.file.write_all(&open.buffer) {
            // Keep whole frames only: remove what a short write left.
            let _ = open.file.set_len(open.written);
            self.lost = self.lost.saturating_add(open.buffered_frames);
            self.closed.push_back((open.sequence, open.written));
            self.open = None;
            self.resting = true;
            return Err(error);
        }
        open.written = open.size();
        open.buffer.clear();
        open.buffered_frames = 0;
        Ok(())
    }
}

impl Segment {
    fn size(&self) -> u64 {
        self.written.saturating_add(self.buffer.len() as u64)
    }
}

impl Drop for JournalWriter {
    fn drop(&mut self) {
        let _ = self.write_out();
    }
}

fn encode_fact(kind: u8, fact: &Fact, scratch: &mut Vec<u8>, out: &mut Vec<u8>) -> io::Result<bool> {
    scratch.clear();
    serde_json::to_writer(&mut *scratch, fact)?;
    Ok(encode(kind, scratch, out))
}

#[cfg(test)]
impl JournalWriter {
    /// Lets the open segment write to `file` from now on.
    pub(super) fn break_with(&mut self, file: File) {
        self.open.as_mut().unwrap().file = file;
    }
}
