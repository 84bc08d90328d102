//! Memory cgroups, read from their file systems.
//!
//! `hierarchy` finds where the memory controller is mounted, on version 1 and 2; `files` reads one
//! cgroup or all of them there; `queries` answers what the engine asks about a cgroup; `oom_kills`
//! reads the kernel's count of kills; `transient` makes the cgroup that a `record` runs its command
//! in.

pub mod files;
pub mod hierarchy;
pub mod oom_kills;
pub mod queries;
pub mod transient;
