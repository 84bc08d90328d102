//! Which incident files are kept: those not older than a span and, together, not larger than a
//! size.
//!
//! The size holds after every save, so what is there is remembered instead of listed each time. The
//! newest incident of each cgroup goes last: a container that is out of memory again and again
//! fills what is left with its own incidents, and does not end the evidence of everybody else.
//! Where even those are too large together, the oldest go.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io;
use std::time::{Duration, SystemTime};

use memtrace_incident::Cgroup;
use memtrace_incident::codec::{self, happened};

use super::atomic;
use super::incidents::{IncidentFile, IncidentStore};

/// Most incident files that are kept.
const MOST_FILES: usize = 65_536;
/// Most of them whose cgroup is read at the start, newest first; it takes about 50 us each. Of
/// older ones none counts as the newest of its cgroup.
const MOST_READ: usize = 16_384;

/// The largest part of the size that is left free, so that it holds also while a file is written.
const MOST_FREE: u64 = 16 << 20;

/// What may be kept where there are never to be more than `bytes`: an incident is written before
/// others are deleted, and written again, larger, with names of functions in it.
pub fn with_room_to_write(bytes: u64) -> u64 {
    bytes.saturating_sub((bytes / 8).min(MOST_FREE))
}

/// What was deleted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeletedFiles {
    /// Number of files.
    pub files: u64,
    /// Size of these files, bytes.
    pub bytes: u64,
    /// How many of them were the newest of their cgroup.
    pub newest_of_cgroup: u64,
    /// Id of the newest of them.
    pub last: Option<String>,
}

/// A file that is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Kept {
    bytes: u64,
    /// Of which cgroup it is; `None` when that was not read.
    cgroup: Option<String>,
}

/// The files of a store, and what of them may stay.
#[derive(Debug)]
pub struct Retention {
    store: IncidentStore,
    max_bytes: u64,
    max_age: Duration,
    /// By id, which sorts by time. Cap: [`MOST_FILES`].
    files: BTreeMap<String, Kept>,
    bytes: u64,
    /// Ids of the files of each cgroup. Cap: the files.
    by_cgroup: BTreeMap<String, BTreeSet<String>>,
    /// Ids of the newest of each cgroup. Cap: the files.
    newest: BTreeSet<String>,
    /// Ids of the other files. Cap: the files.
    spare: BTreeSet<String>,
}

impl Retention {
    /// Looks at what is in `store`, and keeps it as it is. Files of others are ignored.
    pub fn of(store: &IncidentStore, max_bytes: u64, max_age: Duration) -> io::Result<Self> {
        let mut retention = Self {
            store: store.clone(),
            max_bytes,
            max_age,
            files: BTreeMap::new(),
            bytes: 0,
            by_cgroup: BTreeMap::new(),
            newest: BTreeSet::new(),
            spare: BTreeSet::new(),
        };
        retention.look()?;
        Ok(retention)
    }

    /// Size of the files together, bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// An incident of a cgroup with this [`name`] was saved: deletes what is now too much.
    pub fn saved(&mut self, id: String, cgroup: String) -> io::Result<DeletedFiles> {
        if let Some(bytes) = self.size(&id) {
            self.insert(id, Kept { bytes, cgroup: Some(cgroup) });
        }
        self.shrink()
    }

    /// A file was written again, with names of functions in it.
    pub fn rewritten(&mut self, id: &str) -> io::Result<DeletedFiles> {
        match self.size(id) {
            Some(bytes) if self.files.contains_key(id) => self.resize(id, bytes),
            Some(bytes) => self.insert(id.to_owned(), Kept { bytes, cgroup: self.cgroup_of(id) }),
            None => {}
        }
        self.shrink()
    }

    /// Deletes what is too old, too large or too many, after a look at what is there now.
    pub fn review(&mut self, now: SystemTime) -> io::Result<DeletedFiles> {
        self.look()?;
        let mut deleted = DeletedFiles::default();
        let mut failed = None;
        if let Some(oldest) = now.checked_sub(self.max_age) {
            let expired = |id: &&String| happened(id).is_some_and(|at| at < oldest);
            let expired: Vec<String> = self.files.keys().take_while(expired).cloned().collect();
            for id in expired {
                self.delete(&id, &mut deleted, &mut failed);
            }
        }
        self.finish(deleted, failed)
    }

    /// Takes note of files that have come or gone without this.
    fn look(&mut self) -> io::Result<()> {
        let mut there = self.store.list()?;
        let ids: BTreeSet<&str> = there.iter().map(|file| file.id.as_str()).collect();
        let gone: Vec<String> = self.files.keys().filter(|id| !ids.contains(id.as_str())).cloned().collect();
        for id in gone {
            self.remove(&id);
        }
        there.truncate(MOST_FILES.saturating_mul(2));
        for (number, IncidentFile { id, bytes, .. }) in there.into_iter().enumerate() {
            if self.files.contains_key(&id) {
                self.resize(&id, bytes);
            } else {
                let cgroup = if number < MOST_READ { self.cgroup_of(&id) } else { None };
                self.insert(id, Kept { bytes, cgroup });
            }
        }
        Ok(())
    }

