//! Attributes grown memory to stacks, by time, and states what grew without a stack.
//!
//! The kernel side reports the total growth of every address space, and every touch sample has the
//! part of it that it stands for. What no sample stands for is growth without a stack, so both
//! parts always add up to the kernel's figure. For example, total growth of 9 MiB with samples of
//! 4 MiB leaves 5 MiB without a stack, with a reason ([`NoStackReason`]), in the process and at the
//! time it grew.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use memtrace_common::event as wire;
use memtrace_incident::{Cause, Cut};

use crate::capacity;
use crate::decode::{known, printable};
use crate::input::{ModuleFound, PATH_TICKS, PathFound, StackFound};
use crate::world::ProcessKey;

mod modules;
mod no_stack;
mod paths;
mod report;

use modules::Modules;
use no_stack::NoStackReason;
use paths::Paths;

pub(crate) use paths::FRAMES_CAP;
pub(crate) use report::{FILE_PATHS, FILE_SAMPLES, Window};

/// Samples of all processes. At the cap samples of the same path that are close in time are joined,
/// then the oldest are dropped and counted.
const SAMPLES_CAP: usize = 65_536;
/// Processes that samples refer to; unused ones are dropped first.
const TASKS_CAP: usize = 32_768;
/// Address spaces whose growth is followed, more than the kernel side follows; new ones are
/// refused.
const SPACES_CAP: usize = 40_000;
/// Mappings of one address space, with the path that created each; the lowest is dropped.
const MAPPINGS_CAP: usize = 512;
/// Mappings of all address spaces; at the cap a new one replaces one of the same space.
const ALL_MAPPINGS_CAP: usize = 65_536;
/// Samples stay this much longer than an incident looks back, because it is built after its window.
const SLACK_NS: u64 = 15_000_000_000;
/// Samples of an address space that is gone may arrive this late, when the reader of stacks gets no
/// CPU.
const LATE_NS: u64 = 10_000_000_000;
/// Readings of one address space; the oldest is dropped.
const READINGS: usize = 64;
/// Growth counts as from outside when this many samples in a row do not stand for it. One sample is
/// not enough, because samples may arrive out of order.
const RECENT: usize = 16;
/// Samples, and processes, that memory is kept for.
const ROOM: usize = 1024;
/// Width of the buckets of time in which samples are joined first.
const JOIN_NS: u64 = 10_000_000;

/// Identifies an allocation path of the incident file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct PathKey {
    /// Number in `tasks`.
    task: u32,
    cause: Cause,
    path: u32,
    /// For `touch`: cause and path that created the mapping.
    mapped_by: Option<(Cause, u32)>,
}

/// One sample, or several that were joined. Without a path it is growth without a stack.
#[derive(Clone, Copy, Debug)]
struct Sample {
    boot_ns: u64,
    cgroup: u64,
    task: u32,
    of: Result<PathKey, NoStackReason>,
    weight: u64,
}

/// A process that grew memory, with the thread that was seen first.
#[derive(Clone, Debug)]
struct GrownTask {
    key: ProcessKey,
    tid: u32,
    comm: String,
}

/// The growth of one address space.
#[derive(Clone, Debug, Default)]
struct GrowthOfSpace {
    task: u32,
    cgroup: u64,
    /// Total growth as the kernel side reported it, bytes.
    grown: u64,
    grown_ns: u64,
    /// Time and total growth of the last readings that were higher than the one before. They give
    /// the growth at the end of an incident's window, which has passed when it is built. Cap:
    /// [`READINGS`].
    readings: VecDeque<(u64, u64)>,
    /// Sum of the weights of its touch samples, bytes.
    weights: u64,
    /// Growth that was attributed to [`NoStackReason::Outside`], bytes.
    outside: u64,
    /// Time of each of the last samples, and the growth that neither it nor an earlier one stands
    /// for. Cap: [`RECENT`].
    recent: VecDeque<(u64, u64)>,
    gone_ns: Option<u64>,
    /// End, cause and path by begin address. Cap: [`MAPPINGS_CAP`].
    mappings: BTreeMap<u64, (u64, Cause, u32)>,
}

