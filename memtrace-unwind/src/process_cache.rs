//! The processes whose stacks are unwound: their mapped code, cached while they live and a little
//! longer.
//!
//! A stack means nothing without the mappings of its process, and a process may end right after
//! its sample was taken. So mappings are read at the first sample, and again when an address is
//! met that they do not hold (a library was loaded since). Reading them costs up to a millisecond,
//! so repeated readings back off. The files behind them are opened with the mappings if they are
//! few, else when a frame lies in them: a program may map thousands. What is known of a process that
//! ended stays for [`KEEP_AFTER_EXIT`]: its last samples are still in the ring.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

use crate::backoff::Backoff;
use crate::gate::{Gate, GateCounts, Place, ProcessKey, Refused};
use crate::maps::{self, Maps};
use crate::modules::{Module, ModuleId, ModuleLosses, Modules, OpenModule, Reader};
use crate::perf_map::PerfMap;
use crate::proc_dir::{Credentials, ProcDir, owner_of};
use crate::rule::Registers;
use crate::unwind::{MAX_WORK, MappedCode, MappedModule, Unwinder, UnwoundStack};

mod room;
#[cfg(test)]
mod tests;

/// Bytes of the names that a stack has of its process: each may have a kilobyte, and there may be as
/// many as frames. Further frames have none.
pub const MAX_NAME_BYTES: usize = 32 << 10;
/// Most processes cached; beyond it those are evicted that `room` finds.
pub const MAX_PROCESSES: usize = 1024;
/// Heap bytes of the mappings of all processes.
const MAX_MAP_BYTES: usize = 8 << 20;
/// Heap bytes of the perf maps of all processes.
const MAX_JIT_BYTES: usize = 8 << 20;
/// Mapped files that are opened with the mappings; of a process with more, each is opened when a
/// frame lies in it.
const OPENED_AT_ONCE: usize = 64;
/// Files looked at for one stack.
const MAX_LOOKED_AT: usize = 64;
/// Processes that are looked at in each [`ProcessCache::tick`] for having ended unnoticed.
const CHECKED_PER_TICK: usize = 8;
/// Longest pause between two readings of a process' mappings because of an unknown address.
const REREAD: Duration = Duration::from_millis(100);
/// First such pause; each one doubles it. A program that starts maps its libraries one by one.
const REREAD_FIRST: Duration = Duration::from_micros(500);
/// Longest pause between two readings of a perf map because of an unknown address.
const REREAD_JIT: Duration = Duration::from_secs(1);
/// First such pause; each one doubles it. Compilers are busiest in the first moments.
const REREAD_JIT_FIRST: Duration = Duration::from_millis(20);
/// Processes that are known to have replaced their program; beyond it the older ones are forgotten.
const MAX_EXECS: usize = 4096;
/// No sample waits for longer before it is unwound, nanoseconds.
const LATE_NS: u64 = 30_000_000_000;
/// How long a process that ended stays cached.
pub const KEEP_AFTER_EXIT: Duration = Duration::from_secs(10);

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
    /// Readings that were refused or put off.
    pub gate: GateCounts,
}

/// A process when a sample of it was taken.
#[derive(Clone, Copy, Debug)]
pub struct SampleMoment {
    /// The process.
    pub process: ProcessKey,
    /// Identifies its address space, if that is known: with another one it runs another program.
    pub mm_id: Option<u64>,
    /// Boot clock, nanoseconds.
    pub boot_ns: u64,
}

impl SampleMoment {
    /// Now, whatever the process runs.
    pub fn now(process: ProcessKey) -> Self {
        Self { process, mm_id: None, boot_ns: u64::MAX }
    }
}

