//! An open OOM incident, from its first mark to the end of its window. Further marks of the same
//! decision join it. What ran out of memory is decided again whenever a better witness arrives,
//! such as a line of the kernel log.

use std::collections::{BTreeMap, BTreeSet};

use memtrace_common::event as wire;
use memtrace_incident::{KernelLogKill, Process, TaskRow};

use super::kernel_log::KernelLog;
use super::pairing::{Decision, OpenVictim, PAIR_NS, SHARER_NS, Thread};
use super::scope::{OomScope, counters, scope, view_of};
use crate::decode::Reading;
use crate::run::Run;
use crate::world::{Moments, ProcessKey, TASKS_CAP, VICTIMS_CAP, View, World, resident};

/// Incidents open at once. At the cap the oldest is closed early.
pub(crate) const OPEN_CAP: usize = 32;
/// A group kill that goes on extends its incident by at most this many windows.
const WINDOWS_CAP: u64 = 10;

/// An open OOM incident.
#[derive(Clone, Debug)]
pub(crate) struct OpenIncident {
    /// Set as soon as the time of the kill is certain, because the id is derived from it.
    pub(crate) id: Option<String>,
    pub(crate) at_ns: u64,
    pub(crate) trigger: Thread,
    pub(crate) trigger_process: Process,
    pub(crate) mark_scope: u32,
    pub(crate) mark_ns: u64,
    /// What ran out of memory, as far as known.
    pub(crate) oom_scope: OomScope,
    pub(crate) decision: Option<Decision>,
    pub(crate) victim_memcg: Reading,
    pub(crate) trigger_memcg: Reading,
    /// The cgroup that the mark found at its limit.
    pub(crate) marked_oom: Reading,
    /// Counters of the cgroup that ran out of memory.
    pub(crate) oom: Reading,
    pub(crate) group: bool,
    /// In the order of the marks. Cap: [`VICTIMS_CAP`].
    pub(crate) victims: Vec<OpenVictim>,
    pub(crate) victims_left_out: u64,
    /// State at the kill, before the victims exit.
    pub(crate) view: View,
    /// Function names of the trigger's kernel stack, innermost first.
    pub(crate) stack: Vec<String>,
    /// Loss totals at the begin of the window.
    pub(crate) loss_base: BTreeMap<String, u64>,
    /// Whether it was closed before its window was over.
    pub(crate) early: bool,
}

impl OpenIncident {
    pub(super) fn victim(&mut self, key: ProcessKey) -> Option<&mut OpenVictim> {
        self.victims.iter_mut().find(|v| v.key() == key)
    }

    pub(super) fn add(&mut self, victim: OpenVictim) {
        if self.victims.len() >= VICTIMS_CAP {
            self.victims_left_out += 1;
        } else {
            self.victims.push(victim);
        }
    }

    /// The time of the latest mark that a SIGKILL at `kill_ns` to another process followed closely.
    pub(super) fn mark_before(&self, kill_ns: u64) -> Option<u64> {
        let marks = self.victims.iter().filter_map(OpenVictim::marked_ns);
        marks.filter(|ns| *ns <= kill_ns && kill_ns - ns <= SHARER_NS).max()
    }

    /// Whether a further mark belongs to the same decision of the OOM killer.
    pub(super) fn joins(&self, m: &wire::OomVictim, victim: &OpenVictim, decision: Option<Decision>) -> bool {
        if self.trigger != Thread::from(&m.trigger) {
            return false;
        }
        if let (Some(a), Some(b)) = (self.decision, decision) {
            return a.boot_ns == b.boot_ns;
        }
        let last = self.victims.iter().filter_map(OpenVictim::marked_ns).max().unwrap_or(self.at_ns);
        let group = m.flags & wire::VICTIM_GROUP != 0 && self.group && !victim.marked_itself();
        group && last.abs_diff(m.header.boot_ns) <= PAIR_NS
    }

