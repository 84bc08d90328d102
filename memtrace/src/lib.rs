//! memtrace: the memory flight recorder for Linux. See ARCHITECTURE.md for the map.

pub mod agent;
#[cfg(test)]
mod blessed;
pub mod cgroup;
pub mod cli;
pub mod clock;
pub mod error;
pub mod host;
pub mod kernel;
#[cfg(test)]
mod of_machine;
pub mod own_process;
pub mod proc;
pub mod serve;
pub mod session;
pub mod stacks;
pub mod store;
pub mod symbolize;
