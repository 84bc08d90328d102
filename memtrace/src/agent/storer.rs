//! The threads between the recorder and the disk: the packer makes incidents the bytes of their files, the storer writes
//! those, deletes old ones, and syncs the ledger of kills.
//!
//! The recorder hands over and goes on. Packing needs a CPU and writing a disk: by two threads, neither waits for the
//! other, and what waits for a slow disk is packed, which takes a tenth of the memory. What waits is bounded
//! ([`queue`]); what does not fit is given up, counted and logged.

mod queue;

use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use anyhow::Context;
use memtrace_incident::{Incident, Kind};
use tokio::sync::Notify;
use tracing::{error, info, warn};

use self::queue::{PackedIncident, Waiting};
use crate::own_process::rights::{PACKER, STORER};
use crate::store::incidents::IncidentStore;
use crate::store::retention::{DeletedFiles, Retention};
use crate::symbolize::frame_names::ModuleName;

/// Saved incidents that the recorder has not taken yet; beyond it the oldest gets no names.
const MAX_SAVED: usize = 256;
/// Files that were written again and not looked at yet; beyond it one is looked at with the next review.
const MAX_REWRITTEN: usize = 256;
/// Files that wait to be synced: those of a rotation at once, and more only while the disk is very slow.
const MAX_UNSYNCED: usize = 8;
/// Time from a save that failed to the next try. It doubles up to [`RETRY_MOST`].
const RETRY_FIRST: Duration = Duration::from_secs(1);
const RETRY_MOST: Duration = Duration::from_secs(60);

/// An incident that is on disk and has frames without names.
#[derive(Debug)]
pub(super) struct SavedIncident {
    pub(super) path: PathBuf,
    /// Modules that have its unnamed frames. Cap: [`queue::MAX_MODULES`].
    pub(super) modules: Vec<ModuleName>,
}

/// What the threads have done so far.
#[derive(Clone, Debug, Default)]
pub(super) struct StoreCounts {
    /// Incidents saved, by kind.
    pub(super) saved: BTreeMap<Kind, u64>,
    /// Saves that failed, and syncs of the ledger.
    pub(super) write_failures: u64,
    /// Incidents that were not written, because too many waited or because one could not be packed.
    pub(super) given_up: u64,
    /// Incident files deleted for size or age.
    pub(super) dropped: u64,
    /// Incidents whose frames get no names, because too many waited to be taken.
    pub(super) not_named: u64,
}

/// Hands incidents to the threads.
pub(super) struct Storer(Arc<Shared>);

struct Shared {
    state: Mutex<State>,
    /// Something is to be done, or was done.
    changed: Condvar,
    /// For the recorder: something was saved.
    saved: Arc<Notify>,
    /// Incidents that wait or are being packed or written; the recorder reads it without the lock, which a thread can
    /// hold that has no CPU.
    unsaved: AtomicU64,
}

#[derive(Default)]
struct State {
    waiting: Waiting,
    /// Saving fails: when it is tried again.
    retry: Option<Retry>,
    /// Ledgers that were written to, and their directory after a rotation. Cap: [`MAX_UNSYNCED`].
    unsynced: VecDeque<File>,
    /// How many there were so far, also those that are done.
    syncs_queued: u64,
    /// The last job was a sync: an incident comes next whose kill is synced, or a storm of kills would keep all from
    /// being saved.
    synced: bool,
    /// Ids of files that were written again with names. Cap: [`MAX_REWRITTEN`].
    rewritten: VecDeque<String>,
    /// Old files are to be deleted.
    review: bool,
    /// The storer is at work on something.
    busy: bool,
    /// Id of the incident that is being packed.
    in_packing: Option<String>,
    /// Id of the incident that is being written.
    in_writing: Option<String>,
    /// The agent stops: what waits is tried at once, whether saving fails or not.
    finishing: bool,
    end: bool,
    /// Cap: [`MAX_SAVED`].
    saved: VecDeque<SavedIncident>,
    counts: StoreCounts,
}

/// When a save that failed is tried again.
#[derive(Clone, Copy, Debug)]
struct Retry {
    at: Instant,
    pause: Duration,
}

/// What the storer does next.
enum Job {
    Sync(File),
    Rewritten(String),
    Review,
    Save(PackedIncident),
    End,
}

impl Storer {
    /// Starts the threads. `retention` is of the same store.
    pub(super) fn start(store: IncidentStore, retention: Retention) -> anyhow::Result<Self> {
        let shared = Arc::new(Shared {
            state: Mutex::default(),
            changed: Condvar::new(),
            saved: Arc::new(Notify::new()),
            unsaved: AtomicU64::new(0),
        });
        let files = Files { store, retention, shared: Arc::clone(&shared) };
        let store = move || {
            STORER.enter();
            files.run();
        };
        let packed = Arc::clone(&shared);
        let pack = move || {
            PACKER.enter();
            packed.pack();
        };
        let failed = "failed to start a thread";
        thread::Builder::new().name(STORER.thread.to_owned()).spawn(store).context(failed)?;
        thread::Builder::new().name(PACKER.thread.to_owned()).spawn(pack).context(failed)?;
        Ok(Self(shared))
    }

