//! Stuck cgroups: out of memory with the OOM killer off (v1 `memory.oom_control`). The kernel kills
//! no process there. Tasks that need memory wait until some is freed, so an operator has to act.

use std::collections::BTreeMap;

use memtrace_incident::{Kind, Loss, Pressure, PressureLimit};

use super::Limits;
use super::detectors::{NearMiss, is_full};
use super::incidents::{PressureEvent, around, incident_id, pressure_incident};
use crate::build::BuildContext;
use crate::decode::Reading;
use crate::input::Fact;
use crate::output::{Finding, Out, Output, Request};
use crate::run::Run;
use crate::world::{View, World};

/// Stuck cgroups that are followed, as many as the session watches; further ones are counted as
/// lost.
pub(crate) const STUCK_CAP: usize = 64;
/// A cgroup that hits OOM again within this time counts as one episode: woken tasks retry once
/// before they block.
const RELAPSE_NS: u64 = 1_000_000_000;
/// A watch of a cgroup is requested at most once in this time.
const WATCH_REQUEST_NS: u64 = 1_000_000_000;

/// A stuck cgroup.
#[derive(Clone, Debug)]
pub(crate) struct Stuck {
    pub(crate) cgroup: u64,
    id: String,
    since_ns: u64,
    /// When it was no longer stuck. It is closed [`RELAPSE_NS`] later.
    cleared_ns: Option<u64>,
    /// Hits and reclaim, from before it got stuck.
    pub(crate) pressure: NearMiss,
    /// State when it got stuck; the curve grows on.
    pub(crate) view: View,
    reading: Reading,
    loss_base: BTreeMap<String, u64>,
}

impl Stuck {
    /// Facts from which an empty engine gets this state.
    pub(crate) fn facts(&self, world: &World) -> impl Iterator<Item = Fact> {
        let cgroup_id = self.cgroup;
        let fact =
            |boot_ns, kill_disabled, under_oom| Fact::OomControl { cgroup_id, boot_ns, kill_disabled, under_oom };
        let disabled = world.cgroups.get(cgroup_id).and_then(|row| row.kill_disabled).unwrap_or(true);
        let cleared = self.cleared_ns.map(|boot_ns| fact(boot_ns, disabled, false));
        [fact(self.since_ns, true, true)].into_iter().chain(cleared)
    }
}

/// Requests a watch of a cgroup that is at its limit.
pub(super) fn watch_if_full(id: u64, boot_ns: u64, reading: &Reading, world: &mut World, run: &Run, out: &mut Out) {
    if is_full(reading, &run.host) {
        watch(id, boot_ns, world, run, out);
    }
}

/// Reclaim began in a cgroup that is not at its own limit. Then an ancestor is at its limit, or the
/// limit of memory and swap together was hit. Which one is not known, because a cgroup without
/// processes has no readings. So a watch of the cgroup and all its ancestors is requested.
pub(super) fn watch_above(id: u64, boot_ns: u64, world: &mut World, run: &Run, out: &mut Out) {
    for member in world.cgroups.chain(id) {
        // The root cgroup has no limit.
        if world.cgroups.get(member).is_some_and(|row| row.parent.is_some()) {
            watch(member, boot_ns, world, run, out);
        }
    }
}

fn watch(id: u64, boot_ns: u64, world: &mut World, run: &Run, out: &mut Out) {
    if run.settings.cgroup_version != 1 {
        return;
    }
    let Some(row) = world.cgroups.get_mut(id).filter(|row| !row.removed) else { return };
    if row.watch_requested_ns.is_none_or(|asked| boot_ns >= asked.saturating_add(WATCH_REQUEST_NS)) {
        row.watch_requested_ns = Some(boot_ns);
        out.requests.push(Request::WatchOomControl { cgroup_id: id });
    }
}

impl Limits {
    /// The stuck cgroup that is this one or an ancestor of it.
    pub(super) fn stuck_above(&mut self, id: u64, world: &World) -> Option<&mut Stuck> {
        self.stuck.iter_mut().find(|stuck| world.cgroups.in_tree(id, stuck.cgroup))
    }

