//! From the records of the STACKS ring to facts for the engine.
//!
//! A stack sample is unwound as soon as it is drained, while its process most likely still runs;
//! `memtrace-unwind` does that. Its kernel frames wait for [`kallsyms`] until the next tick, when
//! [`stack_samples`] reports the whole stack under a number ([`path_numbers`]). [`kernel_stacks`]
//! does the same for the stack of the thread whose failed charge led to a kill. [`sampling_rate`]
//! decides how often each cgroup is sampled, so that all of this stays within its CPU budget.

pub mod kallsyms;
pub mod kernel_stacks;
pub mod path_numbers;
pub mod sampling_rate;
pub mod stack_samples;