    fn insert(&mut self, id: String, kept: Kept) {
        self.remove(&id);
        self.bytes = self.bytes.saturating_add(kept.bytes);
        let cgroup = kept.cgroup.clone();
        self.files.insert(id.clone(), kept);
        self.spare.insert(id.clone());
        if let Some(cgroup) = cgroup {
            self.by_cgroup.entry(cgroup.clone()).or_default().insert(id);
            self.choose_newest(&cgroup);
        }
    }

    fn remove(&mut self, id: &str) {
        let Some(kept) = self.files.remove(id) else { return };
        self.bytes = self.bytes.saturating_sub(kept.bytes);
        self.spare.remove(id);
        self.newest.remove(id);
        let Some(cgroup) = kept.cgroup else { return };
        if let Some(ids) = self.by_cgroup.get_mut(&cgroup) {
            ids.remove(id);
        }
        self.choose_newest(&cgroup);
    }

    /// Files are added and removed one at a time, so the newest was the last of the cgroup or the
    /// one before it.
    fn choose_newest(&mut self, cgroup: &str) {
        let Some(ids) = self.by_cgroup.get(cgroup) else { return };
        let mut latest = ids.iter().rev();
        match (latest.next(), latest.next()) {
            (None, _) => drop(self.by_cgroup.remove(cgroup)),
            (Some(newest), before) => {
                if self.spare.remove(newest) {
                    self.newest.insert(newest.clone());
                }
                if let Some(before) = before.filter(|before| self.newest.remove(*before)) {
                    self.spare.insert(before.clone());
                }
            }
        }
    }

    fn resize(&mut self, id: &str, bytes: u64) {
        if let Some(kept) = self.files.get_mut(id) {
            self.bytes = self.bytes.saturating_sub(kept.bytes).saturating_add(bytes);
            kept.bytes = bytes;
        }
    }

    fn shrink(&mut self) -> io::Result<DeletedFiles> {
        self.finish(DeletedFiles::default(), None)
    }

    /// Deletes until the rest is within the caps, and makes it durable.
    fn finish(&mut self, mut deleted: DeletedFiles, mut failed: Option<io::Error>) -> io::Result<DeletedFiles> {
        while self.bytes > self.max_bytes || self.files.len() > MOST_FILES {
            let Some(id) = self.spare.first().or_else(|| self.newest.first()).cloned() else { break };
            self.delete(&id, &mut deleted, &mut failed);
        }
        if deleted.files > 0 {
            atomic::sync_dir(self.store.dir())?;
        }
        match failed {
            Some(error) if deleted.files == 0 => Err(error),
            _ => Ok(deleted),
        }
    }

