//! Stack samples to facts.
//!
//! A sample is unwound at once, in the memory of the ring: its process may end any moment, and the
//! bytes of a user stack hold secrets, so nothing of them outlives [`StackSamples::push`] but
//! frames. What is found waits as facts until [`StackSamples::take`], and is bounded by its bytes: a
//! program decides how deep its stacks are and what its functions are called.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use memtrace_common::event::{
    CAUSE_BRK, CAUSE_CHARGE, CAUSE_MAP, CAUSE_TOUCH, MAX_STACK_COPY_BYTES, StackSample, UNKNOWN,
};
use memtrace_engine::decode::{StackRecord, decode_stack, printable};
use memtrace_engine::input::{Fact, PathFrame, StackFound, bytes_of_frames};
use memtrace_incident::{Cause, Cut};
use memtrace_unwind::gate::{Gate, ProcessKey, Refused};
use memtrace_unwind::modules::OpenModule;
use memtrace_unwind::process_cache::{ProcessCache, SampleMoment};
use memtrace_unwind::rule::Registers;
use memtrace_unwind::unwind::{Truncation, UnwoundFrame};

use super::kallsyms::KernelSymbols;
use super::kernel_stacks::KernelStackQueue;
use super::messages::StackCounts;
use super::path_numbers::{Path, PathNumbers};
use super::shared_names::SharedNames;

/// Facts, and bytes of them, that are worth a message of their own.
pub const FULL_FACTS: usize = 256;
/// See [`FULL_FACTS`].
pub const FULL_BYTES: usize = 256 << 10;
/// Processes known to have deep stacks.
const MAX_DEEP: usize = 4096;
/// Sizes of a stack copy in bytes, each tried when the one before was too short. The last is the
/// most that a record can carry.
const COPY_SIZES: [u32; 4] = [8 << 10, 16 << 10, 32 << 10, MAX_STACK_COPY_BYTES as u32];

