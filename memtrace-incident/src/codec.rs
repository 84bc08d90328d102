//! Converts an incident to the bytes of its file, which is zstd over JSON, and back.
//!
//! A file may come from anywhere, so a reader trusts none of its claims. The size of the file is
//! bounded, and so is the size of the JSON, which is measured before anything is parsed. Every list
//! and string is bounded while it is parsed, and so is what all of them take ([`crate::caps`]):
//! [`decode`] stays below 256 MiB whatever the file. [`encode`] writes no file that [`decode`] would
//! refuse: of stacks that are too many or too deep for one it leaves the outer frames out.

use std::borrow::Cow;
use std::fmt;
use std::io::{self, BufReader, Read, Write};
use std::time::{Duration, SystemTime};

use serde::Deserialize;
use serde::de::{Deserializer as _, IgnoredAny, MapAccess, Visitor};

use crate::bounded::Bounds;
use crate::{Cgroup, Cut, Incident, SCHEMA, caps};

/// Largest file that is read, in bytes.
pub const MAX_FILE_BYTES: u64 = 32 << 20;
/// Largest JSON that a file may unpack to, in bytes.
pub const MAX_JSON_BYTES: u64 = 64 << 20;

/// JSON that [`read_cgroup`] reads at most; the cgroup is among the first 2 KiB.
const HEAD_BYTES: u64 = 64 << 10;
const HEAD_BUFFER: usize = 4096;

const ZSTD_MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];
const ZSTD_LEVEL: i32 = 3;
/// Largest window of zstd that is read, as a power of two: 8 MiB, which level 19 uses. It is memory
/// that a reader takes.
const WINDOW_LOG_MAX: u32 = 23;

/// Why a file cannot be read as an incident.
#[derive(Debug, thiserror::Error)]
pub enum Unreadable {
    /// Reading the file failed.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The file does not begin with a zstd header.
    #[error("not a memtrace incident (no zstd header)")]
    NotZstd,
    /// The zstd frame ends too early.
    #[error("the file is truncated")]
    Truncated,
    /// The zstd frame is damaged: a wrong checksum, for example.
    #[error("the file is damaged: {0}")]
    Damaged(io::Error),
    /// The file or its JSON is larger than [`MAX_FILE_BYTES`] or [`MAX_JSON_BYTES`].
    #[error("{what} is larger than the {} MiB that memtrace reads; `zstd -dc FILE | head -c 1000` shows what it is", limit >> 20)]
    TooLarge {
        /// What is too large, for the message.
        what: &'static str,
        /// The cap, in bytes.
        limit: u64,
    },
    /// The JSON is not an incident, or a list in it has too many entries.
    #[error("not a memtrace incident: {}{error}", if field.is_empty() { String::new() } else { format!("in `{field}`: ") })]
    NotAnIncident {
        /// Where in the JSON: `oom.victims[3].comm`; empty at its top.
        field: String,
        /// What is wrong there.
        error: serde_json::Error,
    },
    /// The schema of the file is not [`SCHEMA`].
    #[error("schema {found} is {} than this memtrace reads ({SCHEMA}){}", if *found > SCHEMA { "newer" } else { "older" }, if *found > SCHEMA { "; update memtrace" } else { "" })]
    Schema {
        /// The schema that the file states.
        found: u32,
    },
    /// The id of the incident is not a ULID, so it is not a safe file name either.
    #[error("its id is not a ULID")]
    BadId,
    /// A timeline column has another length than `boot_ns`.
    #[error("timeline column {column} has {found} rows, boot_ns has {expected}")]
    Column {
        /// Name of the column.
        column: &'static str,
        /// Rows of the column.
        found: usize,
        /// Rows of `boot_ns`.
        expected: usize,
    },
}

/// Reads an incident from a stream. Reads at most one byte more than [`MAX_FILE_BYTES`].
pub fn read_from(stream: impl Read) -> Result<Incident, Unreadable> {
    let mut bytes = Vec::new();
    stream.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes)?;
    decode(&bytes)
}

