//! Limits that are hit: reclaim at them, and what it comes to where nobody is killed.

use memtrace_common::event as wire;

use super::Engine;
use super::builder::{PressureCase, pressure_incident, spike_incident};
use super::clock::Identity;
use super::decode::{Reading, known};
use super::detect::{Found, NearMiss, limit_hit};
use super::input::{Effect, Finding};
use super::scope::{Moments, View};
use memtrace_incident::{Kind, Pressure, PressureLimit, Scope};

impl Engine {
    /// Reclaim on behalf of a cgroup begins or ends.
    pub(super) fn reclaim(&mut self, r: &wire::Reclaim, effects: &mut Vec<Effect>) {
        let ns = r.header.boot_ns;
        let reading = Reading::from(&r.memcg);
        self.reading(ns, &reading, effects);
        let Some(id) = reading.cgroup_id else { return };
        match r.phase {
            wire::RECLAIM_BEGIN => {
                // Reclaim on request begins below every limit: that is no hit.
                let (limit, hits) = (limit_hit(&reading, &self.host), 1 + u64::from(r.suppressed));
                self.ask_above(id, ns, limit, effects);
                if let Some(stuck) = self.stuck_above(id) {
                    stuck.pressure.hit(ns, PressureLimit::Max, hits);
                } else if let Some(limit) = limit {
                    self.detectors.reclaim_began(ns, &reading, limit, hits);
                }
            }
            wire::RECLAIM_END => {
                let stalled_ns = known(r.duration_ns).unwrap_or(0);
                match self.stuck_above(id) {
                    Some(stuck) => stuck.pressure.stalled(ns, stalled_ns),
                    None => self.detectors.reclaim_ended(id, ns, stalled_ns),
                }
            }
            _ => {}
        }
    }

    /// Tells what time has decided about the curves.
    pub(super) fn tell_found(&mut self, effects: &mut Vec<Effect>) {
        for found in self.detectors.tick(self.now, self.settings.near_misses) {
            match found {
                Found::Spike(spike) if self.settings.spikes => {
                    let incident = spike_incident(&spike, &self.scene());
                    effects.push(Effect::Alert(Finding::Spike {
                        incident: incident.id.clone(),
                        cgroup_path: incident.cgroup.path.clone(),
                        peak_bytes: spike.peak,
                        limit_bytes: spike.limit,
                    }));
                    effects.push(Effect::Save(Box::new(incident)));
                }
                Found::NearMiss(near_miss) if self.settings.near_misses => self.near_miss(&near_miss, effects),
                Found::Spike(_) | Found::NearMiss(_) => {}
            }
        }
    }

    fn near_miss(&self, found: &NearMiss, effects: &mut Vec<Effect>) {
        let NearMiss { cgroup: cgroup_id, from_ns, until_ns, limit, hits, stalled_ns, usage } = *found;
        let stalled_ns = self.settings.stalls_seen.then_some(stalled_ns);
        let (view, reading) = self.look_at(cgroup_id, from_ns, u64::MAX);
        let row = self.book.cgroups.get(cgroup_id);
        let case = PressureCase {
            kind: Kind::NearMiss,
            id: self.pressure_id("near_miss", from_ns, cgroup_id),
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
            loss_base: &self.losses.at(from_ns.saturating_sub(self.settings.before_ns)),
            early: false,
        };
        let incident = pressure_incident(case, &self.scene());
        effects.push(Effect::Alert(Finding::NearMiss {
            incident: incident.id.clone(),
            cgroup_path: incident.cgroup.path.clone(),
            cgroup_id,
            limit,
            hits,
            stalled_ns,
        }));
        effects.push(Effect::Save(Box::new(incident)));
    }

    /// What a cgroup looks like around a moment, and its counters as last read; the curve ends at `until_ns`.
    pub(super) fn look_at(&self, id: u64, at_ns: u64, until_ns: u64) -> (View, Reading) {
        let from_ns = at_ns.saturating_sub(self.settings.before_ns);
        let row = self.book.cgroups.get(id);
        let then = row.and_then(|row| row.timeline.rows(0..=at_ns).last()).map(|point| point.sums);
        let sums = then.or(row.map(|row| row.tree)).unwrap_or_default();
        let when = Moments { from_ns, at_ns, mark_ns: at_ns };
        let view = View::of(&self.book, (Scope::Cgroup, Some(id)), Some(id), when, until_ns, |_| sums);
        let last = row.map(|row| row.last).unwrap_or_default();
        (view, Reading { cgroup_id: Some(id), ..last })
    }

    pub(super) fn pressure_id(&self, kind: &str, boot_ns: u64, cgroup_id: u64) -> String {
        let boot_id = &self.host.boot_id;
        self.clock.incident_id(&Identity { kind, boot_id, boot_ns, pid: 0, start_boot_ns: cgroup_id })
    }
}

#[cfg(test)]
mod tests;