/// Everything between the STACKS ring and the engine.
pub struct StackSamples {
    processes: ProcessCache,
    kernel_stacks: KernelStackQueue,
    symbols: KernelSymbols,
    /// Names of kernel functions in `paths`.
    functions: SharedNames,
    /// What was found, in order. Cap: [`FULL_FACTS`] and [`FULL_BYTES`], and what one sample states.
    waiting: VecDeque<Fact>,
    /// Bytes of `waiting`, about.
    waiting_bytes: usize,
    paths: PathNumbers,
    /// Bytes of stack requested, for processes that need more than usual. Cap: [`MAX_DEEP`].
    copy_bytes: BTreeMap<u32, u32>,
    /// Of these, the requests that [`StackSamples::take_copy_requests`] has not returned yet.
    /// Cap: the samples of one turn.
    new_copy_bytes: Vec<(u32, u32)>,
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
            functions: SharedNames::default(),
            waiting: VecDeque::new(),
            waiting_bytes: 0,
            paths: PathNumbers::default(),
            copy_bytes: BTreeMap::new(),
            new_copy_bytes: Vec::new(),
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
        let task = &sample.task;
        let (user, cut) = self.unwind(sample, stack_copy);
        self.unwound = self.unwound.saturating_add(1);
        if cut == Some(Cut::Slice) {
            self.request_larger_copy(task.tgid, sample.stack_copy_cap_bytes, sample.stack_copy_bytes);
        }
        let kernel = self.kernel_frames(sample.kernel.get(..sample.kernel_frames as usize).unwrap_or_default());
        let path = self.path((kernel.into_iter().chain(user).collect(), cut));
        self.wait(Fact::Stack(StackFound {
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
            path,
        }));
        self.processes.settle();
        Some(())
    }

    /// The number of a path, which is stated first if that is due.
    fn path(&mut self, path: Path) -> u32 {
        let (mut facts, processes) = (Vec::new(), &self.processes);
        let number = self.paths.number(path, |id| processes.module(id), &mut facts);
        facts.into_iter().for_each(|fact| self.wait(fact));
        number
    }

    fn wait(&mut self, fact: Fact) {
        self.waiting_bytes = self.waiting_bytes.saturating_add(bytes_of(&fact));
        self.waiting.push_back(fact);
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
        let moment = SampleMoment { process: (task.tgid, task.start_boot_ns), mm_id, boot_ns: sample.header.boot_ns };
        match self.processes.unwind(moment, registers, stack_copy, frame_pointers) {
            Some(stack) => (stack.frames.iter().map(path_frame).collect(), stack.truncation.map(cut)),
            None => (Vec::new(), Some(Cut::Gone)),
        }
    }

    /// Leaves these files alone from now on, in place of others.
    pub fn refuse(&mut self, refused: Refused) {
        self.processes.refuse(refused);
    }

    /// The process has replaced its program, at this time (boot clock).
    pub fn exec(&mut self, process: ProcessKey, boot_ns: u64) {
        self.processes.exec(process, boot_ns);
    }

    /// The process has ended.
    pub fn exit(&mut self, process: ProcessKey) {
        self.processes.exit(process);
    }

    /// Reads the mappings of the process now: it hit a limit, and once that comes to a kill it is too
    /// late.
    pub fn prefetch(&mut self, process: ProcessKey) {
        self.processes.prefetch(process);
    }

    /// Whether [`StackSamples::take`] would return anything.
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty() && self.kernel_stacks.waiting() == 0
    }

    /// Whether as much waits as one message shall have.
    pub fn is_full(&self) -> bool {
        self.waiting.len() >= FULL_FACTS || self.waiting_bytes >= FULL_BYTES
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

    /// What waited, in order, until a message is full: call it again while [`StackSamples::is_empty`]
    /// is false.
    pub fn take(&mut self) -> Vec<Fact> {
        let (mut facts, mut bytes) = (self.kernel_stacks.take(&mut self.symbols), 0_usize);
        while bytes < FULL_BYTES
            && let Some(fact) = self.waiting.pop_front()
        {
            bytes = bytes.saturating_add(bytes_of(&fact));
            facts.push(fact);
        }
        self.waiting_bytes = self.waiting_bytes.saturating_sub(bytes);
        facts
    }

    /// Frames of kernel addresses, without those of the tracer itself.
    fn kernel_frames(&mut self, addresses: &[u64]) -> Vec<PathFrame> {
        let addresses = addresses.iter().filter(|address| **address != 0);
        let names: Vec<Option<String>> = addresses.map(|address| self.symbols.name(*address)).collect();
        let first = names.iter().rposition(|name| name.as_deref().is_some_and(is_tracer)).map_or(0, |last| last + 1);
        let functions = &mut self.functions;
        let mut share = |name: String| functions.share(&name);
        let frame =
            |name: Option<String>| PathFrame { name: name.map(&mut share), kernel: true, ..PathFrame::default() };
        names.into_iter().skip(first).map(frame).collect()
    }

    /// Evicts processes that ended a while ago, and closes files that no process maps for `keep_files`
    /// by now. Call it about once a second.
    pub fn tick(&mut self, keep_files: Duration) {
        self.processes.tick(keep_files);
    }

    /// Forgets stacks that are not seen any more. Call it once in
    /// [`super::path_numbers::FORGET_SECONDS`].
    pub fn forget_unused(&mut self) {
        self.paths.forget_unused();
        self.functions.forget_unused();
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
            cpu_ns: 0,
            resident_bytes: 0,
            readings_late: counts.gate.late,
            without_frames: 0,
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

/// Bytes of a fact in memory, about.
fn bytes_of(fact: &Fact) -> usize {
    let more = match fact {
        Fact::Module(module) => module.path.len(),
        Fact::Path(path) => bytes_of_frames(&path.frames),
        _ => 0,
    };
    size_of::<Fact>().saturating_add(more)
}

/// The frame as the engine and the journal have it: without its address.
fn path_frame(frame: &UnwoundFrame) -> PathFrame {
    PathFrame {
        module: frame.module.map(|module| module.0),
        offset: frame.offset,
        name: frame.name.clone(),
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

/// Text of a NUL-padded field, escaped where not printable.
fn text(comm: &[u8]) -> String {
    printable(comm.split(|byte| *byte == 0).next().unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use memtrace_engine::input::{ModuleFound, PathFound};
    use memtrace_unwind::process_cache::MAX_NAME_BYTES;
    use memtrace_unwind::unwind::MAX_FRAMES;

    use super::*;
    use crate::stacks::messages::{Batch, FromWorker, MAX_MESSAGE_BYTES, frame};

    /// Every character of the names is escaped, and modules have the longest paths.
    #[test]
    fn whatever_a_program_calls_its_functions_a_message_has_room() {
        let mut samples = StackSamples::new(Gate::default());
        let name = "\u{1}".repeat(MAX_NAME_BYTES / MAX_FRAMES);
        let jit = PathFrame { name: Some(name.into()), jit: true, offset: Some(u64::MAX), ..PathFrame::default() };
        for id in 0..100 {
            let path = "\u{1}".repeat(4096);
            (0..50).for_each(|_| samples.wait(Fact::Module(ModuleFound { id, path: path.clone(), build_id: None })));
            samples.wait(Fact::Path(PathFound { id, frames: vec![jit.clone(); MAX_FRAMES].into(), cut: None }));
            assert!(samples.is_full(), "the ring is drained no further");
        }
        let mut found = 0;
        while !samples.is_empty() {
            let facts = samples.take();
            found += facts.len();
            let message = FromWorker::Batch(Box::new(Batch { facts, ..Batch::default() }));
            assert!(frame(&message).unwrap().len() <= MAX_MESSAGE_BYTES);
        }
        assert_eq!((found, samples.waiting_bytes), (5100, 0));
    }
}
