//! How long a test waits for an event before it fails. A passing test never waits this long: it polls and continues at
//! once when the event comes. Limits are scaled up on slow (emulated) machines.

use std::time::{Duration, Instant};

/// Environment variable: how many times slower this machine is than the one that limits were chosen on. Set by process 1
/// of an emulated machine from the time it took to boot.
pub const SLOWNESS: &str = "MEMTRACE_TESTS_SLOWNESS";

/// Largest factor by which limits are scaled.
const MOST: f64 = 100.0;

/// A point in time after which a test gives up.
#[derive(Debug, Clone, Copy)]
pub struct Deadline {
    begin: Instant,
    limit: Duration,
}

impl Deadline {
    /// `limit` from now, scaled by [`SLOWNESS`].
    pub fn after(limit: Duration) -> Self {
        Self { begin: Instant::now(), limit: scaled(limit, std::env::var(SLOWNESS).ok().as_deref()) }
    }

    /// Whether the time is up.
    pub fn has_passed(&self) -> bool {
        self.begin.elapsed() > self.limit
    }

    /// The whole time allowed, scaled.
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
    fn limits_grow_on_slow_machines_and_never_shrink() {
        let ten = Duration::from_secs(10);
        assert_eq!(scaled(ten, None), ten);
        assert_eq!(scaled(ten, Some("2.5")), Duration::from_secs(25));
        for nonsense in ["0.1", "-3", "NaN", "x", ""] {
            assert_eq!(scaled(ten, Some(nonsense)), ten);
        }
        assert_eq!(scaled(ten, Some("1e9")), ten.mul_f64(MOST));
        assert!(Deadline::after(Duration::ZERO).limit().is_zero() && !Deadline::after(ten).has_passed());
    }
}
