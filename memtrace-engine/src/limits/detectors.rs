//! Detects spikes and near misses in the readings of cgroups with a limit.
//!
//! A spike is a steep rise close to the limit and a fall after it. A near miss is reclaim at a
//! limit without a kill. Both are decided some time later, because a kill may still explain what
//! was seen.

use std::collections::{BTreeMap, VecDeque};

use memtrace_incident::{Host, PressureLimit};

use crate::decode::{Limit, Reading};

const SEC: u64 = 1_000_000_000;
/// Cgroups with a detector. At the cap idle ones are dropped, then new ones are refused and
/// counted.
const DETECTORS_CAP: usize = crate::world::CGROUPS_CAP;
/// A spike rises within this time.
const RISE_NS: u64 = SEC;
/// The lowest usage of the last second is stored in buckets of this width.
const LOW_BUCKET_NS: u64 = 50_000_000;
/// Usage that stays high for longer is no spike.
const PLATEAU_NS: u64 = 10 * SEC;
/// A kill explains a fall that is at most this long before it, and a rise or reclaim that is at
/// most this long after it.
const KILL_EXPLAINS_NS: u64 = SEC;
/// At most one spike and one near miss of a cgroup in this time.
const COOL_DOWN_NS: u64 = 60 * SEC;
/// How often the pause between two near misses of a cgroup is doubled, while they go on.
const PAUSE_DOUBLINGS: u32 = 6;
/// The most that is charged at once, as far as it is told from reclaim that somebody asked for
/// (memory.reclaim) below the limit. Where huge pages are larger, with pages of 64 KiB, they are rare.
const AT_ONCE_BYTES: u64 = 2 << 20;
/// Reclaim without a kill within this time is a near miss.
const NEAR_MISS_NS: u64 = 5 * SEC;

/// What was detected, as facts. [`crate::build::verdict`] makes the sentence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum DetectedEvent {
    Spike(Spike),
    NearMiss(NearMiss),
}

/// A rise close to the limit and the fall after it. All figures are bytes and boot-clock
/// nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Spike {
    pub(crate) cgroup: u64,
    pub(crate) base_ns: u64,
    pub(crate) base_bytes: u64,
    pub(crate) peak_ns: u64,
    pub(crate) peak_bytes: u64,
    pub(crate) limit_bytes: u64,
}

/// Reclaim at a limit without a kill.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct NearMiss {
    pub(crate) cgroup: u64,
    /// First hit, and last hit or end of reclaim.
    pub(crate) from_ns: u64,
    pub(crate) until_ns: u64,
    pub(crate) limit: PressureLimit,
    /// Hits of that limit.
    pub(crate) hits: u64,
    pub(crate) stalled_ns: u64,
    /// Usage at the first hit.
    pub(crate) usage: Option<u64>,
}

impl NearMiss {
    pub(crate) fn new(cgroup: u64, ns: u64, limit: PressureLimit, usage: Option<u64>) -> Self {
        Self { cgroup, from_ns: ns, until_ns: ns, limit, hits: 0, stalled_ns: 0, usage }
    }

    /// A limit was hit. Once the hard limit was hit, only its hits count.
    pub(crate) fn hit(&mut self, ns: u64, limit: PressureLimit, hits: u64) {
        if limit == PressureLimit::Max && self.limit == PressureLimit::High {
            (self.limit, self.hits) = (limit, 0);
        }
        if limit == self.limit {
            self.hits = self.hits.saturating_add(hits);
        }
        self.until_ns = self.until_ns.max(ns);
    }

    pub(crate) fn stalled(&mut self, ns: u64, stalled_ns: u64) {
        self.stalled_ns = self.stalled_ns.saturating_add(stalled_ns);
        self.until_ns = self.until_ns.max(ns);
    }
}

/// Where the usage of a cgroup is in the course of a spike.
#[derive(Clone, Debug, Default)]
enum Phase {
    #[default]
    Quiet,
    High(Spike),
    /// With the time of the fall.
    Fallen(Spike, u64),
}

