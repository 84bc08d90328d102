//! The stack worker as the recorder sees it: started, listened to, and replaced when it hangs or
//! ends.
//!
//! Nothing here waits for the worker but what says so, and that has a deadline. The worker gives up
//! a reading that is late, and from then on that process, device and, the second time, user are
//! left alone for a while ([`refusals`]). A worker with too many of those, or that itself does not
//! end a reading that it announced ([`running`]), is killed and replaced. One that ended by itself
//! did so over a record of the ring or over a file: the next one skips the one and leaves the other
//! alone. A worker that hangs in the kernel dies only when its file system lets it. Up to
//! [`MAX_STUCK`] of those are waited for; with more there are no stacks until one is gone. Until
//! then nothing is read from where the next one may hang as well: file systems that the host has
//! not mounted.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::Child;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use memtrace_unwind::gate::{ProcessKey, Reading, Refused};
use memtrace_unwind::modules::OpenModule;
use tracing::{info, warn};

use crate::stacks::messages::{Batch, ModuleLabel, OpenLabel, StackCounts, Start, ToWorker};

mod batches;
mod refusals;
mod running;

use batches::Batches;
use refusals::Refusals;
use running::{ANSWER_LIMIT, Running};

/// Time until the first worker is ready: it reads the kernel's symbols.
const START_LIMIT: Duration = Duration::from_secs(10);
/// Workers that were killed and are not gone.
const MAX_STUCK: usize = 4;
/// One that was killed and is not gone after this time hangs in the kernel.
const KILL_TIME: Duration = Duration::from_secs(1);
/// First pause before a worker that ended by itself, or the second one that hangs, is replaced;
/// each one doubles it, up to 64 times.
const PAUSE: Duration = Duration::from_secs(1);
/// A worker that has run for this long was started rightly: the pause begins anew.
const CALM: Duration = Duration::from_mins(1);
/// Processes that replaced their program lately: a worker that begins finds their old stacks.
const MAX_EXECS: usize = 1024;

/// A file of a module, with what its name is.
#[derive(Debug)]
pub struct ModuleFile {
    /// Path, build id, and the name of its debug file.
    pub label: OpenLabel,
    /// The open file.
    pub file: OwnedFd,
}

impl From<ModuleFile> for OpenModule {
    fn from(module: ModuleFile) -> Self {
        let OpenLabel { path, build_id, debug_link } = module.label;
        Self { path: path.into(), build_id: build_id.map(Into::into), debug_link, file: Arc::new(module.file.into()) }
    }
}

/// How the worker is doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WorkerHealth {
    /// Workers that were replaced, since the start.
    pub restarts: u64,
    /// Workers that hang and cannot be killed.
    pub stuck: u64,
    /// Whether one runs.
    pub running: bool,
    /// Readings that it has given up and that have not ended.
    pub readings_late: u64,
    /// Its resident memory, bytes; `None` when none runs.
    pub resident_bytes: Option<u64>,
    /// CPU time of all workers since the start, nanoseconds.
    pub cpu_ns: u64,
}

/// See the module.
pub(super) struct StackWorker {
    /// The STACKS ring.
    ring: OwnedFd,
    rate_ppm: u64,
    running: Option<Running>,
    /// Cap: [`MAX_STUCK`].
    stuck: Vec<Stuck>,
    refusals: Refusals,
    /// What the worker that runs was told to leave alone.
    told: Refused,
    restarts: u64,
    /// Records that the next worker skips.
    skip: usize,
    /// When they did, boot clock. Oldest first. Cap: [`MAX_EXECS`].
    execs: VecDeque<(ProcessKey, u64)>,
    batches: Batches,
    /// When the next worker may start, and the pause before it.
    next: Option<Instant>,
    pause: Duration,
    /// Totals of the workers before.
    before: StackCounts,
    /// Of workers and of questions.
    number: u64,
}

/// A worker that was killed.
struct Stuck {
    child: Child,
    /// What it hangs on; `None`: it did not say.
    reading: Option<Reading>,
    since: Instant,
}

impl StackWorker {
    /// Starts a worker on the ring and waits until it is ready. `rate_ppm` is what reading may
    /// take, in parts per million of one CPU. Must run inside a tokio runtime.
    pub(super) fn start(ring: BorrowedFd<'_>, rate_ppm: u64) -> anyhow::Result<Self> {
        let ring = ring.try_clone_to_owned().context("failed to copy the descriptor of the stacks ring")?;
        let mut worker = Self {
            ring,
            rate_ppm,
            running: None,
            stuck: Vec::new(),
            refusals: Refusals::default(),
            told: Refused::default(),
            restarts: 0,
            skip: 0,
            execs: VecDeque::new(),
            batches: Batches::default(),
            next: None,
            pause: PAUSE,
            before: StackCounts::default(),
            number: 1,
        };
        worker.spawn().context("failed to start the stack worker")?;
        worker.wait_until(START_LIMIT, |_, batches| !batches.is_empty());
        Ok(worker)
    }

