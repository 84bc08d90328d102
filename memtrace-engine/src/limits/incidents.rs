//! Spikes, near misses and stuck cgroups as incidents.

use std::collections::BTreeMap;

use memtrace_incident::{Incident, Kind, Loss, LossNote, Pressure, PressureLimit};

use super::detectors::{NearMiss, Spike};
use crate::build::verdict::About;
use crate::build::{Draft, Scene, cgroup};
use crate::clock::Identity;
use crate::decode::{Limit, Reading};
use crate::output::{Finding, Out, Output};
use crate::world::{Moments, Point, VIEW_NOTES_CAP, View, ViewOf};

/// Reports a spike. It is about the peak and is built after the fall.
pub(super) fn report_spike(spike: &Spike, scene: &Scene<'_>, out: &mut Out) {
    let incident = spike_incident(spike, scene);
    out.outputs.push(Output::Alert(Finding::Spike {
        incident: incident.id.clone(),
        cgroup_path: incident.cgroup.path.clone(),
        peak_bytes: spike.peak,
        limit_bytes: spike.limit,
    }));
    out.outputs.push(Output::Save(Box::new(incident)));
}

fn spike_incident(spike: &Spike, scene: &Scene<'_>) -> Incident {
    let world = scene.world;
    let from_ns = scene.run.window_start(spike.peak_ns);
    let points: Vec<&Point> = world.cgroups.rows(spike.cgroup, from_ns..=u64::MAX).collect();
    let sums = points.iter().rev().find(|p| p.boot_ns <= spike.peak_ns).map(|p| p.sums).unwrap_or_default();
    let growth = world.growth(spike.peak_ns, |p| world.in_scope(p, Some(spike.cgroup)));
    let last = world.cgroups.get(spike.cgroup).map(|row| row.last).unwrap_or_default();
    let reading = Reading { usage: Some(spike.peak), limit: Limit::Bytes(spike.limit), ..last };
    let cgroup = cgroup(Some(spike.cgroup), &reading, scene);
    let draft = Draft {
        kind: Kind::Spike,
        id: incident_id(Kind::Spike, spike.peak_ns, spike.cgroup, scene),
        at_ns: spike.peak_ns,
        usage: Some(spike.peak),
        sums,
        about: About::Spike,
        verdict_at_ns: spike.peak_ns,
        verdict_usage: Some(spike.peak),
        verdict_limit: Some(spike.limit),
        verdict_path: cgroup.path.clone(),
        tasks: &[],
        growth: &growth,
        mappings: &world.notes(Some(spike.cgroup), from_ns, spike.peak_ns, VIEW_NOTES_CAP),
        loss_base: &scene.run.losses.at(from_ns),
        losses: Vec::new(),
        window: (from_ns, spike.peak_ns),
        in_scope: &|cgroup, _| world.cgroups.in_tree(cgroup, spike.cgroup),
        cgroup,
    };
    draft.build(points.into_iter(), scene)
}

/// Reports a near miss.
pub(super) fn report_near_miss(found: &NearMiss, scene: &Scene<'_>, out: &mut Out) {
    let NearMiss { cgroup: cgroup_id, from_ns, until_ns, limit, hits, stalled_ns, usage } = *found;
    let stalled_ns = scene.run.settings.stalls_seen.then_some(stalled_ns);
    let (view, reading) = around(cgroup_id, from_ns, scene);
    let row = scene.world.cgroups.get(cgroup_id);
    let event = PressureEvent {
        kind: Kind::NearMiss,
        id: incident_id(Kind::NearMiss, from_ns, cgroup_id, scene),
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
        loss_base: &scene.run.losses.at(scene.run.window_start(from_ns)),
        early: false,
    };
    let incident = pressure_incident(event, scene);
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

/// A limit that was hit without a kill, as gathered.
pub(super) struct PressureEvent<'a> {
    pub(super) kind: Kind,
    pub(super) id: String,
    /// The first hit, or when tasks began to wait.
    pub(super) at_ns: u64,
    /// The cgroup's counters then.
    pub(super) reading: Reading,
    pub(super) view: &'a View,
    pub(super) pressure: Pressure,
    pub(super) loss_base: &'a BTreeMap<String, u64>,
    /// The window was cut short.
    pub(super) early: bool,
}

/// The incident of a limit that was hit without a kill.
pub(super) fn pressure_incident(event: PressureEvent<'_>, scene: &Scene<'_>) -> Incident {
    let PressureEvent { kind, id, at_ns, reading, view, pressure, loss_base, early } = event;
    let cgroup = cgroup(reading.cgroup_id, &reading, scene);
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
        window: (scene.run.window_start(at_ns), pressure.until_boot_ns.max(at_ns)),
        in_scope: &|cgroup, _| reading.cgroup_id.is_some_and(|root| scene.world.cgroups.in_tree(cgroup, root)),
        cgroup,
    };
    let mut incident = draft.build(view.curve.rows(), scene);
    incident.pressure = Some(pressure);
    incident
}

/// What a cgroup looks like around a moment, its curve to the end, and its counters as last read.
pub(super) fn around(id: u64, at_ns: u64, scene: &Scene<'_>) -> (View, Reading) {
    let of = ViewOf { tree: Some(id), composition: Some(id), curve: Some(id) };
    let when = Moments { from_ns: scene.run.window_start(at_ns), at_ns, mark_ns: at_ns };
    let sums = scene.world.cgroups.sums_at(id, at_ns);
    let view = View::new(scene.world, of, when, u64::MAX, |_| sums);
    let last = scene.world.cgroups.get(id).map(|row| row.last).unwrap_or_default();
    (view, Reading { cgroup_id: Some(id), ..last })
}

/// The id of an incident of a cgroup at a moment.
pub(super) fn incident_id(kind: Kind, boot_ns: u64, cgroup_id: u64, scene: &Scene<'_>) -> String {
    let boot_id = &scene.run.host.boot_id;
    let identity = Identity { kind: kind.name(), boot_id, boot_ns, pid: 0, start_boot_ns: cgroup_id };
    scene.run.clock.incident_id(&identity)
}
