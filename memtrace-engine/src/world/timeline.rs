//! The memory curve of a cgroup. It has a cap, is fine near now and coarser with age, and keeps
//! peaks when it is thinned.
//!
//! A curve has tiers. The newest tier has every reading; each older tier has buckets of a fixed
//! width and keeps the highest reading of each. A reading moves to the next tier when it is too old
//! or when its tier is full.

use std::collections::VecDeque;
use std::ops::RangeInclusive;

use memtrace_common::event::{NO_LIMIT, UNKNOWN};
use memtrace_incident::Columns;

use crate::capacity;
use crate::decode::{Reading, known};

/// Every reading stays this long, up to [`FINE_CAP`] of them.
const FINE_NS: u64 = 2_000_000_000;
/// Up to this age, buckets of [`MID_SPACING_NS`].
const MID_NS: u64 = 10_000_000_000;
const MID_SPACING_NS: u64 = 10_000_000;
/// Up to this age, buckets of [`COARSE_SPACING_NS`].
const COARSE_NS: u64 = 60_000_000_000;
const COARSE_SPACING_NS: u64 = 100_000_000;
/// Width of the oldest buckets.
const OLD_SPACING_NS: u64 = 1_000_000_000;
/// Longest history. A longer setting is cut to it.
pub const MAX_BEFORE_NS: u64 = 600_000_000_000;

const FINE_CAP: usize = 2048;
const MID_CAP: usize = 1024;
const COARSE_CAP: usize = 512;
const OLD_CAP: usize = 608;
/// Readings of one timeline; the oldest are dropped.
pub(crate) const TIMELINE_CAP: usize = FINE_CAP + MID_CAP + COARSE_CAP + OLD_CAP;

/// Counters are cut to this value. Sums over [`crate::world::PROCESSES_CAP`] of them fit a `u64`.
const SANE_BYTES: u64 = 1 << 48;

/// Resident memory and swap entries by kind, in bytes, of one address space or summed over several.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Sums {
    pub(crate) anon: u64,
    pub(crate) file: u64,
    pub(crate) shmem: u64,
    pub(crate) swap: u64,
}

impl Sums {
    /// The sums of a record. A value that could not be read is that of `older`.
    pub(crate) fn from_wire(rss: &memtrace_common::event::Rss, older: Self) -> Self {
        let value = |now: u64, old: u64| if now == UNKNOWN { old } else { now.min(SANE_BYTES) };
        Self {
            anon: value(rss.anon_bytes, older.anon),
            file: value(rss.file_bytes, older.file),
            shmem: value(rss.shmem_bytes, older.shmem),
            swap: value(rss.swap_bytes, older.swap),
        }
    }

    pub(crate) fn of(anon: u64, file: u64, shmem: u64, swap: u64) -> Self {
        Self {
            anon: anon.min(SANE_BYTES),
            file: file.min(SANE_BYTES),
            shmem: shmem.min(SANE_BYTES),
            swap: swap.min(SANE_BYTES),
        }
    }

    pub(crate) fn resident(&self) -> u64 {
        self.anon.saturating_add(self.file).saturating_add(self.shmem)
    }

    pub(crate) fn is_zero(&self) -> bool {
        *self == Self::default()
    }

    pub(crate) fn add(&mut self, other: &Self) {
        self.anon = self.anon.saturating_add(other.anon);
        self.file = self.file.saturating_add(other.file);
        self.shmem = self.shmem.saturating_add(other.shmem);
        self.swap = self.swap.saturating_add(other.swap);
    }

    pub(crate) fn subtract(&mut self, other: &Self) {
        self.anon = self.anon.saturating_sub(other.anon);
        self.file = self.file.saturating_sub(other.file);
        self.shmem = self.shmem.saturating_sub(other.shmem);
        self.swap = self.swap.saturating_sub(other.swap);
    }
}

/// One reading of the curve, in bytes. It stores unknown values as on the wire, which keeps it at
/// 88 bytes; the accessors return `None` for them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Point {
    pub(crate) boot_ns: u64,
    usage: u64,
    limit: u64,
    watermark: u64,
    swap_usage: u64,
    swap_limit: u64,
    pub(crate) sums: Sums,
    /// How many other readings were left out for this one.
    merged: u32,
}

