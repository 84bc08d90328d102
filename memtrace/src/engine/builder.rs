//! From what was gathered to the incident as the file holds it.

use super::attribution::{Attribution, Window};
use super::book::Book;
use super::cases::Open;
use super::census::resident;
use super::clock::{Clock, Identity};
use super::decode::{Limit, Reading};
use super::detect::Spike;
use super::identity::identify;
use super::input::Settings;
use super::kernlog::KernelLog;
use super::kills::OpenVictim;
use super::losses::Losses;
use super::processes::Key;
use super::scope::{View, tree};
use super::timeline::{Point, Sums, columns};
use super::verdict::{About, Case, judge};
use memtrace_incident::{AllocationPath, Allocations};
use memtrace_incident::{
    Cgroup, Composition, Host, Incident, Kind, Loss, LossNote, Oom, Pressure, PressureLimit, SCHEMA, Scope, TaskRow,
    Timeline, Victim,
};

/// What every incident is built from.
pub(super) struct Scene<'a> {
    pub(super) settings: &'a Settings,
    pub(super) host: &'a Host,
    pub(super) clock: &'a Clock,
    pub(super) book: &'a Book,
    pub(super) losses: &'a Losses,
    pub(super) log: &'a KernelLog,
    pub(super) attribution: &'a Attribution,
}

/// The incident of an OOM kill.
pub(super) fn oom_incident(open: &Open, scene: &Scene<'_>) -> Incident {
    let oom = oom(open, scene);
    let victim_id = open.victim_memcg.cgroup_id;
    let about_victim = match oom.scope {
        Scope::Cgroup => open.oom.or(&open.victim_memcg),
        _ => open.victim_memcg,
    };
    let cgroup = cgroup(victim_id, &about_victim, scene);
    let out = match oom.scope {
        Scope::Cgroup | Scope::Ancestor => open.oom,
        _ => open.victim_memcg,
    };
    let out = if out.usage.is_none() && oom.scope != Scope::Ancestor { open.victim_memcg } else { out };
    // The row of the kill belongs to the cgroup the curve is of, so that it continues it.
    let ran_out = open.view.curve_of.is_some() && open.view.curve_of == open.oom.cgroup_id;
    let row = if ran_out { open.oom } else { open.victim_memcg };
    let kill_row = Point::new(open.at_ns, &row, open.view.curve_sums);
    let (before, after): (Vec<&Point>, Vec<&Point>) = open.view.curve.rows().partition(|p| p.boot_ns <= open.at_ns);
    let (columns, thinned) = columns(before.into_iter().chain([&kill_row]).chain(after));
    let timeline = Timeline { columns, thinned };
    let composition = composition(out.usage, &open.view.sums);
    let name = match (&oom.oom_cgroup, oom.scope) {
        (Some(c), Scope::Ancestor) => c.path.as_deref(),
        _ => cgroup.path.as_deref(),
    };
    let verdict = judge(&Case {
        about: About::Oom { scope: oom.scope, killed: oom.victims.iter().any(|v| v.killed) },
        path: name,
        at_ns: open.at_ns,
        usage: out.usage,
        limit: out.limit.bytes(),
        curve: &timeline.columns,
        tasks: &oom.tasks,
        growth: &open.view.growth,
        composition: &composition,
    });
    let mut losses = losses(&open.loss_base, timeline.thinned, scene);
    note(&mut losses, Loss::VictimsNotListed, open.victims_left_out);
    note(&mut losses, Loss::TasksNotListed, open.view.tasks_left_out);
    if scene.settings.kernel_log {
        let lost = scene.log.lost_near(open.at_ns);
        note(&mut losses, Loss::KernelLogLinesLost, lost);
        if lost == 0 {
            note(&mut losses, Loss::KernelLogSilent, missing_in_log(open, scene.log).len() as u64);
        }
    }
    if open.early {
        losses.push(LossNote::of(Loss::WindowCutShort, None));
    }
    losses.sort();
    let from_ns = open.at_ns.saturating_sub(scene.settings.before_ns);
    // Up to the mark: what grew in between is part of the kill.
    let window = (from_ns, open.at_ns.max(open.mark_ns));
    let root = tree(open.ran_out, victim_id);
    let (allocation_paths, allocations) = allocations(scene, window, &losses, |cgroup, _| {
        root.is_none_or(|root| scene.book.cgroups.in_tree(cgroup, root))
    });
    Incident {
        schema: SCHEMA,
        id: open.id.clone().unwrap_or_default(),
        kind: Kind::OomKill,
        at: scene.clock.at(open.at_ns),
        host: scene.host.clone(),
        cgroup,
        oom: Some(oom),
        pressure: None,
        recording: None,
        timeline,
        growth: open.view.growth.clone(),
        mappings: open.view.notes.clone(),
        allocation_paths,
        allocations,
        composition,
        verdict,
        losses,
    }
}

