//! The clocks: boot-clock nanoseconds inside, one anchor to wall time.

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

use crate::engine::input::Fact;

/// Readings of which the tightest becomes the anchor.
const ATTEMPTS: usize = 5;

/// CLOCK_BOOTTIME in nanoseconds: the clock of every kernel record.
pub fn boot_ns() -> u64 {
    nanoseconds(ClockId::Boottime).try_into().unwrap_or(0)
}

/// CPU time of the running thread.
pub fn cpu_time() -> Duration {
    let nanoseconds = nanoseconds(ClockId::ThreadCPUTime).try_into();
    nanoseconds.map_or(Duration::ZERO, Duration::from_nanos)
}

/// Reads wall time between two readings of the boot clock; half their distance is the uncertainty.
pub fn anchor() -> Fact {
    let (before, wall, after) = (0..ATTEMPTS)
        .map(|_| (boot_ns(), nanoseconds(ClockId::Realtime), boot_ns()))
        .min_by_key(|(before, _, after)| after.saturating_sub(*before))
        .unwrap_or_default();
    let width = after.saturating_sub(before);
    Fact::Anchor {
        boot_ns: before.saturating_add(width / 2),
        wall_ns: wall.try_into().unwrap_or(i64::MAX),
        uncertainty_ns: width.div_ceil(2),
    }
}

fn nanoseconds(clock: ClockId) -> i128 {
    let now = clock_gettime(clock);
    i128::from(now.tv_sec) * 1_000_000_000 + i128::from(now.tv_nsec)
}
