//! Processes: taking stock of what already runs, names for addresses.

pub mod kallsyms;
pub mod stock;
