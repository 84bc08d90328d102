//! Lines of the kill ledger on their way out. A line without the path of its cgroup is of little
//! use, so where the path is not known yet (the cgroup was over the cap, or its record was lost)
//! the line waits a moment for the answer to the lookup.

use std::collections::VecDeque;

use memtrace_incident::KillEntry;

use crate::output::{Finding, Out, Output};
use crate::world::Cgroups;

/// How long a line waits for its path. A cgroup that is gone has no answer, and a kill must be in
/// the ledger within a second.
const PATH_WAIT_NS: u64 = 500_000_000;
/// Lines that wait; above it the oldest is emitted without its path.
const WAITING_CAP: usize = 256;

/// A ledger line or a finding about a kill.
#[derive(Clone, Debug)]
struct KillLine {
    output: Output,
    cgroup_id: u64,
    until_ns: u64,
}

/// Lines that wait for the path of their cgroup.
#[derive(Clone, Debug, Default)]
pub(super) struct KillLines {
    /// Oldest first. Cap: [`WAITING_CAP`].
    waiting: VecDeque<KillLine>,
}

impl KillLines {
    /// Emits a line and a finding about a kill at `boot_ns` in a cgroup, or lets them wait for its
    /// path.
    pub(super) fn emit(
        &mut self,
        output: Output,
        (cgroup_id, boot_ns): (Option<u64>, u64),
        now: u64,
        cgroups: &Cgroups,
        out: &mut Out,
    ) {
        let until_ns = boot_ns.saturating_add(PATH_WAIT_NS);
        let asked = cgroup_id.filter(|id| cgroups.get(*id).is_some_and(|row| row.path.is_none() && !row.removed));
        match asked.filter(|_| now < until_ns) {
            Some(cgroup_id) => self.waiting.push_back(KillLine { output, cgroup_id, until_ns }),
            None => out.outputs.push(with_path(output, cgroups.path(cgroup_id))),
        }
        if self.waiting.len() > WAITING_CAP {
            out.outputs.extend(self.waiting.pop_front().map(|line| line.output));
        }
    }

    /// Emits lines whose path is known by now or that have waited long enough; with `all`, every
    /// line.
    pub(super) fn emit_due(&mut self, all: bool, now: u64, cgroups: &Cgroups, out: &mut Out) {
        self.emit_if(|line| all || now >= line.until_ns || cgroups.path(Some(line.cgroup_id)).is_some(), cgroups, out);
    }

    /// Emits the lines of an incident, which come before it.
    pub(super) fn emit_of(&mut self, incident: &str, cgroups: &Cgroups, out: &mut Out) {
        let of_it = |line: &KillLine| match &line.output {
            Output::Kill(KillEntry { incident: id, .. }) => id == incident,
            Output::Alert(Finding::OomKill { incident: id, .. }) => id == incident,
            _ => false,
        };
        self.emit_if(of_it, cgroups, out);
    }

    fn emit_if(&mut self, due: impl Fn(&KillLine) -> bool, cgroups: &Cgroups, out: &mut Out) {
        let (now, later): (VecDeque<_>, VecDeque<_>) = self.waiting.drain(..).partition(due);
        self.waiting = later;
        out.outputs.extend(now.into_iter().map(|line| with_path(line.output, cgroups.path(Some(line.cgroup_id)))));
    }
}

fn with_path(mut output: Output, path: Option<String>) -> Output {
    if let Output::Kill(KillEntry { cgroup_path, .. }) | Output::Alert(Finding::OomKill { cgroup_path, .. }) =
        &mut output
    {
        *cgroup_path = path;
    }
    output
}

#[cfg(test)]
mod tests {
    use memtrace_common::event as wire;
    use memtrace_incident::{KillEntry, Loss};

    use super::*;
    use crate::input::{CgroupFound, Fact};
    use crate::output::Request;
    use crate::test_support::{self, MIB, MS, SEC, TestEngine};
    use crate::world::CGROUPS_CAP;

    const T: u64 = 1_000 * SEC;
    const OWN: u64 = 1_000_000;

    fn killed_in(id: u64) -> (wire::Kill, wire::OomVictim) {
        let (own, out) = (test_support::memcg(id, MIB), test_support::limited(id, MIB, MIB));
        (test_support::kill(T, 90, 100, id), test_support::victim(T + MS, 90, 100, own, out, 3 * MIB))
    }

    fn paths(kills: &[KillEntry]) -> Vec<Option<&str>> {
        kills.iter().map(|kill| kill.cgroup_path.as_deref()).collect()
    }

