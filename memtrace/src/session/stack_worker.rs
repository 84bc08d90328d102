//! The stack worker as the recorder sees it: started, listened to, and replaced when it hangs or dies.
//!
//! Nothing here waits for the worker but what says so, and that has a deadline. A worker
//! that announced a reading and does not end it within [`READING_LIMIT`] hangs on somebody's file: it
//! is killed, and the next one leaves that process, device and, the second time, user alone for a while
//! ([`refusals`]). A worker
//! that hangs in the kernel dies only when its file system lets it. Up to [`MAX_STUCK`] of those are
//! waited for; with more there are no stacks until one is gone.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use memtrace_unwind::gate::Reading;
use memtrace_unwind::modules::OpenModule;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{SendFlags, send};
use tokio::io::Interest;
use tracing::{info, warn};

use crate::stacks::messages::{
    Batch, FromWorker, Incoming, ModuleLabel, OpenLabel, StackCounts, ToWorker, frame, send_with_fds,
};

mod refusals;

use refusals::Refusals;

/// The hidden verb that runs the worker.
const VERB: &str = "stack-worker";
/// Time for one reading of somebody's file, while the worker waits for it.
const READING_LIMIT: Duration = Duration::from_secs(2);
/// Time for an answer, and for a reading while the worker runs or wants to: on a machine that is
/// overloaded it is slow, and hangs on nobody.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);
/// Time until the first worker is ready: it reads the kernel's symbols.
const START_LIMIT: Duration = Duration::from_secs(10);
/// Workers that were killed and are not gone.
const MAX_STUCK: usize = 4;
/// First pause before a worker that ended by itself is replaced; each one doubles it, up to 64 times.
const PAUSE: Duration = Duration::from_secs(1);
/// A worker that has run for this long was started rightly: the pause begins anew.
const CALM: Duration = Duration::from_mins(1);
/// Bytes that wait to be sent to the worker; what is beyond is not said.
const MAX_OUTGOING_BYTES: usize = 256 << 10;
/// Batches that wait to be taken.
const MAX_BATCHES: usize = 64;

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
}

/// See the module.
pub(super) struct StackWorker {
    /// The STACKS ring.
    ring: OwnedFd,
    rate_ppm: u64,
    running: Option<Running>,
    /// Cap: [`MAX_STUCK`].
    stuck: Vec<Child>,
    refusals: Refusals,
    restarts: u64,
    /// When the next worker may start, and the pause before it.
    next: Option<Instant>,
    pause: Duration,
    /// Totals of the workers before.
    before: StackCounts,
    /// Another worker has begun since this was last asked.
    renewed: bool,
    number: u64,
}

struct Running {
    child: Child,
    started: Instant,
    socket: tokio::net::UnixStream,
    incoming: Incoming,
    /// Cap: [`MAX_OUTGOING_BYTES`].
    outgoing: VecDeque<u8>,
    /// What it reads, and since when.
    reading: Option<(Reading, Instant)>,
    /// The question that it has not answered, and when it was asked.
    asked: Option<(u64, Instant)>,
    counts: StackCounts,
    /// Cap: [`MAX_BATCHES`]; while it is reached nothing more is taken from the socket.
    batches: VecDeque<Batch>,
    /// Modules that were asked for, as far as they have come, and whether that is all.
    modules: Option<(Vec<ModuleFile>, bool)>,
}

impl StackWorker {
    /// Starts a worker on the ring and waits until it is ready. `rate_ppm` is what reading may take,
    /// in parts per million of one CPU. Must run inside a tokio runtime.
    pub(super) fn start(ring: BorrowedFd<'_>, rate_ppm: u64) -> anyhow::Result<Self> {
        let ring = ring.try_clone_to_owned().context("failed to copy the descriptor of the stacks ring")?;
        let mut worker = Self {
            ring,
            rate_ppm,
            running: None,
            stuck: Vec::new(),
            refusals: Refusals::default(),
            restarts: 0,
            next: None,
            pause: PAUSE,
            before: StackCounts::default(),
            renewed: false,
            number: 0,
        };
        worker.running = Some(worker.spawn().context("failed to start the stack worker")?);
        worker.wait_until(START_LIMIT, |running| !running.batches.is_empty());
        Ok(worker)
    }

    fn spawn(&self) -> io::Result<Running> {
        let (mine, other) = UnixStream::pair()?;
        let mut command = Command::new("/proc/self/exe");
        command.arg0("memtrace").arg(VERB).stdin(OwnedFd::from(other)).stdout(Stdio::null());
        // A group of its own: Ctrl-C on a terminal is for the recorder, which ends the worker.
        let child = command.process_group(0).spawn()?;
        let start = ToWorker::Start { rate_ppm: self.rate_ppm, refused: (&self.refusals.list()).into() };
        send_with_fds(&mine, &frame(&start)?, &[self.ring.as_fd()])?;
        mine.set_nonblocking(true)?;
        Ok(Running {
            child,
            started: Instant::now(),
            socket: tokio::net::UnixStream::from_std(mine)?,
            incoming: Incoming::default(),
            outgoing: VecDeque::new(),
            reading: None,
            asked: None,
            counts: StackCounts::default(),
            batches: VecDeque::new(),
            modules: None,
        })
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
        if let Err(error) = running.receive() {
            warn!("the stack worker ended ({error}); another one is started");
            self.replace(Instant::now());
        }
    }

