//! The thread that waits for the disk: it writes incident files, deletes old ones, and syncs the ledger of kills.
//!
//! The recorder hands over and goes on. What it hands over is bounded: beyond [`MAX_WAITING`] incidents or
//! [`MAX_WAITING_BYTES`] the oldest is given up, counted and logged. While many wait, they are packed to the bytes of
//! their files, which take a tenth: a storm of kills is over before a disk has written it.

use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use anyhow::Context;
use memtrace_incident::{Incident, Kind, codec};
use tokio::sync::Notify;
use tracing::{error, info, warn};

use crate::own_process::rights::STORER;
use crate::store::incidents::IncidentStore;
use crate::store::retention::{self, DeletedFiles, Retention};
use crate::symbolize::frame_names::{ModuleName, UnnamedFrames};

/// Incidents that wait to be saved; beyond it the oldest is given up. A storm of kills closes hundreds at once.
const MAX_WAITING: usize = 1024;
/// What they may take, bytes as [`bytes_of`] estimates. One is always kept.
const MAX_WAITING_BYTES: usize = 32 << 20;
/// Incidents as the recorder hands them over, beyond which they are packed before others are written.
const MAX_WHOLE: usize = 8;
/// Incidents that are packed one after another while some are ready to be written.
const MAX_PACKED_IN_TURN: usize = 16;
/// Saved incidents that the recorder has not taken yet; beyond it the oldest gets no names.
const MAX_SAVED: usize = 256;
/// Modules of one incident whose files are asked for.
const MAX_MODULES: usize = 1024;
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
    /// Modules that have its unnamed frames. Cap: [`MAX_MODULES`].
    pub(super) modules: Vec<ModuleName>,
}

/// What the thread has done so far.
#[derive(Clone, Debug, Default)]
pub(super) struct StoreCounts {
    /// Incidents saved, by kind.
    pub(super) saved: BTreeMap<Kind, u64>,
    /// Saves that failed, and syncs of the ledger.
    pub(super) write_failures: u64,
    /// Incidents that were not written, because too many waited.
    pub(super) given_up: u64,
    /// Incident files deleted for size or age.
    pub(super) dropped: u64,
    /// Incidents whose frames get no names, because too many waited to be taken.
    pub(super) not_named: u64,
}

/// Hands incidents to the thread.
pub(super) struct Storer(Arc<Shared>);

struct Shared {
    state: Mutex<State>,
    /// Something is to be done, or was done.
    changed: Condvar,
    /// For the recorder: something was saved.
    saved: Arc<Notify>,
    /// Incidents that wait or are being written; the recorder reads it without the lock, which a thread can hold that
    /// has no CPU.
    unsaved: AtomicU64,
}

#[derive(Default)]
struct State {
    /// Closed incidents that are not written yet, oldest first. Cap of these and `packed`: [`MAX_WAITING`].
    whole: VecDeque<Box<Incident>>,
    /// The same as the bytes of their files, older ones and those that could not be written.
    packed: VecDeque<PackedIncident>,
    /// Incidents that were packed since one was written. Cap: [`MAX_PACKED_IN_TURN`].
    packed_in_turn: usize,
    /// What `whole` and `packed` take, bytes. Cap: [`MAX_WAITING_BYTES`].
    waiting_bytes: usize,
    /// Saving fails: when it is tried again.
    retry: Option<Retry>,
    /// Ledgers that were written to, and their directory after a rotation. Cap: [`MAX_UNSYNCED`].
    unsynced: VecDeque<File>,
    /// The last job was a sync: an incident comes next, or a storm of kills would keep all from being saved.
    synced: bool,
    /// Ids of files that were written again with names. Cap: [`MAX_REWRITTEN`].
    rewritten: VecDeque<String>,
    /// Old files are to be deleted.
    review: bool,
    /// The thread is at work on something.
    busy: bool,
    /// Id of the incident that is being packed or written.
    in_hand: Option<String>,
    /// Saves that are tried at once, whether saving fails or not: the agent stops.
    at_once: usize,
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

/// What the thread does next.
enum Job {
    Sync(File),
    Rewritten(String),
    Review,
    Pack(Box<Incident>),
    Save(PackedIncident),
    End,
}

/// An incident as the bytes of its file, and what is still to be known of it when it is written.
struct PackedIncident {
    id: String,
    kind: Kind,
    cgroup: String,
    /// Modules that have its unnamed frames. Cap: [`MAX_MODULES`].
    modules: Vec<ModuleName>,
    file: Vec<u8>,
}

impl PackedIncident {
    fn of(incident: &Incident) -> io::Result<Self> {
        let unnamed = UnnamedFrames::of(incident).0.into_iter();
        Ok(Self {
            id: incident.id.clone(),
            kind: incident.kind,
            cgroup: retention::name(&incident.cgroup),
            modules: unnamed.map(|(module, _)| module).take(MAX_MODULES).collect(),
            file: codec::encode(incident)?,
        })
    }

