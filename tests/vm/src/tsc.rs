//! The rate of the host's time stamp counter, which emulated machines have too.
//!
//! A kernel measures it at boot against another clock, and takes what it gets. On a busy host an emulated CPU stands
//! still in the middle of that: the machine's clock then ran up to seven times too fast for as long as it was on, and
//! whatever had ten seconds had two.

use std::thread;
use std::time::{Duration, Instant};

/// How long is measured: what reading the two clocks takes is little beside it.
const TIME: Duration = Duration::from_millis(200);
/// Readings of which the fastest counts: others were interrupted between the two clocks.
const READINGS: usize = 32;

/// Ticks a millisecond; `None` where machines have no such counter.
pub(crate) fn khz() -> Option<u64> {
    let (begin_ticks, begin) = moment()?;
    thread::sleep(TIME);
    let (end_ticks, end) = moment()?;
    let ticks = u128::from(end_ticks.checked_sub(begin_ticks)?);
    let ns = end.duration_since(begin).as_nanos();
    u64::try_from(ticks.saturating_mul(1_000_000).checked_div(ns)?).ok()
}

/// Both clocks at one moment.
fn moment() -> Option<(u64, Instant)> {
    let reading = |_| {
        let before = ticks()?;
        let now = Instant::now();
        Some((ticks()?.checked_sub(before)?, before, now))
    };
    let (_, before, now) = (0..READINGS).filter_map(reading).min_by_key(|(took, ..)| *took)?;
    Some((before, now))
}

#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code, reason = "there is no safe way to read the counter")]
fn ticks() -> Option<u64> {
    // SAFETY: reads a counter, which every x86-64 CPU has.
    Some(unsafe { core::arch::x86_64::_rdtsc() })
}

#[cfg(not(target_arch = "x86_64"))]
fn ticks() -> Option<u64> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_measurements_agree() {
        let (Some(one), Some(other)) = (khz(), khz()) else { return };
        assert!(one.abs_diff(other) < one / 100, "{one} and {other} kHz");
        assert!((100_000..20_000_000).contains(&one), "{one} kHz");
    }
}