/// State of attribution.
#[derive(Clone, Debug, Default)]
pub(crate) struct Attribution {
    modules: Modules,
    paths: Paths,
    /// Cap: [`TASKS_CAP`].
    tasks: BTreeMap<u32, GrownTask>,
    /// The same by process.
    task_of: BTreeMap<ProcessKey, u32>,
    next_task: u32,
    /// By address space and process. Cap: [`SPACES_CAP`].
    spaces: BTreeMap<(u64, ProcessKey), GrowthOfSpace>,
    /// Mappings of all address spaces. Cap: [`ALL_MAPPINGS_CAP`].
    mappings: usize,
    /// Oldest first. Cap: [`SAMPLES_CAP`].
    samples: VecDeque<Sample>,
    /// Ticks so far: the time that paths and modules are remembered for.
    ticks: u64,
    /// Samples that were joined with a neighbour since `samples` was last empty.
    joined: u64,
    /// Samples that were dropped at the cap because they could not be joined.
    pub(crate) dropped: u64,
}

impl Attribution {
    pub(crate) fn module(&mut self, found: &ModuleFound) {
        if self.modules.is_full_for(found.id) {
            self.modules.forget(&self.paths.modules(), self.ticks);
        }
        // Not escaped, because the symbolizer opens the module by this path. Reports escape it.
        self.modules.insert(found, self.ticks);
    }

    pub(crate) fn path(&mut self, found: &PathFound) {
        if self.paths.is_full_for(found.id) {
            self.forget_paths();
        }
        self.paths.insert(found, self.ticks);
        for module in found.frames.iter().filter_map(|frame| frame.module) {
            self.modules.mark_used(module, self.ticks);
        }
    }

    /// The paths that samples and mappings refer to.
    fn referred_paths(&self) -> BTreeSet<u32> {
        let path_keys = self.samples.iter().filter_map(|sample| sample.of.ok());
        let mut referred: BTreeSet<u32> = path_keys
            .flat_map(|path_key| [Some(path_key.path), path_key.mapped_by.map(|(_, path)| path)])
            .flatten()
            .collect();
        referred.extend(self.spaces.values().flat_map(|space| space.mappings.values().map(|(.., path)| *path)));
        referred
    }

    /// Makes room for a path. Samples of paths that are dropped for it are without a stack.
    fn forget_paths(&mut self) {
        self.paths.forget(&self.referred_paths(), self.ticks.saturating_sub(PATH_TICKS));
        for sample in &mut self.samples {
            if sample.of.is_ok_and(|path_key| self.paths.get(path_key.path).is_none()) {
                sample.of = Err(NoStackReason::NotKept);
            }
        }
    }

    /// Resident memory moved: takes the total growth of its address space.
    pub(crate) fn rss(&mut self, r: &wire::RssChange) {
        let Some(grown) = known(r.grown_bytes) else { return };
        let key = (r.task.tgid, r.task.start_boot_ns);
        if r.reason == wire::RSS_FIRST {
            // The address space that had this identity before is gone.
            self.end_spaces_of(r.mm_id, |old, _| old != key);
        }
        let task = self.task(key, r.task.tid, || crate::world::comm(&r.task));
        // After exec the first records still have the name of the program before.
        if let Some(task) = self.tasks.get_mut(&task)
            && task.comm.as_bytes() != r.task.comm.split(|byte| *byte == 0).next().unwrap_or_default()
        {
            task.comm = crate::world::comm(&r.task);
        }
        let Some(space) = self.space(r.mm_id, key, task) else { return };
        space.read(r.header.boot_ns, grown);
        if let Some(id) = crate::decode::cgroup_id(r.memcg.cgroup_id) {
            space.cgroup = id;
        }
        // Memory that it begins with was not touched by a stack of its own.
        if r.reason == wire::RSS_FIRST && grown > 0 && space.outside == 0 && space.weights == 0 {
            space.outside = grown;
            let (boot_ns, cgroup) = (r.header.boot_ns, space.cgroup);
            self.push(Sample { boot_ns, cgroup, task, of: Err(NoStackReason::Outside), weight: grown });
        }
    }

    /// An address space was torn down. It stays for [`LATE_NS`], for samples that arrive late.
    pub(crate) fn mm_gone(&mut self, r: &wire::MmGone) {
        let key = (r.task.tgid, r.task.start_boot_ns);
        if let Some(space) = self.spaces.get_mut(&(r.mm_id, key)) {
            if let Some(grown) = known(r.grown_bytes) {
                space.read(r.header.boot_ns, grown);
            }
            space.gone_ns = Some(r.header.boot_ns);
        }
    }

