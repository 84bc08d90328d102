//! The processes whose stacks are turned into frames: their mapped code, kept while they live and a little longer.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::jit::PerfMap;
use super::maps::{self, Maps};
use super::modules::{Module, ModuleId, ModuleLosses, Modules, OpenModule};
use super::proc_dir::ProcDir;
use super::rule::Registers;
use super::unwind::{Code, Found, Stack, Unwinder};
use memtrace_incident::{Cut, Frame};

/// Processes whose code is known; beyond it the one that was not met for longest is forgotten.
pub const MAX_PROCESSES: usize = 1024;
/// Heap bytes of mappings of all processes.
const MAX_MAP_BYTES: usize = 8 << 20;
/// Heap bytes of names of code written at run time, of all processes.
const MAX_JIT_BYTES: usize = 8 << 20;
/// The mappings of a process are read at most so often because of an address that is not in them; of one whose mappings
/// were read but a few times, sooner: a program that starts maps its libraries one by one.
const REREAD: Duration = Duration::from_millis(100);
/// The first such reading may come this soon, every further one after twice the time.
const REREAD_FIRST: Duration = Duration::from_micros(500);
/// A perf map is read at most so often because of an address that is not in it; in the first moments sooner, since
/// compilers are busiest then.
const REREAD_JIT: Duration = Duration::from_secs(1);
/// The first such reading may come this soon, every further one after twice the time.
const REREAD_JIT_FIRST: Duration = Duration::from_millis(20);
/// A process that ended is kept so long: what it left in the rings is still to come.
const AFTERLIFE: Duration = Duration::from_secs(10);

/// A process by its id and its start (boot clock).
type Key = (u32, u64);

/// What was read, left out and refused.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Readings of /proc/PID/maps.
    pub maps_read: u64,
    /// Of them, because an address was not in what was known.
    pub maps_reread: u64,
    /// Readings of a perf map.
    pub perf_maps_read: u64,
    /// Stacks of processes that were gone before anything of them was known.
    pub gone: u64,
    /// Processes forgotten for want of room.
    pub forgotten: u64,
    /// Executable mappings left out, or not understood.
    pub mappings_left_out: u64,
    /// Of modules.
    pub modules: ModuleLosses,
}

/// The processes met, their modules, and the unwinder.
#[derive(Debug, Default)]
pub struct Processes {
    /// Cap: [`MAX_PROCESSES`].
    known: HashMap<Key, Known>,
    modules: Modules,
    unwinder: Unwinder,
    counts: Counts,
    clock: u64,
    /// Cap: [`MAX_MAP_BYTES`].
    map_bytes: usize,
    /// Cap: [`MAX_JIT_BYTES`].
    jit_bytes: usize,
}

#[derive(Debug, Default)]
struct Known {
    code: Option<Code>,
    /// Mappings changed since they were read.
    stale: bool,
    read: Pace,
    jit: Option<PerfMap>,
    jit_read: Pace,
    ended: Option<Instant>,
    used: u64,
}

/// How often something is read: soon again at first, then after pauses twice as long, up to a longest.
#[derive(Debug, Default)]
struct Pace {
    last: Option<Instant>,
    times: u32,
}

impl Pace {
    fn is_due(&self, first: Duration, longest: Duration) -> bool {
        let pause = first.saturating_mul(1 << self.times.min(16)).min(longest);
        self.last.is_none_or(|last| last.elapsed() >= pause)
    }

    fn note(&mut self) {
        self.last = Some(Instant::now());
        self.times = self.times.saturating_add(1);
    }
}

impl Processes {
    /// The process has a new program.
    pub fn exec(&mut self, pid: u32, start_boot_ns: u64) {
        let key = (pid, start_boot_ns);
        if let Some(used) = self.known.get(&key).map(|known| known.used) {
            self.forget(key);
            self.known.insert(key, Known { used, ..Known::default() });
        }
    }

    /// Reads the mappings of the process now, so that what it does next can be told even if it ends at once. True if it
    /// lives.
    pub fn alarm(&mut self, pid: u32, start_boot_ns: u64) -> bool {
        let key = (pid, start_boot_ns);
        self.meet(key);
        self.read_maps(key)
    }

    /// As [`Processes::alarm`], unless something of the process is known already.
    pub fn prefetch(&mut self, pid: u32, start_boot_ns: u64) {
        if self.known.get(&(pid, start_boot_ns)).is_none_or(|known| known.code.is_none()) {
            self.alarm(pid, start_boot_ns);
        }
    }

