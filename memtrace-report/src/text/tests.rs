//! Tests of the text report: whole reports as snapshots, and that a hostile file cannot send control
//! characters to a terminal.

use memtrace_incident::{Columns, PressureLimit, fixtures};
use proptest::prelude::*;

use super::*;

fn check_plain(text: &str) {
    assert!(text.ends_with('\n'));
    assert!(text.chars().all(|character| character == '\n' || !plain::is_dangerous(character)), "{text:?}");
}

#[test]
fn a_burst_kill() {
    insta::assert_snapshot!(report(&fixtures::burst(), &Style::PLAIN));
}

#[test]
fn an_ancestor_kill_of_a_group() {
    insta::assert_snapshot!(report(&fixtures::group(), &Style::PLAIN));
}

#[test]
fn a_recording() {
    insta::assert_snapshot!(report(&fixtures::recording(), &Style::PLAIN));
}

#[test]
fn a_spike() {
    let mut incident = fixtures::burst();
    incident.kind = Kind::Spike;
    incident.oom = None;
    incident.cgroup.usage_bytes = Some(440 << 20);
    insta::assert_snapshot!(report(&incident, &Style { unicode: false, width: 80, colour: false }));
}

#[test]
fn a_near_miss() {
    insta::assert_snapshot!(report(&fixtures::near_miss(), &Style::PLAIN));
    let mut incident = fixtures::near_miss();
    incident.pressure.as_mut().unwrap().limit = PressureLimit::Max;
    let text = report(&incident, &Style { width: 300, ..Style::PLAIN });
    assert!(text.contains("hit its limit of 450 MiB, 42 hits in 4.9 s; nobody was killed."), "{text}");
    incident.kind = Kind::Stuck;
    incident.pressure.as_mut().unwrap().under_oom_ns = Some(12_000_000_000);
    incident.pressure.as_mut().unwrap().oom_kill_disabled = Some(true);
    let text = report(&incident, &Style { width: 300, ..Style::PLAIN });
    assert!(text.contains("waited 12 s at its limit of 450 MiB with its OOM killer off.\n"), "{text}");
    assert!(text.contains("at the limit, tasks held up 1.2 s, under OOM 12 s; OOM killer off\n"), "{text}");
    incident.pressure = None;
    assert!(report(&incident, &Style::PLAIN).starts_with("A limit was hit without a kill: nothing more is known."));
}

#[test]
fn one_screen_and_two_with_stacks() {
    for (incident, most) in [
        (fixtures::burst(), 65),
        (fixtures::near_miss(), 65),
        (fixtures::group(), 53),
        (fixtures::recording(), 46),
        (fixtures::hostile(), 110),
    ] {
        let text = report(&incident, &Style::PLAIN);
        assert!(text.lines().count() <= most, "{} lines", text.lines().count());
        check_plain(&text);
    }
}

#[test]
fn colours_are_the_only_escapes() {
    let style = Style { colour: true, ..Style::PLAIN };
    let coloured = report(&fixtures::hostile(), &style);
    let mut rest = coloured.as_str();
    let mut without = String::new();
    while let Some((before, after)) = rest.split_once('\u{1b}') {
        without.push_str(before);
        let (code, after) = after.split_once('m').unwrap();
        assert!(code.starts_with('[') && code[1..].bytes().all(|byte| byte.is_ascii_digit() || byte == b';'), "{code}");
        rest = after;
    }
    without.push_str(rest);
    assert_eq!(without, report(&fixtures::hostile(), &Style::PLAIN));
    check_plain(&without);
}

#[test]
fn ascii_is_ascii() {
    let style = Style { unicode: false, ..Style::PLAIN };
    for incident in [fixtures::burst(), fixtures::near_miss(), fixtures::group(), fixtures::recording()] {
        let text = report(&incident, &style);
        assert!(text.is_ascii(), "{text}");
    }
}

#[test]
fn what_is_unknown_is_said() {
    let mut incident = fixtures::burst();
    incident.cgroup.path = None;
    incident.cgroup.usage_bytes = None;
    incident.cgroup.peak_bytes = None;
    incident.composition = Default::default();
    incident.timeline = Default::default();
    let oom = incident.oom.as_mut().unwrap();
    oom.scope = Scope::Unknown;
    oom.victims.clear();
    oom.tasks.clear();
    incident.growth.clear();
    let text = report(&incident, &Style::PLAIN);
    assert!(text.starts_with("OOM kill: the victim is unknown in container 9c1f4b0a77e2 of pod\n"), "{text}");
    for line in [
        "  cgroup      unknown path (id 48123)\n",
        "  memory      usage unknown of limit 450 MiB, peak unknown,",
        "  killed      unknown\n",
        "  made of     anon unknown, shmem unknown, file mapped unknown, swapped out unknown, ",
        "Memory: no readings\n",
        "Processes: none known\n",
    ] {
        assert!(text.contains(line), "{line}\n{text}");
    }
    for (kind, wanted) in [(Kind::Recording, "Recording: nothing is known"), (Kind::OomKill, "OOM kill: nothing more")]
    {
        incident.kind = kind;
        incident.oom = None;
        assert!(report(&incident, &Style::PLAIN).starts_with(wanted));
    }
}

proptest! {
    #[test]
    fn any_curve_is_drawn(
        rows in prop::collection::vec((any::<u64>(), any::<Option<u64>>(), any::<u64>(), any::<Option<u64>>()), 0..50),
        at in any::<u64>(),
        width in 0usize..250,
        unicode in any::<bool>(),
        kind in prop_oneof![Just(Kind::OomKill), Just(Kind::Spike), Just(Kind::NearMiss), Just(Kind::Stuck), Just(Kind::Recording)],
    ) {
        let mut incident = if kind == Kind::Recording { fixtures::recording() } else { fixtures::group() };
        incident.kind = kind;
        incident.at.boot_ns = at;
        incident.timeline.columns = Columns {
            boot_ns: rows.iter().map(|row| row.0).collect(),
            usage_bytes: rows.iter().map(|row| row.1).collect(),
            anon_bytes: rows.iter().map(|row| row.2).collect(),
            limit_bytes: rows.iter().map(|row| row.3).collect(),
            ..Columns::default()
        };
        check_plain(&report(&incident, &Style { colour: false, width, unicode }));
    }
}
