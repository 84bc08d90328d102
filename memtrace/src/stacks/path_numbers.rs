//! Numbers for stacks, so that a sample names its frames by a number.
//!
//! A program samples the same few hundred stacks over and over. Each distinct one becomes a fact
//! once, with its modules; samples then carry its number only. The journal is a ring of segments,
//! and a replay may begin at any of them, so after a new segment has begun each stack and module
//! is stated there once more before it is used ([`PathNumbers::restate`]).

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use memtrace_engine::input::{Fact, ModuleFound, PATHS_KNOWN, PathFound, PathFrame, bytes_of_frames};
use memtrace_incident::Cut;
use memtrace_unwind::modules::ModuleId;

/// Stacks that have a number; beyond it all get new ones. The engine remembers as many, those that
/// were used last.
pub const MAX_PATHS: usize = PATHS_KNOWN as usize;
/// Bytes of all of them, likewise: a program decides how deep its stacks are, and what functions are
/// called that it compiles itself.
pub const MAX_PATH_BYTES: usize = 8 << 20;
/// Modules that are stated, and bytes of their names, likewise. The engine remembers twice as many.
pub const MAX_MODULES: usize = 4096;
/// See [`MAX_MODULES`].
pub const MAX_MODULE_BYTES: usize = 2 << 20;
/// A stack that was not seen for this long, and for twice as long at most, loses its number:
/// whoever has the numbers calls [`PathNumbers::forget_unused`] once in this many seconds.
pub const FORGET_SECONDS: u32 = 60;

/// Frames, and why they end before the outermost one.
pub type Path = (Arc<[PathFrame]>, Option<Cut>);

/// The stacks that have a number, and those that the current journal segment has.
#[derive(Debug, Default)]
pub struct PathNumbers {
    /// Seen since [`PathNumbers::forget_unused`]. Cap: [`MAX_PATHS`], with `before`.
    numbers: BTreeMap<Path, u32>,
    /// Seen in the time before only.
    before: BTreeMap<Path, u32>,
    /// Bytes in both. Cap: [`MAX_PATH_BYTES`], and those of one stack.
    bytes: usize,
    next: u32,
    /// Changes when numbers or statements become invalid.
    generation: u64,
    /// Cap: [`MAX_PATHS`].
    stated_paths: BTreeSet<u32>,
    /// With the bytes of their names. Cap: [`MAX_MODULES`] and [`MAX_MODULE_BYTES`], and those of
    /// one stack.
    stated_modules: BTreeMap<u32, usize>,
    /// Bytes in `stated_modules`.
    module_bytes: usize,
}

impl PathNumbers {
    /// The number of a stack. What the engine or the journal segment does not have yet is appended
    /// to `facts`: the stack, and before it the modules of its frames. `module` gives path and
    /// build id of a module.
    pub fn number(
        &mut self,
        path: Path,
        module: impl Fn(ModuleId) -> Option<(String, Option<String>)>,
        facts: &mut Vec<Fact>,
    ) -> u32 {
        let id = self.known(&path).unwrap_or_else(|| self.add(path.clone()));
        if self.stated_paths.insert(id) {
            let (frames, cut) = path;
            for number in frames.iter().filter_map(|frame| frame.module) {
                if let Entry::Vacant(stated) = self.stated_modules.entry(number)
                    && let Some((path, build_id)) = module(ModuleId(number))
                {
                    let bytes = path.len().saturating_add(build_id.as_ref().map_or(0, String::len));
                    stated.insert(bytes);
                    self.module_bytes = self.module_bytes.saturating_add(bytes);
                    facts.push(Fact::Module(ModuleFound { id: number, path, build_id }));
                }
            }
            facts.push(Fact::Path(PathFound { id, frames, cut }));
        }
        id
    }

    /// The number of a stack that has one.
    fn known(&mut self, path: &Path) -> Option<u32> {
        if let Some(id) = self.numbers.get(path) {
            return Some(*id);
        }
        let (path, id) = self.before.remove_entry(path)?;
        self.numbers.insert(path, id);
        Some(id)
    }

    /// A number for a new stack.
    fn add(&mut self, path: Path) -> u32 {
        if self.numbers.len().saturating_add(self.before.len()) >= MAX_PATHS
            || self.bytes >= MAX_PATH_BYTES
            || self.stated_modules.len() >= MAX_MODULES
            || self.module_bytes >= MAX_MODULE_BYTES
        {
            self.numbers.clear();
            self.before.clear();
            self.bytes = 0;
            self.restate();
        }
        let id = self.next;
        self.next = id.wrapping_add(1);
        self.bytes = self.bytes.saturating_add(bytes_of_frames(&path.0));
        self.numbers.insert(path, id);
        id
    }

