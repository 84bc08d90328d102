//! Tests of the engine through its interface: inputs in, outputs and requests out.

use memtrace_common::event::*;
use memtrace_incident::{Host, Incident, Kind, Loss, Scope};
use proptest::prelude::*;
use zerocopy::IntoBytes;

use super::*;
use crate::input::*;
use crate::output::{Finding, Output, Request};
use crate::test_support::{self, MIB, MS, SEC, TestEngine, Tweak};

const T: u64 = 1_000 * SEC;
const LIMIT: u64 = 256 * MIB;
const OWN: u64 = 50;

fn at_limit() -> Memcg {
    test_support::limited(OWN, LIMIT, LIMIT)
}

/// A victim that rose to the limit within 48 ms before `T`.
fn risen(test: &mut TestEngine, pid: u32) {
    test.feed(&test_support::cgroup(T - 20 * SEC, test_support::limited(OWN, 0, LIMIT), 2, "/app", CGROUP_MADE));
    test.fact(Fact::Cgroup(CgroupFound { id: 2, path: "/".into(), ..CgroupFound::default() }));
    for i in 0..=48u64 {
        let held = 36 * MIB + i * 220 * MIB / 48;
        let ns = T - (48 - i) * MS - 10_000;
        test.feed(&test_support::rss(ns, pid, OWN, 7, held).reading(test_support::limited(OWN, held, LIMIT)));
    }
}

fn close(test: &mut TestEngine) -> Vec<Incident> {
    test.tick(T + 2 * SEC);
    test.saved()
}

#[test]
fn a_burst_to_the_limit_makes_one_incident_that_ends_at_the_kill() {
    let mut test = TestEngine::new();
    risen(&mut test, 100);
    test.feed(&test_support::mapping(T - 50 * MS, 100, OWN, CALL_MMAP, 220 * MIB));
    test.feed(&test_support::kill(T, 100, 100, OWN));
    let mark = test_support::victim(T + 20_000, 100, 100, at_limit(), at_limit(), 255 * MIB);
    test.feed(&test_support::after_kill(mark, 20_000));
    let entry = test.kills();
    assert_eq!((entry.len(), entry[0].pid, entry[0].killed, entry[0].boot_ns), (1, 100, true, T));
    assert_eq!((entry[0].usage_bytes, entry[0].limit_bytes), (Some(LIMIT), Some(LIMIT)));
    assert_eq!(entry[0].cgroup_path.as_deref(), Some("/app"));
    test.feed(&test_support::exit(T + 5 * MS, 100, OWN, 9));
    test.feed(&test_support::rss(T + 6 * MS, 101, OWN, 8, MIB).reading(test_support::limited(OWN, 2 * MIB, LIMIT)));
    let closes = T + Settings::default().after_ns;
    test.tick(closes - 1);
    assert!(test.saved().is_empty());
    test.tick(closes);
    let i = &test.saved()[0];
    assert_eq!((i.kind, i.at.boot_ns, i.at.wall.as_str()), (Kind::OomKill, T, "2023-11-14T22:30:00.000000000Z"));
    assert_eq!(i.id, entry[0].incident);
    let oom = i.oom.as_ref().unwrap();
    assert_eq!((oom.scope, oom.victims.len(), oom.group_kill), (Scope::Cgroup, 1, false));
    assert_eq!(oom.victims[0].exit_boot_ns, Some(T + 5 * MS));
    assert_eq!((oom.tasks[0].pid, oom.tasks[0].victim, oom.tasks[0].anon_bytes), (100, true, 255 * MIB));
    assert_eq!((i.cgroup.limit_bytes, i.cgroup.usage_bytes), (Some(LIMIT), Some(LIMIT)));
    let c = &i.timeline.columns;
    let kill_row = c.boot_ns.iter().rposition(|ns| *ns == T).unwrap();
    assert_eq!((c.usage_bytes[kill_row], c.anon_bytes[kill_row]), (Some(LIMIT), 255 * MIB));
    assert_eq!((kill_row, c.boot_ns.len()), (50, 53), "made, 49 readings, the kill, the mark, the fall");
    assert_eq!(c.usage_bytes.last(), Some(&Some(2 * MIB)));
    assert!(
        i.verdict.summary.contains("rose 220 MiB in 48 ms to the limit, most of it in p100"),
        "{}",
        i.verdict.summary
    );
    assert_eq!(i.composition.unattributed_bytes, Some(MIB as i64));
    assert_eq!((i.mappings.len(), i.mappings[0].change_bytes), (1, 220 * MIB as i64));
    assert_eq!((i.growth[0].pid, i.growth[0].last_1s_bytes), (100, None));
    assert_eq!(test.alerts().len(), 1);
    assert_eq!(test.engine.counts().open_incidents, 0);
}

#[test]
fn kills_and_marks_pair_in_any_order() {
    enum In {
        Kill(u64),
        Mark(u64),
        Tick(u64),
    }
    use In::*;
    // Offsets from T in milliseconds; expected: kill time and whether killed.
    let cases: &[(&str, &[In], u64, bool)] = &[
        ("SIGKILL, mark", &[Kill(0), Mark(1)], 0, true),
        ("mark, SIGKILL", &[Mark(1), Kill(0)], 0, true),
        ("mark, tick, SIGKILL", &[Mark(1), Tick(50), Kill(0)], 0, true),
        ("SIGKILL twice (group)", &[Kill(0), Mark(1), Kill(2)], 0, true),
        ("SIGKILL twice, then mark", &[Kill(0), Kill(2), Mark(1)], 0, true),
        ("mark alone", &[Mark(1)], 1, false),
        ("mark, much later SIGKILL", &[Mark(1), Tick(900), Kill(1500)], 1, false),
    ];
    for (name, inputs, at_ms, killed) in cases {
        let mut test = TestEngine::new();
        for input in *inputs {
            match input {
                Kill(ms) => test.feed(&test_support::kill(T + ms * MS, 90, 100, OWN)),
                Mark(ms) => test.feed(&test_support::victim(T + ms * MS, 90, 100, at_limit(), at_limit(), MIB)),
                Tick(ms) => test.tick(T + ms * MS),
            };
        }
        let saved = close(&mut test);
        assert_eq!(saved.len(), 1, "{name}");
        let oom = saved[0].oom.as_ref().unwrap();
        assert_eq!(oom.victims.len(), 1, "{name}");
        assert_eq!((saved[0].at.boot_ns, oom.victims[0].killed), (T + at_ms * MS, *killed), "{name}");
        let kills = test.kills();
        assert_eq!((kills.len(), kills[0].killed, &kills[0].incident), (1, *killed, &saved[0].id), "{name}");
        assert_eq!(saved[0].verdict.summary.contains("killed nobody"), !killed, "{name}");
    }
}

