//! Tests of near misses through the engine's interface: inputs in, outputs out.

use memtrace_common::event::*;
use memtrace_incident::{Incident, Kind, PressureLimit};

use crate::input::{Fact, Settings};
use crate::output::Finding;
use crate::test_support::{self, MIB, MS, SEC, TestEngine, Tweak};

const T: u64 = 1_000 * SEC;
const LIMIT: u64 = 256 * MIB;
const OWN: u64 = 50;

/// A reading of a cgroup with `memory.high`.
fn with_high(usage: u64, high: u64, limit: u64) -> Memcg {
    Memcg { high_bytes: high, ..test_support::limited(OWN, usage, limit) }
}

/// A cgroup in which process 100 holds 200 MiB.
fn held(settings: Settings) -> TestEngine {
    let mut test = TestEngine::with(settings);
    test.feed(&test_support::cgroup(T - 20 * SEC, test_support::limited(OWN, 0, LIMIT), 2, "/app", CGROUP_MADE));
    test.feed(&test_support::rss(T - SEC, 100, OWN, 7, 200 * MIB).reading(test_support::limited(
        OWN,
        210 * MIB,
        LIMIT,
    )));
    test
}

fn near_misses(test: &TestEngine) -> Vec<Incident> {
    test.saved().into_iter().filter(|i| i.kind == Kind::NearMiss).collect()
}

#[test]
fn reclaim_at_a_limit_without_a_kill_is_a_near_miss() {
    use PressureLimit::{High, Max};
    let (limited, unlimited) = (test_support::limited(OWN, LIMIT, LIMIT), NO_LIMIT);
    let cases = [
        ("at the limit", limited, false, false, Some(Max)),
        ("at memory.high, without a limit", with_high(200 * MIB, 200 * MIB, unlimited), false, false, Some(High)),
        ("at memory.high, below a limit", with_high(200 * MIB, 200 * MIB, LIMIT), false, false, Some(High)),
        ("at both", with_high(LIMIT, 200 * MIB, LIMIT), false, false, Some(Max)),
        ("below both", with_high(100 * MIB, 200 * MIB, LIMIT), false, false, None),
        ("no limits", test_support::memcg(OWN, LIMIT), false, false, None),
        ("a kill explains it", limited, true, false, None),
        ("not wanted", limited, false, true, None),
    ];
    for (name, reading, killed, unwanted, expected) in cases {
        let mut test = held(Settings { near_misses: !unwanted, spikes: false, ..Settings::default() });
        test.feed(&test_support::reclaim(T, 100, reading, RECLAIM_BEGIN, UNKNOWN));
        let mut more = test_support::reclaim(T + SEC, 100, reading, RECLAIM_BEGIN, UNKNOWN);
        more.suppressed = 3;
        test.feed(&more).feed(&test_support::reclaim(T + 2 * SEC, 100, reading, RECLAIM_END, 30 * MS));
        if killed {
            test.feed(&test_support::kill(T + 3 * SEC, 100, 100, OWN));
            test.feed(&test_support::victim(T + 3 * SEC + 1, 100, 100, reading, reading, 200 * MIB));
        }
        test.tick(T + 4 * SEC);
        assert!(near_misses(&test).is_empty(), "{name}: a kill may still come");
        test.tick(T + 6 * SEC);
        let found = near_misses(&test);
        assert_eq!(found.iter().map(|i| i.pressure.as_ref().unwrap().limit).next(), expected, "{name}");
        let alerts = test.alerts().into_iter().filter(|a| matches!(a, Finding::NearMiss { .. })).count();
        assert_eq!((found.len(), alerts), (usize::from(expected.is_some()), found.len()), "{name}");
    }
}

#[test]
fn a_near_miss_says_who_held_the_memory() {
    let mut test = held(Settings::default());
    let at = test_support::limited(OWN, LIMIT - MIB / 4, LIMIT);
    test.feed(&test_support::reclaim(T, 100, at, RECLAIM_BEGIN, UNKNOWN));
    test.feed(&test_support::reclaim(T + SEC, 100, at, RECLAIM_BEGIN, UNKNOWN));
    test.feed(&test_support::reclaim(T + 2 * SEC, 100, at, RECLAIM_END, 30 * MS));
    test.tick(T + 5 * SEC);
    let i = near_misses(&test).remove(0);
    let p = i.pressure.as_ref().unwrap();
    assert_eq!((i.at.boot_ns, p.from_boot_ns, p.until_boot_ns), (T, T, T + 2 * SEC));
    assert_eq!((p.hits, p.stalled_ns, p.oom_kill_disabled, p.under_oom_ns), (2, Some(30 * MS), None, None));
    assert_eq!((p.tasks.len(), p.tasks[0].pid, p.tasks[0].anon_bytes), (1, 100, 200 * MIB));
    assert_eq!((i.cgroup.path.as_deref(), i.cgroup.usage_bytes), (Some("/app"), Some(LIMIT - MIB / 4)));
    assert!(i.oom.is_none() && i.growth[0].pid == 100 && i.timeline.columns.boot_ns.len() >= 4);
    let summary = "The cgroup hit its limit of 256 MiB, most of it in p100 (pid 100, 200 MiB); reclaim made room";
    assert!(i.verdict.summary.starts_with(summary), "{}", i.verdict.summary);
    let alerts = test.alerts();
    let alert =
        alerts.iter().find_map(|a| if let Finding::NearMiss { incident, .. } = a { Some(incident) } else { None });
    assert_eq!(alert, Some(&i.id));
    // Once a minute.
    for sec in [20, 40, 59] {
        test.feed(&test_support::reclaim(T + sec * SEC, 100, at, RECLAIM_BEGIN, UNKNOWN)).tick(T + (sec + 6) * SEC);
    }
    assert_eq!(near_misses(&test).len(), 1);
    test.feed(&test_support::reclaim(T + 66 * SEC, 100, at, RECLAIM_BEGIN, UNKNOWN))
        .fact(Fact::Tick { boot_ns: T + 72 * SEC });
    assert_eq!(near_misses(&test).len(), 2);
}
