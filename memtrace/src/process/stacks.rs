//! Records of the stacks ring to facts: unwound at once, in the ring's own memory, while the process still lives; named
//! and told with the next tick. What is on a stack never leaves this file but as frames.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use memtrace_common::event::{
    CAUSE_BRK, CAUSE_CHARGE, CAUSE_MAP, CAUSE_TOUCH, CGROUP_MADE, CgroupChange, Exec, Exit, Header, KIND_CGROUP,
    KIND_EXEC, KIND_EXIT, KIND_KERNEL_STACK, KIND_RECLAIM, KIND_STACK_SAMPLE, MAX_STACK_COPY_BYTES, RECLAIM_BEGIN,
    Reclaim, StackSample, UNKNOWN,
};
use zerocopy::FromBytes;

use super::kallsyms::KernelSymbols;
use super::known::Processes;
use super::modules::ModuleId;
use super::rule::Registers;
use super::trigger::TriggerStacks;
use super::unwind::Found;
use memtrace_engine::input::{Fact, ModuleFound, PATHS_KNOWN, PathFound, PathFrame, StackFound};
use memtrace_incident::{Cause, Cut};

/// Stacks waiting for the names of their kernel frames.
const MAX_WAITING: usize = 8192;
/// Paths that have a number; beyond, all numbers are given anew. The engine remembers as many of the newest.
const MAX_PATHS: usize = PATHS_KNOWN as usize;
/// Processes whose stacks are known to be deep.
const MAX_DEEP: usize = 4096;
/// What a slice that was too short is followed by, bytes: the last is the most a record can carry.
const SLICES: [u32; 4] = [8 << 10, 16 << 10, 32 << 10, MAX_STACK_COPY_BYTES as u32];

/// A stack without names in the kernel.
struct Waiting {
    found: StackFound,
    kernel: Vec<u64>,
    user: Vec<PathFrame>,
    cut: Option<Cut>,
}

/// Everything between the stacks ring and the engine.
pub struct Stacks {
    /// Mappings, modules and unwinders of the processes met.
    pub processes: Processes,
    triggers: TriggerStacks,
    symbols: KernelSymbols,
    /// Cap: [`MAX_WAITING`].
    waiting: VecDeque<Waiting>,
    /// Numbers of paths. Cap: [`MAX_PATHS`].
    paths: BTreeMap<(Vec<PathFrame>, Option<Cut>), u32>,
    next_path: u32,
    /// What the journal's segment has already. Caps: those of paths and modules.
    stated_paths: BTreeSet<u32>,
    stated_modules: BTreeSet<u32>,
    /// Bytes of stack asked for, of processes that need more than usual. Cap: [`MAX_DEEP`].
    deep: BTreeMap<u32, u32>,
    /// Of those, what is to be told to the kernel side.
    deeper: Vec<(u32, u32)>,
    /// Stacks that found no room to wait.
    refused: u64,
    /// Records that are none.
    bad: u64,
    unwound: u64,
    spent: Duration,
}

impl Stacks {
    /// Nothing known yet.
    pub fn new(processes: Processes) -> Self {
        Self {
            processes,
            triggers: TriggerStacks::default(),
            symbols: KernelSymbols::read(),
            waiting: VecDeque::new(),
            paths: BTreeMap::new(),
            next_path: 0,
            stated_paths: BTreeSet::new(),
            stated_modules: BTreeSet::new(),
            deep: BTreeMap::new(),
            deeper: Vec::new(),
            refused: 0,
            bad: 0,
            unwound: 0,
            spent: Duration::ZERO,
        }
    }

    /// Takes a record of the stacks ring; the cgroup that it is a sample of.
    pub fn push(&mut self, record: &[u8]) -> Option<u64> {
        let (header, _) = Header::read_from_prefix(record).ok()?;
        let cgroup = match header.kind {
            KIND_KERNEL_STACK => {
                self.triggers.push(record);
                return None;
            }
            KIND_STACK_SAMPLE => self.sample(record),
            _ => None,
        };
        if cgroup.is_none() {
            self.bad = self.bad.saturating_add(1);
        }
        cgroup
    }

