//! Threads that read what may never answer.
//!
//! A reading of somebody's file, or of /proc/PID/maps while that process holds its own address
//! space locked, cannot be interrupted. So it is done by a thread that is given up when it is late:
//! it ends when it can, and the next reading gets another thread.

use std::sync::Arc;
use std::sync::atomic::{AtomicI32, AtomicUsize, Ordering};
use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use crate::proc_dir::wants_to_run;

/// Stack of a thread; ELF files are parsed without recursion.
const STACK_BYTES: usize = 256 << 10;
/// Time between two looks at a thread that is late.
const LOOK: Duration = Duration::from_millis(50);
/// A thread that computes, or has no CPU, is late after so many times the limit.
const BUSY_FACTOR: u32 = 10;

type Job = Box<dyn FnOnce() + Send>;

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Readers {
    idle: Option<Reader>,
    /// Threads that were given up and have not ended.
    late: Arc<AtomicUsize>,
}

#[derive(Debug)]
struct Reader {
    jobs: SyncSender<Job>,
    /// 0: it has not begun.
    tid: Arc<AtomicI32>,
}

impl Reader {
    fn start(late: &Arc<AtomicUsize>) -> Option<Self> {
        let (jobs, to_do) = sync_channel::<Job>(1);
        let (tid, late) = (Arc::new(AtomicI32::new(0)), late.clone());
        let told = tid.clone();
        let run = move || {
            told.store(rustix::thread::gettid().as_raw_nonzero().get(), Ordering::Relaxed);
            to_do.iter().for_each(|job| job());
            // Nobody gives it jobs any more: it was given up.
            let _ = late.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |late| late.checked_sub(1));
        };
        thread::Builder::new().name("reader".to_owned()).stack_size(STACK_BYTES).spawn(run).ok()?;
        Some(Self { jobs, tid })
    }

    /// Whether it has not begun, or see [`wants_to_run`].
    fn wants_to_run(&self) -> bool {
        let tid = self.tid.load(Ordering::Relaxed);
        tid == 0 || wants_to_run(format!("/proc/self/task/{tid}"))
    }
}

impl Readers {
    /// Does it, and waits for it for `limit`, longer while it computes. `None`: it is late.
    pub(crate) fn run<T: Send + 'static>(
        &mut self,
        limit: Duration,
        read: impl FnOnce() -> T + Send + 'static,
    ) -> Option<T> {
        let Some(reader) = self.idle.take().or_else(|| Reader::start(&self.late)) else { return Some(read()) };
        let (answer, answered) = sync_channel(1);
        let job = Box::new(move || drop(answer.send(read())));
        reader.jobs.send(job).ok()?;
        let begin = Instant::now();
        loop {
            match answered.recv_timeout(LOOK) {
                Ok(found) => {
                    self.idle = Some(reader);
                    return Some(found);
                }
                // It has ended over it.
                Err(RecvTimeoutError::Disconnected) => return None,
                Err(RecvTimeoutError::Timeout) => {}
            }
            let elapsed = begin.elapsed();
            if elapsed >= limit.saturating_mul(BUSY_FACTOR) || (elapsed >= limit && !reader.wants_to_run()) {
                self.late.fetch_add(1, Ordering::Relaxed);
                return None;
            }
        }
    }

    /// Threads that were given up and have not ended.
    pub(crate) fn late(&self) -> usize {
        self.late.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_late_is_given_up_and_ends_when_it_can() {
        let mut readers = Readers::default();
        let (go_on, wait) = sync_channel::<()>(1);
        assert_eq!(readers.run(Duration::ZERO, || 5), Some(5));
        assert_eq!(readers.run(Duration::ZERO, move || wait.recv().is_ok()), None);
        assert_eq!(readers.late(), 1);
        assert_eq!(readers.run(Duration::ZERO, || 6), Some(6), "by another thread");
        go_on.send(()).unwrap();
        while readers.late() > 0 {
            thread::yield_now();
        }
    }

    #[test]
    fn who_computes_has_more_time() {
        let mut readers = Readers::default();
        let compute = || {
            let begin = Instant::now();
            (0..u64::MAX).take_while(|_| begin.elapsed() < 3 * LOOK).count()
        };
        assert!(readers.run(LOOK, compute).is_some());
    }
}
