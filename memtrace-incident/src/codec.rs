//! Converts an incident to the bytes of its file, which is zstd over JSON, and back.
//!
//! A file may come from anywhere, so a reader trusts none of its claims. The size of the file is
//! bounded, and so is the size of the JSON, which is measured before anything is parsed. Every list
//! is bounded while it is parsed ([`crate::caps`]). So the caps bound the memory that [`decode`]
//! takes.

use std::io::{self, BufReader, Read};
use std::time::{Duration, SystemTime};

use serde::Deserialize;

use crate::{Incident, SCHEMA};

/// Largest file that is read, in bytes.
pub const MAX_FILE_BYTES: u64 = 64 << 20;
/// Largest JSON that a file may unpack to, in bytes.
pub const MAX_JSON_BYTES: u64 = 512 << 20;

const ZSTD_MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];
const ZSTD_LEVEL: i32 = 3;

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
    #[error("{what} is larger than {limit} bytes")]
    TooLarge {
        /// What is too large, for the message.
        what: &'static str,
        /// The cap, in bytes.
        limit: u64,
    },
    /// The JSON is not an incident, or a list in it has too many entries.
    #[error("not a memtrace incident: {0}")]
    NotAnIncident(serde_json::Error),
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

/// Encodes an incident as the bytes of its file: JSON, compressed with zstd, with a checksum.
pub fn encode(incident: &Incident) -> io::Result<Vec<u8>> {
    let mut encoder = zstd::Encoder::new(Vec::new(), ZSTD_LEVEL)?;
    encoder.include_checksum(true)?;
    serde_json::to_writer(&mut encoder, incident)?;
    encoder.finish()
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
    let incident: Incident = match parse(bytes)? {
        Ok(incident) => incident,
        // A file with a newer schema may fail to parse. Then its schema number is the better
        // message.
        Err(error) => {
            return Err(match parse::<Versioned>(bytes)? {
                Ok(Versioned { schema }) if schema != SCHEMA => Unreadable::Schema { found: schema },
                _ => Unreadable::NotAnIncident(error),
            });
        }
    };
    check(&incident)?;
    Ok(incident)
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
    let unpacked = zstd::Decoder::with_buffer(bytes)
        .and_then(|json| io::copy(&mut json.take(limit.saturating_add(1)), &mut io::sink()));
    let size = unpacked.map_err(|error| match error.kind() {
        io::ErrorKind::UnexpectedEof => Unreadable::Truncated,
        _ => Unreadable::Damaged(error),
    })?;
    if size > limit {
        return Err(Unreadable::TooLarge { what: "the JSON in the file", limit });
    }
    Ok(())
}

/// Parses while it unpacks, so the JSON is never in memory as a whole. Call [`measure`] first.
fn parse<T: for<'de> Deserialize<'de>>(bytes: &[u8]) -> Result<serde_json::Result<T>, Unreadable> {
    let json = zstd::Decoder::with_buffer(bytes)?;
    Ok(serde_json::from_reader(BufReader::new(json)))
}

fn check(incident: &Incident) -> Result<(), Unreadable> {
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
mod tests;