#[test]
fn kills_that_are_not_the_oom_killers_are_no_incidents() {
    for code in [SENDER_NOINFO, SENDER_PROCESS, SENDER_KERNEL] {
        let mut test = TestEngine::new();
        test.feed(&test_support::rss(T - SEC, 100, OWN, 7, MIB));
        let mut kill = test_support::kill(T, 90, 100, OWN);
        kill.sender_code = code;
        test.feed(&kill).feed(&test_support::exit(T + MS, 100, OWN, 9));
        assert!(close(&mut test).is_empty());
        assert!(test.kills().is_empty() && test.alerts().is_empty());
    }
}

#[test]
fn a_group_kill_of_32_is_one_incident() {
    for reversed in [false, true] {
        let mut test = TestEngine::new();
        for pid in 100..132u32 {
            test.feed(&test_support::rss(T - SEC, pid, OWN, u64::from(pid), 8 * MIB));
        }
        for (i, pid) in (100..132u32).enumerate() {
            let ns = T + i as u64 * MS;
            let kill = test_support::kill(ns, 100, pid, OWN);
            let mut mark = test_support::victim(ns + 10_000, 100, pid, at_limit(), at_limit(), 8 * MIB);
            mark.flags = VICTIM_GROUP;
            let mark = test_support::after_kill(mark, 10_000);
            if reversed {
                test.feed(&mark).feed(&kill);
            } else {
                test.feed(&kill).feed(&mark);
            }
            if i == 3 {
                test.feed(&test_support::kill(ns + 20_000, 100, 100, OWN));
            }
        }
        let saved = close(&mut test);
        assert_eq!(saved.len(), 1);
        let oom = saved[0].oom.as_ref().unwrap();
        assert!(oom.group_kill && oom.victims.len() == 32 && oom.victims.iter().all(|v| v.killed && !v.shares_mm));
        assert!(oom.tasks.len() == 32 && oom.tasks.iter().all(|t| t.victim));
        assert_eq!((test.kills().len(), test.alerts().len()), (32, 1));
        assert!(saved[0].verdict.summary.contains("spread over 32 processes"), "{}", saved[0].verdict.summary);
    }
}

#[test]
fn a_process_that_shares_the_memory_is_a_victim_without_a_mark() {
    let mut test = TestEngine::new();
    test.feed(&test_support::rss(T - SEC, 100, OWN, 7, 200 * MIB));
    test.feed(&test_support::fork(T - SEC / 2, 100, 101, OWN, FORK_SHARES_MM));
    test.feed(&test_support::kill(T, 100, 100, OWN));
    let mark = test_support::victim(T + MS, 100, 100, at_limit(), at_limit(), 200 * MIB);
    test.feed(&test_support::after_kill(mark, MS as u32));
    test.feed(&test_support::kill(T + 2 * MS, 100, 101, OWN));
    test.feed(&test_support::kill(T + 2 * MS, 666, 102, OWN));
    test.feed(&test_support::kill(T + 200 * MS, 100, 103, OWN));
    let saved = close(&mut test);
    let oom = saved[0].oom.as_ref().unwrap();
    let victims: Vec<_> = oom.victims.iter().map(|v| (v.pid, v.shares_mm, v.killed, v.anon_bytes)).collect();
    assert_eq!(victims, [(100, false, true, Some(200 * MIB)), (101, true, true, Some(200 * MIB))]);
    assert!(oom.tasks.iter().all(|t| t.victim));
    assert_eq!(saved[0].composition.anon_bytes, Some(200 * MIB), "shared memory counts once");
    assert_eq!(test.kills().len(), 2);
}

#[test]
fn two_decisions_are_two_incidents() {
    // Same cgroup and different triggers; then one trigger without a group; then different
    // decisions.
    for (second_trigger, flags, decisions) in [(91, VICTIM_GROUP, false), (90, 0, false), (90, VICTIM_GROUP, true)] {
        let mut test = TestEngine::new();
        for (i, (trigger, pid)) in [(90, 100), (second_trigger, 101)].into_iter().enumerate() {
            let ns = T + i as u64 * 50 * MS;
            if decisions {
                test.feed(&test_support::decision(ns - MS, trigger, pid, at_limit(), 3));
            }
            let mut mark = test_support::victim(ns + MS, trigger, pid, at_limit(), at_limit(), MIB);
            mark.flags = flags;
            test.feed(&test_support::kill(ns, trigger, pid, OWN)).feed(&mark);
        }
        let saved = close(&mut test);
        assert_eq!(saved.len(), 2, "{second_trigger} {flags} {decisions}");
        assert_ne!(saved[0].id, saved[1].id);
        assert!(saved.iter().all(|i| i.oom.as_ref().unwrap().victims.len() == 1));
    }
}

#[test]
fn a_decision_joins_its_marks_also_without_the_group_flag() {
    let mut test = TestEngine::new();
    test.feed(&test_support::decision(T - MS, 90, 100, at_limit(), 3));
    for pid in [100, 101] {
        test.feed(&test_support::kill(T, 90, pid, OWN));
        test.feed(&test_support::victim(T + MS, 90, pid, at_limit(), at_limit(), MIB));
    }
    let saved = close(&mut test);
    assert_eq!((saved.len(), saved[0].oom.as_ref().unwrap().victims.len()), (1, 2));
}

#[test]
fn an_ancestor_kill_shows_the_ancestor() {
    let mut test = TestEngine::new();
    test.feed(&test_support::cgroup(T - 10 * SEC, test_support::limited(40, 0, LIMIT), 2, "/pod", CGROUP_MADE));
    for (id, pid) in [(50u64, 100u32), (51, 101)] {
        test.feed(&test_support::cgroup(
            T - 10 * SEC,
            test_support::memcg(id, 0),
            40,
            &format!("/pod/{id}"),
            CGROUP_MADE,
        ));
        test.feed(&test_support::rss(T - 5 * SEC, pid, id, u64::from(pid), 120 * MIB));
    }
    test.feed(&test_support::kill(T, 101, 100, 50));
    let own = test_support::memcg(50, 121 * MIB);
    test.feed(&test_support::victim(T + MS, 101, 100, own, test_support::limited(40, LIMIT, LIMIT), 120 * MIB));
    let i = &close(&mut test)[0];
    let oom = i.oom.as_ref().unwrap();
    assert_eq!(
        (oom.scope, i.cgroup.path.as_deref(), i.cgroup.usage_bytes),
        (Scope::Ancestor, Some("/pod/50"), Some(121 * MIB))
    );
    let out = oom.oom_cgroup.as_ref().unwrap();
    assert_eq!((out.path.as_deref(), out.usage_bytes, out.limit_bytes), (Some("/pod"), Some(LIMIT), Some(LIMIT)));
    assert_eq!(oom.tasks.len(), 2);
    let c = &i.timeline.columns;
    let row = c.boot_ns.iter().rposition(|ns| *ns == T).unwrap();
    assert_eq!((c.usage_bytes[row], c.anon_bytes[row]), (Some(LIMIT), 240 * MIB));
    assert_eq!((c.usage_bytes[row - 1], c.anon_bytes[row - 1]), (None, 240 * MIB));
    assert!(i.verdict.summary.starts_with("The ancestor cgroup /pod ran out of memory at its limit of 256 MiB"));
}

