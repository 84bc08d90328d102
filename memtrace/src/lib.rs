//! memtrace: the memory flight recorder for Linux. See ARCHITECTURE.md for the map.

pub mod agent;
pub mod cgroup;
pub mod cli;
pub mod clock;
pub mod error;
pub mod host;
pub mod kernel;
pub mod process;
pub mod serve;
pub mod session;
pub mod store;