    /// Is told when there is something in [`Self::take_saved`].
    pub(super) fn saved(&self) -> Arc<Notify> {
        Arc::clone(&self.0.saved)
    }

    /// Queues an incident to be saved.
    pub(super) fn save(&self, incident: Box<Incident>) {
        let mut state = self.0.state();
        let after = state.syncs_queued;
        let given_up = state.waiting.put(incident, after);
        for incident in &given_up {
            state.counts.given_up = state.counts.given_up.saturating_add(1);
            error!(id = %incident.id(), "gave up saving an incident: {} others wait", state.waiting.len());
        }
        self.0.count(&state);
        self.0.changed.notify_all();
        // Whoever waits for the lock need not wait for memory to be freed.
        drop(state);
        drop(given_up);
    }

    /// Syncs what was written to.
    pub(super) fn sync(&self, files: impl IntoIterator<Item = File>) {
        let mut state = self.0.state();
        for file in files {
            state.unsynced.push_back(file);
            state.syncs_queued = state.syncs_queued.saturating_add(1);
        }
        // The newest are of the ledger that is written to now.
        let excess = state.unsynced.len().saturating_sub(MAX_UNSYNCED);
        state.unsynced.drain(..excess);
        self.0.changed.notify_all();
    }

    /// An incident file was written again, with names.
    pub(super) fn rewritten(&self, path: &Path) {
        let Some(id) = path.file_stem().and_then(|stem| stem.to_str()) else { return };
        let mut state = self.0.state();
        if state.rewritten.len() < MAX_REWRITTEN {
            state.rewritten.push_back(id.to_owned());
        } else {
            state.review = true;
        }
        self.0.changed.notify_all();
    }

    /// Deletes incident files that are too old, too large together, or too many.
    pub(super) fn review(&self) {
        self.0.state().review = true;
        self.0.changed.notify_all();
    }

    /// Incidents that were saved since the last call.
    pub(super) fn take_saved(&self) -> VecDeque<SavedIncident> {
        std::mem::take(&mut self.0.state().saved)
    }

    /// Incidents that wait to be written.
    pub(super) fn waiting(&self) -> u64 {
        self.0.unsaved.load(Ordering::Acquire)
    }

    /// What was done so far.
    pub(super) fn counts(&self) -> StoreCounts {
        self.0.state().counts.clone()
    }

    /// Tries to save what waits, each incident once, and to do everything else. Returns the ids of those that are not
    /// saved after that, or after `limit`.
    pub(super) fn finish(&self, limit: Duration) -> Vec<String> {
        let mut state = self.0.state();
        state.waiting.retry_failed();
        state.finishing = true;
        self.0.changed.notify_all();
        let (mut state, waited) = self
            .0
            .changed
            .wait_timeout_while(state, limit, |state| state.is_at_work())
            .unwrap_or_else(PoisonError::into_inner);
        if waited.timed_out() && state.busy {
            error!("the disk did not answer for {limit:?}");
        }
        state.finishing = false;
        self.0.changed.notify_all();
        state.in_hand().chain(state.waiting.ids()).cloned().collect()
    }
}

