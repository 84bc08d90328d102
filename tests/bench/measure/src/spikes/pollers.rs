//! What people use today: reading a cgroup's usage at fixed intervals.

use std::path::Path;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::Context;
use memtrace_tests::process::boot_ns;
use memtrace_tests::random::SeededRandom;

use crate::recorder::CgroupReading;

/// Intervals, and the tools that use them.
pub(super) const PERIODS: [(Duration, &str); 4] = [
    (Duration::from_millis(100), "polled every 100 ms"),
    (Duration::from_secs(1), "every 1 s (node exporter)"),
    (Duration::from_secs(5), "every 5 s (below)"),
    (Duration::from_secs(10), "every 10 s (cAdvisor)"),
];

/// A poller for each interval; stopped when dropped.
pub(super) struct Pollers {
    /// Nothing is sent to the threads: a dropped sender tells them to stop.
    threads: Vec<(Sender<()>, JoinHandle<Vec<CgroupReading>>)>,
}

impl Pollers {
    /// Starts them, each at a random time within its first interval.
    pub(super) fn start(usage_file: &Path, random: &mut SeededRandom) -> Self {
        let threads = PERIODS.map(|(period, _)| {
            let first = Duration::from_micros(random.between(0, u64::try_from(period.as_micros()).unwrap_or(u64::MAX)));
            let (end, ended) = channel::<()>();
            let file = usage_file.to_owned();
            let poll = move || {
                let (mut readings, mut next) = (Vec::new(), Instant::now() + first);
                while let Err(RecvTimeoutError::Timeout) =
                    ended.recv_timeout(next.saturating_duration_since(Instant::now()))
                {
                    next += period;
                    let bytes = std::fs::read_to_string(&file).ok().and_then(|text| text.trim().parse().ok());
                    // the cgroup is gone: there is nothing more to read
                    let Some(bytes) = bytes else { break };
                    readings.push(CgroupReading { boot_ns: boot_ns(), bytes });
                }
                readings
            };
            (end, std::thread::spawn(poll))
        });
        Self { threads: threads.into() }
    }

    /// Stops them. Returns the readings of each, in the order of [`PERIODS`].
    pub(super) fn finish(self) -> anyhow::Result<Vec<Vec<CgroupReading>>> {
        let join = |(end, thread): (Sender<()>, JoinHandle<Vec<CgroupReading>>)| {
            drop(end);
            thread.join().ok().context("a poller panicked")
        };
        self.threads.into_iter().map(join).collect()
    }
}
