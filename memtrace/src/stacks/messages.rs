//! What the recorder and the stack worker say to each other, and how: frames of JSON over a socket,
//! with descriptors beside them.
//!
//! A frame is its length (4 bytes, little-endian) and one message as JSON. [`Incoming`] puts frames
//! together from whatever arrives and bounds them, so that neither side can make the other grow.

use std::collections::VecDeque;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use memtrace_engine::input::{Fact, StackFound};
use memtrace_incident::Cause;
use memtrace_unwind::gate::{Place, ProcessKey, Reading, Refused};
use rustix::cmsg_space;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// Largest message, bytes of JSON.
pub const MAX_MESSAGE_BYTES: usize = 8 << 20;
/// Bytes read at once.
const READ_BYTES: usize = 64 << 10;
/// Descriptors sent with one message; the kernel takes at most 253 (SCM_MAX_FD).
pub const MAX_FDS: usize = 128;
/// Descriptors that wait for the message that tells what they are.
const MAX_WAITING_FDS: usize = 1024;

/// A module as incidents name it: path and build id (lower-case hex).
pub type ModuleLabel = (String, Option<String>);

/// A module that is open.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpenLabel {
    /// Path as the process had it.
    pub path: String,
    /// Build id, lower-case hex.
    pub build_id: Option<String>,
    /// Name of its debug file, see [`memtrace_unwind::elf::ElfHeaders::debug_link`].
    pub debug_link: Option<String>,
}

/// From the recorder to the worker.
#[derive(Debug, Serialize, Deserialize)]
pub enum ToWorker {
    /// The first message; the descriptor of the STACKS ring comes with it.
    Start(Start),
    /// What is left alone from now on, in place of what was.
    Refuse(RefusedList),
    /// The process started another program, at this time (boot clock, nanoseconds).
    Exec(ProcessKey, u64),
    /// The process ended.
    Exit(ProcessKey),
    /// The process is about to be out of memory: read its mappings while it lives.
    Prefetch(ProcessKey),
    /// Asks for a [`Batch`] that has this number. With `drain` everything in the ring comes first.
    Answer {
        /// Its number, not 0.
        number: u64,
        /// Whether to drain the ring before.
        drain: bool,
        /// How long files stay open that no process maps, milliseconds.
        keep_files_ms: u64,
    },
    /// Asks for the descriptors of these modules.
    Modules {
        /// Number of the question.
        number: u64,
        /// What is asked for.
        wanted: Vec<ModuleLabel>,
    },
}

/// What a worker begins with.
#[derive(Debug, Serialize, Deserialize)]
pub struct Start {
    /// CPU time for reading files, parts per million of one CPU.
    pub rate_ppm: u64,
    /// What a worker before hung on.
    pub refused: RefusedList,
    /// Records that are taken from the ring unread: a worker before ended by itself, and the next
    /// record may be why.
    pub skip: usize,
    /// Processes that replaced their program lately, as in [`ToWorker::Exec`].
    pub execs: Vec<(ProcessKey, u64)>,
}

/// From the worker to the recorder.
#[derive(Debug, Serialize, Deserialize)]
pub enum FromWorker {
    /// A reading of somebody's file begins, and may never end.
    Begin(ReadingRow),
    /// The reading has ended.
    End,
    /// The reading was given up, and how many that were have not ended.
    Late(ReadingRow, usize),
    /// Stacks, and what they cost.
    Batch(Box<Batch>),
    /// Modules that are open; as many descriptors come with it. At most [`MAX_FDS`].
    Modules {
        /// Number of the question.
        number: u64,
        /// What they are.
        open: Vec<OpenLabel>,
        /// No more come.
        last: bool,
    },
    /// Why the worker ends.
    Failed(String),
}

/// A [`Reading`]: process, user, device number of the file, and whether it is found by its path.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct ReadingRow(ProcessKey, Option<u32>, Option<(u32, u32)>, bool);