    /// What it takes, bytes.
    fn bytes(&self) -> usize {
        const MODULE: usize = 200;
        const REST: usize = 500;
        self.file.len() + self.modules.len() * MODULE + REST
    }
}

impl Storer {
    /// Starts the thread. `retention` is of the same store.
    pub(super) fn start(store: IncidentStore, retention: Retention) -> anyhow::Result<Self> {
        let shared = Arc::new(Shared {
            state: Mutex::default(),
            changed: Condvar::new(),
            saved: Arc::new(Notify::new()),
            unsaved: AtomicU64::new(0),
        });
        let files = Files { store, retention, shared: Arc::clone(&shared) };
        let run = move || {
            STORER.enter();
            files.run();
        };
        thread::Builder::new().name(STORER.thread.to_owned()).spawn(run).context("failed to start a thread")?;
        Ok(Self(shared))
    }

    /// Is told when there is something in [`Self::take_saved`].
    pub(super) fn saved(&self) -> Arc<Notify> {
        Arc::clone(&self.0.saved)
    }

    /// Queues an incident to be saved.
    pub(super) fn save(&self, incident: Box<Incident>) {
        let mut state = self.0.state();
        let bytes = bytes_of(&incident);
        while (state.waiting() >= MAX_WAITING || state.waiting_bytes.saturating_add(bytes) > MAX_WAITING_BYTES)
            && let Some(oldest) = state.take_oldest()
        {
            state.counts.given_up = state.counts.given_up.saturating_add(1);
            error!(id = %oldest, "gave up saving an incident: {} others wait", state.waiting());
        }
        state.put_whole(incident);
        self.0.count(&state);
        self.0.changed.notify_all();
    }

    /// Syncs what was written to.
    pub(super) fn sync(&self, files: impl IntoIterator<Item = File>) {
        let mut state = self.0.state();
        state.unsynced.extend(files);
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
        state.at_once = state.waiting() + usize::from(state.in_hand.is_some());
        self.0.changed.notify_all();
        let unfinished = |state: &mut State| state.busy || state.at_once > 0 || state.has_more();
        let (state, waited) =
            self.0.changed.wait_timeout_while(state, limit, unfinished).unwrap_or_else(PoisonError::into_inner);
        if waited.timed_out() && state.busy {
            error!("the disk did not answer for {limit:?}");
        }
        let packed = state.packed.iter().map(|packed| &packed.id);
        let whole = state.whole.iter().map(|incident| &incident.id);
        state.in_hand.iter().chain(packed).chain(whole).cloned().collect()
    }
}

impl Drop for Storer {
    /// Ends the thread, without waiting for it: a disk may never answer.
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
        let in_hand = usize::from(state.in_hand.is_some());
        self.unsaved.store((state.waiting() + in_hand) as u64, Ordering::Release);
    }

