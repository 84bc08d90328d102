//! The processes whose stacks are unwound: their mapped code, cached while they live and a little
//! longer.
//!
//! A stack means nothing without the mappings of its process, and a process may end right after
//! its sample was taken. So mappings are read at the first sample, and again when an address is
//! met that they do not hold (a library was loaded since). Reading them costs up to a millisecond,
//! so repeated readings back off. What is known of a process that ended stays for
//! [`KEEP_AFTER_EXIT`]: its last samples are still in the ring.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use crate::maps::{self, Maps};
use crate::modules::{Module, ModuleId, ModuleLosses, Modules, OpenModule};
use crate::perf_map::PerfMap;
use crate::proc_dir::ProcDir;
use crate::rule::Registers;
use crate::unwind::{MappedCode, Unwinder, UnwoundStack};

/// Most processes cached; beyond it the least recently used one is evicted.
pub const MAX_PROCESSES: usize = 1024;
/// Heap bytes of the mappings of all processes.
const MAX_MAP_BYTES: usize = 8 << 20;
/// Heap bytes of the perf maps of all processes.
const MAX_JIT_BYTES: usize = 8 << 20;
/// Longest pause between two readings of a process' mappings because of an unknown address.
const REREAD: Duration = Duration::from_millis(100);
/// First such pause; each one doubles it. A program that starts maps its libraries one by one.
const REREAD_FIRST: Duration = Duration::from_micros(500);
/// Longest pause between two readings of a perf map because of an unknown address.
const REREAD_JIT: Duration = Duration::from_secs(1);
/// First such pause; each one doubles it. Compilers are busiest in the first moments.
const REREAD_JIT_FIRST: Duration = Duration::from_millis(20);
/// How long a process that ended stays cached.
pub const KEEP_AFTER_EXIT: Duration = Duration::from_secs(10);

/// Process id and start time (boot clock, nanoseconds): unique, however ids are reused.
type ProcessKey = (u32, u64);

/// What was read, left out and evicted since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CacheCounts {
    /// Readings of /proc/PID/maps.
    pub maps_read: u64,
    /// Of these, because of an address that the cached mappings did not hold.
    pub maps_reread: u64,
    /// Readings of a perf map.
    pub perf_maps_read: u64,
    /// Stacks of processes that had ended before their mappings could be read.
    pub gone: u64,
    /// Processes evicted for want of room.
    pub forgotten: u64,
    /// Executable mappings beyond the cap, and lines that could not be parsed.
    pub mappings_left_out: u64,
    /// The same for modules.
    pub modules: ModuleLosses,
}

/// Processes, their modules, and the unwinder that all of them share.
#[derive(Debug, Default)]
pub struct ProcessCache {
    /// Cap: [`MAX_PROCESSES`].
    processes: HashMap<ProcessKey, CachedProcess>,
    modules: Modules,
    unwinder: Unwinder,
    counts: CacheCounts,
    clock: u64,
    /// Cap: [`MAX_MAP_BYTES`].
    map_bytes: usize,
    /// Cap: [`MAX_JIT_BYTES`].
    jit_bytes: usize,
}

#[derive(Debug, Default)]
struct CachedProcess {
    code: Option<MappedCode>,
    code_backoff: Backoff,
    jit: Option<PerfMap>,
    jit_backoff: Backoff,
    ended: Option<Instant>,
    /// Order of use, for eviction.
    used: u64,
}

/// When something may be read again: after a short pause at first, then after pauses that double
/// up to a longest one.
#[derive(Debug, Default)]
struct Backoff {
    last: Option<Instant>,
    times: u32,
}

impl Backoff {
    fn is_due(&self, first: Duration, longest: Duration) -> bool {
        let pause = first.saturating_mul(1 << self.times.min(16)).min(longest);
        self.last.is_none_or(|last| last.elapsed() >= pause)
    }

    fn note(&mut self) {
        self.last = Some(Instant::now());
        self.times = self.times.saturating_add(1);
    }
}

impl ProcessCache {
    /// The process has replaced its program: what was known of it is wrong.
    pub fn exec(&mut self, pid: u32, start_boot_ns: u64) {
        let key = (pid, start_boot_ns);
        if let Some(used) = self.processes.get(&key).map(|process| process.used) {
            self.evict(key);
            self.processes.insert(key, CachedProcess { used, ..CachedProcess::default() });
        }
    }

