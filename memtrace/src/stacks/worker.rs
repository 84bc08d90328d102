//! The stack worker: a process of its own that drains the STACKS ring and unwinds.
//!
//! Unwinding reads files of other programs, and those may never answer (a FUSE server that sleeps,
//! NFS without its server, an overlay over either). Nobody may wait for that, so it happens here:
//! the recorder is told of each reading before it begins, kills this process when one does not end
//! in time, and starts another that leaves such files alone. Nothing else is lost by that than
//! stacks.
//!
//! The recorder starts it as the hidden verb `stack-worker`, with a socket as standard input; see
//! [`super::messages`] for what they say to each other. It ends when the recorder does.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use anyhow::Context;
use memtrace_engine::input::Fact;
use memtrace_unwind::gate::{Gate, ReadObserver, Reading};
use memtrace_unwind::modules::OpenModule;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::sockopt::{set_socket_send_buffer_size, set_socket_send_buffer_size_force};
use rustix::process::{Resource, Signal};
use rustix::thread::{CapabilitySet, CapabilitySets, capabilities, set_capabilities};

use super::messages::{
    Batch, FromWorker, Incoming, MAX_FDS, ModuleLabel, OpenLabel, StackRow, Start, ToWorker, frame, send_with_fds,
};
use super::path_numbers::FORGET_SECONDS;
use super::stack_samples::StackSamples;
use crate::clock;
use crate::kernel::probe::stack_ring::StackRing;
use crate::own_process;
use crate::own_process::rights::{STACK_WORKER, cut_bounding_set};
use crate::own_process::syscalls::Filter;

/// Stacks unwound between two looks at the socket.
const STACKS_PER_TURN: usize = 64;
/// How long an unwound stack waits for others that go with it.
const GATHER: Duration = Duration::from_millis(50);
/// How long a stack waits in the ring at most: only the first ones of a process wake this one.
const WAIT: Duration = Duration::from_millis(100);
/// Bytes that wait in the socket for the recorder to take them.
const SEND_BUFFER_BYTES: usize = 2 << 20;
/// Private memory of the worker (RLIMIT_DATA), bytes. Its caches are bounded far below.
const MAX_PRIVATE_BYTES: u64 = 256 << 20;
/// Runs until the recorder has gone.
pub fn run() -> anyhow::Result<()> {
    confine();
    ignore_signals();
    let socket = Rc::new(UnixStream::from(rustix::stdio::stdin().try_clone_to_owned().context("no standard input")?));
    // So that a recorder that is busy for a moment does not keep this from draining the ring.
    // Beyond the system's limit with CAP_NET_ADMIN only, and as far as that limit without.
    if set_socket_send_buffer_size_force(&socket, SEND_BUFFER_BYTES).is_err() {
        let _ = set_socket_send_buffer_size(&socket, SEND_BUFFER_BYTES);
    }
    tell_of_panics(&socket);
    let ended = work(&socket);
    if let Err(error) = &ended {
        Announcer(socket).say(&FromWorker::Failed(format!("{error:#}")));
    }
    ended
}

fn work(socket: &Rc<UnixStream>) -> anyhow::Result<()> {
    let mut incoming = Incoming::default();
    let (start, ring) = receive_start(socket, &mut incoming)?;
    let mut ring = StackRing::open(ring).map_err(anyhow::Error::msg).context("failed to open the stacks ring")?;
    drop_capabilities();
    let gate = Gate::new(Box::new(Announcer(socket.clone())), start.refused.into(), start.rate_ppm);
    let mut samples = StackSamples::new(gate);
    start.execs.into_iter().for_each(|(process, boot_ns)| samples.exec(process, boot_ns));
    let mut skipped = 0;
    ring.drain(start.skip, |_| {
        skipped += 1;
        true
    });
    let begin = clock::cpu_time();
    let mut worker = Worker {
        socket: socket.clone(),
        incoming,
        ring,
        samples,
        begin,
        gathering: None,
        keep_files: Duration::ZERO,
        skipped,
        resident_bytes: 0,
        forgot: Instant::now(),
    };
    // The kernel's symbols took more than they keep.
    own_process::trim_memory();
    worker.send_batch(1)?;
    loop {
        if !worker.turn()? {
            return Ok(());
        }
    }
}

/// The recorder ends this process: signals that whole groups get (a service manager that stops the
/// recorder, a terminal that closes) are left to it, so that it still gets the last stacks.
fn ignore_signals() {
    let heard = Arc::new(AtomicBool::new(false));
    for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
        let _ = signal_hook::flag::register(signal.as_raw(), heard.clone());
    }
}