    /// Path and build id of a module.
    pub fn module(&self, id: ModuleId) -> Option<(String, Option<String>)> {
        let module = self.modules.get(id)?;
        Some((module.path.to_string(), module.build_id.as_ref().map(|id| id.to_string())))
    }

    /// The process mapped code: its mappings are read again with its next stack.
    pub fn mapped(&mut self, pid: u32, start_boot_ns: u64) {
        if let Some(known) = self.known.get_mut(&(pid, start_boot_ns)) {
            known.stale = true;
        }
    }

    /// The process ended.
    pub fn exit(&mut self, pid: u32, start_boot_ns: u64) {
        if let Some(known) = self.known.get_mut(&(pid, start_boot_ns)) {
            known.ended = Some(Instant::now());
        }
    }

    /// To be called about once a second: forgets who ended, closes what nobody needs.
    pub fn tick(&mut self) {
        let now = Instant::now();
        let over = |known: &Known| known.ended.is_some_and(|ended| now.saturating_duration_since(ended) > AFTERLIFE);
        let gone: Vec<Key> = self.known.iter().filter(|(_, known)| over(known)).map(|(key, _)| *key).collect();
        for key in gone {
            self.forget(key);
        }
        self.modules.close_idle(now);
    }

    /// The frames of a thread of the process, innermost first. `slice` is its stack from its stack pointer up, and is
    /// not kept; `frame_pointers` what the kernel walked, the instruction pointer first.
    pub fn unwind(
        &mut self,
        pid: u32,
        start_boot_ns: u64,
        registers: Registers,
        slice: &[u8],
        frame_pointers: &[u64],
    ) -> Stack {
        let key = (pid, start_boot_ns);
        self.meet(key);
        let fresh = self.known.get(&key).is_some_and(|known| known.code.is_some() && !known.stale);
        if !fresh {
            self.read_maps(key);
        }
        let mut stack = self.walk(key, registers, slice, frame_pointers);
        if stack.needs_maps && fresh && self.may_reread(key) && self.read_maps(key) {
            self.counts.maps_reread = self.counts.maps_reread.saturating_add(1);
            stack = self.walk(key, registers, slice, frame_pointers);
        }
        self.keep(key, &stack);
        self.name_jit(key, &mut stack);
        stack
    }

    /// The frames of a stack as the incident file has them, without names but those of code written at run time.
    pub fn frames(&self, stack: &Stack) -> Vec<Frame> {
        stack.frames.iter().map(|found| self.frame(found)).collect()
    }

    /// All modules whose content can be read now, to name frames with.
    pub fn open_modules(&self) -> Vec<OpenModule> {
        self.modules.open_modules()
    }

    /// What was read, left out and refused since the start.
    pub fn counts(&self) -> Counts {
        Counts { modules: self.modules.losses(), ..self.counts }
    }

    /// Heap bytes, about.
    pub fn memory_estimate(&self) -> usize {
        [
            self.known.capacity().saturating_mul(size_of::<(Key, Known)>()),
            self.map_bytes,
            self.jit_bytes,
            self.modules.memory_estimate(),
            self.unwinder.memory_estimate(),
        ]
        .into_iter()
        .fold(0, usize::saturating_add)
    }

    fn frame(&self, found: &Found) -> Frame {
        let module = found.module.and_then(|id| self.modules.get(id));
        let text = |text: &Arc<str>| text.to_string();
        if found.jit {
            return Frame {
                module: Some("[jit]".to_owned()),
                symbol: found.name.as_ref().map(text),
                ..Frame::default()
            };
        }
        Frame {
            module: module.map(|module| text(&module.path)),
            build_id: module.and_then(|module| module.build_id.as_ref().map(text)),
            offset: found.offset,
            ..Frame::default()
        }
    }

    fn meet(&mut self, key: Key) {
        self.clock = self.clock.saturating_add(1);
        self.known.entry(key).or_default().used = self.clock;
        while self.known.len() > MAX_PROCESSES && self.forget_oldest(key, |_| true) {}
    }

    fn walk(&mut self, key: Key, registers: Registers, slice: &[u8], frame_pointers: &[u64]) -> Stack {
        let Some(code) = self.known.get(&key).and_then(|known| known.code.as_ref()) else {
            self.counts.gone = self.counts.gone.saturating_add(1);
            return Stack { cut: Some(Cut::Gone), ..Stack::default() };
        };
        self.unwinder.unwind(&mut self.modules, code, registers, slice, frame_pointers)
    }

