//! Senders of SIGKILL, for the SIGKILL ledger: one entry for each process, about the first signal
//! that was delivered. A SIGKILL from the kernel waits, because the mark that makes it an OOM kill
//! may come later.

use std::collections::BTreeMap;

use memtrace_common::event as wire;
use memtrace_incident::{Loss, MoreSigkills, Process, SigkillCause, SigkillEntry};

use super::pairing::{DELIVERED, LATE_RECORD_NS, OpenVictim, PAIR_NS};
use super::recent::RecentProcesses;
use super::sender_rates::{LeftOut, SenderRates};
use crate::decode::cgroup_id;
use crate::output::{Out, Output};
use crate::run::Run;
use crate::world::{ProcessKey, World, comm};

/// Entries that wait; further ones are counted as lost. The last quarter is only for SIGKILLs from
/// the kernel.
const WAITING_CAP: usize = 4096;

/// SIGKILLs that wait for their entry, and processes that have one.
#[derive(Clone, Debug, Default)]
pub(crate) struct Sigkills {
    /// The first SIGKILL of each process. Cap: [`WAITING_CAP`].
    waiting: BTreeMap<ProcessKey, SigkillEntry>,
    /// Processes with an emitted entry. Further SIGKILLs to them are ignored.
    reported: RecentProcesses,
    rates: SenderRates,
}

impl Sigkills {
    /// A SIGKILL was delivered. Returns false when there is no room for it.
    fn sent(&mut self, entry: SigkillEntry) -> bool {
        let key = (entry.pid, entry.start_boot_ns);
        if self.reported.contains(&key) {
            return true;
        }
        let cap = if entry.cause == SigkillCause::Kernel { WAITING_CAP } else { WAITING_CAP / 4 * 3 };
        let full = self.waiting.len() >= cap;
        match self.waiting.get_mut(&key) {
            Some(first) if entry.boot_ns < first.boot_ns => *first = entry,
            Some(_) => {}
            None if full => return false,
            None => drop(self.waiting.insert(key, entry)),
        }
        true
    }

    /// The OOM killer sent this one. Returns the entry, unless another sender was earlier.
    fn of_oom(&mut self, entry: SigkillEntry) -> Option<SigkillEntry> {
        let key = (entry.pid, entry.start_boot_ns);
        let faster = |first: &SigkillEntry| first.cause != SigkillCause::Kernel && first.boot_ns < entry.boot_ns;
        if self.reported.contains(&key) || self.waiting.get(&key).is_some_and(faster) {
            return None;
        }
        self.waiting.remove(&key);
        self.reported.insert(key);
        Some(entry)
    }

    /// Entries that have waited long enough, oldest first, each with those of its sender that the
    /// rate limit left out before it; and how many were left out now.
    fn due(&mut self, now: u64, all: bool) -> (Vec<(SigkillEntry, Option<LeftOut>)>, u64) {
        let due = |entry: &SigkillEntry| {
            let wait = if entry.cause == SigkillCause::Kernel { PAIR_NS } else { LATE_RECORD_NS };
            all || now > entry.boot_ns.saturating_add(wait)
        };
        let mut entries: Vec<SigkillEntry> =
            self.waiting.extract_if(.., |_, entry| due(entry)).map(|(_, e)| e).collect();
        entries.sort_by_key(|entry| (entry.boot_ns, entry.pid));
        entries.iter().for_each(|entry| self.reported.insert((entry.pid, entry.start_boot_ns)));
        let mut left_out = 0u64;
        let mut reported = self.rates.overdue(now, all);
        for entry in entries {
            match self.rates.take(entry, now, all) {
                Some(allowed) => reported.push(allowed),
                None => left_out = left_out.saturating_add(1),
            }
        }
        (reported, left_out)
    }

    pub(crate) fn memory_estimate(&self) -> usize {
        self.waiting.len() * (size_of::<SigkillEntry>() + 64)
            + self.reported.memory_estimate()
            + self.rates.memory_estimate()
    }
}

