//! A copy of the current state of cgroups and processes, for `/metrics` and the lists over HTTP.
//! The server works on the copy, so it never delays the engine.

use std::cmp::Reverse;

use serde::Serialize;

use crate::Engine;
use crate::world::CgroupRow;

/// Cgroups and processes at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Snapshot {
    /// Time of the last tick, boot clock, nanoseconds.
    pub boot_ns: u64,
    /// Cgroups that are not removed, by id.
    pub cgroups: Vec<CgroupView>,
    /// Live processes with known resident memory, by pid.
    pub processes: Vec<ProcessView>,
}

/// A cgroup in a [`Snapshot`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct CgroupView {
    /// kernfs id.
    pub id: u64,
    /// kernfs id of its parent; null for the root and when unknown.
    pub parent_id: Option<u64>,
    /// Path from the root of the memory hierarchy; null when unknown.
    pub path: Option<String>,
    /// Usage at the last reading.
    pub usage_bytes: Option<u64>,
    /// Hard limit; null when it has none or it is unknown.
    pub limit_bytes: Option<u64>,
    /// Highest usage so far (the kernel's watermark).
    pub peak_bytes: Option<u64>,
    /// Resident anonymous memory of the processes in its subtree, summed.
    pub anon_bytes: u64,
    /// Resident file pages of the processes in its subtree, summed.
    pub file_bytes: u64,
    /// Resident shared memory of the processes in its subtree, summed.
    pub shmem_bytes: u64,
    /// Swap entries of the processes in its subtree, summed.
    pub swap_bytes: u64,
}

/// A process in a [`Snapshot`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ProcessView {
    /// Process id (tgid).
    pub pid: u32,
    /// Start, boot clock, nanoseconds; null when it is known only in clock ticks.
    pub start_boot_ns: Option<u64>,
    /// Name (`comm`), escaped where not printable.
    pub comm: String,
    /// kernfs id of its memory cgroup; null when unknown.
    pub cgroup_id: Option<u64>,
    /// Resident anonymous memory.
    pub anon_bytes: u64,
    /// Resident file pages.
    pub file_bytes: u64,
    /// Resident shared memory.
    pub shmem_bytes: u64,
    /// Swap entries.
    pub swap_bytes: u64,
    /// Highest sum of anon, file and shmem that was seen.
    pub peak_bytes: u64,
}

impl Engine {
    /// Copies the current state. Cost is proportional to the number of cgroups and processes.
    pub fn snapshot(&self) -> Snapshot {
        let mut cgroups = Vec::with_capacity(self.world.cgroups.len());
        cgroups.extend(self.live_cgroups().map(|(id, row)| view(id, row)));
        let live = self.world.processes.iter().filter(|row| row.exited.is_none());
        let mut processes = Vec::with_capacity(self.world.processes.live());
        processes.extend(live.filter_map(|row| {
            let sums = self.world.sums_of(row)?;
            Some(ProcessView {
                pid: row.pid,
                start_boot_ns: row.exact.then_some(row.start_boot_ns),
                comm: row.comm.clone(),
                cgroup_id: row.cgroup,
                anon_bytes: sums.anon,
                file_bytes: sums.file,
                shmem_bytes: sums.shmem,
                swap_bytes: sums.swap,
                peak_bytes: row.peak.unwrap_or(0),
            })
        }));
        Snapshot { boot_ns: self.run.now, cgroups, processes }
    }

    /// Copies at most `most` cgroups whose usage is known: those with a limit first, then by usage, the largest first.
    pub fn foremost_cgroups(&self, most: usize) -> Vec<CgroupView> {
        let mut rows: Vec<_> = self.live_cgroups().filter(|(_, row)| row.last.usage.is_some()).collect();
        rows.sort_by_key(|(_, row)| (row.last.limit.bytes().is_none(), Reverse(row.last.usage)));
        rows.into_iter().take(most).map(|(id, row)| view(id, row)).collect()
    }

    fn live_cgroups(&self) -> impl Iterator<Item = (u64, &CgroupRow)> {
        self.world.cgroups.iter().filter(|(_, row)| !row.removed)
    }
}

fn view(id: u64, row: &CgroupRow) -> CgroupView {
    CgroupView {
        id,
        parent_id: row.parent,
        path: row.path.clone(),
        usage_bytes: row.last.usage,
        limit_bytes: row.last.limit.bytes(),
        peak_bytes: row.last.watermark,
        anon_bytes: row.tree.anon,
        file_bytes: row.tree.file,
        shmem_bytes: row.tree.shmem,
        swap_bytes: row.tree.swap,
    }
}