    /// Reads the mappings of the process now, unless they are known, so that its stacks can be
    /// unwound even if it ends at once. False if it has ended already.
    pub fn prefetch(&mut self, pid: u32, start_boot_ns: u64) -> bool {
        let key = (pid, start_boot_ns);
        if self.processes.get(&key).is_some_and(|process| process.code.is_some()) {
            return true;
        }
        self.lookup_or_insert(key);
        self.read_maps(key)
    }

    /// Path and build id (lower-case hex) of a module.
    pub fn module(&self, id: ModuleId) -> Option<(String, Option<String>)> {
        let module = self.modules.get(id)?;
        Some((module.path.to_string(), module.build_id.as_ref().map(|id| id.to_string())))
    }

    /// The process ended: it stays cached for [`KEEP_AFTER_EXIT`].
    pub fn exit(&mut self, pid: u32, start_boot_ns: u64) {
        if let Some(process) = self.processes.get_mut(&(pid, start_boot_ns)) {
            process.ended = Some(Instant::now());
        }
    }

    /// Evicts processes that ended a while ago and closes idle files. Call it about once a second.
    pub fn tick(&mut self) {
        let now = Instant::now();
        let over = |process: &CachedProcess| {
            process.ended.is_some_and(|ended| now.saturating_duration_since(ended) > KEEP_AFTER_EXIT)
        };
        let gone: Vec<ProcessKey> =
            self.processes.iter().filter(|(_, process)| over(process)).map(|(key, _)| *key).collect();
        for key in gone {
            self.evict(key);
        }
        self.modules.close_idle(now);
    }

    /// The frames of a thread of the process, innermost first. `stack_copy` is its stack from its
    /// stack pointer up; it is not kept. `frame_pointers` is the chain that the kernel walked, the
    /// instruction pointer first. `None`: the process had ended before its mappings could be read.
    pub fn unwind(
        &mut self,
        pid: u32,
        start_boot_ns: u64,
        registers: Registers,
        stack_copy: &[u8],
        frame_pointers: &[u64],
    ) -> Option<UnwoundStack> {
        let key = (pid, start_boot_ns);
        self.lookup_or_insert(key);
        let cached = self.processes.get(&key).is_some_and(|process| process.code.is_some());
        if !cached {
            self.read_maps(key);
        }
        let mut stack = self.walk(key, registers, stack_copy, frame_pointers)?;
        if stack.needs_maps && cached && self.may_reread(key) && self.read_maps(key) {
            self.counts.maps_reread = self.counts.maps_reread.saturating_add(1);
            stack = self.walk(key, registers, stack_copy, frame_pointers)?;
        }
        self.mark_modules_used(key, &stack);
        self.name_jit(key, &mut stack);
        Some(stack)
    }

    /// All modules whose content can be read now: frames are named from it.
    pub fn open_modules(&self) -> Vec<OpenModule> {
        self.modules.open_modules()
    }

    /// What was read, left out and evicted since the start.
    pub fn counts(&self) -> CacheCounts {
        CacheCounts { modules: self.modules.losses(), ..self.counts }
    }

    /// Approximate heap size in bytes.
    pub fn memory_estimate(&self) -> usize {
        [
            self.processes.capacity().saturating_mul(size_of::<(ProcessKey, CachedProcess)>()),
            self.map_bytes,
            self.jit_bytes,
            self.modules.memory_estimate(),
            self.unwinder.memory_estimate(),
        ]
        .into_iter()
        .fold(0, usize::saturating_add)
    }

    fn lookup_or_insert(&mut self, key: ProcessKey) {
        self.clock = self.clock.saturating_add(1);
        self.processes.entry(key).or_default().used = self.clock;
        while self.processes.len() > MAX_PROCESSES && self.evict_oldest(key, |_| true) {}
    }

    fn walk(
        &mut self,
        key: ProcessKey,
        registers: Registers,
        stack_copy: &[u8],
        frame_pointers: &[u64],
    ) -> Option<UnwoundStack> {
        let Some(code) = self.processes.get(&key).and_then(|process| process.code.as_ref()) else {
            self.counts.gone = self.counts.gone.saturating_add(1);
            return None;
        };
        Some(self.unwinder.unwind(&mut self.modules, code, registers, stack_copy, frame_pointers))
    }