/// Two cgroups of a pod and one outside of it. Process 100 in /pod/50 is killed, and gone before
/// any other witness arrives.
fn pod_kill(test: &mut TestEngine, mark_oom: Memcg) {
    test.feed(&test_support::cgroup(T - 10 * SEC, test_support::limited(40, 0, LIMIT), 2, "/pod", CGROUP_MADE));
    test.feed(&test_support::cgroup(T - 10 * SEC, test_support::memcg(60, 0), 2, "/other", CGROUP_MADE));
    for (id, pid, parent) in [(50u64, 100u32, "/pod"), (51, 101, "/pod"), (60, 102, "")] {
        if !parent.is_empty() {
            test.feed(&test_support::cgroup(
                T - 10 * SEC,
                test_support::memcg(id, 0),
                40,
                &format!("{parent}/{id}"),
                CGROUP_MADE,
            ));
        }
        test.feed(&test_support::rss(T - 5 * SEC, pid, id, u64::from(pid), 120 * MIB));
    }
    test.feed(&test_support::mapping(T - SEC, 102, 60, CALL_MMAP, 120 * MIB));
    test.feed(&test_support::kill(T, 101, 100, 50));
    test.feed(&test_support::victim(T + MS, 101, 100, test_support::memcg(50, 121 * MIB), mark_oom, 120 * MIB));
    test.feed(&test_support::exit(T + 2 * MS, 100, 50, 9));
    test.feed(&test_support::mm_gone(T + 3 * MS, 100, 100, 120 * MIB));
    let mut late = test_support::rss(T + 4 * MS, 103, 60, 103, MIB);
    late.task.start_boot_ns = T + 4 * MS;
    test.feed(&late);
}

fn oom_line(constraint: &str, oom_memcg: Option<&str>) -> Fact {
    let line = KernelLogEvent::OomKill {
        constraint: constraint.into(),
        oom_memcg: oom_memcg.map(Into::into),
        task_memcg: Some("/pod/50".into()),
        comm: "p100".into(),
        pid: 100,
    };
    Fact::KernelLog(KernelLogLine { printk_ns: T, read_boot_ns: T + 20 * MS, line })
}

#[test]
fn a_kernel_log_line_that_comes_while_the_window_is_open_changes_what_is_shown() {
    let shown = |test: &mut TestEngine| {
        let i = close(test).remove(0);
        let oom = i.oom.clone().unwrap();
        let pids: Vec<u32> = oom.tasks.iter().map(|t| t.pid).collect();
        (oom, pids, i)
    };
    // The mark says that the pod ran out, but it was the machine.
    let mut test = TestEngine::new();
    pod_kill(&mut test, test_support::limited(40, LIMIT, LIMIT));
    test.fact(oom_line("CONSTRAINT_NONE", None));
    let (oom, pids, i) = shown(&mut test);
    assert_eq!((oom.scope, oom.oom_cgroup.is_none()), (Scope::Global, true));
    assert_eq!(pids, [100, 101, 102], "not who came after the kill");
    assert!(oom.tasks[0].victim && oom.tasks[0].anon_bytes == 120 * MIB);
    assert_eq!((i.growth.len(), i.mappings.len()), (3, 1));
    assert_eq!(i.composition.anon_bytes, Some(120 * MIB), "as of the kill");
    let c = &i.timeline.columns;
    assert_eq!(c.usage_bytes[..3], [Some(0), Some(120 * MIB), Some(121 * MIB)], "the victim's curve");
    assert!(i.verdict.summary.starts_with("The machine ran out of memory"), "{}", i.verdict.summary);

    // The mark says that the machine ran out, but it was the pod; also with a decision that comes
    // late.
    for decided in [false, true] {
        let mut test = TestEngine::new();
        pod_kill(&mut test, test_support::no_memcg());
        if decided {
            test.feed(&test_support::decision(T - MS, 101, 100, test_support::limited(40, LIMIT, LIMIT), 3));
            test.fact(oom_line("CONSTRAINT_NONE", None));
        } else {
            test.fact(oom_line("CONSTRAINT_MEMCG", Some("/pod")));
        }
        let (oom, pids, i) = shown(&mut test);
        assert_eq!((oom.scope, oom.oom_cgroup.unwrap().path.as_deref()), (Scope::Ancestor, Some("/pod")));
        assert_eq!(pids, [100, 101]);
        assert_eq!((i.growth.len(), i.mappings.len()), (2, 0));
        assert_eq!(i.composition.anon_bytes, Some(240 * MIB));
        let c = &i.timeline.columns;
        let kill = c.boot_ns.iter().rposition(|ns| *ns == T).unwrap();
        assert_eq!((c.usage_bytes[kill], c.anon_bytes[kill]), (decided.then_some(LIMIT), 240 * MIB));
        assert!(i.verdict.summary.starts_with("The ancestor cgroup /pod ran out"), "{}", i.verdict.summary);
    }
}

#[test]
fn an_ancestor_without_readings_leaves_the_victims_curve() {
    let mut test = TestEngine::new();
    test.feed(&test_support::rss(T - 5 * SEC, 100, 50, 7, 120 * MIB));
    test.feed(&test_support::kill(T, 100, 100, 50));
    let own = test_support::memcg(50, 121 * MIB);
    test.feed(&test_support::victim(T + MS, 100, 100, own, test_support::limited(40, LIMIT, LIMIT), 120 * MIB));
    let i = &close(&mut test)[0];
    let c = &i.timeline.columns;
    assert_eq!(c.usage_bytes[..2], [Some(120 * MIB), Some(121 * MIB)]);
}

#[test]
fn a_storm_of_kills_closes_the_oldest_early() {
    let mut test = TestEngine::new();
    for pid in 100..150u32 {
        test.feed(&test_support::kill(T + u64::from(pid), pid, pid, OWN));
        test.feed(&test_support::victim(T + u64::from(pid) + 1, pid, pid, at_limit(), at_limit(), MIB));
        assert!(test.engine.counts().open_incidents <= crate::oom::OPEN_CAP as u64);
    }
    let saved = close(&mut test);
    let early = saved.iter().filter(|i| i.losses.iter().any(|l| l.what == Loss::WindowCutShort.label())).count();
    assert_eq!((saved.len(), early, test.kills().len()), (50, 50 - crate::oom::OPEN_CAP, 50));
}

#[test]
fn a_global_oom_lists_all_processes() {
    let mut test = TestEngine::new();
    test.feed(&test_support::rss(T - SEC, 100, 50, 7, 100 * MIB));
    test.feed(&test_support::rss(T - SEC, 101, 51, 8, 700 * MIB));
    test.feed(&test_support::kill(T, 100, 101, 51));
    test.feed(&test_support::victim(
        T + MS,
        100,
        101,
        test_support::memcg(51, 700 * MIB),
        test_support::no_memcg(),
        700 * MIB,
    ));
    let i = &close(&mut test)[0];
    let oom = i.oom.as_ref().unwrap();
    assert_eq!((oom.scope, oom.tasks.len(), oom.oom_cgroup.is_none()), (Scope::Global, 2, true));
    assert_eq!((i.cgroup.id, i.cgroup.usage_bytes), (51, Some(700 * MIB)));
    assert!(i.verdict.summary.starts_with("The machine ran out of memory"), "{}", i.verdict.summary);
    assert!(i.verdict.summary.contains("most of it in p101"), "{}", i.verdict.summary);
}

