//! Memory cgroups, read from their file systems.
//!
//! `hierarchy` finds where the memory controller is mounted, on version 1 and 2; `files` reads one
//! cgroup or all of them there; `queries` answers what the engine asks about a cgroup; `asker`
//! looks up ids for it on a thread of its own; `transient` makes the cgroup that a `record` runs its
//! command in.

mod asker;
pub mod files;
pub mod hierarchy;
pub mod queries;
pub mod transient;
