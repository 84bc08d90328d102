//! Incident files: `<id>.memtrace`, zstd over JSON. They are written whole, read with bounds (a file may come from
//! anywhere).

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use memtrace_incident::Incident;
use memtrace_incident::codec::{self, Unreadable, is_id};

use super::atomic;
use super::own_dir::{self, stranger};

/// Ending of an incident file's name.
pub const EXTENSION: &str = "memtrace";

const FILE_MODE: u32 = 0o640;
const DIR_MODE: u32 = 0o750;

/// [`Unreadable`], and which file.
#[derive(Debug, thiserror::Error)]
#[error("failed to read incident {}: {why}", path.display())]
pub struct ReadError {
    /// Path of the file.
    pub path: PathBuf,
    /// Why.
    pub why: Unreadable,
}

impl ReadError {
    /// Whether the right to read the file was missing.
    pub fn is_denied(&self) -> bool {
        matches!(&self.why, Unreadable::Io(error) if error.kind() == io::ErrorKind::PermissionDenied)
    }
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

/// A directory of incident files.
#[derive(Clone, Debug)]
pub struct IncidentStore {
    dir: PathBuf,
    /// Whether files of others are ignored.
    own_only: bool,
}

impl IncidentStore {
    /// The store in `dir`, for reading: nothing is created or removed.
    pub fn at(dir: impl Into<PathBuf>) -> Self {
        Self { dir: dir.into(), own_only: false }
    }

    /// As [`IncidentStore::at`], of the agent's own directory: what others have put there is ignored.
    pub fn own(dir: impl Into<PathBuf>) -> Self {
        Self { dir: dir.into(), own_only: true }
    }

    /// The store in `dir`, for writing: creates the directory and removes what a crash left half written.
    pub fn create(dir: impl Into<PathBuf>) -> io::Result<Self> {
        let dir = dir.into();
        own_dir::create(&dir, DIR_MODE)?;
        atomic::remove_leftovers(&dir)?;
        Ok(Self::own(dir))
    }

    /// Writes an incident under its id, durably. A second one with the same id replaces the first.
    pub fn save(&self, incident: &Incident) -> io::Result<PathBuf> {
        self.save_encoded(&incident.id, &codec::encode(incident)?)
    }

    /// As [`IncidentStore::save`], of the bytes of an incident's file.
    pub fn save_encoded(&self, id: &str, file: &[u8]) -> io::Result<PathBuf> {
        let path = self.path(id)?;
        atomic::write_own(&path, file, FILE_MODE)?;
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
                Ok(metadata) if metadata.is_file() && !(self.own_only && stranger(&metadata).is_some()) => {
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
        if !codec::is_id_prefix(&wanted) {
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

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Path of the incident with this id, which has to be a ULID.
    pub(super) fn path(&self, id: &str) -> io::Result<PathBuf> {
        if !is_id(id) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "an incident's id has to be a ULID"));
        }
        Ok(self.dir.join(format!("{id}.{EXTENSION}")))
    }
}

/// Writes an incident to `path`, whole or not at all.
pub fn write(path: &Path, incident: &Incident) -> io::Result<()> {
    atomic::write(path, &codec::encode(incident)?, Some(FILE_MODE))
}

/// Replaces an incident in the agent's own directory, whole or not at all.
pub fn write_again(path: &Path, incident: &Incident) -> io::Result<()> {
    atomic::write_own(path, &codec::encode(incident)?, FILE_MODE)
}

/// Reads an incident file.
pub fn read(path: &Path) -> Result<Incident, ReadError> {
    let wrong = |why| ReadError { path: path.to_owned(), why };
    let file = File::open(path).map_err(|error| wrong(error.into()))?;
    codec::read_from(file).map_err(wrong)
}

#[cfg(test)]
mod tests;
