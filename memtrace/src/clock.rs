//! The clocks: nanoseconds of the boot clock everywhere inside, one anchor that ties them to wall
//! time, and the timer that ticks.
//!
//! Records carry CLOCK_BOOTTIME (`bpf_ktime_get_boot_ns`), which goes on in suspend and is never
//! set. Wall time is set and corrected, so it is computed only where a person reads it: wall = boot
//! + (anchor wall - anchor boot).

use std::io;
use std::time::Duration;

use rustix::time::{
    ClockId, Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, clock_gettime, timerfd_create,
    timerfd_settime,
};
use tokio::net::unix::pipe::Receiver;

use memtrace_engine::input::Fact;

/// Readings of both clocks, of which the one with the least uncertainty becomes the anchor.
const ATTEMPTS: usize = 5;

/// CLOCK_BOOTTIME now, nanoseconds: the clock of every kernel record.
pub fn boot_ns() -> u64 {
    nanoseconds(ClockId::Boottime).try_into().unwrap_or(0)
}

/// CLOCK_MONOTONIC_RAW now, nanoseconds: it goes like printk's clock, without the corrections of
/// NTP, and stands still in suspend.
pub fn raw_ns() -> u64 {
    nanoseconds(ClockId::MonotonicRaw).try_into().unwrap_or(0)
}

/// The wall time of a moment of this boot, by how long ago it was.
pub fn wall_at(at_boot_ns: u64) -> String {
    let wall_ns = nanoseconds(ClockId::Realtime) - nanoseconds(ClockId::Boottime) + i128::from(at_boot_ns);
    format!("{:.9}", jiff::Timestamp::from_nanosecond(wall_ns).unwrap_or(jiff::Timestamp::MAX))
}

/// CPU time that the running thread has used.
pub fn cpu_time() -> Duration {
    Duration::from_nanos(nanoseconds(ClockId::ThreadCPUTime).try_into().unwrap_or(0))
}

/// CPU time that all threads of this process have used, also those that ended, nanoseconds.
pub fn process_cpu_ns() -> u64 {
    nanoseconds(ClockId::ProcessCPUTime).try_into().unwrap_or(0)
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

/// Ticks at a steady pace; ticks that were missed count as one.
///
/// It is a timerfd. tokio's timer needs three wake-ups for each tick, one of its driver and two of
/// the thread, which is most of what an idle agent costs.
#[derive(Debug)]
pub struct Ticker(Receiver);

impl Ticker {
    /// The first tick comes after one period. Must run inside a tokio runtime.
    pub fn every(period: Duration) -> io::Result<Self> {
        let timer = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC)?;
        let period = Timespec::try_from(period).map_err(io::Error::other)?;
        timerfd_settime(&timer, TimerfdTimerFlags::empty(), &Itimerspec { it_interval: period, it_value: period })?;
        // A timerfd is polled and read like the reading end of a pipe, which is all that this type
        // does.
        Ok(Self(Receiver::from_owned_fd_unchecked(timer)?))
    }

    /// Waits for the next tick.
    pub async fn tick(&mut self) {
        let mut expirations = [0; 8];
        loop {
            // An error means that the runtime is shut down, and then nobody waits.
            if self.0.readable().await.is_err() {
                return std::future::pending().await;
            }
            if self.0.try_read(&mut expirations).is_ok() {
                return;
            }
        }
    }
}

fn nanoseconds(clock: ClockId) -> i128 {
    let now = clock_gettime(clock);
    i128::from(now.tv_sec) * 1_000_000_000 + i128::from(now.tv_nsec)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(flavor = "current_thread")]
    async fn ticks_come_again_also_after_some_were_missed() {
        let mut ticker = Ticker::every(Duration::from_millis(1)).unwrap();
        ticker.tick().await;
        std::thread::sleep(Duration::from_millis(10));
        for _ in 0..3 {
            ticker.tick().await;
        }
    }
}