#[test]
fn the_kernel_log_is_matched_whenever_it_comes() {
    for first in [true, false] {
        let mut test = TestEngine::with(Settings { kernel_log: true, ..Settings::default() });
        let line = |line| Fact::KernelLog(KernelLogLine { printk_ns: 5, read_boot_ns: T + 2 * MS, line });
        let killed = line(KernelLogEvent::Killed { pid: 100, comm: "x".into() });
        let stray = line(KernelLogEvent::Killed { pid: 555, comm: "x".into() });
        if first {
            test.fact(killed.clone()).fact(stray.clone());
        }
        test.feed(&test_support::kill(T, 90, 100, OWN));
        test.feed(&test_support::victim(T + MS, 90, 100, at_limit(), at_limit(), MIB));
        let stack = vec!["try_charge_memcg".to_owned()];
        test.fact(Fact::KernelStack {
            victim_pid: 100,
            victim_start_boot_ns: test_support::start(100),
            functions: stack,
        });
        if !first {
            test.fact(killed).fact(stray);
        }
        let saved = close(&mut test);
        test.tick(T + 3 * SEC);
        let oom = saved[0].oom.as_ref().unwrap();
        assert_eq!(oom.kernel_log.as_ref().unwrap().killed_line_ns, Some(5));
        assert_eq!(oom.trigger_kernel_stack, ["try_charge_memcg"]);
        assert!(saved[0].losses.is_empty(), "{:?}", saved[0].losses);
        let only: Vec<_> = test.alerts().into_iter().filter(|a| matches!(a, Finding::Disagreement { .. })).collect();
        assert_eq!(only, [Finding::Disagreement { pid: 555, only_in: "kernel_log".into() }]);
    }
}

#[test]
fn a_kill_missing_in_the_kernel_log_is_a_disagreement() {
    for (gap, expected) in [(0u64, Loss::KernelLogSilent), (7, Loss::KernelLogLinesLost)] {
        let settings = Settings { kernel_log: true, degraded: vec!["fault hook".into()], ..Settings::default() };
        let mut test = TestEngine::with(settings);
        test.fact(Fact::Losses { totals: vec![("samples/full".into(), 10)] });
        test.tick(T - 40 * SEC);
        test.fact(Fact::Losses { totals: vec![("samples/full".into(), 13)] });
        if gap > 0 {
            let line = KernelLogEvent::Gap { lines: gap };
            test.fact(Fact::KernelLog(KernelLogLine { printk_ns: 1, read_boot_ns: T, line }));
        }
        test.engine.apply(&Input::Record(&[1, 2, 3]), &mut test.out);
        test.feed(&test_support::kill(T, 90, 100, OWN));
        test.feed(&test_support::victim(T + MS, 90, 100, at_limit(), at_limit(), MIB));
        let saved = close(&mut test);
        let lost: Vec<_> = saved[0].losses.iter().map(|l| (l.what.as_str(), l.count)).collect();
        let count = Some(gap.max(1));
        assert_eq!(
            lost,
            [
                ("engine/bad_records", Some(1)),
                ("fault hook", None),
                (expected.label(), count),
                ("samples/full", Some(3))
            ]
        );
        test.tick(T + 3 * SEC).tick(T + 5 * SEC);
        let disagrees = test.alerts().contains(&Finding::Disagreement { pid: 100, only_in: "hook".into() });
        assert_eq!(disagrees, gap == 0);
        assert_eq!(test.engine.counts().bad_records, 1);
    }
}

#[test]
fn a_long_window_does_not_make_the_kernel_log_forget_its_kills() {
    let settings = Settings { kernel_log: true, after_ns: 120 * SEC, ..Settings::default() };
    let mut test = TestEngine::with(settings);
    test.feed(&test_support::kill(T, 90, 100, OWN));
    test.feed(&test_support::victim(T + MS, 90, 100, at_limit(), at_limit(), MIB));
    let line = KernelLogEvent::Killed { pid: 100, comm: "x".into() };
    test.fact(Fact::KernelLog(KernelLogLine { printk_ns: 5, read_boot_ns: T + 2 * MS, line }));
    for sec in 0..130 {
        test.tick(T + sec * SEC);
    }
    let saved = test.saved();
    assert_eq!(saved.len(), 1);
    assert_eq!(saved[0].oom.as_ref().unwrap().kernel_log.as_ref().and_then(|log| log.killed_line_ns), Some(5));
    assert!(saved[0].losses.is_empty(), "{:?}", saved[0].losses);
    let disagrees = |alert: &Finding| matches!(alert, Finding::Disagreement { .. });
    assert!(!test.alerts().iter().any(disagrees), "{:?}", test.alerts());
}

#[test]
fn a_kernel_log_that_cannot_be_read_any_more_is_said_and_is_no_disagreement() {
    let mut test = TestEngine::with(Settings { kernel_log: true, ..Settings::default() });
    test.tick(T - SEC);
    let line = KernelLogEvent::Unreadable;
    test.fact(Fact::KernelLog(KernelLogLine { printk_ns: 0, read_boot_ns: T, line }));
    for n in 0..3u64 {
        let (ns, pid) = (T + n * SEC, 100 + n as u32);
        test.feed(&test_support::kill(ns, 90, pid, OWN));
        test.feed(&test_support::victim(ns + MS, 90, pid, at_limit(), at_limit(), MIB));
        test.tick(ns + 2 * MS);
    }
    for sec in 3..10 {
        test.tick(T + sec * SEC);
    }
    let lost = |incident: &Incident| incident.losses.iter().map(|loss| loss.what.clone()).collect::<Vec<_>>();
    assert_eq!(test.saved().iter().map(lost).collect::<Vec<_>>(), vec![vec!["kernel_log/not_read".to_owned()]; 3]);
    let disagrees = |alert: &Finding| matches!(alert, Finding::Disagreement { .. });
    assert!(!test.alerts().iter().any(disagrees), "{:?}", test.alerts());
    assert!(test.engine.preamble(T + 10 * SEC).iter().any(|fact| matches!(fact, Fact::KernelLog(_))));
}

