//! memtrace: the memory flight recorder for Linux. See ARCHITECTURE.md for the map.

pub mod engine;
