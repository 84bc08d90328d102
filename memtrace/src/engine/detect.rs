//! Spikes and near misses: what readings of a limited cgroup show besides kills.

use std::collections::{BTreeMap, VecDeque};

use super::decode::Reading;
use super::incident::Host;

const SEC: u64 = 1_000_000_000;
/// Cgroups watched at once; further ones are not, until quiet ones are dropped.
const DETECTORS_CAP: usize = super::cgroups::CGROUPS_CAP;
/// A spike rises within this.
const RISE_NS: u64 = SEC;
/// The lowest usage of the last second is kept in buckets of this width.
const LOW_BUCKET_NS: u64 = 50_000_000;
/// What stays high longer is no spike.
const PLATEAU_NS: u64 = 10 * SEC;
/// A kill this soon after the fall explains it.
const KILL_EXPLAINS_NS: u64 = SEC;
/// One spike, and one near miss, of a cgroup in this time.
const COOL_DOWN_NS: u64 = 60 * SEC;
/// Reclaim without a kill for this long is a near miss.
const NEAR_MISS_NS: u64 = 5 * SEC;

/// What was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Found {
    Spike(Spike),
    NearMiss { cgroup: u64, hits: u64, stalled_ns: u64 },
}

/// A rise close to the limit and the fall after it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Spike {
    pub(super) cgroup: u64,
    pub(super) base_ns: u64,
    pub(super) base: u64,
    pub(super) peak_ns: u64,
    pub(super) peak: u64,
    pub(super) limit: u64,
}

#[derive(Clone, Debug, Default)]
enum Phase {
    #[default]
    Quiet,
    High(Spike),
    Fallen(Spike, u64),
}

#[derive(Clone, Debug, Default)]
struct Detector {
    /// Lowest usage per bucket, oldest first; at most `RISE_NS / LOW_BUCKET_NS + 2`.
    lows: VecDeque<(u64, u64)>,
    phase: Phase,
    spike_ns: Option<u64>,
    /// Reclaim since, hits, stalled nanoseconds.
    reclaim: Option<(u64, u64, u64)>,
    near_miss_ns: Option<u64>,
    last_ns: u64,
}

impl Detector {
    fn low(&mut self, ns: u64, usage: u64) -> (u64, u64) {
        let horizon = ns.saturating_sub(RISE_NS);
        while self.lows.front().is_some_and(|(at, _)| *at < horizon) {
            self.lows.pop_front();
        }
        match self.lows.back_mut() {
            Some(last) if ns / LOW_BUCKET_NS <= last.0 / LOW_BUCKET_NS => {
                if usage <= last.1 {
                    *last = (last.0.max(ns), usage);
                }
            }
            _ => self.lows.push_back((ns, usage)),
        }
        // Of equal lows the latest: the rise began there.
        self.lows.iter().copied().rev().min_by_key(|(_, low)| *low).unwrap_or((ns, usage))
    }

    fn reading(&mut self, cgroup: u64, ns: u64, usage: u64, limit: u64) {
        let (base_ns, base) = self.low(ns, usage);
        match &mut self.phase {
            Phase::Quiet => {
                if u128::from(usage) * 5 >= u128::from(limit) * 4 && usage.saturating_sub(base) >= limit / 4 {
                    self.phase = Phase::High(Spike { cgroup, base_ns, base, peak_ns: ns, peak: usage, limit });
                }
            }
            Phase::High(spike) => {
                if usage > spike.peak {
                    (spike.peak, spike.peak_ns) = (usage, ns);
                } else if usage < spike.peak.saturating_sub(spike.limit / 8) {
                    self.phase = Phase::Fallen(*spike, ns);
                } else if ns > spike.peak_ns.saturating_add(PLATEAU_NS) {
                    self.phase = Phase::Quiet;
                }
            }
            Phase::Fallen(..) => {}
        }
    }

    fn idle(&self, now: u64) -> bool {
        matches!(self.phase, Phase::Quiet) && self.reclaim.is_none() && now.saturating_sub(self.last_ns) > COOL_DOWN_NS
    }
}

/// Whether a reading is at its limit, as far as usage is exact: each CPU may hold back a batch of charges.
pub(super) fn at_limit(reading: &Reading, host: &Host) -> bool {
    let (Some(usage), Some(limit)) = (reading.usage, reading.limit.bytes()) else { return false };
    let held_back = host.charge_batch_bytes.saturating_mul(u64::from(host.cpus)).min(limit / 8);
    usage.saturating_add(held_back) >= limit
}

/// Detectors of all limited cgroups.
#[derive(Clone, Debug, Default)]
pub(super) struct Detectors {
    rows: BTreeMap<u64, Detector>,
    pub(super) refused: u64,
}

impl Detectors {
    fn row(&mut self, cgroup: u64, ns: u64) -> Option<&mut Detector> {
        if !self.rows.contains_key(&cgroup) && self.rows.len() >= DETECTORS_CAP {
            self.rows.retain(|_, d| !d.idle(ns));
            if self.rows.len() >= DETECTORS_CAP {
                self.refused += 1;
                return None;
            }
        }
        let row = self.rows.entry(cgroup).or_default();
        row.last_ns = row.last_ns.max(ns);
        Some(row)
    }

    /// A reading of a cgroup with a limit.
    pub(super) fn reading(&mut self, cgroup: u64, ns: u64, usage: u64, limit: u64) {
        if limit == 0 {
            return;
        }
        if let Some(row) = self.row(cgroup, ns) {
            row.reading(cgroup, ns, usage, limit);
        }
    }