#[test]
fn a_spike_is_saved_and_a_kill_explains_it() {
    for (killed, spikes) in [(false, true), (true, true), (false, false)] {
        let mut test = TestEngine::with(Settings { spikes, ..Settings::default() });
        let reading = |test: &mut TestEngine, ns: u64, mib: u64| {
            test.feed(&test_support::rss(ns, 100, OWN, 7, mib * MIB).reading(test_support::limited(
                OWN,
                mib * MIB,
                LIMIT,
            )));
        };
        for (ms, mib) in [(0, 60), (300, 160), (600, 230), (700, 231), (900, 90)] {
            reading(&mut test, T - SEC + ms * MS, mib);
        }
        if killed {
            test.feed(&test_support::kill(T, 90, 100, OWN));
            test.feed(&test_support::victim(T + MS, 90, 100, at_limit(), at_limit(), MIB));
        }
        let saved = close(&mut test);
        let kinds: Vec<_> = saved.iter().map(|i| i.kind).collect();
        match (killed, spikes) {
            (true, _) => assert_eq!(kinds, [Kind::OomKill]),
            (false, false) => assert!(kinds.is_empty()),
            (false, true) => {
                assert_eq!(kinds, [Kind::Spike]);
                let i = &saved[0];
                assert_eq!((i.at.boot_ns, i.cgroup.usage_bytes), (T - 300 * MS, Some(231 * MIB)));
                assert_eq!(i.growth[0].last_1s_bytes, None);
                assert_eq!(i.composition.anon_bytes, Some(231 * MIB));
                assert_eq!(i.timeline.columns.boot_ns.len(), 5);
                let alert = Finding::Spike {
                    incident: i.id.clone(),
                    cgroup_path: None,
                    peak_bytes: 231 * MIB,
                    limit_bytes: LIMIT,
                };
                assert!(test.alerts().contains(&alert));
            }
        }
    }
}

#[test]
fn reclaim_below_the_limit_is_no_near_miss() {
    // Two CPUs may charge 256 KiB each ahead of use, but at most an eighth of the limit is
    // tolerated.
    let cases = [
        (LIMIT - MIB / 2, LIMIT, true),
        (LIMIT - MIB / 2 - 4096, LIMIT, false),
        (7 * MIB / 8, MIB, true),
        (6 * MIB / 8, MIB, false),
        (MIB, UNKNOWN, false),
        (UNKNOWN, LIMIT, false),
    ];
    for (usage, limit, expected) in cases {
        let mut test = TestEngine::new();
        test.feed(&test_support::reclaim(T - 1, 100, at_limit(), RECLAIM_END, MS));
        test.feed(&test_support::reclaim(T, 100, test_support::limited(OWN, usage, limit), RECLAIM_BEGIN, 0));
        test.tick(T + 5 * SEC);
        assert_eq!(test.alerts().len(), usize::from(expected), "{usage} of {limit}");
    }
}

#[test]
fn unknown_cgroups_are_looked_up_and_small_limits_get_a_small_threshold() {
    let mut test = TestEngine::new();
    let small = 20 * MIB;
    for _ in 0..3 {
        test.feed(&test_support::rss(T, 100, OWN, 7, MIB).reading(test_support::limited(OWN, MIB, small)));
    }
    test.feed(&test_support::rss(T, 100, OWN, 7, MIB).reading(test_support::limited(OWN, MIB, 1 << 40)));
    let asked: Vec<_> = test.requests().iter().filter(|r| matches!(r, Request::LookUpCgroup { .. })).collect();
    assert_eq!(asked, [&Request::LookUpCgroup { id: OWN, urgent: false }]);
    let thresholds: Vec<_> =
        test.requests().iter().filter(|r| matches!(r, Request::SetRssThreshold { .. })).cloned().collect();
    let threshold = |threshold_bytes| Request::SetRssThreshold { cgroup_id: OWN, threshold_bytes };
    assert_eq!(thresholds, [threshold(40_960), threshold(256 * 1024)]);
    assert_eq!(small / crate::limits::THRESHOLDS_PER_LIMIT, 40_960);
}

#[test]
fn a_recording_lists_everyone_and_keeps_its_peak() {
    let mut test = TestEngine::new();
    test.fact(Fact::RecordingBegin { cgroup_id: Some(OWN), pid: None, command: vec!["make".into()], boot_ns: T - SEC });
    test.feed(&test_support::cgroup(T - SEC, test_support::memcg(OWN, 0), 2, "/rec", CGROUP_MADE));
    test.feed(&test_support::fork(T - SEC + 1, 1, 100, OWN, 0));
    test.feed(&test_support::rss(T - 900 * MS, 100, OWN, 7, 2 * MIB));
    test.feed(&test_support::fork(T - 800 * MS, 100, 101, OWN, 0));
    test.feed(&test_support::exec(T - 790 * MS, 101, OWN, "cc", 0, 8));
    for i in 0..10_000u64 {
        let bytes = if i == 5_001 { 300 * MIB } else { i * 1024 };
        test.feed(
            &test_support::rss(T - 700 * MS + i * MS, 101, OWN, 8, bytes).reading(test_support::memcg(OWN, bytes)),
        );
    }
    test.feed(&test_support::fork(T, 1, 200, 60, 0));
    test.feed(&test_support::kill(T + 9500 * MS, 101, 101, OWN));
    test.feed(&test_support::victim(T + 9501 * MS, 101, 101, at_limit(), at_limit(), 10 * MIB));
    test.feed(&test_support::mm_gone(T + 9502 * MS, 101, 8, 301 * MIB));
    test.feed(&test_support::exit(T + 9503 * MS, 101, OWN, 9));
    test.feed(&test_support::exit(T + 9504 * MS, 100, OWN, 0));
    test.fact(Fact::RecordingEnd {
        boot_ns: T + 9600 * MS,
        exit_code: Some(2),
        signal: None,
        cgroup_peak_bytes: Some(302 * MIB),
    });
    let i = &test.saved()[0];
    let r = i.recording.as_ref().unwrap();
    assert_eq!(
        (i.kind, r.duration_ns, r.exit_code, r.command[0].as_str()),
        (Kind::Recording, 10_600 * MS, Some(2), "make")
    );
    let rows: Vec<_> = r.processes.iter().map(|p| (p.pid, p.peak_bytes, p.max_rss_bytes, p.exit_code)).collect();
    assert_eq!(rows, [(101, Some(301 * MIB), Some(123 * MIB), Some(9)), (100, Some(2 * MIB), None, Some(0))]);
    assert_eq!((i.cgroup.peak_bytes, r.processes_left_out), (Some(302 * MIB), 0));
    assert_eq!(i.timeline.columns.usage_bytes.iter().flatten().max(), Some(&(300 * MIB)));
    assert!(i.timeline.thinned > 0 && i.timeline.columns.boot_ns.len() <= crate::world::CURVE_CAP + 10);
    assert_eq!(i.composition.anon_bytes, Some(302 * MIB), "the shell's 2 MiB too");
    assert_eq!(i.growth[0].pid, 101);
    assert_eq!(r.oom_incidents, [test.kills()[0].incident.clone()]);
    assert!(i.oom.is_some());
}