    fn found(id: u64, path: &str) -> Fact {
        Fact::Cgroup(CgroupFound { id, parent_id: Some(1), path: path.into(), boot_ns: T, ..CgroupFound::default() })
    }

    #[test]
    fn a_line_waits_for_its_path_until_the_answer_or_a_short_time() {
        for (answered, tick_ms, expected) in [
            (true, 2, vec![Some("/own")]),
            (false, 400, vec![]),
            (false, 500, vec![None]),
            (true, 600, vec![Some("/own")]),
        ] {
            let mut test = TestEngine::new();
            let (kill, mark) = killed_in(OWN);
            test.feed(&kill).feed(&mark);
            assert_eq!((test.kills().len(), test.alerts().len()), (0, 0));
            assert!(test.requests().contains(&Request::LookUpCgroup { id: OWN, urgent: true }));
            if answered {
                test.fact(found(OWN, "/own"));
            }
            test.tick(T + tick_ms * MS);
            assert_eq!(paths(&test.kills()), expected, "answered {answered}, after {tick_ms} ms");
            assert_eq!(test.alerts().len(), expected.len());
        }
    }

    #[test]
    fn a_line_with_a_path_or_of_a_removed_cgroup_does_not_wait_and_all_end_with_the_run() {
        let (kill, mark) = killed_in(OWN);
        let mut test = TestEngine::new();
        test.fact(found(OWN, "/own")).feed(&kill).feed(&mark);
        assert_eq!(paths(&test.kills()), [Some("/own")]);
        let mut test = TestEngine::new();
        test.feed(&kill).feed(&mark).fact(Fact::Stop { boot_ns: T + 2 * MS });
        assert_eq!((paths(&test.kills()), test.saved().len()), (vec![None], 1));
        let mut test = TestEngine::new();
        let gone = test_support::cgroup(T - 1, test_support::memcg(OWN, MIB), 1, "", wire::CGROUP_REMOVED);
        test.feed(&gone).feed(&kill).feed(&mark);
        assert_eq!(paths(&test.kills()), [None]);
    }

    #[test]
    fn a_kill_in_a_cgroup_over_the_cap_has_its_path_and_what_its_processes_hold() {
        let mut test = TestEngine::new();
        for id in 1..=CGROUPS_CAP as u64 + 100 {
            test.fact(Fact::Cgroup(CgroupFound {
                id,
                parent_id: (id > 1).then_some(1),
                path: format!("/{id}"),
                boot_ns: T - SEC,
                usage_bytes: Some(MIB),
                ..CgroupFound::default()
            }));
        }
        test.tick(T - SEC);
        test.feed(&test_support::rss(T - MS, 100, OWN, 7, 2 * MIB));
        test.feed(&test_support::rss(T - MS, 101, OWN, 8, 5 * MIB));
        assert_eq!(test.requests(), [], "none is asked for that finds no room");
        let (kill, mark) = killed_in(OWN);
        test.feed(&kill).feed(&mark).fact(found(OWN, "/own")).tick(T + SEC);
        assert_eq!(paths(&test.kills()), [Some("/own")]);
        let incident = test.saved().remove(0);
        assert_eq!(incident.cgroup.path.as_deref(), Some("/own"));
        let tasks: Vec<u64> = incident.oom.unwrap().tasks.iter().map(|task| task.anon_bytes).collect();
        assert_eq!(tasks, [5 * MIB, 3 * MIB]);
        assert_eq!(test.engine.world.cgroups.get(OWN).unwrap().tree.anon, 8 * MIB);
        test.tick(T + 2 * SEC);
        assert_eq!(test.engine.counts().losses.get(Loss::CgroupsOverCap.label()), Some(&102));
    }

    #[test]
    fn lines_that_wait_are_bounded() {
        let (mut lines, mut out, cgroups) = (KillLines::default(), Out::default(), {
            let mut cgroups = Cgroups::default();
            cgroups.ensure(OWN, T, crate::world::Need::Kill);
            cgroups
        });
        for pid in 0..WAITING_CAP as u32 + 10 {
            let found = Finding::OomKill {
                incident: "i".into(),
                cgroup_id: Some(OWN),
                pid,
                comm: String::new(),
                cgroup_path: None,
            };
            lines.emit(Output::Alert(found), (Some(OWN), T), T, &cgroups, &mut out);
        }
        assert_eq!((lines.waiting.len(), out.outputs.len()), (WAITING_CAP, 10));
    }
}
