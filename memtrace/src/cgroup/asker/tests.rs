//! The asker on directories, which are no cgroup file system.

use super::*;

/// A directory is no cgroup file system, so all ids are found by walks.
fn lookups(dirs: &[String]) -> (tempfile::TempDir, Lookups, Asker) {
    let dir = tempfile::tempdir().unwrap();
    let hierarchy = Hierarchy { version: 1, mount: dir.path().into(), hierarchy_id: 4, root: "/".into() };
    dirs.iter().for_each(|name| std::fs::create_dir_all(dir.path().join(name)).unwrap());
    let (asker, lookups) = Asker::pair(hierarchy);
    (dir, lookups, asker)
}

fn paths(asker: &Asker) -> Vec<String> {
    asker.answers(usize::MAX).map(|found| found.cgroup.path).collect()
}

#[test]
fn one_walk_answers_all_and_what_no_cgroup_has_is_not_looked_up_again() {
    let names: Vec<String> = (0..100).map(|n| format!("a/{n}")).collect();
    let (_dir, mut lookups, asker) = lookups(&names);
    let ids: BTreeSet<u64> = names.iter().map(|name| lookups.hierarchy.id_of(format!("/{name}")).unwrap()).collect();
    ids.iter().copied().chain([u64::MAX]).for_each(|id| lookups.take(Ask::Id(id)));
    lookups.answer_waiting();
    assert_eq!(asker.answers(usize::MAX).map(|found| found.cgroup.id).collect::<BTreeSet<_>>(), ids);
    ids.iter().copied().chain([u64::MAX]).for_each(|id| lookups.take(Ask::Id(id)));
    assert!(lookups.waiting.is_empty() && lookups.by_id.is_none());
}

#[test]
fn what_a_kill_waits_for_is_answered_while_the_rest_pauses() {
    let (_dir, mut lookups, asker) = lookups(&["a".into(), "b".into()]);
    let id = |lookups: &Lookups, path: &str| lookups.hierarchy.id_of(path).unwrap();
    let (a, b) = (id(&lookups, "/a"), id(&lookups, "/b"));
    lookups.take(Ask::Id(a));
    lookups.answer_waiting();
    assert_eq!(paths(&asker), ["/a"]);
    lookups.budget.left = Duration::ZERO;
    assert!([b, a, u64::MAX].into_iter().all(|id| asker.ask(Ask::Urgent(id))));
    assert!(lookups.may_go_on());
    assert_eq!(paths(&asker).into_iter().collect::<BTreeSet<_>>(), ["/a".into(), "/b".into()].into());
    lookups.take(Ask::Urgent(u64::MAX));
    assert!(lookups.urgent.is_empty(), "no cgroup has it");
    drop(asker);
    lookups.budget.left = Duration::ZERO;
    assert!(!lookups.may_go_on(), "the recorder has ended");
}

#[test]
fn what_a_kill_waits_for_passes_the_rest_on_both_ways() {
    let names: Vec<String> = (0..QUEUE_CAP + 50).map(|n| n.to_string()).collect();
    let (_dir, mut lookups, asker) = lookups(&names);
    let ids: Vec<u64> = names.iter().map(|name| lookups.hierarchy.id_of(format!("/{name}")).unwrap()).collect();
    assert_eq!(ids.iter().filter(|id| asker.ask(Ask::Id(**id))).count(), ORDINARY_CAP);
    let last = *ids.last().unwrap();
    assert!(asker.ask(Ask::Urgent(last)), "there is room for it");
    lookups.take_all();
    assert_eq!((lookups.waiting.len(), lookups.urgent.len()), (ORDINARY_CAP, 1));
    ids.iter().for_each(|id| lookups.take(Ask::Id(*id)));
    lookups.urgent.clear();
    lookups.answer_waiting();
    // Nobody has taken an answer, and the queue is full.
    lookups.take(Ask::Urgent(last));
    lookups.answer_urgent();
    let answers = asker.answers(2).map(|found| found.cgroup.id).collect::<Vec<_>>();
    assert_eq!((answers.first(), answers.len()), (Some(&last), 2));
    assert_eq!(asker.answers(usize::MAX).count(), QUEUE_CAP - 1);
}

#[test]
fn few_files_are_open_for_the_recorder_and_none_for_ever() {
    let names: Vec<String> = (0..CONTROLS_CAP + 10).map(|n| n.to_string()).collect();
    let (dir, mut lookups, asker) = lookups(&names);
    std::fs::write(dir.path().join("0/memory.oom_control"), "oom_kill_disable 1\nunder_oom 0\n").unwrap();
    lookups.take(Ask::Control(u64::MAX));
    lookups.answer_waiting();
    assert!(lookups.controls.is_empty(), "no cgroup has it");
    let id = |name: &str| lookups.hierarchy.id_of(format!("/{name}")).unwrap();
    let (first, ids): (u64, Vec<u64>) = (id("0"), names.iter().map(|name| id(name)).collect());
    ids.iter().for_each(|id| lookups.take(Ask::Control(*id)));
    assert_eq!((lookups.controls.len(), lookups.waiting.len()), (CONTROLS_CAP, CONTROLS_CAP));
    lookups.answer_waiting();
    let answers: Vec<_> = asker.answers(usize::MAX).collect();
    let open: Vec<u64> = answers.iter().filter(|one| one.control.is_some()).map(|one| one.cgroup.id).collect();
    assert_eq!((answers.len(), open), (CONTROLS_CAP, vec![first]), "where there is one");
    assert!(lookups.controls.is_empty());
}

#[test]
fn the_thread_answers_lists_and_ends() {
    let dir = tempfile::tempdir().unwrap();
    let hierarchy = Hierarchy { version: 2, mount: dir.path().into(), hierarchy_id: 0, root: "/".into() };
    std::fs::create_dir(dir.path().join("a")).unwrap();
    let id = hierarchy.id_of("/a").unwrap();
    let asker = Asker::start(hierarchy).unwrap();
    assert!(asker.ask(Ask::Id(u64::MAX)) && asker.ask(Ask::Id(id)));
    assert_eq!(asker.found.recv().unwrap().cgroup.path, "/a");
    assert!(asker.ask(Ask::All));
    assert_eq!([(); 2].map(|()| asker.found.recv().unwrap().cgroup.path), ["/", "/a"]);
    let Asker { asks, found, .. } = asker;
    drop(asks);
    assert!(found.recv().is_err(), "it ended");
}

#[test]
fn quiet_ids_expire_and_are_bounded() {
    let (now, mut quiet) = (Instant::now(), Quiet::default());
    quiet.add(1, true, now);
    quiet.add(2, false, now);
    assert!(quiet.has(1, now) && !quiet.has(1, now + QUIET_FOUND) && !quiet.has(3, now));
    assert!(!quiet.is_absent(1, now) && quiet.is_absent(2, now) && !quiet.is_absent(2, now + QUIET_ABSENT));
    (0..40_000).for_each(|id| quiet.add(id, false, now));
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
