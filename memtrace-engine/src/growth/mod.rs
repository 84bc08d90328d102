//! Who grew memory: stacks by time, what they add up to, and what grew without one.
//!
//! Of every address space the kernel side tells how much it has grown in all, and every touch sample how much of that it
//! stands for. What no sample stands for is growth without a stack: so the two always add up to the kernel's figure.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use memtrace_common::event as wire;

use crate::decode::{known, printable};
use crate::input::{ModuleFound, PATHS_KNOWN, PathFound, PathFrame, StackFound};
use crate::world::ProcessKey;
use memtrace_incident::{Cause, Cut};

mod report;

pub(crate) use report::{FILE_PATHS, FILE_SAMPLES, Window};

/// Samples kept; beyond, neighbours of one path are joined.
const SAMPLES_CAP: usize = 65_536;
/// Paths kept.
const PATHS_CAP: usize = 16_384;
/// Modules kept.
const MODULES_CAP: usize = 8192;
/// Frames of a path.
pub(crate) const FRAMES_CAP: usize = 640;
/// Processes that samples name.
const TASKS_CAP: usize = 32_768;
/// Address spaces whose growth is followed: more than the kernel side follows.
const SPACES_CAP: usize = 40_000;
/// Mappings of one address space that are remembered with their path.
const MAPPINGS_CAP: usize = 512;
/// Mappings of all address spaces.
const ALL_MAPPINGS_CAP: usize = 65_536;
/// Samples are kept this much longer than an incident looks back: it is built when its window has closed.
const SLACK_NS: u64 = 15_000_000_000;
/// How long samples of an address space that is gone may still be on their way: a reader that has no CPU is behind.
const LATE_NS: u64 = 10_000_000_000;
/// Readings of an address space that are remembered.
const READINGS: usize = 64;
/// Growth is taken to be from outside when this many samples in a row did not stand for it: they may come in another
/// order than they were taken in.
const RECENT: usize = 16;
/// The first width of time within which samples are joined.
const JOIN_NS: u64 = 10_000_000;

/// Why growth has no stack.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Why {
    /// What the process began with, and what was done to it from outside.
    Outside,
    /// Less than a sampling step since its last stack.
    Pending,
    /// Its mappings could not be read before it was gone.
    Gone,
    /// Its registers or its stack could not be read.
    Unreadable,
    /// There were more paths than are kept.
    NotKept,
}

impl Why {
    pub(crate) const fn text(self) -> &'static str {
        match self {
            Self::Outside => "begun with at fork or exec, or grown by the kernel or another process",
            Self::Pending => "since the last stack of its process: less than a sampling step, or not yet told apart",
            Self::Gone => "the process had ended before its mappings could be read",
            Self::Unreadable => "registers or stack could not be read",
            Self::NotKept => "more paths than are kept",
        }
    }
}

/// What a sample is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Place {
    /// Number in `tasks`.
    task: u32,
    cause: Cause,
    path: u32,
    /// Cause and path that made the mapping.
    mapped_by: Option<(Cause, u32)>,
}

/// One sample, or several that were joined.
#[derive(Clone, Copy, Debug)]
struct Sample {
    boot_ns: u64,
    cgroup: u64,
    task: u32,
    of: Result<Place, Why>,
    weight: u64,
}

/// Who: a process by its first thread that was seen.
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
    /// In all, as the kernel side has it.
    grown: u64,
    grown_ns: u64,
    /// The same, of the last readings that told more: an incident ends before its window closes. Cap: [`READINGS`].
    readings: VecDeque<(u64, u64)>,
    /// What its samples stand for.
    weights: u64,
    /// What was told without a sample.
    outside: u64,
    /// When each of the last samples came, and what neither it nor one before stood for. Cap: [`RECENT`].
    recent: VecDeque<(u64, u64)>,
    gone_ns: Option<u64>,
    /// By address: end, cause and path. Cap: [`MAPPINGS_CAP`].
    mappings: BTreeMap<u64, (u64, Cause, u32)>,
}

/// A path as kept.
#[derive(Clone, Debug)]
struct Path {
    frames: Vec<PathFrame>,
    cut: Option<Cut>,
}

