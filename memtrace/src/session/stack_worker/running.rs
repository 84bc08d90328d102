//! A stack worker that runs: its process, the socket to it, and what it owes.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use memtrace_unwind::gate::Reading;
use memtrace_unwind::proc_dir::wants_to_run;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{SendFlags, send};
use tokio::io::Interest;
use tracing::warn;

use super::ModuleFile;
use super::batches::Batches;
use crate::stacks::messages::{FromWorker, Incoming, ModuleLabel, StackCounts, Start, ToWorker, frame, send_with_fds};

/// The hidden verb that runs the worker.
const VERB: &str = "stack-worker";
/// Time for one reading of somebody's file, while the worker waits for it.
const READING_LIMIT: Duration = Duration::from_secs(2);
/// Time for an answer, and for a reading while the worker runs or wants to, or waits for a disk: on
/// a machine that is overloaded those are slow, and hang on nobody.
pub(super) const ANSWER_LIMIT: Duration = Duration::from_secs(10);
/// Bytes that wait to be sent to the worker; what is beyond is not said.
const MAX_OUTGOING_BYTES: usize = 512 << 10;
/// Bytes of the names of modules that are asked for in one message.
const MAX_ASKED_BYTES: usize = 64 << 10;
/// Readings that a worker may have given up: each has a thread.
const MAX_LATE: usize = 128;
/// Files of modules that a worker may send.
const MAX_FILES: usize = 1024;

/// See the module.
pub(super) struct Running {
    pub(super) child: Child,
    /// Number of the worker.
    pub(super) number: u64,
    pub(super) started: Instant,
    pub(super) socket: tokio::net::UnixStream,
    incoming: Incoming,
    /// Cap: [`MAX_OUTGOING_BYTES`].
    outgoing: VecDeque<u8>,
    /// What it reads, and since when.
    pub(super) reading: Option<(Reading, Instant)>,
    /// Readings that it has given up, and that nobody has taken note of. Cap: [`MAX_LATE`].
    pub(super) late: Vec<Reading>,
    /// How many that were given up have not ended.
    given_up: usize,
    /// The question that it has not answered, and when it was asked.
    pub(super) asked: Option<(u64, Instant)>,
    pub(super) counts: StackCounts,
    modules: Option<Asked>,
}

/// Modules that were asked for.
struct Asked {
    number: u64,
    /// As far as they have come. Cap: [`MAX_FILES`].
    files: Vec<ModuleFile>,
    /// Messages that are not answered.
    owed: usize,
}

impl Running {
    /// Starts a worker on the STACKS ring. Must run inside a tokio runtime.
    pub(super) fn start(number: u64, ring: BorrowedFd<'_>, start: Start) -> io::Result<Self> {
        let (mine, other) = UnixStream::pair()?;
        let mut command = Command::new("/proc/self/exe");
        // It says what is wrong over the socket: one that hangs must not keep a terminal or a pipe.
        command.arg0("memtrace").arg(VERB).stdin(OwnedFd::from(other)).stdout(Stdio::null()).stderr(Stdio::null());
        // A group of its own: Ctrl-C on a terminal is for the recorder, which ends the worker.
        let child = command.process_group(0).spawn()?;
        send_with_fds(&mine, &frame(&ToWorker::Start(start))?, &[ring.as_fd()])?;
        mine.set_nonblocking(true)?;
        Ok(Self {
            child,
            number,
            started: Instant::now(),
            socket: tokio::net::UnixStream::from_std(mine)?,
            incoming: Incoming::default(),
            outgoing: VecDeque::new(),
            reading: None,
            late: Vec::new(),
            given_up: 0,
            asked: None,
            counts: StackCounts::default(),
            modules: None,
        })
    }

    /// Whether it reads a file that does not answer. Behind batches that nobody has taken there may
    /// be word of its end.
    pub(super) fn hangs(&self, batches: &Batches) -> bool {
        let Some((reading, since)) = self.reading.filter(|_| !batches.is_full()) else { return false };
        let is_disk = reading.place.device().is_some_and(|(major, _)| major != 0);
        let elapsed = since.elapsed();
        elapsed > ANSWER_LIMIT
            || (elapsed > READING_LIMIT && !is_disk && !wants_to_run(format!("/proc/{}", self.child.id())))
    }