#[derive(Clone, Debug, Default)]
struct Detector {
    /// Time and lowest usage of each bucket, oldest first. Cap: `RISE_NS / LOW_BUCKET_NS + 2`,
    /// because older ones are dropped.
    lows: VecDeque<(u64, u64)>,
    phase: Phase,
    spike_ns: Option<u64>,
    reclaim: Option<NearMiss>,
    near_miss_ns: Option<u64>,
    /// Near misses in a row, each soon after the pause that follows the one before.
    in_a_row: u32,
    /// Until when the last kill explains rises and reclaim, boot clock.
    explained_until_ns: u64,
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
        // Of equal values the latest, because the rise began there.
        self.lows.iter().copied().rev().min_by_key(|(_, low)| *low).unwrap_or((ns, usage))
    }

    fn reading(&mut self, cgroup: u64, ns: u64, usage: u64, limit: u64) {
        let (base_ns, base) = self.low(ns, usage);
        match &mut self.phase {
            // A rise right after a kill belongs to it: victims run until they exit, one after
            // another.
            Phase::Quiet => {
                if ns >= self.explained_until_ns
                    && u128::from(usage) * 5 >= u128::from(limit) * 4
                    && usage.saturating_sub(base) >= limit / 4
                {
                    self.phase = Phase::High(Spike {
                        cgroup,
                        base_ns,
                        base_bytes: base,
                        peak_ns: ns,
                        peak_bytes: usage,
                        limit_bytes: limit,
                    });
                }
            }
            Phase::High(spike) => {
                if usage > spike.peak_bytes {
                    (spike.peak_bytes, spike.peak_ns) = (usage, ns);
                } else if usage < spike.peak_bytes.saturating_sub(spike.limit_bytes / 8) {
                    self.phase = Phase::Fallen(*spike, ns);
                } else if ns > spike.peak_ns.saturating_add(PLATEAU_NS) {
                    self.phase = Phase::Quiet;
                }
            }
            Phase::Fallen(..) => {}
        }
    }

    /// Whether the last near miss is too recent for another. A cgroup that is always at its limit,
    /// such as one that reads many files, is reported after one minute, then after two, and in the
    /// end every 64 minutes.
    fn cooling(&mut self, ns: u64) -> bool {
        let Some(last) = self.near_miss_ns else { return false };
        let pause = COOL_DOWN_NS << self.in_a_row.saturating_sub(1).min(PAUSE_DOUBLINGS);
        if ns >= last.saturating_add(2 * pause) {
            self.in_a_row = 0;
        }
        ns < last.saturating_add(pause)
    }

    /// Whether a limit was hit around this time, without a kill so far.
    fn hit_around(&self, ns: u64) -> bool {
        let hit = self.reclaim.map(|near_miss| near_miss.from_ns).or(self.near_miss_ns);
        hit.is_some_and(|from_ns| ns.abs_diff(from_ns) <= NEAR_MISS_NS)
    }

    fn idle(&self, now: u64) -> bool {
        matches!(self.phase, Phase::Quiet) && self.reclaim.is_none() && now.saturating_sub(self.last_ns) > COOL_DOWN_NS
    }
}

/// The limit that was hit, of a reading when reclaim began. The kernel charges in batches ahead of
/// use on each CPU, and a huge page or a large folio of the page cache at once; an attempt at either
/// hits the limit below it. So usage within all batches and a huge page of the limit, but at most an
/// eighth of it, counts as at the limit. memory.high is looked at after the charge.
pub(crate) fn limit_hit(reading: &Reading, host: &Host) -> Option<PressureLimit> {
    let batches = batches(host);
    let at_once = batches.saturating_add(host.huge_page_bytes.unwrap_or(0).min(AT_ONCE_BYTES));
    if within(reading.usage, reading.limit, batches) {
        Some(PressureLimit::Max)
    } else if within(reading.usage, reading.high, batches) {
        Some(PressureLimit::High)
    } else {
        within(reading.usage, reading.limit, at_once).then_some(PressureLimit::Max)
    }
}

/// Whether usage is as high as its limit lets it be, but for what the CPUs hold back.
pub(crate) fn is_full(reading: &Reading, host: &Host) -> bool {
    within(reading.usage, reading.limit, batches(host))
}

fn batches(host: &Host) -> u64 {
    host.charge_batch_bytes.saturating_mul(u64::from(host.cpus))
}

