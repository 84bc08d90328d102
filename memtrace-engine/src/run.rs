//! State of a run that every room may read: settings, host, clocks and losses.

use memtrace_incident::Host;

use crate::clock::Clock;
use crate::input::Settings;
use crate::losses::Losses;

/// One run, from [`crate::input::Fact::Start`] to [`crate::input::Fact::Stop`].
#[derive(Clone, Debug, Default)]
pub(crate) struct Run {
    pub(crate) settings: Settings,
    pub(crate) host: Host,
    pub(crate) clock: Clock,
    /// Time of the last tick, boot clock, nanoseconds. Every source has been read up to here.
    pub(crate) now: u64,
    pub(crate) losses: Losses,
}

impl Run {
    /// Where the window of an event at `at_ns` begins, boot clock, nanoseconds.
    pub(crate) fn window_start(&self, at_ns: u64) -> u64 {
        at_ns.saturating_sub(self.settings.before_ns)
    }
}
