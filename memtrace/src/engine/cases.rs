//! Open OOM incidents: from the first mark, through what joins it, to the end of its window.

use memtrace_common::event as wire;

use super::builder;
use super::decode::Reading;
use super::input::{Effect, Finding, KillEntry};
use super::kernlog::KernelLog;
use super::kills::{Decision, OpenVictim, PAIR_NS, SHARER_NS, Thread, VICTIMS_CAP, marked, process, sharer};
use super::processes::Key;
use super::scope::{Moments, RanOut, View, counters, scope};
use memtrace_incident::KernelLogKill;
use memtrace_incident::Process;

use super::{Engine, clock::Identity};

/// Incidents open at once; the oldest is closed early for one more.
pub(super) const OPEN_CAP: usize = 32;
/// A group kill that goes on keeps its incident open at most this many windows.
const WINDOWS_CAP: u64 = 10;

/// An incident that still gathers.
#[derive(Clone, Debug)]
pub(super) struct Open {
    /// Known as soon as the moment of the kill is.
    pub(super) id: Option<String>,
    pub(super) at_ns: u64,
    pub(super) trigger: Thread,
    pub(super) trigger_process: Process,
    pub(super) mark_scope: u32,
    pub(super) mark_ns: u64,
    /// As far as is known by now.
    pub(super) ran_out: RanOut,
    pub(super) decision: Option<Decision>,
    pub(super) victim_memcg: Reading,
    pub(super) trigger_memcg: Reading,
    /// The cgroup the mark found near its limit.
    pub(super) marked_oom: Reading,
    /// The counters of what ran out.
    pub(super) oom: Reading,
    pub(super) group: bool,
    pub(super) victims: Vec<OpenVictim>,
    pub(super) victims_left_out: u64,
    /// As of the kill, before the victims die.
    pub(super) view: View,
    pub(super) stack: Vec<String>,
    pub(super) loss_base: std::collections::BTreeMap<String, u64>,
    pub(super) early: bool,
}

impl Open {
    fn victim(&mut self, key: Key) -> Option<&mut OpenVictim> {
        self.victims.iter_mut().find(|v| v.key() == key)
    }

    fn add(&mut self, victim: OpenVictim) {
        if self.victims.len() >= VICTIMS_CAP {
            self.victims_left_out += 1;
        } else {
            self.victims.push(victim);
        }
    }

    /// The mark that a SIGKILL to somebody else followed, if any did.
    fn shared_at(&self, kill_ns: u64) -> Option<u64> {
        let marks = self.victims.iter().filter_map(|v| v.marked_ns);
        marks.filter(|ns| *ns <= kill_ns && kill_ns - ns <= SHARER_NS).max()
    }

    /// A further mark is part of the same decision.
    fn joins(&self, m: &wire::OomVictim, decision: Option<Decision>) -> bool {
        if self.trigger != Thread::from(&m.trigger) {
            return false;
        }
        if let (Some(a), Some(b)) = (self.decision, decision) {
            return a.boot_ns == b.boot_ns;
        }
        let last = self.victims.iter().filter_map(|v| v.marked_ns).max().unwrap_or(self.at_ns);
        let group = m.flags & wire::VICTIM_GROUP != 0 && self.group;
        group && last.abs_diff(m.header.boot_ns) <= PAIR_NS
    }

    fn deadline(&self, after_ns: u64) -> u64 {
        let last = self.victims.iter().map(|v| v.victim.at_boot_ns).max().unwrap_or(self.at_ns).max(self.at_ns);
        last.min(self.at_ns.saturating_add(after_ns.saturating_mul(WINDOWS_CAP))).saturating_add(after_ns)
    }

    /// What the kernel log says about it: of several kills the one it says a constraint of.
    pub(super) fn logged<'a>(&self, log: &'a KernelLog) -> Option<&'a KernelLogKill> {
        let mut told = self.victims.iter().filter_map(|v| log.about(v.victim.pid, v.tid, v.victim.at_boot_ns));
        let first = told.next()?;
        if first.constraint.is_some() {
            return Some(first);
        }
        told.find(|l| l.constraint.is_some()).or(Some(first))
    }
}