/// Encodes an incident as the bytes of its file: JSON, compressed with zstd, with a checksum. Stacks
/// are cut, all to the same number of frames, if the file could not be read otherwise.
pub fn encode(incident: &Incident) -> io::Result<Vec<u8>> {
    let deepest = |incident: &Incident| incident.allocation_paths.iter().map(|path| path.frames.len()).max();
    let mut incident = Cow::Borrowed(incident);
    loop {
        let frames: usize = incident.allocation_paths.iter().map(|path| path.frames.len()).sum();
        let deepest = deepest(&incident).unwrap_or(0);
        if frames <= caps::ALL_FRAMES {
            let (bytes, json_bytes) = encode_whole(&incident)?;
            if json_bytes <= MAX_JSON_BYTES || deepest == 0 {
                return Ok(bytes);
            }
        }
        for path in &mut incident.to_mut().allocation_paths {
            if path.frames.len() > deepest / 2 {
                path.frames.truncate(deepest / 2);
                path.cut = Some(Cut::Frames);
            }
        }
    }
}

/// The file, and the size of its JSON.
fn encode_whole(incident: &Incident) -> io::Result<(Vec<u8>, u64)> {
    let mut encoder = zstd::Encoder::new(Vec::new(), ZSTD_LEVEL)?;
    encoder.include_checksum(true)?;
    let mut counted = Counted { inner: encoder, bytes: 0 };
    serde_json::to_writer(&mut counted, incident)?;
    Ok((counted.inner.finish()?, counted.bytes))
}

/// Counts what is written through it.
struct Counted<W> {
    inner: W,
    bytes: u64,
}

impl<W: Write> Write for Counted<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.inner.write(bytes)?;
        self.bytes = self.bytes.saturating_add(written as u64);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

/// Decodes the bytes of an incident file. Any bytes give an incident or an error, never a panic.
pub fn decode(bytes: &[u8]) -> Result<Incident, Unreadable> {
    if bytes.len() as u64 > MAX_FILE_BYTES {
        return Err(Unreadable::TooLarge { what: "the file", limit: MAX_FILE_BYTES });
    }
    if !bytes.starts_with(&ZSTD_MAGIC) {
        return Err(if !bytes.is_empty() && ZSTD_MAGIC.starts_with(bytes) {
            Unreadable::Truncated
        } else {
            Unreadable::NotZstd
        });
    }
    measure(bytes, MAX_JSON_BYTES)?;
    let bounds = Bounds::new(caps::MEMORY);
    let incident: Incident = match parse(bytes, &bounds)? {
        Ok(incident) => incident,
        // A file with a newer schema may fail to parse. Then its schema number is the better
        // message.
        Err(error) => {
            return Err(match parse::<Versioned>(bytes, &Bounds::new(caps::MEMORY))? {
                Ok(Versioned { schema }) if schema != SCHEMA => Unreadable::Schema { found: schema },
                _ => Unreadable::NotAnIncident { field: bounds.field(), error },
            });
        }
    };
    check(&incident)?;
    Ok(incident)
}

/// The cgroup of an incident, from the beginning of its file: for who has many files and wants to
/// know which is whose. `None` when it cannot be read.
pub fn read_cgroup(stream: impl Read) -> Option<Cgroup> {
    let mut decoder = zstd::Decoder::new(stream).ok()?;
    decoder.window_log_max(WINDOW_LOG_MAX).ok()?;
    let json = BufReader::with_capacity(HEAD_BUFFER, decoder).take(HEAD_BYTES);
    let mut found = None;
    // What comes after the cgroup is not read, which is an error to the parser.
    let _ = serde_json::Deserializer::from_reader(json).deserialize_map(Head(&mut found));
    found
}

/// Takes the cgroup and ends there.
struct Head<'a>(&'a mut Option<Cgroup>);

