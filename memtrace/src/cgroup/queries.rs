//! What the engine asks about cgroups: which cgroup has an id that it does not know, and whether a
//! cgroup waits for memory with its OOM killer off.
//!
//! The engine is pure, so it asks by an effect and the answer comes back as a fact with a later
//! tick. A look-up can mean a walk of the whole tree, which `asker` does on a thread of its own.

use std::collections::VecDeque;

use super::asker::{Ask, Asker};
use super::hierarchy::Hierarchy;
use super::oom_control::{ControlFile, OomControl};
use memtrace_engine::input::Fact;

/// Answers to look-ups that the engine gets in one tick.
const ANSWERS_AT_ONCE: usize = 256;
/// What waits to be passed to the asker; the engine asks again for a cgroup that found no room.
const MAX_LOOKUPS: usize = 1024;
/// Cgroups watched at once; one that finds no room is counted, and the engine asks again.
const MAX_WATCHED: usize = 64;
/// How long a cgroup is watched after it was asked for and found; longer as long as it waits.
const WATCH_NS: u64 = 5_000_000_000;
/// How long the asker may take to find it.
const FIND_NS: u64 = 10_000_000_000;
/// How often the asker is asked, which may have had no room.
const ASK_EVERY_NS: u64 = 1_000_000_000;

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
    /// `None` while the asker looks for it.
    control: Option<ControlFile>,
    /// When the asker is asked next, while it has not found it.
    ask_ns: u64,
    until_ns: u64,
    last: Option<OomControl>,
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

    /// Asks for changes of a cgroup's memory.oom_control. The asker opens it: paths are looked up under locks that
    /// whoever makes cgroups can hold for tens of ms.
    pub fn watch(&mut self, id: u64, boot_ns: u64) {
        if let Some(known) = self.watched.iter_mut().find(|watched| watched.id == id) {
            known.extend(boot_ns);
        } else if self.watched.len() < MAX_WATCHED {
            let mut watched = Watched { id, control: None, ask_ns: boot_ns, until_ns: boot_ns, last: None };
            watched.extend(boot_ns);
            self.watched.push(watched);
        } else {
            self.not_watched = self.not_watched.saturating_add(1);
        }
    }

    /// How often a cgroup was not watched because 64 others were.
    pub fn not_watched(&self) -> u64 {
        self.not_watched
    }

    /// Returns a bounded number of answers to look-ups, without waiting for any, and says which watched cgroups changed.
    pub fn answer(&mut self, hierarchy: &Hierarchy, boot_ns: u64) -> Vec<Fact> {
        let mut facts = Vec::new();
        for watched in self.watched.iter_mut().filter(|watched| watched.control.is_none() && watched.ask_ns <= boot_ns)
        {
            let ask = Ask::Control(watched.id);
            if self.lookups.len() < MAX_LOOKUPS && !self.lookups.contains(&ask) {
                watched.ask_ns = boot_ns.saturating_add(ASK_EVERY_NS);
                self.lookups.push_back(ask);
            }
        }
        self.pass_lookups(hierarchy);
        if let Some(asker) = &self.asker {
            for answer in asker.answers(ANSWERS_AT_ONCE) {
                let watched = self.watched.iter_mut().find(|watched| watched.id == answer.cgroup.id);
                if let (Some(watched), Some(control)) = (watched, answer.control) {
                    watched.control = Some(control);
                    watched.extend(boot_ns);
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
    fn extend(&mut self, boot_ns: u64) {
        self.until_ns = boot_ns.saturating_add(if self.control.is_some() { WATCH_NS } else { FIND_NS });
    }

    /// Adds a fact when the cgroup changed; false when it need not be watched any longer.
    fn answer(&mut self, hierarchy: &Hierarchy, boot_ns: u64, facts: &mut Vec<Fact>) -> bool {
        let Some(file) = &self.control else { return boot_ns < self.until_ns };
        let now = file.read();
        // A cgroup that is gone does not wait.
        let Some(control) = now.or(self.last.map(|last| OomControl { under_oom: false, ..last })) else { return false };
        if self.last != Some(control) {
            self.last = Some(control);
            if control.under_oom && control.kill_disabled {
                // A cgroup without processes has no readings of its own: these are the counters it
                // is stuck at. Such a one is rare, so that its files may be looked up here.
                facts.extend(hierarchy.read_dir(file.dir(), boot_ns).map(Fact::Cgroup));
            }
            let OomControl { kill_disabled, under_oom } = control;
            facts.push(Fact::OomControl { cgroup_id: self.id, boot_ns, kill_disabled, under_oom });
        }
        control.under_oom || (now.is_some() && boot_ns < self.until_ns)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::time::{Duration, Instant};

    use super::*;

    const SEC: u64 = 1_000_000_000;

    /// What is answered until `enough` holds: the asker is another thread.
    fn facts_until(
        q: &mut CgroupQueries,
        hierarchy: &Hierarchy,
        boot_ns: u64,
        enough: impl Fn(&CgroupQueries, &[Fact]) -> bool,
    ) -> Vec<Fact> {
        let (mut facts, begin) = (q.answer(hierarchy, boot_ns), Instant::now());
        while !enough(q, &facts) {
            assert!(begin.elapsed() < Duration::from_secs(60), "the asker finds nothing");
            std::thread::yield_now();
            facts.extend(q.answer(hierarchy, boot_ns));
        }
        facts
    }

    #[test]
    fn changes_are_reported_and_watching_ends() {
        let dir = tempfile::tempdir().unwrap();
        let hierarchy = Hierarchy { version: 1, mount: dir.path().into(), hierarchy_id: 4, root: "/".into() };
        let (a, file) = (dir.path().join("a"), dir.path().join("a/memory.oom_control"));
        fs::create_dir(&a).unwrap();
        let id = hierarchy.id_of("/a").unwrap();
        let mut q = CgroupQueries::default();
        q.watch(id, 0);
        let found = facts_until(&mut q, &hierarchy, 1, |_, facts| !facts.is_empty());
        assert!(matches!(found.as_slice(), [Fact::Cgroup(_)]), "no such file: no version 1; {found:?}");
        assert_eq!(q.watched.len(), 1, "it is asked for again");
        let found = facts_until(&mut q, &hierarchy, 2 * SEC, |_, facts| !facts.is_empty());
        assert!(matches!(found.as_slice(), [Fact::Cgroup(_)]), "{found:?}");
        q.answer(&hierarchy, FIND_NS);
        assert!(q.watched.is_empty(), "and given up");
        let changes = |q: &mut CgroupQueries, sec: u64| -> Vec<(bool, bool)> {
            let all_open = |q: &CgroupQueries, _: &[Fact]| q.watched.iter().all(|watched| watched.control.is_some());
            let facts = facts_until(q, &hierarchy, sec * SEC, all_open).into_iter();
            let change = |fact| match fact {
                Fact::OomControl { kill_disabled, under_oom, .. } => Some((kill_disabled, under_oom)),
                _ => None,
            };
            facts.filter_map(change).collect()
        };
        fs::write(&file, "oom_kill_disable 1\nunder_oom 0\n").unwrap();
        q.watch(id, SEC);
        assert_eq!(changes(&mut q, 2), [(true, false)]);
        assert!(changes(&mut q, 3).is_empty(), "on change only");
        fs::write(&file, "oom_kill_disable 1\nunder_oom 1\n").unwrap();
        let facts = q.answer(&hierarchy, 4 * SEC);
        // What was asked for before it was given up may be answered now too.
        assert!(
            matches!(facts.as_slice(), [.., Fact::Cgroup(_), Fact::OomControl { .. }]),
            "with its counters; {facts:?}"
        );
        assert!(changes(&mut q, 100).is_empty() && q.watched.len() == 1, "as long as it waits");
        fs::write(&file, "oom_kill_disable 1\nunder_oom 0\n").unwrap();
        assert_eq!((changes(&mut q, 101), q.watched.len()), (vec![(true, false)], 0));
        // Gone while it waited: a file that is open says nothing more.
        fs::write(&file, "oom_kill_disable 1\nunder_oom 1\n").unwrap();
        q.watch(id, 102 * SEC);
        assert_eq!(changes(&mut q, 102), [(true, true)]);
        fs::write(&file, "").unwrap();
        assert_eq!((changes(&mut q, 103), q.watched.len()), (vec![(true, false)], 0));
    }

    #[test]
    fn a_cgroup_whose_path_is_not_text_is_watched() {
        use std::ffi::OsStr;
        use std::os::unix::ffi::OsStrExt;
        use std::path::Path;
        let dir = tempfile::tempdir().unwrap();
        let hierarchy = Hierarchy { version: 1, mount: dir.path().into(), hierarchy_id: 4, root: "/".into() };
        let below = Path::new("a").join(OsStr::from_bytes(b"\xff\x1b"));
        fs::create_dir_all(dir.path().join(&below)).unwrap();
        fs::write(dir.path().join(&below).join("memory.oom_control"), "oom_kill_disable 1\nunder_oom 1\n").unwrap();
        let found = hierarchy.walk(0, 9).found.pop().unwrap();
        assert_eq!(found.path, "/a/\\xff\\x1b");
        let mut q = CgroupQueries::default();
        q.watch(found.id, 0);
        let facts = facts_until(&mut q, &hierarchy, 1, |_, facts| !facts.is_empty());
        let stuck = Fact::OomControl { cgroup_id: found.id, boot_ns: 1, kill_disabled: true, under_oom: true };
        assert!(facts.contains(&stuck), "{facts:?}");
        // One that is nowhere is given up.
        q.watch(u64::MAX, 0);
        q.answer(&hierarchy, FIND_NS);
        assert!(q.watched.iter().all(|watched| watched.id == found.id));
    }

    #[test]
    fn both_lists_are_bounded() {
        let mut q = CgroupQueries::default();
        for id in 0..5000u64 {
            q.look_up(id, false);
            q.look_up(id, false);
            q.watch(id, 0);
        }
        assert_eq!((q.lookups.len(), q.watched.len(), q.not_watched()), (MAX_LOOKUPS, MAX_WATCHED, 5000 - 64));
    }
}
