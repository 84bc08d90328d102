//! Which spikes a curve or a poller's readings show, and with which errors. Pure.

use crate::recorder::CgroupReading;

/// How far outside a spike a reading may be and still belong to it: clocks are read beside the
/// work, not within.
const SLACK_NS: u64 = 5_000_000;

/// How close to the base a spike's end must come: the kernel keeps back 64 uncharged pages a CPU.
const NEAR_BYTES: u64 = 512 << 10;

/// A spike as the workload recorded it: boot-clock nanoseconds and bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct TrueSpike {
    /// Size.
    pub(super) mib: u64,
    /// Requested time at the top, ms.
    pub(super) hold_ms: u64,
    /// Before the first page was touched.
    pub(super) start_ns: u64,
    /// After the last page was touched.
    pub(super) top_ns: u64,
    /// Before memory was returned.
    pub(super) fall_ns: u64,
    /// After memory was returned.
    pub(super) end_ns: u64,
    /// Usage by the kernel.
    pub(super) usage: SpikeLevel,
    /// Resident memory: at the base by the kernel's exact count, at the top that plus the size.
    pub(super) resident: SpikeLevel,
}

/// Height of a spike in one column of a curve.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct SpikeLevel {
    /// Before the spike.
    pub(super) base_bytes: u64,
    /// At the top.
    pub(super) top_bytes: u64,
}

/// A spike that a curve shows, and its errors.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct SeenSpike {
    /// Highest reading minus the kernel's usage at the top.
    pub(super) peak_error_bytes: u64,
    /// From the true start to the first reading above it; negative if too early.
    pub(super) start_error_ns: i64,
    /// From the true end to the first reading near the base; negative if too early, `None` without
    /// such a reading.
    pub(super) end_error_ns: Option<i64>,
}

/// A spike in a poller's readings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct PolledSpike {
    /// Whether a reading within it was at least half as high.
    pub(super) seen: bool,
    /// How far its highest reading is from the top; the whole height without a reading within the
    /// spike.
    pub(super) peak_error_bytes: u64,
}

impl SpikeLevel {
    fn height(&self) -> u64 {
        self.top_bytes.saturating_sub(self.base_bytes)
    }
}

/// Finds a spike in a curve. It is found if the curve rises by half the spike's height within its
/// time, give or take 5 ms. It starts where the curve is one threshold above the base. It ends
/// where the curve, after its highest reading, is within an eighth of its height (at least 512 KiB)
/// of the base.
pub(super) fn find(
    spike: &TrueSpike,
    level: &SpikeLevel,
    curve: &[CgroupReading],
    quantum_bytes: u64,
) -> Option<SeenSpike> {
    let (from, until) = (spike.start_ns.saturating_sub(SLACK_NS), spike.end_ns + SLACK_NS);
    let first = curve.partition_point(|reading| reading.boot_ns < from);
    let window = || curve.iter().skip(first).take_while(|reading| reading.boot_ns <= until);
    // a reading holds until the next one
    let mut lowest = curve.get(first.checked_sub(1)?).map(|reading| reading.bytes)?;
    let mut rise = 0;
    for reading in window() {
        lowest = lowest.min(reading.bytes);
        rise = rise.max(reading.bytes - lowest);
    }
    if rise < level.height().div_ceil(2) {
        return None;
    }
    let highest = window().max_by_key(|reading| reading.bytes)?;
    let risen = window().find(|reading| reading.bytes >= level.base_bytes + quantum_bytes)?;
    let near = level.base_bytes + NEAR_BYTES.max(level.height() / 8);
    // also after the window: a late end is an error to report, not a missed spike
    let fallen = curve.iter().skip(first).find(|r| r.boot_ns > highest.boot_ns && r.bytes <= near);
    Some(SeenSpike {
        peak_error_bytes: highest.bytes.abs_diff(level.top_bytes),
        start_error_ns: error_ns(risen.boot_ns, spike.start_ns),
        end_error_ns: fallen.map(|fallen| error_ns(fallen.boot_ns, spike.end_ns)),
    })
}

