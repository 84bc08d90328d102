//! What a run leaves for the next: until when it watched, and what the kernel had counted and
//! logged by then. From this the next run knows what happened in between ([`super::unwatched`]).
//!
//! It is a small file in the state directory, replaced every ten seconds, or less often with
//! thousands of cgroups. It is not synced: a power failure can cost it, and then the next run
//! claims nothing.

use std::io::Read;
use std::path::Path;

use anyhow::Context;
use serde::{Deserialize, Serialize};

use crate::cgroup::oom_kills::OomKillCounts;
use crate::store::{atomic, own_dir};
use memtrace_incident::Moment;

const FILE: &str = "watched.json";
const FILE_MODE: u32 = 0o640;
/// Longest file that is read, bytes. With the caps of [`OomKillCounts`] it is less than half of it.
const MAX_BYTES: u64 = 8 << 20;

/// What a run leaves for the next.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct WatchState {
    /// The run watched at least until then.
    pub(super) watched_until: Moment,
    /// From where on kills are to be accounted for; `None` when the run was too short to know.
    pub(super) baseline: Option<Baseline>,
}

/// Kills up to here are accounted for: what came later is to be found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Baseline {
    /// Boot that everything here is of.
    pub(super) boot_id: String,
    /// When this was read, boot clock, nanoseconds.
    pub(super) since_boot_ns: u64,
    /// First record of the kernel log that was not read; `None` when the log was not read.
    pub(super) kernel_log_seq: Option<u64>,
    /// Kills of each cgroup by then.
    pub(super) counts: OomKillCounts,
}

impl Baseline {
    /// At the beginning of a boot nothing was logged, and there was no cgroup.
    pub(super) fn of_boot(boot_id: &str) -> Self {
        let counts = OomKillCounts { cgroups: Vec::new(), complete: true };
        Self { boot_id: boot_id.to_owned(), since_boot_ns: 0, kernel_log_seq: Some(0), counts }
    }

    /// Nothing is known but the time.
    pub(super) fn at(from: &Moment) -> Self {
        Self { boot_id: from.boot_id.clone(), since_boot_ns: from.boot_ns, ..Self::default() }
    }
}

impl WatchState {
    /// What the run before left in `dir`; `None` when there was none.
    pub(super) fn read(dir: &Path) -> anyhow::Result<Option<Self>> {
        let path = dir.join(FILE);
        let file = match own_dir::read(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            file => file.with_context(|| format!("failed to open {}", path.display()))?,
        };
        let mut bytes = Vec::new();
        let failed = || format!("failed to read {}", path.display());
        file.take(MAX_BYTES).read_to_end(&mut bytes).with_context(failed)?;
        serde_json::from_slice(&bytes).map(Some).with_context(failed)
    }

    /// Leaves this in `dir`.
    pub(super) fn write(&self, dir: &Path) -> anyhow::Result<()> {
        let path = dir.join(FILE);
        let bytes = serde_json::to_vec(self).context("failed to write JSON")?;
        atomic::replace(&path, &bytes, FILE_MODE).with_context(|| format!("failed to write {}", path.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cgroup::oom_kills::CgroupOomKills;

    #[test]
    fn a_state_comes_back_and_one_that_is_broken_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(WatchState::read(dir.path()).unwrap(), None);
        let cgroup = CgroupOomKills { id: 7, path: "/a".into(), kills: 3, read_boot_ns: 5, read_until_ns: 6 };
        let counts = OomKillCounts { cgroups: vec![cgroup], complete: true };
        let baseline = Baseline { boot_id: "b".into(), since_boot_ns: 4, kernel_log_seq: Some(9), counts };
        let watched_until = Moment { boot_id: "b".into(), boot_ns: 6, wall: "2026-03-01T03:12:45Z".into() };
        let state = WatchState { watched_until, baseline: Some(baseline) };
        for _ in 0..2 {
            state.write(dir.path()).unwrap();
            assert_eq!(WatchState::read(dir.path()).unwrap().as_ref(), Some(&state));
        }
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
        std::fs::write(dir.path().join(FILE), "").unwrap();
        assert!(format!("{:#}", WatchState::read(dir.path()).unwrap_err()).contains("watched.json"));
    }
}
