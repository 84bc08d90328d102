//! Processes: taking stock of what already runs, names for kernel addresses.

pub mod kallsyms;
pub mod stock;
pub mod trigger;