    /// Whether more of its readings have not ended than it may have.
    pub(super) fn is_tangled(&self) -> bool {
        self.given_up >= MAX_LATE
    }

    /// Takes what it has said, without waiting.
    pub(super) fn receive(&mut self, batches: &mut Batches) -> io::Result<()> {
        while !batches.is_full() {
            while let Some((message, bytes)) = self.incoming.next_sized()? {
                self.take(message, bytes, batches);
            }
            let Self { socket, incoming, .. } = self;
            // The runtime learns that something came only when it runs; while this waits it does
            // not. So the socket is asked first, and the runtime once the socket is empty.
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

    fn take(&mut self, message: FromWorker, bytes: usize, batches: &mut Batches) {
        match message {
            FromWorker::Begin(reading) => self.reading = Some((reading.into(), Instant::now())),
            FromWorker::End => self.reading = None,
            FromWorker::Late(reading, late) => {
                self.reading = None;
                self.given_up = late;
                // One that it has no room for is refused when it is late again.
                if self.late.len() < MAX_LATE {
                    self.late.push(reading.into());
                }
            }
            FromWorker::Batch(batch) => {
                self.counts = batch.counts;
                if self.asked.is_some_and(|(number, _)| number == batch.number) {
                    self.asked = None;
                }
                batches.push(self.number, *batch, bytes);
            }
            FromWorker::Modules { number, open, last } => {
                let mut asked = self.modules.as_mut().filter(|asked| asked.number == number);
                for label in open {
                    // Also of an answer that nobody waits for any more.
                    let Some(file) = self.incoming.next_fd() else { break };
                    if let Some(asked) = asked.as_mut().filter(|asked| asked.files.len() < MAX_FILES) {
                        asked.files.push(ModuleFile { label, file });
                    }
                }
                if let Some(asked) = asked.filter(|_| last) {
                    asked.owed = asked.owed.saturating_sub(1);
                }
            }
            FromWorker::Failed(reason) => warn!("the stack worker failed: {reason:.300?}"),
        }
    }

    pub(super) fn give_memory_back(&mut self) {
        self.incoming.give_memory_back();
        self.outgoing.shrink_to_fit();
    }

    /// False if there is no room for it.
    pub(super) fn queue(&mut self, message: &ToWorker) -> bool {
        let Ok(bytes) = frame(message) else { return false };
        let fits = self.outgoing.len().saturating_add(bytes.len()) <= MAX_OUTGOING_BYTES;
        if fits {
            self.outgoing.extend(bytes);
        }
        fits
    }

    /// Sends what is queued, as far as that does not wait.
    pub(super) fn flush(&mut self) {
        while !self.outgoing.is_empty() {
            let (front, _) = self.outgoing.as_slices();
            // An error shows when the socket is read.
            let Ok(sent) = send(&self.socket, front, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) else { return };
            self.outgoing.drain(..sent);
        }
    }

    /// Asks for the files of modules, in messages that find room.
    pub(super) fn ask_for_modules(&mut self, number: u64, wanted: Vec<ModuleLabel>) {
        let (mut owed, mut part, mut bytes) = (0_usize, Vec::new(), 0_usize);
        let mut ask = |running: &mut Self, wanted| {
            owed = owed.saturating_add(usize::from(running.queue(&ToWorker::Modules { number, wanted })));
        };
        for label in wanted {
            bytes = bytes.saturating_add(label.0.len());
            part.push(label);
            if bytes >= MAX_ASKED_BYTES {
                ask(self, std::mem::take(&mut part));
                bytes = 0;
            }
        }
        if !part.is_empty() {
            ask(self, part);
        }
        self.modules = Some(Asked { number, files: Vec::new(), owed });
        self.flush();
    }

    /// Whether there are modules that were asked for and have not come.
    pub(super) fn owes_modules(&self) -> bool {
        self.modules.as_ref().is_some_and(|asked| asked.owed > 0)
    }

    /// The files that have come.
    pub(super) fn take_modules(&mut self) -> Vec<ModuleFile> {
        self.modules.take().map(|asked| asked.files).unwrap_or_default()
    }

    /// Waits until it has said something, for `time` at most.
    pub(super) fn wait(&self, time: Duration) {
        let time = Timespec::try_from(time).ok();
        // Interrupted or not, the next look at the socket tells.
        let _ = poll(&mut [PollFd::new(&self.socket, PollFlags::IN)], time.as_ref());
    }
}
