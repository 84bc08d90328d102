//! The configuration of one run of the tracer.

use std::path::PathBuf;

use crate::kernel::hooks::Hook;

/// How a [`super::Session`] traces. The command line builds it: defaults and bounds of what a user can set are in
/// `cli::config::settings`, and values outside of those bounds never get here.
#[derive(Clone, Debug)]
pub struct SessionConfig {
    /// File of kernel types to use instead of the running kernel's own.
    pub btf: Option<PathBuf>,
    /// Hooks to leave out.
    pub without: Vec<Hook>,
    /// A process is recorded each time its resident memory has changed by this much, bytes.
    pub rss_threshold_bytes: u64,
    /// History kept from before an incident, nanoseconds.
    pub before_ns: u64,
    /// How long an incident keeps recording after its event, nanoseconds.
    pub after_ns: u64,
    /// Address spaces followed at most.
    pub max_processes: u32,
    /// Size of the samples ring, bytes; a power of two.
    pub samples_ring_bytes: u64,
    /// Size of the stacks ring, bytes; a power of two.
    pub stacks_ring_bytes: u32,
    /// A stack is taken each time a process has grown by this much, bytes.
    pub sample_interval_bytes: u64,
    /// Take stacks of every process; otherwise only of the cgroups passed to [`super::Session::sample`].
    pub sample_all: bool,
    /// Share of one CPU that stacks may cost, parts per million; 0 takes no stacks.
    pub stack_budget_ppm: u64,
    /// Save spikes that ended without a kill.
    pub spikes: bool,
    /// Save limits that were hit without a kill.
    pub near_misses: bool,
    /// Read the kernel log to cross-check kills.
    pub kernel_log: bool,
    /// The journal; `None` for a run that needs no recovery.
    pub journal: Option<JournalConfig>,
}

/// Where the journal is and how large it may get.
#[derive(Clone, Debug, Default)]
pub struct JournalConfig {
    /// Directory of its segments.
    pub dir: PathBuf,
    /// Size of all segments together, bytes.
    pub bytes: u64,
}
