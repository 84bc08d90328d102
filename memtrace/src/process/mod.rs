//! Processes: taking stock of what already runs.

pub mod stock;
