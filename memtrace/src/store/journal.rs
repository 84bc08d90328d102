//! The journal: every input of the engine, in order, in a bounded ring of segment files. A replay reads it back.
//!
//! A segment is `MTJR`, a little-endian `u32` version, then frames
//! `{u32 len, u32 crc32 of kind and payload, u8 kind, payload of len bytes}`. A frame that is cut off or fails its
//! checksum ends its segment and is counted: a crash in the middle of a write costs the tail of one segment.

use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;

use bytes::{Buf, Bytes, BytesMut};

use memtrace_engine::input::{Fact, Input};

mod reader;
mod ring;
mod writer;

pub use reader::{JournalReader, JournalStats, OpenError};
pub use writer::JournalWriter;

/// First bytes of every segment.
pub const MAGIC: [u8; 4] = *b"MTJR";
/// Version of the format this build writes and reads.
pub const VERSION: u32 = 1;
/// Bytes before the first frame.
pub const HEADER_BYTES: usize = 8;
/// Bytes of a frame before its payload.
pub const FRAME_BYTES: usize = 9;
/// Longest payload, bytes; a frame that claims more is torn.
pub const MAX_PAYLOAD: usize = 1 << 20;

/// Subdirectory of the journal's directory for the segments of the run before.
const PREVIOUS: &str = "previous";

/// Payload: a wire record, as the ring had it.
const KIND_RECORD: u8 = 1;
/// Payload: a fact as JSON.
const KIND_FACT: u8 = 2;
/// Payload: a fact of the preamble as JSON. Each segment begins with what the engine knows, for a replay that begins
/// there.
const KIND_PREAMBLE: u8 = 3;

/// The content of a frame.
#[derive(Clone, Debug, PartialEq)]
pub enum JournalFrame<'a> {
    /// An input of the engine.
    Input(Input<'a>),
    /// What the engine knew when this segment began: an input only in the first segment of a replay.
    Preamble(Fact),
}

/// Why a segment ended before its bytes did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SegmentEnd {
    /// The first bytes are not [`MAGIC`].
    NotAJournal,
    /// Written by a newer memtrace, in this version of the format.
    Newer(u32),
    /// A frame is cut off, too long or fails its checksum.
    Torn,
}

/// Decodes the bytes of one segment, in pieces of any size, to frames. Never panics, whatever the bytes are.
///
/// Holds one incomplete frame and the last chunk at most, if the caller takes every frame before it pushes more.
#[derive(Debug, Default)]
pub struct SegmentDecoder {
    /// Bytes that are not decoded yet.
    pending: BytesMut,
    /// Payload of the record decoded last.
    record: Bytes,
    header_seen: bool,
    stopped: Option<SegmentEnd>,
    frames: u64,
    unknown: u64,
    torn_bytes: u64,
}

/// A decoded frame; the bytes of a record stay in the decoder.
pub(super) enum DecodedFrame {
    Record,
    Fact(Fact),
    Preamble(Fact),
}

impl SegmentDecoder {
    /// A decoder at the start of a segment.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds the next bytes of the segment.
    pub fn push(&mut self, chunk: &[u8]) {
        if self.stopped.is_some() {
            self.torn_bytes = self.torn_bytes.saturating_add(chunk.len() as u64);
            return;
        }
        self.pending.extend_from_slice(chunk);
    }