    /// `memory.oom_control` of a cgroup changed. Returns whether the cgroup got stuck and has to be
    /// opened.
    pub(crate) fn oom_control(
        &mut self,
        id: u64,
        boot_ns: u64,
        (kill_disabled, under_oom): (bool, bool),
        world: &mut World,
        run: &mut Run,
    ) -> bool {
        if let Some(row) = world.cgroups.get_mut(id) {
            row.kill_disabled = Some(kill_disabled);
        }
        if !(kill_disabled && under_oom) {
            self.unstuck(id, boot_ns);
        } else if let Some(known) = self.stuck.iter_mut().find(|stuck| stuck.cgroup == id) {
            known.cleared_ns = None;
        } else if self.stuck.len() < STUCK_CAP {
            return true;
        } else {
            run.losses.count(Loss::StuckNotFollowed, 1);
        }
        false
    }

    /// Opens the incident of a cgroup that got stuck at `since_ns`.
    pub(crate) fn open_stuck(&mut self, id: u64, since_ns: u64, context: &BuildContext<'_>, out: &mut Out) {
        let (view, reading) = around(id, since_ns, context);
        let first = self.detectors.near_miss(id);
        let cgroups = &context.world.cgroups;
        self.detectors.killed(since_ns, |other| cgroups.in_tree(other, id));
        let stuck = Stuck {
            cgroup: id,
            id: incident_id(Kind::Stuck, since_ns, id, context),
            since_ns,
            cleared_ns: None,
            pressure: first.unwrap_or_else(|| NearMiss::new(id, since_ns, PressureLimit::Max, reading.usage)),
            view,
            reading,
            loss_base: context.run.losses.at(context.run.window_start(since_ns)),
        };
        out.outputs.push(Output::Alert(Finding::Stuck {
            incident: stuck.id.clone(),
            cgroup_path: cgroups.path(Some(id)),
            usage_bytes: reading.usage,
            limit_bytes: reading.limit.bytes(),
            tasks: stuck.view.tasks_left_out.saturating_add(stuck.view.tasks.len() as u64),
        }));
        self.stuck.push(stuck);
        self.changed = true;
    }

    /// A cgroup is no longer stuck, or was removed.
    pub(crate) fn unstuck(&mut self, id: u64, boot_ns: u64) {
        if let Some(stuck) = self.stuck.iter_mut().find(|stuck| stuck.cgroup == id) {
            stuck.cleared_ns = stuck.cleared_ns.or(Some(boot_ns));
        }
    }

    /// Closes incidents that cannot relapse any more; with `all`, every incident.
    pub(crate) fn close_stuck(&mut self, all: bool, context: &BuildContext<'_>, out: &mut Out) {
        let now = context.run.now;
        let over = |s: &Stuck| all || s.cleared_ns.is_some_and(|cleared| now >= cleared.saturating_add(RELAPSE_NS));
        let closing: Vec<Stuck> = self.stuck.extract_if(.., |stuck| over(stuck)).collect();
        self.changed |= !closing.is_empty();
        closing.into_iter().for_each(|stuck| close(stuck, context, out));
    }
}

fn close(mut stuck: Stuck, context: &BuildContext<'_>, out: &mut Out) {
    stuck.view.follow(context.world);
    let until_boot_ns = stuck.cleared_ns.unwrap_or(context.run.now);
    let under_oom_ns = until_boot_ns.saturating_sub(stuck.since_ns);
    let event = PressureEvent {
        kind: Kind::Stuck,
        id: stuck.id,
        at_ns: stuck.since_ns,
        reading: stuck.reading,
        view: &stuck.view,
        pressure: Pressure {
            from_boot_ns: stuck.pressure.from_ns.min(stuck.since_ns),
            until_boot_ns,
            limit: PressureLimit::Max,
            hits: stuck.pressure.hits,
            stalled_ns: context.run.settings.stalls_seen.then_some(stuck.pressure.stalled_ns),
            oom_kill_disabled: Some(true),
            under_oom_ns: Some(under_oom_ns),
            tasks: stuck.view.tasks.clone(),
        },
        loss_base: &stuck.loss_base,
        early: stuck.cleared_ns.is_none(),
    };
    let incident = pressure_incident(event, context);
    if stuck.cleared_ns.is_some() {
        out.outputs.push(Output::Alert(Finding::Unstuck {
            incident: incident.id.clone(),
            cgroup_path: incident.cgroup.path.clone(),
            under_oom_ns,
        }));
    }
    out.outputs.push(Output::Save(Box::new(incident)));
}