    /// Forgets stacks that were not seen since the call before the last one, and which modules only
    /// those refer to.
    pub fn forget_unused(&mut self) {
        let unused = std::mem::replace(&mut self.before, std::mem::take(&mut self.numbers));
        for ((frames, _), id) in &unused {
            self.bytes = self.bytes.saturating_sub(bytes_of_frames(frames));
            self.stated_paths.remove(id);
        }
        let frames = self.before.keys().flat_map(|(frames, _)| frames.iter());
        let used: BTreeSet<u32> = frames.filter_map(|frame| frame.module).collect();
        self.stated_modules.retain(|number, _| used.contains(number));
        self.module_bytes = self.stated_modules.values().sum();
        self.generation = self.generation.wrapping_add(1);
    }

    /// A new segment of the journal has begun: it has no stack and no module yet.
    pub fn restate(&mut self) {
        self.stated_paths.clear();
        self.stated_modules.clear();
        self.module_bytes = 0;
        self.generation = self.generation.wrapping_add(1);
    }

    /// As long as this is the same, what was numbered has its number and is stated.
    pub fn generation(&self) -> u64 {
        self.generation
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(offset: u64) -> Path {
        ([PathFrame { module: Some(3), offset: Some(offset), ..PathFrame::default() }].into(), None)
    }

    #[test]
    fn deep_stacks_are_bounded_in_sum() {
        let (mut paths, mut facts) = (PathNumbers::default(), Vec::new());
        let deep = |at: u64| (vec![PathFrame { offset: Some(at), ..PathFrame::default() }; 512].into(), None);
        for at in 0..1000 {
            assert_eq!(u64::from(paths.number(deep(at), |_| None, &mut facts)), at);
        }
        assert!(paths.bytes <= MAX_PATH_BYTES + size_of::<PathFrame>() * 512);
        assert_eq!(facts.len(), 1000);
    }

    #[test]
    fn names_are_bounded_in_sum() {
        let (mut paths, mut facts) = (PathNumbers::default(), Vec::new());
        let name = "x".repeat(32 << 10);
        for at in 0..2000 {
            let frame = PathFrame { name: Some(format!("{name}{at}").into()), jit: true, ..PathFrame::default() };
            paths.number(([frame].into(), None), |_| None, &mut facts);
            facts.clear();
        }
        let held: usize = paths.numbers.keys().map(|(frames, _)| bytes_of_frames(frames)).sum();
        assert!(held == paths.bytes && held <= MAX_PATH_BYTES + (64 << 10), "{held}");
    }

    #[test]
    fn what_is_not_seen_any_more_is_forgotten_and_stated_again() {
        let (mut paths, mut facts) = (PathNumbers::default(), Vec::new());
        let mut see = |paths: &mut PathNumbers, number: u32, offset: u64| {
            let frame = PathFrame { module: Some(number), offset: Some(offset), ..PathFrame::default() };
            facts.clear();
            let name = |id: ModuleId| Some((format!("/lib/{}", id.0), None));
            (paths.number(([frame].into(), None), name, &mut facts), facts.len())
        };
        (0..1000).for_each(|at| assert_eq!(see(&mut paths, at as u32, at).0, at as u32));
        let bytes = paths.bytes;
        for _ in 0..5 {
            paths.forget_unused();
            assert_eq!((see(&mut paths, 7, 7), see(&mut paths, 7, 7)), ((7, 0), (7, 0)), "it is in use");
        }
        assert_eq!((paths.numbers.len(), paths.before.len(), paths.stated_paths.len()), (1, 0, 1));
        assert_eq!((paths.bytes, paths.stated_modules.len(), paths.module_bytes), (bytes / 1000, 1, "/lib/7".len()));
        assert_eq!((see(&mut paths, 8, 8), see(&mut paths, 7, 9)), ((1000, 2), (1001, 1)), "with its module");
        (0..2).for_each(|_| paths.forget_unused());
        assert_eq!((paths.bytes, paths.stated_paths.len(), paths.module_bytes), (0, 0, 0));
    }

    #[test]
    fn names_of_modules_are_bounded_in_sum() {
        let (mut paths, mut facts) = (PathNumbers::default(), Vec::new());
        for at in 0..2000 {
            let frame = PathFrame { module: Some(at), ..PathFrame::default() };
            paths.number(([frame].into(), None), |_| Some(("x".repeat(4096), None)), &mut facts);
            assert!(paths.module_bytes <= MAX_MODULE_BYTES + 4096);
        }
        assert_eq!(facts.len(), 4000);
    }

    #[test]
    fn a_stack_is_stated_once_a_segment() {
        let (mut paths, mut facts) = (PathNumbers::default(), Vec::new());
        let mut number = |offset, paths: &mut PathNumbers| {
            paths.number(path(offset), |id| Some((format!("/lib/{}", id.0), None)), &mut facts)
        };
        assert_eq!([16, 32, 16].map(|offset| number(offset, &mut paths)), [0, 1, 0]);
        paths.restate();
        assert_eq!(number(16, &mut paths), 0);
        let module = Fact::Module(ModuleFound { id: 3, path: "/lib/3".to_owned(), build_id: None });
        let stated = |id, offset| {
            let (frames, cut) = path(offset);
            Fact::Path(PathFound { id, frames, cut })
        };
        assert_eq!(facts, [module.clone(), stated(0, 16), stated(1, 32), module, stated(0, 16)]);
    }
}
