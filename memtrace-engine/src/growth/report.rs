//! Makes the allocation paths and samples of an incident file from the samples of its window.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use memtrace_incident::{AllocationPath, AllocationSamples, Allocations, Cause, Frame, Process, Unattributed};

use super::{Attribution, NoStackReason, PathKey, Sample, join};
use crate::input::PathFrame;
use crate::world::ProcessKey;

/// Samples in one file; above it samples of the same path are joined.
pub(crate) const FILE_SAMPLES: usize = 20_000;
/// Paths in one file. The lightest lose their stack, but not their bytes.
pub(crate) const FILE_PATHS: usize = 2048;

/// The window of a file.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Window {
    /// First moment, boot clock.
    pub(crate) from_ns: u64,
    /// Last moment.
    pub(crate) until_ns: u64,
    /// Sample interval in bytes; 0 when no stacks are taken.
    pub(crate) sample_bytes: u64,
    /// Stacks that were left out to stay within the stack budget.
    pub(crate) thinned: u64,
}

impl Attribution {
    /// Paths and samples of the window, for the cgroups and processes that `in_scope` selects.
    /// Empty when no stacks are taken.
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
        // Weights after the window belong to growth after it.
        let mut later: BTreeMap<u32, u64> = BTreeMap::new();
        let of_growth = |sample: &&Sample| sample.of.map_or(true, |path_key| path_key.cause == Cause::Touch);
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
        let paths = index.order.iter().map(|path_key| self.allocation_path(path_key, &index)).collect();
        let mut allocations = Allocations {
            sample_bytes: window.sample_bytes,
            thinned: window.thinned,
            joined: self.joined.saturating_add(joined),
            ..Allocations::default()
        };
        let mut unattributed: BTreeMap<NoStackReason, u64> = BTreeMap::new();
        let mut columns = AllocationSamples::default();
        for sample in &samples {
            columns.boot_ns.push(sample.boot_ns);
            columns.path.push(sample.of.ok().and_then(|path_key| index.at(&path_key)));
            columns.weight_bytes.push(sample.weight);
            match sample.of {
                Ok(path_key) if path_key.cause == Cause::Touch => {
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
        let mut reasons: Vec<(NoStackReason, u64)> = unattributed.into_iter().collect();
        reasons.sort_by_key(|(why, bytes)| (Reverse(*bytes), *why));
        let part = |(why, bytes): (NoStackReason, u64)| Unattributed { why: why.text().to_owned(), bytes };
        allocations.unattributed = reasons.into_iter().map(part).collect();
        (paths, Some(allocations))
    }

    /// Removes the stacks of the lightest paths when there are more than a file holds. Touched
    /// bytes stay, as growth without a stack.
    fn leave_out_light_paths(&self, samples: &mut Vec<Sample>) {
        let index = Index::of(samples);
        if index.order.len() <= FILE_PATHS {
            return;
        }
        let mut weights: Vec<(Reverse<u64>, PathKey)> =
            index.weights.iter().map(|(path_key, weight)| (Reverse(*weight), *path_key)).collect();
        weights.sort_unstable();
        // A touched path may refer to a mapping path, so half of the room is for those.
        let kept: std::collections::BTreeSet<PathKey> =
            weights.into_iter().take(FILE_PATHS / 2).map(|(_, path_key)| path_key).collect();
        samples.retain_mut(|sample| match sample.of {
            Ok(path_key) if kept.contains(&path_key) => true,
            Ok(path_key) if path_key.cause == Cause::Touch => {
                sample.of = Err(NoStackReason::NotKept);
                true
            }
            Ok(_) => false,
            Err(_) => true,
        });
    }

    fn allocation_path(&self, path_key: &PathKey, index: &Index) -> AllocationPath {
        let task = self.tasks.get(&path_key.task);
        let process = task.map_or_else(
            || Process { pid: 0, tid: 0, start_boot_ns: 0, comm: String::new() },
            |task| Process { pid: task.key.0, tid: task.tid, start_boot_ns: task.key.1, comm: task.comm.clone() },
        );
        let path = self.paths.get(path_key.path);
        AllocationPath {
            weight_bytes: index.weights.get(path_key).copied().unwrap_or(0),
            cause: path_key.cause,
            process,
            frames: path.map(|path| path.frames.iter().map(|frame| self.frame(frame)).collect()).unwrap_or_default(),
            cut: path.and_then(|path| path.cut),
            mapped_by: path_key.mapped_by.and_then(|by| index.at(&mapping_path(path_key, by))),
        }
    }

    fn frame(&self, frame: &PathFrame) -> Frame {
        let module = frame.module.and_then(|id| self.modules.get(id));
        Frame {
            module: module.map(|module| module.path.clone()).or(frame.jit.then(|| "[jit]".to_owned())),
            build_id: module.and_then(|module| module.build_id.clone()),
            offset: frame.offset,
            symbol: frame.name.as_deref().map(str::to_owned),
            kernel: frame.kernel,
            ..Frame::default()
        }
    }
}

/// The path that created the mapping which `touched` touched.
fn mapping_path(touched: &PathKey, (cause, path): (Cause, u32)) -> PathKey {
    PathKey { task: touched.task, cause, path, mapped_by: None }
}

/// Weights of the paths and their order in the file: by cause, then the heaviest first.
struct Index {
    weights: BTreeMap<PathKey, u64>,
    order: Vec<PathKey>,
    position: BTreeMap<PathKey, u32>,
}

impl Index {
    fn of(samples: &[Sample]) -> Self {
        let mut weights: BTreeMap<PathKey, u64> = BTreeMap::new();
        for sample in samples {
            let Ok(path_key) = sample.of else { continue };
            let weight = weights.entry(path_key).or_default();
            *weight = weight.saturating_add(sample.weight);
            if let Some(by) = path_key.mapped_by {
                weights.entry(mapping_path(&path_key, by)).or_default();
            }
        }
        let mut order: Vec<PathKey> = weights.keys().copied().collect();
        order.sort_by_key(|path_key| (path_key.cause, Reverse(weights.get(path_key).copied()), *path_key));
        let position =
            order.iter().enumerate().map(|(at, path_key)| (*path_key, u32::try_from(at).unwrap_or(u32::MAX)));
        let position = position.collect();
        Self { weights, order, position }
    }

    fn at(&self, path_key: &PathKey) -> Option<u32> {
        self.position.get(path_key).copied()
    }
}
