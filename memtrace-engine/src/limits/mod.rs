//! Limits that are hit without a kill: spikes, near misses, and cgroups that are stuck with their OOM
//! killer off. Also what follows from a limit while nothing happens: how often a cgroup's processes
//! are read, and which cgroups' OOM control is watched.

use memtrace_common::event as wire;
use memtrace_incident::PressureLimit;

use crate::build::Scene;
use crate::decode::{Reading, known};
use crate::input::{CgroupFound, Fact};
use crate::output::{Out, Request};
use crate::run::Run;
use crate::world::World;

mod detectors;
mod incidents;
mod stuck;

use detectors::{DetectedEvent, Detectors, limit_hit};
use stuck::Stuck;

/// The smallest threshold that a small limit leads to, bytes.
const RSS_THRESHOLD_MIN: u64 = 16 * 1024;
/// Resident memory passes a limit in at least this many thresholds.
pub(crate) const THRESHOLDS_PER_LIMIT: u64 = 512;

/// Everything about limits.
#[derive(Clone, Debug, Default)]
pub(crate) struct Limits {
    detectors: Detectors,
    /// At most [`stuck::STUCK_CAP`].
    stuck: Vec<Stuck>,
    /// The cgroups that must not be forgotten are others than before.
    changed: bool,
}

impl Limits {
    /// A reading that is on the curve.
    pub(crate) fn reading(&mut self, boot_ns: u64, reading: &Reading, world: &mut World, run: &Run, out: &mut Out) {
        let Some(id) = reading.cgroup_id else { return };
        if let (Some(usage), Some(limit)) = (reading.usage, reading.limit.bytes()) {
            self.detectors.reading(id, boot_ns, usage, limit);
        }
        adjust_threshold(id, world, run, out);
        stuck::watch_if_full(id, boot_ns, reading, world, run, out);
    }

    /// A cgroup was described; `limit_before` is the limit it was known with.
    pub(crate) fn cgroup_found(
        &mut self,
        found: &CgroupFound,
        limit_before: Option<u64>,
        world: &mut World,
        run: &Run,
        out: &mut Out,
    ) {
        if world.cgroups.limit(found.id) != limit_before {
            adjust_threshold(found.id, world, run, out);
        }
        // One that is at its limit may wait there since before we came.
        let read = world.cgroups.get(found.id).filter(|_| found.usage_bytes.is_some());
        if let Some(last) = read.map(|row| row.last) {
            stuck::watch_if_full(found.id, found.boot_ns, &last, world, run, out);
        }
    }

    /// Reclaim on behalf of a cgroup begins or ends. Its reading is on the curve.
    pub(crate) fn reclaim(&mut self, r: &wire::Reclaim, world: &mut World, run: &Run, out: &mut Out) {
        let ns = r.header.boot_ns;
        let reading = Reading::from(&r.memcg);
        let Some(id) = reading.cgroup_id else { return };
        match r.phase {
            wire::RECLAIM_BEGIN => {
                // Reclaim on request begins below every limit: that is no hit.
                let (limit, hits) = (limit_hit(&reading, &run.host), 1 + u64::from(r.suppressed));
                if limit != Some(PressureLimit::Max) {
                    stuck::watch_above(id, ns, world, run, out);
                }
                if let Some(stuck) = self.stuck_above(id, world) {
                    stuck.pressure.hit(ns, PressureLimit::Max, hits);
                } else if let Some(limit) = limit {
                    self.detectors.reclaim_began(ns, &reading, limit, hits);
                }
            }
            wire::RECLAIM_END => {
                let stalled_ns = known(r.duration_ns).unwrap_or(0);
                match self.stuck_above(id, world) {
                    Some(stuck) => stuck.pressure.stalled(ns, stalled_ns),
                    None => self.detectors.reclaim_ended(id, ns, stalled_ns),
                }
            }
            _ => {}
        }
    }

