//! Stack samples to facts.
//!
//! A sample is unwound at once, in the memory of the ring: its process may end any moment, and the
//! bytes of a user stack hold secrets, so nothing of them outlives [`StackSamples::push`] but
//! frames. Its kernel addresses wait here until the next tick, when [`StackSamples::take`] names
//! them and reports everything as facts.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use memtrace_common::event::{
    CAUSE_BRK, CAUSE_CHARGE, CAUSE_MAP, CAUSE_TOUCH, MAX_STACK_COPY_BYTES, StackSample, UNKNOWN,
};
use memtrace_engine::decode::{StackRecord, decode_stack};
use memtrace_engine::input::{Fact, PathFrame, StackFound};
use memtrace_incident::{Cause, Cut};
use memtrace_unwind::gate::{Gate, ProcessKey, Refused};
use memtrace_unwind::modules::OpenModule;
use memtrace_unwind::process_cache::ProcessCache;
use memtrace_unwind::rule::Registers;
use memtrace_unwind::unwind::{Truncation, UnwoundFrame};

use super::kallsyms::KernelSymbols;
use super::kernel_stacks::KernelStackQueue;
use super::messages::StackCounts;
use super::path_numbers::PathNumbers;

/// Samples that wait for the names of their kernel frames.
const MAX_WAITING: usize = 8192;
/// Processes known to have deep stacks.
const MAX_DEEP: usize = 4096;
/// Sizes of a stack copy in bytes, each tried when the one before was too short. The last is the
/// most that a record can carry.
const COPY_SIZES: [u32; 4] = [8 << 10, 16 << 10, 32 << 10, MAX_STACK_COPY_BYTES as u32];

/// An unwound sample whose kernel frames have no names yet.
struct WaitingSample {
    found: StackFound,
    kernel: Vec<u64>,
    user: Vec<PathFrame>,
    cut: Option<Cut>,
}

/// Everything between the STACKS ring and the engine.
pub struct StackSamples {
    processes: ProcessCache,
    kernel_stacks: KernelStackQueue,
    symbols: KernelSymbols,
    /// Cap: [`MAX_WAITING`].
    waiting: VecDeque<WaitingSample>,
    paths: PathNumbers,
    /// Bytes of stack requested, for processes that need more than usual. Cap: [`MAX_DEEP`].
    copy_bytes: BTreeMap<u32, u32>,
    /// Of these, the requests that [`StackSamples::take_copy_requests`] has not returned yet.
    /// Cap: the samples of one turn.
    new_copy_bytes: Vec<(u32, u32)>,
    /// Samples that found no room to wait.
    refused: u64,
    /// Records that could not be decoded.
    bad: u64,
    unwound: u64,
}

impl StackSamples {
    /// With the symbols of the running kernel, and no process known. Files are read through `gate`.
    pub fn new(gate: Gate) -> Self {
        Self {
            processes: ProcessCache::new(gate),
            kernel_stacks: KernelStackQueue::default(),
            symbols: KernelSymbols::read(),
            waiting: VecDeque::new(),
            paths: PathNumbers::default(),
            copy_bytes: BTreeMap::new(),
            new_copy_bytes: Vec::new(),
            refused: 0,
            bad: 0,
            unwound: 0,
        }
    }

    /// Takes a record of the STACKS ring.
    pub fn push(&mut self, record: &[u8]) {
        let taken = match decode_stack(record) {
            Ok(StackRecord::KernelStack(stack)) => {
                self.kernel_stacks.push(stack);
                Some(())
            }
            Ok(StackRecord::Sample(sample, stack_copy)) => self.sample(sample, stack_copy),
            Err(_) => None,
        };
        if taken.is_none() {
            self.bad = self.bad.saturating_add(1);
        }
    }

