//! The paths that samples refer to, by number.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use memtrace_incident::Cut;

use crate::input::{PathFound, PathFrame, bytes_of_frames};

/// Paths; those that no sample refers to for long are dropped first, then those that one referred
/// to longest ago. Nearly twice what the reader of stacks knows, so none is dropped that it still
/// refers to.
pub(super) const PATHS_CAP: usize = 16_384;
/// Bytes of all paths, likewise: more than twice what the reader of stacks numbers anew from.
pub(super) const PATH_BYTES_CAP: usize = 20 << 20;
/// Up to this many bytes paths stay that nothing refers to.
const ROOM_BYTES: usize = 256 << 10;
/// Frames of a path; outer ones are left out.
pub(crate) const FRAMES_CAP: usize = 640;

/// The frames of a path, cut to [`FRAMES_CAP`].
#[derive(Clone, Debug)]
pub(super) struct Path {
    /// Whoever stated the path has the same.
    pub(super) frames: Arc<[PathFrame]>,
    pub(super) cut: Option<Cut>,
    /// The tick in which it was stated, or a sample that refers to it.
    used: u64,
}

impl Path {
    fn bytes(&self) -> usize {
        bytes_of_frames(&self.frames)
    }
}

/// Cap: [`PATHS_CAP`] and [`PATH_BYTES_CAP`], and one path.
#[derive(Clone, Debug, Default)]
pub(super) struct Paths {
    paths: BTreeMap<u32, Path>,
    bytes: usize,
}

impl Paths {
    pub(super) fn get(&self, id: u32) -> Option<&Path> {
        self.paths.get(&id)
    }

    /// Whether there is no room for this one.
    pub(super) fn is_full_for(&self, id: u32) -> bool {
        (self.paths.len() >= PATHS_CAP || self.bytes >= PATH_BYTES_CAP) && !self.paths.contains_key(&id)
    }

    pub(super) fn insert(&mut self, found: &PathFound, tick: u64) {
        let frames = match found.frames.get(..FRAMES_CAP) {
            Some(inner) if inner.len() < found.frames.len() => inner.into(),
            _ => found.frames.clone(),
        };
        let path = Path { frames, cut: found.cut, used: tick };
        self.bytes = self.bytes.saturating_add(path.bytes());
        let before = self.paths.insert(found.id, path);
        self.bytes = self.bytes.saturating_sub(before.map_or(0, |path| path.bytes()));
    }

    /// The path that a sample of this tick refers to.
    pub(super) fn get_used(&mut self, id: u32, tick: u64) -> Option<&Path> {
        let path = self.paths.get_mut(&id)?;
        path.used = tick;
        Some(path)
    }

    /// Makes room: drops paths that are not `referred` to and were not used since the tick
    /// `oldest`, then those that were used longest ago.
    pub(super) fn forget(&mut self, referred: &BTreeSet<u32>, oldest: u64) {
        self.forget_unused(referred, oldest);
        let mut order: Vec<(u64, u32)> = self.paths.iter().map(|(id, path)| (path.used, *id)).collect();
        order.sort_unstable();
        for (_, id) in order {
            if self.paths.len() < PATHS_CAP / 8 * 7 && self.bytes < PATH_BYTES_CAP / 8 * 7 {
                break;
            }
            let dropped = self.paths.remove(&id);
            self.bytes = self.bytes.saturating_sub(dropped.map_or(0, |path| path.bytes()));
        }
    }

    /// Whether [`Paths::forget_unused`] may find something that is worth it.
    pub(super) fn may_have_unused(&self, oldest: u64) -> bool {
        self.bytes > ROOM_BYTES && self.paths.values().any(|path| path.used < oldest)
    }

    /// Drops paths that are not `referred` to and were not used since the tick `oldest`.
    pub(super) fn forget_unused(&mut self, referred: &BTreeSet<u32>, oldest: u64) {
        self.paths.retain(|id, path| path.used >= oldest || referred.contains(id));
        self.bytes = self.paths.values().map(Path::bytes).sum();
    }

    /// The modules of all frames.
    pub(super) fn modules(&self) -> BTreeSet<u32> {
        self.paths.values().flat_map(|path| path.frames.iter().filter_map(|frame| frame.module)).collect()
    }

    /// Approximate bytes in memory.
    pub(super) fn memory_estimate(&self) -> usize {
        self.bytes.saturating_add(self.paths.len().saturating_mul(64))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(id: u32, name: &str, frames: usize) -> PathFound {
        let frame = PathFrame { name: Some(name.into()), jit: true, ..PathFrame::default() };
        PathFound { id, frames: vec![frame; frames].into(), cut: None }
    }

    fn insert(paths: &mut Paths, found: &PathFound) {
        if paths.is_full_for(found.id) {
            paths.forget(&BTreeSet::new(), 0);
        }
        paths.insert(found, u64::from(found.id / 1000));
    }

    #[test]
    fn what_nothing_refers_to_goes_and_frames_are_shared() {
        let (mut paths, name) = (Paths::default(), "x".repeat(1000));
        (0..4000).for_each(|id| insert(&mut paths, &found(id, &name, 1)));
        assert!(paths.may_have_unused(3) && !paths.may_have_unused(0));
        paths.get_used(5, 3);
        paths.forget_unused(&[7].into(), 3);
        let left: Vec<u32> = paths.paths.keys().copied().collect();
        assert!(left.len() == 1002 && left.starts_with(&[5, 7, 3000]), "{}", left.len());
        assert_eq!(paths.bytes, paths.paths.values().map(Path::bytes).sum::<usize>());
        let found = found(9000, &name, 30);
        paths.insert(&found, 4);
        assert!(paths.get(9000).is_some_and(|path| Arc::ptr_eq(&path.frames, &found.frames)));
    }

    #[test]
    fn at_the_cap_those_used_longest_ago_go() {
        let mut paths = Paths::default();
        for id in 0..3 * PATHS_CAP as u32 {
            insert(&mut paths, &found(id, "f", 1));
            paths.get_used(5, u64::MAX);
        }
        assert!(paths.get(5).is_some() && paths.get(6).is_none() && paths.paths.len() <= PATHS_CAP);
    }

    #[test]
    fn bytes_are_bounded_whatever_functions_are_called() {
        let (mut paths, name) = (Paths::default(), "x".repeat(1000));
        for id in 0..3000 {
            insert(&mut paths, &found(id, &name, 30));
            insert(&mut paths, &found(id, &name, 31));
        }
        let held: usize = paths.paths.values().map(Path::bytes).sum();
        assert!(held == paths.bytes && held <= PATH_BYTES_CAP + (64 << 10), "{held}");
        assert!(paths.get(2999).is_some_and(|path| path.frames.len() == 31) && paths.get(0).is_none());
    }

    #[test]
    fn deep_paths_are_cut_and_bounded() {
        let mut paths = Paths::default();
        (0..2 * PATHS_CAP as u32).for_each(|id| insert(&mut paths, &found(id, "f", if id % 8 == 0 { 700 } else { 1 })));
        assert!(paths.paths.len() <= PATHS_CAP && paths.memory_estimate() <= PATH_BYTES_CAP + (2 << 20));
        assert!(paths.paths.values().all(|path| path.frames.len() <= FRAMES_CAP));
    }
}