    fn spawn(&mut self) -> std::io::Result<()> {
        let refused = self.refused();
        let start = Start {
            rate_ppm: self.rate_ppm,
            refused: (&refused).into(),
            skip: std::mem::take(&mut self.skip),
            execs: self.execs.iter().copied().collect(),
        };
        self.number = self.number.wrapping_add(1);
        self.running = Some(Running::start(self.number, self.ring.as_fd(), start)?);
        self.told = refused;
        Ok(())
    }

    /// What is left alone now.
    fn refused(&self) -> Refused {
        let refused = self.refusals.list();
        Refused { strangers: refused.strangers || !self.stuck.is_empty(), ..refused }
    }

    /// Waits until the worker has said something.
    pub(super) async fn ready(&self) {
        let readable = match &self.running {
            Some(running) => running.socket.readable().await,
            None => std::future::pending().await,
        };
        // What is wrong with the socket shows when it is read.
        let _ = readable;
    }

    /// Takes what the worker has said, without waiting.
    pub(super) fn receive(&mut self) {
        let Some(running) = &mut self.running else { return };
        let (received, now) = (running.receive(&mut self.batches), Instant::now());
        let is_tangled = running.is_tangled();
        std::mem::take(&mut running.late).iter().for_each(|reading| self.refusals.add(reading, now));
        if let Err(error) = received {
            warn!("the stack worker ended ({error}); another one is started");
            self.gave_up(now);
        } else if is_tangled {
            warn!("too many readings of the stack worker do not end; another one is started");
            self.replace(now);
            // That is no fault of its own.
            self.next = None;
        }
    }

    /// The next batch of stacks, and the number of the worker that its numbers are of.
    pub(super) fn next_batch(&mut self) -> Option<(u64, Batch)> {
        self.batches.pop()
    }

    /// Whether a batch waits.
    pub(super) fn has_batch(&self) -> bool {
        !self.batches.is_empty()
    }

    /// Gives memory back that its messages took.
    pub(super) fn give_memory_back(&mut self) {
        self.batches.give_memory_back();
        if let Some(running) = &mut self.running {
            running.give_memory_back();
        }
    }

    /// Says something to the worker, if there is one that listens.
    pub(super) fn say(&mut self, message: &ToWorker) {
        if let Some(running) = &mut self.running {
            running.queue(message);
            running.flush();
        }
    }

    /// The same with the next tick: the worker need not wake up for it.
    pub(super) fn say_later(&mut self, message: &ToWorker) {
        if let Some(running) = &mut self.running {
            running.queue(message);
        }
    }

    /// Tells the worker, with the next tick, that a process has replaced its program.
    pub(super) fn say_exec(&mut self, process: ProcessKey, boot_ns: u64) {
        if self.execs.len() >= MAX_EXECS {
            self.execs.pop_front();
        }
        self.execs.push_back((process, boot_ns));
        self.say_later(&ToWorker::Exec(process, boot_ns));
    }

    /// Asks for an answer, unless one is owed. Call it about once a second.
    pub(super) fn ask(&mut self, keep_files: Duration) {
        if self.running.as_ref().is_some_and(|running| running.asked.is_none()) {
            self.ask_for(false, keep_files);
        }
    }

    fn ask_for(&mut self, drain: bool, keep_files: Duration) {
        self.number = self.number.wrapping_add(1);
        let keep_files_ms = u64::try_from(keep_files.as_millis()).unwrap_or(u64::MAX);
        let number = self.number;
        if let Some(running) = &mut self.running
            && running.queue(&ToWorker::Answer { number, drain, keep_files_ms })
        {
            running.asked = Some((number, Instant::now()));
            running.flush();
        }
    }

    /// Replaces a worker that hangs, and starts one if there is none. Call it with each tick.
    pub(super) fn check(&mut self, now: Instant) {
        self.stuck.retain_mut(|stuck| matches!(stuck.child.try_wait(), Ok(None)));
        let over = |since: Instant, limit| now.saturating_duration_since(since) > limit;
        for stuck in self.stuck.iter().filter(|stuck| over(stuck.since, KILL_TIME)) {
            // As long as it hangs, so would the next one.
            stuck.reading.iter().for_each(|reading| self.refusals.hold(reading, now));
        }
        // What it has said by now counts: this process may have been busy elsewhere.
        self.receive();
        if let Some(running) = &mut self.running {
            running.flush();
            if over(running.started, CALM) {
                self.pause = PAUSE;
            }
            let silent = running.asked.is_some_and(|(_, since)| over(since, ANSWER_LIMIT));
            if running.hangs(&self.batches) {
                running.reading.iter().for_each(|(reading, _)| self.refusals.add(reading, now));
                let first = self.pause == PAUSE;
                self.replace(now);
                // The next one leaves that file alone.
                self.next = self.next.filter(|_| !first);
            } else if silent && running.reading.is_none() && !self.batches.is_full() {
                warn!("the stack worker does not answer; another one is started");
                self.gave_up(now);
            }
        }
        self.refusals.expire(now);
        self.tell_refused();
        if self.running.is_none() && self.stuck.len() < MAX_STUCK && self.next.is_none_or(|next| now >= next) {
            self.next = Some(now.checked_add(self.pause).unwrap_or(now));
            self.pause = self.pause.saturating_mul(2).min(PAUSE.saturating_mul(64));
            match self.spawn() {
                Ok(()) => {
                    self.ask(Duration::ZERO);
                    info!("another stack worker runs");
                }
                Err(error) => warn!("failed to start a stack worker: {error}"),
            }
        }
    }