/// The kill itself.
pub(super) fn oom(open: &Open, scene: &Scene<'_>) -> Oom {
    let log = open.logged(scene.log);
    let (scope, out) = open.ran_out;
    let oom_cgroup = match (scope, out) {
        (Scope::Cgroup | Scope::Ancestor, Some(id)) => Some(cgroup(Some(id), &reading_of(open, id), scene)),
        (Scope::Ancestor, None) => {
            let path = log.and_then(|l| l.oom_memcg.clone());
            Some(Cgroup { path, ..cgroup(None, &Reading::default(), scene) })
        }
        _ => None,
    };
    let victims: Vec<Victim> = open.victims.iter().map(|v| victim(v, scene)).collect();
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
        trigger_cgroup: open.trigger_memcg.cgroup_id.map(|id| cgroup(Some(id), &open.trigger_memcg, scene)),
        trigger_kernel_stack: open.stack.clone(),
        victims,
        tasks,
        kernel_log: log.cloned(),
    }
}

fn reading_of(open: &Open, id: u64) -> Reading {
    [open.oom, open.victim_memcg].into_iter().find(|r| r.cgroup_id == Some(id)).unwrap_or_default()
}

fn victim(v: &OpenVictim, scene: &Scene<'_>) -> Victim {
    let mut victim = v.victim.clone();
    victim.cgroup_path = scene.book.cgroups.path(victim.cgroup_id);
    let row = scene.book.processes.get(v.key());
    victim.exit_boot_ns = victim.exit_boot_ns.or(row.and_then(|row| row.exited).map(|(ns, _)| ns));
    victim
}

/// Killed victims the kernel log should have told of and did not.
pub(super) fn missing_in_log<'a>(open: &'a Open, log: &KernelLog) -> Vec<&'a OpenVictim> {
    let told = |v: &OpenVictim| {
        log.about(v.victim.pid, v.tid, v.victim.at_boot_ns).is_some_and(|l| l.killed_line_ns.is_some())
    };
    open.victims.iter().filter(|v| v.victim.killed && !v.victim.shares_mm && !told(v)).collect()
}

/// Marks a victim in the task table; one that is missing there gets a row from what the mark says.
pub(super) fn mark_victim(tasks: &mut Vec<TaskRow>, v: &OpenVictim) {
    let start = v.victim.start_boot_ns;
    let same = |t: &&mut TaskRow| t.pid == v.victim.pid && t.start_boot_ns.is_none_or(|s| s == start);
    if let Some(row) = tasks.iter_mut().find(same) {
        row.victim = true;
        row.start_boot_ns = Some(start);
        return;
    }
    let (Some(anon_bytes), true) = (v.victim.anon_bytes, v.marked_ns.is_some()) else { return };
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

/// The incident of a spike: about the peak, built after the fall.
pub(super) fn spike_incident(spike: &Spike, scene: &Scene<'_>) -> Incident {
    let book = scene.book;
    let from_ns = spike.peak_ns.saturating_sub(scene.settings.before_ns);
    let row = book.cgroups.get(spike.cgroup);
    let points: Vec<&Point> = row.map(|r| r.timeline.rows(from_ns..=u64::MAX).collect()).unwrap_or_default();
    let sums = points.iter().rev().find(|p| p.boot_ns <= spike.peak_ns).map(|p| p.sums).unwrap_or_default();
    let (columns, thinned) = columns(points.into_iter());
    let timeline = Timeline { columns, thinned };
    let growth = book.growth(spike.peak_ns, |p| book.in_scope(p, Some(spike.cgroup)));
    let last = row.map(|r| r.last).unwrap_or_default();
    let reading = Reading { usage: Some(spike.peak), limit: Limit::Bytes(spike.limit), ..last };
    let cgroup = cgroup(Some(spike.cgroup), &reading, scene);
    let composition = composition(Some(spike.peak), &sums);
    let verdict = judge(&Case {
        about: About::Spike,
        path: cgroup.path.as_deref(),
        at_ns: spike.peak_ns,
        usage: Some(spike.peak),
        limit: Some(spike.limit),
        curve: &timeline.columns,
        tasks: &[],
        growth: &growth,
        composition: &composition,
    });
    let losses = losses(&scene.losses.at(from_ns), timeline.thinned, scene);
    let (allocation_paths, allocations) =
        allocations(scene, (from_ns, spike.peak_ns), &losses, |cgroup, _| book.cgroups.in_tree(cgroup, spike.cgroup));
    Incident {
        schema: SCHEMA,
        id: scene.clock.incident_id(&Identity {
            kind: "spike",
            boot_id: &scene.host.boot_id,
            boot_ns: spike.peak_ns,
            pid: 0,
            start_boot_ns: spike.cgroup,
        }),
        kind: Kind::Spike,
        at: scene.clock.at(spike.peak_ns),
        host: scene.host.clone(),
        mappings: book.notes(Some(spike.cgroup), from_ns, spike.peak_ns, 512),
        losses,
        cgroup,
        oom: None,
        pressure: None,
        recording: None,
        timeline,
        growth,
        allocation_paths,
        allocations,
        composition,
        verdict,
    }
}

/// A limit that was hit without a kill, as gathered.
pub(super) struct PressureCase<'a> {
    pub(super) kind: Kind,
    pub(super) id: String,
    /// The first hit, or when tasks began to wait.
    pub(super) at_ns: u64,
    /// The cgroup's counters then.
    pub(super) reading: Reading,
    pub(super) view: &'a View,
    pub(super) pressure: Pressure,
    pub(super) loss_base: &'a std::collections::BTreeMap<String, u64>,
    pub(super) early: bool,
}