/// Processes, their modules, and the unwinder that all of them share.
#[derive(Debug, Default)]
pub struct ProcessCache {
    /// Cap: [`MAX_PROCESSES`].
    processes: HashMap<ProcessKey, CachedProcess>,
    modules: Modules,
    unwinder: Unwinder,
    /// When processes replaced their program last, boot clock. Cap: [`MAX_EXECS`].
    execs: HashMap<ProcessKey, u64>,
    counts: CacheCounts,
    clock: u64,
    /// Cap: [`MAX_MAP_BYTES`].
    map_bytes: usize,
    /// Cap: [`MAX_JIT_BYTES`].
    jit_bytes: usize,
}

#[derive(Debug, Default)]
struct CachedProcess {
    /// Identity of the address space that is cached, as samples have it; `None` before the first.
    mm_id: Option<u64>,
    credentials: Arc<Credentials>,
    code: Option<MappedCode>,
    /// When it was read, boot clock; 0: not yet.
    read_ns: u64,
    code_backoff: Backoff,
    jit: Option<PerfMap>,
    jit_backoff: Backoff,
    ended: Option<Instant>,
    /// Order of use, for eviction.
    used: u64,
    /// Order in which processes were looked at for having ended.
    checked: u64,
}

impl ProcessCache {
    /// No process; files are read through `gate`.
    pub fn new(gate: Gate) -> Self {
        Self { modules: Modules::new(gate), ..Self::default() }
    }

    /// Leaves these files alone from now on, in place of others.
    pub fn refuse(&mut self, refused: Refused) {
        self.modules.gate.refuse(refused);
    }

    /// The process has replaced its program at `boot_ns`: what was known of it is wrong, and what its
    /// stacks from before mean is known no more.
    pub fn exec(&mut self, key: ProcessKey, boot_ns: u64) {
        if self.execs.len() >= MAX_EXECS {
            self.execs.retain(|_, exec_ns| boot_ns.saturating_sub(*exec_ns) < LATE_NS);
        }
        if self.execs.len() >= MAX_EXECS {
            self.execs.clear();
        }
        let last = self.execs.entry(key).or_default();
        *last = boot_ns.max(*last);
        if self.processes.get(&key).is_some_and(|process| process.read_ns < boot_ns) {
            self.begin_anew(key);
        }
    }

    fn begin_anew(&mut self, key: ProcessKey) {
        if let Some((used, ended)) = self.processes.get(&key).map(|process| (process.used, process.ended)) {
            self.evict(key);
            self.processes.insert(key, CachedProcess { used, ended, ..CachedProcess::default() });
        }
    }

    /// Reads the mappings of the process now, unless they are known, so that its stacks can be
    /// unwound even if it ends at once. False if it has ended already.
    pub fn prefetch(&mut self, key: ProcessKey) -> bool {
        if self.processes.get(&key).is_some_and(|process| process.code.is_some()) {
            return true;
        }
        self.lookup_or_insert(key);
        let read = self.read_maps(key);
        self.modules.gate.rest();
        read
    }

    /// Path and build id (lower-case hex) of a module.
    pub fn module(&self, id: ModuleId) -> Option<(String, Option<String>)> {
        let module = self.modules.get(id)?;
        Some((module.path.to_string(), module.build_id.as_ref().map(|id| id.to_string())))
    }

    /// The process ended: it stays cached for [`KEEP_AFTER_EXIT`].
    pub fn exit(&mut self, key: ProcessKey) {
        if let Some(process) = self.processes.get_mut(&key) {
            process.ended.get_or_insert_with(Instant::now);
        }
    }

