//! Who sent a SIGKILL: one entry a process, for the first that was delivered. The kernel's own wait for what the OOM
//! killer says about them.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use memtrace_common::event as wire;

use memtrace_incident::{Loss, Process};

use super::pairing::{OpenVictim, PAIR_NS, SETTLE_NS};
use crate::decode::cgroup_id;
use crate::output::{Out, Output};
use crate::run::Run;
use crate::world::{ProcessKey, World, comm};
use memtrace_incident::{SigkillCause, SigkillEntry};

/// Entries that wait; what is more is counted and left out. The last quarter is for the kernel's own.
const WAITING_CAP: usize = 4096;
/// Processes whose entry was told, remembered so that further SIGKILLs to them are none; the oldest are forgotten.
const TOLD_CAP: usize = 4096;
/// Anybody can send SIGKILL as fast as they like: this many entries at once, and then one in this time. Those of OOM
/// kills are not counted in.
const BURST: u64 = 1000;
const PERIOD_NS: u64 = 10_000_000;
/// TRACE_SIGNAL_DELIVERED; all else changed nothing.
const DELIVERED: u32 = 0;

/// SIGKILLs that wait to be told, and those that were.
#[derive(Clone, Debug, Default)]
pub(crate) struct Sigkills {
    /// First SIGKILL of a process. At most [`WAITING_CAP`].
    waiting: BTreeMap<ProcessKey, SigkillEntry>,
    /// Oldest first, at most [`TOLD_CAP`].
    told: VecDeque<ProcessKey>,
    told_set: BTreeSet<ProcessKey>,
    /// When the burst is used up no more.
    spent_until_ns: u64,
}

impl Sigkills {
    /// A SIGKILL was delivered; false when there is no room for it.
    fn sent(&mut self, entry: SigkillEntry) -> bool {
        let key = (entry.pid, entry.start_boot_ns);
        if self.told_set.contains(&key) {
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

    /// The OOM killer sent this one; the entry, unless somebody was faster.
    fn of_oom(&mut self, entry: SigkillEntry) -> Option<SigkillEntry> {
        let key = (entry.pid, entry.start_boot_ns);
        let faster = |first: &SigkillEntry| first.cause != SigkillCause::Kernel && first.boot_ns < entry.boot_ns;
        if self.told_set.contains(&key) || self.waiting.get(&key).is_some_and(faster) {
            return None;
        }
        self.waiting.remove(&key);
        self.remember(key);
        Some(entry)
    }

    /// Entries that have waited long enough, oldest first, and how many are left out.
    fn due(&mut self, now: u64, all: bool) -> (Vec<SigkillEntry>, u64) {
        let due = |entry: &SigkillEntry| {
            let wait = if entry.cause == SigkillCause::Kernel { PAIR_NS } else { SETTLE_NS };
            all || now > entry.boot_ns.saturating_add(wait)
        };
        let mut entries: Vec<SigkillEntry> =
            self.waiting.extract_if(.., |_, entry| due(entry)).map(|(_, e)| e).collect();
        entries.sort_by_key(|entry| (entry.boot_ns, entry.pid));
        entries.iter().for_each(|entry| self.remember((entry.pid, entry.start_boot_ns)));
        let found = entries.len();
        entries.retain(|_| self.allowed(now));
        let left_out = found.saturating_sub(entries.len()) as u64;
        (entries, left_out)
    }

    fn allowed(&mut self, now: u64) -> bool {
        if self.spent_until_ns.saturating_sub(now) > (BURST - 1) * PERIOD_NS {
            return false;
        }
        self.spent_until_ns = self.spent_until_ns.max(now).saturating_add(PERIOD_NS);
        true
    }

    fn remember(&mut self, key: ProcessKey) {
        if !self.told_set.insert(key) {
            return;
        }
        self.told.push_back(key);
        if self.told.len() > TOLD_CAP
            && let Some(oldest) = self.told.pop_front()
        {
            self.told_set.remove(&oldest);
        }
    }

    pub(crate) fn memory_estimate(&self) -> usize {
        self.waiting.len() * (size_of::<SigkillEntry>() + 64) + self.told.len() * 2 * size_of::<ProcessKey>()
    }
}

impl Sigkills {
    /// Somebody sent SIGKILL.
    pub(super) fn sent_by(&mut self, r: &wire::Kill, world: &World, run: &mut Run) {
        let cause = match r.sender_code {
            wire::SENDER_NOINFO => SigkillCause::CgroupKill,
            wire::SENDER_PROCESS => SigkillCause::Process,
            wire::SENDER_EXITING => SigkillCause::PidNamespace,
            wire::SENDER_PARENT => SigkillCause::ParentDeath,
            // A code that this build does not know is a reason of a newer kernel side.
            _ => SigkillCause::Kernel,
        };
        if r.result != DELIVERED {
            return;
        }
        // Its leader's name as it is now; a thread may have another, so that of its exec where only that is known.
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
            incident: None,
        };
        if !self.sent(entry) {
            run.losses.count(Loss::SigkillsNotReported, 1);
        }
    }

    /// The SIGKILL of an OOM victim, which is reported at once.
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
            incident: Some(incident.to_owned()),
        };
        let entry = self.of_oom(entry);
        out.outputs.extend(entry.map(|entry| complete(entry, world, run)));
    }

    /// Reports the SIGKILLs that have waited long enough; with `all`, every one of them.
    pub(super) fn report_due(&mut self, all: bool, world: &World, run: &mut Run, out: &mut Out) {
        let (entries, left_out) = self.due(run.now, all);
        run.losses.count(Loss::SigkillsNotReported, left_out);
        out.outputs.extend(entries.into_iter().map(|entry| complete(entry, world, run)));
    }
}