/// Standard error is nobody's: it would keep a terminal's or a pipe's other end open while this
/// process hangs.
fn tell_of_panics(socket: &UnixStream) {
    let Ok(socket) = socket.try_clone() else { return };
    std::panic::set_hook(Box::new(move |panic| {
        let _ = frame(&FromWorker::Failed(panic.to_string())).and_then(|bytes| send_with_fds(&socket, &bytes, &[]));
    }));
}

/// Best effort: a worker with more rights than it needs is better than none.
fn confine() {
    let _ = rustix::process::set_parent_process_death_signal(Some(Signal::KILL));
    // Rather this process than the recorder, but no sooner than others.
    let adjusted = std::fs::read_to_string("/proc/self/oom_score_adj").ok().and_then(|text| text.trim().parse().ok());
    let adjusted = adjusted.map_or(0, |adjusted: i32| adjusted.saturating_add(500).clamp(-500, 1000));
    let _ = std::fs::write("/proc/self/oom_score_adj", adjusted.to_string());
    for (resource, most) in [(Resource::Data, MAX_PRIVATE_BYTES), (Resource::Core, 0)] {
        own_process::lower_limit(resource, most);
    }
}

/// Keeps [`STACK_WORKER`] only, and no system call that nothing here needs.
fn drop_capabilities() {
    let Ok(held) = capabilities(None) else { return };
    cut_bounding_set(STACK_WORKER);
    let kept = held.permitted & STACK_WORKER;
    let _ = set_capabilities(
        None,
        CapabilitySets { effective: kept, permitted: kept, inheritable: CapabilitySet::empty() },
    );
    let _ = rustix::thread::set_no_new_privs(true);
    // The first worker is started before the recorder has a filter to inherit.
    let _ = Filter::Agent.apply();
}

fn receive_start(socket: &Rc<UnixStream>, incoming: &mut Incoming) -> anyhow::Result<(Start, OwnedFd)> {
    loop {
        if let Some(message) = incoming.next_message()? {
            let ToWorker::Start(start) = message else { anyhow::bail!("the first message is no start") };
            return Ok((start, incoming.next_fd().context("no descriptor of the ring came")?));
        }
        wait(&[socket.as_fd()], None)?;
        match incoming.read(socket) {
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => return Err(error.into()),
            _ => {}
        }
    }
}

