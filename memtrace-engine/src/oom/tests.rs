//! Which SIGKILLs make victims, and of which incident.

use memtrace_common::event as wire;
use memtrace_incident::{Incident, Loss};

use super::{OPEN_CAP, pairing::KILLS_CAP};
use crate::test_support::{self, MIB, MS, SEC, TestEngine};

const T: u64 = 1_000 * SEC;

/// A SIGKILL from the kernel in cgroup 5, so many nanoseconds after the start.
fn kill(ns: u64, trigger: u32, target: u32) -> wire::Kill {
    test_support::kill(T + ns, trigger, target, 5)
}

/// A mark without the flag that SIGKILL preceded it.
fn mark(ns: u64, trigger: u32, victim: u32) -> wire::OomVictim {
    let (own, out) = (test_support::memcg(5, MIB), test_support::limited(5, MIB, MIB));
    test_support::victim(T + ns, trigger, victim, own, out, MIB)
}

/// Process id, killed and shares memory of each victim.
fn victims(incident: &Incident) -> Vec<(u32, bool, bool)> {
    incident.oom.iter().flat_map(|oom| &oom.victims).map(|v| (v.pid, v.killed, v.shares_mm)).collect()
}

fn closed(test: &mut TestEngine) -> Vec<Vec<(u32, bool, bool)>> {
    test.tick(T + 3 * SEC);
    test.saved().iter().map(victims).collect()
}

#[test]
fn a_sigkill_that_changed_nothing_makes_no_victim() {
    let mut test = TestEngine::new();
    test.feed(&kill(0, 90, 100)).feed(&mark(MS, 90, 100));
    test.feed(&wire::Kill { result: 1, ..kill(2 * MS, 90, 101) }).feed(&kill(3 * MS, 90, 102));
    assert_eq!(closed(&mut test), [[(100, true, false), (102, true, true)]]);
    // One that was only chosen stays so: SIGKILL comes before the mark.
    let mut test = TestEngine::new();
    test.feed(&mark(MS, 90, 100)).feed(&wire::Kill { result: 1, ..kill(2 * MS, 90, 100) });
    assert_eq!(closed(&mut test), [[(100, false, false)]]);
}

#[test]
fn a_process_that_is_chosen_while_dying_is_not_killed_by_an_older_sigkill_that_changed_nothing() {
    for decided in [false, true] {
        let mut test = TestEngine::new();
        if decided {
            test.feed(&test_support::decision(T - MS, 90, 100, test_support::memcg(5, MIB), 3));
        }
        test.feed(&wire::Kill { result: 1, ..kill(0, 90, 100) }).feed(&mark(MS / 10, 90, 100));
        assert_eq!(closed(&mut test), [[(100, decided, false)]]);
    }
}

#[test]
fn a_sigkill_for_another_reason_is_not_the_oom_killers() {
    // RLIMIT_CPU, then the dying process runs out of memory and marks itself.
    let mut test = TestEngine::new();
    test.feed(&kill(0, 100, 100)).feed(&mark(5 * MS, 100, 100));
    assert_eq!(closed(&mut test), [[(100, false, false)]]);
    // The same while the SIGKILL's record is late.
    let mut test = TestEngine::new();
    test.feed(&mark(5 * MS, 100, 100)).feed(&kill(0, 100, 100));
    assert_eq!(closed(&mut test), [[(100, false, false)]]);
    // A process that chose itself: the mark or the decision says so.
    let mut test = TestEngine::new();
    test.feed(&kill(0, 100, 100)).feed(&test_support::after_kill(mark(MS / 10, 100, 100), 100_000));
    assert_eq!(closed(&mut test), [[(100, true, false)]]);
    let mut test = TestEngine::new();
    test.feed(&test_support::decision(T - MS, 100, 100, test_support::memcg(5, MIB), 3));
    test.feed(&kill(0, 100, 100)).feed(&mark(5 * MS, 100, 100));
    assert_eq!(closed(&mut test), [[(100, true, false)]]);
    // Another thread than the one that marks.
    let mut test = TestEngine::new();
    test.feed(&kill(0, 80, 100)).feed(&mark(MS, 90, 100));
    assert_eq!(closed(&mut test), [[(100, false, false)]]);
}

#[test]
fn an_incident_that_is_closed_early_has_those_who_share_memory() {
    let mut test = TestEngine::new();
    test.feed(&kill(0, 90, 100)).feed(&mark(1, 90, 100)).feed(&kill(2, 90, 101));
    for n in 0..OPEN_CAP as u32 {
        let (ns, pid) = (u64::from(n) * 10 + 10, 200 + n);
        test.feed(&kill(ns, pid, pid)).feed(&mark(ns + 1, pid, pid));
    }
    let saved = test.saved();
    assert_eq!((saved.len(), victims(&saved[0])), (1, vec![(100, true, false), (101, true, true)]));
}