impl From<&Reading> for ReadingRow {
    fn from(reading: &Reading) -> Self {
        Self(reading.process, reading.user, reading.place.device(), reading.place == Place::Path)
    }
}

impl From<ReadingRow> for Reading {
    fn from(ReadingRow(process, user, device, by_path): ReadingRow) -> Self {
        let place = match (device, by_path) {
            (Some(device), _) => Place::Device(device),
            (None, true) => Place::Path,
            (None, false) => Place::Proc,
        };
        Self { process, user, place }
    }
}

/// [`Refused`] as lists.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct RefusedList {
    processes: Vec<ProcessKey>,
    devices: Vec<(u32, u32)>,
    users: Vec<u32>,
    strangers: bool,
}

impl From<&Refused> for RefusedList {
    fn from(refused: &Refused) -> Self {
        Self {
            processes: refused.processes.iter().copied().collect(),
            devices: refused.devices.iter().copied().collect(),
            users: refused.users.iter().copied().collect(),
            strangers: refused.strangers,
        }
    }
}

impl From<RefusedList> for Refused {
    fn from(list: RefusedList) -> Self {
        Self {
            processes: list.processes.into_iter().collect(),
            devices: list.devices.into_iter().collect(),
            users: list.users.into_iter().collect(),
            strangers: list.strangers,
        }
    }
}

/// Stacks that were unwound, as facts, and totals of this worker since its start.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Batch {
    /// The number of the [`ToWorker::Answer`] that this is for; 0 if it was not asked for.
    pub number: u64,
    /// Modules, paths, and stacks of the kernel. Modules and paths are numbered anew by each
    /// worker.
    pub facts: Vec<Fact>,
    /// Stacks of processes, which refer to these paths.
    pub stacks: Vec<StackRow>,
    /// Processes whose stacks are to be copied deeper from now on: process id and bytes.
    pub copy_bytes: Vec<(u32, u32)>,
    /// Totals.
    pub counts: StackCounts,
}

/// A [`StackFound`] without the names of its fields, of which there are many: a list in JSON.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub struct StackRow(StackIdentity, Cause, [u64; 3], Option<u64>, u32);

/// Time, process id, thread id, start, thread name, address space, cgroup.
type StackIdentity = (u64, u32, u32, u64, String, u64, u64);

impl From<StackFound> for StackRow {
    fn from(stack: StackFound) -> Self {
        let identity =
            (stack.boot_ns, stack.pid, stack.tid, stack.start_boot_ns, stack.comm, stack.mm_id, stack.cgroup_id);
        let bytes = [stack.weight_bytes, stack.grown_bytes, stack.size_bytes];
        Self(identity, stack.cause, bytes, stack.address, stack.path)
    }
}

impl From<StackRow> for StackFound {
    fn from(StackRow(identity, cause, bytes, address, path): StackRow) -> Self {
        let (boot_ns, pid, tid, start_boot_ns, comm, mm_id, cgroup_id) = identity;
        let [weight_bytes, grown_bytes, size_bytes] = bytes;
        Self {
            boot_ns,
            pid,
            tid,
            start_boot_ns,
            comm,
            mm_id,
            cgroup_id,
            cause,
            weight_bytes,
            grown_bytes,
            address,
            size_bytes,
            path,
        }
    }
}

/// Totals of one worker since its start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StackCounts {
    /// Stacks unwound.
    pub unwound: u64,
    /// CPU time of the thread that unwinds, nanoseconds: what sampling is adjusted to.
    pub spent_ns: u64,
    /// CPU time of all threads, nanoseconds.
    pub cpu_ns: u64,
    /// Resident memory, bytes: of now, not a total.
    pub resident_bytes: u64,
    /// Readings that were given up and have not ended: of now, not a total.
    pub readings_late: u64,
    /// Samples whose record was skipped, or whose path is not known.
    pub without_frames: u64,
    /// Records that could not be decoded.
    pub bad_records: u64,
    /// Processes evicted from the cache.
    pub processes_forgotten: u64,
    /// Mappings beyond the cap.
    pub mappings_left_out: u64,
    /// Modules evicted.
    pub modules_forgotten: u64,
    /// Files closed for want of room.
    pub modules_closed_early: u64,
    /// Modules with too much unwind information.
    pub unwind_too_large: u64,
    /// Readings refused because a worker hung there before.
    pub refused: u64,
    /// Readings put off to stay within the budget.
    pub over_budget: u64,
}