impl Engine {
    /// Somebody sent SIGKILL.
    pub(super) fn on_kill(&mut self, r: &wire::Kill) {
        self.sigkill_sent(r);
        if r.sender_code != wire::SENDER_KERNEL {
            return;
        }
        let key = (r.target.tgid, r.target.start_boot_ns);
        let ns = r.header.boot_ns;
        for open in &mut self.open {
            let first = open.victims.first().map(OpenVictim::key) == Some(key) && open.id.is_none();
            let Some(v) = open.victims.iter_mut().find(|v| v.key() == key) else { continue };
            let of_mark = v.marked_ns.is_some_and(|mark| mark.abs_diff(ns) <= PAIR_NS);
            if v.kill_ns.is_none() && of_mark && !v.reported {
                v.kill_ns = Some(ns);
                v.victim.killed = true;
                v.victim.at_boot_ns = ns;
                if first {
                    open.at_ns = ns;
                }
            }
            if of_mark || v.marked_ns.is_none() {
                return;
            }
        }
        self.ledger.wait(r);
    }

    /// The kernel decided on a kill.
    pub(super) fn on_decision(&mut self, r: &wire::OomDecision) {
        let decision = self.ledger.decide(r);
        let late = |o: &&mut Open| {
            o.decision.is_none()
                && o.trigger == decision.trigger
                && o.at_ns >= decision.boot_ns
                && o.at_ns - decision.boot_ns <= PAIR_NS
        };
        if let Some(open) = self.open.iter_mut().find(late) {
            open.decision = Some(decision);
            self.refine();
        }
    }

    /// The OOM killer marked a victim.
    pub(super) fn on_mark(&mut self, m: &wire::OomVictim, effects: &mut Vec<Effect>) {
        let key = (m.victim.tgid, m.victim.start_boot_ns);
        let verified = self.ledger.verify(m, self.settings.kills_seen);
        let victim = marked(m, verified);
        let at_ns = victim.victim.at_boot_ns;
        self.book.victim_rss(m);
        self.log.hook_saw(m.victim.tgid, m.victim.tid, at_ns);
        if let Some(known) = self.open.iter_mut().find_map(|o| o.victim(key)) {
            if known.marked_ns.is_none() {
                let reported = known.reported;
                *known = OpenVictim { reported, kill_ns: known.kill_ns.or(victim.kill_ns), ..victim };
                known.victim.killed |= reported;
            } else if known.kill_ns.is_none() && !known.reported {
                known.kill_ns = victim.kill_ns;
                known.victim.killed = victim.victim.killed;
            }
        } else {
            let decision = self.ledger.decision((&m.trigger).into(), m.header.boot_ns);
            match self.open.iter_mut().find(|o| o.joins(m, decision)) {
                Some(open) => {
                    open.group |= m.flags & wire::VICTIM_GROUP != 0;
                    open.decision = open.decision.or(decision);
                    open.add(victim);
                }
                None => self.open_incident(m, victim, decision, effects),
            }
        }
        let mut read = Vec::with_capacity(3);
        for reading in [&m.victim_memcg, &m.trigger_memcg, &m.oom].map(Reading::from) {
            if !read.contains(&reading.cgroup_id) {
                read.push(reading.cgroup_id);
                self.reading(m.header.boot_ns, &reading, effects);
            }
        }
        self.explain(m);
        self.settle(false, effects);
    }

    /// What detectors saw in the cgroups around a kill is explained by it.
    fn explain(&mut self, m: &wire::OomVictim) {
        let oom = Reading::from(&m.oom).cgroup_id;
        let victim = Reading::from(&m.victim_memcg).cgroup_id;
        let trigger = Reading::from(&m.trigger_memcg).cgroup_id;
        let (cgroups, global) = (&self.book.cgroups, m.scope != wire::SCOPE_MEMCG);
        self.detectors.killed(m.header.boot_ns, |id| {
            global
                || [victim, trigger].into_iter().flatten().any(|v| cgroups.in_tree(v, id))
                || oom.is_some_and(|root| cgroups.in_tree(id, root))
        });
    }