    /// What detectors saw in the cgroups around a kill is explained by it.
    pub(crate) fn explained_by(&mut self, m: &wire::OomVictim, world: &World) {
        let oom = Reading::from(&m.oom).cgroup_id;
        let victim = Reading::from(&m.victim_memcg).cgroup_id;
        let trigger = Reading::from(&m.trigger_memcg).cgroup_id;
        let (cgroups, global) = (&world.cgroups, m.scope != wire::SCOPE_MEMCG);
        self.detectors.killed(m.header.boot_ns, |id| {
            global
                || [victim, trigger].into_iter().flatten().any(|v| cgroups.in_tree(v, id))
                || oom.is_some_and(|root| cgroups.in_tree(id, root))
        });
    }

    /// Reports what time has decided about the curves.
    pub(crate) fn report_found(&mut self, scene: &Scene<'_>, out: &mut Out) {
        let settings = &scene.run.settings;
        for found in self.detectors.tick(scene.run.now, settings.near_misses) {
            match found {
                DetectedEvent::Spike(spike) if settings.spikes => incidents::report_spike(&spike, scene, out),
                DetectedEvent::NearMiss(near_miss) if settings.near_misses => {
                    incidents::report_near_miss(&near_miss, scene, out);
                }
                DetectedEvent::Spike(_) | DetectedEvent::NearMiss(_) => {}
            }
        }
    }

    /// Growing curves take in what the input at hand changed.
    pub(crate) fn follow(&mut self, world: &World) {
        self.stuck.iter_mut().for_each(|stuck| stuck.view.follow(world));
    }

    /// The input is over.
    pub(crate) fn input_over(&mut self) {
        self.stuck.iter_mut().for_each(|stuck| stuck.view.input_over());
    }

    /// Whether [`Limits::cgroups`] may be others than when this was asked last.
    pub(crate) fn take_changed(&mut self) -> bool {
        std::mem::take(&mut self.changed)
    }

    /// Cgroups that must not be forgotten.
    pub(crate) fn cgroups(&self) -> impl Iterator<Item = u64> + '_ {
        self.stuck.iter().map(|stuck| stuck.cgroup)
    }

    /// Cgroups that are stuck.
    pub(crate) fn stuck_cgroups(&self) -> usize {
        self.stuck.len()
    }

    /// Facts that tell a fresh engine of what is stuck.
    pub(crate) fn facts(&self) -> impl Iterator<Item = Fact> + '_ {
        self.stuck.iter().flat_map(Stuck::facts)
    }

    /// Cgroups that there was no detector for.
    pub(crate) fn refused(&self) -> u64 {
        self.detectors.refused
    }

    /// Roughly what it takes.
    pub(crate) fn memory_estimate(&self) -> usize {
        let views: usize = self.stuck.iter().map(|stuck| stuck.view.memory_estimate()).sum();
        self.detectors.memory_estimate() + views
    }
}

/// A small limit, its own or an ancestor's, asks for a fine threshold; a limit that grew gives it back.
fn adjust_threshold(id: u64, world: &mut World, run: &Run, out: &mut Out) {
    let page = if run.host.page_bytes == 0 { 4096 } else { run.host.page_bytes };
    let usual = run.settings.quantum_bytes;
    let wanted = world.cgroups.effective_limit(id).map(|limit| {
        let exact = limit / THRESHOLDS_PER_LIMIT;
        (exact - exact % page).max(RSS_THRESHOLD_MIN)
    });
    let wanted = wanted.filter(|threshold| *threshold < usual);
    if let Some(row) = world.cgroups.get_mut(id).filter(|row| row.rss_threshold != wanted) {
        row.rss_threshold = wanted;
        let threshold_bytes = wanted.unwrap_or(usual);
        out.requests.push(Request::SetRssThreshold { cgroup_id: id, threshold_bytes });
    }
}

#[cfg(test)]
mod tests;