impl Sigkills {
    /// A record says that SIGKILL was sent.
    pub(super) fn sent_by(&mut self, r: &wire::Kill, world: &World, run: &mut Run) {
        let cause = match r.sender_code {
            wire::SENDER_NOINFO => SigkillCause::CgroupKill,
            wire::SENDER_PROCESS => SigkillCause::Process,
            wire::SENDER_EXITING => SigkillCause::PidNamespace,
            wire::SENDER_PARENT => SigkillCause::ParentDeath,
            // Also codes of a newer kernel side, which this build does not know.
            _ => SigkillCause::Kernel,
        };
        if r.result != DELIVERED {
            return;
        }
        // For a thread other than the main one the name of its process, when that is known.
        let name = |task: &wire::Task| match world.processes.get((task.tgid, task.start_boot_ns)) {
            Some(row) if !row.comm.is_empty() && task.tid != task.tgid => row.comm.clone(),
            _ => comm(task),
        };
        let entry = SigkillEntry {
            boot_ns: r.header.boot_ns,
            wall: String::new(),
            pid: r.target.tgid,
            start_boot_ns: r.target.start_boot_ns,
            comm: name(&r.target),
            cgroup_id: cgroup_id(r.cgroup_id),
            cgroup_path: None,
            cause,
            sender_pid: r.sender.tgid,
            sender_start_boot_ns: r.sender.start_boot_ns,
            sender_comm: name(&r.sender),
            sender_uid: (r.sender_uid != wire::UNKNOWN_U32).then_some(r.sender_uid),
            sender_cgroup_id: (world.processes.get((r.sender.tgid, r.sender.start_boot_ns))).and_then(|row| row.cgroup),
            sender_cgroup_path: None,
            incident: None,
            more: None,
        };
        if !self.sent(entry) {
            run.losses.count(Loss::SigkillsNotReported, 1);
        }
    }

    /// A victim of the OOM killer was reported: emits the entry at once.
    pub(super) fn of_victim(
        &mut self,
        victim: &OpenVictim,
        trigger: &Process,
        incident: &str,
        world: &World,
        run: &Run,
        out: &mut Out,
    ) {
        let v = &victim.victim;
        let entry = SigkillEntry {
            boot_ns: v.at_boot_ns,
            wall: String::new(),
            pid: v.pid,
            start_boot_ns: v.start_boot_ns,
            comm: v.comm.clone(),
            cgroup_id: v.cgroup_id,
            cgroup_path: None,
            cause: SigkillCause::Oom,
            sender_pid: trigger.pid,
            sender_start_boot_ns: trigger.start_boot_ns,
            sender_comm: trigger.comm.clone(),
            sender_uid: None,
            sender_cgroup_id: None,
            sender_cgroup_path: None,
            incident: Some(incident.to_owned()),
            more: None,
        };
        let entry = self.of_oom(entry);
        out.outputs.extend(entry.map(|entry| complete(entry, None, world, run)));
    }

    /// Emits entries that have waited long enough; with `all`, every entry.
    pub(super) fn report_due(&mut self, all: bool, world: &World, run: &mut Run, out: &mut Out) {
        let (entries, left_out) = self.due(run.now, all);
        run.losses.count(Loss::SigkillsNotReported, left_out);
        let complete = |(entry, left_out)| complete(entry, left_out, world, run);
        out.outputs.extend(entries.into_iter().map(complete));
    }
}

/// The output of an entry, with wall times and paths filled in.
fn complete(entry: SigkillEntry, left_out: Option<LeftOut>, world: &World, run: &Run) -> Output {
    let (wall, cgroup_path) = (run.clock.wall(entry.boot_ns), world.cgroups.path(entry.cgroup_id));
    let sender_cgroup_path = world.cgroups.path(entry.sender_cgroup_id);
    let more = left_out.map(|left_out| MoreSigkills {
        count: left_out.count,
        from: run.clock.wall(left_out.from_ns),
        until: run.clock.wall(left_out.until_ns),
        same_sender: left_out.same_sender,
    });
    Output::Sigkill(SigkillEntry { wall, cgroup_path, sender_cgroup_path, more, ..entry })
}

#[cfg(test)]
mod tests {
    use super::super::recent::CAP;
    use super::super::sender_rates::OWN_BURST;
    use super::*;
    use crate::test_support::{self, MIB, MS, SEC, TestEngine};

