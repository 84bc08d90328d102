//! Looks cgroups up by id, on a thread of its own: the recorder never waits for a walk.
//!
//! One walk answers every id that waits. Its CPU time is bounded by [`Budget`], so a tree of tens
//! of thousands of cgroups makes answers late and nothing else. An id that was answered, or that
//! no cgroup has, is not looked up again for a while.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use memtrace_engine::input::CgroupFound;

use super::hierarchy::Hierarchy;
use crate::clock;

/// Ids on their way to the thread, and answers on their way back, each.
const QUEUE_CAP: usize = 1024;
/// Ids that wait for the next walk; one more is left out, and the engine asks again.
const WAITING_CAP: usize = 4096;
/// Ids that are not looked up again for a while; the set is emptied when it is full.
const QUIET_CAP: usize = 16_384;
/// How long an id that no cgroup has is not looked up again.
const QUIET_ABSENT: Duration = Duration::from_secs(30);
/// The same for an id that was answered: the engine may have asked twice.
const QUIET_FOUND: Duration = Duration::from_secs(5);
/// Cgroups that one walk visits.
const VISITS_CAP: usize = 65_536;
/// Work that is done without a pause when there was none before.
const BURST: Duration = Duration::from_millis(50);
/// Share of the time that is spent working on average: one part in so many.
const SHARE: u32 = 50;
/// Length of a pause.
const PAUSE: Duration = Duration::from_millis(20);

/// The recorder's end.
#[derive(Debug)]
pub(super) struct Asker {
    ids: SyncSender<u64>,
    found: Receiver<CgroupFound>,
}

impl Asker {
    /// Starts the thread, which ends when this is dropped. `None` when there can be no thread.
    pub(super) fn start(hierarchy: Hierarchy) -> Option<Self> {
        let (ids, to_look_up) = sync_channel(QUEUE_CAP);
        let (answers, found) = sync_channel(QUEUE_CAP);
        let run = move || run(&hierarchy, &to_look_up, &answers);
        thread::Builder::new().name("cgroups".to_owned()).spawn(run).ok()?;
        Some(Self { ids, found })
    }

    /// Asks for a cgroup; false when the queue is full. Never waits.
    pub(super) fn ask(&self, id: u64) -> bool {
        self.ids.try_send(id).is_ok()
    }

    /// The answers that are there, at most `most`. Never waits.
    pub(super) fn answers(&self, most: usize) -> impl Iterator<Item = CgroupFound> {
        self.found.try_iter().take(most)
    }
}

/// What was looked up lately, and until when it is not looked up again.
#[derive(Debug, Default)]
struct Quiet {
    /// Cap: [`QUIET_CAP`].
    until: BTreeMap<u64, Instant>,
}

impl Quiet {
    fn has(&self, id: u64, now: Instant) -> bool {
        self.until.get(&id).is_some_and(|until| now < *until)
    }

    fn add(&mut self, id: u64, until: Instant, now: Instant) {
        if self.until.len() >= QUIET_CAP {
            self.until.retain(|_, until| now < *until);
        }
        if self.until.len() >= QUIET_CAP {
            self.until.clear();
        }
        self.until.insert(id, until);
    }
}

/// Time that may be worked: [`BURST`] at first, and one part in [`SHARE`] of the time that passes.
#[derive(Debug)]
struct Budget {
    left: Duration,
    at: Instant,
}

impl Budget {
    /// Takes note of work done since the last call. True when a pause is due.
    fn worked(&mut self, now: Instant) -> bool {
        self.left = self.left.saturating_sub(now.saturating_duration_since(self.at));
        self.at = now;
        self.left.is_zero()
    }

    /// Takes note of a time without work.
    fn rested(&mut self, now: Instant) {
        let earned = now.saturating_duration_since(self.at) / SHARE;
        self.left = self.left.saturating_add(earned).min(BURST);
        self.at = now;
    }
}

fn run(hierarchy: &Hierarchy, ids: &Receiver<u64>, answers: &SyncSender<CgroupFound>) {
    let mut quiet = Quiet::default();
    let mut budget = Budget { left: BURST, at: Instant::now() };
    while let Ok(first) = ids.recv() {
        let now = Instant::now();
        budget.rested(now);
        let mut waiting: BTreeSet<u64> = std::iter::once(first).chain(ids.try_iter()).take(WAITING_CAP).collect();
        waiting.retain(|id| !quiet.has(*id, now));
        if waiting.is_empty() {
            continue;
        }
        let found = walk(hierarchy, &mut waiting, &mut budget, answers);
        let now = Instant::now();
        found.into_iter().for_each(|id| quiet.add(id, now + QUIET_FOUND, now));
        waiting.into_iter().for_each(|id| quiet.add(id, now + QUIET_ABSENT, now));
    }
}

