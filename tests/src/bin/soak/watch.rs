//! Health and memory of the agent.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use memtrace_tests::agent;
use memtrace_tests::process::{self, ProcRss};

use crate::{Yard, figures};

/// Of the thread that asks for health.
const NICENESS: i32 = -15;
const HEALTH_EVERY: Duration = Duration::from_millis(500);
const MEMORY_EVERY: Duration = Duration::from_secs(10);
/// Parts of the time that are told.
const PARTS: usize = 12;

#[derive(Default)]
pub(crate) struct Watch(Mutex<State>);

#[derive(Default)]
struct State {
    health: Vec<Duration>,
    /// Anonymous memory of the recorder and of its stack worker, bytes.
    memory: Vec<[u64; 2]>,
}

impl Watch {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks for health until the end; ends the soak when there is no agent any more.
    pub(crate) fn health(&self, yard: &Yard) {
        // Timed is how soon the agent answers, not how soon this thread gets a CPU beside the attacks. On Linux this is
        // of the thread alone (kernel/sys.c, setpriority).
        if let Err(error) = rustix::process::setpriority_process(None, NICENESS) {
            yard.fault(format!("health cannot be timed: {error}"));
        }
        while !yard.is_over() {
            let begin = Instant::now();
            match agent::get(yard.port, "/healthz") {
                Ok((200, _)) => self.state().health.push(begin.elapsed()),
                Ok((status, _)) => yard.fault(format!("health {status} after {:?}", begin.elapsed())),
                Err(error) => yard.fault(format!("no health after {:?}: {error:#}", begin.elapsed())),
            }
            if ProcRss::read(yard.agent).is_err() {
                yard.fault("the agent is gone".to_owned());
                yard.over.store(true, std::sync::atomic::Ordering::Relaxed);
            }
            yard.rest(HEALTH_EVERY);
        }
    }

    /// Looks at the memory until the end.
    pub(crate) fn memory(&self, yard: &Yard) {
        while !yard.is_over() {
            self.read_memory(yard);
            yard.rest(MEMORY_EVERY);
        }
    }

    /// Looks at the memory.
    fn read_memory(&self, yard: &Yard) {
        let Ok(recorder) = ProcRss::read(yard.agent) else { return };
        let children = process::children(yard.agent).unwrap_or_default().into_iter();
        let worker = children.filter_map(|pid| ProcRss::read(pid).ok()).map(|rss| rss.anon).sum();
        self.state().memory.push([recorder.anon, worker]);
    }

    /// How long health took, and the memory now and at most.
    pub(crate) fn summary(&self) -> String {
        let state = self.state();
        let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        let [recorder, worker] = state.memory.last().copied().unwrap_or_default();
        let most = |part: fn(&[u64; 2]) -> u64| state.memory.iter().map(part).max().unwrap_or_default();
        format!(
            "health {} of {} answers; anonymous memory {:.1} + {:.1} MiB, at most {:.1} and {:.1}",
            figures::spread(state.health.clone()),
            state.health.len(),
            mib(recorder),
            mib(worker),
            mib(most(|[recorder, _]| *recorder)),
            mib(most(|[_, worker]| *worker)),
        )
    }

    /// Medians of equal parts of the time, oldest first.
    pub(crate) fn memory_over_time(&self) -> String {
        let state = self.state();
        let size = state.memory.len().div_ceil(PARTS).max(1);
        let median = |mut values: Vec<u64>| {
            values.sort_unstable();
            figures::quantile(&values, 0.5).unwrap_or_default() as f64 / f64::from(1 << 20)
        };
        let parts = state.memory.chunks(size).map(|chunk| {
            let (recorder, worker) = chunk.iter().map(|[recorder, worker]| (*recorder, *worker)).unzip();
            format!("{:.1}+{:.1}", median(recorder), median(worker))
        });
        parts.collect::<Vec<_>>().join(" ")
    }
}