    fn sample(&mut self, record: &[u8]) -> Option<u64> {
        let (sample, rest) = StackSample::ref_from_prefix(record).ok()?;
        let slice = rest.get(..sample.stack_copy_bytes as usize)?;
        let cause = cause(sample.cause)?;
        if self.waiting.len() >= MAX_WAITING {
            self.refused = self.refused.saturating_add(1);
            return Some(sample.cgroup_id);
        }
        let task = &sample.task;
        let (user, cut) = if sample.ip == 0 {
            (Vec::new(), Some(Cut::Registers))
        } else {
            let lr = (sample.lr != 0).then_some(sample.lr);
            let registers = Registers { ip: sample.ip, sp: sample.sp, fp: sample.bp, lr };
            let frame_pointers = sample.user.get(..sample.user_frames as usize).unwrap_or_default();
            let stack = self.processes.unwind(task.tgid, task.start_boot_ns, registers, slice, frame_pointers);
            (stack.frames.iter().map(path_frame).collect(), stack.cut)
        };
        self.unwound = self.unwound.saturating_add(1);
        if cut == Some(Cut::Slice) {
            self.ask_for_more(task.tgid, sample.stack_copy_cap_bytes, sample.stack_copy_bytes);
        }
        self.waiting.push_back(Waiting {
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
        Some(sample.cgroup_id)
    }

    /// A record of another ring: who starts a program, who ends, and who may be killed next. Of a cgroup that was made
    /// the ids of its parent and its own.
    pub fn heed(&mut self, record: &[u8]) -> Option<(u64, u64)> {
        let (header, _) = Header::read_from_prefix(record).ok()?;
        match header.kind {
            KIND_CGROUP => {
                let cgroup = CgroupChange::ref_from_bytes(record).ok()?;
                return (cgroup.change == CGROUP_MADE).then_some((cgroup.parent_id, cgroup.memcg.cgroup_id));
            }
            KIND_EXEC => {
                if let Ok(exec) = Exec::ref_from_bytes(record) {
                    self.processes.exec(exec.task.tgid, exec.task.start_boot_ns);
                }
            }
            KIND_EXIT => {
                if let Ok(exit) = Exit::ref_from_bytes(record) {
                    self.processes.exit(exit.task.tgid, exit.task.start_boot_ns);
                }
            }
            // A limit was hit: when it comes to a kill there is no time left to read mappings.
            KIND_RECLAIM => {
                if let Ok(reclaim) = Reclaim::ref_from_bytes(record)
                    && reclaim.phase == RECLAIM_BEGIN
                {
                    self.processes.prefetch(reclaim.task.tgid, reclaim.task.start_boot_ns);
                }
            }
            _ => {}
        }
        None
    }

    /// A slice was too short: unless the stack itself ended, the next one of this process is longer.
    fn ask_for_more(&mut self, pid: u32, cap: u32, got: u32) {
        let Some(more) = SLICES.iter().copied().find(|bytes| *bytes > cap) else { return };
        if got < cap || self.deep.get(&pid).is_some_and(|asked| *asked >= more) {
            return;
        }
        if self.deep.len() >= MAX_DEEP {
            self.deep.clear();
        }
        self.deep.insert(pid, more);
        self.deeper.push((pid, more));
    }

    /// Processes whose stacks are to be copied deeper from now on, with the bytes.
    pub fn deeper(&mut self) -> Vec<(u32, u32)> {
        std::mem::take(&mut self.deeper)
    }

    /// Everything that waited, as facts.
    pub fn take(&mut self) -> Vec<Fact> {
        let mut facts = self.triggers.take(&mut self.symbols);
        let waiting = std::mem::take(&mut self.waiting);
        for stack in waiting {
            let frames = self.kernel_frames(&stack.kernel).into_iter().chain(stack.user).collect();
            let path = self.number((frames, stack.cut), &mut facts);
            facts.push(Fact::Stack(StackFound { path, ..stack.found }));
        }
        facts
    }

    /// Named, without the tracer's own.
    fn kernel_frames(&mut self, addresses: &[u64]) -> Vec<PathFrame> {
        let addresses = addresses.iter().filter(|address| **address != 0);
        let frames: Vec<Option<String>> = addresses.map(|address| self.symbols.name(*address)).collect();
        let first = frames.iter().rposition(|name| name.as_deref().is_some_and(is_tracer)).map_or(0, |last| last + 1);
        let kernel = |name| PathFrame { name, kernel: true, ..PathFrame::default() };
        frames.into_iter().skip(first).map(kernel).collect()
    }

    /// The number of a path; what the engine or the journal's segment does not have yet is told before.
    fn number(&mut self, path: (Vec<PathFrame>, Option<Cut>), facts: &mut Vec<Fact>) -> u32 {
        if self.paths.len() >= MAX_PATHS && !self.paths.contains_key(&path) {
            self.paths.clear();
            self.stated_paths.clear();
        }
        let next = self.next_path;
        let id = *self.paths.entry(path.clone()).or_insert(next);
        if id == next {
            self.next_path = next.wrapping_add(1);
        }
        if self.stated_paths.insert(id) {
            let (frames, cut) = path;
            for module in frames.iter().filter_map(|frame| frame.module) {
                if self.stated_modules.insert(module)
                    && let Some((path, build_id)) = self.processes.module(ModuleId(module))
                {
                    facts.push(Fact::Module(ModuleFound { id: module, path, build_id }));
                }
            }
            facts.push(Fact::Path(PathFound { id, frames, cut }));
        }
        id
    }

    /// A new segment of the journal has nothing yet.
    pub fn restate(&mut self) {
        self.stated_paths.clear();
        self.stated_modules.clear();
    }

    /// Stacks unwound, and the CPU time that they took.
    pub fn cost(&self) -> (u64, Duration) {
        (self.unwound, self.spent)
    }

    /// CPU time was spent on stacks.
    pub fn spent(&mut self, time: Duration) {
        self.spent = self.spent.saturating_add(time);
    }

    /// What was lost here, as totals.
    pub fn losses(&self) -> Vec<(String, u64)> {
        let counts = self.processes.counts();
        let named = [
            ("stacks/no room to wait", self.refused),
            ("stacks/bad records", self.bad),
            ("stacks/processes forgotten", counts.forgotten),
            ("stacks/mappings left out", counts.mappings_left_out),
            ("stacks/modules forgotten", counts.modules.forgotten),
            ("stacks/modules closed early", counts.modules.closed),
            ("stacks/unwind information too large", counts.modules.too_large),
        ];
        named.iter().filter(|(_, count)| *count > 0).map(|(name, count)| ((*name).to_owned(), *count)).collect()
    }
}

/// What persists of a frame.
fn path_frame(found: &Found) -> PathFrame {
    PathFrame {
        module: found.module.map(|module| module.0),
        offset: found.offset,
        name: found.name.as_ref().map(|name| name.to_string()),
        kernel: false,
        jit: found.jit,
    }
}

/// The wire's cause.
fn cause(number: u32) -> Option<Cause> {
    match number {
        CAUSE_TOUCH => Some(Cause::Touch),
        CAUSE_MAP => Some(Cause::Map),
        CAUSE_BRK => Some(Cause::Brk),
        CAUSE_CHARGE => Some(Cause::Charge),
        _ => None,
    }
}

/// Whether a kernel function is how our programs are called.
fn is_tracer(name: &str) -> bool {
    let called = ["bpf_", "__bpf_", "__traceiter_"].iter().any(|prefix| name.starts_with(prefix));
    called || matches!(name, "mm_trace_rss_stat" | "trace_rss_stat")
}

/// A name as it stands in a record.
fn text(comm: &[u8]) -> String {
    String::from_utf8_lossy(comm.split(|byte| *byte == 0).next().unwrap_or_default()).into_owned()
}