    const T: u64 = 1_000 * SEC;

    fn reported(test: &TestEngine) -> Vec<SigkillEntry> {
        test.out
            .outputs
            .iter()
            .filter_map(|e| if let Output::Sigkill(s) = e { Some(s.clone()) } else { None })
            .collect()
    }

    /// A SIGKILL from 90 to 100 in cgroup 5.
    fn sigkill(ms: u64, sender_code: u32) -> wire::Kill {
        wire::Kill { sender_code, ..test_support::kill(T + ms * MS, 90, 100, 5) }
    }

    fn mark(ms: u64) -> wire::OomVictim {
        test_support::victim(T + ms * MS, 90, 100, test_support::memcg(5, MIB), test_support::limited(5, MIB, MIB), MIB)
    }

    #[test]
    fn the_first_delivered_sigkill_names_its_sender() {
        enum In {
            Sent(u64, u32),
            Undelivered(u64, u32),
            Mark(u64),
        }
        use In::*;
        use SigkillCause as C;
        use wire::{SENDER_EXITING, SENDER_KERNEL, SENDER_NOINFO, SENDER_PARENT, SENDER_PROCESS};
        type Case<'a> = (&'a str, &'a [In], &'a [(u64, C)]);
        let cases: &[Case<'_>] = &[
            ("cgroup.kill", &[Sent(0, SENDER_NOINFO)], &[(0, C::CgroupKill)]),
            ("kill(2)", &[Sent(0, SENDER_PROCESS)], &[(0, C::Process)]),
            ("pid namespace", &[Sent(0, SENDER_EXITING)], &[(0, C::PidNamespace)]),
            ("parent death", &[Sent(0, SENDER_PARENT)], &[(0, C::ParentDeath)]),
            ("the kernel, no mark", &[Sent(0, SENDER_KERNEL)], &[(0, C::Kernel)]),
            ("OOM", &[Sent(0, SENDER_KERNEL), Mark(1)], &[(0, C::Oom)]),
            ("OOM, mark first", &[Mark(1), Sent(0, SENDER_KERNEL)], &[(0, C::Oom)]),
            ("OOM, then cgroup.kill", &[Sent(0, SENDER_KERNEL), Mark(1), Sent(2, SENDER_NOINFO)], &[(0, C::Oom)]),
            (
                "OOM, cgroup.kill is read first",
                &[Sent(2, SENDER_NOINFO), Sent(0, SENDER_KERNEL), Mark(1)],
                &[(0, C::Oom)],
            ),
            ("kill(2), then OOM", &[Sent(0, SENDER_PROCESS), Sent(3, SENDER_KERNEL), Mark(4)], &[(0, C::Process)]),
            ("twice", &[Sent(0, SENDER_NOINFO), Sent(1, SENDER_PROCESS)], &[(0, C::CgroupKill)]),
            ("twice, late", &[Sent(0, SENDER_NOINFO), Sent(900, SENDER_PROCESS)], &[(0, C::CgroupKill)]),
            ("ignored by an init", &[Undelivered(0, SENDER_PROCESS)], &[]),
            ("chosen while exiting", &[Mark(0)], &[]),
        ];
        for (name, inputs, expected) in cases {
            let mut test = TestEngine::new();
            let mut ms = 0;
            for input in *inputs {
                match input {
                    Sent(at, code) => {
                        // A late record comes after a tick.
                        if *at > ms + 500 {
                            test.tick(T + (at - 100) * MS);
                        }
                        ms = ms.max(*at);
                        test.feed(&sigkill(*at, *code))
                    }
                    Undelivered(at, code) => test.feed(&wire::Kill { result: 2, ..sigkill(*at, *code) }),
                    Mark(at) => test.feed(&mark(*at)),
                };
            }
            test.tick(T + 2 * SEC).tick(T + 4 * SEC);
            let reported: Vec<_> = reported(&test).iter().map(|s| ((s.boot_ns - T) / MS, s.cause)).collect();
            assert_eq!(reported, *expected, "{name}");
            let marked = inputs.iter().any(|i| matches!(i, Mark(_)));
            assert_eq!((test.saved().is_empty(), test.kills().is_empty()), (!marked, !marked), "{name}");
        }
    }

    #[test]
    fn an_entry_says_who_where_and_which_incident() {
        let mut test = TestEngine::new();
        test.feed(&test_support::cgroup(T - SEC, test_support::memcg(5, 0), 2, "/app", wire::CGROUP_MADE));
        test.feed(&test_support::exec(T - SEC, 100, 5, "worker", 0, 7));
        test.feed(&sigkill(0, wire::SENDER_KERNEL)).feed(&mark(1));
        let oom = reported(&test);
        assert_eq!(oom[0].incident.as_ref(), Some(&test.kills()[0].incident));
        let mut other = sigkill(5, wire::SENDER_PROCESS);
        other.target = test_support::task(101);
        test.feed(&other).tick(T + SEC);
        let all = reported(&test);
        assert_eq!((all.len(), all[1].pid, all[1].comm.as_str(), all[1].incident.as_ref()), (2, 101, "p101", None));
        assert_eq!((all[1].sender_pid, all[1].sender_comm.as_str()), (90, "p90"));
        assert_eq!((all[1].cgroup_path.as_deref(), all[1].cgroup_id), (Some("/app"), Some(5)));
        assert_eq!(all[1].wall, "2023-11-14T22:30:00.005000000Z");
    }

    #[test]
    fn a_process_that_shares_the_memory_of_a_victim_is_the_oom_killers_too() {
        let mut test = TestEngine::new();
        test.feed(&sigkill(0, wire::SENDER_KERNEL)).feed(&mark(1));
        test.feed(&wire::Kill { target: test_support::task(101), ..sigkill(2, wire::SENDER_KERNEL) });
        test.tick(T + 3 * SEC);
        let causes: Vec<_> = reported(&test).iter().map(|s| (s.pid, s.cause)).collect();
        assert_eq!(causes, [(100, SigkillCause::Oom), (101, SigkillCause::Oom)]);
    }

    #[test]
    fn a_flood_is_bounded_and_what_is_left_out_is_counted() {
        let mut test = TestEngine::new();
        for pid in 0..10_000u32 {
            test.feed(&wire::Kill { target: test_support::task(pid), ..sigkill(0, wire::SENDER_PROCESS) });
        }
        test.feed(&wire::Kill { target: test_support::task(100_001), ..sigkill(1, wire::SENDER_KERNEL) });
        test.feed(&test_support::victim(
            T + MS,
            90,
            100_001,
            test_support::memcg(5, 1),
            test_support::limited(5, 1, 1),
            1,
        ));
        test.tick(T + SEC);
        let all = reported(&test);
        assert_eq!(
            (all.len() as u64, all[0].cause),
            (OWN_BURST + 1, SigkillCause::Oom),
            "the OOM killer's has its place"
        );
        let lost = |test: &TestEngine| test.engine.run.losses.current().get(Loss::SigkillsNotReported.label()).copied();
        assert_eq!(lost(&test), Some(10_000 - OWN_BURST));
        test.feed(&wire::Kill { target: test_support::task(200_000), ..sigkill(1100, wire::SENDER_PROCESS) });
        test.tick(T + 3 * SEC);
        let all = reported(&test);
        assert_eq!((all.len() as u64, lost(&test)), (OWN_BURST + 2, Some(10_000 - OWN_BURST)));
        let more = all.last().and_then(|last| last.more.clone()).unwrap();
        assert_eq!(
            (more.count, more.same_sender),
            (WAITING_CAP as u64 / 4 * 3 - OWN_BURST, true),
            "and they are counted"
        );
        assert!(test.engine.oom.sigkills.reported.len() <= CAP && test.engine.oom.sigkills.waiting.is_empty());
    }

    #[test]
    fn a_stop_emits_waiting_entries() {
        let mut test = TestEngine::new();
        test.feed(&sigkill(0, wire::SENDER_KERNEL)).fact(crate::input::Fact::Stop { boot_ns: T + MS });
        assert_eq!(reported(&test)[0].cause, SigkillCause::Kernel);
    }
}