/// Whether usage is at most so many bytes below a limit, and at most an eighth of it.
fn within(usage: Option<u64>, limit: Limit, below: u64) -> bool {
    let (Some(usage), Some(limit)) = (usage, limit.bytes()) else { return false };
    usage.saturating_add(below.min(limit / 8)) >= limit
}

/// Detectors of all cgroups with a limit.
#[derive(Clone, Debug, Default)]
pub(crate) struct Detectors {
    /// By kernfs id. Cap: [`DETECTORS_CAP`].
    rows: BTreeMap<u64, Detector>,
    /// Whether none is idle before the next tick.
    full: bool,
    /// How often a cgroup was refused a detector.
    pub(crate) refused: u64,
}

impl Detectors {
    fn row(&mut self, cgroup: u64, ns: u64) -> Option<&mut Detector> {
        if !self.rows.contains_key(&cgroup) && self.rows.len() >= DETECTORS_CAP {
            if !self.full {
                self.rows.retain(|_, d| !d.idle(ns));
            }
            self.full = self.rows.len() >= DETECTORS_CAP;
            if self.full {
                self.refused += 1;
                return None;
            }
        }
        let row = self.rows.entry(cgroup).or_default();
        row.last_ns = row.last_ns.max(ns);
        Some(row)
    }

    /// Takes a reading of a cgroup with a limit.
    pub(crate) fn reading(&mut self, cgroup: u64, ns: u64, usage: u64, limit: u64) {
        if limit == 0 {
            return;
        }
        if let Some(row) = self.row(cgroup, ns) {
            row.reading(cgroup, ns, usage, limit);
        }
    }

    /// Reclaim began `hits` times in a cgroup that is at a limit.
    pub(crate) fn reclaim_began(&mut self, ns: u64, reading: &Reading, limit: PressureLimit, hits: u64) {
        let Some(cgroup) = reading.cgroup_id else { return };
        let Some(row) = self.row(cgroup, ns) else { return };
        if row.reclaim.is_none() && (row.cooling(ns) || ns < row.explained_until_ns) {
            return;
        }
        row.reclaim.get_or_insert_with(|| NearMiss::new(cgroup, ns, limit, reading.usage)).hit(ns, limit, hits);
    }

    /// Reclaim ended, after delaying a task by `stalled_ns`.
    pub(crate) fn reclaim_ended(&mut self, cgroup: u64, ns: u64, stalled_ns: u64) {
        if let Some(near_miss) = self.rows.get_mut(&cgroup).and_then(|row| row.reclaim.as_mut()) {
            near_miss.stalled(ns, stalled_ns);
        }
    }

    /// Reclaim at a limit of this cgroup that is not decided yet.
    pub(crate) fn near_miss(&self, cgroup: u64) -> Option<NearMiss> {
        self.rows.get(&cgroup)?.reclaim
    }

    /// A kill explains what the detectors of these cgroups saw.
    pub(crate) fn killed(&mut self, ns: u64, explains: impl Fn(u64) -> bool) {
        for (id, row) in &mut self.rows {
            if explains(*id) {
                row.phase = Phase::Quiet;
                row.reclaim = None;
                row.lows.clear();
                row.explained_until_ns = ns.saturating_add(KILL_EXPLAINS_NS);
            }
        }
    }

    /// Spikes and near misses that are decided by now. With `near_misses`, a rise that led to a
    /// near miss is not reported as a spike too.
    pub(crate) fn tick(&mut self, now: u64, near_misses: bool) -> Vec<DetectedEvent> {
        let mut found = Vec::new();
        self.full = false;
        for row in self.rows.values_mut() {
            if let Phase::Fallen(spike, fell_ns) = row.phase
                && now >= fell_ns.saturating_add(KILL_EXPLAINS_NS)
            {
                row.phase = Phase::Quiet;
                row.lows.clear();
                let cooled = row.spike_ns.is_none_or(|last| spike.peak_ns >= last.saturating_add(COOL_DOWN_NS));
                if cooled && !(near_misses && row.hit_around(spike.peak_ns)) {
                    row.spike_ns = Some(spike.peak_ns);
                    found.push(DetectedEvent::Spike(spike));
                }
            }
            if let Some(near_miss) = row.reclaim.take_if(|r| now >= r.from_ns.saturating_add(NEAR_MISS_NS)) {
                row.near_miss_ns = Some(near_miss.from_ns);
                row.in_a_row = row.in_a_row.saturating_add(1);
                found.push(DetectedEvent::NearMiss(near_miss));
            }
        }
        found
    }

