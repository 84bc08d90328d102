//! Incident files: `<id>.memtrace`, zstd over JSON. They are written whole, read with bounds (a file may come from
//! anywhere), and deleted by age and size.

use std::fs::{self, DirBuilder, File};
use std::io::{self, Read};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use serde::Deserialize;

use super::atomic;
use crate::engine::incident::{Incident, SCHEMA};

/// Largest file that is read, bytes.
pub const MAX_FILE_BYTES: u64 = 64 << 20;
/// Largest JSON that is decompressed, bytes.
pub const MAX_JSON_BYTES: u64 = 512 << 20;
/// Extension of an incident file's name.
pub const EXTENSION: &str = "memtrace";

const ZSTD_MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];
const ZSTD_LEVEL: i32 = 3;
const FILE_MODE: u32 = 0o640;
const DIR_MODE: u32 = 0o750;

/// Why bytes are not an incident that this build reads.
#[derive(Debug, thiserror::Error)]
pub enum Unreadable {
    /// Reading failed.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// No zstd header.
    #[error("not a memtrace incident (no zstd header)")]
    NotZstd,
    /// The zstd frame ends too early.
    #[error("the file is truncated")]
    Truncated,
    /// The zstd frame is damaged.
    #[error("the file is damaged: {0}")]
    Damaged(io::Error),
    /// Larger than [`MAX_FILE_BYTES`] or [`MAX_JSON_BYTES`].
    #[error("{what} is larger than {limit} bytes")]
    TooLarge {
        /// What is too large: the file or the JSON in it.
        what: &'static str,
        /// The cap, bytes.
        limit: u64,
    },
    /// The JSON is not an incident.
    #[error("not a memtrace incident: {0}")]
    NotAnIncident(serde_json::Error),
    /// A schema that this build does not read.
    #[error("schema {found} is {} than this memtrace reads ({SCHEMA}){}", if *found > SCHEMA { "newer" } else { "older" }, if *found > SCHEMA { "; update memtrace" } else { "" })]
    Schema {
        /// `schema` of the file.
        found: u32,
    },
    /// The id is not a ULID.
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

/// An incident file that cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("failed to read incident {}: {why}", path.display())]
pub struct ReadError {
    /// Path of the file.
    pub path: PathBuf,
    /// Why.
    pub why: Unreadable,
}

/// Why an id does not lead to one incident.
#[derive(Debug, thiserror::Error)]
pub enum FindError {
    /// The directory cannot be listed.
    #[error("failed to list incidents in {}: {source}", dir.display())]
    Io {
        /// The directory.
        dir: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The text is not an id or the beginning of one.
    #[error("not an incident id: {0:?}")]
    NotAnId(String),
    /// No incident has this id.
    #[error("no incident {id} in {}; `memtrace incidents` lists what there is", dir.display())]
    NotFound {
        /// The text as given.
        id: String,
        /// The directory that was searched.
        dir: PathBuf,
    },
    /// Several ids begin with the text.
    #[error("incident id {id} is ambiguous: {}", candidates.join(", "))]
    Ambiguous {
        /// The text as given.
        id: String,
        /// Up to five of them.
        candidates: Vec<String>,
    },
}

/// An incident file in the store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IncidentFile {
    /// Id of the incident.
    pub id: String,
    /// Path of the file.
    pub path: PathBuf,
    /// Size of the file, bytes.
    pub bytes: u64,
}

/// What [`IncidentStore::retain`] deleted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DeletedFiles {
    /// Number of files.
    pub files: u64,
    /// Size of these files, bytes.
    pub bytes: u64,
}

/// A directory of incident files.
#[derive(Clone, Debug)]
pub struct IncidentStore {
    dir: PathBuf,
}

impl IncidentStore {
    /// The store in `dir`, for reading: nothing is created or removed.
    pub fn at(dir: impl Into<PathBuf>) -> Self {
        Self { dir: dir.into() }
    }

    /// The store in `dir`, for writing: creates the directory and removes what a crash left half written.
    pub fn create(dir: impl Into<PathBuf>) -> io::Result<Self> {
        let dir = dir.into();
        DirBuilder::new().recursive(true).mode(DIR_MODE).create(&dir)?;
        atomic::remove_leftovers(&dir)?;
        Ok(Self { dir })
    }

    /// Writes an incident under its id, durably. A second one with the same id replaces the first.
    pub fn save(&self, incident: &Incident) -> io::Result<PathBuf> {
        let path = self.path(&incident.id)?;
        write(&path, incident)?;
        Ok(path)
    }

    /// The incident files, newest first. Files with other names are ignored.
    pub fn list(&self) -> io::Result<Vec<IncidentFile>> {
        let mut found = Vec::new();
        for entry in fs::read_dir(&self.dir)? {
            let entry = entry?;
            let path = entry.path();
            let id = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
            if path.extension().is_none_or(|extension| extension != EXTENSION) || !is_id(id) {
                continue;
            }
            match entry.metadata() {
                Ok(metadata) if metadata.is_file() => {
                    found.push(IncidentFile { id: id.to_owned(), path: path.clone(), bytes: metadata.len() });
                }
                _ => {}
            }
        }
        // ULIDs sort by time.
        found.sort_unstable_by(|a, b| b.id.cmp(&a.id));
        Ok(found)
    }