    fn open_incident(
        &mut self,
        m: &wire::OomVictim,
        victim: OpenVictim,
        decision: Option<Decision>,
        effects: &mut Vec<Effect>,
    ) {
        if self.open.len() >= OPEN_CAP {
            let mut oldest = self.open.remove(0);
            oldest.early = true;
            self.close(oldest, effects);
        }
        self.book.victim(m);
        self.deliver_points();
        let at_ns = victim.victim.at_boot_ns;
        let from_ns = at_ns.saturating_sub(self.settings.before_ns);
        let victim_memcg = Reading::from(&m.victim_memcg);
        let trigger_memcg = Reading::from(&m.trigger_memcg);
        let marked_oom = Reading::from(&m.oom);
        let log = self.log.about(victim.victim.pid, victim.tid, at_ns);
        let book = &self.book;
        let (own, out) = (victim_memcg.cgroup_id, marked_oom.cgroup_id);
        let ran_out = scope(m.scope, own, out, decision.as_ref(), log, &book.cgroups);
        let decided = decision.map(|d| d.oom).unwrap_or_default();
        let when = Moments { from_ns, at_ns, mark_ns: m.header.boot_ns };
        let sums_of = |id: u64| book.cgroups.get(id).map(|r| r.tree).unwrap_or_default();
        let mut view = View::of(book, ran_out, own, when, at_ns, sums_of);
        builder::mark_victim(&mut view.tasks, &victim);
        let open = Open {
            id: None,
            at_ns,
            trigger: (&m.trigger).into(),
            trigger_process: process(&m.trigger),
            mark_scope: m.scope,
            decision,
            mark_ns: m.header.boot_ns,
            ran_out,
            victim_memcg,
            trigger_memcg,
            marked_oom,
            oom: counters(ran_out, marked_oom, &[decided, victim_memcg, trigger_memcg], &book.cgroups),
            group: m.flags & wire::VICTIM_GROUP != 0,
            stack: self.ledger.take_stack(victim.key()).unwrap_or_default(),
            victims: vec![victim],
            victims_left_out: 0,
            view,
            loss_base: self.losses.at(from_ns),
            early: false,
        };
        self.open.push(open);
        self.pin();
    }

    /// Gives incidents their id and reports what is certain; with `all`, everything.
    pub(super) fn settle(&mut self, all: bool, effects: &mut Vec<Effect>) {
        let mut settled = std::mem::take(&mut self.open);
        for open in &mut settled {
            self.settle_one(open, all, effects);
        }
        self.open = settled;
    }

    fn settle_one(&mut self, open: &mut Open, all: bool, effects: &mut Vec<Effect>) {
        let (now, kills_seen) = (self.now, self.settings.kills_seen);
        let certain = |v: &OpenVictim| all || v.settled(now, kills_seen);
        let Some(first) = open.victims.first().filter(|v| open.id.is_some() || certain(v)) else { return };
        let (pid, start_boot_ns) = first.key();
        let comm = first.victim.comm.clone();
        let cgroup_id = first.victim.cgroup_id;
        let fresh = open.id.is_none();
        let identity =
            Identity { kind: "oom_kill", boot_id: &self.host.boot_id, boot_ns: open.at_ns, pid, start_boot_ns };
        let id = open.id.get_or_insert_with(|| self.clock.incident_id(&identity)).clone();
        for v in open.victims.iter_mut().filter(|v| !v.reported && certain(v)) {
            v.reported = true;
            if v.victim.killed {
                self.sigkill_of_oom(v, &open.trigger_process, &id, effects);
            }
            effects.push(Effect::Kill(KillEntry {
                incident: id.clone(),
                boot_ns: v.victim.at_boot_ns,
                wall: self.clock.wall(v.victim.at_boot_ns),
                pid: v.victim.pid,
                start_boot_ns: v.victim.start_boot_ns,
                comm: v.victim.comm.clone(),
                cgroup_path: self.book.cgroups.path(v.victim.cgroup_id),
                usage_bytes: open.oom.usage,
                limit_bytes: open.oom.limit.bytes(),
                trigger_pid: open.trigger_process.pid,
                killed: v.victim.killed,
            }));
        }
        if fresh {
            let cgroup_path = self.book.cgroups.path(cgroup_id);
            effects.push(Effect::Alert(Finding::OomKill { incident: id.clone(), pid, comm, cgroup_path }));
            if let Some(recording) = self.recording.as_mut().filter(|r| r.concerns(&self.book, cgroup_id, pid)) {
                recording.oom_incident(id);
            }
        }
    }