    /// Takes a sample.
    pub(crate) fn stack(&mut self, found: &StackFound) {
        let key = (found.pid, found.start_boot_ns);
        let task = self.task(key, found.tid, || printable(found.comm.as_bytes()));
        let mut of = self.path_key(task, found);
        if found.cause != Cause::Charge
            && let Some(space) = self.space(found.mm_id, key, task)
        {
            space.cgroup = found.cgroup_id;
            if found.cause == Cause::Touch {
                let outside = space.sampled(found);
                let mapped_by = found.address.and_then(|address| space.made_by(address));
                if let Some((boot_ns, weight)) = outside {
                    self.push(Sample {
                        boot_ns,
                        cgroup: found.cgroup_id,
                        task,
                        of: Err(NoStackReason::Outside),
                        weight,
                    });
                }
                of = of.map(|path_key| PathKey { mapped_by, ..path_key });
            } else if let (Ok(path_key), Some(address)) = (of, found.address) {
                self.mapped(found.mm_id, key, (address, found.size_bytes), (path_key.cause, path_key.path));
            }
        }
        let sample = Sample { boot_ns: found.boot_ns, cgroup: found.cgroup_id, task, of, weight: found.weight_bytes };
        // Only growth of resident memory is stated without a stack. For other causes the sample is
        // dropped.
        if found.cause == Cause::Touch || of.is_ok() {
            self.push(sample);
        }
    }

    fn path_key(&mut self, task: u32, found: &StackFound) -> Result<PathKey, NoStackReason> {
        let path = self.paths.get_used(found.path, self.ticks).ok_or(NoStackReason::NotKept)?;
        if path.frames.iter().all(|frame| frame.kernel) {
            return Err(if path.cut == Some(Cut::Gone) { NoStackReason::Gone } else { NoStackReason::Unreadable });
        }
        Ok(PathKey { task, cause: found.cause, path: found.path, mapped_by: None })
    }

    /// The number of a process, which is inserted when it has none.
    fn task(&mut self, key: ProcessKey, tid: u32, comm: impl FnOnce() -> String) -> u32 {
        if let Some(task) = self.task_of.get(&key) {
            return *task;
        }
        if self.tasks.len() >= TASKS_CAP {
            self.forget_tasks();
        }
        let number = self.next_task;
        self.next_task = self.next_task.wrapping_add(1);
        self.tasks.insert(number, GrownTask { key, tid, comm: comm() });
        self.task_of.insert(key, number);
        number
    }

    /// Drops processes that no sample and no address space refers to, then the oldest at the cap.
    fn forget_tasks(&mut self) {
        let mut used: BTreeSet<u32> = self.samples.iter().map(|sample| sample.task).collect();
        used.extend(self.spaces.values().map(|space| space.task));
        self.tasks.retain(|task, _| used.contains(task));
        while self.tasks.len() >= TASKS_CAP {
            self.tasks.pop_first();
        }
        let tasks = &self.tasks;
        self.task_of.retain(|_, task| tasks.contains_key(task));
    }

    /// The address space of a record, which is inserted when it is new; `None` when the cap is
    /// reached.
    fn space(&mut self, mm_id: u64, key: ProcessKey, task: u32) -> Option<&mut GrowthOfSpace> {
        if self.spaces.len() >= SPACES_CAP && !self.spaces.contains_key(&(mm_id, key)) {
            return None;
        }
        Some(self.spaces.entry((mm_id, key)).or_insert_with(|| GrowthOfSpace { task, ..GrowthOfSpace::default() }))
    }

    /// Stores the path that created a mapping, in place of mappings that it covers.
    fn mapped(&mut self, mm_id: u64, key: ProcessKey, (begin, size): (u64, u64), by: (Cause, u32)) {
        let full = self.mappings >= ALL_MAPPINGS_CAP;
        let Some(space) = self.spaces.get_mut(&(mm_id, key)) else { return };
        let before = space.mappings.len();
        let end = begin.saturating_add(size);
        let over: Vec<u64> = space.mappings.range(begin..end).map(|(at, _)| *at).collect();
        over.iter().for_each(|at| {
            space.mappings.remove(at);
        });
        if let Some((_, last)) = space.mappings.range_mut(..begin).next_back() {
            last.0 = last.0.min(begin);
        }
        if space.mappings.len() >= MAPPINGS_CAP || full {
            space.mappings.pop_first();
        }
        space.mappings.insert(begin, (end, by.0, by.1));
        self.mappings = self.mappings.saturating_add(space.mappings.len()).saturating_sub(before);
    }