    /// Evicts processes that ended a while ago, and closes files that are idle, or that no process
    /// maps for `keep_files` by now. Call it about once a second.
    pub fn tick(&mut self, keep_files: Duration) {
        let now = Instant::now();
        self.find_ended(now);
        let over = |process: &CachedProcess| {
            process.ended.is_some_and(|ended| now.saturating_duration_since(ended) > KEEP_AFTER_EXIT)
        };
        let gone: Vec<ProcessKey> =
            self.processes.iter().filter(|(_, process)| over(process)).map(|(key, _)| *key).collect();
        for key in gone {
            self.evict(key);
        }
        if self.modules.holds_files() {
            let live = self.processes.values().filter(|process| process.ended.is_none());
            let slots = live.filter_map(|process| process.code.as_ref()).flat_map(|code| &code.modules);
            // There may be very many, most of them in files that cannot be closed: they were never open.
            let is_open = |id: &ModuleId| self.modules.get(*id).is_some_and(|module| module.file().is_some());
            let mut last = None;
            let ids = slots.filter_map(|slot| slot.read_module()).filter(|id| last.replace(*id) != Some(*id));
            let mapped: HashSet<ModuleId> = ids.filter(is_open).collect();
            self.modules.close_unused(&mapped, keep_files, now);
        }
    }

    /// Looks whether those used longest ago have ended: word of it may have been lost.
    fn find_ended(&mut self, now: Instant) {
        let mut live: Vec<(u64, ProcessKey)> = self
            .processes
            .iter()
            .filter(|(_, process)| process.ended.is_none())
            .map(|(key, process)| (process.checked, *key))
            .collect();
        live.sort_unstable();
        for (_, key) in live.into_iter().take(CHECKED_PER_TICK) {
            self.clock = self.clock.saturating_add(1);
            let clock = self.clock;
            if let Some(process) = self.processes.get_mut(&key) {
                process.checked = clock;
                if ProcDir::open(key.0, key.1).is_none() {
                    process.ended = Some(now);
                }
            }
        }
    }

    /// The frames of a thread of the process at this moment, innermost first. `stack_copy` is its stack
    /// from its stack pointer up; it is not kept. `frame_pointers` is the chain that the kernel walked,
    /// the instruction pointer first. `None`: the process had ended or replaced its program before its
    /// mappings could be read, or they are not read.
    pub fn unwind(
        &mut self,
        process: SampleMoment,
        registers: Registers,
        stack_copy: &[u8],
        frame_pointers: &[u64],
    ) -> Option<UnwoundStack> {
        let stack = self.read_and_walk(process, registers, stack_copy, frame_pointers);
        self.modules.gate.rest();
        stack
    }