    /// `None` if the sample's cause is unknown.
    fn sample(&mut self, sample: &StackSample, stack_copy: &[u8]) -> Option<()> {
        let cause = cause(sample.cause)?;
        if self.waiting.len() >= MAX_WAITING {
            self.refused = self.refused.saturating_add(1);
            return Some(());
        }
        let task = &sample.task;
        let (user, cut) = self.unwind(sample, stack_copy);
        self.unwound = self.unwound.saturating_add(1);
        if cut == Some(Cut::Slice) {
            self.request_larger_copy(task.tgid, sample.stack_copy_cap_bytes, sample.stack_copy_bytes);
        }
        self.waiting.push_back(WaitingSample {
            found: StackFound {
                boot_ns: sample.header.boot_ns,
                pid: task.tgid,
                tid: task.tid,
                start_boot_ns: task.start_boot_ns,
                comm: text(&task.comm),
                mm_id: sample.mm_id,
                cgroup_id: sample.cgroup_id,
                cause,
                weight_bytes: sample.weight_bytes,
                grown_bytes: sample.grown_bytes,
                address: (sample.address != UNKNOWN).then_some(sample.address),
                size_bytes: sample.size_bytes,
                path: 0,
            },
            kernel: sample.kernel.get(..sample.kernel_frames as usize).unwrap_or_default().to_vec(),
            user,
            cut,
        });
        Some(())
    }

    /// User frames of a sample, innermost first, and why the outermost one is missing if it is.
    fn unwind(&mut self, sample: &StackSample, stack_copy: &[u8]) -> (Vec<PathFrame>, Option<Cut>) {
        if sample.ip == 0 {
            return (Vec::new(), Some(Cut::Registers));
        }
        let lr = (sample.lr != 0).then_some(sample.lr);
        let registers = Registers { ip: sample.ip, sp: sample.sp, fp: sample.bp, lr };
        let frame_pointers = sample.user.get(..sample.user_frames as usize).unwrap_or_default();
        let task = &sample.task;
        // A charge is of a cgroup, not of an address space.
        let mm_id = (sample.mm_id != 0).then_some(sample.mm_id);
        let process = ((task.tgid, task.start_boot_ns), mm_id);
        match self.processes.unwind(process, registers, stack_copy, frame_pointers) {
            Some(stack) => (stack.frames.iter().map(path_frame).collect(), stack.truncation.map(cut)),
            None => (Vec::new(), Some(Cut::Gone)),
        }
    }

    /// Leaves these files alone from now on, in place of others.
    pub fn refuse(&mut self, refused: Refused) {
        self.processes.refuse(refused);
    }

    /// The process has replaced its program.
    pub fn exec(&mut self, (pid, start_boot_ns): ProcessKey) {
        self.processes.exec(pid, start_boot_ns);
    }

    /// The process has ended.
    pub fn exit(&mut self, (pid, start_boot_ns): ProcessKey) {
        self.processes.exit(pid, start_boot_ns);
    }

    /// Reads the mappings of the process now: it hit a limit, and once that comes to a kill it is too
    /// late.
    pub fn prefetch(&mut self, (pid, start_boot_ns): ProcessKey) {
        self.processes.prefetch(pid, start_boot_ns);
    }

    /// Stacks, of processes and of the kernel, that [`StackSamples::take`] would return.
    pub fn waiting(&self) -> usize {
        self.waiting.len().saturating_add(self.kernel_stacks.waiting())
    }

    /// A copy of `got` bytes, of `asked` at most, was too short. Unless the stack itself ended, the
    /// next copy of this process shall be larger.
    fn request_larger_copy(&mut self, pid: u32, asked: u32, got: u32) {
        let Some(larger) = COPY_SIZES.iter().copied().find(|bytes| *bytes > asked) else { return };
        if got < asked || self.copy_bytes.get(&pid).is_some_and(|bytes| *bytes >= larger) {
            return;
        }
        if self.copy_bytes.len() >= MAX_DEEP {
            self.copy_bytes.clear();
        }
        self.copy_bytes.insert(pid, larger);
        self.new_copy_bytes.push((pid, larger));
    }

