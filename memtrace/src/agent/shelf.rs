//! The incidents on disk, for whoever asks over HTTP: one in memory at a time.

use std::path::Path;

use crate::serve::Library;
use crate::store::incidents::{self, Incidents};
use memtrace_incident::{Incident, Timeline};
use memtrace_report::json;

/// The state directory, read only.
pub(super) struct Shelf(Incidents);

impl Shelf {
    pub(super) fn at(state_dir: &Path) -> Self {
        Self(Incidents::at(state_dir))
    }

    /// The newest incidents without what is large in them, each read when it is asked for.
    fn newest_first(&self, most: usize) -> Result<impl Iterator<Item = Incident>, String> {
        let entries = self.0.list().map_err(|error| error.to_string())?;
        // One that cannot be read does not hide the others; `memtrace report` tells what is wrong with it.
        let read = entries.into_iter().take(most).filter_map(|entry| incidents::read(&entry.path).ok());
        Ok(read.map(|incident| Incident {
            timeline: Timeline::default(),
            allocation_paths: Vec::new(),
            allocations: None,
            ..incident
        }))
    }
}

impl Library for Shelf {
    fn list(&self, most: usize) -> Result<String, String> {
        json::list(self.newest_first(most)?).map_err(|error| error.to_string())
    }

    fn incident(&self, id: &str) -> Result<Option<String>, String> {
        match self.0.find(id) {
            Ok(entry) => {
                let incident = incidents::read(&entry.path).map_err(|error| error.to_string())?;
                json::incident(&incident).map(Some).map_err(|error| error.to_string())
            }
            Err(_) => Ok(None),
        }
    }

    fn newest(&self, most: usize) -> Result<Vec<Incident>, String> {
        Ok(self.newest_first(most)?.collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use memtrace_incident::fixtures;

    #[test]
    fn the_newest_come_first_without_what_is_large() {
        let dir = tempfile::tempdir().unwrap();
        let store = Incidents::create(dir.path()).unwrap();
        let mut incident = fixtures::burst();
        let ids: Vec<String> = (0..5).map(|n| format!("01J0000000000000000000000{n}")).collect();
        for id in &ids {
            incident.id.clone_from(id);
            store.save(&incident).unwrap();
        }
        std::fs::write(dir.path().join("01J00000000000000000000009.memtrace"), "broken").unwrap();
        let shelf = Shelf::at(dir.path());
        let newest = shelf.newest(3).unwrap();
        assert_eq!(newest.iter().map(|found| &found.id).collect::<Vec<_>>(), [&ids[4], &ids[3]]);
        assert!(newest.iter().all(|found| found.timeline == Timeline::default() && found.allocation_paths.is_empty()));
        assert_eq!(shelf.list(3).unwrap(), json::list(&newest).unwrap());
        assert_eq!(shelf.list(0).unwrap(), "[]\n");
        assert!(shelf.incident(&ids[0]).unwrap().unwrap().contains("usage_bytes"));
        assert_eq!(shelf.incident("01J00000000000000000000008").unwrap(), None);
    }
}