    fn push(&mut self, sample: Sample) {
        // Stacks arrive slightly out of order, so the place is nearly always at the end.
        let later = self.samples.iter().rev().take_while(|other| other.boot_ns > sample.boot_ns).count();
        let at = self.samples.len().saturating_sub(later);
        self.samples.insert(at, sample);
        if self.samples.len() >= SAMPLES_CAP {
            self.make_room();
        }
    }

    /// Makes room for samples: joins those of the same path that are close in time. When that does
    /// not help, because there are too many processes and paths as in a fork storm, the oldest
    /// quarter is dropped. Otherwise every further sample would search for neighbours again.
    fn make_room(&mut self) {
        let mut samples: Vec<Sample> = std::mem::take(&mut self.samples).into();
        self.joined = self.joined.saturating_add(join(&mut samples, SAMPLES_CAP / 2));
        let most = SAMPLES_CAP / 4 * 3;
        if samples.len() > most {
            let oldest = samples.len() - most;
            samples.drain(..oldest);
            self.dropped = self.dropped.saturating_add(oldest as u64);
        }
        self.samples = samples.into();
    }

    /// Drops samples that no incident can need any more, and ends address spaces that are gone.
    pub(crate) fn tick(&mut self, now: u64, before_ns: u64, recorded_since: Option<u64>) {
        self.ticks = self.ticks.saturating_add(1);
        let oldest = now.saturating_sub(before_ns.saturating_add(SLACK_NS)).min(recorded_since.unwrap_or(u64::MAX));
        while self.samples.front().is_some_and(|sample| sample.boot_ns < oldest) {
            self.samples.pop_front();
        }
        if self.samples.is_empty() {
            self.joined = 0;
        }
        self.end_spaces(|_, space| space.gone_ns.is_some_and(|gone| gone.saturating_add(LATE_NS) < now));
    }

    /// After many processes have come and gone their memory is given back.
    pub(crate) fn tidy(&mut self) {
        capacity::shrink(&mut self.samples, ROOM);
        if self.tasks.len() > ROOM {
            self.forget_tasks();
        }
        let oldest = self.ticks.saturating_sub(PATH_TICKS);
        if self.paths.may_have_unused(oldest) {
            self.paths.forget_unused(&self.referred_paths(), oldest);
            self.modules.forget_unused(&self.paths.modules(), oldest);
        }
    }

    fn end_spaces_of(&mut self, mm_id: u64, which: impl Fn(ProcessKey, &GrowthOfSpace) -> bool) {
        let range = (mm_id, (0, 0))..=(mm_id, (u32::MAX, u64::MAX));
        let done = self.spaces.range(range).filter(|((_, key), space)| which(*key, space));
        let done: Vec<(u64, ProcessKey)> = done.map(|(id, _)| *id).collect();
        self.end(&done);
    }

    fn end_spaces(&mut self, which: impl Fn(ProcessKey, &GrowthOfSpace) -> bool) {
        let done = self.spaces.iter().filter(|((_, key), space)| which(*key, space));
        let done: Vec<(u64, ProcessKey)> = done.map(|(id, _)| *id).collect();
        self.end(&done);
    }

    /// Ends address spaces that get no more records. Their remaining growth becomes a sample
    /// without a stack.
    fn end(&mut self, done: &[(u64, ProcessKey)]) {
        for id in done {
            let Some(space) = self.spaces.remove(id) else { continue };
            self.mappings = self.mappings.saturating_sub(space.mappings.len());
            if let Some(sample) = space.pending() {
                self.push(sample);
            }
        }
    }

    pub(crate) fn memory_estimate(&self) -> usize {
        let of_space = |space: &GrowthOfSpace| (space.readings.capacity() + space.recent.capacity()) * 16;
        self.samples.capacity() * size_of::<Sample>()
            + self.paths.memory_estimate()
            + self.modules.memory_estimate()
            + self.tasks.len() * 128
            + self.spaces.len() * (size_of::<GrowthOfSpace>() + 48)
            + self.spaces.values().map(of_space).sum::<usize>()
            + self.mappings * 48
    }
}

