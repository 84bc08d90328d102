//! What ran out, and what an incident shows because of it. Told anew when a better witness comes while it gathers.

use memtrace_common::event as wire;

use super::Engine;
use super::book::Book;
use super::cases::Open;
use super::census::{TASKS_CAP, resident};
use super::cgroups::Cgroups;
use super::decode::Reading;
use super::kills::Decision;
use super::timeline::{Curve, Point, Sums};
use memtrace_incident::{Growth, KernelLogKill, MappingNote, Scope, TaskRow};

/// Mapping notes of one incident.
const NOTES_CAP: usize = 512;

/// What ran out, with the id of the cgroup, for a cgroup.
pub(super) type RanOut = (Scope, Option<u64>);

/// What ran out, from everything that speaks about it: the kernel's own decision first, then the kernel log, then
/// what the mark made of the page counters.
pub(super) fn scope(
    mark_scope: u32,
    victim: Option<u64>,
    oom: Option<u64>,
    decision: Option<&Decision>,
    log: Option<&KernelLogKill>,
    cgroups: &Cgroups,
) -> RanOut {
    let memcg = |id: u64| if Some(id) == victim { (Scope::Cgroup, Some(id)) } else { (Scope::Ancestor, Some(id)) };
    match decision.map(|d| (d.constraint, d.oom.cgroup_id)) {
        Some((1, _)) => return (Scope::Cpuset, None),
        Some((3, Some(id))) => return memcg(id),
        Some((0 | 2, _)) => return (Scope::Global, None),
        _ => {}
    }
    let from_mark = oom.filter(|_| mark_scope == wire::SCOPE_MEMCG).map(memcg);
    let from_log = log.and_then(|l| match l.constraint.as_deref()? {
        "CONSTRAINT_CPUSET" => Some((Scope::Cpuset, None)),
        "CONSTRAINT_NONE" | "CONSTRAINT_MEMORY_POLICY" => Some((Scope::Global, None)),
        "CONSTRAINT_MEMCG" => {
            let path = l.oom_memcg.as_deref()?;
            if l.task_memcg.as_deref() == Some(path) || cgroups.path(victim).as_deref() == Some(path) {
                return Some((Scope::Cgroup, victim));
            }
            // A path may be used again; the victim is below the cgroup that is meant.
            let above = victim.map(|id| cgroups.chain(id)).unwrap_or_default();
            let above = above.into_iter().find(|id| cgroups.path(Some(*id)).as_deref() == Some(path));
            let id = above.or_else(|| cgroups.id_of_path(path));
            id.map(memcg).or(from_mark).or(Some((Scope::Ancestor, None)))
        }
        _ => None,
    });
    let unsaid = if mark_scope == wire::SCOPE_GLOBAL { Scope::Global } else { Scope::Unknown };
    from_log.or(from_mark).unwrap_or((unsaid, None))
}

/// Whose tree an incident is about. Where there is no id the tree is that of no cgroup at all, never the machine.
pub(super) fn tree(ran_out: RanOut, victim: Option<u64>) -> Option<u64> {
    match ran_out {
        (Scope::Global | Scope::Cpuset, _) => None,
        (Scope::Cgroup | Scope::Ancestor, out) => Some(out.unwrap_or(0)),
        (Scope::Unknown, _) => Some(victim.unwrap_or(0)),
    }
}

/// The counters of what ran out, from those read at the kill; none are made up.
pub(super) fn counters(ran_out: RanOut, marked: Reading, read: &[Reading], cgroups: &Cgroups) -> Reading {
    match ran_out {
        (Scope::Unknown, _) => marked,
        (_, None) => Reading::default(),
        (_, Some(id)) => {
            let of_it =
                [marked].iter().chain(read).filter(|r| r.cgroup_id == Some(id)).copied().reduce(|a, b| a.or(&b));
            let last = cgroups.get(id).map(|row| row.last).unwrap_or_default();
            of_it.unwrap_or(Reading { cgroup_id: Some(id), usage: None, swap_usage: None, ..last })
        }
    }
}

/// The moments of a kill.
#[derive(Clone, Copy)]
pub(super) struct Moments {
    pub(super) from_ns: u64,
    pub(super) at_ns: u64,
    pub(super) mark_ns: u64,
}

/// Who held memory, who had grown and what was mapped where it ran out.
#[derive(Clone, Debug)]
pub(super) struct View {
    pub(super) tasks: Vec<TaskRow>,
    pub(super) tasks_left_out: u64,
    pub(super) growth: Vec<Growth>,
    pub(super) notes: Vec<MappingNote>,
    /// Resident memory of the cgroup the composition is about.
    pub(super) sums: Sums,
    pub(super) curve_of: Option<u64>,
    pub(super) curve_sums: Sums,
    pub(super) curve: Curve,
}

