//! Decides when a machine is given up: when it makes no progress, measured in the machine's own
//! time.
//!
//! One second of a machine's own time is one second in which the host gave its emulator all the CPU
//! it asked for. If other work takes half of the host, or the host stands still, the machine's own
//! time runs slower or stops, so no verdict depends on the host's load. How fast the emulator
//! itself is shows in the time that the kernel takes to boot; the limits are multiples of that.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

/// Limit until the first line of the console, when the speed of the emulator is not known yet.
const BOOT: Duration = Duration::from_secs(300);

/// A machine that prints nothing for this many boot times, and at least this long, has stopped. A
/// guest that runs tests prints a heartbeat every few seconds.
const SILENT_BOOTS: u32 = 30;
const SILENT_LEAST: Duration = Duration::from_secs(180);

/// The same without a test that begins or ends.
const STUCK_BOOTS: u32 = 100;
const STUCK_LEAST: Duration = Duration::from_secs(600);

/// The same for the whole run.
const ALL_BOOTS: u32 = 600;
const ALL_LEAST: Duration = Duration::from_secs(60 * 60);

/// Meaning of a console line for the watch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Sign {
    /// A heartbeat.
    Alive,
    /// A test, an executable or a benchmark began or ended.
    Progress,
}

/// Watches one machine.
#[derive(Debug, Default)]
pub(crate) struct ProgressWatch {
    /// All times are the machine's own time since it was started.
    now: Duration,
    booted: Option<Duration>,
    heard: Duration,
    progressed: Duration,
    /// Whether a heartbeat has been seen; only then does silence mean something.
    ticks: bool,
}

impl ProgressWatch {
    /// Adds time in which the machine ran.
    pub(crate) fn advance(&mut self, own: Duration) {
        self.now = self.now.saturating_add(own);
    }

    /// Notes a line of the console.
    pub(crate) fn note(&mut self, sign: Sign) {
        self.booted.get_or_insert(self.now);
        self.heard = self.now;
        match sign {
            Sign::Alive => self.ticks = true,
            Sign::Progress => self.progressed = self.now,
        }
    }

    /// The machine's own time since it was started.
    pub(crate) fn own_time(&self) -> Duration {
        self.now
    }

    /// The reason to give the machine up, if there is one.
    pub(crate) fn verdict(&self) -> Option<String> {
        let Some(boot) = self.booted else {
            return (self.now > BOOT).then(|| format!("given up after {} s of its own time", BOOT.as_secs()));
        };
        let over = |since: Duration, boots: u32, least: Duration| {
            let limit = boot.saturating_mul(boots).max(least);
            (self.now.saturating_sub(since) > limit).then_some(limit.as_secs())
        };
        if let Some(limit) = over(self.heard, SILENT_BOOTS, SILENT_LEAST).filter(|_| self.ticks) {
            return Some(format!("given up after {limit} s of its own time without a word"));
        }
        if let Some(limit) = over(self.progressed, STUCK_BOOTS, STUCK_LEAST).filter(|_| self.ticks) {
            return Some(format!("given up after {limit} s of its own time in which no test began or ended"));
        }
        let limit = over(Duration::ZERO, ALL_BOOTS, ALL_LEAST)?;
        Some(format!("given up after {limit} s of its own time in all"))
    }
}

/// CPU time of the threads of a process, from `/proc/PID/task/TID/schedstat`: nanoseconds run and
/// nanoseconds waited for a CPU (Documentation/scheduler/sched-stats.rst).
#[derive(Debug)]
pub(crate) struct EmulatorThreads {
    dir: PathBuf,
    seen: BTreeMap<String, (u64, u64)>,
}

impl EmulatorThreads {
    /// Threads of this process.
    pub(crate) fn of(pid: u32) -> Self {
        Self { dir: PathBuf::from(format!("/proc/{pid}/task")), seen: BTreeMap::new() }
    }