    /// SIGKILLs that never got a mark: those that followed a mark by the same trigger went to sharers of its memory.
    fn sharers(&mut self, all: bool) {
        for kill in self.ledger.overdue(self.now, all) {
            let target = (kill.target.tgid, kill.target.start_boot_ns);
            let open = self
                .open
                .iter_mut()
                .filter(|o| o.trigger == kill.trigger)
                .filter_map(|o| o.shared_at(kill.boot_ns).map(|mark| (mark, o)))
                .max_by_key(|(mark, _)| *mark);
            let Some((_, open)) = open else { continue };
            self.ledger.take(target);
            if open.victim(target).is_some() {
                continue;
            }
            let mut victim = sharer(&kill);
            let key = self.book.find(&kill.target);
            let row = key.and_then(|k| self.book.processes.get(k));
            if let Some(sums) = row.and_then(|row| self.book.sums_of(row)) {
                let v = &mut victim.victim;
                (v.anon_bytes, v.file_bytes) = (Some(sums.anon), Some(sums.file));
                (v.shmem_bytes, v.swap_bytes) = (Some(sums.shmem), Some(sums.swap));
            }
            victim.victim.exit_boot_ns = row.and_then(|row| row.exited).map(|(ns, _)| ns);
            self.log.hook_saw(victim.victim.pid, victim.tid, kill.boot_ns);
            open.add(victim);
        }
    }

    /// A victim's last thread exited.
    pub(super) fn victim_exited(&mut self, key: Key, boot_ns: u64) {
        for v in self.open.iter_mut().filter_map(|o| o.victim(key)) {
            v.victim.exit_boot_ns = Some(boot_ns);
        }
    }

    /// Names of a trigger's kernel stack have come.
    pub(super) fn on_stack(&mut self, victim: Key, functions: Vec<String>) {
        match self.open.iter_mut().find(|o| o.victims.iter().any(|v| v.key() == victim)) {
            Some(open) if open.stack.is_empty() => open.stack = functions,
            Some(_) => {}
            None => self.ledger.keep_stack(victim, functions),
        }
    }

    /// Windows close. With `all`, every one of them.
    pub(super) fn close_due(&mut self, all: bool, effects: &mut Vec<Effect>) {
        self.sharers(all);
        self.settle(all, effects);
        let (now, after_ns) = (self.now, self.settings.after_ns);
        let due = |o: &Open| all || now >= o.deadline(after_ns);
        if !self.open.iter().any(due) {
            return;
        }
        let (closing, open): (Vec<Open>, Vec<Open>) = std::mem::take(&mut self.open).into_iter().partition(due);
        self.open = open;
        for mut open in closing {
            open.early = all && now < open.deadline(after_ns);
            self.close(open, effects);
        }
        self.pin();
    }

    fn close(&mut self, mut open: Open, effects: &mut Vec<Effect>) {
        self.refine_one(&mut open);
        self.settle_one(&mut open, true, effects);
        let incident = builder::oom_incident(&open, &self.scene());
        if self.settings.kernel_log && self.log.lost_near(open.at_ns) == 0 {
            for v in builder::missing_in_log(&open, &self.log) {
                effects.push(Effect::Alert(Finding::Disagreement { pid: v.victim.pid, only_in: "hook".to_owned() }));
            }
        }
        if let Some(recording) = &mut self.recording {
            recording.keep_oom(&incident);
        }
        effects.push(Effect::Save(Box::new(incident)));
    }

    /// Hands new points to the curves that grow.
    pub(super) fn deliver_points(&mut self) {
        for (id, point) in std::mem::take(&mut self.book.fresh) {
            for open in self.open.iter_mut().filter(|o| o.view.curve_of == Some(id)) {
                open.view.curve.insert(point);
            }
            for stuck in self.stuck.iter_mut().filter(|s| s.cgroup == id) {
                stuck.view.curve.insert(point);
            }
            if let Some(recording) = self.recording.as_mut() {
                recording.point(&self.book, id, point);
            }
        }
    }

    /// Cgroups that must not be forgotten.
    pub(super) fn pin(&mut self) {
        let of_open = self.open.iter().flat_map(|o| {
            let victims = o.victims.iter().map(|v| v.victim.cgroup_id);
            victims.chain([o.view.curve_of, o.oom.cgroup_id, o.trigger_memcg.cgroup_id])
        });
        let stuck = self.stuck.iter().map(|s| Some(s.cgroup));
        let recorded = self.recording.as_ref().and_then(|r| r.cgroup());
        let ids: Vec<u64> = of_open.chain(stuck).chain([recorded]).flatten().collect();
        self.book.cgroups.pinned = ids.into_iter().flat_map(|id| self.book.cgroups.chain(id)).collect();
    }
}
