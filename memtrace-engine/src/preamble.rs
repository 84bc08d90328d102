//! The preamble: facts at the head of a journal segment with which an empty engine can continue
//! where this one is. A bounded journal drops its oldest segments, and a replay of the rest still
//! has paths, names and sizes. Curves are not part of it.

use crate::Engine;
use crate::input::{CgroupFound, Fact, KernelLogEvent, KernelLogLine, ProcessFound};

impl Engine {
    /// The facts of the preamble at `boot_ns`: start, anchor, loss totals, cgroups, live processes,
    /// stuck cgroups and the recording. Applied to this engine they change nothing. Empty after a
    /// stop.
    pub fn preamble(&self, boot_ns: u64) -> Vec<Fact> {
        let mut facts = Vec::new();
        if self.stopped {
            return facts;
        }
        if self.started {
            facts.push(Fact::Start { host: self.run.host.clone(), settings: self.run.settings.clone() });
        }
        if let Some(a) = self.run.clock.anchor {
            facts.push(Fact::Anchor { boot_ns: a.boot_ns, wall_ns: a.wall_ns, uncertainty_ns: a.uncertainty_ns });
        }
        let totals = self.run.losses.last_totals();
        if !totals.is_empty() {
            facts.push(Fact::Losses { totals });
        }
        if self.oom.log_is_unreadable() {
            let line = KernelLogEvent::Unreadable;
            facts.push(Fact::KernelLog(KernelLogLine { printk_ns: 0, read_boot_ns: boot_ns, line }));
        }
        let cgroups = self.world.cgroups.iter().filter(|(_, row)| !row.removed);
        facts.extend(cgroups.filter_map(|(id, row)| {
            Some(Fact::Cgroup(CgroupFound {
                id,
                parent_id: row.parent,
                path: row.path.clone()?,
                boot_ns,
                // Without usage the fact identifies the cgroup and is no reading.
                usage_bytes: None,
                limit_bytes: row.last.limit.bytes(),
                peak_bytes: row.last.watermark,
            }))
        }));
        let live = self.world.processes.iter().filter(|row| row.exited.is_none());
        facts.extend(live.map(|row| {
            let sums = self.world.sums_of(row).unwrap_or_default();
            Fact::Process(ProcessFound {
                pid: row.pid,
                parent_pid: row.parent_pid,
                start_ticks: row.start_ticks,
                comm: row.comm.clone(),
                cgroup_id: row.cgroup.unwrap_or(0),
                boot_ns,
                anon_bytes: sums.anon,
                file_bytes: sums.file,
                shmem_bytes: sums.shmem,
                swap_bytes: sums.swap,
                peak_bytes: row.peak.unwrap_or(0),
            })
        }));
        facts.extend(self.limits.facts(&self.world));
        if let Some(r) = &self.recording {
            let s = &r.subject;
            let (cgroup_id, pid, command) = (s.cgroup_id, s.pid, s.command.clone());
            facts.push(Fact::RecordingBegin { cgroup_id, pid, command, boot_ns: s.boot_ns });
        }
        facts
    }
}