    pub(crate) fn memory_estimate(&self) -> usize {
        self.rows.len() * (size_of::<Detector>() + 22 * 16)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;
    const LIMIT: u64 = 1000;

    type Pairs = &'static [(u64, u64)];

    /// Feeds readings (milliseconds, usage), then a tick. Returns the spikes.
    fn spikes(readings: &[(u64, u64)], killed_ms: Option<u64>) -> Vec<(u64, u64)> {
        let mut d = Detectors::default();
        let mut last = 0;
        for (ms, usage) in readings {
            d.reading(7, ms * MS, *usage, LIMIT);
            last = *ms;
        }
        assert!(d.tick(last * MS, true).is_empty(), "a kill may still come");
        if let Some(ms) = killed_ms {
            d.killed(ms * MS, |id| id == 7);
        }
        d.tick((last + 1000) * MS, true)
            .into_iter()
            .filter_map(|f| if let DetectedEvent::Spike(s) = f { Some((s.peak_ns / MS, s.peak_bytes)) } else { None })
            .collect()
    }

    #[test]
    fn a_spike_is_a_steep_rise_close_to_the_limit_and_a_fall() {
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
    fn a_rise_that_hits_the_limit_is_a_near_miss_and_no_spike_besides() {
        for (near_misses, hit_ms, spikes) in [(true, 1800, 0), (false, 1800, 1), (true, 9000, 1)] {
            let mut d = Detectors::default();
            for (ms, usage) in [(1000, 500), (1400, 700), (1800, 850), (1900, 700)] {
                d.reading(7, ms * MS, usage, LIMIT);
            }
            let reading = Reading { cgroup_id: Some(7), ..Reading::default() };
            d.reclaim_began(hit_ms * MS, &reading, PressureLimit::Max, 1);
            let found = d.tick(3000 * MS, near_misses);
            assert_eq!(found.len(), spikes, "reported {near_misses}, hit at {hit_ms} ms: {found:?}");
        }
    }

    /// Seen on 5.10 under emulation: two processes shared an address space, and the second went on
    /// growing until it died.
    #[test]
    fn a_rise_while_victims_die_is_no_spike() {
        for (killed_ms, expected) in [(1100, 0), (400, 1)] {
            let mut d = Detectors::default();
            d.reading(7, killed_ms * MS, 999, LIMIT);
            d.killed(killed_ms * MS, |id| id == 7);
            for (ms, usage) in [(1200, 10), (1450, 850), (1500, 20)] {
                d.reading(7, ms * MS, usage, LIMIT);
            }
            assert_eq!(d.tick(3000 * MS, true).len(), expected, "killed at {killed_ms} ms");
        }
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
            found += d.tick((at + 199 + 1000) * MS, true).len() + d.tick((at + 1200) * MS, true).len();
        }
        assert!((2..=3).contains(&found), "{found}");
    }

    fn at(usage: u64) -> Reading {
        Reading { cgroup_id: Some(7), usage: Some(usage), ..Reading::default() }
    }

    #[test]
    fn reclaim_without_a_kill_is_reported_once_a_minute() {
        use PressureLimit::{High, Max};
        let mut d = Detectors::default();
        let begin = |d: &mut Detectors, sec: u64, limit, hits| d.reclaim_began(sec * SEC, &at(sec), limit, hits);
        begin(&mut d, 10, Max, 1);
        begin(&mut d, 11, Max, 4);
        d.reclaim_ended(7, 12 * SEC, 30 * MS);
        assert!(d.tick(14 * SEC, true).is_empty());
        let (from_ns, until_ns) = (10 * SEC, 12 * SEC);
        let reported =
            NearMiss { cgroup: 7, from_ns, until_ns, limit: Max, hits: 5, stalled_ns: 30 * MS, usage: Some(10) };
        assert_eq!(d.tick(15 * SEC, true), [DetectedEvent::NearMiss(reported)]);
        begin(&mut d, 20, Max, 1);
        assert!(d.tick(60 * SEC, true).is_empty());
        begin(&mut d, 71, Max, 1);
        d.killed(72 * SEC, |id| id == 7);
        assert!(d.tick(100 * SEC, true).is_empty());
        // While the victim exits, and after that.
        d.killed(200 * SEC, |id| id == 7);
        begin(&mut d, 200, Max, 1);
        assert!(d.tick(210 * SEC, true).is_empty());
        begin(&mut d, 211, Max, 1);
        assert_eq!(d.tick(216 * SEC, true).len(), 1);
        // When both limits are hit, hits of the hard one count.
        for limits in [[High, Max, High], [Max, High, High]] {
            let mut d = Detectors::default();
            limits.iter().for_each(|limit| begin(&mut d, 10, *limit, 3));
            let Some(DetectedEvent::NearMiss(both)) = d.tick(15 * SEC, true).pop() else { panic!("nothing was found") };
            assert_eq!((both.limit, both.hits), (Max, 3));
        }
    }

    #[test]
    fn a_cgroup_always_at_its_limit_is_reported_less_and_less_often() {
        let mut d = Detectors::default();
        let mut reported = Vec::new();
        let reading = at(10);
        for second in 0..6 * 3600 {
            d.reclaim_began(second * SEC, &reading, PressureLimit::Max, 1);
            reported.extend(d.tick(second * SEC, true).iter().map(|_| second));
        }
        let pauses: Vec<u64> = reported.windows(2).map(|pair| (pair[1] - pair[0] + 30) / 60).collect();
        assert_eq!(pauses.get(..7), Some([1, 2, 4, 8, 16, 32, 64].as_slice()));
        assert!(pauses.iter().skip(7).all(|minutes| *minutes == 64), "{pauses:?}");
        // After a long time without a hit the pauses begin at one minute again.
        let later = 12 * 3600;
        for second in later..later + 130 {
            d.reclaim_began(second * SEC, &reading, PressureLimit::Max, 1);
            reported.extend(d.tick(second * SEC, true).iter().map(|_| second));
        }
        assert_eq!(reported.iter().filter(|second| **second >= later).count(), 2);
    }

    #[test]
    fn a_reading_is_at_a_limit_within_what_is_charged_at_once() {
        use PressureLimit::{High, Max};
        let host = Host { cpus: 2, charge_batch_bytes: 20, ..Host::default() };
        let none = Limit::Unlimited;
        let cases = [
            ("at the limit", 1000, Limit::Bytes(1000), none, Some(Max)),
            ("within what the CPUs hold back", 960, Limit::Bytes(1000), none, Some(Max)),
            ("below it", 959, Limit::Bytes(1000), none, None),
            ("a small limit", 70, Limit::Bytes(80), none, Some(Max)),
            ("at memory.high, without a limit", 500, none, Limit::Bytes(500), Some(High)),
            ("above it, with one", 600, Limit::Bytes(1000), Limit::Bytes(500), Some(High)),
            ("below both", 400, Limit::Bytes(1000), Limit::Bytes(500), None),
            ("at both", 1000, Limit::Bytes(1000), Limit::Bytes(990), Some(Max)),
            ("no limits", 1000, none, none, None),
            ("unknown limits", 1000, Limit::Unknown, Limit::Unknown, None),
        ];
        for (name, usage, limit, high, expected) in cases {
            assert_eq!(limit_hit(&Reading { limit, high, ..at(usage) }, &host), expected, "{name}");
        }
        assert_eq!(limit_hit(&Reading { limit: Limit::Bytes(1), ..Reading::default() }, &host), None, "no usage");
        let huge = Host { huge_page_bytes: Some(60), ..host };
        let hit = |usage| limit_hit(&Reading { limit: Limit::Bytes(1000), ..at(usage) }, &huge);
        assert_eq!((hit(900), hit(899)), (Some(Max), None), "within batches and a huge page");
        let both =
            |usage| limit_hit(&Reading { limit: Limit::Bytes(1000), high: Limit::Bytes(950), ..at(usage) }, &huge);
        assert_eq!((both(900), both(920), both(960)), (Some(Max), Some(High), Some(Max)), "above memory.high");
        let full = |usage| is_full(&Reading { limit: Limit::Bytes(1000), ..at(usage) }, &huge);
        assert!(full(960) && !full(959), "within batches alone");
    }
}