impl StackCounts {
    /// The sums of both; what is of now is that of `self`.
    pub fn plus(&self, other: &Self) -> Self {
        Self {
            unwound: self.unwound.saturating_add(other.unwound),
            spent_ns: self.spent_ns.saturating_add(other.spent_ns),
            cpu_ns: self.cpu_ns.saturating_add(other.cpu_ns),
            resident_bytes: self.resident_bytes,
            readings_late: self.readings_late,
            without_frames: self.without_frames.saturating_add(other.without_frames),
            bad_records: self.bad_records.saturating_add(other.bad_records),
            processes_forgotten: self.processes_forgotten.saturating_add(other.processes_forgotten),
            mappings_left_out: self.mappings_left_out.saturating_add(other.mappings_left_out),
            modules_forgotten: self.modules_forgotten.saturating_add(other.modules_forgotten),
            modules_closed_early: self.modules_closed_early.saturating_add(other.modules_closed_early),
            unwind_too_large: self.unwind_too_large.saturating_add(other.unwind_too_large),
            refused: self.refused.saturating_add(other.refused),
            over_budget: self.over_budget.saturating_add(other.over_budget),
        }
    }
}

/// A message as a frame.
pub fn frame(message: &impl Serialize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; 4];
    serde_json::to_writer(&mut bytes, message)?;
    let length = u32::try_from(bytes.len().saturating_sub(4)).map_err(io::Error::other)?;
    bytes.splice(..4, length.to_le_bytes());
    Ok(bytes)
}

