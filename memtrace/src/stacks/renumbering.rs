//! Facts of a stack worker, renumbered for the run.
//!
//! A worker numbers modules and paths from 0, and a run may have several workers, one after the
//! other. The engine and the journal want numbers that are unique within the run, and each segment of
//! the journal wants what its stacks refer to: see [`super::path_numbers`].

use std::collections::BTreeMap;

use memtrace_engine::input::{Fact, ModuleFound, PathFound, PathFrame, StackFound};
use memtrace_incident::Cut;
use memtrace_unwind::modules::ModuleId;

use super::path_numbers::PathNumbers;

/// Paths and modules of one worker that are remembered; it states the others again.
const MAX_REMEMBERED: usize = 16_384;
/// Modules with a build id that keep their number when another worker finds them.
const MAX_MODULES: usize = 16_384;

/// The numbers of the run, and those of the worker that runs.
#[derive(Debug, Default)]
pub struct Renumbering {
    paths: PathNumbers,
    next_module: u32,
    /// Numbers by path and build id. Cap: [`MAX_MODULES`].
    same: BTreeMap<(String, String), u32>,
    /// Names by number of the run. Cap: [`MAX_MODULES`], the newest.
    names: BTreeMap<u32, (String, Option<String>)>,
    /// Number of the run by number of the worker. Cap: [`MAX_REMEMBERED`], the newest.
    modules: BTreeMap<u32, u32>,
    /// Frames by number of the worker. Cap: [`MAX_REMEMBERED`], the newest.
    frames: BTreeMap<u32, (Vec<PathFrame>, Option<Cut>)>,
}

impl Renumbering {
    /// Another worker runs: it numbers from 0 again.
    pub fn next_worker(&mut self) {
        self.modules.clear();
        self.frames.clear();
    }

    /// A new segment of the journal has begun, see [`PathNumbers::restate`].
    pub fn restate(&mut self) {
        self.paths.restate();
    }

    /// The facts for engine and journal, of those of the worker.
    pub fn renumber(&mut self, facts: Vec<Fact>) -> Vec<Fact> {
        let mut renumbered = Vec::with_capacity(facts.len());
        for fact in facts {
            match fact {
                Fact::Module(module) => self.module(module),
                Fact::Path(path) => self.path(path),
                Fact::Stack(stack) => {
                    // A worker states a path before it refers to it.
                    let Some(frames) = self.frames.get(&stack.path).cloned() else { continue };
                    let names = &self.names;
                    let path = self.paths.number(frames, |id: ModuleId| names.get(&id.0).cloned(), &mut renumbered);
                    renumbered.push(Fact::Stack(StackFound { path, ..stack }));
                }
                kernel @ Fact::KernelStack { .. } => renumbered.push(kernel),
                // A worker has nothing else to say.
                _ => {}
            }
        }
        renumbered
    }

    fn module(&mut self, module: ModuleFound) {
        let same = module.build_id.clone().map(|build_id| (module.path.clone(), build_id));
        let known = same.as_ref().and_then(|same| self.same.get(same).copied());
        let number = known.unwrap_or(self.next_module);
        if known.is_none() {
            self.next_module = self.next_module.wrapping_add(1);
            if let Some(same) = same {
                if self.same.len() >= MAX_MODULES {
                    self.same.clear();
                }
                self.same.insert(same, number);
            }
        }
        insert_newest(&mut self.names, MAX_MODULES, number, (module.path, module.build_id));
        insert_newest(&mut self.modules, MAX_REMEMBERED, module.id, number);
    }

    fn path(&mut self, path: PathFound) {
        let modules = &self.modules;
        let renumber =
            |frame: PathFrame| PathFrame { module: frame.module.and_then(|id| modules.get(&id).copied()), ..frame };
        let frames = path.frames.into_iter().map(renumber).collect();
        insert_newest(&mut self.frames, MAX_REMEMBERED, path.id, (frames, path.cut));
    }
}

/// Inserts, and forgets the lowest number beyond `most`.
fn insert_newest<V>(map: &mut BTreeMap<u32, V>, most: usize, number: u32, value: V) {
    map.insert(number, value);
    if map.len() > most {
        map.pop_first();
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
        for id in 0..MAX_REMEMBERED as u32 + 10 {
            numbers.renumber(vec![module(id, "/app", Some(&id.to_string())), path(id, &[id])]);
        }
        assert!(numbers.frames.len() <= MAX_REMEMBERED && numbers.names.len() <= MAX_MODULES);
        assert!(numbers.modules.len() <= MAX_REMEMBERED && numbers.same.len() <= MAX_MODULES);
    }
}