    /// The next whole frame. `None` until more bytes are pushed, and always once the segment has ended early.
    pub fn next_frame(&mut self) -> Option<JournalFrame<'_>> {
        let step = self.advance()?;
        Some(match step {
            DecodedFrame::Record => JournalFrame::Input(Input::Record(self.record())),
            DecodedFrame::Fact(fact) => JournalFrame::Input(Input::Fact(fact)),
            DecodedFrame::Preamble(fact) => JournalFrame::Preamble(fact),
        })
    }

    /// Says that the segment has no more bytes: what is left is a torn frame.
    pub fn finish(&mut self) {
        if !self.pending.is_empty() {
            self.stop(SegmentEnd::Torn);
        }
    }

    /// Why the segment ended early; `None` while it has not.
    pub fn stopped(&self) -> Option<SegmentEnd> {
        self.stopped
    }

    /// Valid frames so far.
    pub fn frames(&self) -> u64 {
        self.frames
    }

    /// Valid frames that were skipped because this build does not know their kind or content.
    pub fn unknown(&self) -> u64 {
        self.unknown
    }

    /// Bytes that could not be decoded.
    pub fn torn_bytes(&self) -> u64 {
        self.torn_bytes
    }

    pub(super) fn record(&self) -> &[u8] {
        &self.record
    }

    pub(super) fn advance(&mut self) -> Option<DecodedFrame> {
        if self.stopped.is_some() || (!self.header_seen && !self.take_header()) {
            return None;
        }
        loop {
            let (head, rest) = self.pending.split_first_chunk::<FRAME_BYTES>()?;
            let [l0, l1, l2, l3, c0, c1, c2, c3, kind] = *head;
            let len = u32::from_le_bytes([l0, l1, l2, l3]) as usize;
            if len > MAX_PAYLOAD {
                self.stop(SegmentEnd::Torn);
                return None;
            }
            if checksum(kind, rest.get(..len)?) != u32::from_le_bytes([c0, c1, c2, c3]) {
                self.stop(SegmentEnd::Torn);
                return None;
            }
            self.pending.advance(FRAME_BYTES);
            let payload = self.pending.split_to(len).freeze();
            let step = match kind {
                KIND_RECORD => {
                    self.record = payload;
                    Some(DecodedFrame::Record)
                }
                KIND_FACT => serde_json::from_slice(&payload).ok().map(DecodedFrame::Fact),
                KIND_PREAMBLE => serde_json::from_slice(&payload).ok().map(DecodedFrame::Preamble),
                _ => None,
            };
            self.frames = self.frames.saturating_add(1);
            match step {
                Some(step) => return Some(step),
                None => self.unknown = self.unknown.saturating_add(1),
            }
        }
    }

    fn take_header(&mut self) -> bool {
        let Some((header, _)) = self.pending.split_first_chunk::<HEADER_BYTES>() else {
            return false;
        };
        let [m0, m1, m2, m3, v0, v1, v2, v3] = *header;
        let version = u32::from_le_bytes([v0, v1, v2, v3]);
        if [m0, m1, m2, m3] != MAGIC {
            self.stop(SegmentEnd::NotAJournal);
        } else if version > VERSION {
            self.stop(SegmentEnd::Newer(version));
        } else {
            self.header_seen = true;
            self.pending.advance(HEADER_BYTES);
        }
        self.header_seen
    }

    fn stop(&mut self, why: SegmentEnd) {
        self.torn_bytes = self.torn_bytes.saturating_add(self.pending.len() as u64);
        self.pending = BytesMut::new();
        self.stopped = Some(why);
    }
}

/// Appends one frame to `out`; false, with nothing appended, when its payload is longer than [`MAX_PAYLOAD`].
fn encode(kind: u8, payload: &[u8], out: &mut Vec<u8>) -> bool {
    let Some(len) = u32::try_from(payload.len()).ok().filter(|_| payload.len() <= MAX_PAYLOAD) else {
        return false;
    };
    out.extend_from_slice(&len.to_le_bytes());
    out.extend_from_slice(&checksum(kind, payload).to_le_bytes());
    out.push(kind);
    out.extend_from_slice(payload);
    true
}

fn checksum(kind: u8, payload: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&[kind]);
    hasher.update(payload);
    hasher.finalize()
}

/// Sequence number of a segment's file name.
fn sequence(name: &str) -> Option<u64> {
    let digits = name.strip_prefix("journal-")?.strip_suffix(".mtj")?;
    (digits.len() == 20 && digits.bytes().all(|byte| byte.is_ascii_digit())).then(|| digits.parse().ok())?
}

fn file_name(sequence: u64) -> String {
    format!("journal-{sequence:020}.mtj")
}

/// Sequence numbers of the segments in `dir`, the oldest last.
fn segments(dir: &Path) -> io::Result<Vec<u64>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir)? {
        found.extend(entry?.file_name().to_str().and_then(sequence));
    }
    found.sort_unstable_by(|left, right| right.cmp(left));
    Ok(found)
}

/// Whether a write failed because the file system, or the share of it that this user has, is full.
fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// Moves the segments in `dir` to a subdirectory, `previous`, whose old content is deleted. They stay readable there
/// until the next run starts, or needs the room.
pub fn set_aside(dir: &Path) -> io::Result<()> {
    let aside = dir.join(PREVIOUS);
    match fs::remove_dir_all(&aside) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut segments = segments(dir)?;
    while let Err(error) = fs::DirBuilder::new().mode(0o700).create(&aside) {
        // On a full disk the oldest segment makes room for the directory.
        match segments.pop().filter(|_| is_full(&error)) {
            Some(oldest) => fs::remove_file(dir.join(file_name(oldest)))?,
            None => return Err(error),
        }
    }
    // The oldest first: should it end in between, the newest are read again.
    for sequence in segments.into_iter().rev() {
        fs::rename(dir.join(file_name(sequence)), aside.join(file_name(sequence)))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
