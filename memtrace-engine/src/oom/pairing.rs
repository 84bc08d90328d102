//! Pairs SIGKILLs, marks and decisions of the OOM killer.
//!
//! One thread of the kernel does this in order (mm/oom_kill.c): decision, SIGKILL to the victim,
//! mark of the victim, SIGKILLs to processes that share its address space, which are never marked.
//! For a group kill it repeats the last three for each member. Records of different CPUs may arrive
//! in any order, so a SIGKILL waits for its mark, and a mark waits for its SIGKILL.

use std::collections::VecDeque;

use memtrace_common::event as wire;
use memtrace_incident::{Process, Victim};

use crate::decode::{Reading, cgroup_id, known};
use crate::world::{ProcessKey, comm};

const MS: u64 = 1_000_000;
/// A SIGKILL and a mark of one process belong together when they are at most this far apart.
pub(super) const PAIR_NS: u64 = 1000 * MS;
/// A SIGKILL by the same trigger within this time after a mark goes to a process that shares the
/// victim's address space.
pub(super) const SHARER_NS: u64 = 100 * MS;
/// A mark without a SIGKILL waits this long for a late one.
pub(super) const LATE_RECORD_NS: u64 = 100 * MS;
/// Marks of a trigger belong to its decision for this long.
const DECISION_NS: u64 = 10_000 * MS;
/// SIGKILLs that wait for a mark; the oldest is dropped.
pub(super) const KILLS_CAP: usize = 1024;
/// Decisions that are remembered; the oldest is dropped.
const DECISIONS_CAP: usize = 256;
/// Kernel stacks that wait for a mark; the oldest is dropped.
const STACKS_CAP: usize = 64;
/// Functions of a trigger's kernel stack; outer ones are left out.
const FUNCTIONS_CAP: usize = wire::KERNEL_FRAMES;

/// TRACE_SIGNAL_DELIVERED (include/trace/events/signal.h). With another result the signal had no
/// effect.
pub(super) const DELIVERED: u32 = 0;

/// One thread of one process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Thread {
    pub(super) key: ProcessKey,
    pub(super) tid: u32,
}

impl From<&wire::Task> for Thread {
    fn from(t: &wire::Task) -> Self {
        Self { key: (t.tgid, t.start_boot_ns), tid: t.tid }
    }
}

/// A SIGKILL from the kernel.
#[derive(Clone, Copy, Debug)]
pub(super) struct KernelKill {
    pub(super) boot_ns: u64,
    pub(super) trigger: Thread,
    pub(super) target: wire::Task,
    pub(super) cgroup: Option<u64>,
    /// False: the process was dying already, and the signal changed nothing.
    pub(super) delivered: bool,
}

/// Whom a mark is about, when it was made and by whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Mark {
    pub(super) boot_ns: u64,
    pub(super) victim: ProcessKey,
    pub(super) trigger: Thread,
}

impl From<&wire::OomVictim> for Mark {
    fn from(m: &wire::OomVictim) -> Self {
        Self {
            boot_ns: m.header.boot_ns,
            victim: (m.victim.tgid, m.victim.start_boot_ns),
            trigger: (&m.trigger).into(),
        }
    }
}

impl KernelKill {
    pub(super) fn target(&self) -> ProcessKey {
        (self.target.tgid, self.target.start_boot_ns)
    }

    /// Whether a mark without [`wire::VICTIM_KILLED`] is that of this SIGKILL. The thread that marks
    /// is the one that has sent it before (mm/oom_kill.c, __oom_kill_process). `decided` is when that
    /// thread chose a victim.
    ///
    /// Without a decision between them, two SIGKILLs are of another reason. RLIMIT_CPU sends one to
    /// its own process, which marks itself when it runs out of memory while it is dying
    /// (mm/oom_kill.c, out_of_memory). One that changed nothing went to a process that was dying,
    /// and may have been chosen for that.
    pub(super) fn is_of(&self, mark: &Mark, decided: Option<u64>) -> bool {
        let same = self.target() == mark.victim && self.trigger == mark.trigger;
        let in_time = mark.boot_ns.checked_sub(self.boot_ns).is_some_and(|gap| gap <= PAIR_NS);
        let doubtful = self.trigger.key == mark.victim || !self.delivered;
        same && in_time && (!doubtful || decided.is_some_and(|ns| ns <= self.boot_ns))
    }
}

