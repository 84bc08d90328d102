//! What holds for a whole run: settings, host, clocks and losses. Every room may read it.

use memtrace_incident::Host;

use crate::clock::Clock;
use crate::input::Settings;
use crate::losses::Losses;

/// One run of the tracer, from a start to a stop.
#[derive(Clone, Debug, Default)]
pub(crate) struct Run {
    pub(crate) settings: Settings,
    pub(crate) host: Host,
    pub(crate) clock: Clock,
    /// The last tick, boot clock: everything up to here has been seen.
    pub(crate) now: u64,
    pub(crate) losses: Losses,
}

impl Run {
    /// Where the window of an event begins.
    pub(crate) fn window_start(&self, at_ns: u64) -> u64 {
        at_ns.saturating_sub(self.settings.before_ns)
    }
}