/// Waits until one of the descriptors can be read, `time` at most.
fn wait(fds: &[rustix::fd::BorrowedFd<'_>], time: Option<Duration>) -> io::Result<()> {
    let mut fds: Vec<PollFd<'_>> = fds.iter().map(|fd| PollFd::from_borrowed_fd(*fd, PollFlags::IN)).collect();
    let time = time.map(Timespec::try_from).transpose().map_err(io::Error::other)?;
    match poll(&mut fds, time.as_ref()) {
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Tells the recorder what is read.
#[derive(Debug)]
struct Announcer(Rc<UnixStream>);

impl Announcer {
    fn say(&self, message: &FromWorker) {
        // If the recorder has gone, the next look at the socket says so.
        let _ = frame(message).and_then(|bytes| send_with_fds(&self.0, &bytes, &[]));
    }
}

impl ReadObserver for Announcer {
    fn begin(&mut self, reading: &Reading) {
        self.say(&FromWorker::Begin(reading.into()));
    }

    fn end(&mut self) {
        self.say(&FromWorker::End);
    }

    fn late(&mut self, reading: &Reading, late: usize) {
        self.say(&FromWorker::Late(reading.into(), late));
    }
}

struct Worker {
    socket: Rc<UnixStream>,
    incoming: Incoming,
    ring: StackRing,
    samples: StackSamples,
    /// CPU time when unwinding began: what the start took is not part of the budget.
    begin: Duration,
    /// Since when stacks wait to be sent.
    gathering: Option<Instant>,
    keep_files: Duration,
    /// Records that were taken from the ring unread.
    skipped: u64,
    /// Resident memory when an answer was given last, bytes.
    resident_bytes: u64,
    /// When stacks that are not seen any more were forgotten last.
    forgot: Instant,
}

impl Worker {
    /// Waits for something to do and does it. False when the recorder has gone.
    fn turn(&mut self) -> io::Result<bool> {
        let time = self.gathering.map_or(WAIT, |since| GATHER.saturating_sub(since.elapsed()));
        wait(&[self.ring.as_fd(), self.socket.as_fd()], Some(time))?;
        // What happened to a process comes before its stacks.
        if !self.receive()? {
            return Ok(false);
        }
        self.drain(STACKS_PER_TURN);
        let due = self.gathering.is_some_and(|since| since.elapsed() >= GATHER);
        if due || self.samples.is_full() {
            self.send_batch(0)?;
        }
        Ok(true)
    }

    fn drain(&mut self, most: usize) -> bool {
        let Self { ring, samples, .. } = self;
        let more = ring.drain(most, |record| {
            samples.push(record);
            !samples.is_full()
        });
        if !samples.is_empty() {
            self.gathering.get_or_insert_with(Instant::now);
        }
        more
    }

    /// Takes what the recorder has sent.
    fn receive(&mut self) -> io::Result<bool> {
        loop {
            while let Some(message) = self.incoming.next_message()? {
                self.take(message)?;
            }
            match self.incoming.read(&self.socket) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(true),
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(false),
                Err(error) => return Err(error),
            }
        }
    }

    fn take(&mut self, message: ToWorker) -> io::Result<()> {
        match message {
            ToWorker::Start(_) => {}
            ToWorker::Refuse(refused) => self.samples.refuse(refused.into()),
            ToWorker::Exec(process, boot_ns) => self.samples.exec(process, boot_ns),
            ToWorker::Exit(process) => self.samples.exit(process),
            ToWorker::Prefetch(process) => self.samples.prefetch(process),
            ToWorker::Answer { number, drain, keep_files_ms } => {
                self.keep_files = Duration::from_millis(keep_files_ms);
                while drain && self.drain(STACKS_PER_TURN) {
                    if self.samples.is_full() {
                        self.send_batch(0)?;
                    }
                }
                self.samples.tick(self.keep_files);
                self.forget_unused();
                self.send_batch(number)?;
            }
            ToWorker::Modules { number, wanted } => self.send_modules(number, &wanted)?,
        }
        Ok(())
    }

    /// Forgets stacks that are not seen any more, and gives their memory back, when it is time.
    fn forget_unused(&mut self) {
        if self.forgot.elapsed() >= Duration::from_secs(FORGET_SECONDS.into()) {
            self.forgot = Instant::now();
            self.samples.forget_unused();
            self.incoming.give_memory_back();
            own_process::trim_memory();
        }
    }

    /// Sends what waits, in parts that are small enough; the last one has the number.
    fn send_batch(&mut self, number: u64) -> io::Result<()> {
        self.gathering = None;
        loop {
            let part = self.part();
            let last = self.samples.is_empty();
            self.send_part(if last { number } else { 0 }, part)?;
            if last {
                return Ok(());
            }
        }
    }

    fn part(&mut self) -> (Vec<Fact>, Vec<StackRow>) {
        let (mut facts, mut stacks) = (Vec::new(), Vec::new());
        for fact in self.samples.take() {
            match fact {
                Fact::Stack(stack) => stacks.push(stack.into()),
                fact => facts.push(fact),
            }
        }
        (facts, stacks)
    }

    fn send_part(&mut self, number: u64, (facts, stacks): (Vec<Fact>, Vec<StackRow>)) -> io::Result<()> {
        let mut counts = self.samples.counts();
        counts.without_frames = self.skipped;
        let spent = clock::cpu_time().saturating_sub(self.begin);
        counts.spent_ns = u64::try_from(spent.as_nanos()).unwrap_or(u64::MAX);
        counts.cpu_ns = clock::process_cpu_ns();
        // Once a second is enough for a reading of /proc.
        if number != 0 {
            self.resident_bytes = own_process::resident_bytes().unwrap_or(0);
        }
        counts.resident_bytes = self.resident_bytes;
        let batch = Batch { number, facts, stacks, copy_bytes: self.samples.take_copy_requests(), counts };
        self.send(&FromWorker::Batch(Box::new(batch)), &[])
    }

    fn send_modules(&mut self, number: u64, wanted: &[ModuleLabel]) -> io::Result<()> {
        let open = self.samples.open_modules();
        let label = |module: &OpenModule| OpenLabel {
            path: module.path.to_string(),
            build_id: module.build_id.as_deref().map(str::to_owned),
            debug_link: module.debug_link.clone(),
        };
        let is_wanted =
            |open: &OpenLabel| wanted.iter().any(|(path, build_id)| *path == open.path && *build_id == open.build_id);
        let open: Vec<_> =
            open.iter().map(|module| (label(module), &module.file)).filter(|(label, _)| is_wanted(label)).collect();
        for part in open.chunks(MAX_FDS) {
            let fds: Vec<_> = part.iter().map(|(_, file)| file.as_fd()).collect();
            let open = part.iter().map(|(label, _)| label.clone()).collect();
            self.send(&FromWorker::Modules { number, open, last: false }, &fds)?;
        }
        self.send(&FromWorker::Modules { number, open: Vec::new(), last: true }, &[])
    }

    fn send(&self, message: &FromWorker, fds: &[rustix::fd::BorrowedFd<'_>]) -> io::Result<()> {
        send_with_fds(&self.socket, &frame(message)?, fds)
    }
}