    /// The incident with this id, or the only one whose id begins with it; `latest` is the newest.
    pub fn find(&self, id: &str) -> Result<IncidentFile, FindError> {
        let list = || self.list().map_err(|source| FindError::Io { dir: self.dir.clone(), source });
        let not_found = || FindError::NotFound { id: id.to_owned(), dir: self.dir.clone() };
        if id == "latest" {
            return list()?.into_iter().next().ok_or_else(not_found);
        }
        let wanted = id.to_ascii_uppercase();
        if wanted.is_empty() || wanted.len() > 26 || !wanted.bytes().all(is_id_byte) {
            return Err(FindError::NotAnId(id.chars().take(80).collect()));
        }
        let mut matching: Vec<IncidentFile> =
            list()?.into_iter().filter(|entry| entry.id.starts_with(&wanted)).collect();
        match matching.len() {
            0 => Err(not_found()),
            1 => matching.pop().ok_or_else(not_found),
            _ => Err(FindError::Ambiguous {
                id: id.to_owned(),
                candidates: matching.into_iter().take(5).map(|entry| entry.id).collect(),
            }),
        }
    }

    /// Deletes the oldest incidents until the rest is within `max_bytes` and no older than `max_age`.
    pub fn retain(&self, max_bytes: u64, max_age: Option<Duration>, now: SystemTime) -> io::Result<DeletedFiles> {
        let oldest = max_age.and_then(|age| now.checked_sub(age));
        let (mut kept, mut dropped) = (0u64, DeletedFiles::default());
        for entry in self.list()? {
            let with = kept.saturating_add(entry.bytes);
            let expired = matches!((oldest, happened(&entry.id)), (Some(oldest), Some(at)) if at < oldest);
            // Everything older than a deleted file is deleted too.
            if dropped.files == 0 && with <= max_bytes && !expired {
                kept = with;
                continue;
            }
            fs::remove_file(&entry.path)?;
            dropped.files += 1;
            dropped.bytes = dropped.bytes.saturating_add(entry.bytes);
        }
        if dropped.files > 0 {
            atomic::sync_dir(&self.dir)?;
        }
        Ok(dropped)
    }

    fn path(&self, id: &str) -> io::Result<PathBuf> {
        if !is_id(id) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "an incident's id has to be a ULID"));
        }
        Ok(self.dir.join(format!("{id}.{EXTENSION}")))
    }
}

/// Writes an incident to `path`, whole or not at all.
pub fn write(path: &Path, incident: &Incident) -> io::Result<()> {
    atomic::write(path, &encode(incident)?, Some(FILE_MODE))
}

/// Reads an incident file.
pub fn read(path: &Path) -> Result<Incident, ReadError> {
    let wrong = |why| ReadError { path: path.to_owned(), why };
    let file = File::open(path).map_err(|error| wrong(error.into()))?;
    read_from(file).map_err(wrong)
}

/// Reads an incident from a stream.
pub fn read_from(stream: impl Read) -> Result<Incident, Unreadable> {
    let mut bytes = Vec::new();
    stream.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes)?;
    decode(&bytes)
}

/// The bytes of an incident's file.
pub fn encode(incident: &Incident) -> io::Result<Vec<u8>> {
    let mut encoder = zstd::Encoder::new(Vec::new(), ZSTD_LEVEL)?;
    encoder.include_checksum(true)?;
    serde_json::to_writer(&mut encoder, incident)?;
    encoder.finish()
}

/// Parses the bytes of an incident file. Never panics, whatever the bytes are.
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
    let json = decompress(bytes, MAX_JSON_BYTES)?;
    let incident: Incident = match serde_json::from_slice(&json) {
        Ok(incident) => incident,
        // A newer schema may fail to parse: its number makes the better message.
        Err(error) => {
            return Err(match serde_json::from_slice::<Versioned>(&json) {
                Ok(Versioned { schema }) if schema != SCHEMA => Unreadable::Schema { found: schema },
                _ => Unreadable::NotAnIncident(error),
            });
        }
    };
    check(&incident)?;
    Ok(incident)
}

/// Whether `id` is a ULID as memtrace writes it, which is also a safe file name.
pub fn is_id(id: &str) -> bool {
    id.len() == 26 && id.bytes().all(is_id_byte) && id.starts_with(|first| ('0'..='7').contains(&first))
}

/// When the incident with this id happened, to the millisecond; `None` for what is not a ULID.
pub fn happened(id: &str) -> Option<SystemTime> {
    let ulid = ulid::Ulid::from_string(id).ok()?;
    SystemTime::UNIX_EPOCH.checked_add(Duration::from_millis(ulid.timestamp_ms()))
}

#[derive(Deserialize)]
struct Versioned {
    schema: u32,
}

/// Decompresses twice, the first time to learn the size: a zip bomb costs time up to the cap, but no memory.
fn decompress(bytes: &[u8], limit: u64) -> Result<Vec<u8>, Unreadable> {
    let unpack = || zstd::Decoder::with_buffer(bytes).map(|decoder| decoder.take(limit.saturating_add(1)));
    let wrong = |error: io::Error| match error.kind() {
        io::ErrorKind::UnexpectedEof => Unreadable::Truncated,
        _ => Unreadable::Damaged(error),
    };
    let size = unpack().and_then(|mut json| io::copy(&mut json, &mut io::sink())).map_err(wrong)?;
    if size > limit {
        return Err(Unreadable::TooLarge { what: "the JSON in the file", limit });
    }
    let mut json = Vec::new();
    let room = usize::try_from(size).ok().and_then(|size| json.try_reserve_exact(size).ok());
    room.ok_or_else(|| io::Error::from(io::ErrorKind::OutOfMemory))?;
    unpack().and_then(|mut unpacked| unpacked.read_to_end(&mut json)).map_err(wrong)?;
    Ok(json)
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

/// A digit of Crockford's base 32.
fn is_id_byte(byte: u8) -> bool {
    byte.is_ascii_digit() || (byte.is_ascii_uppercase() && !b"ILOU".contains(&byte))
}

#[cfg(test)]
mod tests;