    /// Waits for something to do. What is short comes first.
    fn next(&self) -> Job {
        let mut state = self.state();
        (state.busy, state.in_hand) = (false, None);
        self.count(&state);
        self.changed.notify_all();
        loop {
            if let Some(job) = state.take_job() {
                state.busy = true;
                return job;
            }
            let pause = state.retry.filter(|_| state.waiting() > 0);
            let pause = pause.map_or(Duration::MAX, |retry| retry.at.saturating_duration_since(Instant::now()));
            let waited = self.changed.wait_timeout(state, pause.min(RETRY_MOST));
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl State {
    /// Whether there is something to do besides incidents that wait for the next try.
    fn has_more(&self) -> bool {
        !self.unsynced.is_empty() || self.review || !self.rewritten.is_empty()
    }

    /// Incidents that wait.
    fn waiting(&self) -> usize {
        self.whole.len() + self.packed.len()
    }

    fn put_whole(&mut self, incident: Box<Incident>) {
        self.waiting_bytes = self.waiting_bytes.saturating_add(bytes_of(&incident));
        self.whole.push_back(incident);
    }

    fn take_whole(&mut self) -> Option<Box<Incident>> {
        let incident = self.whole.pop_front()?;
        self.waiting_bytes = self.waiting_bytes.saturating_sub(bytes_of(&incident));
        Some(incident)
    }

    fn put_packed(&mut self, incident: PackedIncident) {
        self.waiting_bytes = self.waiting_bytes.saturating_add(incident.bytes());
        self.packed.push_back(incident);
    }

    fn take_packed(&mut self) -> Option<PackedIncident> {
        let incident = self.packed.pop_front()?;
        self.waiting_bytes = self.waiting_bytes.saturating_sub(incident.bytes());
        Some(incident)
    }

    /// Takes out the oldest incident. Returns its id.
    fn take_oldest(&mut self) -> Option<String> {
        self.take_packed().map(|packed| packed.id).or_else(|| self.take_whole().map(|incident| incident.id))
    }

    /// Whether to pack before anything is written.
    fn packs_first(&self) -> bool {
        self.whole.len() > MAX_WHOLE && self.packed_in_turn < MAX_PACKED_IN_TURN
    }

    fn take_job(&mut self) -> Option<Job> {
        let due = self.at_once > 0 || self.retry.is_none_or(|retry| Instant::now() >= retry.at);
        let save_first = std::mem::take(&mut self.synced) && due && self.waiting() > 0;
        if !save_first && let Some(file) = self.unsynced.pop_front() {
            self.synced = true;
            return Some(Job::Sync(file));
        }
        if due
            && !self.packs_first()
            && let Some(incident) = self.take_packed()
        {
            self.at_once = self.at_once.saturating_sub(1);
            self.packed_in_turn = 0;
            self.in_hand = Some(incident.id.clone());
            return Some(Job::Save(incident));
        }
        if let Some(incident) = self.take_whole() {
            self.packed_in_turn = self.packed_in_turn.saturating_add(1);
            self.in_hand = Some(incident.id.clone());
            return Some(Job::Pack(incident));
        }
        self.at_once = 0;
        if let Some(id) = self.rewritten.pop_front() {
            return Some(Job::Rewritten(id));
        }
        if std::mem::take(&mut self.review) {
            return Some(Job::Review);
        }
        self.end.then_some(Job::End)
    }
}

/// What the thread owns.
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
                Job::Pack(incident) => self.pack(&incident),
                Job::Save(incident) => self.save(incident),
                Job::End => return,
            }
        }
    }

    fn pack(&self, incident: &Incident) {
        let packed = PackedIncident::of(incident);
        let mut state = self.shared.state();
        state.in_hand = None;
        match packed {
            Ok(packed) => state.put_packed(packed),
            Err(error) => {
                state.counts.given_up = state.counts.given_up.saturating_add(1);
                error!(id = %incident.id, "gave up saving an incident, which cannot be encoded: {error}");
            }
        }
    }

    fn save(&mut self, incident: PackedIncident) {
        match self.store.save_encoded(&incident.id, &incident.file) {
            Ok(path) => {
                info!(id = %incident.id, file = %path.display(), "saved an incident");
                let PackedIncident { id, kind, cgroup, modules, .. } = incident;
                let mut state = self.shared.state();
                state.retry = None;
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
                // Others go first: what is wrong may be wrong with this one only.
                state.in_hand = None;
                state.put_packed(incident);
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

/// What an incident takes, bytes: an estimate by what there can be much of.
fn bytes_of(incident: &Incident) -> usize {
    const POINT: usize = 160;
    const FRAME: usize = 160;
    const ROW: usize = 400;
    let frames = incident.allocation_paths.iter().map(|path| path.frames.len()).sum::<usize>();
    let rows = incident.allocation_paths.len() + incident.growth.len() + incident.mappings.len();
    incident.timeline.columns.boot_ns.len() * POINT + frames * FRAME + rows * ROW + ROW
}

#[cfg(test)]
#[path = "storer_tests.rs"]
mod tests;
