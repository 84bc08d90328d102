//! Facts of a stack worker, renumbered for the run.
//!
//! A worker numbers modules and paths from 0, and a run may have several workers, one after the
//! other. The engine and the journal want numbers that are unique within the run, and each segment
//! of the journal wants what its stacks refer to: see [`super::path_numbers`].

use std::collections::BTreeMap;

use memtrace_engine::input::{Fact, ModuleFound, PathFound, PathFrame, StackFound, bytes_of_frames};
use memtrace_incident::Cut;
use memtrace_unwind::modules::ModuleId;

use super::path_numbers::{self, PathNumbers};

/// Paths of one worker that are remembered, their bytes, and its modules: twice what it may refer
/// to, so that nothing is forgotten that it does not state again.
const MAX_PATHS: usize = 2 * path_numbers::MAX_PATHS;
const MAX_PATH_BYTES: usize = 2 * path_numbers::MAX_PATH_BYTES;
const MAX_NUMBERS: usize = 2 * path_numbers::MAX_MODULES;
/// Names of modules, and bytes of their paths.
const MAX_MODULES: usize = 16_384;
const MAX_NAME_BYTES: usize = 8 << 20;

/// The numbers of the run, and those of the worker that runs.
#[derive(Debug, Default)]
pub struct Renumbering {
    paths: PathNumbers,
    next_module: u32,
    /// Numbers by path and build id: a file that another worker finds keeps its number. Cap: that
    /// of `names`.
    same: BTreeMap<(String, String), u32>,
    /// Names by number of the run. Cap: [`MAX_MODULES`] and [`MAX_NAME_BYTES`], the newest.
    names: BTreeMap<u32, (String, Option<String>)>,
    /// Bytes of the paths in `names`.
    name_bytes: usize,
    /// Number of the run by number of the worker. Cap: [`MAX_NUMBERS`], the newest.
    modules: BTreeMap<u32, u32>,
    /// Frames by number of the worker. Cap: [`MAX_PATHS`] and [`MAX_PATH_BYTES`], the newest.
    frames: BTreeMap<u32, (Vec<PathFrame>, Option<Cut>)>,
    /// Bytes in `frames`.
    path_bytes: usize,
    /// Stacks whose path is not known.
    without_frames: u64,
    /// Numbers of the run by number of the worker, as long as `paths` is of this generation: most
    /// stacks are known. Cap: [`MAX_PATHS`].
    known: BTreeMap<u32, u32>,
    generation: u64,
}

impl Renumbering {
    /// Another worker runs: it numbers from 0 again.
    pub fn next_worker(&mut self) {
        self.modules.clear();
        self.frames.clear();
        self.path_bytes = 0;
        self.known.clear();
    }

    /// A new segment of the journal has begun, see [`PathNumbers::restate`].
    pub fn restate(&mut self) {
        self.paths.restate();
    }

    /// The facts for engine and journal, of those of the worker.
    pub fn renumber(&mut self, facts: impl IntoIterator<Item = Fact>) -> Vec<Fact> {
        let mut renumbered = Vec::new();
        for fact in facts {
            match fact {
                Fact::Module(module) => self.module(module),
                Fact::Path(path) => self.path(path),
                Fact::Stack(stack) => {
                    // A worker states a path before it refers to it.
                    match self.number(stack.path, &mut renumbered) {
                        Some(path) => renumbered.push(Fact::Stack(StackFound { path, ..stack })),
                        None => self.without_frames = self.without_frames.saturating_add(1),
                    }
                }
                kernel @ Fact::KernelStack { .. } => renumbered.push(kernel),
                // A worker has nothing else to say.
                _ => {}
            }
        }
        renumbered
    }

    /// Stacks that were left out because their path is not known.
    pub fn without_frames(&self) -> u64 {
        self.without_frames
    }

    /// The number of the run of a path; what is to be stated before goes into `facts`.
    fn number(&mut self, path: u32, facts: &mut Vec<Fact>) -> Option<u32> {
        if self.generation == self.paths.generation()
            && let Some(number) = self.known.get(&path)
        {
            return Some(*number);
        }
        let frames = self.frames.get(&path).cloned()?;
        let names = &self.names;
        let number = self.paths.number(frames, |id: ModuleId| names.get(&id.0).cloned(), facts);
        if self.generation != self.paths.generation() || self.known.len() >= MAX_PATHS {
            self.generation = self.paths.generation();
            self.known.clear();
        }
        self.known.insert(path, number);
        Some(number)
    }

    fn module(&mut self, module: ModuleFound) {
        let same = module.build_id.clone().map(|build_id| (module.path.clone(), build_id));
        let known = same.as_ref().and_then(|same| self.same.get(same).copied());
        let number = known.unwrap_or(self.next_module);
        if known.is_none() {
            self.next_module = self.next_module.wrapping_add(1);
            self.name_bytes = self.name_bytes.saturating_add(module.path.len());
            self.names.insert(number, (module.path, module.build_id));
            self.same.extend(same.map(|same| (same, number)));
            while self.names.len() > MAX_MODULES || self.name_bytes > MAX_NAME_BYTES {
                let Some((_, (path, build_id))) = self.names.pop_first() else { break };
                self.name_bytes = self.name_bytes.saturating_sub(path.len());
                build_id.map(|build_id| self.same.remove(&(path, build_id)));
            }
        }
        self.modules.insert(module.id, number);
        if self.modules.len() > MAX_NUMBERS {
            self.modules.pop_first();
        }
    }