/// A decision of the OOM killer (mm/oom_kill.c, oom_kill_process).
#[derive(Clone, Copy, Debug)]
pub(super) struct Decision {
    pub(super) boot_ns: u64,
    pub(super) trigger: Thread,
    /// Process id of the process that was chosen; `None` when it was not read.
    pub(super) chosen: Option<u32>,
    /// The cgroup that ran out of memory.
    pub(super) oom: Reading,
    /// The kernel's `enum oom_constraint` (include/linux/oom.h); unknown is `u32::MAX`.
    pub(super) constraint: u32,
}

impl Decision {
    /// Whether a mark of its trigger can be one of its own. A process that is dying already marks
    /// itself before anything is decided (mm/oom_kill.c, out_of_memory: task_will_free_mem), also
    /// after it has decided about others.
    pub(super) fn fits(&self, victim: &OpenVictim) -> bool {
        !victim.marked_itself() || self.chosen.is_none_or(|pid| pid == victim.victim.pid)
    }
}

/// A victim of an open incident.
#[derive(Clone, Debug)]
pub(super) struct OpenVictim {
    pub(super) victim: Victim,
    pub(super) tid: u32,
    /// Its mark; `None` for a process that shares a victim's address space.
    pub(super) mark: Option<Mark>,
    /// When SIGKILL was sent; `None` as long as that is not known.
    pub(super) kill_ns: Option<u64>,
    /// Whether its ledger line was emitted.
    pub(super) reported: bool,
}

impl OpenVictim {
    pub(super) fn key(&self) -> ProcessKey {
        (self.victim.pid, self.victim.start_boot_ns)
    }

    /// Whether it was marked by its own thread, without a SIGKILL that is known.
    pub(super) fn marked_itself(&self) -> bool {
        let own = Thread { key: self.key(), tid: self.tid };
        !self.victim.killed && self.mark.is_some_and(|mark| mark.trigger == own)
    }

    /// When it was marked, boot clock.
    pub(super) fn marked_ns(&self) -> Option<u64> {
        self.mark.map(|mark| mark.boot_ns)
    }

    /// Whether no later record can change when it was killed.
    pub(super) fn is_certain(&self, now: u64, kills_seen: bool) -> bool {
        let waited = self.marked_ns().is_none_or(|ns| now >= ns.saturating_add(LATE_RECORD_NS));
        self.kill_ns.is_some() || !kills_seen || waited
    }
}

/// When and whether a marked process was killed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Verified {
    pub(super) kill_ns: Option<u64>,
    pub(super) killed: bool,
}

/// SIGKILLs, decisions and kernel stacks that wait for a mark.
#[derive(Clone, Debug, Default)]
pub(super) struct Pairing {
    /// Cap: [`KILLS_CAP`].
    kills: VecDeque<KernelKill>,
    /// Cap: [`DECISIONS_CAP`].
    decisions: VecDeque<Decision>,
    /// By victim. Cap: [`STACKS_CAP`].
    stacks: VecDeque<(ProcessKey, Vec<String>)>,
}

/// Returns whether the oldest was dropped.
fn push<T>(queue: &mut VecDeque<T>, cap: usize, item: T) -> bool {
    let full = queue.len() >= cap;
    if full {
        queue.pop_front();
    }
    queue.push_back(item);
    full
}

impl From<&wire::Kill> for KernelKill {
    fn from(r: &wire::Kill) -> Self {
        Self {
            boot_ns: r.header.boot_ns,
            trigger: (&r.sender).into(),
            target: r.target,
            cgroup: cgroup_id(r.cgroup_id),
            delivered: r.result == DELIVERED,
        }
    }
}

impl Pairing {
    /// Adds a SIGKILL from the kernel without a mark so far. Returns whether another was dropped for
    /// it.
    pub(super) fn add_kill(&mut self, kill: KernelKill) -> bool {
        push(&mut self.kills, KILLS_CAP, kill)
    }

