//! Whether the agent has room for itself.

use memtrace_incident::units;

use crate::cgroup::hierarchy::Hierarchy;
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
    let limited = own.match_indices('/').map(|(end, _)| own.get(..end).unwrap_or_default()).chain([own.as_str()]);
    let read = |path| Some((path, hierarchy.read(path, clock::boot_ns())?.limit_bytes?));
    match smallest(limited.filter_map(read)) {
        Some((path, limit)) if limit < NEEDED_BYTES => Err(CommandError::Unsupported(too_small(path, limit))),
        _ => Ok(()),
    }
}

fn smallest<'a>(limits: impl Iterator<Item = (&'a str, u64)>) -> Option<(&'a str, u64)> {
    limits.min_by_key(|(_, limit)| *limit)
}

fn too_small(path: &str, limit: u64) -> String {
    format!(
        "the agent's own memory cgroup {path} has a limit of {}: a storm of kills would end the agent. It needs {}; \
         {} are comfortable",
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
        assert_eq!(smallest([("/a", 5), ("/a/b", 3), ("/a/b/c", 9)].into_iter()), Some(("/a/b", 3)));
        let said = too_small("/a/b", 64 << 20);
        assert!(["/a/b", "64 MiB", "96 MiB", "128 MiB"].iter().all(|word| said.contains(word)), "{said}");
    }
}
