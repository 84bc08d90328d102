//! Whether the agent has room for itself.

use std::path::Path;

use memtrace_incident::units;

use crate::cgroup::hierarchy::{Hierarchy, shown};
use crate::clock;
use crate::error::CommandError;

/// What the agent, the stack worker, the eBPF maps and the symbolizer take in a storm of kills.
/// With less the OOM killer would take the agent when it is needed.
const NEEDED_BYTES: u64 = 96 << 20;
/// With this there is room for what else may come: large incidents, programs with much unwind
/// information.
const COMFORTABLE_BYTES: u64 = 128 << 20;

/// An error if a memory cgroup of the agent has a limit that is too low for it.
pub(super) fn check() -> Result<(), CommandError> {
    // Without a hierarchy nothing limits the agent, and tracing says what is wrong.
    let Ok(hierarchy) = Hierarchy::find() else { return Ok(()) };
    let own = hierarchy.own_path().unwrap_or_default();
    let read = |path| Some((path, hierarchy.read(path, clock::boot_ns())?.limit_bytes?));
    match smallest(own.ancestors().filter_map(read)) {
        Some((path, limit)) if limit < NEEDED_BYTES => Err(CommandError::Unsupported(too_small(path, limit))),
        _ => Ok(()),
    }
}

fn smallest<'a>(limits: impl Iterator<Item = (&'a Path, u64)>) -> Option<(&'a Path, u64)> {
    limits.min_by_key(|(_, limit)| *limit)
}

fn too_small(path: &Path, limit: u64) -> String {
    format!(
        "the agent's own memory cgroup {} has a limit of {}: a storm of kills would end the agent. It needs {}; \
         {} are comfortable",
        shown(path),
        units::bytes(limit),
        units::bytes(NEEDED_BYTES),
        units::bytes(COMFORTABLE_BYTES)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_smallest_limit_counts_and_what_is_needed_is_said() {
        let limits = [("/a/b/c", 9), ("/a/b", 3), ("/a", 5)].map(|(path, limit)| (Path::new(path), limit));
        assert_eq!(smallest(limits.into_iter()), Some((Path::new("/a/b"), 3)));
        let said = too_small(Path::new("/a/b"), 64 << 20);
        assert!(["/a/b", "64 MiB", "96 MiB", "128 MiB"].iter().all(|word| said.contains(word)), "{said}");
    }
}
