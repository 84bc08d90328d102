//! The incidents and ledgers on disk, as HTTP serves them. Each is read when it is asked for, so that one is in memory at a time.
//!
//! They are served without addresses: the file is for root and its group, an answer for whoever can connect, and
//! where the code of a process is mapped is what the kernel hides from others (`/proc/PID/maps`).

use std::path::Path;

use crate::serve::IncidentSource;
use crate::store::incidents::{self, IncidentStore};
use crate::store::ledger::{self, LedgerEntry};
use memtrace_incident::{Incident, KillLine, SigkillEntry, Timeline};
use memtrace_report::json;

/// Reads incidents from the state directory.
pub(super) struct IncidentReader(IncidentStore);

impl IncidentReader {
    pub(super) fn at(state_dir: &Path) -> Self {
        Self(IncidentStore::own(state_dir))
    }

    /// The newest incidents without their large parts, each read when the iterator gets to it.
    fn newest_first(&self, most: usize) -> Result<impl Iterator<Item = Incident>, String> {
        let entries = self.0.list().map_err(|error| error.to_string())?;
        // A damaged file does not hide the others; `memtrace report` says what is wrong with it.
        let read = entries.into_iter().take(most).filter_map(|entry| incidents::read(&entry.path).ok());
        Ok(read.map(without_addresses).map(|incident| Incident {
            timeline: Timeline::default(),
            allocation_paths: Vec::new(),
            allocations: None,
            ..incident
        }))
    }

    fn ledger<E: LedgerEntry>(&self, most: u64) -> Result<Vec<u8>, String> {
        ledger::newest_lines::<E>(self.0.dir(), most).map_err(|error| error.to_string())
    }
}

/// Takes addresses of processes out. A distance between two would do no better: one mapping may be where everybody knows.
fn without_addresses(mut incident: Incident) -> Incident {
    incident.mappings.iter_mut().for_each(|note| note.address = None);
    incident
}

impl IncidentSource for IncidentReader {
    fn list(&self, most: usize) -> Result<String, String> {
        json::list(self.newest_first(most)?).map_err(|error| error.to_string())
    }

    fn incident(&self, id: &str) -> Result<Option<String>, String> {
        match self.0.find(id) {
            Ok(entry) => {
                let incident =
                    incidents::read(&entry.path).map(without_addresses).map_err(|error| error.to_string())?;
                json::incident(&incident).map(Some).map_err(|error| error.to_string())
            }
            Err(_) => Ok(None),
        }
    }

    fn newest(&self, most: usize) -> Result<Vec<Incident>, String> {
        Ok(self.newest_first(most)?.collect())
    }

    fn kills(&self, most: u64) -> Result<Vec<u8>, String> {
        self.ledger::<KillLine>(most)
    }

    fn sigkills(&self, most: u64) -> Result<Vec<u8>, String> {
        self.ledger::<SigkillEntry>(most)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use memtrace_incident::fixtures;

    #[test]
    fn the_newest_come_first_without_what_is_large() {
        let dir = tempfile::tempdir().unwrap();
        let store = IncidentStore::create(dir.path()).unwrap();
        let mut incident = fixtures::burst();
        let ids: Vec<String> = (0..5).map(|n| format!("01J0000000000000000000000{n}")).collect();
        for id in &ids {
            incident.id.clone_from(id);
            store.save(&incident).unwrap();
        }
        std::fs::write(dir.path().join("01J00000000000000000000009.memtrace"), "broken").unwrap();
        let reader = IncidentReader::at(dir.path());
        let newest = reader.newest(3).unwrap();
        assert_eq!(newest.iter().map(|found| &found.id).collect::<Vec<_>>(), [&ids[4], &ids[3]]);
        assert!(newest.iter().all(|found| found.timeline == Timeline::default() && found.allocation_paths.is_empty()));
        assert_eq!(reader.list(3).unwrap(), json::list(&newest).unwrap());
        assert_eq!(reader.list(0).unwrap(), "[]\n");
        assert!(reader.incident(&ids[0]).unwrap().unwrap().contains("usage_bytes"));
        // The file has addresses, no answer has.
        assert!(json::incident(&incident).unwrap().contains("\"address\""));
        for text in [reader.incident(&ids[0]).unwrap().unwrap(), reader.list(3).unwrap()] {
            assert!(text.contains("\"mappings\"") && !text.contains("\"address\""), "{text}");
        }
        assert_eq!(reader.incident("01J00000000000000000000008").unwrap(), None);
    }
}
