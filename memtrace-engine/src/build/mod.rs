//! From what was gathered to the incident as the file holds it. Every kind of incident is built by
//! [`Draft::build`], the one place that fills a file in.

use std::collections::BTreeMap;

use memtrace_common::event as wire;
use memtrace_incident::caps;
use memtrace_incident::{
    Cgroup, Composition, Growth, Incident, Kind, Loss, LossNote, MappingNote, SCHEMA, TaskRow, Timeline,
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
use verdict::{About, Judged, judge};

/// What is written fits into what a reader takes.
const _: () = {
    assert!(TASKS_CAP + VICTIMS_CAP <= caps::TASKS && VICTIMS_CAP <= caps::VICTIMS);
    assert!(GROWTH_CAP <= caps::GROWTH && CURVE_CAP + TIMELINE_CAP < caps::ROWS);
    assert!(VIEW_NOTES_CAP <= caps::MAPPINGS && recording::NOTES_CAP <= caps::MAPPINGS);
    assert!(recording::LISTED_CAP <= caps::PROCESSES && recording::OOM_CAP <= caps::OOM_INCIDENTS);
    assert!(FILE_PATHS <= caps::ALLOCATION_PATHS && FILE_SAMPLES <= caps::SAMPLES && FRAMES_CAP <= caps::FRAMES);
    assert!(wire::KERNEL_FRAMES <= caps::FUNCTIONS && NAMES_CAP + 64 <= caps::LOSSES);
};

/// What every incident is built from.
#[derive(Clone, Copy)]
pub(crate) struct Scene<'a> {
    pub(crate) run: &'a Run,
    pub(crate) world: &'a World,
    pub(crate) growth: &'a Attribution,
}

/// An incident before it is built: what differs from kind to kind.
pub(crate) struct Draft<'a> {
    pub(crate) kind: Kind,
    pub(crate) id: String,
    pub(crate) at_ns: u64,
    pub(crate) cgroup: Cgroup,
    /// Usage and resident memory that the composition is made of.
    pub(crate) usage: Option<u64>,
    pub(crate) sums: Sums,
    pub(crate) about: About<'a>,
    /// The moment, usage, limit and path that the verdict is about.
    pub(crate) verdict_at_ns: u64,
    pub(crate) verdict_usage: Option<u64>,
    pub(crate) verdict_limit: Option<u64>,
    pub(crate) verdict_path: Option<String>,
    pub(crate) tasks: &'a [TaskRow],
    pub(crate) growth: &'a [Growth],
    pub(crate) mappings: &'a [MappingNote],
    /// Totals of losses when the window began.
    pub(crate) loss_base: &'a BTreeMap<String, u64>,
    /// Losses of this incident alone.
    pub(crate) losses: Vec<LossNote>,
    /// First and last moment that growth is told of, boot clock.
    pub(crate) window: (u64, u64),
    /// Whose growth that is, by cgroup and process.
    pub(crate) in_scope: &'a dyn Fn(u64, ProcessKey) -> bool,
}

impl Draft<'_> {
    /// The incident, with these readings as its curve.
    pub(crate) fn build<'p>(self, points: impl Iterator<Item = &'p Point>, scene: &Scene<'_>) -> Incident {
        let (columns, thinned) = columns(points);
        let timeline = Timeline { columns, thinned };
        let composition = composition(self.usage, &self.sums);
        let verdict = judge(&Judged {
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
        let losses = losses(self.loss_base, timeline.thinned, self.losses, scene.run);
        let over_budget = losses.iter().find(|note| note.what == Loss::StacksOverBudget.label());
        let window = Window {
            from_ns: self.window.0,
            until_ns: self.window.1,
            sample_bytes: scene.run.settings.sample_bytes,
            thinned: over_budget.and_then(|note| note.count).unwrap_or(0),
        };
        let (allocation_paths, allocations) = scene.growth.report(&window, self.in_scope);
        Incident {
            schema: SCHEMA,
            id: self.id,
            kind: self.kind,
            at: scene.run.clock.at(self.at_ns),
            host: scene.run.host.clone(),
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

/// A cgroup as the file shows it. What the reading lacks is taken from the last one known.
pub(crate) fn cgroup(id: Option<u64>, reading: &Reading, scene: &Scene<'_>) -> Cgroup {
    let last = id.and_then(|id| scene.world.cgroups.get(id)).map(|row| row.last).unwrap_or_default();
    let r = reading.or(&Reading { usage: None, swap_usage: None, ..last });
    let path = scene.world.cgroups.path(id);
    let (container, kubernetes) = path.as_deref().map(identify).unwrap_or_default();
    Cgroup {
        id: id.unwrap_or(0),
        path,
        version: scene.run.settings.cgroup_version,
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

/// What was lost since `base`, what is not attached, what the curve left out, and what this incident lacks.
fn losses(base: &BTreeMap<String, u64>, thinned: u64, own: Vec<LossNote>, run: &Run) -> Vec<LossNote> {
    let mut losses = run.losses.since(base);
    losses.extend(run.settings.degraded.iter().map(|what| LossNote { what: what.clone(), count: None }));
    losses.extend(LossNote::counted(Loss::TimelineThinned, thinned));
    losses.extend(own);
    losses.sort();
    losses
}