impl Point {
    pub(crate) fn new(boot_ns: u64, reading: &Reading, sums: Sums) -> Self {
        Self {
            boot_ns,
            usage: reading.usage.unwrap_or(UNKNOWN),
            limit: reading.limit.bytes().unwrap_or(NO_LIMIT),
            watermark: reading.watermark.unwrap_or(UNKNOWN),
            swap_usage: reading.swap_usage.unwrap_or(UNKNOWN),
            swap_limit: reading.swap_limit.bytes().unwrap_or(NO_LIMIT),
            sums,
            merged: 0,
        }
    }

    pub(crate) fn usage(&self) -> Option<u64> {
        known(self.usage)
    }

    pub(crate) fn limit(&self) -> Option<u64> {
        known(self.limit).filter(|limit| *limit != NO_LIMIT)
    }

    pub(crate) fn watermark(&self) -> Option<u64> {
        known(self.watermark)
    }

    fn swap_usage(&self) -> Option<u64> {
        known(self.swap_usage)
    }

    fn swap_limit(&self) -> Option<u64> {
        known(self.swap_limit).filter(|limit| *limit != NO_LIMIT)
    }

    /// The height of the curve for comparisons: usage, or resident memory when usage is unknown.
    /// Any known usage counts as higher than any sum.
    fn height(&self) -> (bool, u64) {
        self.usage().map_or((false, self.sums.resident()), |usage| (true, usage))
    }

    /// The higher of two readings, which counts the other one as left out.
    fn merge(self, other: Self) -> Self {
        let merged = self.merged.saturating_add(other.merged).saturating_add(1);
        let higher = if other.height() >= self.height() { other } else { self };
        Self { merged, ..higher }
    }
}

/// Readings in order of time. Of each bucket of `spacing_ns` it keeps the highest reading; with a
/// spacing of 0 it keeps all.
#[derive(Clone, Debug, Default)]
struct Tier {
    spacing_ns: u64,
    /// Whether each bucket keeps its last reading too. Without it, a curve that falls and then has
    /// no readings would seem to stay at its peak.
    and_last: bool,
    /// Cap: that of the owner, [`TIMELINE_CAP`] or [`CURVE_CAP`].
    points: VecDeque<Point>,
}

impl Tier {
    fn new(spacing_ns: u64) -> Self {
        Self { spacing_ns, and_last: true, points: VecDeque::new() }
    }

    /// A tier with one reading for each bucket.
    fn of_peaks(spacing_ns: u64) -> Self {
        Self { and_last: false, ..Self::new(spacing_ns) }
    }

    fn same_bucket(&self, a: u64, b: u64) -> bool {
        match (a.checked_div(self.spacing_ns), b.checked_div(self.spacing_ns)) {
            (Some(a), Some(b)) => a == b,
            _ => false,
        }
    }

    fn insert(&mut self, point: Point) {
        let at = match self.points.back() {
            Some(last) if last.boot_ns > point.boot_ns => self.points.partition_point(|p| p.boot_ns <= point.boot_ns),
            _ => self.points.len(),
        };
        self.points.insert(at, point);
        let mut first = at;
        while let Some(before) = first.checked_sub(1).filter(|i| self.shares_bucket(*i, point.boot_ns)) {
            first = before;
        }
        while self.shares_bucket(first + 1, point.boot_ns) {
            let (Some(one), Some(two)) = (self.points.get(first).copied(), self.points.get(first + 1).copied()) else {
                return;
            };
            if self.and_last && one.height() > two.height() && !self.shares_bucket(first + 2, point.boot_ns) {
                return;
            }
            self.points.remove(first + 1);
            if let Some(slot) = self.points.get_mut(first) {
                *slot = one.merge(two);
            }
        }
    }

    /// Whether there is a reading at `index` and it is in the same bucket as `boot_ns`.
    fn shares_bucket(&self, index: usize, boot_ns: u64) -> bool {
        self.points.get(index).is_some_and(|p| self.same_bucket(p.boot_ns, boot_ns))
    }

    fn newest(&self) -> Option<u64> {
        self.points.back().map(|p| p.boot_ns)
    }

    /// Moves readings that are older than `horizon` or above `cap` into the next tier.
    fn spill(&mut self, next: &mut Self, horizon: u64, cap: usize) {
        while self.points.len() > cap || self.points.front().is_some_and(|p| p.boot_ns < horizon) {
            let Some(point) = self.points.pop_front() else { break };
            next.insert(point);
        }
    }
}