/// Answers what is `waiting` in one walk, and leaves in it what was not found. Returns the ids
/// that were answered.
fn walk(
    hierarchy: &Hierarchy,
    waiting: &mut BTreeSet<u64>,
    budget: &mut Budget,
    answers: &SyncSender<CgroupFound>,
) -> Vec<u64> {
    let (mut found, mut seen) = (Vec::new(), 0);
    hierarchy.visit(hierarchy.root.clone(), &mut |dir, path, parent_id| {
        seen += 1;
        if budget.worked(Instant::now()) {
            thread::sleep(PAUSE);
            budget.rested(Instant::now());
        }
        if let Some(id) = super::files::id_of(dir).filter(|id| waiting.remove(id)) {
            let answer = hierarchy.read_dir(dir, path, parent_id, clock::boot_ns()).filter(|answer| answer.id == id);
            // A full queue leaves it out, and the engine asks again.
            if answer.is_some_and(|answer| answers.try_send(answer).is_ok()) {
                found.push(id);
            }
        }
        !waiting.is_empty() && seen < VISITS_CAP
    });
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_walk_answers_all_and_leaves_what_no_cgroup_has() {
        let dir = tempfile::tempdir().unwrap();
        let hierarchy = Hierarchy { version: 1, mount: dir.path().into(), hierarchy_id: 4, root: "/".into() };
        (0..100).for_each(|n| std::fs::create_dir_all(dir.path().join(format!("a/{n}"))).unwrap());
        let ids: BTreeSet<u64> = (0..100).map(|n| hierarchy.id_of(&format!("/a/{n}")).unwrap()).collect();
        let (answers, found) = sync_channel(QUEUE_CAP);
        let mut waiting: BTreeSet<u64> = ids.iter().copied().chain([u64::MAX]).collect();
        let mut budget = Budget { left: BURST, at: Instant::now() };
        assert_eq!(walk(&hierarchy, &mut waiting, &mut budget, &answers).len(), 100);
        assert_eq!(waiting.into_iter().collect::<Vec<_>>(), [u64::MAX]);
        assert_eq!(found.try_iter().map(|found| found.id).collect::<BTreeSet<_>>(), ids);
    }

    #[test]
    fn the_thread_answers_and_ends() {
        let dir = tempfile::tempdir().unwrap();
        let hierarchy = Hierarchy { version: 2, mount: dir.path().into(), hierarchy_id: 0, root: "/".into() };
        std::fs::create_dir(dir.path().join("a")).unwrap();
        let id = hierarchy.id_of("/a").unwrap();
        let asker = Asker::start(hierarchy).unwrap();
        assert!(asker.ask(u64::MAX) && asker.ask(id));
        assert_eq!(asker.found.recv().unwrap().path, "/a");
        let Asker { ids, found } = asker;
        drop(ids);
        assert!(found.recv().is_err(), "it ended");
    }

    #[test]
    fn quiet_ids_expire_and_are_bounded() {
        let (now, mut quiet) = (Instant::now(), Quiet::default());
        quiet.add(1, now + QUIET_FOUND, now);
        assert!(quiet.has(1, now) && !quiet.has(1, now + QUIET_FOUND) && !quiet.has(2, now));
        (0..40_000).for_each(|id| quiet.add(id, now + QUIET_ABSENT, now));
        assert!(quiet.until.len() <= QUIET_CAP && quiet.has(39_999, now));
    }

    #[test]
    fn work_is_a_small_share_of_the_time() {
        let start = Instant::now();
        let mut budget = Budget { left: BURST, at: start };
        assert!(!budget.worked(start + BURST / 2) && budget.worked(start + BURST));
        budget.rested(start + BURST + PAUSE);
        assert_eq!(budget.left, PAUSE / SHARE);
        budget.rested(start + Duration::from_secs(3600));
        assert_eq!(budget.left, BURST, "what is saved up is bounded");
    }
}
