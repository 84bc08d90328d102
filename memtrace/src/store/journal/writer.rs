//! Writes the journal: whole frames, one segment after another, within a total size and within the room that its file
//! system has.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

use super::ring::Ring;
use super::{KIND_FACT, KIND_PREAMBLE, KIND_RECORD, MAGIC, VERSION, encode, is_full};
use memtrace_engine::input::{Fact, Input};

/// Frames are written in pieces of about this size, bytes.
const BUFFER_BYTES: usize = 64 << 10;

/// Segments that the journal is divided into where the file system has less room than it may take: when the oldest is
/// given up, an eighth of what fits is lost.
const SEGMENTS_THAT_FIT: u64 = 8;
/// Smallest of these, bytes: each begins with a preamble, and each is a file.
const SMALLEST_SEGMENT_BYTES: u64 = 64 << 10;

/// Appends inputs to the journal in a directory.
///
/// When the file system is full, the segments of the run before are given up, then the oldest of this one, until a
/// write succeeds: the ring is as large as its file system lets it be, and grows again when there is room.
///
/// Before each input: `if writer.rotate_needed() { writer.begin_segment(&engine.preamble(now))? }`. An error loses
/// frames (see [`JournalWriter::lost`]) and closes the segment; nothing more is written until the next
/// [`JournalWriter::flush`], so that a full disk costs one attempt a tick, and then a new segment begins.
#[derive(Debug)]
pub struct JournalWriter {
    /// Size of a segment where there is room, bytes.
    segment_bytes: u64,
    /// Size of the segments at present, bytes: `segment_bytes`, or less since the file system was full.
    fitting_bytes: u64,
    /// The file system was full since this segment began, or when it was to begin.
    was_full: bool,
    total_bytes: u64,
    next: u64,
    ring: Ring,
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
    /// `total_bytes` and one frame, in segments of about `segment_bytes`, beside those that [`super::set_aside`] moved.
    pub fn open(dir: &Path, segment_bytes: u64, total_bytes: u64) -> io::Result<Self> {
        DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
        let ring = Ring::open(dir)?;
        Ok(Self {
            segment_bytes,
            fitting_bytes: segment_bytes,
            was_full: false,
            total_bytes: total_bytes.max(segment_bytes),
            next: ring.newest().map_or(1, |sequence| sequence.saturating_add(1)),
            ring,
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
            Some(open) => open.size() >= self.fitting_bytes.max(open.head.saturating_mul(2)),
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
        self.ring.renew();
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
        self.ring.bytes().saturating_add(self.open.as_ref().map_or(0, Segment::size))
    }

    fn begin(&mut self, preamble: &[Fact]) -> io::Result<()> {
        if !std::mem::take(&mut self.was_full) {
            self.fitting_bytes = self.fitting_bytes.saturating_mul(2).min(self.segment_bytes);
        }
        self.make_room()?;
        let sequence = self.next;
        let file = self.create(sequence)?;
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
            self.ring.discard(sequence);
        }
        written
    }

    fn make_room(&mut self) -> io::Result<()> {
        while self.bytes().saturating_add(self.fitting_bytes) > self.total_bytes {
            if !self.ring.remove_oldest()? {
                break;
            }
        }
        Ok(())
    }

    /// Creates the file of a segment. Where files are scarce, an old one is given up for it.
    fn create(&mut self, sequence: u64) -> io::Result<File> {
        let path = self.ring.path(sequence);
        loop {
            match OpenOptions::new().append(true).create_new(true).mode(0o600).open(&path) {
                Err(error) if is_full(&error) && self.give_up_oldest() => {}
                created => return created,
            }
        }
    }

    fn close(&mut self) -> io::Result<()> {
        let written = self.write_out();
        if let Some(open) = self.open.take() {
            self.ring.push(open.sequence, open.written);
        }
        written
    }

    fn write_out(&mut self) -> io::Result<()> {
        loop {
            let Some(open) = &mut self.open else {
                return Ok(());
            };
            let Err(error) = open.write() else {
                return Ok(());
            };
            // Keep whole frames only: remove what a short write left.
            let is_whole = open.file.set_len(open.written).is_ok();
            if is_whole && is_full(&error) && self.give_up_oldest() {
                continue;
            }
            if let Some(open) = self.open.take() {
                self.lost = self.lost.saturating_add(open.buffered_frames);
                self.ring.push(open.sequence, open.written);
            }
            self.resting = true;
            return Err(error);
        }
    }

    /// The file system is full: gives up the oldest file; false when that is not possible. What fits is divided into
    /// segments anew, so that the next to go is a small part of it.
    fn give_up_oldest(&mut self) -> bool {
        if !std::mem::replace(&mut self.was_full, true) {
            let fitting = (self.bytes() / SEGMENTS_THAT_FIT).max(SMALLEST_SEGMENT_BYTES);
            self.fitting_bytes = fitting.min(self.segment_bytes);
        }
        self.ring.give_up_oldest()
    }
}

impl Segment {
    fn size(&self) -> u64 {
        self.written.saturating_add(self.buffer.len() as u64)
    }

    /// Writes the buffer to the file. After an error a part of it may be there, and all of it is still in the buffer.
    fn write(&mut self) -> io::Result<()> {
        self.file.write_all(&self.buffer)?;
        self.written = self.size();
        self.buffer.clear();
        self.buffered_frames = 0;
        Ok(())
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