    /// The next batch of stacks.
    pub(super) fn next_batch(&mut self) -> Option<Batch> {
        self.running.as_mut()?.batches.pop_front()
    }

    /// Whether a batch waits.
    pub(super) fn has_batch(&self) -> bool {
        self.running.as_ref().is_some_and(|running| !running.batches.is_empty())
    }

    /// Whether another worker has begun since this was last asked: its numbers begin anew.
    pub(super) fn take_renewed(&mut self) -> bool {
        std::mem::take(&mut self.renewed)
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

    /// Asks for an answer, unless one is owed. Call it about once a second.
    pub(super) fn ask(&mut self, keep_files: Duration) {
        if self.running.as_ref().is_some_and(|running| running.asked.is_none()) {
            self.ask_for(false, keep_files);
        }
    }

    fn ask_for(&mut self, drain: bool, keep_files: Duration) {
        self.number = self.number.wrapping_add(1).max(2);
        let keep_files_ms = u64::try_from(keep_files.as_millis()).unwrap_or(u64::MAX);
        let number = self.number;
        self.say(&ToWorker::Answer { number, drain, keep_files_ms });
        if let Some(running) = &mut self.running {
            running.asked = Some((number, Instant::now()));
        }
    }

    /// Replaces a worker that hangs, and starts one if there is none. Call it with each tick.
    pub(super) fn check(&mut self, now: Instant) {
        self.stuck.retain_mut(|child| matches!(child.try_wait(), Ok(None)));
        // What it has said by now counts: this process may have been busy elsewhere.
        self.receive();
        if let Some(running) = &mut self.running {
            running.flush();
            let over = |since: Instant, limit| now.saturating_duration_since(since) > limit;
            let hangs = running.reading.filter(|_| running.hangs());
            if over(running.started, CALM) {
                self.pause = PAUSE;
            }
            let silent = running.asked.is_some_and(|(_, since)| over(since, ANSWER_LIMIT));
            if let Some((reading, _)) = hangs {
                self.refusals.add(&reading, now);
                self.replace(now);
                // The next one leaves that file alone.
                self.next = None;
            } else if silent && running.reading.is_none() {
                warn!("the stack worker does not answer; another one is started");
                self.replace(now);
            }
        }
        if self.refusals.expire(now) {
            let refused = (&self.refusals.list()).into();
            self.say(&ToWorker::Refuse(refused));
        }
        if self.running.is_none() && self.stuck.len() < MAX_STUCK && self.next.is_none_or(|next| now >= next) {
            self.next = Some(now.checked_add(self.pause).unwrap_or(now));
            self.pause = self.pause.saturating_mul(2).min(PAUSE.saturating_mul(64));
            match self.spawn() {
                Ok(running) => {
                    self.running = Some(running);
                    self.renewed = true;
                    self.ask(Duration::ZERO);
                    info!("another stack worker runs");
                }
                Err(error) => warn!("failed to start a stack worker: {error}"),
            }
        }
    }

    /// Kills the worker that runs.
    fn replace(&mut self, now: Instant) {
        let Some(mut running) = self.running.take() else { return };
        self.before = running.counts.plus(&self.before);
        self.restarts = self.restarts.saturating_add(1);
        self.next = Some(now.checked_add(self.pause).unwrap_or(now));
        let _ = running.child.kill();
        if matches!(running.child.try_wait(), Ok(None)) {
            self.stuck.push(running.child);
        }
    }

    /// Asks for everything that the ring holds; [`StackWorker::await_answer`] waits for it.
    pub(super) fn ask_for_all(&mut self, keep_files: Duration) {
        self.ask_for(true, keep_files);
    }

    /// Waits until the last question is answered or batches are to be taken, `limit` at most. True if
    /// there is nothing more to wait for.
    pub(super) fn await_answer(&mut self, limit: Duration) -> bool {
        self.wait_until(limit, |running| running.asked.is_none());
        self.running.as_ref().is_none_or(|running| running.asked.is_none() || running.hangs())
    }

    /// Asks for the files of modules.
    pub(super) fn ask_for_modules(&mut self, wanted: Vec<ModuleLabel>) {
        if let Some(running) = &mut self.running {
            let said = running.queue(&ToWorker::Modules(wanted));
            running.modules = said.then(|| (Vec::new(), false));
            running.flush();
        }
    }

    /// The files that were asked for, once they are all there; none if the worker has gone. `None`:
    /// not yet.
    pub(super) fn take_modules(&mut self) -> Option<Vec<ModuleFile>> {
        let Some(running) = &mut self.running else { return Some(Vec::new()) };
        match running.modules.take() {
            Some((files, true)) => Some(files),
            None => Some(Vec::new()),
            Some(waiting) => {
                running.modules = Some(waiting);
                None
            }
        }
    }

    /// The files of these modules, as far as they come within `limit`.
    pub(super) fn modules(&mut self, wanted: Vec<ModuleLabel>, limit: Duration) -> Vec<ModuleFile> {
        self.ask_for_modules(wanted);
        self.wait_until(limit, |running| running.modules.as_ref().is_none_or(|(_, all)| *all));
        let modules = self.running.as_mut().and_then(|running| running.modules.take());
        modules.map(|(files, _)| files).unwrap_or_default()
    }

    /// Totals of all workers.
    pub(super) fn counts(&self) -> StackCounts {
        let running = self.running.as_ref().map(|running| running.counts).unwrap_or_default();
        running.plus(&self.before)
    }

    /// How the worker is doing.
    pub(super) fn health(&self) -> WorkerHealth {
        let stuck = u64::try_from(self.stuck.len()).unwrap_or(u64::MAX);
        WorkerHealth { restarts: self.restarts, stuck, running: self.running.is_some() }
    }

    /// Waits for the worker until `done` or `limit`.
    fn wait_until(&mut self, limit: Duration, done: impl Fn(&Running) -> bool) {
        let until = Instant::now().checked_add(limit);
        loop {
            self.receive();
            let left = until.map_or(Duration::ZERO, |until| until.saturating_duration_since(Instant::now()));
            let Some(running) = self.running.as_mut().filter(|running| !done(running)) else { return };
            if left.is_zero() || running.hangs() || running.batches.len() >= MAX_BATCHES {
                return;
            }
            running.flush();
            let time = Timespec::try_from(left.min(Duration::from_millis(20))).ok();
            // Interrupted or not, the next look at the socket tells.
            let _ = poll(&mut [PollFd::new(&running.socket, PollFlags::IN)], time.as_ref());
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

/// Whether a process runs, or would if there were a CPU for it: state `R` in /proc/PID/stat. That file
/// waits for nobody (fs/proc/array.c, `do_task_stat` takes no lock of the address space).
fn wants_to_run(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, fields)| fields.starts_with('R'))
}

impl Running {
    /// Whether it reads a file that does not answer.
    fn hangs(&self) -> bool {
        // Behind batches that nobody has taken there may be word of its end.
        let Some((_, since)) = self.reading.filter(|_| self.batches.len() < MAX_BATCHES) else { return false };
        let elapsed = since.elapsed();
        elapsed > ANSWER_LIMIT || (elapsed > READING_LIMIT && !wants_to_run(self.child.id()))
    }

    fn receive(&mut self) -> io::Result<()> {
        while self.batches.len() < MAX_BATCHES {
            while let Some(message) = self.incoming.next_message()? {
                self.take(message);
            }
            let Self { socket, incoming, .. } = self;
            // The runtime learns that something came only when it runs; while this waits it does not.
            // So the socket is asked first, and the runtime once the socket is empty.
            let read = match incoming.read(socket) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    socket.try_io(Interest::READABLE, || incoming.read(socket))
                }
                read => read,
            };
            match read {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn take(&mut self, message: FromWorker) {
        match message {
            FromWorker::Begin { process, user, device } => {
                self.reading = Some((Reading { process, user, device }, Instant::now()));
            }
            FromWorker::End => self.reading = None,
            FromWorker::Batch(batch) => {
                self.counts = batch.counts;
                if self.asked.is_some_and(|(number, _)| number == batch.number) {
                    self.asked = None;
                }
                self.batches.push_back(*batch);
            }
            FromWorker::Modules { open, last } => {
                let Some((files, all)) = &mut self.modules else { return };
                for label in open {
                    let Some(file) = self.incoming.next_fd() else { break };
                    files.push(ModuleFile { label, file });
                }
                *all = last;
            }
        }
    }

    /// False if there is no room for it.
    fn queue(&mut self, message: &ToWorker) -> bool {
        let Ok(bytes) = frame(message) else { return false };
        let fits = self.outgoing.len().saturating_add(bytes.len()) <= MAX_OUTGOING_BYTES;
        if fits {
            self.outgoing.extend(bytes);
        }
        fits
    }

    fn flush(&mut self) {
        while !self.outgoing.is_empty() {
            let (front, _) = self.outgoing.as_slices();
            // An error shows when the socket is read.
            let Ok(sent) = send(&self.socket, front, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) else { return };
            self.outgoing.drain(..sent);
        }
    }
}
