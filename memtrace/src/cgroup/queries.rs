//! What the engine asks about cgroups: which cgroup has an id that it does not know, and whether a
//! cgroup waits for memory with its OOM killer off.
//!
//! The engine is pure, so it asks by an effect and the answer comes back as a fact with a later
//! tick. A look-up can mean a walk of the whole tree, which `asker` does on a thread of its own.

use std::collections::VecDeque;
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use super::asker::{Ask, Asker};
use super::files::CgroupDir;
use super::hierarchy::Hierarchy;
use memtrace_engine::input::Fact;

/// Answers to look-ups that the engine gets in one tick.
const ANSWERS_AT_ONCE: usize = 256;
/// What waits to be passed to the asker; the engine asks again for a cgroup that found no room.
const MAX_LOOKUPS: usize = 1024;
/// Cgroups watched at once; one that finds no room is counted, and the engine asks again.
const MAX_WATCHED: usize = 64;
/// Bytes of a memory.oom_control: three lines of a name and a number.
const CONTROL_BYTES: usize = 256;
/// How long a cgroup is watched after it was asked for; longer as long as it waits.
const WATCH_NS: u64 = 5_000_000_000;

/// Queries that wait for an answer.
#[derive(Debug, Default)]
pub struct CgroupQueries {
    /// Cap: [`MAX_LOOKUPS`].
    lookups: VecDeque<Ask>,
    /// Started when it is first asked.
    asker: Option<Asker>,
    /// Cap: [`MAX_WATCHED`].
    watched: Vec<Watched>,
    not_watched: u64,
}

#[derive(Debug)]
struct Watched {
    id: u64,
    /// From the root of what is mounted; `None` while the asker looks for it.
    below: Option<PathBuf>,
    /// Opened once: a path is looked up under locks of kernfs that others hold who make cgroups.
    control: Option<ControlFile>,
    until_ns: u64,
    last: Option<OomControl>,
}

/// The memory.oom_control of a cgroup, open.
#[derive(Debug)]
struct ControlFile {
    dir: CgroupDir,
    file: File,
}

impl ControlFile {
    /// Opens that of the cgroup, if it is the one at this path.
    fn open(hierarchy: &Hierarchy, below: &Path, id: u64) -> Option<Self> {
        let dir = open(hierarchy, below, id)?;
        let file = dir.file("memory.oom_control")?;
        Some(Self { dir, file })
    }

    /// What it says; `None` when the cgroup is gone (fs/kernfs/file.c, ENODEV) or says something else.
    fn read(&self) -> Option<OomControl> {
        let mut text = [0; CONTROL_BYTES];
        // of a file that was removed in a file system of another kind
        let is_there = self.file.metadata().is_ok_and(|about| about.nlink() > 0);
        let bytes = self.file.read_at(&mut text, 0).ok().filter(|_| is_there)?;
        parse(std::str::from_utf8(text.get(..bytes)?).ok()?)
    }
}

/// What memory.oom_control says: version 1 only, version 2 has no way to turn the OOM killer off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct OomControl {
    kill_disabled: bool,
    under_oom: bool,
}

impl CgroupQueries {
    /// Asks for the path and the counters of a cgroup, by its id; with `urgent`, before all others.
    pub fn look_up(&mut self, id: u64, urgent: bool) {
        if urgent {
            self.lookups.push_front(Ask::Urgent(id));
            self.lookups.truncate(MAX_LOOKUPS);
        } else if self.lookups.len() < MAX_LOOKUPS && !self.lookups.contains(&Ask::Id(id)) {
            self.lookups.push_back(Ask::Id(id));
        }
    }

    /// Asks for a list of cgroups, as many as the engine follows.
    pub fn list(&mut self) {
        self.lookups.push_front(Ask::All);
    }

    /// Asks for changes of a cgroup's memory.oom_control.
    ///
    /// The path that the engine has is for people: it may be escaped or cut. Where it does not lead to
    /// the cgroup, the asker finds the directory by the id.
    pub fn watch(&mut self, hierarchy: &Hierarchy, id: u64, path: &str, boot_ns: u64) {
        let until_ns = boot_ns.saturating_add(WATCH_NS);
        let found = || hierarchy.below(Path::new(path)).filter(|below| open(hierarchy, below, id).is_some());
        if let Some(known) = self.watched.iter_mut().find(|watched| watched.id == id) {
            (known.below, known.until_ns) = (known.below.take().or_else(found), until_ns);
            // The first time it may have found no room.
            if known.below.is_none() {
                self.ask_for_directory(id);
            }
        } else if self.watched.len() < MAX_WATCHED {
            let below = found();
            if below.is_none() {
                self.ask_for_directory(id);
            }
            self.watched.push(Watched { id, below, control: None, until_ns, last: None });
        } else {
            self.not_watched = self.not_watched.saturating_add(1);
        }
    }