    /// Whether and when the process of a mark was killed. The mark's own flag says so: SIGKILL and
    /// mark are in one section that nothing on the CPU gets between (mm/oom_kill.c, task_lock in
    /// __oom_kill_process), but on a real-time kernel another SIGKILL may hide the first from the
    /// hook. Then it is the earliest SIGKILL that fits. Removes all SIGKILLs of a killed process.
    pub(super) fn verify(&mut self, m: &wire::OomVictim, kills_seen: bool) -> Verified {
        let mark = Mark::from(m);
        let mark_ns = mark.boot_ns;
        let decision = self.decision(mark.trigger, mark_ns);
        let is_own = m.victim.tid == m.trigger.tid && m.flags & wire::VICTIM_GROUP == 0;
        let chose = |d: &Decision| !is_own || d.chosen.is_none_or(|pid| pid == m.victim.tgid);
        let decided = decision.filter(chose).map(|decision| decision.boot_ns);
        let flagged = m.flags & wire::VICTIM_KILLED != 0;
        let from_flag =
            (flagged && m.after_kill_ns != u32::MAX).then(|| mark_ns.saturating_sub(u64::from(m.after_kill_ns)));
        let of_mark = |k: &&KernelKill| k.is_of(&mark, decided);
        let recorded = || self.kills.iter().filter(of_mark).map(|k| k.boot_ns).min();
        let kill_ns = from_flag.or_else(recorded).or((flagged || !kills_seen).then_some(mark_ns));
        if kill_ns.is_some() {
            self.remove_kills(mark.victim);
        }
        Verified { kill_ns, killed: kill_ns.is_some() }
    }

    /// SIGKILLs that have waited long enough for a mark; with `all`, every SIGKILL. Those older
    /// than [`PAIR_NS`] are dropped.
    pub(super) fn overdue(&mut self, now: u64, all: bool) -> Vec<KernelKill> {
        let due = |k: &KernelKill| all || k.boot_ns.saturating_add(SHARER_NS) <= now;
        let overdue = self.kills.iter().filter(|k| due(k)).copied().collect();
        self.kills.retain(|k| k.boot_ns.saturating_add(PAIR_NS) > now);
        overdue
    }

    /// Every SIGKILL that waits for a mark.
    pub(super) fn waiting(&self) -> Vec<KernelKill> {
        self.kills.iter().copied().collect()
    }

    /// Removes the SIGKILLs to a process that became a victim.
    pub(super) fn remove_kills(&mut self, target: ProcessKey) {
        self.kills.retain(|k| k.target() != target);
    }

    pub(super) fn add_decision(&mut self, r: &wire::OomDecision) -> Decision {
        let decision = Decision {
            boot_ns: r.header.boot_ns,
            trigger: (&r.trigger).into(),
            chosen: (r.chosen.tgid != 0).then_some(r.chosen.tgid),
            oom: Reading::from(&r.oom),
            constraint: r.constraint,
        };
        push(&mut self.decisions, DECISIONS_CAP, decision);
        decision
    }

    /// The decision that a mark belongs to, which is the latest of its trigger.
    pub(super) fn decision(&self, trigger: Thread, mark_ns: u64) -> Option<Decision> {
        self.decisions
            .iter()
            .filter(|d| d.trigger == trigger && d.boot_ns <= mark_ns && mark_ns - d.boot_ns <= DECISION_NS)
            .max_by_key(|d| d.boot_ns)
            .copied()
    }

    pub(super) fn store_stack(&mut self, victim: ProcessKey, functions: Vec<String>) {
        push(&mut self.stacks, STACKS_CAP, (victim, functions));
    }

    pub(super) fn take_stack(&mut self, victim: ProcessKey) -> Option<Vec<String>> {
        let at = self.stacks.iter().position(|(key, _)| *key == victim)?;
        self.stacks.remove(at).map(|(_, functions)| functions)
    }

    pub(super) fn tick(&mut self, now: u64) {
        self.decisions.retain(|d| d.boot_ns.saturating_add(DECISION_NS) > now);
    }
}

/// Function names, cut to [`FUNCTIONS_CAP`] and escaped where not printable.
pub(super) fn functions(names: &[String]) -> Vec<String> {
    names.iter().take(FUNCTIONS_CAP).map(|n| crate::decode::printable(n.as_bytes())).collect()
}

/// A wire task as a process of the incident file.
pub(super) fn process(t: &wire::Task) -> Process {
    Process { pid: t.tgid, tid: t.tid, start_boot_ns: t.start_boot_ns, comm: comm(t) }
}