/// All of it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Attribution {
    /// Cap: [`MODULES_CAP`].
    modules: BTreeMap<u32, ModuleFound>,
    /// Cap: [`PATHS_CAP`].
    paths: BTreeMap<u32, Path>,
    /// Cap: [`TASKS_CAP`].
    tasks: BTreeMap<u32, GrownTask>,
    task_of: BTreeMap<ProcessKey, u32>,
    next_task: u32,
    /// By address space and process. Cap: [`SPACES_CAP`].
    spaces: BTreeMap<(u64, ProcessKey), GrowthOfSpace>,
    /// Of all address spaces. Cap: [`ALL_MAPPINGS_CAP`].
    mappings: usize,
    /// Cap: [`SAMPLES_CAP`].
    samples: VecDeque<Sample>,
    /// Samples joined with a neighbour since the last of them was forgotten.
    joined: u64,
    /// Samples that there was no room for, and that could not be joined.
    pub(crate) dropped: u64,
}

impl Attribution {
    pub(crate) fn module(&mut self, found: &ModuleFound) {
        if self.modules.len() >= MODULES_CAP && !self.modules.contains_key(&found.id) {
            self.modules.pop_first();
        }
        // As it is: by its path a module is found again. Whoever prints it escapes it.
        self.modules.insert(found.id, found.clone());
    }

    pub(crate) fn path(&mut self, found: &PathFound) {
        if self.paths.len() >= PATHS_CAP && !self.paths.contains_key(&found.id) {
            self.forget_paths();
        }
        let frames = found.frames.iter().take(FRAMES_CAP).cloned().collect();
        self.paths.insert(found.id, Path { frames, cut: found.cut });
    }

    /// Makes room for a path: old ones that no sample and no mapping names go, then the oldest.
    fn forget_paths(&mut self) {
        let places = self.samples.iter().filter_map(|sample| sample.of.ok());
        let mut used: BTreeSet<u32> =
            places.flat_map(|place| [Some(place.path), place.mapped_by.map(|(_, path)| path)]).flatten().collect();
        used.extend(self.spaces.values().flat_map(|space| space.mappings.values().map(|(.., path)| *path)));
        let newest = self.paths.last_key_value().map_or(0, |(id, _)| *id);
        self.paths.retain(|id, _| newest.saturating_sub(*id) < PATHS_KNOWN || used.contains(id));
        while self.paths.len() >= PATHS_CAP / 8 * 7 {
            self.paths.pop_first();
        }
        for sample in &mut self.samples {
            if sample.of.is_ok_and(|place| !self.paths.contains_key(&place.path)) {
                sample.of = Err(Why::NotKept);
            }
        }
    }

    /// Resident memory moved.
    pub(crate) fn grew(&mut self, r: &wire::RssChange) {
        let Some(grown) = known(r.grown_bytes) else { return };
        let key = (r.task.tgid, r.task.start_boot_ns);
        if r.reason == wire::RSS_FIRST {
            // Whoever had this identity before is gone for certain.
            self.settle(r.mm_id, |old, _| old != key);
        }
        let task = self.task(key, r.task.tid, || crate::world::comm(&r.task));
        // A program has the name of the one before until it has started.
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
        // What it begins with nobody touched for it.
        if r.reason == wire::RSS_FIRST && grown > 0 && space.outside == 0 && space.weights == 0 {
            space.outside = grown;
            let (boot_ns, cgroup) = (r.header.boot_ns, space.cgroup);
            self.push(Sample { boot_ns, cgroup, task, of: Err(Why::Outside), weight: grown });
        }
    }

    /// An address space is gone.
    pub(crate) fn gone(&mut self, r: &wire::MmGone) {
        let key = (r.task.tgid, r.task.start_boot_ns);
        if let Some(space) = self.spaces.get_mut(&(r.mm_id, key)) {
            if let Some(grown) = known(r.grown_bytes) {
                space.read(r.header.boot_ns, grown);
            }
            space.gone_ns = Some(r.header.boot_ns);
        }
    }