#[test]
fn a_child_that_does_not_exec_has_a_peak_of_its_own() {
    for fork_first in [true, false] {
        let mut test = TestEngine::new();
        test.feed(&test_support::rss(T - SEC, 100, OWN, 7, 300 * MIB));
        test.feed(&test_support::rss(T - SEC / 2, 100, OWN, 7, 40 * MIB));
        test.fact(Fact::RecordingBegin { cgroup_id: None, pid: Some(100), command: Vec::new(), boot_ns: T });
        let fork = test_support::fork(T + 1, 100, 101, OWN, 0);
        let mut first = test_support::rss(T + 2, 101, OWN, 8, 40 * MIB);
        first.reason = RSS_FIRST;
        if fork_first {
            test.feed(&fork).feed(&first);
        } else {
            test.feed(&first).feed(&fork);
        }
        // These two share the address space of their parent, so their own peak is unknown.
        test.feed(&test_support::fork(T + 3, 100, 102, OWN, FORK_SHARES_MM));
        test.feed(&test_support::fork(T + 4, 102, 103, OWN, FORK_SHARES_MM));
        test.feed(&test_support::rss(T + MS, 101, OWN, 8, 60 * MIB));
        for pid in [101, 102, 103] {
            let mut exit = test_support::exit(T + 2 * MS, pid, OWN, 0);
            exit.max_rss_bytes = if pid == 101 { 61 * MIB } else { 300 * MIB };
            test.feed(&exit);
        }
        test.feed(&test_support::mm_gone(T + 3 * MS, 101, 8, 60 * MIB));
        test.fact(Fact::RecordingEnd { boot_ns: T + SEC, exit_code: None, signal: None, cgroup_peak_bytes: None });
        let saved = test.saved();
        let processes = &saved[0].recording.as_ref().unwrap().processes;
        let rows: Vec<_> = processes.iter().map(|p| (p.pid, p.peak_bytes, p.max_rss_bytes)).collect();
        let child = (101, Some(60 * MIB), Some(61 * MIB));
        assert_eq!(rows, [(100, Some(300 * MIB), None), child, (102, None, None), (103, None, None)], "{fork_first}");
    }
}

#[test]
fn a_process_recording_follows_descendants() {
    let mut test = TestEngine::new();
    test.feed(&test_support::rss(T - SEC, 100, OWN, 7, 10 * MIB));
    test.feed(&test_support::rss(T - SEC, 300, OWN, 9, 10 * MIB));
    test.fact(Fact::RecordingBegin { cgroup_id: None, pid: Some(100), command: Vec::new(), boot_ns: T });
    test.feed(&test_support::fork(T + 1, 100, 101, OWN, 0));
    test.feed(&test_support::fork(T + 2, 101, 102, OWN, 0));
    test.feed(&test_support::rss(T + MS, 102, OWN, 8, 90 * MIB));
    test.fact(Fact::RecordingEnd { boot_ns: T + SEC, exit_code: None, signal: None, cgroup_peak_bytes: Some(1 << 40) });
    let i = &test.saved()[0];
    let pids: Vec<_> = i.recording.as_ref().unwrap().processes.iter().map(|p| p.pid).collect();
    assert_eq!(pids, [102, 100, 101]);
    assert_eq!(i.timeline.columns.anon_bytes, [100 * MIB]);
    assert_eq!(i.verdict.summary.split(',').next().unwrap(), "Memory peaked at 100 MiB");
}

#[test]
fn stop_closes_every_incident_and_another_boot_begins_empty() {
    let mut test = TestEngine::new();
    test.feed(&test_support::kill(T, 90, 100, OWN));
    test.feed(&test_support::victim(T + MS, 90, 100, at_limit(), at_limit(), MIB));
    test.fact(Fact::Stop { boot_ns: T + 2 * MS });
    let saved = test.saved();
    assert_eq!(saved.len(), 1);
    assert!(saved[0].losses.iter().any(|l| l.what == Loss::WindowCutShort.label()));
    assert!(test.engine.preamble(T).is_empty());
    let known = |test: &TestEngine| (test.engine.counts().processes, test.engine.counts().cgroups);
    test.fact(test_support::start_fact(Settings::default()));
    assert_eq!(known(&test), (0, 0), "a stopped run leaves nothing");
    test.feed(&test_support::rss(T, 100, OWN, 7, MIB));
    test.fact(test_support::start_fact(Settings::default()));
    assert_eq!(known(&test), (1, 1), "a repeated start is the same run");
    let host = Host { boot_id: "boot-2".into(), ..Host::default() };
    test.fact(Fact::Start { host, settings: Settings::default() });
    assert_eq!(known(&test), (0, 0));
}

#[test]
fn the_snapshot_shows_who_holds_what() {
    let mut test = TestEngine::new();
    risen(&mut test, 100);
    let s = test.engine.snapshot();
    let app = s.cgroups.iter().find(|c| c.id == OWN).unwrap();
    assert_eq!((app.path.as_deref(), app.limit_bytes, app.anon_bytes), (Some("/app"), Some(LIMIT), LIMIT));
    assert_eq!((s.processes.len(), s.processes[0].peak_bytes), (1, LIMIT));
    // Of cgroups beside each other: those with a limit first, and none whose usage is not known.
    let ids = |most| test.engine.foremost_cgroups(most).iter().map(|row| row.id).collect::<Vec<_>>();
    let known = s.cgroups.iter().filter(|row| row.usage_bytes.is_some()).count();
    assert_eq!((ids(1), ids(9).len()), (vec![OWN], known));
}

#[test]
fn a_fresh_engine_learns_from_a_preamble() {
    let mut test = TestEngine::new();
    risen(&mut test, 100);
    test.tick(T - SEC).fact(Fact::Losses { totals: vec![("samples/full".into(), 10)] });
    let mut fresh = TestEngine { engine: Engine::new(), out: Out::default() };
    for fact in test.engine.preamble(T) {
        fresh.fact(fact);
    }
    let (old, new) = (test.engine.snapshot(), fresh.engine.snapshot());
    let of = |s: &Snapshot| s.cgroups.iter().map(|c| (c.id, c.path.clone(), c.anon_bytes)).collect::<Vec<_>>();
    assert_eq!(of(&old), of(&new));
    fresh.feed(&test_support::kill(T, 100, 100, OWN));
    fresh.feed(&test_support::victim(T + MS, 100, 100, at_limit(), at_limit(), 255 * MIB));
    let i = &close(&mut fresh)[0];
    assert!(i.losses.is_empty(), "{:?}", i.losses);
    assert_eq!((i.cgroup.path.as_deref(), i.oom.as_ref().unwrap().tasks.len()), (Some("/app"), 1));
}

// --- arbitrary inputs ---------------------------------------------------------------------------

/// An input that owns its bytes.
#[derive(Clone)]
enum OwnedInput {
    Record(Vec<u8>),
    Fact(Fact),
}

impl std::fmt::Debug for OwnedInput {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Record(bytes) => write!(f, "{:?}", decode::decode(bytes)),
            Self::Fact(fact) => write!(f, "{fact:?}"),
        }
    }
}

fn run(engine: &mut Engine, inputs: &[OwnedInput]) -> Out {
    let mut out = Out::default();
    for input in inputs {
        match input {
            OwnedInput::Record(bytes) => engine.apply(&Input::Record(bytes), &mut out),
            OwnedInput::Fact(fact) => engine.apply(&Input::Fact(fact.clone()), &mut out),
        }
    }
    out
}

