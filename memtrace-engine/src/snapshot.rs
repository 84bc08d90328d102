//! What is known right now, for metrics and the lists over HTTP: a pure view.

use serde::Serialize;

use crate::Engine;

/// Everything known at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Snapshot {
    /// Boot clock of the last tick.
    pub boot_ns: u64,
    /// Cgroups that exist, by id.
    pub cgroups: Vec<CgroupView>,
    /// Live processes whose memory is known, by pid.
    pub processes: Vec<ProcessView>,
}

/// A cgroup.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct CgroupView {
    /// kernfs id.
    pub id: u64,
    /// kernfs id of its parent.
    pub parent_id: Option<u64>,
    /// Path, when known.
    pub path: Option<String>,
    /// Last usage read.
    pub usage_bytes: Option<u64>,
    /// Limit, when it has one.
    pub limit_bytes: Option<u64>,
    /// The kernel's watermark.
    pub peak_bytes: Option<u64>,
    /// Resident anonymous memory of its processes and of those below it.
    pub anon_bytes: u64,
    /// Their resident file pages.
    pub file_bytes: u64,
    /// Their resident shared memory.
    pub shmem_bytes: u64,
    /// Their swapped-out pages.
    pub swap_bytes: u64,
}

/// A process.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ProcessView {
    /// Process id.
    pub pid: u32,
    /// Start, boot clock; null when only known to the clock tick.
    pub start_boot_ns: Option<u64>,
    /// Name.
    pub comm: String,
    /// kernfs id of its memory cgroup.
    pub cgroup_id: Option<u64>,
    /// Resident anonymous memory.
    pub anon_bytes: u64,
    /// Resident file pages.
    pub file_bytes: u64,
    /// Resident shared memory.
    pub shmem_bytes: u64,
    /// Swapped out.
    pub swap_bytes: u64,
    /// Highest sum of anon, file and shmem seen.
    pub peak_bytes: u64,
}

impl Engine {
    /// What is known right now.
    pub fn snapshot(&self) -> Snapshot {
        let cgroups = self.world.cgroups.iter().filter(|(_, row)| !row.removed).map(|(id, row)| CgroupView {
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
        });
        let live = self.world.processes.iter().filter(|row| row.exited.is_none());
        let processes = live.filter_map(|row| {
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
        });
        Snapshot { boot_ns: self.run.now, cgroups: cgroups.collect(), processes: processes.collect() }
    }
}