    /// A stack was taken.
    pub(crate) fn stack(&mut self, found: &StackFound) {
        let key = (found.pid, found.start_boot_ns);
        let task = self.task(key, found.tid, || printable(found.comm.as_bytes()));
        let mut of = self.place(task, found);
        if found.cause != Cause::Charge
            && let Some(space) = self.space(found.mm_id, key, task)
        {
            space.cgroup = found.cgroup_id;
            if found.cause == Cause::Touch {
                let outside = space.sampled(found);
                let mapped_by = found.address.and_then(|address| space.made_by(address));
                if let Some((boot_ns, weight)) = outside {
                    self.push(Sample { boot_ns, cgroup: found.cgroup_id, task, of: Err(Why::Outside), weight });
                }
                of = of.map(|place| Place { mapped_by, ..place });
            } else if let (Ok(place), Some(address)) = (of, found.address) {
                self.mapped(found.mm_id, key, (address, found.size_bytes), (place.cause, place.path));
            }
        }
        let sample = Sample { boot_ns: found.boot_ns, cgroup: found.cgroup_id, task, of, weight: found.weight_bytes };
        // Address space without a stack is no growth of resident memory: the file has no place for it.
        if found.cause == Cause::Touch || of.is_ok() {
            self.push(sample);
        }
    }

    fn place(&self, task: u32, found: &StackFound) -> Result<Place, Why> {
        let path = self.paths.get(&found.path).ok_or(Why::NotKept)?;
        if path.frames.iter().all(|frame| frame.kernel) {
            return Err(if path.cut == Some(Cut::Gone) { Why::Gone } else { Why::Unreadable });
        }
        Ok(Place { task, cause: found.cause, path: found.path, mapped_by: None })
    }

    /// The number of a process.
    fn task(&mut self, key: ProcessKey, tid: u32, comm: impl FnOnce() -> String) -> u32 {
        if let Some(task) = self.task_of.get(&key) {
            return *task;
        }
        if self.tasks.len() >= TASKS_CAP {
            let mut used: BTreeSet<u32> = self.samples.iter().map(|sample| sample.task).collect();
            used.extend(self.spaces.values().map(|space| space.task));
            self.tasks.retain(|task, _| used.contains(task));
            while self.tasks.len() >= TASKS_CAP {
                self.tasks.pop_first();
            }
            let tasks = &self.tasks;
            self.task_of.retain(|_, task| tasks.contains_key(task));
        }
        let number = self.next_task;
        self.next_task = self.next_task.wrapping_add(1);
        self.tasks.insert(number, GrownTask { key, tid, comm: comm() });
        self.task_of.insert(key, number);
        number
    }

    /// The address space of a record; `None` when there is no room for it.
    fn space(&mut self, mm_id: u64, key: ProcessKey, task: u32) -> Option<&mut GrowthOfSpace> {
        if self.spaces.len() >= SPACES_CAP && !self.spaces.contains_key(&(mm_id, key)) {
            return None;
        }
        Some(self.spaces.entry((mm_id, key)).or_insert_with(|| GrowthOfSpace { task, ..GrowthOfSpace::default() }))
    }

    /// Remembers who made a mapping, in place of what was there.
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
        // Stacks come a little late, and from several CPUs: nearly always this is the end.
        let later = self.samples.iter().rev().take_while(|other| other.boot_ns > sample.boot_ns).count();
        let at = self.samples.len().saturating_sub(later);
        self.samples.insert(at, sample);
        if self.samples.len() >= SAMPLES_CAP {
            self.make_room();
        }
    }

    /// Joins samples of one path that are close in time. Where there are too many paths and processes for that to help,
    /// as in a storm of forks, history becomes shorter, or every further sample would be looked for such neighbours.
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

    /// Time passes: what no incident can ask for any more is forgotten.
    pub(crate) fn tick(&mut self, now: u64, before_ns: u64, recorded_since: Option<u64>) {
        let oldest = now.saturating_sub(before_ns.saturating_add(SLACK_NS)).min(recorded_since.unwrap_or(u64::MAX));
        while self.samples.front().is_some_and(|sample| sample.boot_ns < oldest) {
            self.samples.pop_front();
        }
        if self.samples.is_empty() {
            self.joined = 0;
        }
        self.settle_all(|_, space| space.gone_ns.is_some_and(|gone| gone.saturating_add(LATE_NS) < now));
    }

    fn settle(&mut self, mm_id: u64, which: impl Fn(ProcessKey, &GrowthOfSpace) -> bool) {
        let range = (mm_id, (0, 0))..=(mm_id, (u32::MAX, u64::MAX));
        let done = self.spaces.range(range).filter(|((_, key), space)| which(*key, space));
        let done: Vec<(u64, ProcessKey)> = done.map(|(id, _)| *id).collect();
        self.end(&done);
    }

    fn settle_all(&mut self, which: impl Fn(ProcessKey, &GrowthOfSpace) -> bool) {
        let done = self.spaces.iter().filter(|((_, key), space)| which(*key, space));
        let done: Vec<(u64, ProcessKey)> = done.map(|(id, _)| *id).collect();
        self.end(&done);
    }

    /// Address spaces of which nothing more will come: what they grew without a stack is told.
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
        let frames: usize = self.paths.values().map(|path| path.frames.len()).sum();
        self.samples.len() * size_of::<Sample>()
            + frames * (size_of::<PathFrame>() + 16)
            + self.paths.len() * 64
            + self.modules.len() * 160
            + self.tasks.len() * 128
            + self.spaces.len() * (size_of::<GrowthOfSpace>() + 48)
            + self.mappings * 48
    }
}