    fn path(&mut self, path: PathFound) {
        let modules = &self.modules;
        let renumber =
            |frame: PathFrame| PathFrame { module: frame.module.and_then(|id| modules.get(&id).copied()), ..frame };
        let frames: Vec<PathFrame> = path.frames.into_iter().map(renumber).collect();
        self.path_bytes = self.path_bytes.saturating_add(bytes_of_frames(&frames));
        self.known.remove(&path.id);
        if let Some((before, _)) = self.frames.insert(path.id, (frames, path.cut)) {
            self.forgot(&before);
        }
        while self.frames.len() > MAX_PATHS || self.path_bytes > MAX_PATH_BYTES {
            let Some((_, (frames, _))) = self.frames.pop_first() else { break };
            self.forgot(&frames);
        }
    }

    fn forgot(&mut self, frames: &[PathFrame]) {
        self.path_bytes = self.path_bytes.saturating_sub(bytes_of_frames(frames));
    }
}

#[cfg(test)]
mod tests {
    use memtrace_incident::Cause;

    use super::*;

    fn module(id: u32, path: &str, build_id: Option<&str>) -> Fact {
        Fact::Module(ModuleFound { id, path: path.to_owned(), build_id: build_id.map(str::to_owned) })
    }

    fn path(id: u32, modules: &[u32]) -> Fact {
        let frame = |module: &u32| PathFrame { module: Some(*module), offset: Some(16), ..PathFrame::default() };
        Fact::Path(PathFound { id, frames: modules.iter().map(frame).collect(), cut: None })
    }

    fn stack(path: u32) -> Fact {
        Fact::Stack(StackFound {
            boot_ns: 1,
            pid: 2,
            tid: 2,
            start_boot_ns: 1,
            comm: "app".to_owned(),
            mm_id: 3,
            cgroup_id: 4,
            cause: Cause::Touch,
            weight_bytes: 4096,
            grown_bytes: 4096,
            address: None,
            size_bytes: 0,
            path,
        })
    }

    #[test]
    fn numbers_of_two_workers_do_not_mix() {
        let mut numbers = Renumbering::default();
        let first = vec![module(0, "/app", Some("aa")), module(1, "/jit", None), path(0, &[0, 1]), stack(0)];
        assert_eq!(numbers.renumber(first.clone()), first);
        numbers.next_worker();
        assert_eq!(numbers.renumber(vec![stack(0)]), [], "a path of the worker before");
        assert_eq!(numbers.without_frames(), 1);
        let second = vec![module(0, "/jit", None), module(1, "/app", Some("aa")), path(0, &[1, 0]), stack(0), stack(0)];
        // The file with a build id is the same one, of the other nobody knows.
        let expected = [module(2, "/jit", None), path(1, &[0, 2]), stack(1), stack(1)];
        assert_eq!(numbers.renumber(second), expected);
    }

    #[test]
    fn a_segment_of_the_journal_has_what_its_stacks_refer_to() {
        let mut numbers = Renumbering::default();
        let all = [module(0, "/app", Some("aa")), path(0, &[0]), stack(0)];
        numbers.renumber(all.to_vec());
        assert_eq!(numbers.renumber(vec![stack(0)]), [stack(0)]);
        numbers.restate();
        assert_eq!(numbers.renumber(vec![stack(0)]), all);
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let mut numbers = Renumbering::default();
        let long = "x".repeat(4096);
        for id in 0..2 * MAX_NUMBERS as u32 {
            let (file, build_id) = (if id % 2 == 0 { &long } else { "/app" }, id.to_string());
            numbers.renumber(vec![module(id, file, Some(&build_id)), path(id, &[id; 32])]);
        }
        for id in 0..4 * MAX_PATHS as u32 {
            let frame = PathFrame { name: Some(long.clone()), jit: true, ..PathFrame::default() };
            numbers.renumber([Fact::Path(PathFound { id, frames: vec![frame], cut: None })]);
        }
        assert!(numbers.frames.len() <= MAX_PATHS && numbers.path_bytes <= MAX_PATH_BYTES);
        let bytes: usize = numbers.frames.values().map(|(frames, _)| bytes_of_frames(frames)).sum();
        assert_eq!(numbers.path_bytes, bytes);
        assert!(numbers.names.len() <= MAX_MODULES && numbers.name_bytes <= MAX_NAME_BYTES);
        assert!(numbers.same.len() <= numbers.names.len() && numbers.modules.len() <= MAX_NUMBERS);
        assert_eq!(numbers.name_bytes, numbers.names.values().map(|(path, _)| path.len()).sum::<usize>());
    }

    /// A worker forgets its numbers when they are too many, and states again what it refers to.
    #[test]
    fn nothing_that_a_worker_may_refer_to_is_forgotten() {
        let (mut worker, mut numbers) = (PathNumbers::default(), Renumbering::default());
        for round in 0..3_u64 {
            for at in 0..path_numbers::MAX_PATHS as u64 {
                let frame = |deep: u64| PathFrame {
                    module: Some((at % 5000) as u32),
                    offset: Some(round * 7 + at * 100 + deep),
                    ..PathFrame::default()
                };
                let mut facts = Vec::new();
                let name = |id: ModuleId| Some((format!("/lib/{}", id.0), Some(id.0.to_string())));
                let id = worker.number(((0..20).map(frame).collect(), None), name, &mut facts);
                facts.push(stack(id));
                let found = numbers.renumber(facts);
                assert!(matches!(found.last(), Some(Fact::Stack(_))), "stack {at} of round {round} is lost");
                assert!(found.iter().all(|fact| match fact {
                    Fact::Path(path) => path.frames.iter().all(|frame| frame.module.is_some()),
                    _ => true,
                }));
            }
        }
    }
}
