//! An OOM incident that still gathers: from the first mark, through what joins it, to the end of its
//! window. What ran out is decided anew whenever a better witness comes.

use std::collections::{BTreeMap, BTreeSet};

use memtrace_common::event as wire;
use memtrace_incident::{KernelLogKill, Process, TaskRow};

use super::kernel_log::KernelLog;
use super::pairing::{Decision, OpenVictim, PAIR_NS, SHARER_NS, Thread};
use super::scope::{RanOut, counters, scope, view_of};
use crate::decode::Reading;
use crate::run::Run;
use crate::world::{Moments, ProcessKey, TASKS_CAP, VICTIMS_CAP, View, World, resident};

/// Incidents open at once; the oldest is closed early for one more.
pub(crate) const OPEN_CAP: usize = 32;
/// A group kill that goes on keeps its incident open at most this many windows.
const WINDOWS_CAP: u64 = 10;

/// An incident that still gathers.
#[derive(Clone, Debug)]
pub(crate) struct OpenIncident {
    /// Known as soon as the moment of the kill is.
    pub(crate) id: Option<String>,
    pub(crate) at_ns: u64,
    pub(crate) trigger: Thread,
    pub(crate) trigger_process: Process,
    pub(crate) mark_scope: u32,
    pub(crate) mark_ns: u64,
    /// As far as is known by now.
    pub(crate) ran_out: RanOut,
    pub(crate) decision: Option<Decision>,
    pub(crate) victim_memcg: Reading,
    pub(crate) trigger_memcg: Reading,
    /// The cgroup the mark found near its limit.
    pub(crate) marked_oom: Reading,
    /// The counters of what ran out.
    pub(crate) oom: Reading,
    pub(crate) group: bool,
    pub(crate) victims: Vec<OpenVictim>,
    pub(crate) victims_left_out: u64,
    /// As of the kill, before the victims die.
    pub(crate) view: View,
    pub(crate) stack: Vec<String>,
    pub(crate) loss_base: BTreeMap<String, u64>,
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

    /// The mark that a SIGKILL to somebody else followed, if any did.
    pub(super) fn shared_at(&self, kill_ns: u64) -> Option<u64> {
        let marks = self.victims.iter().filter_map(|v| v.marked_ns);
        marks.filter(|ns| *ns <= kill_ns && kill_ns - ns <= SHARER_NS).max()
    }

    /// A further mark is part of the same decision.
    pub(super) fn joins(&self, m: &wire::OomVictim, decision: Option<Decision>) -> bool {
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

    pub(super) fn deadline(&self, after_ns: u64) -> u64 {
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

impl OpenIncident {
    /// A witness has spoken: what ran out is decided anew. What was seen at the kill stays as it was seen then; who was
    /// not looked at then is taken from the histories, and where there is none, as of now. Whether that changed it.
    pub(super) fn refine(&mut self, log: &KernelLog, world: &World, run: &Run) -> bool {
        let victim = self.victim_memcg.cgroup_id;
        let ran_out = scope(
            self.mark_scope,
            victim,
            self.marked_oom.cgroup_id,
            self.decision.as_ref(),
            self.logged(log),
            &world.cgroups,
        );
        if ran_out == self.ran_out {
            return false;
        }
        self.ran_out = ran_out;
        self.oom = counters(ran_out, self.marked_oom, &self.readings(), &world.cgroups);
        let when = Moments { from_ns: run.window_start(self.at_ns), at_ns: self.at_ns, mark_ns: self.mark_ns };
        let sums_of = |id: u64| world.cgroups.sums_at(id, when.at_ns.max(when.mark_ns));
        let of = view_of(ran_out, victim, when, world);
        let view = View::new(world, of, when, u64::MAX, sums_of);
        let old = std::mem::replace(&mut self.view, view);
        let now = std::mem::replace(&mut self.view.tasks, old.tasks);
        if old.curve_of == self.view.curve_of {
            (self.view.curve_sums, self.view.curve) = (old.curve_sums, old.curve);
        }
        self.retask(world, of.tree, now);
        true
    }

    /// Readings at the kill besides the mark's of what ran out.
    fn readings(&self) -> [Reading; 3] {
        let decided = self.decision.map(|d| d.oom).unwrap_or_default();
        [decided, self.victim_memcg, self.trigger_memcg]
    }

    /// The task table of another tree: rows as of the kill where there are, else those of now.
    fn retask(&mut self, world: &World, tree: Option<u64>, now: Vec<TaskRow>) {
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
