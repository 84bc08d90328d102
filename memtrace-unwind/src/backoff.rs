//! Pauses between readings that may be in vain.

use std::time::{Duration, Instant};

/// When something may be read again: after a short pause at first, then after pauses that double
/// up to a longest one.
#[derive(Debug, Default)]
pub(crate) struct Backoff {
    last: Option<Instant>,
    times: u32,
}

impl Backoff {
    pub(crate) fn is_due(&self, first: Duration, longest: Duration) -> bool {
        let pause = first.saturating_mul(1 << self.times.min(16)).min(longest);
        self.last.is_none_or(|last| last.elapsed() >= pause)
    }

    pub(crate) fn note(&mut self) {
        self.last = Some(Instant::now());
        self.times = self.times.saturating_add(1);
    }
}