/// The incident of a limit that was hit without a kill.
pub(super) fn pressure_incident(case: PressureCase<'_>, scene: &Scene<'_>) -> Incident {
    let PressureCase { kind, id, at_ns, reading, view, pressure, loss_base, early } = case;
    let (columns, thinned) = columns(view.curve.rows());
    let timeline = Timeline { columns, thinned };
    let cgroup = cgroup(reading.cgroup_id, &reading, scene);
    let composition = composition(reading.usage, &view.sums);
    let limit = match pressure.limit {
        PressureLimit::Max => cgroup.limit_bytes,
        PressureLimit::High => cgroup.high_bytes,
    };
    let verdict = judge(&Case {
        about: About::Pressure(&pressure),
        path: cgroup.path.as_deref(),
        at_ns,
        usage: reading.usage,
        limit,
        curve: &timeline.columns,
        tasks: &pressure.tasks,
        growth: &view.growth,
        composition: &composition,
    });
    let mut losses = losses(loss_base, timeline.thinned, scene);
    note(&mut losses, Loss::TasksNotListed, view.tasks_left_out);
    if early {
        losses.push(LossNote::of(Loss::WindowCutShort, None));
    }
    losses.sort();
    let window = (at_ns.saturating_sub(scene.settings.before_ns), pressure.until_boot_ns.max(at_ns));
    let (allocation_paths, allocations) = allocations(scene, window, &losses, |cgroup, _| {
        reading.cgroup_id.is_some_and(|root| scene.book.cgroups.in_tree(cgroup, root))
    });
    Incident {
        schema: SCHEMA,
        id,
        kind,
        at: scene.clock.at(at_ns),
        host: scene.host.clone(),
        cgroup,
        oom: None,
        pressure: Some(pressure),
        recording: None,
        timeline,
        growth: view.growth.clone(),
        mappings: view.notes.clone(),
        allocation_paths,
        allocations,
        composition,
        verdict,
        losses,
    }
}

/// Who grew memory in a window (first and last moment, boot clock), of those `in_scope` names by cgroup and process.
pub(super) fn allocations(
    scene: &Scene<'_>,
    (from_ns, until_ns): (u64, u64),
    losses: &[LossNote],
    in_scope: impl Fn(u64, Key) -> bool,
) -> (Vec<AllocationPath>, Option<Allocations>) {
    let thinned =
        losses.iter().find(|note| note.what == Loss::StacksOverBudget.label()).and_then(|note| note.count).unwrap_or(0);
    let window = Window { from_ns, until_ns, sample_bytes: scene.settings.sample_bytes, thinned };
    scene.attribution.report(&window, in_scope)
}

/// A cgroup as the file shows it. What the reading lacks is taken from the last one known.
pub(super) fn cgroup(id: Option<u64>, reading: &Reading, scene: &Scene<'_>) -> Cgroup {
    let last = id.and_then(|id| scene.book.cgroups.get(id)).map(|row| row.last).unwrap_or_default();
    let r = reading.or(&Reading { usage: None, swap_usage: None, ..last });
    let path = scene.book.cgroups.path(id);
    let (container, kubernetes) = path.as_deref().map(identify).unwrap_or_default();
    Cgroup {
        id: id.unwrap_or(0),
        path,
        version: scene.settings.cgroup_version,
        limit_bytes: r.limit.bytes(),
        usage_bytes: r.usage,
        peak_bytes: r.watermark,
        high_bytes: r.high.bytes(),
        swap_usage_bytes: r.swap_usage,
        swap_limit_bytes: r.swap_limit.bytes(),
        failcnt: r.failcnt,
        container,
        kubernetes,
    }
}

pub(super) fn composition(usage: Option<u64>, sums: &Sums) -> Composition {
    let held = sums.anon.saturating_add(sums.shmem);
    Composition {
        anon_bytes: Some(sums.anon),
        file_bytes: Some(sums.file),
        shmem_bytes: Some(sums.shmem),
        swap_bytes: Some(sums.swap),
        unattributed_bytes: usage.map(|u| i64::try_from(u.saturating_sub(held)).unwrap_or(i64::MAX)),
    }
}

/// What was lost since `base`, what is not attached, and what the curve left out.
pub(super) fn losses(base: &std::collections::BTreeMap<String, u64>, thinned: u64, scene: &Scene<'_>) -> Vec<LossNote> {
    let mut losses = scene.losses.since(base);
    losses.extend(scene.settings.degraded.iter().map(|what| LossNote { what: what.clone(), count: None }));
    note(&mut losses, Loss::TimelineThinned, thinned);
    losses.sort();
    losses
}

pub(super) fn note(losses: &mut Vec<LossNote>, loss: Loss, count: u64) {
    if count > 0 {
        losses.push(LossNote::of(loss, Some(count)));
    }
}