#[test]
fn one_process_is_killed_once() {
    // It shares the memory of a victim, and another trigger chooses it before it is dead.
    let mut test = TestEngine::new();
    test.feed(&kill(0, 90, 100)).feed(&mark(MS, 90, 100)).feed(&kill(2 * MS, 90, 101));
    test.feed(&wire::Kill { result: 1, ..kill(40 * MS, 91, 101) }).feed(&mark(41 * MS, 91, 101));
    let all = closed(&mut test).concat();
    assert_eq!(all.iter().filter(|v| v.0 == 101 && v.1).count(), 1, "{all:?}");
}

#[test]
fn a_process_that_is_chosen_again_after_its_incident_was_closed_early_is_not_killed_again() {
    let mut test = TestEngine::new();
    test.feed(&kill(0, 90, 100)).feed(&mark(1, 90, 100)).feed(&kill(2, 90, 101));
    for n in 0..OPEN_CAP as u32 {
        test.feed(&mark(u64::from(n) + 10, 200 + n, 200 + n));
    }
    test.feed(&wire::Kill { result: 1, ..kill(MS, 91, 101) });
    test.feed(&test_support::after_kill(mark(2 * MS, 91, 101), MS as u32));
    let about: Vec<_> = closed(&mut test).concat().into_iter().filter(|v| v.0 == 101).collect();
    assert_eq!(about, [(101, true, true), (101, false, false)]);
}

#[test]
fn a_process_that_was_only_chosen_while_dying_is_killed_by_the_next_decision() {
    let mut test = TestEngine::new();
    test.feed(&mark(0, 100, 100)).tick(T + 200 * MS);
    test.feed(&wire::Kill { result: 1, ..kill(300 * MS, 90, 100) });
    test.feed(&test_support::after_kill(mark(301 * MS, 90, 100), MS as u32));
    assert_eq!(closed(&mut test), [[(100, false, false)], [(100, true, false)]]);
}

#[test]
fn the_mark_of_a_kill_counts_also_when_a_later_one_of_the_dying_process_comes_first() {
    let mut test = TestEngine::new();
    let mut again = mark(9 * MS, 100, 100);
    (again.trigger.tid, again.victim.tid) = (1001, 1001);
    test.feed(&kill(0, 90, 100)).feed(&again);
    test.feed(&test_support::after_kill(mark(MS, 90, 100), MS as u32)).feed(&kill(2 * MS, 90, 101));
    assert_eq!(closed(&mut test), [[(100, true, false), (101, true, true)]]);
}

#[test]
fn a_dying_process_that_marks_itself_is_no_victim_of_its_last_decision() {
    let mut test = TestEngine::new();
    let own = |mut mark: wire::OomVictim| {
        (mark.trigger.tid, mark.victim.tid) = (1001, 1001);
        mark
    };
    // A thread of 100 kills 300, and marks itself while 100 is dying of the kill by 90, whose mark
    // is late.
    let decision = test_support::decision(T, 100, 300, test_support::memcg(5, MIB), 3);
    test.feed(&wire::OomDecision { trigger: own(mark(0, 100, 100)).trigger, ..decision });
    let mut other = test_support::after_kill(mark(MS, 100, 300), 1000);
    other.trigger.tid = 1001;
    test.feed(&other).feed(&test_support::decision(T + 2 * MS, 90, 100, test_support::memcg(5, MIB), 3));
    test.feed(&kill(3 * MS, 90, 100)).feed(&own(mark(9 * MS, 100, 100)));
    test.feed(&test_support::after_kill(mark(4 * MS, 90, 100), MS as u32)).feed(&kill(4 * MS, 90, 101));
    assert_eq!(closed(&mut test), [vec![(300, true, false)], vec![(100, true, false), (101, true, true)]]);
    // The same when the decision comes after the marks.
    let mut test = TestEngine::new();
    test.feed(&own(mark(9 * MS, 100, 100))).feed(&wire::OomDecision {
        trigger: own(mark(0, 100, 100)).trigger,
        ..test_support::decision(T, 100, 300, test_support::memcg(7, MIB), 3)
    });
    assert_eq!(closed(&mut test), [[(100, false, false)]]);
    let path =
        |incident: &Incident| incident.oom.as_ref().and_then(|oom| oom.oom_cgroup.as_ref()).map(|cgroup| cgroup.id);
    assert_eq!(test.saved().iter().map(path).collect::<Vec<_>>(), [Some(5)]);
}

#[test]
fn sigkills_that_are_dropped_before_their_mark_are_counted() {
    let mut test = TestEngine::new();
    for pid in 0..KILLS_CAP as u32 + 3 {
        test.feed(&kill(0, 90, 1000 + pid));
    }
    assert_eq!(test.engine.run.losses.current().get(Loss::KillsNotPaired.label()), Some(&3));
}
