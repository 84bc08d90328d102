//! How long a test waits for what has to come. It only says when a test that fails gives up: what comes is seen at once.

use std::time::{Duration, Instant};

/// How many times slower this machine is than one that tests were written on: set by the first process of an emulated
/// machine, by how long it took to boot.
pub const SLOWNESS: &str = "MEMTRACE_TESTS_SLOWNESS";

/// Of a slower machine than that nothing is waited for.
const MOST: f64 = 100.0;

/// A wait with an end.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    begin: Instant,
    limit: Duration,
}

impl Patience {
    /// So long on the machine that tests were written on.
    pub fn of(limit: Duration) -> Self {
        Self { begin: Instant::now(), limit: scaled(limit, std::env::var(SLOWNESS).ok().as_deref()) }
    }

    /// Nothing more is to be waited for.
    pub fn is_over(&self) -> bool {
        self.begin.elapsed() > self.limit
    }

    /// All of the wait.
    pub fn limit(&self) -> Duration {
        self.limit
    }
}

fn scaled(limit: Duration, slowness: Option<&str>) -> Duration {
    let slowness = slowness.and_then(|slowness| slowness.parse::<f64>().ok()).filter(|slowness| slowness.is_finite());
    limit.mul_f64(slowness.unwrap_or(1.0).clamp(1.0, MOST))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slow_machine_is_waited_for_longer_and_none_shorter() {
        let ten = Duration::from_secs(10);
        assert_eq!(scaled(ten, None), ten);
        assert_eq!(scaled(ten, Some("2.5")), Duration::from_secs(25));
        for nonsense in ["0.1", "-3", "NaN", "x", ""] {
            assert_eq!(scaled(ten, Some(nonsense)), ten);
        }
        assert_eq!(scaled(ten, Some("1e9")), ten.mul_f64(MOST));
        assert!(Patience::of(Duration::ZERO).limit().is_zero() && !Patience::of(ten).is_over());
    }
}