fn json(out: &Out) -> Vec<String> {
    let text = |e: &Output| match e {
        Output::Save(i) => serde_json::to_string(i).unwrap(),
        other => format!("{other:?}"),
    };
    out.outputs.iter().map(text).collect()
}

/// A record of some kind with its size and any content. Numbers are mostly small, so that records
/// refer to the same things.
fn any_record() -> impl Strategy<Value = OwnedInput> {
    let word = |n: u64| match n % 8 {
        0 => UNKNOWN,
        1 => NO_LIMIT,
        2 => n,
        3 => T + n % (3 * SEC),
        _ => (n >> 8) % 6,
    };
    (0..KINDS.len(), any::<u64>(), T..T + 3 * SEC, any::<bool>()).prop_map(move |(k, seed, ns, sane)| {
        let (kind, size, _) = KINDS[k];
        let mut state = seed;
        let mut bytes = Vec::with_capacity(size);
        while bytes.len() < size {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            bytes.extend(word(state ^ (state >> 33)).to_ne_bytes());
        }
        bytes[..2].copy_from_slice(&kind.to_ne_bytes());
        bytes[2..4].copy_from_slice(&(size as u16).to_ne_bytes());
        if sane {
            bytes[8..16].copy_from_slice(&ns.to_ne_bytes());
        }
        OwnedInput::Record(bytes)
    })
}

/// Records that make sense, over few processes and cgroups.
fn plausible_record() -> impl Strategy<Value = OwnedInput> {
    let ms = || (0u64..8000).prop_map(|ms| T + ms * MS);
    let pid = || 100u32..105;
    let cgroup = || 50u64..53;
    prop_oneof![
        6 => (ms(), pid(), cgroup(), 0u64..260).prop_map(|(ns, pid, c, mib)| {
            OwnedInput::Record(test_support::rss(ns, pid, c, u64::from(pid % 4), mib * MIB)
                .reading(test_support::limited(c, mib * MIB, LIMIT)).as_bytes().to_vec())
        }),
        2 => (ms(), pid(), pid(), cgroup()).prop_map(|(ns, s, t, c)| {
            OwnedInput::Record(test_support::kill(ns, s, t, c).as_bytes().to_vec())
        }),
        2 => (ms(), pid(), pid(), cgroup(), 0u32..4).prop_map(|(ns, s, t, c, flags)| {
            let mut v = test_support::victim(ns, s, t, test_support::memcg(c, 5 * MIB), test_support::limited(51, LIMIT, LIMIT), 5 * MIB);
            v.flags = flags;
            OwnedInput::Record(v.as_bytes().to_vec())
        }),
        1 => (ms(), pid(), cgroup()).prop_map(|(ns, p, c)| OwnedInput::Record(test_support::exit(ns, p, c, 9).as_bytes().to_vec())),
        1 => (ms(), pid(), pid(), cgroup(), 0u32..2).prop_map(|(ns, p, q, c, f)| {
            OwnedInput::Record(test_support::fork(ns, p, q, c, f).as_bytes().to_vec())
        }),
        1 => (ms(), pid(), cgroup()).prop_map(|(ns, p, c)| OwnedInput::Record(test_support::attach(ns, p, c).as_bytes().to_vec())),
        1 => (ms(), cgroup(), cgroup(), 1u32..3).prop_map(|(ns, c, parent, change)| {
            OwnedInput::Record(test_support::cgroup(ns, test_support::limited(c, MIB, LIMIT), parent, "/x", change).as_bytes().to_vec())
        }),
        1 => (ms(), pid(), 0u64..4).prop_map(|(ns, p, mm)| OwnedInput::Record(test_support::mm_gone(ns, p, mm, MIB).as_bytes().to_vec())),
        1 => (ms(), pid(), pid()).prop_map(|(ns, p, q)| {
            OwnedInput::Record(test_support::decision(ns, p, q, test_support::limited(51, LIMIT, LIMIT), 3).as_bytes().to_vec())
        }),
        1 => (ms(), cgroup()).prop_map(|(ns, c)| {
            OwnedInput::Record(test_support::reclaim(ns, 100, test_support::limited(c, LIMIT, LIMIT), RECLAIM_BEGIN, 0).as_bytes().to_vec())
        }),
    ]
}

fn any_fact() -> impl Strategy<Value = OwnedInput> {
    let ns = || T..T + 8 * SEC;
    prop_oneof![
        4 => ns().prop_map(|boot_ns| Fact::Tick { boot_ns }),
        1 => (ns(), any::<u64>()).prop_map(|(boot_ns, n)| Fact::Anchor { boot_ns, wall_ns: n as i64, uncertainty_ns: n }),
        1 => (0u64..6, 0u64..6, any::<u64>()).prop_map(|(id, parent, n)| {
            let usage_bytes = n.is_multiple_of(2).then_some(n);
            Fact::Cgroup(CgroupFound { id: 50 + id, parent_id: Some(49 + parent), path: format!("/{id}"), usage_bytes, ..CgroupFound::default() })
        }),
        1 => (100u32..105, any::<u64>()).prop_map(|(pid, n)| {
            Fact::Process(ProcessFound { pid, parent_pid: 100, start_ticks: u64::from(pid) * 10, cgroup_id: 50, anon_bytes: n, ..ProcessFound::default() })
        }),
        1 => (ns(), 100u32..105, 0usize..3, 0u64..6).prop_map(|(read_boot_ns, pid, constraint, id)| {
            let constraint = ["CONSTRAINT_NONE", "CONSTRAINT_CPUSET", "CONSTRAINT_MEMCG"][constraint].to_owned();
            let (oom_memcg, comm) = (Some(format!("/{id}")), "x".to_owned());
            let line = KernelLogEvent::OomKill { constraint, oom_memcg, task_memcg: Some("/x".into()), comm, pid };
            Fact::KernelLog(KernelLogLine { printk_ns: 1, read_boot_ns, line })
        }),
        1 => (ns(), 100u32..105).prop_map(|(read_boot_ns, pid)| {
            Fact::KernelLog(KernelLogLine { printk_ns: 1, read_boot_ns, line: KernelLogEvent::Killed { pid, comm: "\x1b".into() } })
        }),
        1 => any::<u64>().prop_map(|n| Fact::Losses { totals: vec![("samples/full".into(), n)] }),
        1 => (ns(), prop::option::of(50u64..53), prop::option::of(100u32..105)).prop_map(|(boot_ns, cgroup_id, pid)| {
            Fact::RecordingBegin { cgroup_id, pid, command: Vec::new(), boot_ns }
        }),
        1 => ns().prop_map(|boot_ns| Fact::RecordingEnd { boot_ns, exit_code: None, signal: None, cgroup_peak_bytes: None }),
        1 => ns().prop_map(|boot_ns| Fact::Stop { boot_ns }),
    ]
    .prop_map(OwnedInput::Fact)
}

