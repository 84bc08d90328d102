//! Processes: taking stock of what already runs.