#[cfg(test)]
mod tests {
    use memtrace_common::event::*;
    use memtrace_incident::Incident;

    use super::*;
    use crate::input::{CgroupFound, Settings};
    use crate::test_support::{self, MIB, MS, SEC, TestEngine, Tweak};

    const T: u64 = 1_000 * SEC;
    const LIMIT: u64 = 64 * MIB;
    const OWN: u64 = 50;

    /// Process 100 in /pod/app, which has a limit. Whether /pod has one is not known.
    fn pod_engine(version: u32) -> TestEngine {
        let mut test = TestEngine::with(Settings { cgroup_version: version, ..Settings::default() });
        test.feed(&test_support::cgroup(T - 20 * SEC, test_support::memcg(40, 0), 2, "/pod", CGROUP_MADE));
        test.fact(Fact::Cgroup(CgroupFound { id: 2, path: "/".into(), ..CgroupFound::default() }));
        test.feed(&test_support::cgroup(
            T - 20 * SEC,
            test_support::limited(OWN, 0, LIMIT),
            40,
            "/pod/app",
            CGROUP_MADE,
        ));
        test.feed(&test_support::rss(T - SEC, 100, OWN, 7, 60 * MIB).reading(test_support::limited(
            OWN,
            61 * MIB,
            LIMIT,
        )));
        test
    }

    fn requested_watches(test: &mut TestEngine) -> Vec<u64> {
        let asked = |request: Request| match request {
            Request::WatchOomControl { cgroup_id } => Some(cgroup_id),
            _ => None,
        };
        std::mem::take(&mut test.out.requests).into_iter().filter_map(asked).collect()
    }

    fn control(test: &mut TestEngine, ms: u64, kill_disabled: bool, under_oom: bool) {
        test.fact(Fact::OomControl { cgroup_id: OWN, boot_ns: T + ms * MS, kill_disabled, under_oom });
    }

    fn stuck(test: &TestEngine) -> Vec<Incident> {
        test.saved().into_iter().filter(|i| i.kind == Kind::Stuck).collect()
    }

    #[test]
    fn a_cgroup_that_may_be_full_is_watched_on_v1_only() {
        let cases = [
            ("at its own limit", 1, LIMIT, vec![OWN]),
            ("below it: one above may be full", 1, 10 * MIB, vec![OWN, 40]),
            ("version 2", 2, LIMIT, vec![]),
        ];
        for (name, version, usage, expected) in cases {
            let mut test = pod_engine(version);
            assert!(requested_watches(&mut test).is_empty(), "{name}");
            let begin =
                |ns| test_support::reclaim(ns, 100, test_support::limited(OWN, usage, LIMIT), RECLAIM_BEGIN, UNKNOWN);
            test.feed(&begin(T)).feed(&begin(T + SEC / 2));
            assert_eq!(requested_watches(&mut test), expected, "{name}: once");
            test.feed(&begin(T + SEC));
            assert_eq!(requested_watches(&mut test), expected, "{name}: again after a second");
        }
        // Found at its limit, so it may be stuck since before.
        let mut test = pod_engine(1);
        let (path, usage_bytes, limit_bytes) = ("/full".to_owned(), Some(LIMIT), Some(LIMIT));
        test.fact(Fact::Cgroup(CgroupFound { id: 60, path, usage_bytes, limit_bytes, ..CgroupFound::default() }));
        assert_eq!(requested_watches(&mut test), [60]);
    }

