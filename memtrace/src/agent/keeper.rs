//! A thread that keeps account of what the kernel knows: it reads the counters of cgroups every ten
//! seconds and leaves them for the next run, and at the start it finds out what happened before.
//!
//! A walk of the cgroup tree takes milliseconds, or a second with ten thousand cgroups, so it is
//! not for the recorder's loop, which only says how far it has got ([`Keeper::advance`]). What is
//! read counts from the moment on when the loop has written every kill before it: until then a kill
//! could be in a counter and not yet in the ledger.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context;
use rustix::process::nice;
use tracing::{debug, warn};

use super::unwatched::{Gathered, LogClock};
use super::watch_state::{Baseline, WatchState};
use crate::cgroup::hierarchy::Hierarchy;
use crate::cgroup::oom_kills::CgroupOomKills;
use crate::clock;
use crate::kernel::log::backlog::{self, Backlog};
use crate::own_process::rights::KEEPER;
use crate::store::ledger;
use memtrace_incident::{KillLine, Moment, UnwatchedEntry};

/// Time between two readings of the counters.
const EVERY: Duration = Duration::from_secs(10);
/// A reading costs at most one part in this of a CPU: with many cgroups there is more time between
/// two.
const CPU_PARTS: u32 = 200;
/// Added to the priority of the thread: with all CPUs busy it gets a tenth of what the recorder
/// gets.
const NICENESS: i32 = 10;
/// How often it looks whether the loop has got further.
const POLL: Duration = Duration::from_millis(100);
/// When the loop has got this much further than a reading, every kill before that is written: a
/// mark waits 100 ms for its SIGKILL, and its line 500 ms for a path.
const WRITTEN_AFTER_NS: u64 = 1_000_000_000;
/// How long the agent waits at its end for the last state to be written.
const STOP_LIMIT: Duration = Duration::from_secs(3);

/// How far the loop has got.
#[derive(Debug, Default)]
struct Progress {
    /// Every kill up to then is in the ledger, boot clock.
    watched_until_ns: AtomicU64,
    /// Number of the kernel log's next record plus one; 0 while none was read.
    kernel_log_seq: AtomicU64,
    /// The lines that the thread found are in the ledger.
    written: AtomicBool,
}

/// What the thread needs to know.
#[derive(Debug)]
pub(super) struct KeeperConfig {
    pub(super) state_dir: PathBuf,
    pub(super) hierarchy: Hierarchy,
    /// Whether the kernel log is read.
    pub(super) kernel_log: bool,
    /// When and in which boot this run began to watch.
    pub(super) watching_since: Moment,
    /// From where on kills are to be found; `None` when no run was before this one.
    pub(super) baseline: Option<Baseline>,
}

/// The thread, seen from the loop.
#[derive(Debug)]
pub(super) struct Keeper {
    progress: Arc<Progress>,
    found: Receiver<Vec<UnwatchedEntry>>,
    /// Lines were taken that are to be written.
    taken: bool,
    stop: Option<Sender<()>>,
    /// Closed when the thread has ended.
    ended: Receiver<()>,
}

impl Keeper {
    /// Starts the thread. The hooks must be attached.
    pub(super) fn start(config: KeeperConfig) -> anyhow::Result<Self> {
        let progress = Arc::new(Progress::default());
        let ((found_sender, found), (stop, stopped), (ending, ended)) = (channel(), channel(), channel());
        let task = Task { config, progress: progress.clone(), found: found_sender, stopped, pause: EVERY };
        let body = move || {
            KEEPER.keep_capabilities();
            // Others go first. On Linux this is of the thread alone (kernel/sys.c, setpriority).
            if let Err(error) = nice(NICENESS) {
                debug!("the thread that keeps account of kills stays at its priority: {error}");
            }
            task.run();
            drop(ending);
        };
        thread::Builder::new().name(KEEPER.thread.to_owned()).spawn(body).context("failed to start a thread")?;
        Ok(Self { progress, found, taken: false, stop: Some(stop), ended })
    }

    /// Lines that belong into the ledger.
    pub(super) fn take_found(&mut self) -> Option<Vec<UnwatchedEntry>> {
        let found = self.found.try_recv().ok();
        self.taken |= found.is_some();
        found
    }

    /// Every kill up to this time and the lines that were taken are in the ledger, and the kernel
    /// log is read up to this record.
    pub(super) fn advance(&self, watched_until_ns: u64, kernel_log_seq: Option<u64>) {
        self.progress.kernel_log_seq.store(kernel_log_seq.map_or(0, |seq| seq.saturating_add(1)), Ordering::Relaxed);
        self.progress.watched_until_ns.store(watched_until_ns, Ordering::Release);
        self.progress.written.store(self.taken, Ordering::Release);
    }

    /// Ends the thread, which leaves its state first.
    pub(super) fn stop(&mut self) {
        self.stop = None;
        if self.ended.recv_timeout(STOP_LIMIT) == Err(RecvTimeoutError::Timeout) {
            warn!("the next start knows only to ten seconds until when this run watched: the state was not written");
        }
    }
}

