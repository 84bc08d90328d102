//! Memory cgroups, read from their file systems.
//!
//! `hierarchy` finds where the memory controller is mounted, on version 1 and 2; `files` reads one
//! cgroup or many there; `queries` answers what the engine asks about a cgroup; `asker` looks ids up
//! for it on a thread of its own, `by_id` without a walk where it can; `oom_control` reads whether a
//! cgroup waits for memory, `oom_kills` the kernel's count of kills; `transient` makes the cgroup that
//! a `record` runs its command in.

mod asker;
mod by_id;
pub mod files;
pub mod hierarchy;
mod oom_control;
pub mod oom_kills;
pub mod queries;
pub mod transient;