fn plausible_inputs() -> impl Strategy<Value = Vec<OwnedInput>> {
    prop::collection::vec(prop_oneof![4 => plausible_record(), 1 => any_fact()], 1..300)
}

fn started_engine() -> Engine {
    let settings = Settings { kernel_log: true, ..Settings::default() };
    let mut engine = Engine::new();
    engine.apply(&Input::Fact(test_support::start_fact(settings)), &mut Out::default());
    engine
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    #[test]
    fn no_input_panics_and_everything_stays_bounded(
        inputs in prop::collection::vec(prop_oneof![4 => any_record(), 2 => plausible_record(), 1 => any_fact()], 1..400),
        noise in prop::collection::vec(any::<u8>(), 0..40),
    ) {
        let mut engine = started_engine();
        let mut out = run(&mut engine, &inputs);
        engine.apply(&Input::Record(&noise), &mut out);
        let counts = engine.counts();
        prop_assert!(counts.open_incidents <= crate::oom::OPEN_CAP as u64);
        prop_assert!(counts.processes <= crate::world::PROCESSES_CAP as u64);
        prop_assert!(counts.cgroups <= crate::world::CGROUPS_CAP as u64);
        engine.apply(&Input::Fact(Fact::Stop { boot_ns: T + 100 * SEC }), &mut out);
        prop_assert_eq!(engine.counts().open_incidents, 0);
        for incident in out.outputs.iter().filter_map(|e| if let Output::Save(i) = e { Some(i) } else { None }) {
            let c = &incident.timeline.columns;
            let n = c.boot_ns.len();
            prop_assert!(c.boot_ns.windows(2).all(|w| w[0] <= w[1]));
            prop_assert!([c.usage_bytes.len(), c.limit_bytes.len(), c.watermark_bytes.len()] == [n; 3]);
            prop_assert!([c.swap_usage_bytes.len(), c.swap_limit_bytes.len()] == [n; 2]);
            prop_assert!([c.anon_bytes.len(), c.file_bytes.len(), c.shmem_bytes.len(), c.swap_bytes.len()] == [n; 4]);
            prop_assert!(incident.kind != Kind::OomKill || c.boot_ns.contains(&incident.at.boot_ns));
            let text = serde_json::to_string(incident).unwrap();
            let back: Incident = serde_json::from_str(&text).unwrap();
            prop_assert_eq!(serde_json::to_string(&back).unwrap(), text);
        }
    }

    #[test]
    fn the_same_inputs_give_the_same_bytes(inputs in plausible_inputs()) {
        let (a, b) = (run(&mut started_engine(), &inputs), run(&mut started_engine(), &inputs));
        prop_assert_eq!(json(&a), json(&b));
    }

    #[test]
    fn a_preamble_changes_nothing_for_its_own_engine(before in plausible_inputs(), after in plausible_inputs(), ns in T..T + 8 * SEC) {
        let mut plain = started_engine();
        run(&mut plain, &before);
        let mut restored = plain.clone();
        let preamble: Vec<OwnedInput> = restored.preamble(ns).into_iter().map(OwnedInput::Fact).collect();
        prop_assert_eq!(json(&run(&mut restored, &preamble)), Vec::<String>::new());
        let end = [OwnedInput::Fact(Fact::Stop { boot_ns: T + 100 * SEC })];
        let rest: Vec<OwnedInput> = after.into_iter().chain(end).collect();
        prop_assert_eq!(json(&run(&mut plain, &rest)), json(&run(&mut restored, &rest)));
    }

    #[test]
    fn every_reported_victim_is_in_one_incident(inputs in plausible_inputs()) {
        let mut engine = started_engine();
        let end = [OwnedInput::Fact(Fact::Stop { boot_ns: T + 100 * SEC })];
        let all: Vec<OwnedInput> = inputs.into_iter().chain(end).collect();
        let out = run(&mut engine, &all);
        let mut reported = 0;
        let mut listed = 0;
        for e in &out.outputs {
            match e {
                Output::Kill(_) => reported += 1,
                Output::Save(i) if i.kind == Kind::OomKill => listed += i.oom.as_ref().unwrap().victims.len(),
                _ => {}
            }
        }
        prop_assert_eq!(reported, listed);
    }
}

/// 20,000 processes in 100 cgroups grow, with stacks and mappings, and end within ten seconds. Once
/// no incident can look back at them, the engine holds as much as before.
#[test]
fn processes_that_came_and_went_leave_nothing_behind() {
    let mut test = TestEngine::with(Settings { sample_bytes: MIB, ..Settings::default() });
    let cgroups = 100..200u64;
    for id in cgroups.clone() {
        test.feed(&test_support::cgroup(T, test_support::limited(id, 0, LIMIT), 2, "/app", CGROUP_MADE));
    }
    test.tick(T);
    let before = test.engine.counts().memory_estimate_bytes;
    for at in 0..20_000u32 {
        let (ns, pid, id) = (T + u64::from(at) * MS / 2, 1000 + at, 100 + u64::from(at % 100));
        let mm_id = u64::from(pid);
        test.feed(&test_support::fork(ns, 1, pid, id, 0));
        for step in 1..8 {
            test.feed(&test_support::rss(ns + step * 1000, pid, id, mm_id, step * MIB));
        }
        test.feed(&test_support::mapping(ns, pid, id, CALL_MMAP, MIB));
        // Every one runs a program of its own.
        let frame = |depth: u64| PathFrame { module: Some(at), offset: Some(depth), ..PathFrame::default() };
        let module = ModuleFound { id: at, path: format!("/usr/bin/program-{at}"), build_id: Some("00".repeat(20)) };
        let path = PathFound { id: at, frames: (0..20).map(frame).collect(), cut: None };
        test.fact(Fact::Module(module)).fact(Fact::Path(path)).fact(Fact::Stack(StackFound {
            boot_ns: ns + 5000,
            pid,
            tid: pid,
            start_boot_ns: test_support::start(pid),
            comm: "short".to_owned(),
            mm_id,
            cgroup_id: id,
            cause: memtrace_incident::Cause::Touch,
            weight_bytes: MIB,
            grown_bytes: 4 * MIB,
            address: None,
            size_bytes: 0,
            path: at,
        }));
        test.feed(&test_support::exit(ns + MS / 4, pid, id, 0)).feed(&test_support::mm_gone(
            ns + MS / 3,
            pid,
            mm_id,
            MIB,
        ));
        if at % 200 == 0 {
            test.tick(ns);
            test.out = Out::default();
        }
    }
    let high = test.engine.counts().memory_estimate_bytes;
    assert!(high > before + 10 * MIB, "{before} to {high}: nothing to give back");
    // As long as paths are remembered that nothing refers to.
    for tick in 1..=PATH_TICKS + 200 {
        test.tick(T + 10 * SEC + tick * 100 * MS);
    }
    let counts = test.engine.counts();
    assert_eq!((counts.processes, counts.dead_processes), (0, 0));
    let after = counts.memory_estimate_bytes;
    assert!(after <= before + MIB / 2, "{before} before, {high} then, {after} after");
}