    pub(super) fn deadline(&self, after_ns: u64) -> u64 {
        let last = self.victims.iter().map(|v| v.victim.at_boot_ns).max().unwrap_or(self.at_ns).max(self.at_ns);
        last.min(self.at_ns.saturating_add(after_ns.saturating_mul(WINDOWS_CAP))).saturating_add(after_ns)
    }

    /// What the kernel log has about its victims. An entry with a constraint is preferred, because
    /// only one victim of a group kill has an `oom-kill:` line.
    pub(super) fn logged<'a>(&self, log: &'a KernelLog) -> Option<&'a KernelLogKill> {
        let mut entries = self.victims.iter().filter_map(|v| log.about(v.victim.pid, v.tid, v.victim.at_boot_ns));
        let first = entries.next()?;
        if first.constraint.is_some() {
            return Some(first);
        }
        entries.find(|l| l.constraint.is_some()).or(Some(first))
    }
}

impl OpenIncident {
    /// Decides again what ran out of memory, after a witness arrived, and returns whether that
    /// changed. The view is then of another subtree. Rows that were copied at the kill stay. What
    /// was not copied then is taken from curves and histories, and from the current state when
    /// there are none.
    pub(super) fn refine(&mut self, log: &KernelLog, world: &World, run: &Run) -> bool {
        let victim = self.victim_memcg.cgroup_id;
        let oom_scope = scope(
            self.mark_scope,
            victim,
            self.marked_oom.cgroup_id,
            self.decision.as_ref(),
            self.logged(log),
            &world.cgroups,
        );
        if oom_scope == self.oom_scope {
            return false;
        }
        self.oom_scope = oom_scope;
        self.oom = counters(oom_scope, self.marked_oom, &self.readings(), &world.cgroups);
        let when = Moments { from_ns: run.window_start(self.at_ns), at_ns: self.at_ns, mark_ns: self.mark_ns };
        let sums_of = |id: u64| world.cgroups.sums_at(id, when.at_ns.max(when.mark_ns));
        let of = view_of(oom_scope, victim, when, world);
        let view = View::new(world, of, when, u64::MAX, sums_of);
        let old = std::mem::replace(&mut self.view, view);
        let now = std::mem::replace(&mut self.view.tasks, old.tasks);
        if old.curve_of == self.view.curve_of {
            (self.view.curve_sums, self.view.curve) = (old.curve_sums, old.curve);
        }
        self.replace_tasks(world, of.tree, now);
        true
    }

    /// Readings at the kill that may be of the cgroup that ran out, besides that of the mark.
    fn readings(&self) -> [Reading; 3] {
        let decided = self.decision.map(|d| d.oom).unwrap_or_default();
        [decided, self.victim_memcg, self.trigger_memcg]
    }

    /// Makes the task table that of another subtree: rows copied at the kill, and current rows of
    /// processes that were not copied.
    fn replace_tasks(&mut self, world: &World, tree: Option<u64>, now: Vec<TaskRow>) {
        let inside = |t: &TaskRow| {
            let mut rows = world.processes.of_pid(t.pid);
            rows.any(|row| t.start_boot_ns.is_none_or(|start| start == row.start_boot_ns) && world.in_scope(row, tree))
        };
        self.view.tasks.retain(inside);
        let then: BTreeSet<(u32, Option<u64>)> = self.view.tasks.iter().map(|t| (t.pid, t.start_boot_ns)).collect();
        let at_ns = self.at_ns;
        let missing = now.into_iter().filter(|t| {
            let there = then.contains(&(t.pid, t.start_boot_ns)) || then.contains(&(t.pid, None));
            !there && t.start_boot_ns.is_none_or(|start| start <= at_ns)
        });
        self.view.tasks.extend(missing);
        self.view.tasks.sort_by_key(|t| (std::cmp::Reverse(resident(t)), t.pid, t.start_boot_ns));
        let excess = self.view.tasks.len().saturating_sub(TASKS_CAP) as u64;
        self.view.tasks.truncate(TASKS_CAP);
        self.view.tasks_left_out = self.view.tasks_left_out.saturating_add(excess);
    }
}