/// Sends a frame with descriptors beside its first bytes. Blocks as the socket does.
pub fn send_with_fds(socket: &impl AsFd, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut sent = 0;
    while let Some(rest) = bytes.get(sent..).filter(|rest| !rest.is_empty()) {
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if sent == 0 && !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(io::Error::other("too many descriptors for one message"));
        }
        match sendmsg(socket, &[IoSlice::new(rest)], &mut control, SendFlags::NOSIGNAL) {
            Ok(more) => sent = sent.saturating_add(more),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Puts messages together from what arrives.
#[derive(Debug, Default)]
pub struct Incoming {
    /// Cap: a message and what is read at once.
    bytes: VecDeque<u8>,
    /// Cap: [`MAX_WAITING_FDS`].
    fds: VecDeque<OwnedFd>,
    /// Where the next bytes are read to; [`READ_BYTES`] once it is used.
    buffer: Vec<u8>,
}

impl Incoming {
    /// Reads once, without waiting. True if something came; [`io::ErrorKind::WouldBlock`] if
    /// nothing is there, [`io::ErrorKind::UnexpectedEof`] if the other side has gone.
    pub fn read(&mut self, socket: &impl AsFd) -> io::Result<()> {
        self.buffer.resize(READ_BYTES, 0);
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let received = recvmsg(socket, &mut [IoSliceMut::new(&mut self.buffer)], &mut control, flags)?;
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                // What is too much is closed.
                self.fds.extend(fds.take(MAX_WAITING_FDS.saturating_sub(self.fds.len())));
            }
        }
        if received.flags.contains(ReturnFlags::CTRUNC) {
            // What comes next would be taken for what is missing.
            return Err(io::Error::other("descriptors were lost: too many are open"));
        }
        if received.bytes == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.bytes.extend(self.buffer.get(..received.bytes).unwrap_or_default());
        Ok(())
    }

    /// The next message that is whole. An error: the other side does not keep to the format.
    pub fn next_message<T: DeserializeOwned>(&mut self) -> io::Result<Option<T>> {
        Ok(self.next_sized()?.map(|(message, _)| message))
    }

    /// The same with the bytes that it had.
    pub fn next_sized<T: DeserializeOwned>(&mut self) -> io::Result<Option<(T, usize)>> {
        if self.bytes.len() < 4 {
            return Ok(None);
        }
        let length = self.bytes.range(..4).rev().fold(0, |number: usize, byte| (number << 8) | usize::from(*byte));
        if length > MAX_MESSAGE_BYTES {
            return Err(io::Error::other(format!("a message of {length} bytes")));
        }
        let end = length.saturating_add(4);
        if self.bytes.len() < end {
            return Ok(None);
        }
        let frame: Vec<u8> = self.bytes.drain(..end).collect();
        Ok(Some((serde_json::from_slice(frame.get(4..).unwrap_or_default())?, length)))
    }

    /// Gives memory back that is not used.
    pub fn give_memory_back(&mut self) {
        self.bytes.shrink_to_fit();
        self.fds.shrink_to_fit();
        self.buffer = Vec::new();
    }

    /// The next descriptor that came.
    pub fn next_fd(&mut self) -> Option<OwnedFd> {
        self.fds.pop_front()
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn messages_and_descriptors_arrive_in_order() {
        let (mut left, right) = UnixStream::pair().unwrap();
        let file = tempfile::tempfile().unwrap();
        let label = OpenLabel { path: "/a".to_owned(), build_id: None, debug_link: None };
        let modules = FromWorker::Modules { number: 1, open: vec![label.clone()], last: true };
        send_with_fds(&left, &frame(&modules).unwrap(), &[file.as_fd()]).unwrap();
        let end = frame(&FromWorker::End).unwrap();
        left.write_all(end.split_at(3).0).unwrap();
        let mut incoming = Incoming::default();
        incoming.read(&right).unwrap();
        let Ok(Some(FromWorker::Modules { number: 1, open, last: true })) = incoming.next_message() else {
            panic!("no modules")
        };
        assert_eq!(open, [label]);
        assert!(incoming.next_fd().is_some() && incoming.next_fd().is_none());
        // The kernel ends a read where descriptors begin or end.
        incoming.read(&right).unwrap();
        assert!(matches!(incoming.next_message::<FromWorker>(), Ok(None)), "three bytes are no message");
        assert_eq!(incoming.read(&right).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        left.write_all(end.split_at(3).1).unwrap();
        drop(left);
        incoming.read(&right).unwrap();
        assert!(matches!(incoming.next_message(), Ok(Some(FromWorker::End))));
        assert_eq!(incoming.read(&right).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn a_stack_survives_its_way() {
        let stack = StackFound {
            boot_ns: 1,
            pid: 2,
            tid: 3,
            start_boot_ns: 4,
            comm: "a\"b".to_owned(),
            mm_id: u64::MAX,
            cgroup_id: 5,
            cause: Cause::Map,
            weight_bytes: 6,
            grown_bytes: 7,
            address: Some(8),
            size_bytes: 9,
            path: 10,
        };
        let text = serde_json::to_string(&StackRow::from(stack.clone())).unwrap();
        let row: StackRow = serde_json::from_str(&text).unwrap();
        assert_eq!(StackFound::from(row), stack);
    }

    #[test]
    fn a_reading_survives_its_way() {
        for place in [Place::Proc, Place::Path, Place::Device((8, 1))] {
            let reading = Reading { process: (1, 2), user: Some(3), place };
            assert_eq!(Reading::from(ReadingRow::from(&reading)), reading);
        }
    }

    #[test]
    fn what_is_no_message_is_an_error() {
        for bytes in [&b"\xff\xff\xff\xff"[..], b"\x02\0\0\0{]"] {
            let mut incoming = Incoming { bytes: bytes.iter().copied().collect(), ..Incoming::default() };
            assert!(incoming.next_message::<ToWorker>().is_err());
        }
    }
}