impl View {
    /// The curve ends at `until_ns`; `sums_of` is what a cgroup's tree held at the kill.
    pub(super) fn of(
        book: &Book,
        ran_out: RanOut,
        victim: Option<u64>,
        when: Moments,
        until_ns: u64,
        sums_of: impl Fn(u64) -> Sums,
    ) -> Self {
        let tree = tree(ran_out, victim);
        let (scope, out) = ran_out;
        let (tasks, tasks_left_out) = book.tasks(tree);
        // Up to the mark, which has the victim's exact reading, a moment after its SIGKILL.
        let growth = book.growth(when.at_ns.max(when.mark_ns), |row| book.in_scope(row, tree));
        let rows = |id: u64, to_ns: u64| {
            let row = book.cgroups.get(id);
            row.into_iter().flat_map(move |row| row.timeline.rows(when.from_ns..=to_ns))
        };
        let ancestor = out.filter(|id| scope == Scope::Ancestor && rows(*id, when.at_ns).any(|p| p.usage().is_some()));
        let curve_of = ancestor.or(victim);
        let mut curve = Curve::default();
        curve_of.into_iter().flat_map(|id| rows(id, until_ns)).for_each(|p: &Point| curve.insert(*p));
        Self {
            tasks,
            tasks_left_out,
            growth,
            notes: book.notes(tree, when.from_ns, when.at_ns, NOTES_CAP),
            sums: out.or(victim).map(&sums_of).unwrap_or_default(),
            curve_of,
            curve_sums: curve_of.map(&sums_of).unwrap_or_default(),
            curve,
        }
    }
}

impl Engine {
    /// A witness has spoken: what open incidents say ran out is decided anew.
    pub(super) fn refine(&mut self) {
        if self.open.is_empty() {
            return;
        }
        self.deliver_points();
        let mut open = std::mem::take(&mut self.open);
        open.iter_mut().for_each(|o| self.refine_one(o));
        self.open = open;
        self.pin();
    }

    /// As [`Engine::refine`], for one. What was seen at the kill stays as it was seen then; who was not looked at then
    /// is taken from the histories, and where there is none, as of now.
    pub(super) fn refine_one(&self, open: &mut Open) {
        let book = &self.book;
        let victim = open.victim_memcg.cgroup_id;
        let log = open.logged(&self.log);
        let ran_out =
            scope(open.mark_scope, victim, open.marked_oom.cgroup_id, open.decision.as_ref(), log, &book.cgroups);
        if ran_out == open.ran_out {
            return;
        }
        open.ran_out = ran_out;
        open.oom = counters(ran_out, open.marked_oom, &open.read(), &book.cgroups);
        let when = Moments {
            from_ns: open.at_ns.saturating_sub(self.settings.before_ns),
            at_ns: open.at_ns,
            mark_ns: open.mark_ns,
        };
        let sums_of = |id: u64| {
            let row = book.cgroups.get(id);
            let then = row.and_then(|r| r.timeline.rows(0..=when.at_ns.max(when.mark_ns)).last()).map(|p| p.sums);
            then.or(row.map(|r| r.tree)).unwrap_or_default()
        };
        let View { tasks, tasks_left_out, growth, notes, sums, curve_of, curve_sums, curve } =
            View::of(book, ran_out, victim, when, u64::MAX, sums_of);
        open.retask(book, tree(ran_out, victim), tasks, tasks_left_out);
        (open.view.growth, open.view.notes, open.view.sums) = (growth, notes, sums);
        if curve_of != open.view.curve_of {
            (open.view.curve_of, open.view.curve_sums, open.view.curve) = (curve_of, curve_sums, curve);
        }
    }
}

impl Open {
    /// Readings at the kill besides the mark's of what ran out.
    fn read(&self) -> [Reading; 3] {
        let decided = self.decision.map(|d| d.oom).unwrap_or_default();
        [decided, self.victim_memcg, self.trigger_memcg]
    }

    /// The task table of another tree: rows as of the kill where there are, else those of now.
    fn retask(&mut self, book: &Book, tree: Option<u64>, now: Vec<TaskRow>, left_out: u64) {
        let inside = |t: &TaskRow| {
            let mut rows = book.processes.of_pid(t.pid);
            rows.any(|row| t.start_boot_ns.is_none_or(|start| start == row.start_boot_ns) && book.in_scope(row, tree))
        };
        self.view.tasks.retain(inside);
        let then: std::collections::BTreeSet<(u32, Option<u64>)> =
            self.view.tasks.iter().map(|t| (t.pid, t.start_boot_ns)).collect();
        let at_ns = self.at_ns;
        let missing = now.into_iter().filter(|t| {
            let there = then.contains(&(t.pid, t.start_boot_ns)) || then.contains(&(t.pid, None));
            !there && t.start_boot_ns.is_none_or(|start| start <= at_ns)
        });
        self.view.tasks.extend(missing);
        self.view.tasks.sort_by_key(|t| (std::cmp::Reverse(resident(t)), t.pid, t.start_boot_ns));
        let excess = self.view.tasks.len().saturating_sub(TASKS_CAP) as u64;
        self.view.tasks.truncate(TASKS_CAP);
        self.view.tasks_left_out = left_out.saturating_add(excess);
    }
}