impl Drop for Storer {
    /// Ends the threads, without waiting for them: a disk may never answer.
    fn drop(&mut self) {
        self.0.state().end = true;
        self.0.changed.notify_all();
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts what is not saved.
    fn count(&self, state: &State) {
        let unsaved = state.waiting.len() + state.in_hand().count();
        self.unsaved.store(unsaved as u64, Ordering::Release);
    }

    /// Packs what is handed over, until the end.
    fn pack(&self) {
        let mut state = self.state();
        loop {
            let Some((incident, after)) = state.waiting.take_whole() else {
                if state.end {
                    return;
                }
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            state.in_packing = Some(incident.id.clone());
            drop(state);
            let packed = PackedIncident::of(&incident, after);
            // It takes a while to free, and others want the lock.
            drop(incident);
            state = self.state();
            let id = state.in_packing.take().unwrap_or_default();
            match packed {
                Ok(packed) => state.waiting.put_packed(packed),
                Err(error) => {
                    state.counts.given_up = state.counts.given_up.saturating_add(1);
                    error!(%id, "gave up saving an incident, which cannot be encoded: {error}");
                }
            }
            self.count(&state);
            self.changed.notify_all();
        }
    }

    /// Waits for something that the storer is to do.
    fn next(&self) -> Job {
        let mut state = self.state();
        (state.busy, state.in_writing) = (false, None);
        self.count(&state);
        self.changed.notify_all();
        loop {
            if let Some(job) = state.take_job() {
                state.busy = true;
                return job;
            }
            let retry = state.retry.filter(|_| !state.finishing && state.waiting.has_packed());
            let pause = retry.map_or(RETRY_MOST, |retry| retry.at.saturating_duration_since(Instant::now()));
            let waited = self.changed.wait_timeout(state, pause);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl State {
    /// Ids of what is being packed or written.
    fn in_hand(&self) -> impl Iterator<Item = &String> {
        [&self.in_packing, &self.in_writing].into_iter().flatten()
    }

    /// Whether there is more to do than to wait for the next try of what failed.
    fn is_at_work(&mut self) -> bool {
        let more = !self.unsynced.is_empty() || self.review || !self.rewritten.is_empty();
        self.busy || more || self.in_packing.is_some() || self.waiting.has_untried()
    }

    fn take_job(&mut self) -> Option<Job> {
        let due = self.finishing || self.retry.is_none_or(|retry| Instant::now() >= retry.at);
        // While the agent stops, what failed is not tried again.
        let or_failed = !self.finishing;
        let synced = self.syncs_queued.saturating_sub(self.unsynced.len() as u64);
        let save_first = std::mem::take(&mut self.synced) && due && self.waiting.has_packed_after(synced, or_failed);
        if !save_first && let Some(file) = self.unsynced.pop_front() {
            self.synced = true;
            return Some(Job::Sync(file));
        }
        if due && let Some(incident) = self.waiting.take_packed(or_failed) {
            self.in_writing = Some(incident.id.clone());
            return Some(Job::Save(incident));
        }
        if let Some(id) = self.rewritten.pop_front() {
            return Some(Job::Rewritten(id));
        }
        if std::mem::take(&mut self.review) {
            return Some(Job::Review);
        }
        self.end.then_some(Job::End)
    }
}

/// What the storer owns.
struct Files {
    store: IncidentStore,
    retention: Retention,
    shared: Arc<Shared>,
}

impl Files {
    fn run(mut self) {
        loop {
            match self.shared.next() {
                Job::Sync(file) => {
                    if let Err(error) = file.sync_data() {
                        let mut state = self.shared.state();
                        state.counts.write_failures = state.counts.write_failures.saturating_add(1);
                        error!("failed to sync the ledger of kills: {error}");
                    }
                }
                Job::Rewritten(id) => {
                    let deleted = self.retention.rewritten(&id);
                    self.report_deleted(deleted);
                }
                Job::Review => {
                    let deleted = self.retention.review(SystemTime::now());
                    self.report_deleted(deleted);
                }
                Job::Save(incident) => self.save(incident),
                Job::End => return,
            }
        }
    }

    fn save(&mut self, incident: PackedIncident) {
        match self.store.save_encoded(&incident.id, &incident.file) {
            Ok(path) => {
                info!(id = %incident.id, file = %path.display(), "saved an incident");
                let PackedIncident { id, kind, cgroup, modules, .. } = incident;
                let mut state = self.shared.state();
                (state.retry, state.in_writing) = (None, None);
                self.shared.count(&state);
                let count = state.counts.saved.entry(kind).or_default();
                *count = count.saturating_add(1);
                if state.saved.len() >= MAX_SAVED
                    && state.saved.pop_front().is_some_and(|oldest| !oldest.modules.is_empty())
                {
                    state.counts.not_named = state.counts.not_named.saturating_add(1);
                }
                state.saved.push_back(SavedIncident { path, modules });
                drop(state);
                let deleted = self.retention.saved(id, cgroup);
                self.report_deleted(deleted);
                self.shared.saved.notify_one();
            }
            Err(error) => {
                let mut state = self.shared.state();
                state.counts.write_failures = state.counts.write_failures.saturating_add(1);
                let pause = state.retry.map_or(RETRY_FIRST, |retry| (retry.pause * 2).min(RETRY_MOST));
                state.retry = Some(Retry { at: Instant::now() + pause, pause });
                error!(id = %incident.id, "failed to save an incident: {error}; next try in {pause:?}");
                state.in_writing = None;
                state.waiting.put_failed(incident);
            }
        }
    }

    /// Counts and logs what retention has deleted.
    fn report_deleted(&self, deleted: io::Result<DeletedFiles>) {
        match deleted {
            Ok(DeletedFiles { files: 0, .. }) => {}
            Ok(DeletedFiles { files, bytes, newest_of_cgroup, last }) => {
                let mut state = self.shared.state();
                state.counts.dropped = state.counts.dropped.saturating_add(files);
                drop(state);
                let last = last.unwrap_or_default();
                if newest_of_cgroup > 0 {
                    warn!(files, bytes, newest_of_cgroup, last, "deleted incidents, also the newest of a cgroup");
                } else {
                    info!(files, bytes, last, "deleted old incidents");
                }
            }
            Err(error) => error!("failed to delete old incidents: {error}"),
        }
    }
}

#[cfg(test)]
#[path = "storer_tests.rs"]
mod tests;
