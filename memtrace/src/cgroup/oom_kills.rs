//! How many processes of each cgroup the OOM killer has killed, as the kernel counts them. It
//! counts whether somebody watches or not.
//!
//! A kill counts for the victim's own cgroup (mm/oom_kill.c, `__oom_kill_process`): `oom_kill` in
//! memory.events.local (5.2 and newer), on version 1 in memory.oom_control. memory.events is no
//! use: there a kill counts for every ancestor too. The counter goes with its cgroup.

use serde::{Deserialize, Serialize};

use super::hierarchy::{Hierarchy, shown};

/// Cgroups that are read, those near the root first: each is a file, and all are read every ten
/// seconds.
const MAX_CGROUPS: usize = 8192;
/// Most bytes of all paths, as JSON has them; what is beyond it is left out. A path can have 4 KiB as text.
const PATH_BYTES_CAP: usize = 2 << 20;

/// A counter that took longer to read is read again: it is not known on which side of the reading a
/// kill in between is.
const READ_NS: u64 = 100_000;
/// How often one is read at most.
const READ_TRIES: usize = 3;

/// The kills of one cgroup.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CgroupOomKills {
    /// kernfs id. It is used again after the cgroup is gone.
    pub id: u64,
    /// Path from the root of the memory hierarchy, escaped where not printable.
    pub path: String,
    /// Kills since the cgroup was made.
    pub kills: u64,
    /// Just before they were read, boot clock, nanoseconds.
    pub read_boot_ns: u64,
    /// Just after, boot clock, nanoseconds; 0 in files of earlier versions.
    #[serde(default)]
    pub read_until_ns: u64,
}

impl CgroupOomKills {
    /// When they were read, at the latest.
    pub fn read_until_ns(&self) -> u64 {
        self.read_until_ns.max(self.read_boot_ns)
    }
}

/// The kills of all cgroups.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct OomKillCounts {
    /// Cgroups with a counter. Cap: 8192, and 2 MiB of paths.
    pub cgroups: Vec<CgroupOomKills>,
    /// Every cgroup there was is in it.
    pub complete: bool,
}

impl Hierarchy {
    /// Reads the counters of all cgroups, each with the time of `boot_ns` just before and after.
    pub fn oom_kills(&self, boot_ns: impl Fn() -> u64) -> OomKillCounts {
        let name = if self.version == 1 { "memory.oom_control" } else { "memory.events.local" };
        let (mut counts, mut bytes) = (OomKillCounts::default(), 0usize);
        counts.complete = self.visit(MAX_CGROUPS, &mut |dir| {
            let path = shown(&self.path_of(&dir.below));
            bytes = bytes.saturating_add(json_bytes(&path));
            if bytes > PATH_BYTES_CAP {
                return false;
            }
            let read = || parse(&dir.read(name)?);
            if let (Some(id), Some((kills, read_boot_ns, read_until_ns))) = (dir.id(), timed(&boot_ns, read)) {
                counts.cgroups.push(CgroupOomKills { id, path, kills, read_boot_ns, read_until_ns });
            }
            true
        });
        counts
    }
}

/// Reads a counter, with the times just before and after, again when that took long.
fn timed(boot_ns: impl Fn() -> u64, read: impl Fn() -> Option<u64>) -> Option<(u64, u64, u64)> {
    let mut best: Option<(u64, u64, u64)> = None;
    for _ in 0..READ_TRIES {
        let (before_ns, kills, after_ns) = (boot_ns(), read()?, boot_ns());
        let took = |(_, before, after): (u64, u64, u64)| after.saturating_sub(before);
        if best.is_none_or(|best| took((kills, before_ns, after_ns)) < took(best)) {
            best = Some((kills, before_ns, after_ns));
        }
        if best.is_some_and(|best| took(best) <= READ_NS) {
            break;
        }
    }
    best
}

fn parse(text: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix("oom_kill "))?.trim().parse().ok()
}

/// Bytes of a text in JSON: names of cgroups may have control characters, each of which takes six.
fn json_bytes(text: &str) -> usize {
    text.bytes().map(|byte| if byte < b' ' || matches!(byte, b'"' | b'\\') { 6 } else { 1 }).sum()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::of_machine;

    #[test]
    fn the_counter_of_the_cgroup_alone_is_read_on_both_versions() {
        for (version, name, text, other) in [
            (1, "memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n", "memory.events.local"),
            (2, "memory.events.local", "low 0\noom 5\noom_kill 3\noom_group_kill 1\n", "memory.events"),
        ] {
            let dir = tempfile::tempdir().unwrap();
            let hierarchy = Hierarchy { version, mount: dir.path().into(), hierarchy_id: 0, root: "/".into() };
            fs::create_dir_all(dir.path().join("a/b")).unwrap();
            fs::write(dir.path().join("a/b").join(name), text).unwrap();
            fs::write(dir.path().join("a").join(other), "oom_kill 9\n").unwrap();
            let counts = hierarchy.oom_kills(|| 7);
            let id = hierarchy.id_of("/a/b").unwrap();
            let found = CgroupOomKills { id, path: "/a/b".into(), kills: 3, read_boot_ns: 7, read_until_ns: 7 };
            assert_eq!(counts, OomKillCounts { cgroups: vec![found], complete: true });
        }
    }

    #[test]
    fn this_machine_s_counters_are_read() {
        let Some(hierarchy) = of_machine::found("a memory controller", Hierarchy::find()) else { return };
        let counts = hierarchy.oom_kills(|| 1);
        let own = hierarchy.own_path().unwrap();
        let has_counter = counts.cgroups.iter().any(|cgroup| cgroup.path == shown(&own));
        let is_root = own == std::path::Path::new("/");
        assert!(has_counter || is_root || hierarchy.dir_of(&own).is_none_or(|dir| !dir.exists()), "{own:?}");
    }

    #[test]
    fn bytes_of_a_path_are_those_of_its_json() {
        for path in ["/a/b", "/a\u{1}\u{1f}", "/a\"\\"] {
            let json = serde_json::to_string(path).unwrap();
            assert!(json_bytes(path) >= json.len() - 2, "{json}");
        }
        assert_eq!(json_bytes("/\u{1}"), 7);
    }

    #[test]
    fn a_counter_that_took_long_is_read_again_and_the_shortest_reading_counts() {
        use std::cell::Cell;
        for (times, expected, reads) in [
            (vec![0, 50], (1, 0, 50), 1),
            (vec![0, READ_NS + 9, 1_000_000, 1_000_005], (2, 1_000_000, 1_000_005), 2),
            (vec![0, 400_000, 1_000_000, 1_300_000, 2_000_000, 2_500_000], (2, 1_000_000, 1_300_000), 3),
        ] {
            let (at, kills) = (Cell::new(0), Cell::new(0));
            let clock = || times[at.replace(at.get() + 1)];
            let read = || Some(kills.replace(kills.get() + 1) + 1);
            assert_eq!(timed(clock, read), Some(expected));
            assert_eq!(kills.get(), reads);
        }
        assert_eq!(timed(|| 1, || None), None);
    }
}
