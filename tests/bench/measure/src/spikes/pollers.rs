//! What is used today: the usage of a cgroup, read again and again after a fixed time.

use std::path::Path;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::Context;
use memtrace_tests::process::boot_ns;
use memtrace_tests::random::SeededRandom;

use crate::recorder::CgroupReading;

/// Time between two readings, and who reads so seldom.
pub(super) const PERIODS: [(Duration, &str); 4] = [
    (Duration::from_millis(100), "polled every 100 ms"),
    (Duration::from_secs(1), "every 1 s (node exporter)"),
    (Duration::from_secs(5), "every 5 s (below)"),
    (Duration::from_secs(10), "every 10 s (cAdvisor)"),
];

/// A poller for each period; they end when dropped.
pub(super) struct Pollers {
    /// Nothing is ever sent to a thread: that the sender is gone is the sign to end.
    threads: Vec<(Sender<()>, JoinHandle<Vec<CgroupReading>>)>,
}

impl Pollers {
    /// Starts them, each at a random moment of its first period.
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
                    // Gone with its cgroup: nothing more is to be read.
                    let Some(bytes) = bytes else { break };
                    readings.push(CgroupReading { boot_ns: boot_ns(), bytes });
                }
                readings
            };
            (end, std::thread::spawn(poll))
        });
        Self { threads: threads.into() }
    }

    /// Ends them: what each read, in the order of [`PERIODS`].
    pub(super) fn finish(self) -> anyhow::Result<Vec<Vec<CgroupReading>>> {
        let join = |(end, thread): (Sender<()>, JoinHandle<Vec<CgroupReading>>)| {
            drop(end);
            thread.join().ok().context("a poller panicked")
        };
        self.threads.into_iter().map(join).collect()
    }
}