/// The curve of one cgroup over the last `before_ns`. Cap: [`TIMELINE_CAP`].
#[derive(Clone, Debug)]
pub(crate) struct RecentCurve {
    fine: Tier,
    mid: Tier,
    coarse: Tier,
    old: Tier,
    newest_ns: u64,
}

impl Default for RecentCurve {
    fn default() -> Self {
        Self {
            fine: Tier::new(0),
            mid: Tier::new(MID_SPACING_NS),
            coarse: Tier::new(COARSE_SPACING_NS),
            old: Tier::of_peaks(OLD_SPACING_NS),
            newest_ns: 0,
        }
    }
}

impl RecentCurve {
    /// Adds a reading. Readings may come out of order.
    pub(crate) fn insert(&mut self, point: Point, before_ns: u64) {
        let before_ns = before_ns.min(MAX_BEFORE_NS);
        let ns = point.boot_ns;
        self.newest_ns = self.newest_ns.max(ns);
        if ns < self.newest_ns.saturating_sub(before_ns) {
            return;
        }
        let older_than = |tier: &Tier| tier.newest().is_none_or(|newest| newest <= ns);
        if older_than(&self.mid) && older_than(&self.coarse) && older_than(&self.old) {
            self.fine.insert(point);
        } else if older_than(&self.coarse) && older_than(&self.old) {
            self.mid.insert(point);
        } else if older_than(&self.old) {
            self.coarse.insert(point);
        } else {
            self.old.insert(point);
        }
        self.enforce_caps(before_ns);
    }

    /// Moves readings between tiers and drops those that are too old or above the caps.
    fn enforce_caps(&mut self, before_ns: u64) {
        let ago = |age: u64| self.newest_ns.saturating_sub(age);
        let (fine, mid, coarse, all) = (ago(FINE_NS), ago(MID_NS), ago(COARSE_NS), ago(before_ns));
        self.fine.spill(&mut self.mid, fine, FINE_CAP);
        self.mid.spill(&mut self.coarse, mid, MID_CAP);
        self.coarse.spill(&mut self.old, coarse, COARSE_CAP);
        for tier in [&mut self.old, &mut self.coarse, &mut self.mid, &mut self.fine] {
            while tier.points.front().is_some_and(|p| p.boot_ns < all) {
                tier.points.pop_front();
            }
        }
        while self.old.points.len() > OLD_CAP {
            self.old.points.pop_front();
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.fine.points.len() + self.mid.points.len() + self.coarse.points.len() + self.old.points.len()
    }

    pub(crate) fn clear(&mut self) {
        *self = Self { newest_ns: self.newest_ns, ..Self::default() };
    }

    /// Drops readings from before `oldest_ns` but the last of all, and gives memory back.
    pub(crate) fn tidy(&mut self, oldest_ns: u64) {
        let mut left = self.len();
        for tier in [&mut self.old, &mut self.coarse, &mut self.mid, &mut self.fine] {
            while left > 1 && tier.points.front().is_some_and(|point| point.boot_ns < oldest_ns) {
                tier.points.pop_front();
                left -= 1;
            }
            capacity::shrink(&mut tier.points, 4);
        }
    }

    /// Readings that memory is allocated for.
    pub(crate) fn capacity(&self) -> usize {
        [&self.fine, &self.mid, &self.coarse, &self.old].iter().map(|tier| tier.points.capacity()).sum()
    }

    /// Readings within a span of boot-clock times, oldest first.
    pub(crate) fn rows(&self, span: RangeInclusive<u64>) -> impl Iterator<Item = &Point> {
        [&self.old, &self.coarse, &self.mid, &self.fine]
            .into_iter()
            .flat_map(|tier| tier.points.iter())
            .filter(move |p| span.contains(&p.boot_ns))
    }
}

/// A curve of any duration in at most [`CURVE_CAP`] readings: the width of its buckets doubles
/// whenever it is full.
#[derive(Clone, Debug)]
pub(crate) struct Curve {
    tier: Tier,
}

/// Readings of one [`Curve`].
pub(crate) const CURVE_CAP: usize = 8192;
const CURVE_FIRST_SPACING_NS: u64 = 1_000_000;

impl Default for Curve {
    fn default() -> Self {
        Self { tier: Tier::new(0) }
    }
}

impl Curve {
    pub(crate) fn insert(&mut self, point: Point) {
        self.tier.insert(point);
        while self.tier.points.len() > CURVE_CAP {
            let spacing = self.tier.spacing_ns.saturating_mul(2).max(CURVE_FIRST_SPACING_NS);
            let mut wider = Tier::new(spacing);
            self.tier.points.drain(..).for_each(|p| wider.insert(p));
            self.tier = wider;
        }
    }