    /// The modules of the stack are in use; one that was closed is opened again by reading the mappings.
    fn keep(&mut self, key: Key, stack: &Stack) {
        let now = Instant::now();
        let mut closed = false;
        let mut last = None;
        for id in stack.frames.iter().filter_map(|found| found.module) {
            if last.replace(id) != Some(id) {
                self.modules.touch(id, now);
                closed |= self.modules.get(id).is_some_and(Module::is_closed);
            }
        }
        if closed && self.may_reread(key) {
            self.read_maps(key);
        }
    }

    fn may_reread(&self, key: Key) -> bool {
        self.known.get(&key).is_none_or(|known| known.read.is_due(REREAD_FIRST, REREAD))
    }

    /// False when the process is gone: then what is known of it stays.
    fn read_maps(&mut self, key: Key) -> bool {
        let Some(known) = self.known.get_mut(&key) else { return false };
        if known.ended.is_some() {
            return false;
        }
        let Some(dir) = ProcDir::open(key.0, key.1) else { return false };
        known.read.note();
        self.counts.maps_read = self.counts.maps_read.saturating_add(1);
        let Some(bytes) = dir.read("maps", maps::MAX_BYTES) else { return false };
        let maps = Maps::parse(&bytes);
        let left_out = u64::try_from(maps.left_out()).unwrap_or(u64::MAX);
        self.counts.mappings_left_out = self.counts.mappings_left_out.saturating_add(left_out);
        let modules = maps.all().iter().map(|mapping| self.modules.meet(&dir, mapping)).collect();
        let code = Code { maps, modules };
        self.map_bytes = self.map_bytes.saturating_add(code.memory_estimate());
        let before = known.code.replace(code);
        known.stale = false;
        self.map_bytes = self.map_bytes.saturating_sub(before.map_or(0, |code| code.memory_estimate()));
        while self.map_bytes > MAX_MAP_BYTES && self.forget_oldest(key, |known| known.code.is_some()) {}
        true
    }

    /// Names the frames that lie in code written at run time.
    fn name_jit(&mut self, key: Key, stack: &mut Stack) {
        let mut unnamed = false;
        let Some(known) = self.known.get(&key) else { return };
        for (at, found) in stack.frames.iter_mut().enumerate().filter(|(_, found)| found.jit) {
            let inside = if at == 0 { found.address } else { found.address.wrapping_sub(1) };
            found.name = known.jit.as_ref().and_then(|map| map.find(inside));
            unnamed |= found.name.is_none();
        }
        if unnamed && known.jit_read.is_due(REREAD_JIT_FIRST, REREAD_JIT) && self.read_jit(key) {
            self.name_jit(key, stack);
        }
    }

    fn read_jit(&mut self, key: Key) -> bool {
        let Some(known) = self.known.get_mut(&key) else { return false };
        known.jit_read.note();
        let known_bytes = known.jit.as_ref().map_or(0, PerfMap::file_bytes);
        let dir = ProcDir::open(key.0, key.1);
        let Some(map) = dir.and_then(|dir| PerfMap::read(&dir, known_bytes)) else { return false };
        self.counts.perf_maps_read = self.counts.perf_maps_read.saturating_add(1);
        self.jit_bytes = self.jit_bytes.saturating_add(map.memory_estimate());
        let before = known.jit.replace(map);
        self.jit_bytes = self.jit_bytes.saturating_sub(before.map_or(0, |map| map.memory_estimate()));
        while self.jit_bytes > MAX_JIT_BYTES && self.forget_oldest(key, |known| known.jit.is_some()) {}
        true
    }

    fn forget_oldest(&mut self, but: Key, with: impl Fn(&Known) -> bool) -> bool {
        let candidates = self.known.iter().filter(|(key, known)| **key != but && with(known));
        let Some(key) = candidates.min_by_key(|(_, known)| known.used).map(|(key, _)| *key) else { return false };
        self.forget(key);
        self.counts.forgotten = self.counts.forgotten.saturating_add(1);
        true
    }

    fn forget(&mut self, key: Key) {
        if let Some(known) = self.known.remove(&key) {
            self.map_bytes = self.map_bytes.saturating_sub(known.code.map_or(0, |code| code.memory_estimate()));
            self.jit_bytes = self.jit_bytes.saturating_sub(known.jit.map_or(0, |map| map.memory_estimate()));
        }
    }
}
