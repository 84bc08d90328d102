//! Facts of a stack worker, renumbered for the run.
//!
//! A worker numbers modules and paths from 0, and a run may have several workers, one after the
//! other. The engine and the journal want numbers that are unique within the run, and each segment
//! of the journal wants what its stacks refer to: see [`super::path_numbers`].

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use memtrace_engine::input::{Fact, ModuleFound, PathFound, PathFrame, StackFound, bytes_of_frames};
use memtrace_unwind::modules::ModuleId;

use super::path_numbers::{self, Path, PathNumbers};
use super::shared_names::SharedNames;

/// Paths of one worker that are remembered, their bytes, and its modules: twice what it may refer
/// to, so that nothing is forgotten that it does not state again.
const MAX_PATHS: usize = 2 * path_numbers::MAX_PATHS;
const MAX_PATH_BYTES: usize = 2 * path_numbers::MAX_PATH_BYTES;
const MAX_NUMBERS: usize = 2 * path_numbers::MAX_MODULES;
/// Names of modules, and bytes of their paths; above it those that no path refers to are forgotten,
/// then those that were stated longest ago.
const MAX_MODULES: usize = 2 * path_numbers::MAX_MODULES;
const MAX_NAME_BYTES: usize = 2 * path_numbers::MAX_MODULE_BYTES;
/// For how many times [`path_numbers::FORGET_SECONDS`] paths of the worker are remembered that it
/// does not refer to. It forgets them after two.
const MAX_AGE: u64 = 3;

/// The numbers of the run, and those of the worker that runs.
#[derive(Debug, Default)]
pub struct Renumbering {
    paths: PathNumbers,
    next_module: u32,
    /// Numbers by path and build id: a file that another worker finds keeps its number. Cap: that
    /// of `names`.
    same: BTreeMap<(String, String), u32>,
    /// Names by number of the run. Cap: [`MAX_MODULES`] and [`MAX_NAME_BYTES`], and one.
    names: BTreeMap<u32, ModuleName>,
    /// Bytes of the paths in `names`.
    name_bytes: usize,
    /// Number of the run by number of the worker. Cap: [`MAX_NUMBERS`], the newest.
    modules: BTreeMap<u32, u32>,
    /// By number of the worker. Cap: [`MAX_PATHS`] and [`MAX_PATH_BYTES`]; those used last stay.
    frames: BTreeMap<u32, WorkerPath>,
    /// Bytes in `frames`.
    path_bytes: usize,
    /// Names of functions in `frames`.
    functions: SharedNames,
    /// Orders what was stated.
    stated: u64,
    /// The same at the last call of [`Renumbering::forget_unused`].
    stated_before: u64,
    /// Calls of [`Renumbering::forget_unused`].
    age: u64,
    /// Stacks whose path is not known.
    without_frames: u64,
    /// Numbers of the run by number of the worker, as long as `paths` is of this generation: most
    /// stacks are known. Cap: [`MAX_PATHS`].
    known: BTreeMap<u32, u32>,
    generation: u64,
}

/// A module of the run.
#[derive(Debug)]
struct ModuleName {
    path: String,
    build_id: Option<String>,
    /// When it was stated last, in the order of `stated`.
    stated: u64,
}