impl<'de> Visitor<'de> for Head<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an incident")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(key) = map.next_key::<String>()? {
            if key == "cgroup" {
                *self.0 = Some(map.next_value()?);
                return Ok(());
            }
            map.next_value::<IgnoredAny>()?;
        }
        Ok(())
    }
}

/// Whether `id` is a ULID as memtrace writes it, which makes it a safe file name.
pub fn is_id(id: &str) -> bool {
    id.len() == 26 && is_id_prefix(id) && id.starts_with(|first| ('0'..='7').contains(&first))
}

/// Whether `text` can be the begin of an id: 1 to 26 digits of Crockford's base 32, in upper case.
pub fn is_id_prefix(text: &str) -> bool {
    (1..=26).contains(&text.len())
        && text.bytes().all(|b| b.is_ascii_digit() || (b.is_ascii_uppercase() && !b"ILOU".contains(&b)))
}

/// When the incident with this id happened, to the millisecond. `None` when `id` is not a ULID.
pub fn happened(id: &str) -> Option<SystemTime> {
    let ulid = ulid::Ulid::from_string(id).ok()?;
    SystemTime::UNIX_EPOCH.checked_add(Duration::from_millis(ulid.timestamp_ms()))
}

#[derive(Deserialize)]
struct Versioned {
    schema: u32,
}

/// Unpacks the file once and drops the bytes. A zip bomb costs time up to the cap but no memory,
/// and damage anywhere in the file is found before any of it is parsed.
fn measure(bytes: &[u8], limit: u64) -> Result<(), Unreadable> {
    let unpacked = unpacker(bytes).and_then(|json| io::copy(&mut json.take(limit.saturating_add(1)), &mut io::sink()));
    let size = unpacked.map_err(|error| match error.kind() {
        io::ErrorKind::UnexpectedEof => Unreadable::Truncated,
        _ => Unreadable::Damaged(error),
    })?;
    if size > limit {
        return Err(Unreadable::TooLarge { what: "the JSON in the file", limit });
    }
    Ok(())
}

fn unpacker(bytes: &[u8]) -> io::Result<zstd::Decoder<'static, &[u8]>> {
    let mut decoder = zstd::Decoder::with_buffer(bytes)?;
    decoder.window_log_max(WINDOW_LOG_MAX)?;
    Ok(decoder)
}

/// Parses while it unpacks, so the JSON is never in memory as a whole. Call [`measure`] first.
fn parse<T: for<'de> Deserialize<'de>>(bytes: &[u8], bounds: &Bounds) -> Result<serde_json::Result<T>, Unreadable> {
    let json = unpacker(bytes)?;
    let mut json = serde_json::Deserializer::from_reader(BufReader::new(json));
    Ok(bounds.parse(&mut json).and_then(|value| json.end().map(|()| value)))
}

/// Checks what types cannot say: the schema, the id, and that columns are of one length.
pub(crate) fn check(incident: &Incident) -> Result<(), Unreadable> {
    if incident.schema != SCHEMA {
        return Err(Unreadable::Schema { found: incident.schema });
    }
    if !is_id(&incident.id) {
        return Err(Unreadable::BadId);
    }
    let columns = &incident.timeline.columns;
    let expected = columns.boot_ns.len();
    let lengths = [
        ("usage_bytes", columns.usage_bytes.len()),
        ("limit_bytes", columns.limit_bytes.len()),
        ("watermark_bytes", columns.watermark_bytes.len()),
        ("anon_bytes", columns.anon_bytes.len()),
        ("file_bytes", columns.file_bytes.len()),
        ("shmem_bytes", columns.shmem_bytes.len()),
        ("swap_bytes", columns.swap_bytes.len()),
        ("swap_usage_bytes", columns.swap_usage_bytes.len()),
        ("swap_limit_bytes", columns.swap_limit_bytes.len()),
    ];
    match lengths.into_iter().find(|(_, found)| *found != expected) {
        Some((column, found)) => Err(Unreadable::Column { column, found, expected }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod bomb_tests;
#[cfg(test)]
mod tests;