/// The victim that a mark is about.
pub(super) fn marked(m: &wire::OomVictim, verified: Verified) -> OpenVictim {
    let mark_ns = m.header.boot_ns;
    let victim = Victim {
        pid: m.victim.tgid,
        start_boot_ns: m.victim.start_boot_ns,
        comm: comm(&m.victim),
        cgroup_id: cgroup_id(m.victim_memcg.cgroup_id),
        cgroup_path: None,
        at_boot_ns: verified.kill_ns.unwrap_or(mark_ns),
        anon_bytes: known(m.rss.anon_bytes),
        file_bytes: known(m.rss.file_bytes),
        shmem_bytes: known(m.rss.shmem_bytes),
        swap_bytes: known(m.rss.swap_bytes),
        pagetable_bytes: known(m.pagetable_bytes),
        oom_score_adj: (m.oom_score_adj != wire::UNKNOWN_I32).then_some(m.oom_score_adj),
        killed: verified.killed,
        shares_mm: false,
        exit_boot_ns: None,
    };
    OpenVictim { victim, tid: m.victim.tid, mark: Some(m.into()), kill_ns: verified.kill_ns, reported: false }
}

/// A victim that was killed because it shares an address space with a marked one. Its memory is not
/// in the record of the SIGKILL.
pub(super) fn sharer(k: &KernelKill) -> OpenVictim {
    let victim = Victim {
        pid: k.target.tgid,
        start_boot_ns: k.target.start_boot_ns,
        comm: comm(&k.target),
        cgroup_id: k.cgroup,
        cgroup_path: None,
        at_boot_ns: k.boot_ns,
        anon_bytes: None,
        file_bytes: None,
        shmem_bytes: None,
        swap_bytes: None,
        pagetable_bytes: None,
        oom_score_adj: None,
        killed: true,
        shares_mm: true,
        exit_boot_ns: None,
    };
    OpenVictim { victim, tid: k.target.tid, mark: None, kill_ns: Some(k.boot_ns), reported: false }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_support::{self, MS};

    #[test]
    fn a_mark_is_a_kill_when_its_sigkill_or_its_flag_says_so() {
        // (name, SIGKILL at, flagged, after_kill_ns, kills seen) -> (kill time, killed); the mark
        // is at 5000 ms.
        type Case = (&'static str, Option<u64>, bool, u32, bool, Option<u64>);
        let cases: [Case; 9] = [
            ("SIGKILL before", Some(4999), false, 0, true, Some(4999 * MS)),
            ("a SIGKILL after the mark is another", Some(5001), false, 0, true, None),
            ("the flag's time beats that of a record", Some(4998), true, 1_000_000, true, Some(4999 * MS)),
            ("flag alone", None, true, 1_000_000, true, Some(4999 * MS)),
            ("flag without a time, and a record", Some(4999), true, u32::MAX, true, Some(4999 * MS)),
            ("flag, too long ago to say when", None, true, u32::MAX, true, Some(5000 * MS)),
            ("mark alone: chosen while exiting", None, false, 0, true, None),
            ("mark alone, SIGKILLs not seen", None, false, 0, false, Some(5000 * MS)),
            ("an old SIGKILL is another story", Some(3000), false, 0, true, None),
        ];
        for (name, kill_ms, flagged, after_kill_ns, kills_seen, expected) in cases {
            let mut pairing = Pairing::default();
            if let Some(ms) = kill_ms {
                pairing.add_kill((&test_support::kill(ms * MS, 1, 2, 5)).into());
            }
            pairing.add_kill((&test_support::kill(4999 * MS, 1, 3, 5)).into());
            let mut mark =
                test_support::victim(5000 * MS, 1, 2, test_support::memcg(5, 1), test_support::memcg(5, 1), 1);
            mark.flags = if flagged { wire::VICTIM_KILLED } else { 0 };
            mark.after_kill_ns = after_kill_ns;
            let verified = pairing.verify(&mark, kills_seen);
            assert_eq!(verified, Verified { kill_ns: expected, killed: expected.is_some() }, "{name}");
        }
    }

    #[test]
    fn everything_that_waits_is_bounded() {
        let mut pairing = Pairing::default();
        for i in 0..5000u32 {
            pairing.add_kill((&test_support::kill(1, 1, i, 5)).into());
            pairing.add_decision(&test_support::decision(1, 1, i, test_support::no_memcg(), 0));
            pairing.store_stack((i, 0), Vec::new());
        }
        assert_eq!(
            (pairing.kills.len(), pairing.decisions.len(), pairing.stacks.len()),
            (KILLS_CAP, DECISIONS_CAP, STACKS_CAP)
        );
        pairing.overdue(2 * PAIR_NS, false);
        pairing.tick(2 * DECISION_NS);
        assert!(pairing.kills.is_empty() && pairing.decisions.is_empty());
    }
}
