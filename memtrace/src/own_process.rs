//! What this process takes, and may take.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Resident memory of this process, bytes; `None` when /proc does not say.
pub fn resident_bytes() -> Option<u64> {
    let statm = std::fs::read_to_string("/proc/self/statm").ok()?;
    let pages: u64 = statm.split_ascii_whitespace().nth(1)?.parse().ok()?;
    pages.checked_mul(rustix::param::page_size() as u64)
}

/// Lowers a limit of this process for good, and raises none. Best effort.
pub fn lower_limit(resource: Resource, most: u64) {
    let most = getrlimit(resource).maximum.map_or(most, |maximum| maximum.min(most));
    let _ = setrlimit(resource, Rlimit { current: Some(most), maximum: Some(most) });
}