/// The thread itself.
struct Task {
    config: KeeperConfig,
    progress: Arc<Progress>,
    found: Sender<Vec<UnwatchedEntry>>,
    stopped: Receiver<()>,
    /// Time until the next reading.
    pause: Duration,
}

impl Task {
    fn run(mut self) {
        let before = self.config.baseline.take();
        // The first run has nothing to account for, and one whose lines are written neither.
        let mut account = before.is_some();
        let since = before.clone().unwrap_or_else(|| Baseline::at(&self.config.watching_since));
        let first = self.gather(since);
        // The first run leaves what it has at once: it may not live for long.
        let mut baseline = before.or_else(|| Some(first.clone().into_baseline()));
        self.leave(baseline.as_ref());
        let mut reading = Some(first);
        let mut next = Instant::now();
        let mut wait = POLL;
        while self.stopped.recv_timeout(wait) == Err(RecvTimeoutError::Timeout) {
            if let Some(read) = reading.take_if(|read| self.is_written(read)) {
                if account && !self.account(&read) {
                    break;
                }
                account = false;
                let read_until = read.backlog.as_ref().and_then(|backlog| backlog.next_seq);
                let kernel_log_seq = self.kernel_log_seq().max(read_until);
                baseline = Some(Baseline { kernel_log_seq, ..read.into_baseline() });
                self.leave(baseline.as_ref());
                next = Instant::now() + self.pause;
            } else if reading.is_none() && Instant::now() >= next {
                reading = baseline.clone().map(|baseline| self.read_counts(baseline));
            }
            wait = if reading.is_some() { POLL } else { next.saturating_duration_since(Instant::now()) };
        }
        self.leave(baseline.as_ref());
    }

    /// Whether every kill before this was read is in the ledger.
    fn is_written(&self, read: &Gathered) -> bool {
        let last = read.counts.cgroups.last().map_or(read.clock.boot_ns, CgroupOomKills::read_until_ns);
        self.progress.watched_until_ns.load(Ordering::Acquire) >= last.saturating_add(WRITTEN_AFTER_NS)
    }

    /// Reads what the kernel knows since `baseline`.
    fn gather(&mut self, baseline: Baseline) -> Gathered {
        let backlog = self.config.kernel_log.then(|| backlog::read_back(baseline.kernel_log_seq));
        let backlog = backlog.and_then(|read| {
            read.inspect_err(|error| warn!("kernel log: {error:#}; kills before this start are not in it")).ok()
        });
        let read = self.read_counts(baseline);
        Gathered { backlog, ..read }
    }

    /// Reads the counters alone. The loop reads the kernel log.
    fn read_counts(&mut self, baseline: Baseline) -> Gathered {
        let clock = LogClock { boot_ns: clock::boot_ns(), raw_ns: clock::raw_ns() };
        let begin = clock::cpu_time();
        let counts = self.config.hierarchy.oom_kills(clock::boot_ns);
        self.pause = EVERY.max(clock::cpu_time().saturating_sub(begin) * CPU_PARTS);
        let backlog = baseline.kernel_log_seq.map(|seq| Backlog { next_seq: Some(seq), ..Backlog::default() });
        Gathered { baseline, backlog, log_wanted: self.config.kernel_log, counts, clock }
    }

    /// How far the loop has read the kernel log; `None` while it has read nothing.
    fn kernel_log_seq(&self) -> Option<u64> {
        self.progress.kernel_log_seq.load(Ordering::Relaxed).checked_sub(1)
    }

    /// Gives the loop what was found out about the time before this run, and waits until it is in
    /// the ledger. False when the agent stops before.
    fn account(&self, read: &Gathered) -> bool {
        let ledger = match ledger::read::<KillLine>(&self.config.state_dir) {
            Ok(ledger) => ledger.entries,
            Err(error) => {
                warn!("failed to read the ledger of kills: {error}; kills before this start are not looked for");
                return true;
            }
        };
        let entries = read.account(&ledger, clock::wall_at);
        if entries.is_empty() {
            return true;
        }
        if self.found.send(entries).is_err() {
            return false;
        }
        while !self.progress.written.load(Ordering::Acquire) {
            if self.stopped.recv_timeout(POLL) != Err(RecvTimeoutError::Timeout) {
                return self.progress.written.load(Ordering::Acquire);
            }
        }
        true
    }

    /// Leaves the state for the next run.
    fn leave(&self, baseline: Option<&Baseline>) {
        let since = &self.config.watching_since;
        let boot_ns = self.progress.watched_until_ns.load(Ordering::Acquire).max(since.boot_ns);
        let watched_until = Moment { boot_id: since.boot_id.clone(), boot_ns, wall: clock::wall_at(boot_ns) };
        let state = WatchState { watched_until, baseline: baseline.cloned() };
        if let Err(error) = state.write(&self.config.state_dir) {
            debug!("{error:#}");
        }
    }
}
