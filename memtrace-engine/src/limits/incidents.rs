//! Builds the incidents of spikes, near misses and stuck cgroups.

use std::collections::BTreeMap;

use memtrace_incident::{Incident, Kind, Loss, LossNote, Pressure, PressureLimit};

use super::detectors::{NearMiss, Spike};
use crate::build::verdict::About;
use crate::build::{BuildContext, Draft, cgroup};
use crate::clock::Identity;
use crate::decode::{Limit, Reading};
use crate::output::{Finding, Out, Output};
use crate::world::{Moments, Point, VIEW_NOTES_CAP, View, ViewOf};

/// Reports a spike. Its event is the peak, although it is built after the fall.
pub(super) fn report_spike(spike: &Spike, context: &BuildContext<'_>, out: &mut Out) {
    let incident = spike_incident(spike, context);
    out.outputs.push(Output::Alert(Finding::Spike {
        incident: incident.id.clone(),
        cgroup_path: incident.cgroup.path.clone(),
        peak_bytes: spike.peak_bytes,
        limit_bytes: spike.limit_bytes,
    }));
    out.outputs.push(Output::Save(Box::new(incident)));
}

fn spike_incident(spike: &Spike, context: &BuildContext<'_>) -> Incident {
    let world = context.world;
    let from_ns = context.run.window_start(spike.peak_ns);
    let points: Vec<&Point> = world.cgroups.rows(spike.cgroup, from_ns..=u64::MAX).collect();
    let sums = points.iter().rev().find(|p| p.boot_ns <= spike.peak_ns).map(|p| p.sums).unwrap_or_default();
    let growth = world.growth(spike.peak_ns, |p| world.in_scope(p, Some(spike.cgroup)));
    let last = world.cgroups.get(spike.cgroup).map(|row| row.last).unwrap_or_default();
    let reading = Reading { usage: Some(spike.peak_bytes), limit: Limit::Bytes(spike.limit_bytes), ..last };
    let cgroup = cgroup(Some(spike.cgroup), &reading, context);
    let draft = Draft {
        kind: Kind::Spike,
        id: incident_id(Kind::Spike, spike.peak_ns, spike.cgroup, context),
        at_ns: spike.peak_ns,
        usage: Some(spike.peak_bytes),
        sums,
        about: About::Spike,
        verdict_at_ns: spike.peak_ns,
        verdict_usage: Some(spike.peak_bytes),
        verdict_limit: Some(spike.limit_bytes),
        verdict_path: cgroup.path.clone(),
        tasks: &[],
        growth: &growth,
        mappings: &world.notes(Some(spike.cgroup), from_ns, spike.peak_ns, VIEW_NOTES_CAP),
        loss_base: &context.run.losses.at(from_ns),
        losses: Vec::new(),
        window: (from_ns, spike.peak_ns),
        in_scope: &|cgroup, _| world.cgroups.in_tree(cgroup, spike.cgroup),
        cgroup,
    };
    draft.build(points.into_iter(), context)
}

/// Reports a near miss.
pub(super) fn report_near_miss(found: &NearMiss, context: &BuildContext<'_>, out: &mut Out) {
    let NearMiss { cgroup: cgroup_id, from_ns, until_ns, limit, hits, stalled_ns, usage } = *found;
    let stalled_ns = context.run.settings.stalls_seen.then_some(stalled_ns);
    let (view, reading) = around(cgroup_id, from_ns, context);
    let row = context.world.cgroups.get(cgroup_id);
    let event = PressureEvent {
        kind: Kind::NearMiss,
        id: incident_id(Kind::NearMiss, from_ns, cgroup_id, context),
        at_ns: from_ns,
        reading: Reading { usage, ..reading },
        view: &view,
        pressure: Pressure {
            from_boot_ns: from_ns,
            until_boot_ns: until_ns,
            limit,
            hits,
            stalled_ns,
            oom_kill_disabled: row.and_then(|row| row.kill_disabled),
            under_oom_ns: None,
            tasks: view.tasks.clone(),
        },
        loss_base: &context.run.losses.at(context.run.window_start(from_ns)),
        early: false,
    };
    let incident = pressure_incident(event, context);
    out.outputs.push(Output::Alert(Finding::NearMiss {
        incident: incident.id.clone(),
        cgroup_path: incident.cgroup.path.clone(),
        cgroup_id,
        limit,
        hits,
        stalled_ns,
    }));
    out.outputs.push(Output::Save(Box::new(incident)));
}

/// What the incident of a limit that was hit without a kill is built from.
pub(super) struct PressureEvent<'a> {
    pub(super) kind: Kind,
    pub(super) id: String,
    /// The first hit of a near miss, or when tasks of a stuck cgroup began to wait.
    pub(super) at_ns: u64,
    /// Counters of the cgroup at the event.
    pub(super) reading: Reading,
    pub(super) view: &'a View,
    pub(super) pressure: Pressure,
    pub(super) loss_base: &'a BTreeMap<String, u64>,
    /// Whether it was closed before its window was over.
    pub(super) early: bool,
}

/// Builds the incident of a limit that was hit without a kill.
pub(super) fn pressure_incident(event: PressureEvent<'_>, context: &BuildContext<'_>) -> Incident {
    let PressureEvent { kind, id, at_ns, reading, view, pressure, loss_base, early } = event;
    let cgroup = cgroup(reading.cgroup_id, &reading, context);
    let limit = match pressure.limit {
        PressureLimit::Max => cgroup.limit_bytes,
        PressureLimit::High => cgroup.high_bytes,
    };
    let left_out = LossNote::counted(Loss::TasksNotListed, view.tasks_left_out);
    let cut = early.then(|| LossNote::of(Loss::WindowCutShort, None));
    let draft = Draft {
        kind,
        id,
        at_ns,
        usage: reading.usage,
        sums: view.sums,
        about: About::Pressure(&pressure),
        verdict_at_ns: at_ns,
        verdict_usage: reading.usage,
        verdict_limit: limit,
        verdict_path: cgroup.path.clone(),
        tasks: &pressure.tasks,
        growth: &view.growth,
        mappings: &view.notes,
        loss_base,
        losses: left_out.into_iter().chain(cut).collect(),
        window: (context.run.window_start(at_ns), pressure.until_boot_ns.max(at_ns)),
        in_scope: &|cgroup, _| reading.cgroup_id.is_some_and(|root| context.world.cgroups.in_tree(cgroup, root)),
        cgroup,
    };
    let mut incident = draft.build(view.curve.rows(), context);
    incident.pressure = Some(pressure);
    incident
}

/// The view of a cgroup around an event, with its curve up to now, and its latest counters.
pub(super) fn around(id: u64, at_ns: u64, context: &BuildContext<'_>) -> (View, Reading) {
    let of = ViewOf { tree: Some(id), composition: Some(id), curve: Some(id) };
    let when = Moments { from_ns: context.run.window_start(at_ns), at_ns, mark_ns: at_ns };
    let sums = context.world.cgroups.sums_at(id, at_ns);
    let view = View::new(context.world, of, when, u64::MAX, |_| sums);
    let last = context.world.cgroups.get(id).map(|row| row.last).unwrap_or_default();
    (view, Reading { cgroup_id: Some(id), ..last })
}

/// The id of an incident that is about a cgroup and not about a process.
pub(super) fn incident_id(kind: Kind, boot_ns: u64, cgroup_id: u64, context: &BuildContext<'_>) -> String {
    let boot_id = &context.run.host.boot_id;
    let identity = Identity { kind: kind.name(), boot_id, boot_ns, pid: 0, start_boot_ns: cgroup_id };
    context.run.clock.incident_id(&identity)
}