/// A path of the worker.
#[derive(Debug)]
struct WorkerPath {
    path: Path,
    /// The [`Renumbering::age`] when it was stated or referred to last.
    age: u64,
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
        let known = self.frames.get_mut(&path)?;
        known.age = self.age;
        let names = &self.names;
        let name = |id: ModuleId| names.get(&id.0).map(|name| (name.path.clone(), name.build_id.clone()));
        let number = self.paths.number(known.path.clone(), name, facts);
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
        self.stated = self.stated.saturating_add(1);
        let stated = self.stated;
        if let Some(name) = self.names.get_mut(&number) {
            name.stated = stated;
        } else {
            if self.names.len() >= MAX_MODULES || self.name_bytes >= MAX_NAME_BYTES {
                self.make_room_for_names();
            }
            self.next_module = self.next_module.wrapping_add(1);
            self.name_bytes = self.name_bytes.saturating_add(module.path.len());
            self.names.insert(number, ModuleName { path: module.path, build_id: module.build_id, stated });
            self.same.extend(same.map(|same| (same, number)));
        }
        self.modules.insert(module.id, number);
        if self.modules.len() > MAX_NUMBERS {
            self.modules.pop_first();
        }
    }

    /// Modules that frames refer to.
    fn modules_of_frames(&self) -> BTreeSet<u32> {
        let frames = self.frames.values().flat_map(|known| known.path.0.iter());
        frames.filter_map(|frame| frame.module).collect()
    }

    /// Forgets names that no path refers to, then those that were stated longest ago. The paths of
    /// modules that were stated just now are still to come.
    fn make_room_for_names(&mut self) {
        let referred = self.modules_of_frames();
        let recent = self.stated.saturating_sub((MAX_MODULES / 8) as u64);
        let order = |(number, name): (&u32, &ModuleName)| {
            (referred.contains(number) || name.stated > recent, name.stated, *number)
        };
        let mut order: Vec<(bool, u64, u32)> = self.names.iter().map(order).collect();
        order.sort_unstable();
        for (.., number) in order {
            if self.names.len() < MAX_MODULES / 8 * 7 && self.name_bytes < MAX_NAME_BYTES / 8 * 7 {
                break;
            }
            self.forget_name(number);
        }
        let names = &self.names;
        self.modules.retain(|_, number| names.contains_key(number));
    }

    fn forget_name(&mut self, number: u32) {
        let Some(ModuleName { path, build_id, .. }) = self.names.remove(&number) else { return };
        self.name_bytes = self.name_bytes.saturating_sub(path.len());
        build_id.map(|build_id| self.same.remove(&(path, build_id)));
    }

    fn path(&mut self, path: PathFound) {
        let Self { modules, functions, .. } = self;
        let renumber = |frame: &PathFrame| PathFrame {
            module: frame.module.and_then(|id| modules.get(&id).copied()),
            offset: frame.offset,
            name: frame.name.as_ref().map(|name| functions.share(name)),
            kernel: frame.kernel,
            jit: frame.jit,
        };
        let frames: Arc<[PathFrame]> = path.frames.iter().map(renumber).collect();
        self.path_bytes = self.path_bytes.saturating_add(bytes_of_frames(&frames));
        self.known.remove(&path.id);
        let known = WorkerPath { path: (frames, path.cut), age: self.age };
        if let Some(before) = self.frames.insert(path.id, known) {
            self.forgot(&before);
        }
        if self.frames.len() > MAX_PATHS || self.path_bytes > MAX_PATH_BYTES {
            self.make_room_for_paths();
        }
    }

    fn make_room_for_paths(&mut self) {
        let mut order: Vec<(u64, u32)> = self.frames.iter().map(|(id, known)| (known.age, *id)).collect();
        order.sort_unstable();
        for (_, id) in order {
            if self.frames.len() < MAX_PATHS / 8 * 7 && self.path_bytes < MAX_PATH_BYTES / 8 * 7 {
                break;
            }
            if let Some(known) = self.frames.remove(&id) {
                self.forgot(&known);
            }
        }
    }

    fn forgot(&mut self, known: &WorkerPath) {
        self.path_bytes = self.path_bytes.saturating_sub(bytes_of_frames(&known.path.0));
    }

    /// Forgets paths that are not in use any more, and modules that no path refers to. Call it once
    /// in [`path_numbers::FORGET_SECONDS`].
    pub fn forget_unused(&mut self) {
        self.age = self.age.saturating_add(1);
        self.paths.forget_unused();
        self.known.clear();
        let oldest = self.age.saturating_sub(MAX_AGE);
        self.frames.retain(|_, known| known.age >= oldest);
        self.path_bytes = self.frames.values().map(|known| bytes_of_frames(&known.path.0)).sum();
        self.functions.forget_unused();
        let referred = self.modules_of_frames();
        // The paths of modules that were stated since the last call may be still to come.
        let before = std::mem::replace(&mut self.stated_before, self.stated);
        let unused = self.names.iter().filter(|(number, name)| !referred.contains(number) && name.stated <= before);
        let unused: Vec<u32> = unused.map(|(number, _)| *number).collect();
        unused.into_iter().for_each(|number| self.forget_name(number));
        let Self { modules, names, .. } = self;
        modules.retain(|_, number| names.contains_key(number));
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
            let frame = PathFrame { name: Some(long.as_str().into()), jit: true, ..PathFrame::default() };
            numbers.renumber([Fact::Path(PathFound { id, frames: [frame].into(), cut: None })]);
        }
        assert!(numbers.frames.len() <= MAX_PATHS && numbers.path_bytes <= MAX_PATH_BYTES);
        let bytes: usize = numbers.frames.values().map(|known| bytes_of_frames(&known.path.0)).sum();
        assert_eq!(numbers.path_bytes, bytes);
        assert!(numbers.names.len() <= MAX_MODULES && numbers.name_bytes <= MAX_NAME_BYTES + 4096);
        assert!(numbers.same.len() <= numbers.names.len() && numbers.modules.len() <= MAX_NUMBERS);
        assert_eq!(numbers.name_bytes, numbers.names.values().map(|name| name.path.len()).sum::<usize>());
    }

    #[test]
    fn what_the_worker_refers_to_no_more_is_forgotten_long_after_it() {
        let mut numbers = Renumbering::default();
        for id in 0..100 {
            let build_id = id.to_string();
            let facts = vec![module(id, &format!("/lib/{id}"), Some(&build_id)), path(id, &[id]), stack(id)];
            assert_eq!(numbers.renumber(facts.clone()), facts);
        }
        for _ in 0..MAX_AGE {
            numbers.forget_unused();
            assert_eq!(numbers.renumber(vec![stack(7)]), [stack(7)], "it is in use");
        }
        let late = numbers.renumber(vec![stack(8)]);
        assert_eq!(late, [module(8, "/lib/8", Some("8")), path(100, &[8]), stack(100)], "the worker may know it");
        numbers.forget_unused();
        assert_eq!(
            (numbers.frames.len(), numbers.names.len(), numbers.modules.len(), numbers.same.len()),
            (2, 2, 2, 2)
        );
        assert_eq!(numbers.path_bytes, 2 * size_of::<PathFrame>());
        (0..=MAX_AGE).for_each(|_| numbers.forget_unused());
        assert_eq!((numbers.frames.len(), numbers.names.len(), numbers.name_bytes, numbers.path_bytes), (0, 0, 0, 0));
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