    /// The modules of the stack are in use. If one was closed, reading the mappings opens it again.
    fn mark_modules_used(&mut self, key: ProcessKey, stack: &UnwoundStack) {
        let now = Instant::now();
        let mut closed = false;
        let mut last = None;
        for id in stack.frames.iter().filter_map(|frame| frame.module) {
            if last.replace(id) != Some(id) {
                self.modules.mark_used(id, now);
                closed |= self.modules.get(id).is_some_and(Module::is_closed);
            }
        }
        if closed && self.may_reread(key) {
            self.read_maps(key);
        }
    }

    fn may_reread(&self, key: ProcessKey) -> bool {
        self.processes.get(&key).is_none_or(|process| process.code_backoff.is_due(REREAD_FIRST, REREAD))
    }

    /// False if the process has ended: what is cached of it stays.
    fn read_maps(&mut self, key: ProcessKey) -> bool {
        let Some(process) = self.processes.get_mut(&key) else { return false };
        if process.ended.is_some() {
            return false;
        }
        let Some(dir) = ProcDir::open(key.0, key.1) else { return false };
        process.code_backoff.note();
        self.counts.maps_read = self.counts.maps_read.saturating_add(1);
        let Some(bytes) = dir.read("maps", maps::MAX_BYTES) else { return false };
        let maps = Maps::parse(&bytes);
        let left_out = u64::try_from(maps.left_out()).unwrap_or(u64::MAX);
        self.counts.mappings_left_out = self.counts.mappings_left_out.saturating_add(left_out);
        let modules = maps.all().iter().map(|mapping| self.modules.lookup_or_insert(&dir, mapping)).collect();
        let code = MappedCode { maps, modules };
        self.map_bytes = self.map_bytes.saturating_add(code.memory_estimate());
        let before = process.code.replace(code);
        self.map_bytes = self.map_bytes.saturating_sub(before.map_or(0, |code| code.memory_estimate()));
        while self.map_bytes > MAX_MAP_BYTES && self.evict_oldest(key, |process| process.code.is_some()) {}
        true
    }

    /// Names the frames in code that the process wrote at run time.
    fn name_jit(&mut self, key: ProcessKey, stack: &mut UnwoundStack) {
        let mut unnamed = false;
        let Some(process) = self.processes.get(&key) else { return };
        for (at, frame) in stack.frames.iter_mut().enumerate().filter(|(_, frame)| frame.jit) {
            let inside = if at == 0 { frame.address } else { frame.address.wrapping_sub(1) };
            frame.name = process.jit.as_ref().and_then(|map| map.find(inside));
            unnamed |= frame.name.is_none();
        }
        if unnamed && process.jit_backoff.is_due(REREAD_JIT_FIRST, REREAD_JIT) && self.read_jit(key) {
            self.name_jit(key, stack);
        }
    }

    fn read_jit(&mut self, key: ProcessKey) -> bool {
        let Some(process) = self.processes.get_mut(&key) else { return false };
        process.jit_backoff.note();
        let known_bytes = process.jit.as_ref().map_or(0, PerfMap::file_bytes);
        let dir = ProcDir::open(key.0, key.1);
        let Some(map) = dir.and_then(|dir| PerfMap::read(&dir, known_bytes)) else { return false };
        self.counts.perf_maps_read = self.counts.perf_maps_read.saturating_add(1);
        self.jit_bytes = self.jit_bytes.saturating_add(map.memory_estimate());
        let before = process.jit.replace(map);
        self.jit_bytes = self.jit_bytes.saturating_sub(before.map_or(0, |map| map.memory_estimate()));
        while self.jit_bytes > MAX_JIT_BYTES && self.evict_oldest(key, |process| process.jit.is_some()) {}
        true
    }

    fn evict_oldest(&mut self, but: ProcessKey, with: impl Fn(&CachedProcess) -> bool) -> bool {
        let candidates = self.processes.iter().filter(|(key, process)| **key != but && with(process));
        let Some(key) = candidates.min_by_key(|(_, process)| process.used).map(|(key, _)| *key) else { return false };
        self.evict(key);
        self.counts.forgotten = self.counts.forgotten.saturating_add(1);
        true
    }

    fn evict(&mut self, key: ProcessKey) {
        if let Some(process) = self.processes.remove(&key) {
            self.map_bytes = self.map_bytes.saturating_sub(process.code.map_or(0, |code| code.memory_estimate()));
            self.jit_bytes = self.jit_bytes.saturating_sub(process.jit.map_or(0, |map| map.memory_estimate()));
        }
    }
}
