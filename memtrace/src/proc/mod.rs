//! What runs on this machine, read from /proc.
//!
//! The hooks tell of changes only, so the processes that were there before are read once, at
//! start. What belongs to one process' stacks is read by the crate `memtrace-unwind`.

pub mod proc_scan;
