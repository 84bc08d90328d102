//! Builds the incident file of an OOM kill from an open incident.

use memtrace_incident::{Cgroup, Incident, Kind, Loss, LossNote, Oom, Scope, TaskRow, Victim};

use super::kernel_log::KernelLog;
use super::open_incident::OpenIncident;
use super::pairing::OpenVictim;
use super::scope::tree;
use crate::build::verdict::About;
use crate::build::{BuildContext, Draft, cgroup};
use crate::decode::Reading;
use crate::world::{Point, resident};

/// The incident of an OOM kill.
pub(super) fn oom_incident(open: &OpenIncident, log: &KernelLog, context: &BuildContext<'_>) -> Incident {
    let oom = oom(open, log, context);
    let victim_id = open.victim_memcg.cgroup_id;
    let about_victim = match oom.scope {
        Scope::Cgroup => open.oom.or(&open.victim_memcg),
        _ => open.victim_memcg,
    };
    let cgroup = cgroup(victim_id, &about_victim, context);
    let out = match oom.scope {
        Scope::Cgroup | Scope::Ancestor => open.oom,
        _ => open.victim_memcg,
    };
    let out = if out.usage.is_none() && oom.scope != Scope::Ancestor { open.victim_memcg } else { out };
    // The curve gets a row at the kill. Its counters are those of the cgroup that the curve is of.
    let curve_is_of_oom_cgroup = open.view.curve_of.is_some() && open.view.curve_of == open.oom.cgroup_id;
    let row = if curve_is_of_oom_cgroup { open.oom } else { open.victim_memcg };
    let kill_row = Point::new(open.at_ns, &row, open.view.curve_sums);
    let (before, after): (Vec<&Point>, Vec<&Point>) = open.view.curve.rows().partition(|p| p.boot_ns <= open.at_ns);
    let name = match (&oom.oom_cgroup, oom.scope) {
        (Some(c), Scope::Ancestor) => c.path.clone(),
        _ => cgroup.path.clone(),
    };
    let root = tree(open.oom_scope, victim_id);
    let draft = Draft {
        kind: Kind::OomKill,
        id: open.id.clone().unwrap_or_default(),
        at_ns: open.at_ns,
        usage: out.usage,
        sums: open.view.sums,
        about: About::Oom { scope: oom.scope, killed: oom.victims.iter().any(|v| v.killed) },
        verdict_at_ns: open.at_ns,
        verdict_usage: out.usage,
        verdict_limit: out.limit.bytes(),
        verdict_path: name,
        tasks: &oom.tasks,
        growth: &open.view.growth,
        mappings: &open.view.notes,
        loss_base: &open.loss_base,
        losses: losses(open, log, context),
        // Up to the mark: growth between SIGKILL and mark is part of the kill.
        window: (context.run.window_start(open.at_ns), open.at_ns.max(open.mark_ns)),
        in_scope: &|cgroup, _| root.is_none_or(|root| context.world.cgroups.in_tree(cgroup, root)),
        cgroup,
    };
    let mut incident = draft.build(before.into_iter().chain([&kill_row]).chain(after), context);
    incident.oom = Some(oom);
    incident
}

/// Losses of this incident alone, in addition to those of its window.
fn losses(open: &OpenIncident, log: &KernelLog, context: &BuildContext<'_>) -> Vec<LossNote> {
    let lines_lost = log.lost_near(open.at_ns);
    let known = lines_lost == 0 && log.knows(open.at_ns);
    let silent = if known { missing_in_log(open, log).len() as u64 } else { 0 };
    let of_log = [(Loss::KernelLogLinesLost, lines_lost), (Loss::KernelLogSilent, silent)];
    let of_log = of_log.into_iter().filter(|_| context.run.settings.kernel_log);
    let counted = [(Loss::VictimsNotListed, open.victims_left_out), (Loss::TasksNotListed, open.view.tasks_left_out)];
    let counted = counted.into_iter().chain(of_log);
    let cut = open.early.then(|| LossNote::of(Loss::WindowCutShort, None));
    let unread = context.run.settings.kernel_log && log.was_unreadable(open.at_ns);
    let unread = unread.then(|| LossNote::of(Loss::KernelLogNotRead, None));
    counted.filter_map(|(loss, count)| LossNote::counted(loss, count)).chain(cut).chain(unread).collect()
}