/// An entry with its wall time and path.
fn complete(entry: SigkillEntry, world: &World, run: &Run) -> Output {
    let (wall, cgroup_path) = (run.clock.wall(entry.boot_ns), world.cgroups.path(entry.cgroup_id));
    Output::Sigkill(SigkillEntry { wall, cgroup_path, ..entry })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_support::{self as sample, MIB, MS, SEC, TestEngine};

    const T: u64 = 1_000 * SEC;

    fn told(b: &TestEngine) -> Vec<SigkillEntry> {
        b.out.outputs.iter().filter_map(|e| if let Output::Sigkill(s) = e { Some(s.clone()) } else { None }).collect()
    }

    /// A SIGKILL from 90 to 100 in cgroup 5.
    fn sigkill(ms: u64, sender_code: u32) -> wire::Kill {
        wire::Kill { sender_code, ..sample::kill(T + ms * MS, 90, 100, 5) }
    }

    fn mark(ms: u64) -> wire::OomVictim {
        sample::victim(T + ms * MS, 90, 100, sample::memcg(5, MIB), sample::limited(5, MIB, MIB), MIB)
    }

    #[test]
    fn the_decision_table_of_senders() {
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
            let mut b = TestEngine::new();
            let mut ms = 0;
            for input in *inputs {
                match input {
                    Sent(at, code) => {
                        // What comes late comes after a tick.
                        if *at > ms + 500 {
                            b.tick(T + (at - 100) * MS);
                        }
                        ms = ms.max(*at);
                        b.feed(&sigkill(*at, *code))
                    }
                    Undelivered(at, code) => b.feed(&wire::Kill { result: 2, ..sigkill(*at, *code) }),
                    Mark(at) => b.feed(&mark(*at)),
                };
            }
            b.tick(T + 2 * SEC).tick(T + 4 * SEC);
            let told: Vec<_> = told(&b).iter().map(|s| ((s.boot_ns - T) / MS, s.cause)).collect();
            assert_eq!(told, *expected, "{name}");
            let marked = inputs.iter().any(|i| matches!(i, Mark(_)));
            assert_eq!((b.saved().is_empty(), b.kills().is_empty()), (!marked, !marked), "{name}");
        }
    }

    #[test]
    fn an_entry_says_who_where_and_which_incident() {
        let mut b = TestEngine::new();
        b.feed(&sample::cgroup(T - SEC, sample::memcg(5, 0), 2, "/app", wire::CGROUP_MADE));
        b.feed(&sample::exec(T - SEC, 100, 5, "worker", 0, 7));
        b.feed(&sigkill(0, wire::SENDER_KERNEL)).feed(&mark(1));
        let oom = told(&b);
        assert_eq!(oom[0].incident.as_ref(), Some(&b.kills()[0].incident));
        let mut other = sigkill(5, wire::SENDER_PROCESS);
        other.target = sample::task(101);
        b.feed(&other).tick(T + SEC);
        let all = told(&b);
        assert_eq!((all.len(), all[1].pid, all[1].comm.as_str(), all[1].incident.as_ref()), (2, 101, "p101", None));
        assert_eq!((all[1].sender_pid, all[1].sender_comm.as_str()), (90, "p90"));
        assert_eq!((all[1].cgroup_path.as_deref(), all[1].cgroup_id), (Some("/app"), Some(5)));
        assert_eq!(all[1].wall, "2023-11-14T22:30:00.005000000Z");
    }

    #[test]
    fn a_process_that_shares_the_memory_of_a_victim_is_the_oom_killers_too() {
        let mut b = TestEngine::new();
        b.feed(&sigkill(0, wire::SENDER_KERNEL)).feed(&mark(1));
        b.feed(&wire::Kill { target: sample::task(101), ..sigkill(2, wire::SENDER_KERNEL) });
        b.tick(T + 3 * SEC);
        let causes: Vec<_> = told(&b).iter().map(|s| (s.pid, s.cause)).collect();
        assert_eq!(causes, [(100, SigkillCause::Oom), (101, SigkillCause::Oom)]);
    }

    #[test]
    fn a_flood_is_bounded_and_what_is_left_out_is_counted() {
        let mut b = TestEngine::new();
        for pid in 0..10_000u32 {
            b.feed(&wire::Kill { target: sample::task(pid), ..sigkill(0, wire::SENDER_PROCESS) });
        }
        b.feed(&wire::Kill { target: sample::task(100_001), ..sigkill(1, wire::SENDER_KERNEL) });
        b.feed(&sample::victim(T + MS, 90, 100_001, sample::memcg(5, 1), sample::limited(5, 1, 1), 1));
        b.tick(T + SEC);
        let all = told(&b);
        assert_eq!((all.len() as u64, all[0].cause), (BURST + 1, SigkillCause::Oom), "the OOM killer's has its place");
        let lost = |b: &TestEngine| b.engine.run.losses.current().get(Loss::SigkillsNotReported.label()).copied();
        assert_eq!(lost(&b), Some(10_000 - BURST));
        b.feed(&wire::Kill { target: sample::task(200_000), ..sigkill(1100, wire::SENDER_PROCESS) });
        b.tick(T + 3 * SEC);
        assert_eq!((told(&b).len() as u64, lost(&b)), (BURST + 2, Some(10_000 - BURST)));
        assert!(b.engine.oom.sigkills.told.len() <= TOLD_CAP && b.engine.oom.sigkills.waiting.is_empty());
    }

    #[test]
    fn a_stop_tells_what_waits() {
        let mut b = TestEngine::new();
        b.feed(&sigkill(0, wire::SENDER_KERNEL)).fact(crate::input::Fact::Stop { boot_ns: T + MS });
        assert_eq!(told(&b)[0].cause, SigkillCause::Kernel);
    }
}