    /// Processes whose stacks are to be copied deeper from now on: process id and bytes.
    pub fn take_copy_requests(&mut self) -> Vec<(u32, u32)> {
        std::mem::take(&mut self.new_copy_bytes)
    }

    /// Everything that waited, as facts.
    pub fn take(&mut self) -> Vec<Fact> {
        let mut facts = self.kernel_stacks.take(&mut self.symbols);
        for sample in std::mem::take(&mut self.waiting) {
            let frames = self.kernel_frames(&sample.kernel).into_iter().chain(sample.user).collect();
            let processes = &self.processes;
            let path = self.paths.number((frames, sample.cut), |id| processes.module(id), &mut facts);
            facts.push(Fact::Stack(StackFound { path, ..sample.found }));
        }
        facts
    }

    /// Frames of kernel addresses, without those of the tracer itself.
    fn kernel_frames(&mut self, addresses: &[u64]) -> Vec<PathFrame> {
        let addresses = addresses.iter().filter(|address| **address != 0);
        let names: Vec<Option<String>> = addresses.map(|address| self.symbols.name(*address)).collect();
        let first = names.iter().rposition(|name| name.as_deref().is_some_and(is_tracer)).map_or(0, |last| last + 1);
        let frame = |name| PathFrame { name, kernel: true, ..PathFrame::default() };
        names.into_iter().skip(first).map(frame).collect()
    }

    /// Evicts processes that ended a while ago, and closes files that no process maps for `keep_files`
    /// by now. Call it about once a second.
    pub fn tick(&mut self, keep_files: Duration) {
        self.processes.tick(keep_files);
    }

    /// Modules whose content can be read now: functions are named from it.
    pub fn open_modules(&self) -> Vec<OpenModule> {
        self.processes.open_modules()
    }

    /// What was done and lost since the start. CPU time and memory are not known here.
    pub fn counts(&self) -> StackCounts {
        let counts = self.processes.counts();
        StackCounts {
            unwound: self.unwound,
            spent_ns: 0,
            resident_bytes: 0,
            no_room_to_wait: self.refused,
            bad_records: self.bad,
            processes_forgotten: counts.forgotten,
            mappings_left_out: counts.mappings_left_out,
            modules_forgotten: counts.modules.forgotten,
            modules_closed_early: counts.modules.closed,
            unwind_too_large: counts.modules.too_large,
            refused: counts.gate.refused,
            over_budget: counts.gate.over_budget,
        }
    }
}

/// The frame as the engine and the journal have it: without its address.
fn path_frame(frame: &UnwoundFrame) -> PathFrame {
    PathFrame {
        module: frame.module.map(|module| module.0),
        offset: frame.offset,
        name: frame.name.as_ref().map(|name| name.to_string()),
        kernel: false,
        jit: frame.jit,
    }
}

/// The reason as the incident file has it.
fn cut(truncation: Truncation) -> Cut {
    match truncation {
        Truncation::StackCopy => Cut::Slice,
        Truncation::UnknownCode => Cut::Module,
        Truncation::UnwindInfo => Cut::Unwind,
        Truncation::FrameLimit => Cut::Frames,
    }
}

/// The cause as the wire numbers it.
fn cause(number: u32) -> Option<Cause> {
    match number {
        CAUSE_TOUCH => Some(Cause::Touch),
        CAUSE_MAP => Some(Cause::Map),
        CAUSE_BRK => Some(Cause::Brk),
        CAUSE_CHARGE => Some(Cause::Charge),
        _ => None,
    }
}

/// Whether a kernel function belongs to the call of our eBPF programs.
fn is_tracer(name: &str) -> bool {
    let called = ["bpf_", "__bpf_", "__traceiter_"].iter().any(|prefix| name.starts_with(prefix));
    called || matches!(name, "mm_trace_rss_stat" | "trace_rss_stat")
}

/// Text of a NUL-padded field.
fn text(comm: &[u8]) -> String {
    String::from_utf8_lossy(comm.split(|byte| *byte == 0).next().unwrap_or_default()).into_owned()
}