    fn ask_for_directory(&mut self, id: u64) {
        let ask = Ask::Directory(id);
        if self.lookups.len() < MAX_LOOKUPS && !self.lookups.contains(&ask) {
            self.lookups.push_back(ask);
        }
    }

    /// How often a cgroup was not watched because 64 others were.
    pub fn not_watched(&self) -> u64 {
        self.not_watched
    }

    /// Returns a bounded number of answers to look-ups, without waiting for any, and says which watched cgroups changed.
    pub fn answer(&mut self, hierarchy: &Hierarchy, boot_ns: u64) -> Vec<Fact> {
        let mut facts = Vec::new();
        self.pass_lookups(hierarchy);
        if let Some(asker) = &self.asker {
            for answer in asker.answers(ANSWERS_AT_ONCE) {
                // Not only where it is missing: the cgroup may have another name by now (version 1).
                if let Some(watched) = self.watched.iter_mut().find(|watched| watched.id == answer.cgroup.id) {
                    watched.below = Some(answer.below);
                }
                facts.push(Fact::Cgroup(answer.cgroup));
            }
        }
        self.watched.retain_mut(|watched| watched.answer(hierarchy, boot_ns, &mut facts));
        facts
    }

    /// Passes look-ups on, as many as there is room for. The rest waits for the next tick.
    pub fn pass_lookups(&mut self, hierarchy: &Hierarchy) {
        if self.asker.is_none() && !self.lookups.is_empty() {
            self.asker = Asker::start(hierarchy.clone());
        }
        let Some(asker) = &self.asker else { return };
        while self.lookups.front().is_some_and(|ask| asker.ask(*ask)) {
            self.lookups.pop_front();
        }
    }
}

impl Watched {
    /// Adds a fact when the cgroup changed; false when it need not be watched any longer.
    fn answer(&mut self, hierarchy: &Hierarchy, boot_ns: u64, facts: &mut Vec<Fact>) -> bool {
        let Some(below) = &self.below else { return boot_ns < self.until_ns };
        if self.control.is_none() {
            self.control = ControlFile::open(hierarchy, below, self.id);
        }
        let now = self.control.as_ref().and_then(ControlFile::read);
        // A cgroup that is gone does not wait.
        let Some(control) = now.or(self.last.map(|last| OomControl { under_oom: false, ..last })) else { return false };
        if self.last != Some(control) {
            self.last = Some(control);
            if control.under_oom {
                // A cgroup without processes has no readings of its own: these are the counters it
                // is stuck at.
                let dir = self.control.as_ref().map(|control| &control.dir);
                facts.extend(dir.and_then(|dir| hierarchy.read_dir(dir, boot_ns)).map(Fact::Cgroup));
            }
            let OomControl { kill_disabled, under_oom } = control;
            facts.push(Fact::OomControl { cgroup_id: self.id, boot_ns, kill_disabled, under_oom });
        }
        control.under_oom || (now.is_some() && boot_ns < self.until_ns)
    }
}

/// The directory at this path, if it is that of the cgroup.
fn open(hierarchy: &Hierarchy, below: &Path, id: u64) -> Option<CgroupDir> {
    hierarchy.open_below(below).ok().filter(|dir| dir.id() == Some(id))
}