    pub(crate) fn rows(&self) -> impl DoubleEndedIterator<Item = &Point> {
        self.tier.points.iter()
    }

    pub(crate) fn memory_estimate(&self) -> usize {
        self.tier.points.len() * size_of::<Point>()
    }

    /// The highest reading.
    pub(crate) fn peak(&self) -> Option<&Point> {
        self.rows().max_by_key(|p| p.height())
    }
}

/// Readings as columns of the incident file, and how many readings were left out for them.
pub(crate) fn columns<'a>(points: impl Iterator<Item = &'a Point>) -> (Columns, u64) {
    let mut columns = Columns::default();
    let mut thinned = 0u64;
    for p in points {
        columns.boot_ns.push(p.boot_ns);
        columns.usage_bytes.push(p.usage());
        columns.limit_bytes.push(p.limit());
        columns.watermark_bytes.push(p.watermark());
        columns.anon_bytes.push(p.sums.anon);
        columns.file_bytes.push(p.sums.file);
        columns.shmem_bytes.push(p.sums.shmem);
        columns.swap_bytes.push(p.sums.swap);
        columns.swap_usage_bytes.push(p.swap_usage());
        columns.swap_limit_bytes.push(p.swap_limit());
        thinned = thinned.saturating_add(u64::from(p.merged));
    }
    (columns, thinned)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const BEFORE: u64 = 30_000_000_000;

    fn at(boot_ns: u64, usage: u64) -> Point {
        Point::new(boot_ns, &Reading { usage: Some(usage), ..Reading::default() }, Sums::default())
    }

    fn rows(t: &RecentCurve) -> Vec<Point> {
        t.rows(0..=u64::MAX).copied().collect()
    }

    #[test]
    fn everything_of_the_last_two_seconds_is_kept() {
        let mut t = RecentCurve::default();
        for i in 0..2000u64 {
            t.insert(at(1_000_000_000 + i * 1_000_000, i), BEFORE);
        }
        assert_eq!(t.len(), 2000);
        assert_eq!(columns(rows(&t).iter()).1, 0);
    }

    #[test]
    fn what_no_window_reaches_goes_but_the_last_reading() {
        let mut t = RecentCurve::default();
        for i in 0..30_000u64 {
            t.insert(at(i * 1_000_000, i % 977), BEFORE);
        }
        let (before, newest) = (rows(&t), rows(&t).last().copied());
        t.tidy(20_000_000_000);
        assert_eq!(rows(&t), before.into_iter().filter(|p| p.boot_ns >= 20_000_000_000).collect::<Vec<_>>());
        assert!(t.capacity() <= 2 * t.len() + 16, "{}", t.capacity());
        t.tidy(u64::MAX);
        assert!(rows(&t).last().copied() == newest && t.len() == 1 && t.capacity() <= 32, "{}", t.capacity());
    }

    #[test]
    fn age_makes_it_coarser_and_counts_what_is_left_out() {
        let mut t = RecentCurve::default();
        for i in 0..30_000u64 {
            t.insert(at(i * 1_000_000, i % 977), BEFORE);
        }
        let points = rows(&t);
        let newest = 29_999_000_000u64;
        for pair in points.windows(2) {
            let age = newest - pair[1].boot_ns;
            let gap = pair[1].boot_ns - pair[0].boot_ns;
            // Buckets are aligned, so readings of two neighbouring buckets may be closer than their
            // width.
            assert!(gap > 0 && (age > FINE_NS || gap == 1_000_000), "{age} {gap}");
        }
        // A bucket within which the curve falls has two readings.
        assert!(points.len() < 2001 + 802 + 202 + 30_000 / 977, "{}", points.len());
        assert_eq!(columns(points.iter()).1 + points.len() as u64, 30_000);
        assert_eq!(points.iter().filter_map(Point::usage).max(), Some(976));
    }

    #[test]
    fn a_peak_between_two_low_readings_survives_to_the_end_of_the_window() {
        let mut t = RecentCurve::default();
        t.insert(at(1_000_000_000, 10), BEFORE);
        t.insert(at(1_001_000_000, 999), BEFORE);
        t.insert(at(1_002_000_000, 10), BEFORE);
        for i in 0..290u64 {
            t.insert(at(1_100_000_000 + i * 100_000_000, 20), BEFORE);
            assert_eq!(rows(&t).iter().filter_map(Point::usage).max(), Some(999));
        }
    }

    #[test]
    fn a_curve_that_falls_and_rests_does_not_rest_on_its_peak() {
        let (mut t, mut curve) = (RecentCurve::default(), Curve::default());
        for i in 0..10_000u64 {
            curve.insert(at(i * 10_000, 10));
        }
        for (ns, usage) in [(1_000_000_000, 10), (1_000_100_000, 999), (1_000_200_000, 500), (1_000_300_000, 20)] {
            t.insert(at(ns, usage), BEFORE);
            curve.insert(at(ns, usage));
        }
        t.insert(at(9_000_000_000, 20), BEFORE);
        let usages = |points: Vec<Point>| points.iter().filter_map(Point::usage).collect::<Vec<_>>();
        assert_eq!(usages(rows(&t)), [999, 20, 20]);
        assert!(usages(curve.rows().copied().collect()).ends_with(&[999, 20]));
    }

    #[test]
    fn late_readings_go_where_they_belong() {
        let mut t = RecentCurve::default();
        for ns in [20_000_000_000u64, 5_000_000_000, 19_999_000_000, 12_000_000_000, 20_000_000_000] {
            t.insert(at(ns, ns), BEFORE);
        }
        let times: Vec<u64> = rows(&t).iter().map(|p| p.boot_ns).collect();
        assert_eq!(times, [5_000_000_000, 12_000_000_000, 19_999_000_000, 20_000_000_000, 20_000_000_000]);
    }

    #[test]
    fn a_known_usage_beats_any_sum() {
        let sums = Sums { anon: 1 << 40, ..Sums::default() };
        let unknown = Point::new(5, &Reading::default(), sums);
        assert_eq!(unknown.merge(at(6, 1)).usage(), Some(1));
        assert_eq!(at(6, 1).merge(unknown).usage(), Some(1));
        assert_eq!(at(6, 1).merge(unknown).merged, 1);
    }

    proptest! {
        #[test]
        fn ordered_bounded_and_the_peak_is_kept(
            steps in prop::collection::vec((0u64..400_000_000, 0u64..30_000_000, 0u64..1_000_000), 1..3000),
            before in prop_oneof![Just(BEFORE), 1_000_000_000u64..1_000_000_000_000],
        ) {
            let mut t = RecentCurve::default();
            let mut all = Vec::new();
            let mut now = 1_000_000_000_000u64;
            for (step, back, usage) in steps {
                now += step;
                let p = at(now - back, usage);
                all.push(p);
                t.insert(p, before);
            }
            let points = rows(&t);
            prop_assert!(points.len() <= TIMELINE_CAP);
            prop_assert!(points.windows(2).all(|w| w[0].boot_ns <= w[1].boot_ns));
            let newest = all.iter().map(|p| p.boot_ns).max().unwrap();
            let horizon = newest - before.min(MAX_BEFORE_NS);
            let peak = all.iter().filter(|p| p.boot_ns >= horizon + OLD_SPACING_NS).filter_map(Point::usage).max();
            prop_assert!(points.iter().filter_map(Point::usage).max() >= peak);
        }

        #[test]
        fn any_times_stay_under_the_cap(times in prop::collection::vec((any::<u64>(), any::<u64>()), 0..500)) {
            let mut t = RecentCurve::default();
            let mut c = Curve::default();
            for (ns, usage) in times {
                t.insert(at(ns, usage), BEFORE);
                c.insert(at(ns, usage));
            }
            prop_assert!(t.len() <= TIMELINE_CAP);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 8, ..ProptestConfig::default() })]

        #[test]
        fn a_curve_keeps_its_peak(values in prop::collection::vec(0u64..1_000_000_000, 20_000..20_100), step in 1u64..5_000_000) {
            let mut c = Curve::default();
            for (i, v) in values.iter().enumerate() {
                c.insert(at(i as u64 * step, *v));
            }
            prop_assert!(c.rows().count() <= CURVE_CAP);
            prop_assert_eq!(c.peak().and_then(Point::usage), values.iter().copied().max());
            let (_, thinned) = columns(c.rows());
            prop_assert_eq!(thinned as usize + c.rows().count(), values.len());
        }
    }
}