    /// Reclaim began (`hits` times) in a cgroup with a limit.
    pub(super) fn reclaim_began(&mut self, cgroup: u64, ns: u64, hits: u64) {
        let Some(row) = self.row(cgroup, ns) else { return };
        let cooling = row.near_miss_ns.is_some_and(|last| ns < last.saturating_add(COOL_DOWN_NS));
        match &mut row.reclaim {
            Some((_, total, _)) => *total = total.saturating_add(hits),
            None if !cooling => row.reclaim = Some((ns, hits, 0)),
            None => {}
        }
    }

    /// Reclaim ended after holding a task up.
    pub(super) fn reclaim_ended(&mut self, cgroup: u64, stalled_ns: u64) {
        if let Some((_, _, total)) = self.rows.get_mut(&cgroup).and_then(|row| row.reclaim.as_mut()) {
            *total = total.saturating_add(stalled_ns);
        }
    }

    /// Somebody was killed: what these cgroups showed is explained.
    pub(super) fn killed(&mut self, explains: impl Fn(u64) -> bool) {
        for (id, row) in &mut self.rows {
            if explains(*id) {
                row.phase = Phase::Quiet;
                row.reclaim = None;
                row.lows.clear();
            }
        }
    }

    /// What time has decided.
    pub(super) fn tick(&mut self, now: u64) -> Vec<Found> {
        let mut found = Vec::new();
        for (id, row) in &mut self.rows {
            if let Phase::Fallen(spike, fell_ns) = row.phase
                && now >= fell_ns.saturating_add(KILL_EXPLAINS_NS)
            {
                row.phase = Phase::Quiet;
                row.lows.clear();
                if row.spike_ns.is_none_or(|last| spike.peak_ns >= last.saturating_add(COOL_DOWN_NS)) {
                    row.spike_ns = Some(spike.peak_ns);
                    found.push(Found::Spike(spike));
                }
            }
            if let Some((since, hits, stalled_ns)) = row.reclaim
                && now >= since.saturating_add(NEAR_MISS_NS)
            {
                row.reclaim = None;
                row.near_miss_ns = Some(since);
                found.push(Found::NearMiss { cgroup: *id, hits, stalled_ns });
            }
        }
        found
    }

    pub(super) fn memory_estimate(&self) -> usize {
        self.rows.len() * (size_of::<Detector>() + 22 * 16)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;
    const LIMIT: u64 = 1000;

    type Pairs = &'static [(u64, u64)];

    /// Readings as (milliseconds, usage), then a tick; the spikes found.
    fn spikes(readings: &[(u64, u64)], killed_ms: Option<u64>) -> Vec<(u64, u64)> {
        let mut d = Detectors::default();
        let mut last = 0;
        for (ms, usage) in readings {
            d.reading(7, ms * MS, *usage, LIMIT);
            last = *ms;
        }
        assert!(d.tick(last * MS).is_empty(), "a kill may still come");
        if killed_ms.is_some() {
            d.killed(|id| id == 7);
        }
        d.tick((last + 1000) * MS)
            .into_iter()
            .filter_map(|f| if let Found::Spike(s) = f { Some((s.peak_ns / MS, s.peak)) } else { None })
            .collect()
    }

    #[test]
    fn the_decision_table_of_spikes() {
        const STEEP: Pairs = &[(1000, 500), (1400, 700), (1800, 850), (1900, 700)];
        let cases: [(&str, Pairs, Pairs); 7] = [
            ("steep, high, fell", STEEP, &[(1800, 850)]),
            ("not high enough", &[(1000, 400), (1500, 799), (1600, 300)], &[]),
            ("too slow", &[(1000, 500), (1900, 620), (2900, 740), (3900, 850), (4000, 300)], &[]),
            ("did not fall far enough", &[(1000, 500), (1500, 850), (1600, 726)], &[]),
            ("still high", &[(1000, 500), (1500, 850)], &[]),
            ("a plateau", &[(1000, 500), (1500, 850), (6000, 850), (12_000, 849), (12_100, 100)], &[]),
            ("late fall", &[(1000, 500), (1500, 850), (9000, 849), (9100, 100)], &[(1500, 850)]),
        ];
        for (name, readings, expected) in cases {
            assert_eq!(spikes(readings, None), expected, "{name}");
        }
        assert_eq!(spikes(STEEP, Some(2000)), [], "a kill explains it");
    }

    #[test]
    fn one_spike_a_minute() {
        let mut d = Detectors::default();
        let mut found = 0;
        for round in 0..130u64 {
            let at = 1_000_000 + round * 1000;
            d.reading(7, at * MS, 100, LIMIT);
            d.reading(7, (at + 100) * MS, 900, LIMIT);
            d.reading(7, (at + 200) * MS, 100, LIMIT);
            found += d.tick((at + 199 + 1000) * MS).len() + d.tick((at + 1200) * MS).len();
        }
        assert!((2..=3).contains(&found), "{found}");
    }

    #[test]
    fn reclaim_without_a_kill_is_told_once_a_minute() {
        let mut d = Detectors::default();
        d.reclaim_began(7, 10 * SEC, 1);
        d.reclaim_began(7, 11 * SEC, 4);
        d.reclaim_ended(7, 30 * MS);
        assert!(d.tick(14 * SEC).is_empty());
        assert_eq!(d.tick(15 * SEC), [Found::NearMiss { cgroup: 7, hits: 5, stalled_ns: 30 * MS }]);
        d.reclaim_began(7, 20 * SEC, 1);
        assert!(d.tick(60 * SEC).is_empty());
        d.reclaim_began(7, 71 * SEC, 1);
        d.killed(|id| id == 7);
        assert!(d.tick(100 * SEC).is_empty());
    }
}