    #[test]
    fn a_stuck_cgroup_is_one_incident_per_episode() {
        enum In {
            /// Milliseconds, kill disabled, under OOM.
            Control(u64, bool, bool),
            Tick(u64),
            Removed(u64),
            Stop(u64),
        }
        use In::*;
        // (milliseconds under OOM, cut short) of each incident.
        type Case<'a> = (&'a str, &'a [In], &'a [(u64, bool)], usize);
        let cases: &[Case<'_>] = &[
            (
                "stuck, cleared",
                &[Control(0, true, true), Tick(5000), Control(6000, true, false), Tick(7000)],
                &[(6000, false)],
                1,
            ),
            ("switched on", &[Control(0, true, true), Control(400, false, true), Tick(1500)], &[(400, false)], 1),
            ("removed", &[Control(0, true, true), Removed(300), Tick(1300)], &[(300, false)], 1),
            ("not yet certain", &[Control(0, true, true), Control(400, true, false), Tick(1300)], &[], 1),
            (
                "woken and waiting again",
                &[
                    Control(0, true, true),
                    Control(400, true, false),
                    Tick(500),
                    Control(600, true, true),
                    Tick(3000),
                    Control(4000, true, false),
                    Tick(5000),
                ],
                &[(4000, false)],
                1,
            ),
            (
                "twice",
                &[
                    Control(0, true, true),
                    Control(400, true, false),
                    Tick(1400),
                    Control(2000, true, true),
                    Control(2100, true, false),
                    Tick(3100),
                ],
                &[(400, false), (100, false)],
                2,
            ),
            ("stop while stuck", &[Control(0, true, true), Tick(900), Stop(1000)], &[(1000, true)], 1),
            (
                "stop after it cleared",
                &[Control(0, true, true), Control(900, true, false), Stop(1000)],
                &[(900, false)],
                1,
            ),
            (
                "an OOM the kernel deals with",
                &[Control(0, false, true), Control(100, false, false), Tick(2000)],
                &[],
                0,
            ),
            ("off, but not out of memory", &[Control(0, true, false), Tick(2000)], &[], 0),
        ];
        for (name, inputs, expected, alerts) in cases {
            let mut test = pod_engine(1);
            for input in *inputs {
                match input {
                    Control(ms, kill_disabled, under_oom) => control(&mut test, *ms, *kill_disabled, *under_oom),
                    Tick(ms) => drop(test.tick(T + ms * MS)),
                    Removed(ms) => {
                        let gone = test_support::limited(OWN, 0, LIMIT);
                        test.feed(&test_support::cgroup(T + ms * MS, gone, 40, "/pod/app", CGROUP_REMOVED));
                    }
                    Stop(ms) => drop(test.fact(Fact::Stop { boot_ns: T + ms * MS })),
                }
            }
            let found: Vec<_> = stuck(&test)
                .iter()
                .map(|i| {
                    let cut = i.losses.iter().any(|l| l.what == Loss::WindowCutShort.label());
                    (i.pressure.as_ref().unwrap().under_oom_ns.unwrap() / MS, cut)
                })
                .collect();
            assert_eq!(found, *expected, "{name}");
            let reported = test.alerts().into_iter().filter(|a| matches!(a, Finding::Stuck { .. })).count();
            let over = test.alerts().into_iter().filter(|a| matches!(a, Finding::Unstuck { .. })).count();
            assert_eq!((reported, over), (*alerts, expected.iter().filter(|(_, cut)| !cut).count()), "{name}");
        }
    }

    #[test]
    fn an_incident_says_who_waited_and_takes_the_place_of_the_near_miss() {
        let mut test = pod_engine(1);
        let full = test_support::limited(OWN, LIMIT, LIMIT);
        test.feed(&test_support::reclaim(T - 50 * MS, 100, full, RECLAIM_BEGIN, UNKNOWN));
        test.feed(&test_support::reclaim(T - 30 * MS, 100, full, RECLAIM_END, 20 * MS));
        control(&mut test, 0, true, true);
        let alerts = test.alerts();
        let [Finding::Stuck { incident, cgroup_path, usage_bytes, limit_bytes, tasks }] = alerts.as_slice() else {
            panic!("{alerts:?}")
        };
        assert_eq!((cgroup_path.as_deref(), *usage_bytes, *limit_bytes), (Some("/pod/app"), Some(LIMIT), Some(LIMIT)));
        assert_eq!((*tasks, test.engine.counts().stuck_cgroups), (1, 1));
        test.feed(&test_support::reclaim(T + SEC, 100, full, RECLAIM_BEGIN, UNKNOWN)).tick(T + 8 * SEC);
        control(&mut test, 12_000, true, false);
        test.feed(&test_support::rss(T + 12 * SEC + 1, 100, OWN, 7, 70 * MIB).reading(test_support::limited(
            OWN,
            71 * MIB,
            2 * LIMIT,
        )));
        test.tick(T + 13 * SEC).tick(T + 20 * SEC);
        let saved = test.saved();
        assert_eq!(saved.iter().map(|i| (i.kind, &i.id)).collect::<Vec<_>>(), [(Kind::Stuck, incident)]);
        let p = saved[0].pressure.as_ref().unwrap();
        assert_eq!(
            (p.from_boot_ns, p.until_boot_ns, p.hits, p.stalled_ns),
            (T - 50 * MS, T + 12 * SEC, 2, Some(20 * MS))
        );
        assert_eq!((p.under_oom_ns, p.oom_kill_disabled, p.tasks[0].pid), (Some(12 * SEC), Some(true), 100));
        assert_eq!((saved[0].at.boot_ns, saved[0].cgroup.usage_bytes), (T, Some(LIMIT)));
        assert_eq!(saved[0].timeline.columns.boot_ns.last(), Some(&(T + 12 * SEC + 1)), "the curve goes on");
        assert_eq!(
            saved[0].verdict.summary,
            "The cgroup was stuck at its limit of 64 MiB for 12 s, most of it in p100 (pid 100, 60 MiB): its OOM killer \
             is off (memory.oom_control), so tasks waited for memory; raise the limit, end a process or switch it on."
        );
        assert_eq!(test.engine.counts().stuck_cgroups, 0);
    }

    #[test]
    fn a_preamble_restores_stuck_cgroups_and_changes_nothing() {
        for cleared in [None, Some(true), Some(false)] {
            let mut test = pod_engine(1);
            control(&mut test, 0, true, true);
            if let Some(kill_disabled) = cleared {
                control(&mut test, 500, kill_disabled, false);
            }
            let mut fresh = TestEngine { engine: crate::Engine::new(), out: Out::default() };
            for fact in test.engine.preamble(T + SEC) {
                fresh.fact(fact.clone());
                test.fact(fact);
            }
            let disabled = |test: &TestEngine| test.engine.world.cgroups.get(OWN).unwrap().kill_disabled;
            assert_eq!((disabled(&test), disabled(&fresh)), (Some(cleared.unwrap_or(true)), disabled(&test)));
            for test in [&mut test, &mut fresh] {
                test.tick(T + 900 * MS).fact(Fact::Stop { boot_ns: T + 2 * SEC });
            }
            let ids = |test: &TestEngine| {
                stuck(test)
                    .iter()
                    .map(|i| (i.id.clone(), i.pressure.as_ref().unwrap().under_oom_ns))
                    .collect::<Vec<_>>()
            };
            assert_eq!((ids(&test), ids(&test).len()), (ids(&fresh), 1), "cleared: {cleared:?}");
        }
    }

    #[test]
    fn no_more_are_followed_than_are_watched() {
        let mut test = pod_engine(1);
        for id in 100..200u64 {
            test.fact(Fact::OomControl { cgroup_id: id, boot_ns: T, kill_disabled: true, under_oom: true });
        }
        assert_eq!(test.engine.counts().stuck_cgroups, STUCK_CAP as u64);
        assert_eq!(test.engine.run.losses.current().get(Loss::StuckNotFollowed.label()), Some(&36));
    }
}
