//! Builds incident files. Each kind of incident fills in a [`Draft`] with what differs, and
//! [`Draft::build`] does the rest, so all kinds have losses, verdict, curve and allocations alike.

use std::collections::BTreeMap;

use memtrace_common::event as wire;
use memtrace_incident::{
    Cgroup, Composition, Growth, Incident, Kind, Loss, LossNote, MappingNote, SCHEMA, TaskRow, Timeline, caps,
};

use crate::decode::Reading;
use crate::growth::{Attribution, FILE_PATHS, FILE_SAMPLES, FRAMES_CAP, Window};
use crate::losses::NAMES_CAP;
use crate::run::Run;
use crate::world::{
    CURVE_CAP, GROWTH_CAP, Point, ProcessKey, Sums, TASKS_CAP, TIMELINE_CAP, VICTIMS_CAP, VIEW_NOTES_CAP, World,
    columns,
};

mod identity;
pub(crate) mod recording;
mod shape;
pub(crate) mod verdict;

use identity::identify;
use verdict::{About, VerdictInput, judge};

// A reader refuses lists above its caps, so the engine's caps have to be lower.
const _: () = {
    assert!(TASKS_CAP + VICTIMS_CAP <= caps::TASKS && VICTIMS_CAP <= caps::VICTIMS);
    assert!(GROWTH_CAP <= caps::GROWTH && CURVE_CAP + TIMELINE_CAP < caps::ROWS);
    assert!(VIEW_NOTES_CAP <= caps::MAPPINGS && recording::NOTES_CAP <= caps::MAPPINGS);
    assert!(recording::LISTED_CAP <= caps::PROCESSES && recording::OOM_CAP <= caps::OOM_INCIDENTS);
    assert!(FILE_PATHS <= caps::ALLOCATION_PATHS && FILE_SAMPLES <= caps::SAMPLES && FRAMES_CAP <= caps::FRAMES);
    assert!(wire::KERNEL_FRAMES <= caps::FUNCTIONS && NAMES_CAP + 64 <= caps::LOSSES);
};

/// State of the engine that incidents are built from.
#[derive(Clone, Copy)]
pub(crate) struct BuildContext<'a> {
    pub(crate) run: &'a Run,
    pub(crate) world: &'a World,
    pub(crate) growth: &'a Attribution,
}

/// What differs between the kinds of incident.
pub(crate) struct Draft<'a> {
    pub(crate) kind: Kind,
    pub(crate) id: String,
    pub(crate) at_ns: u64,
    pub(crate) cgroup: Cgroup,
    /// Usage and resident memory for the composition.
    pub(crate) usage: Option<u64>,
    pub(crate) sums: Sums,
    pub(crate) about: About<'a>,
    /// Time, usage, limit and path for the verdict.
    pub(crate) verdict_at_ns: u64,
    pub(crate) verdict_usage: Option<u64>,
    pub(crate) verdict_limit: Option<u64>,
    pub(crate) verdict_path: Option<String>,
    pub(crate) tasks: &'a [TaskRow],
    pub(crate) growth: &'a [Growth],
    pub(crate) mappings: &'a [MappingNote],
    /// Loss totals at the begin of the window.
    pub(crate) loss_base: &'a BTreeMap<String, u64>,
    /// Losses of this incident alone, in addition to those of its window.
    pub(crate) losses: Vec<LossNote>,
    /// First and last moment of the growth that is reported, boot clock.
    pub(crate) window: (u64, u64),
    /// Selects the growth that is reported, by cgroup and process.
    pub(crate) in_scope: &'a dyn Fn(u64, ProcessKey) -> bool,
}

impl Draft<'_> {
    /// Builds the incident, with `points` as its curve.
    pub(crate) fn build<'p>(self, points: impl Iterator<Item = &'p Point>, context: &BuildContext<'_>) -> Incident {
        let (columns, thinned) = columns(points);
        let timeline = Timeline { columns, thinned };
        let composition = composition(self.usage, &self.sums);
        let verdict = judge(&VerdictInput {
            about: self.about,
            path: self.verdict_path.as_deref(),
            at_ns: self.verdict_at_ns,
            usage: self.verdict_usage,
            limit: self.verdict_limit,
            curve: &timeline.columns,
            tasks: self.tasks,
            growth: self.growth,
            composition: &composition,
        });
        let losses = losses(self.loss_base, timeline.thinned, self.losses, context.run);
        let over_budget = losses.iter().find(|note| note.what == Loss::StacksOverBudget.label());
        let window = Window {
            from_ns: self.window.0,
            until_ns: self.window.1,
            sample_bytes: context.run.settings.sample_bytes,
            thinned: over_budget.and_then(|note| note.count).unwrap_or(0),
        };
        let (allocation_paths, allocations) = context.growth.report(&window, self.in_scope);
        Incident {
            schema: SCHEMA,
            id: self.id,
            kind: self.kind,
            at: context.run.clock.at(self.at_ns),
            host: context.run.host.clone(),
            cgroup: self.cgroup,
            oom: None,
            pressure: None,
            recording: None,
            timeline,
            growth: self.growth.to_vec(),
            mappings: self.mappings.to_vec(),
            allocation_paths,
            allocations,
            composition,
            verdict,
            losses,
        }
    }
}

/// A cgroup of the incident file. Values that the reading lacks are from the latest one, except
/// usage.
pub(crate) fn cgroup(id: Option<u64>, reading: &Reading, context: &BuildContext<'_>) -> Cgroup {
    let last = id.and_then(|id| context.world.cgroups.get(id)).map(|row| row.last).unwrap_or_default();
    let r = reading.or(&Reading { usage: None, swap_usage: None, ..last });
    let path = context.world.cgroups.path(id);
    let (container, kubernetes) = path.as_deref().map(identify).unwrap_or_default();
    Cgroup {
        id: id.unwrap_or(0),
        path,
        version: context.run.settings.cgroup_version,
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

fn composition(usage: Option<u64>, sums: &Sums) -> Composition {
    let held = sums.anon.saturating_add(sums.shmem);
    Composition {
        anon_bytes: Some(sums.anon),
        file_bytes: Some(sums.file),
        shmem_bytes: Some(sums.shmem),
        swap_bytes: Some(sums.swap),
        unattributed_bytes: usage.map(|u| i64::try_from(u.saturating_sub(held)).unwrap_or(i64::MAX)),
    }
}

/// All losses of an incident: those since `base`, hooks that are not attached, readings that the
/// curve left out, and losses of the incident alone.
fn losses(base: &BTreeMap<String, u64>, thinned: u64, own: Vec<LossNote>, run: &Run) -> Vec<LossNote> {
    let mut losses = run.losses.since(base);
    losses.extend(run.settings.degraded.iter().map(|what| LossNote { what: what.clone(), count: None }));
    losses.extend(LossNote::counted(Loss::TimelineThinned, thinned));
    losses.extend(own);
    losses.sort();
    losses
}
