//! What a run of the tracer is told, and what a user can get wrong in it.

use std::path::PathBuf;

use crate::kernel::hooks::{Hook, HookNeed};
use memtrace_engine::input::Settings;

/// What a run is told.
#[derive(Clone, Debug)]
pub struct Options {
    /// Kernel type information to use instead of the running kernel's own.
    pub btf: Option<PathBuf>,
    /// Hooks to leave out.
    pub without: Vec<Hook>,
    /// The rss hook's quantum, bytes.
    pub quantum_bytes: u64,
    /// History kept before an incident, nanoseconds.
    pub before_ns: u64,
    /// How long an incident gathers, nanoseconds.
    pub after_ns: u64,
    /// Address spaces followed at most.
    pub max_processes: u32,
    /// Size of the samples ring, bytes.
    pub samples_ring_bytes: u64,
    /// Size of the stacks ring, bytes (a power of two).
    pub stacks_ring_bytes: u32,
    /// Take a stack when a process grew by this much, bytes; 0: take none.
    pub sample_bytes: u64,
    /// Take stacks of every process; else only of the cgroups that [`super::Session::sample`] names.
    pub sample_all: bool,
    /// Parts per million of one CPU's time that stacks may cost; 0: take none.
    pub stack_budget_ppm: u64,
    /// Save spikes that ended without a kill.
    pub spikes: bool,
    /// Save limits that were hit without a kill.
    pub near_misses: bool,
    /// Read the kernel log as a cross-check.
    pub kernel_log: bool,
    /// Directory and size in bytes of the journal; none for a run that needs no recovery.
    pub journal: Option<(PathBuf, u64)>,
}

impl Default for Options {
    fn default() -> Self {
        let settings = Settings::default();
        Self {
            btf: None,
            without: Vec::new(),
            quantum_bytes: settings.rss_threshold_bytes,
            before_ns: settings.before_ns,
            after_ns: settings.after_ns,
            max_processes: 32_768,
            samples_ring_bytes: 4 << 20,
            stacks_ring_bytes: 4 << 20,
            sample_bytes: 512 << 10,
            sample_all: true,
            stack_budget_ppm: 10_000,
            spikes: settings.spikes,
            near_misses: settings.near_misses,
            kernel_log: true,
            journal: None,
        }
    }
}

impl Options {
    /// What a user can get wrong, as a sentence that names the flag.
    pub fn check(&self) -> Result<(), String> {
        let page = rustix::param::page_size() as u64;
        if self.quantum_bytes < 4 * page || self.quantum_bytes > 1 << 30 {
            return Err(format!("quantum: {} bytes is outside {} to 1G", self.quantum_bytes, 4 * page));
        }
        if !self.samples_ring_bytes.is_power_of_two() || !(page..=1 << 30).contains(&self.samples_ring_bytes) {
            return Err(format!(
                "samples_ring: {} is not a power of two between {page} and 1G",
                self.samples_ring_bytes
            ));
        }
        if self.sample_bytes < page || self.sample_bytes > 1 << 30 {
            return Err(format!("sample: {} bytes is outside {page} to 1G", self.sample_bytes));
        }
        if !(1..=4 << 20).contains(&self.max_processes) {
            return Err(format!("max_processes: {} is outside 1 to 4194304", self.max_processes));
        }
        if self.before_ns > 3_600_000_000_000 || self.after_ns > 600_000_000_000 {
            return Err("before and after: at most 1h and 10m".to_owned());
        }
        if let Some((_, bytes)) = &self.journal
            && *bytes < 1 << 20
        {
            return Err("journal_size: at least 1M".to_owned());
        }
        // Charges can tell of memory in place of the rss hook, where they can be hooked.
        let replaced = |hook: &Hook| *hook == Hook::Rss && !self.without.contains(&Hook::Charge);
        match self.without.iter().find(|hook| matches!(hook.need(), HookNeed::Required) && !replaced(hook)) {
            Some(hook) => Err(format!("without: {hook} is needed, memtrace cannot run without it")),
            None => Ok(()),
        }
    }
}