    /// The process' own share of `interval`, the time since the last call: CPU time it got, divided
    /// by CPU time it asked for. All of it if it asked for none or the kernel does not count.
    pub(crate) fn own(&mut self, interval: Duration) -> Duration {
        let mut now = BTreeMap::new();
        for entry in std::fs::read_dir(&self.dir).into_iter().flatten().filter_map(Result::ok) {
            let text = std::fs::read_to_string(entry.path().join("schedstat")).unwrap_or_default();
            let mut numbers = text.split_ascii_whitespace().map(str::parse::<u64>);
            if let (Some(Ok(ran)), Some(Ok(waited))) = (numbers.next(), numbers.next()) {
                now.insert(entry.file_name().to_string_lossy().into_owned(), (ran, waited));
            }
        }
        let (mut ran, mut waited) = (0_u64, 0_u64);
        for (thread, after) in &now {
            let before = self.seen.get(thread).copied().unwrap_or_default();
            ran = ran.saturating_add(after.0.saturating_sub(before.0));
            waited = waited.saturating_add(after.1.saturating_sub(before.1));
        }
        self.seen = now;
        share(interval, ran, waited)
    }
}

fn share(interval: Duration, ran: u64, waited: u64) -> Duration {
    match ran.saturating_add(waited) {
        0 => interval,
        asked => interval.mul_f64(ran as f64 / asked as f64),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    /// A machine that took `boot` seconds to boot.
    fn booted(boot: u64) -> ProgressWatch {
        let mut watch = ProgressWatch::default();
        watch.advance(s(boot));
        watch.note(Sign::Progress);
        watch
    }

    #[test]
    fn a_machine_that_never_speaks_is_given_up() {
        let mut watch = ProgressWatch::default();
        watch.advance(BOOT);
        assert_eq!(watch.verdict(), None);
        watch.advance(s(1));
        assert!(watch.verdict().is_some_and(|why| why.contains("300 s")));
    }

    #[test]
    fn silence_counts_where_a_guest_says_that_it_is_there_and_longer_where_it_booted_slowly() {
        for (boot, silent) in [(1, 180), (20, 600)] {
            let mut watch = booted(boot);
            watch.note(Sign::Alive);
            watch.advance(s(silent));
            assert_eq!(watch.verdict(), None);
            watch.advance(s(1));
            assert!(watch.verdict().is_some_and(|why| why.contains("without a word")));
        }
        let mut benchmark = booted(1);
        benchmark.advance(s(1000));
        assert_eq!(benchmark.verdict(), None, "a benchmark says nothing until it ends");
    }

    #[test]
    fn a_guest_that_is_there_and_a_test_that_is_not_is_given_up() {
        let mut watch = booted(2);
        for _ in 0..60 {
            watch.advance(s(10));
            watch.note(Sign::Alive);
            assert_eq!(watch.verdict(), None);
        }
        watch.advance(s(1));
        assert!(watch.verdict().is_some_and(|why| why.contains("no test")));
        watch.note(Sign::Progress);
        assert_eq!(watch.verdict(), None);
    }

    #[test]
    fn there_is_an_end_to_everything() {
        let mut watch = booted(10);
        for _ in 0..600 {
            watch.advance(s(10));
            watch.note(Sign::Progress);
        }
        assert!(watch.verdict().is_some_and(|why| why.contains("in all")));
    }

    #[test]
    fn time_is_a_machines_own_as_far_as_it_got_what_it_asked_for() {
        assert_eq!(share(s(10), 0, 0), s(10));
        assert_eq!(share(s(10), 5, 0), s(10));
        assert_eq!(share(s(10), 5, 5), s(5));
        assert_eq!(share(s(10), 0, 5), s(0));
        let mut threads = EmulatorThreads::of(std::process::id());
        threads.own(s(1));
        assert!(!threads.seen.is_empty(), "this kernel counts no time of threads");
        assert!(threads.own(s(1)) <= s(1));
        assert_eq!(EmulatorThreads::of(u32::MAX).own(s(1)), s(1));
    }
}
