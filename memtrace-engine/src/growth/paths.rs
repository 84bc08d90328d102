//! The paths that samples refer to, by number.

use std::collections::{BTreeMap, BTreeSet};

use memtrace_incident::Cut;

use crate::input::{PATHS_KNOWN, PathFound, PathFrame, bytes_of_frames};

/// Paths; old ones that nothing refers to are dropped first.
pub(super) const PATHS_CAP: usize = 16_384;
/// Bytes of all paths; the oldest are dropped. More than twice what the reader of stacks numbers
/// anew from, so none is dropped that it still refers to.
pub(super) const PATH_BYTES_CAP: usize = 20 << 20;
/// Frames of a path; outer ones are left out.
pub(crate) const FRAMES_CAP: usize = 640;

/// The frames of a path, cut to [`FRAMES_CAP`].
#[derive(Clone, Debug)]
pub(super) struct Path {
    pub(super) frames: Vec<PathFrame>,
    pub(super) cut: Option<Cut>,
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

    pub(super) fn insert(&mut self, found: &PathFound) {
        let path = Path { frames: found.frames.iter().take(FRAMES_CAP).cloned().collect(), cut: found.cut };
        self.bytes = self.bytes.saturating_add(path.bytes());
        let before = self.paths.insert(found.id, path);
        self.bytes = self.bytes.saturating_sub(before.map_or(0, |path| path.bytes()));
    }

    /// Makes room: drops old paths that are not `used`, then the oldest.
    pub(super) fn forget(&mut self, used: &BTreeSet<u32>) {
        let newest = self.paths.last_key_value().map_or(0, |(id, _)| *id);
        self.paths.retain(|id, _| newest.saturating_sub(*id) < PATHS_KNOWN || used.contains(id));
        self.bytes = self.paths.values().map(Path::bytes).sum();
        while self.paths.len() >= PATHS_CAP / 8 * 7 || self.bytes >= PATH_BYTES_CAP / 8 * 7 {
            let Some((_, path)) = self.paths.pop_first() else { break };
            self.bytes = self.bytes.saturating_sub(path.bytes());
        }
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
        let frame = PathFrame { name: Some(name.to_owned()), jit: true, ..PathFrame::default() };
        PathFound { id, frames: vec![frame; frames], cut: None }
    }

    fn insert(paths: &mut Paths, found: &PathFound) {
        if paths.is_full_for(found.id) {
            paths.forget(&BTreeSet::new());
        }
        paths.insert(found);
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
