//! Limits that are hit without a kill: spikes, near misses, and cgroups that are stuck with their
//! OOM killer off. Also what follows from a limit alone: the RSS threshold of a cgroup's processes,
//! and which cgroups' `memory.oom_control` is watched.

use memtrace_common::event as wire;
use memtrace_incident::PressureLimit;

use crate::build::BuildContext;
use crate::decode::{Reading, known};
use crate::input::{CgroupFound, Fact};
use crate::output::{Out, Request};
use crate::run::Run;
use crate::world::World;

mod detectors;
mod incidents;
mod stuck;

use detectors::{DetectedEvent, Detectors, is_full, limit_hit};
use stuck::Stuck;

/// Smallest RSS threshold that a small limit leads to, bytes. It bounds the number of records.
const RSS_THRESHOLD_MIN: u64 = 16 * 1024;
/// The RSS threshold of a cgroup is its limit divided by this, so that resident memory passes at
/// least this many thresholds on its way to the limit.
pub(crate) const THRESHOLDS_PER_LIMIT: u64 = 512;

/// State of everything about limits.
#[derive(Clone, Debug, Default)]
pub(crate) struct Limits {
    detectors: Detectors,
    /// Cap: [`stuck::STUCK_CAP`].
    stuck: Vec<Stuck>,
    /// Whether [`Limits::cgroups`] may have changed since [`Limits::take_changed`].
    changed: bool,
}

impl Limits {
    /// Takes a reading that is on the curve.
    pub(crate) fn reading(&mut self, boot_ns: u64, reading: &Reading, world: &mut World, run: &Run, out: &mut Out) {
        // A cgroup that is not followed has no detector either.
        let Some(id) = reading.cgroup_id.filter(|id| world.cgroups.get(*id).is_some()) else { return };
        if let (Some(usage), Some(limit)) = (reading.usage, reading.limit.bytes()) {
            self.detectors.reading(id, boot_ns, usage, limit);
        }
        adjust_threshold(id, world, run, out);
        stuck::watch_if_full(id, boot_ns, reading, world, run, out);
    }

    /// A fact described a cgroup; `limit_before` is its limit before the fact, in bytes.
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
        // A cgroup that is at its limit may be stuck since before tracing began.
        let read = world.cgroups.get(found.id).filter(|_| found.usage_bytes.is_some());
        if let Some(last) = read.map(|row| row.last) {
            stuck::watch_if_full(found.id, found.boot_ns, &last, world, run, out);
        }
    }

    /// Reclaim on behalf of a cgroup began or ended. Its reading is on the curve.
    pub(crate) fn reclaim(&mut self, r: &wire::Reclaim, world: &mut World, run: &Run, out: &mut Out) {
        let ns = r.header.boot_ns;
        let reading = Reading::from(&r.memcg);
        let Some(id) = reading.cgroup_id.filter(|id| world.cgroups.get(*id).is_some()) else { return };
        match r.phase {
            wire::RECLAIM_BEGIN => {
                // Reclaim on request (memory.reclaim) begins below every limit and is no hit.
                let (limit, hits) = (limit_hit(&reading, &run.host), 1 + u64::from(r.suppressed));
                if !is_full(&reading, &run.host) {
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

    /// A kill explains what detectors saw in the victim's and the trigger's cgroups, their
    /// ancestors, and the subtree of the cgroup that ran out. A global OOM explains all.
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

    /// Reports spikes and near misses that are decided by now.
    pub(crate) fn report_found(&mut self, context: &BuildContext<'_>, out: &mut Out) {
        let settings = &context.run.settings;
        for found in self.detectors.tick(context.run.now, settings.near_misses) {
            match found {
                DetectedEvent::Spike(spike) if settings.spikes => incidents::report_spike(&spike, context, out),
                DetectedEvent::NearMiss(near_miss) if settings.near_misses => {
                    incidents::report_near_miss(&near_miss, context, out);
                }
                DetectedEvent::Spike(_) | DetectedEvent::NearMiss(_) => {}
            }
        }
    }

    /// Adds the changes of the current input to the curves of stuck cgroups.
    pub(crate) fn follow(&mut self, world: &World) {
        self.stuck.iter_mut().for_each(|stuck| stuck.view.follow(world));
    }

    /// The input has ended.
    pub(crate) fn input_over(&mut self) {
        self.stuck.iter_mut().for_each(|stuck| stuck.view.input_over());
    }

    /// Whether [`Limits::cgroups`] may have changed since the last call.
    pub(crate) fn take_changed(&mut self) -> bool {
        std::mem::take(&mut self.changed)
    }

    /// Cgroups that open incidents refer to, which must stay in the table.
    pub(crate) fn cgroups(&self) -> impl Iterator<Item = u64> + '_ {
        self.stuck.iter().map(|stuck| stuck.cgroup)
    }

    /// Number of stuck cgroups.
    pub(crate) fn stuck_cgroups(&self) -> usize {
        self.stuck.len()
    }

    /// Facts from which an empty engine gets the stuck cgroups.
    pub(crate) fn facts(&self, world: &World) -> impl Iterator<Item = Fact> {
        self.stuck.iter().flat_map(|stuck| stuck.facts(world))
    }

    /// How often a cgroup was refused a detector.
    pub(crate) fn refused(&self) -> u64 {
        self.detectors.refused
    }

    /// Estimated memory in bytes.
    pub(crate) fn memory_estimate(&self) -> usize {
        let views: usize = self.stuck.iter().map(|stuck| stuck.view.memory_estimate()).sum();
        self.detectors.memory_estimate() + views
    }
}

/// Requests a smaller RSS threshold when a cgroup or an ancestor has a small limit, and the usual
/// one again when the limit grew.
fn adjust_threshold(id: u64, world: &mut World, run: &Run, out: &mut Out) {
    let page = if run.host.page_bytes == 0 { 4096 } else { run.host.page_bytes };
    let usual = run.settings.rss_threshold_bytes;
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