/// Finds a spike in readings at fixed intervals.
pub(super) fn polled(spike: &TrueSpike, readings: &[CgroupReading]) -> PolledSpike {
    let level = &spike.usage;
    let within = readings.iter().filter(|r| (spike.start_ns..=spike.end_ns).contains(&r.boot_ns));
    let highest = within.map(|reading| reading.bytes).max().unwrap_or(0).max(level.base_bytes);
    let seen = highest - level.base_bytes >= level.height().div_ceil(2).max(1);
    PolledSpike { seen, peak_error_bytes: level.top_bytes.abs_diff(highest) }
}

fn error_ns(said: u64, truth: u64) -> i64 {
    let apart = i64::try_from(said.abs_diff(truth)).unwrap_or(i64::MAX);
    if said >= truth { apart } else { -apart }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;
    const MIB: u64 = 1 << 20;
    const QUANTUM: u64 = 64 << 10;
    const LEVEL: SpikeLevel = SpikeLevel { base_bytes: 32 * MIB, top_bytes: 36 * MIB };

    fn spike() -> TrueSpike {
        TrueSpike {
            mib: 4,
            hold_ms: 5,
            start_ns: 100 * MS,
            top_ns: 102 * MS,
            fall_ns: 107 * MS,
            end_ns: 108 * MS,
            usage: LEVEL,
            resident: SpikeLevel::default(),
        }
    }

    fn curve(readings: &[(u64, u64)]) -> Vec<CgroupReading> {
        readings.iter().map(|(ms, kib)| CgroupReading { boot_ns: ms * MS, bytes: kib << 10 }).collect()
    }

    #[test]
    fn a_spike_is_found_by_its_rise_with_its_errors() {
        let said = curve(&[(50, 32 << 10), (101, 34 << 10), (102, (36 << 10) - 32), (109, (32 << 10) + 16)]);
        let seen = find(&spike(), &LEVEL, &said, QUANTUM).unwrap();
        assert_eq!(seen.peak_error_bytes, 32 << 10);
        assert_eq!((seen.start_error_ns, seen.end_error_ns), (1_000_000, Some(1_000_000)));
    }

    #[test]
    fn too_little_too_late_or_always_high_is_not_found() {
        let low = curve(&[(50, 32 << 10), (102, (34 << 10) - 1)]);
        assert_eq!(find(&spike(), &LEVEL, &low, QUANTUM), None);
        let late = curve(&[(50, 32 << 10), (114, 36 << 10)]);
        assert_eq!(find(&spike(), &LEVEL, &late, QUANTUM), None);
        // the curve was as high before, so it shows the height but no rise
        let high = curve(&[(50, 36 << 10), (102, 36 << 10), (109, 32 << 10)]);
        assert_eq!(find(&spike(), &LEVEL, &high, QUANTUM), None);
        assert_eq!(find(&spike(), &LEVEL, &[], QUANTUM), None);
    }

    #[test]
    fn an_end_that_is_never_told_is_unknown() {
        let said = curve(&[(50, 32 << 10), (102, 36 << 10)]);
        assert_eq!(find(&spike(), &LEVEL, &said, QUANTUM).unwrap().end_error_ns, None);
        let later = curve(&[(50, 32 << 10), (102, 36 << 10), (300, 32 << 10)]);
        assert_eq!(find(&spike(), &LEVEL, &later, QUANTUM).unwrap().end_error_ns, Some(192_000_000));
    }

    #[test]
    fn a_poller_sees_what_it_reads_while_it_lasts() {
        let whole = 4 * MIB;
        let missed = PolledSpike { seen: false, peak_error_bytes: whole };
        assert_eq!(polled(&spike(), &curve(&[(99, 32 << 10), (109, 32 << 10)])), missed);
        let half = PolledSpike { seen: true, peak_error_bytes: whole / 2 };
        assert_eq!(polled(&spike(), &curve(&[(99, 32 << 10), (103, 34 << 10)])), half);
        let below = PolledSpike { seen: false, peak_error_bytes: whole - 1024 };
        assert_eq!(polled(&spike(), &curve(&[(103, (32 << 10) + 1)])), below);
    }
}