impl GrowthOfSpace {
    /// Who made the mapping that holds an address.
    fn made_by(&self, address: u64) -> Option<(Cause, u32)> {
        let (_, (end, cause, path)) = self.mappings.range(..=address).next_back()?;
        (address < *end).then_some((*cause, *path))
    }

    /// Takes a touch sample into account; when and how much nobody stood for, if that is certain now.
    fn sampled(&mut self, found: &StackFound) -> Option<(u64, u64)> {
        self.read(found.boot_ns, found.grown_bytes);
        self.weights = self.weights.saturating_add(found.weight_bytes);
        let told = self.weights.saturating_add(self.outside);
        self.recent.push_back((found.boot_ns, found.grown_bytes.saturating_sub(told)));
        if self.recent.len() < RECENT {
            return None;
        }
        let certain = self.recent.iter().map(|(_, untold)| *untold).min().unwrap_or(0);
        let (boot_ns, _) = self.recent.pop_front()?;
        if certain == 0 {
            return None;
        }
        self.outside = self.outside.saturating_add(certain);
        self.recent.iter_mut().for_each(|(_, untold)| *untold = untold.saturating_sub(certain));
        Some((boot_ns, certain))
    }

    /// The kernel side told how much it has grown by then.
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

    /// What had grown at a moment and no sample stood for; `later` is the weight of its samples after that moment.
    fn pending_at(&self, until_ns: u64, later: u64) -> Option<Sample> {
        let (boot_ns, grown) = self.readings.iter().rev().find(|(ns, _)| *ns <= until_ns)?;
        let told = self.weights.saturating_add(self.outside).saturating_sub(later);
        let weight = grown.saturating_sub(told);
        let (boot_ns, cgroup, task) = (*boot_ns, self.cgroup, self.task);
        (weight > 0).then_some(Sample { boot_ns, cgroup, task, of: Err(Why::Pending), weight })
    }

    /// What has grown since the last sample.
    fn pending(&self) -> Option<Sample> {
        let weight = self.grown.saturating_sub(self.weights.saturating_add(self.outside));
        let (boot_ns, cgroup, task) = (self.grown_ns, self.cgroup, self.task);
        (weight > 0).then_some(Sample { boot_ns, cgroup, task, of: Err(Why::Pending), weight })
    }
}

/// Joins samples of the same place within ever wider stretches of time until at most `most` are left, or until there is
/// only one of each. Sorted by time before and after; no byte is lost. How many were joined.
fn join(samples: &mut Vec<Sample>, most: usize) -> u64 {
    let before = samples.len();
    let ns = |sample: Option<&Sample>| sample.map_or(0, |sample| sample.boot_ns);
    let span_ns = ns(samples.last()).saturating_sub(ns(samples.first()));
    let mut width_ns = JOIN_NS;
    while samples.len() > most {
        let mut last: BTreeMap<(u64, u32, Result<Place, Why>, u64), usize> = BTreeMap::new();
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
        // Stretches begin at multiples of their width: one that is wider than the span may still end inside it.
        if width_ns == u64::MAX {
            break;
        }
        width_ns = if width_ns > span_ns { u64::MAX } else { width_ns.saturating_mul(8) };
    }
    (before.saturating_sub(samples.len())) as u64
}

#[cfg(test)]
mod tests;
