//! Numbers for stacks, so that a sample names its frames by a number.
//!
//! A program samples the same few hundred stacks over and over. Each distinct one becomes a fact
//! once, with its modules; samples then carry its number only. The journal is a ring of segments,
//! and a replay may begin at any of them, so after a new segment has begun each stack and module
//! is stated there once more before it is used ([`PathNumbers::restate`]).

use std::collections::{BTreeMap, BTreeSet};

use memtrace_engine::input::{Fact, ModuleFound, PATHS_KNOWN, PathFound, PathFrame, bytes_of_frames};
use memtrace_incident::Cut;
use memtrace_unwind::modules::ModuleId;

/// Stacks that have a number; beyond it all get new ones. The engine remembers as many, the newest.
pub const MAX_PATHS: usize = PATHS_KNOWN as usize;
/// Bytes of all of them, likewise: a program decides how deep its stacks are, and what functions are
/// called that it compiles itself.
pub const MAX_PATH_BYTES: usize = 8 << 20;
/// Modules that are stated, likewise.
pub const MAX_MODULES: usize = 16_384;

/// The stacks that have a number, and those that the current journal segment has.
#[derive(Debug, Default)]
pub struct PathNumbers {
    /// Cap: [`MAX_PATHS`].
    numbers: BTreeMap<(Vec<PathFrame>, Option<Cut>), u32>,
    /// Bytes in `numbers`. Cap: [`MAX_PATH_BYTES`], and those of one stack.
    bytes: usize,
    next: u32,
    /// Changes when numbers or statements become invalid.
    generation: u64,
    /// Cap: [`MAX_PATHS`].
    stated_paths: BTreeSet<u32>,
    /// Cap: [`MAX_MODULES`], and those of one stack.
    stated_modules: BTreeSet<u32>,
}

impl PathNumbers {
    /// The number of a stack. What the engine or the journal segment does not have yet is appended
    /// to `facts`: the stack, and before it the modules of its frames. `module` gives path and
    /// build id of a module.
    pub fn number(
        &mut self,
        path: (Vec<PathFrame>, Option<Cut>),
        module: impl Fn(ModuleId) -> Option<(String, Option<String>)>,
        facts: &mut Vec<Fact>,
    ) -> u32 {
        let full =
            self.numbers.len() >= MAX_PATHS || self.bytes >= MAX_PATH_BYTES || self.stated_modules.len() >= MAX_MODULES;
        if full && !self.numbers.contains_key(&path) {
            self.numbers.clear();
            self.bytes = 0;
            self.restate();
        }
        let next = self.next;
        let id = *self.numbers.entry(path.clone()).or_insert(next);
        if id == next {
            self.next = next.wrapping_add(1);
            self.bytes = self.bytes.saturating_add(bytes_of_frames(&path.0));
        }
        if self.stated_paths.insert(id) {
            let (frames, cut) = path;
            for number in frames.iter().filter_map(|frame| frame.module) {
                if self.stated_modules.insert(number)
                    && let Some((path, build_id)) = module(ModuleId(number))
                {
                    facts.push(Fact::Module(ModuleFound { id: number, path, build_id }));
                }
            }
            facts.push(Fact::Path(PathFound { id, frames, cut }));
        }
        id
    }

    /// A new segment of the journal has begun: it has no stack and no module yet.
    pub fn restate(&mut self) {
        self.stated_paths.clear();
        self.stated_modules.clear();
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

    fn path(offset: u64) -> (Vec<PathFrame>, Option<Cut>) {
        (vec![PathFrame { module: Some(3), offset: Some(offset), ..PathFrame::default() }], None)
    }

    #[test]
    fn deep_stacks_are_bounded_in_sum() {
        let (mut paths, mut facts) = (PathNumbers::default(), Vec::new());
        let deep = |at: u64| (vec![PathFrame { offset: Some(at), ..PathFrame::default() }; 512], None);
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
            let frame = PathFrame { name: Some(format!("{name}{at}")), jit: true, ..PathFrame::default() };
            paths.number((vec![frame], None), |_| None, &mut facts);
            facts.clear();
        }
        let held: usize = paths.numbers.keys().map(|(frames, _)| bytes_of_frames(frames)).sum();
        assert!(held == paths.bytes && held <= MAX_PATH_BYTES + (64 << 10), "{held}");
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