    /// Deletes one file. One that cannot be deleted is forgotten until the next review, so that the
    /// others can be.
    fn delete(&mut self, id: &str, deleted: &mut DeletedFiles, failed: &mut Option<io::Error>) {
        let (newest, bytes) = (self.newest.contains(id), self.files.get(id).map_or(0, |kept| kept.bytes));
        self.remove(id);
        match self.store.path(id).and_then(fs::remove_file) {
            Ok(()) => {
                deleted.files = deleted.files.saturating_add(1);
                deleted.bytes = deleted.bytes.saturating_add(bytes);
                deleted.newest_of_cgroup = deleted.newest_of_cgroup.saturating_add(newest.into());
                deleted.last = deleted.last.take().max(Some(id.to_owned()));
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => *failed = failed.take().or(Some(error)),
        }
    }

    fn size(&self, id: &str) -> Option<u64> {
        let found = self.store.path(id).and_then(fs::symlink_metadata).ok()?;
        found.is_file().then_some(found.len())
    }

    fn cgroup_of(&self, id: &str) -> Option<String> {
        let file = self.store.path(id).and_then(File::open).ok()?;
        codec::read_cgroup(file).map(|cgroup| name(&cgroup))
    }
}

/// What stays the same when a container of a pod is started again: the pod, or else the path of the
/// cgroup.
pub fn name(cgroup: &Cgroup) -> String {
    match (&cgroup.kubernetes, &cgroup.path) {
        (Some(pod), _) => format!("pod {}", pod.pod_uid),
        (None, Some(path)) => path.clone(),
        (None, None) => format!("id {}", cgroup.id),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use memtrace_incident::{Incident, fixtures};

    const ALL: Duration = Duration::from_secs(1 << 40);

    fn incident(second: u64, cgroup: &str) -> Incident {
        let mut incident = fixtures::burst();
        incident.id = ulid::Ulid::from_parts(second * 1000, 7).to_string();
        incident.cgroup.path = Some(cgroup.to_owned());
        incident.cgroup.kubernetes = None;
        incident
    }

    fn save(store: &IncidentStore, retention: &mut Retention, second: u64, cgroup: &str) -> DeletedFiles {
        let incident = incident(second, cgroup);
        store.save(&incident).unwrap();
        let deleted = retention.saved(incident.id.clone(), name(&incident.cgroup)).unwrap();
        check(store, retention);
        deleted
    }

    /// What is remembered is what is there, and each cgroup has one newest.
    fn check(store: &IncidentStore, retention: &Retention) {
        let there = store.list().unwrap();
        assert_eq!(retention.bytes(), there.iter().map(|file| file.bytes).sum::<u64>());
        assert_eq!(retention.files.len(), there.len());
        assert_eq!(retention.files.len(), retention.spare.len() + retention.newest.len());
        for (id, kept) in &retention.files {
            let newest = retention.files.iter().rev().find(|(_, other)| other.cgroup == kept.cgroup).unwrap().0 == id;
            assert_eq!(newest && kept.cgroup.is_some(), !retention.spare.contains(id), "{id}");
        }
    }

    fn seconds(store: &IncidentStore) -> Vec<u64> {
        let ids = store.list().unwrap().into_iter().rev();
        ids.map(|file| happened(&file.id).unwrap().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs()).collect()
    }

    #[test]
    fn the_newest_of_each_cgroup_survives_a_loop_in_one() {
        let dir = tempfile::tempdir().unwrap();
        let store = IncidentStore::create(dir.path().join("incidents")).unwrap();
        store.save(&incident(1, "/other")).unwrap();
        let each = store.list().unwrap()[0].bytes + 16;
        for start in [0, 1] {
            // The second time after a restart, from the files alone.
            let mut retention = Retention::of(&store, each * 4, ALL).unwrap();
            if start == 0 {
                save(&store, &mut retention, 2, "/third");
            }
            for second in start * 100 + 10..start * 100 + 30 {
                let deleted = save(&store, &mut retention, second, "/loop");
                assert_eq!(deleted.newest_of_cgroup, 0);
                assert!(retention.bytes() <= each * 4);
            }
            assert_eq!(seconds(&store), [1, 2, start * 100 + 28, start * 100 + 29]);
        }
        // More cgroups than fit: the oldest go.
        let mut retention = Retention::of(&store, each * 4, ALL).unwrap();
        let deleted: Vec<DeletedFiles> =
            (200..203).map(|second| save(&store, &mut retention, second, &format!("/{second}"))).collect();
        assert_eq!(seconds(&store), [129, 200, 201, 202]);
        assert_eq!(deleted.iter().map(|deleted| deleted.newest_of_cgroup).sum::<u64>(), 2);
        assert_eq!(deleted.last().unwrap().last, Some(incident(2, "").id));
    }

    #[test]
    fn what_is_old_goes_and_what_came_or_went_is_seen() {
        let dir = tempfile::tempdir().unwrap();
        let store = IncidentStore::create(dir.path()).unwrap();
        let mut retention = Retention::of(&store, u64::MAX, Duration::from_secs(10)).unwrap();
        for second in 1..=5 {
            save(&store, &mut retention, second, "/a");
        }
        store.save(&incident(6, "/b")).unwrap();
        fs::remove_file(store.path(&incident(5, "").id).unwrap()).unwrap();
        fs::write(dir.path().join("notes.memtrace"), "x").unwrap();
        let now = SystemTime::UNIX_EPOCH + Duration::from_millis(12_500);
        assert_eq!(retention.review(now).unwrap().files, 2);
        check(&store, &retention);
        assert_eq!(seconds(&store), [3, 4, 6]);
        // A damaged file has no cgroup: it goes first.
        fs::write(store.path(&incident(7, "").id).unwrap(), vec![b'x'; 100]).unwrap();
        let mut retention = Retention::of(&store, retention.bytes(), ALL).unwrap();
        check(&store, &retention);
        assert_eq!(retention.shrink().unwrap().files, 1);
        assert_eq!(seconds(&store), [4, 6, 7]);
    }

    #[test]
    fn a_file_that_grows_counts_and_one_that_comes_back_is_deleted_again() {
        let dir = tempfile::tempdir().unwrap();
        let store = IncidentStore::create(dir.path()).unwrap();
        store.save(&incident(1, "/a")).unwrap();
        let each = store.list().unwrap()[0].bytes + 16;
        let mut retention = Retention::of(&store, each * 3, ALL).unwrap();
        save(&store, &mut retention, 2, "/a");
        save(&store, &mut retention, 3, "/a");
        fs::write(store.path(&incident(3, "").id).unwrap(), vec![b'x'; each as usize * 2]).unwrap();
        assert_eq!(retention.rewritten(&incident(3, "").id).unwrap().files, 1);
        check(&store, &retention);
        // The symbolizer had it in memory when it was deleted.
        store.save(&incident(1, "/a")).unwrap();
        assert_eq!(retention.rewritten(&incident(1, "").id).unwrap().files, 1);
        assert_eq!(seconds(&store), [2, 3]);
        assert_eq!(Retention::of(&store, each, ALL).unwrap().shrink().unwrap().files, 1, "the damaged one goes first");
        assert_eq!(Retention::of(&store, 10, ALL).unwrap().shrink().unwrap().newest_of_cgroup, 1, "nothing fits");
    }
}