fn parse(text: &str) -> Option<OomControl> {
    let flag = |name: &str| {
        let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '))?;
        value.trim().parse::<u64>().ok().map(|value| value != 0)
    };
    Some(OomControl { kill_disabled: flag("oom_kill_disable")?, under_oom: flag("under_oom")? })
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::time::{Duration, Instant};

    use super::*;

    const SEC: u64 = 1_000_000_000;

    #[test]
    fn the_file_is_read() {
        let control = |kill_disabled, under_oom| Some(OomControl { kill_disabled, under_oom });
        assert_eq!(parse("oom_kill_disable 0\nunder_oom 0\noom_kill 3\n"), control(false, false));
        assert_eq!(parse("oom_kill_disable 1\nunder_oom 1\n"), control(true, true));
        for text in ["", "oom_kill_disable 1\n", "under_oom x\noom_kill_disable 1", "oom_kill_disabled 1\nunder_oom 1"]
        {
            assert_eq!(parse(text), None, "{text}");
        }
    }

    #[test]
    fn changes_are_reported_and_watching_ends() {
        let dir = tempfile::tempdir().unwrap();
        let hierarchy = Hierarchy { version: 1, mount: dir.path().into(), hierarchy_id: 4, root: "/".into() };
        let (a, file) = (dir.path().join("a"), dir.path().join("a/memory.oom_control"));
        fs::create_dir(&a).unwrap();
        let id = hierarchy.id_of("/a").unwrap();
        let mut q = CgroupQueries::default();
        let changes = |q: &mut CgroupQueries, sec: u64| -> Vec<Option<(bool, bool)>> {
            let facts = q.answer(&hierarchy, sec * SEC);
            facts
                .into_iter()
                .map(|fact| match fact {
                    Fact::OomControl { kill_disabled, under_oom, .. } => Some((kill_disabled, under_oom)),
                    _ => None,
                })
                .collect()
        };
        q.watch(&hierarchy, id, "/a", 0);
        assert!(changes(&mut q, 1).is_empty() && q.watched.is_empty(), "no such file: no version 1");
        fs::write(&file, "oom_kill_disable 1\nunder_oom 0\n").unwrap();
        q.watch(&hierarchy, id, "/a", SEC);
        assert_eq!(changes(&mut q, 2), [Some((true, false))]);
        assert!(changes(&mut q, 3).is_empty(), "on change only");
        fs::write(&file, "oom_kill_disable 1\nunder_oom 1\n").unwrap();
        assert_eq!(changes(&mut q, 4), [None, Some((true, true))], "with its counters");
        assert!(changes(&mut q, 100).is_empty() && q.watched.len() == 1, "as long as it waits");
        fs::write(&file, "oom_kill_disable 1\nunder_oom 0\n").unwrap();
        assert_eq!((changes(&mut q, 101), q.watched.len()), (vec![Some((true, false))], 0));
        // Gone while it waited.
        fs::write(&file, "oom_kill_disable 1\nunder_oom 1\n").unwrap();
        q.watch(&hierarchy, id, "/a", 102 * SEC);
        assert_eq!(changes(&mut q, 102).len(), 2);
        fs::remove_dir_all(&a).unwrap();
        assert_eq!((changes(&mut q, 103), q.watched.len()), (vec![Some((true, false))], 0));
    }

    #[test]
    fn a_cgroup_whose_path_is_not_text_is_watched() {
        use std::ffi::OsStr;
        use std::os::unix::ffi::OsStrExt;
        let dir = tempfile::tempdir().unwrap();
        let hierarchy = Hierarchy { version: 1, mount: dir.path().into(), hierarchy_id: 4, root: "/".into() };
        let below = Path::new("a").join(OsStr::from_bytes(b"\xff\x1b"));
        fs::create_dir_all(dir.path().join(&below)).unwrap();
        fs::write(dir.path().join(&below).join("memory.oom_control"), "oom_kill_disable 1\nunder_oom 1\n").unwrap();
        let found = hierarchy.walk(0, 9).found.pop().unwrap();
        assert_eq!(found.path, "/a/\\xff\\x1b");
        let mut q = CgroupQueries::default();
        q.watch(&hierarchy, found.id, &found.path, 0);
        let (mut facts, begin) = (Vec::new(), Instant::now());
        while facts.is_empty() {
            assert!(begin.elapsed() < Duration::from_secs(60), "the asker finds nothing");
            facts = q.answer(&hierarchy, 1);
            std::thread::yield_now();
        }
        let stuck = Fact::OomControl { cgroup_id: found.id, boot_ns: 1, kill_disabled: true, under_oom: true };
        assert!(facts.contains(&stuck), "{facts:?}");
        // One that is nowhere is given up.
        q.watch(&hierarchy, u64::MAX, "/a/gone", 0);
        q.answer(&hierarchy, WATCH_NS);
        assert!(q.watched.iter().all(|watched| watched.id == found.id));
    }

    #[test]
    fn both_lists_are_bounded() {
        let hierarchy = Hierarchy { version: 1, mount: "/nowhere".into(), hierarchy_id: 4, root: "/".into() };
        let mut q = CgroupQueries::default();
        for id in 0..5000u64 {
            q.look_up(id, false);
            q.look_up(id, false);
            q.watch(&hierarchy, id, "/a", 0);
        }
        assert_eq!((q.lookups.len(), q.watched.len(), q.not_watched()), (MAX_LOOKUPS, MAX_WATCHED, 5000 - 64));
    }
}