/// The part of the file about the kill.
pub(super) fn oom(open: &OpenIncident, log: &KernelLog, context: &BuildContext<'_>) -> Oom {
    let log = open.logged(log);
    let (scope, out) = open.oom_scope;
    let oom_cgroup = match (scope, out) {
        (Scope::Cgroup | Scope::Ancestor, Some(id)) => Some(cgroup(Some(id), &reading_of(open, id), context)),
        (Scope::Ancestor, None) => {
            let path = log.and_then(|l| l.oom_memcg.clone());
            Some(Cgroup { path, ..cgroup(None, &Reading::default(), context) })
        }
        _ => None,
    };
    let victims: Vec<Victim> = open.victims.iter().map(|v| victim(v, context)).collect();
    let mut tasks = open.view.tasks.clone();
    for v in &open.victims {
        mark_victim(&mut tasks, v);
    }
    tasks.sort_by_key(|t| (std::cmp::Reverse(resident(t)), t.pid, t.start_boot_ns));
    Oom {
        scope,
        oom_cgroup,
        group_kill: open.group,
        trigger: open.trigger_process.clone(),
        trigger_cgroup: open.trigger_memcg.cgroup_id.map(|id| cgroup(Some(id), &open.trigger_memcg, context)),
        trigger_kernel_stack: open.stack.clone(),
        victims,
        tasks,
        kernel_log: log.cloned(),
    }
}

fn reading_of(open: &OpenIncident, id: u64) -> Reading {
    [open.oom, open.victim_memcg].into_iter().find(|r| r.cgroup_id == Some(id)).unwrap_or_default()
}

fn victim(v: &OpenVictim, context: &BuildContext<'_>) -> Victim {
    let mut victim = v.victim.clone();
    victim.cgroup_path = context.world.cgroups.path(victim.cgroup_id);
    let row = context.world.processes.get(v.key());
    victim.exit_boot_ns = victim.exit_boot_ns.or(row.and_then(|row| row.exited).map(|(ns, _)| ns));
    victim
}

/// Killed victims without a line in the kernel log. The kernel logs no line for processes that only
/// share a victim's address space.
fn missing_in_log<'a>(open: &'a OpenIncident, log: &KernelLog) -> Vec<&'a OpenVictim> {
    let has_line = |v: &OpenVictim| {
        log.about(v.victim.pid, v.tid, v.victim.at_boot_ns).is_some_and(|l| l.killed_line_ns.is_some())
    };
    open.victims.iter().filter(|v| v.victim.killed && !v.victim.shares_mm && !has_line(v)).collect()
}

/// Marks a victim in the task table. A victim that is missing there gets a row with the figures of
/// its mark.
pub(super) fn mark_victim(tasks: &mut Vec<TaskRow>, v: &OpenVictim) {
    let start = v.victim.start_boot_ns;
    let same = |t: &&mut TaskRow| t.pid == v.victim.pid && t.start_boot_ns.is_none_or(|s| s == start);
    if let Some(row) = tasks.iter_mut().find(same) {
        row.victim = true;
        row.start_boot_ns = Some(start);
        return;
    }
    let (Some(anon_bytes), true) = (v.victim.anon_bytes, v.mark.is_some()) else { return };
    let mut row = TaskRow {
        pid: v.victim.pid,
        start_boot_ns: Some(start),
        comm: v.victim.comm.clone(),
        anon_bytes,
        file_bytes: v.victim.file_bytes.unwrap_or(0),
        shmem_bytes: v.victim.shmem_bytes.unwrap_or(0),
        swap_bytes: v.victim.swap_bytes.unwrap_or(0),
        peak_bytes: 0,
        victim: true,
    };
    row.peak_bytes = resident(&row);
    tasks.push(row);
}