    fn read_and_walk(
        &mut self,
        SampleMoment { process: key, mm_id, boot_ns }: SampleMoment,
        registers: Registers,
        stack_copy: &[u8],
        frame_pointers: &[u64],
    ) -> Option<UnwoundStack> {
        if self.execs.get(&key).is_some_and(|exec_ns| boot_ns < *exec_ns) {
            self.counts.gone = self.counts.gone.saturating_add(1);
            return None;
        }
        self.lookup_or_insert(key);
        let known = self.processes.get(&key).and_then(|process| process.mm_id);
        if let (Some(known), Some(mm_id)) = (known, mm_id)
            && known != mm_id
        {
            self.begin_anew(key);
        }
        if let Some(process) = self.processes.get_mut(&key) {
            process.mm_id = mm_id.or(process.mm_id);
        }
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

    /// The process of the last stack pays for what was done with it since.
    pub fn settle(&mut self) {
        self.modules.gate.settle();
    }

    /// All modules whose content can be read now: frames are named from it.
    pub fn open_modules(&self) -> Vec<OpenModule> {
        self.modules.open_modules()
    }

    /// What was read, left out and evicted since the start.
    pub fn counts(&self) -> CacheCounts {
        CacheCounts { modules: self.modules.losses(), gate: self.modules.gate.counts(), ..self.counts }
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
        self.modules.gate.set_process(key);
        let process = self.processes.entry(key).or_default();
        process.used = self.clock;
        self.modules.gate.set_user(process.credentials.user().or_else(|| owner_of(key.0)));
        self.make_room_for_processes(key);
    }

    /// Walks the stack, and again while that finds modules that can be opened.
    fn walk(
        &mut self,
        key: ProcessKey,
        registers: Registers,
        stack_copy: &[u8],
        frame_pointers: &[u64],
    ) -> Option<UnwoundStack> {
        let (mut looked_at, mut work) = (0, MAX_WORK);
        loop {
            if looked_at > 0 {
                self.modules.gate.settle();
            }
            work = work.min(self.modules.gate.work());
            let Some(code) = self.processes.get(&key).and_then(|process| process.code.as_ref()) else {
                self.counts.gone = self.counts.gone.saturating_add(1);
                return None;
            };
            let stack = self.unwinder.unwind(&mut self.modules, code, registers, stack_copy, frame_pointers, &mut work);
            looked_at += 1;
            match stack.needs_module {
                Some(index) if looked_at < MAX_LOOKED_AT && self.look_at(key, index) => {}
                _ => return Some(stack),
            }
        }
    }

    /// Opens the file of a mapping, or takes note of its path if it cannot be opened now. True if
    /// that is more than was known.
    fn look_at(&mut self, key: ProcessKey, index: usize) -> bool {
        let Some(process) = self.processes.get_mut(&key) else { return false };
        let Some(code) = process.code.as_mut() else { return false };
        let (Some(mapping), Some(slot)) = (code.maps.all().get(index), code.modules.get_mut(index)) else {
            return false;
        };
        let dir =
            if process.ended.is_none() && self.modules.gate.affords() { ProcDir::open(key.0, key.1) } else { None };
        let dir = dir.map(Arc::new);
        let found = match &dir {
            Some(dir) => self
                .modules
                .lookup_or_insert(&Reader { dir: dir.clone(), credentials: process.credentials.clone() }, mapping),
            None => self.modules.unread(mapping),
        };
        let before = std::mem::replace(slot, found);
        before == MappedModule::Unknown || found != before
    }

    /// The modules of the stack are in use. Those that were closed are opened again.
    fn mark_modules_used(&mut self, key: ProcessKey, stack: &UnwoundStack) {
        let now = Instant::now();
        let mut closed = Vec::new();
        let mut last = None;
        for id in stack.frames.iter().filter_map(|frame| frame.module) {
            if last.replace(id) != Some(id) {
                self.modules.mark_used(id, now);
                if self.modules.get(id).is_some_and(Module::is_closed) && !closed.contains(&id) {
                    closed.push(id);
                }
            }
        }
        if closed.is_empty() || !self.may_reread(key) {
            return;
        }
        let slots = self.processes.get_mut(&key).and_then(|process| {
            process.code_backoff.note();
            Some(&process.code.as_ref()?.modules)
        });
        let is_closed = |slot: &MappedModule| slot.module().is_some_and(|id| closed.contains(&id));
        let indexes: Vec<usize> = slots
            .into_iter()
            .flat_map(|slots| slots.iter().enumerate().filter(|(_, slot)| is_closed(slot)).map(|(index, _)| index))
            .take(MAX_LOOKED_AT)
            .collect();
        for index in indexes {
            self.look_at(key, index);
        }
    }

    fn may_reread(&self, key: ProcessKey) -> bool {
        self.processes.get(&key).is_none_or(|process| process.code_backoff.is_due(REREAD_FIRST, REREAD))
    }

    /// False if the process has ended or is not read now: what is cached of it stays.
    fn read_maps(&mut self, key: ProcessKey) -> bool {
        let Some(process) = self.processes.get_mut(&key) else { return false };
        if process.ended.is_some() {
            return false;
        }
        let open = move || {
            let dir = ProcDir::open(key.0, key.1)?;
            let credentials = dir.credentials()?;
            Some((Arc::new(dir), Arc::new(credentials)))
        };
        let Some(Some((dir, credentials))) = self.modules.gate.pass(Place::Proc, open) else { return false };
        // Known before anything is read that may hang: mappings wait for whoever changes them.
        self.modules.gate.set_user(credentials.user());
        let read_ns = boot_ns();
        let of = dir.clone();
        let read = move || of.read("maps", maps::MAX_BYTES).map(|bytes| Maps::parse(&bytes));
        let Some(Some(maps)) = self.modules.gate.pass(Place::Proc, read) else { return false };
        process.code_backoff.note();
        self.counts.maps_read = self.counts.maps_read.saturating_add(1);
        let left_out = u64::try_from(maps.left_out()).unwrap_or(u64::MAX);
        self.counts.mappings_left_out = self.counts.mappings_left_out.saturating_add(left_out);
        let of = dir.clone();
        if maps.all().iter().any(|mapping| self.modules.is_unknown_file_system(mapping))
            && let Some(found) = self.modules.gate.pass(Place::Proc, move || of.file_systems())
        {
            self.modules.learn_file_systems(found);
        }
        let few = maps.all().iter().filter(|mapping| mapping.has_file()).count() <= OPENED_AT_ONCE;
        let reader = Reader { dir, credentials: credentials.clone() };
        let modules = maps
            .all()
            .iter()
            .map(|mapping| match few && self.modules.gate.affords() {
                true => self.modules.lookup_or_insert(&reader, mapping),
                false => MappedModule::Unknown,
            })
            .collect();
        let code = MappedCode { maps, modules };
        self.map_bytes = self.map_bytes.saturating_add(code.memory_estimate());
        (process.credentials, process.read_ns) = (credentials, read_ns);
        let before = process.code.replace(code);
        self.map_bytes = self.map_bytes.saturating_sub(before.map_or(0, |code| code.memory_estimate()));
        self.make_room_for_maps(key);
        true
    }

    /// Names the frames in code that the process wrote at run time.
    fn name_jit(&mut self, key: ProcessKey, stack: &mut UnwoundStack) {
        let (mut unnamed, mut bytes) = (false, 0_usize);
        let Some(process) = self.processes.get(&key) else { return };
        for (at, frame) in stack.frames.iter_mut().enumerate().filter(|(_, frame)| frame.jit) {
            let inside = if at == 0 { frame.address } else { frame.address.wrapping_sub(1) };
            let name = process.jit.as_ref().and_then(|map| map.find(inside));
            unnamed |= name.is_none();
            bytes = bytes.saturating_add(name.as_ref().map_or(0, |name| name.len()));
            frame.name = name.filter(|_| bytes <= MAX_NAME_BYTES);
        }
        if unnamed && process.jit_backoff.is_due(REREAD_JIT_FIRST, REREAD_JIT) && self.read_jit(key) {
            self.name_jit(key, stack);
        }
    }

    fn read_jit(&mut self, key: ProcessKey) -> bool {
        let Some(process) = self.processes.get_mut(&key) else { return false };
        if process.ended.is_some() {
            return false;
        }
        process.jit_backoff.note();
        let map = process.jit.get_or_insert_default();
        let (before, position, credentials) = (map.memory_estimate(), map.position(), process.credentials.clone());
        let read = move || position.read_on(&ProcDir::open(key.0, key.1)?, &credentials);
        let grown = self.modules.gate.pass(Place::Path, read).flatten().is_some_and(|new| map.take(new));
        let bytes = map.memory_estimate();
        self.jit_bytes = self.jit_bytes.saturating_sub(before).saturating_add(bytes);
        self.counts.perf_maps_read = self.counts.perf_maps_read.saturating_add(u64::from(grown));
        self.make_room_for_jit(key);
        grown
    }
}

/// Time since boot, suspended time included: the clock of samples.
fn boot_ns() -> u64 {
    let time = clock_gettime(ClockId::Boottime);
    let whole = u64::try_from(time.tv_sec).unwrap_or(0).saturating_mul(1_000_000_000);
    whole.saturating_add(u64::try_from(time.tv_nsec).unwrap_or(0))
}
