//! From samples to what the incident file says about a window of time.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use super::{Attribution, Place, Sample, Why, join};
use crate::input::PathFrame;
use crate::world::ProcessKey;
use memtrace_incident::Process;
use memtrace_incident::{AllocationPath, AllocationSamples, Allocations, Cause, Frame, Unattributed};

/// Samples in one file.
pub(crate) const FILE_SAMPLES: usize = 20_000;
/// Paths in one file.
pub(crate) const FILE_PATHS: usize = 2048;

/// What a file is about.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Window {
    /// First moment, boot clock.
    pub(crate) from_ns: u64,
    /// Last moment.
    pub(crate) until_ns: u64,
    /// The sampling step.
    pub(crate) sample_bytes: u64,
    /// Stacks the budget left out.
    pub(crate) thinned: u64,
}

impl Attribution {
    /// Paths and samples of whoever `in_scope` names, by cgroup and process; nothing where no stacks are taken.
    pub(crate) fn report(
        &self,
        window: &Window,
        in_scope: impl Fn(u64, ProcessKey) -> bool,
    ) -> (Vec<AllocationPath>, Option<Allocations>) {
        if window.sample_bytes == 0 {
            return (Vec::new(), None);
        }
        let inside = |sample: &Sample| {
            let task = self.tasks.get(&sample.task);
            (window.from_ns..=window.until_ns).contains(&sample.boot_ns)
                && task.is_some_and(|task| in_scope(sample.cgroup, task.key))
        };
        let mut samples: Vec<Sample> = self.samples.iter().filter(|sample| inside(sample)).copied().collect();
        // Samples after the window stand for growth after it.
        let mut later: BTreeMap<u32, u64> = BTreeMap::new();
        let of_growth = |sample: &&Sample| sample.of.map_or(true, |place| place.cause == Cause::Touch);
        for sample in self.samples.iter().rev().take_while(|sample| sample.boot_ns > window.until_ns).filter(of_growth)
        {
            let sum = later.entry(sample.task).or_default();
            *sum = sum.saturating_add(sample.weight);
        }
        let pending = self
            .spaces
            .values()
            .filter_map(|space| space.pending_at(window.until_ns, later.get(&space.task).copied().unwrap_or(0)));
        samples.extend(pending.filter(|sample| inside(sample)));
        samples.sort_by_key(|sample| sample.boot_ns);
        self.leave_out_light_paths(&mut samples);
        let joined = join(&mut samples, FILE_SAMPLES);

        let index = Index::of(&samples);
        let paths = index.order.iter().map(|place| self.allocation_path(place, &index)).collect();
        let mut allocations = Allocations {
            sample_bytes: window.sample_bytes,
            thinned: window.thinned,
            joined: self.joined.saturating_add(joined),
            ..Allocations::default()
        };
        let mut unattributed: BTreeMap<Why, u64> = BTreeMap::new();
        let mut columns = AllocationSamples::default();
        for sample in &samples {
            columns.boot_ns.push(sample.boot_ns);
            columns.path.push(sample.of.ok().and_then(|place| index.at(&place)));
            columns.weight_bytes.push(sample.weight);
            match sample.of {
                Ok(place) if place.cause == Cause::Touch => {
                    allocations.attributed_bytes = allocations.attributed_bytes.saturating_add(sample.weight);
                }
                Ok(_) => continue,
                Err(why) => {
                    let sum = unattributed.entry(why).or_default();
                    *sum = sum.saturating_add(sample.weight);
                }
            }
            allocations.growth_bytes = allocations.growth_bytes.saturating_add(sample.weight);
        }
        allocations.samples = columns;
        let mut reasons: Vec<(Why, u64)> = unattributed.into_iter().collect();
        reasons.sort_by_key(|(why, bytes)| (Reverse(*bytes), *why));
        let part = |(why, bytes): (Why, u64)| Unattributed { why: why.text().to_owned(), bytes };
        allocations.unattributed = reasons.into_iter().map(part).collect();
        (paths, Some(allocations))
    }

    /// Of more paths than a file holds the lightest lose their stack; their bytes stay.
    fn leave_out_light_paths(&self, samples: &mut Vec<Sample>) {
        let index = Index::of(samples);
        if index.order.len() <= FILE_PATHS {
            return;
        }
        let mut weights: Vec<(Reverse<u64>, Place)> =
            index.weights.iter().map(|(place, weight)| (Reverse(*weight), *place)).collect();
        weights.sort_unstable();
        // A touched path may name another: half of the room is for those.
        let kept: std::collections::BTreeSet<Place> =
            weights.into_iter().take(FILE_PATHS / 2).map(|(_, place)| place).collect();
        samples.retain_mut(|sample| match sample.of {
            Ok(place) if kept.contains(&place) => true,
            Ok(place) if place.cause == Cause::Touch => {
                sample.of = Err(Why::NotKept);
                true
            }
            Ok(_) => false,
            Err(_) => true,
        });
    }

    fn allocation_path(&self, place: &Place, index: &Index) -> AllocationPath {
        let task = self.tasks.get(&place.task);
        let process = task.map_or_else(
            || Process { pid: 0, tid: 0, start_boot_ns: 0, comm: String::new() },
            |task| Process { pid: task.key.0, tid: task.tid, start_boot_ns: task.key.1, comm: task.comm.clone() },
        );
        let path = self.paths.get(&place.path);
        AllocationPath {
            weight_bytes: index.weights.get(place).copied().unwrap_or(0),
            cause: place.cause,
            process,
            frames: path.map(|path| path.frames.iter().map(|frame| self.frame(frame)).collect()).unwrap_or_default(),
            cut: path.and_then(|path| path.cut),
            mapped_by: place.mapped_by.and_then(|by| index.at(&maker(place, by))),
        }
    }

    fn frame(&self, frame: &PathFrame) -> Frame {
        let module = frame.module.and_then(|id| self.modules.get(&id));
        Frame {
            module: module.map(|module| module.path.clone()).or(frame.jit.then(|| "[jit]".to_owned())),
            build_id: module.and_then(|module| module.build_id.clone()),
            offset: frame.offset,
            symbol: frame.name.clone(),
            kernel: frame.kernel,
            ..Frame::default()
        }
    }
}

/// The path that made the mapping `touched` touched.
fn maker(touched: &Place, (cause, path): (Cause, u32)) -> Place {
    Place { task: touched.task, cause, path, mapped_by: None }
}

/// Where each path is in the file: by cause, the heaviest first.
struct Index {
    weights: BTreeMap<Place, u64>,
    order: Vec<Place>,
    position: BTreeMap<Place, u32>,
}

impl Index {
    fn of(samples: &[Sample]) -> Self {
        let mut weights: BTreeMap<Place, u64> = BTreeMap::new();
        for sample in samples {
            let Ok(place) = sample.of else { continue };
            let weight = weights.entry(place).or_default();
            *weight = weight.saturating_add(sample.weight);
            if let Some(by) = place.mapped_by {
                weights.entry(maker(&place, by)).or_default();
            }
        }
        let mut order: Vec<Place> = weights.keys().copied().collect();
        order.sort_by_key(|place| (place.cause, Reverse(weights.get(place).copied()), *place));
        let position = order.iter().enumerate().map(|(at, place)| (*place, u32::try_from(at).unwrap_or(u32::MAX)));
        let position = position.collect();
        Self { weights, order, position }
    }

    fn at(&self, place: &Place) -> Option<u32> {
        self.position.get(place).copied()
    }
}
