//! From the records of the STACKS ring to facts for the engine.
//!
//! A stack sample is unwound as soon as it is drained, while its process most likely still runs;
//! `memtrace-unwind` does that, in a process of its own ([`worker`]), because it reads files of other
//! programs. Its kernel frames wait for [`kallsyms`] until [`stack_samples`] reports the whole stack
//! under a number ([`path_numbers`]). [`kernel_stacks`] does the same for the stack of the thread
//! whose failed charge led to a kill. All of that goes to the recorder as [`messages`], which makes the
//! numbers those of the run ([`renumbering`]). Names of functions are in memory once
//! ([`shared_names`]). [`sampling_rate`] decides there how often each cgroup is sampled, so that all
//! of this stays within its CPU budget.

pub mod kallsyms;
pub mod kernel_stacks;
pub mod messages;
pub mod path_numbers;
pub mod renumbering;
pub mod sampling_rate;
pub mod shared_names;
pub mod stack_samples;
pub mod worker;