    fn tell_refused(&mut self) {
        let refused = self.refused();
        if refused != self.told
            && let Some(running) = &mut self.running
            && running.queue(&ToWorker::Refuse((&refused).into()))
        {
            running.flush();
            self.told = refused;
        }
    }

    /// Replaces a worker that ended or does nothing: over a file, or over the next record.
    fn gave_up(&mut self, now: Instant) {
        let reading = self.running.as_ref().and_then(|running| running.reading);
        reading.iter().for_each(|(reading, _)| self.refusals.add(reading, now));
        self.skip = 1;
        self.replace(now);
    }

    /// Kills the worker that runs.
    fn replace(&mut self, now: Instant) {
        let Some(mut running) = self.running.take() else { return };
        self.before = running.counts.plus(&self.before);
        self.restarts = self.restarts.saturating_add(1);
        self.next = Some(now.checked_add(self.pause).unwrap_or(now));
        let _ = running.child.kill();
        if matches!(running.child.try_wait(), Ok(None)) {
            let reading = running.reading.map(|(reading, _)| reading);
            self.stuck.push(Stuck { child: running.child, reading, since: now });
        }
    }

    /// Asks for everything that the ring holds; [`StackWorker::await_answer`] waits for it.
    pub(super) fn ask_for_all(&mut self, keep_files: Duration) {
        self.ask_for(true, keep_files);
    }

    /// Waits until the last question is answered or batches are to be taken, `limit` at most. True
    /// if there is nothing more to wait for.
    pub(super) fn await_answer(&mut self, limit: Duration) -> bool {
        self.wait_until(limit, |running, _| running.asked.is_none());
        self.running.as_ref().is_none_or(|running| running.asked.is_none() || running.hangs(&self.batches))
    }

    /// Asks for the files of modules.
    pub(super) fn ask_for_modules(&mut self, wanted: Vec<ModuleLabel>) {
        self.number = self.number.wrapping_add(1);
        if let Some(running) = &mut self.running {
            running.ask_for_modules(self.number, wanted);
        }
    }

    /// The files that were asked for, once they are all there; none if the worker has gone. `None`:
    /// not yet.
    pub(super) fn take_modules(&mut self) -> Option<Vec<ModuleFile>> {
        let Some(running) = &mut self.running else { return Some(Vec::new()) };
        (!running.owes_modules()).then(|| running.take_modules())
    }

    /// The files of these modules, as far as they come within `limit`.
    pub(super) fn modules(&mut self, wanted: Vec<ModuleLabel>, limit: Duration) -> Vec<ModuleFile> {
        self.ask_for_modules(wanted);
        self.wait_until(limit, |running, _| !running.owes_modules());
        self.running.as_mut().map(Running::take_modules).unwrap_or_default()
    }

    /// Totals of all workers.
    pub(super) fn counts(&self) -> StackCounts {
        let running = self.running.as_ref().map(|running| running.counts).unwrap_or_default();
        running.plus(&self.before)
    }

    /// How the worker is doing.
    pub(super) fn health(&self) -> WorkerHealth {
        let stuck = u64::try_from(self.stuck.len()).unwrap_or(u64::MAX);
        let (running, counts) = (self.running.is_some(), self.counts());
        WorkerHealth {
            restarts: self.restarts,
            stuck,
            running,
            readings_late: counts.readings_late,
            resident_bytes: running.then_some(counts.resident_bytes),
            cpu_ns: counts.cpu_ns,
        }
    }

    /// Waits for the worker until `done` or `limit`.
    fn wait_until(&mut self, limit: Duration, done: impl Fn(&Running, &Batches) -> bool) {
        let until = Instant::now().checked_add(limit);
        loop {
            self.receive();
            let left = until.map_or(Duration::ZERO, |until| until.saturating_duration_since(Instant::now()));
            let Some(running) = self.running.as_mut().filter(|running| !done(running, &self.batches)) else { return };
            if left.is_zero() || self.batches.is_full() || running.hangs(&self.batches) {
                return;
            }
            running.flush();
            running.wait(left.min(Duration::from_millis(20)));
        }
    }
}

impl Drop for StackWorker {
    fn drop(&mut self) {
        // It ends with its socket; one that hangs is not waited for.
        if let Some(mut running) = self.running.take() {
            let _ = running.child.kill();
            let _ = running.child.try_wait();
        }
    }
}