impl GrowthOfSpace {
    /// Cause and path that created the mapping at an address.
    fn made_by(&self, address: u64) -> Option<(Cause, u32)> {
        let (_, (end, cause, path)) = self.mappings.range(..=address).next_back()?;
        (address < *end).then_some((*cause, *path))
    }

    /// Takes a touch sample. Returns time and bytes of growth from outside, if some is certain now.
    fn sampled(&mut self, found: &StackFound) -> Option<(u64, u64)> {
        self.read(found.boot_ns, found.grown_bytes);
        self.weights = self.weights.saturating_add(found.weight_bytes);
        let accounted = self.weights.saturating_add(self.outside);
        self.recent.push_back((found.boot_ns, found.grown_bytes.saturating_sub(accounted)));
        if self.recent.len() < RECENT {
            return None;
        }
        let certain = self.recent.iter().map(|(_, unaccounted)| *unaccounted).min().unwrap_or(0);
        let (boot_ns, _) = self.recent.pop_front()?;
        if certain == 0 {
            return None;
        }
        self.outside = self.outside.saturating_add(certain);
        self.recent.iter_mut().for_each(|(_, unaccounted)| *unaccounted = unaccounted.saturating_sub(certain));
        Some((boot_ns, certain))
    }

    /// Takes the total growth at a moment, as the kernel side reported it.
    fn read(&mut self, boot_ns: u64, grown: u64) {
        if grown <= self.grown {
            return;
        }
        (self.grown, self.grown_ns) = (grown, self.grown_ns.max(boot_ns));
        if self.readings.len() >= READINGS {
            self.readings.pop_front();
        }
        self.readings.push_back((self.grown_ns, grown));
    }

    /// Growth up to a moment that no sample stands for; `later` is the weight of samples after it.
    fn pending_at(&self, until_ns: u64, later: u64) -> Option<Sample> {
        let (boot_ns, grown) = self.readings.iter().rev().find(|(ns, _)| *ns <= until_ns)?;
        let accounted = self.weights.saturating_add(self.outside).saturating_sub(later);
        let weight = grown.saturating_sub(accounted);
        let (boot_ns, cgroup, task) = (*boot_ns, self.cgroup, self.task);
        (weight > 0).then_some(Sample { boot_ns, cgroup, task, of: Err(NoStackReason::Pending), weight })
    }

    /// Growth since the last sample.
    fn pending(&self) -> Option<Sample> {
        let weight = self.grown.saturating_sub(self.weights.saturating_add(self.outside));
        let (boot_ns, cgroup, task) = (self.grown_ns, self.cgroup, self.task);
        (weight > 0).then_some(Sample { boot_ns, cgroup, task, of: Err(NoStackReason::Pending), weight })
    }
}

/// Joins samples of the same path within ever wider buckets of time, until at most `most` are left
/// or each path has only one. Samples stay sorted by time, and no byte is lost. Returns how many
/// were joined.
fn join(samples: &mut Vec<Sample>, most: usize) -> u64 {
    let before = samples.len();
    let ns = |sample: Option<&Sample>| sample.map_or(0, |sample| sample.boot_ns);
    let span_ns = ns(samples.last()).saturating_sub(ns(samples.first()));
    let mut width_ns = JOIN_NS;
    while samples.len() > most {
        let mut last: BTreeMap<(u64, u32, Result<PathKey, NoStackReason>, u64), usize> = BTreeMap::new();
        let mut kept: Vec<Sample> = Vec::with_capacity(samples.len());
        for sample in samples.iter() {
            let key = (sample.cgroup, sample.task, sample.of, sample.boot_ns / width_ns);
            match last.get(&key).and_then(|at| kept.get_mut(*at)) {
                Some(other) => other.weight = other.weight.saturating_add(sample.weight),
                None => {
                    last.insert(key, kept.len());
                    kept.push(*sample);
                }
            }
        }
        *samples = kept;
        // Buckets begin at multiples of their width, so one that is wider than the span may end
        // inside it.
        if width_ns == u64::MAX {
            break;
        }
        width_ns = if width_ns > span_ns { u64::MAX } else { width_ns.saturating_mul(8) };
    }
    (before.saturating_sub(samples.len())) as u64
}

#[cfg(test)]
mod tests;
