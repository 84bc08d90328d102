//! Queries that incidents are built from: the processes of a cgroup's subtree, their growth, and
//! mapping calls. Results are sorted, so that they do not depend on the order of the tables.

use memtrace_incident::{Growth, MappingNote, TaskRow};

use super::Sums;
use super::World;
use super::{ProcessKey, ProcessRow};

/// Rows of the growth table of an incident; those that grew least are left out.
pub(crate) const GROWTH_CAP: usize = 64;
/// Victims listed in one incident; further ones are counted.
pub(crate) const VICTIMS_CAP: usize = 1024;
/// Rows of the task table of an incident, without rows that were added for a marked victim. The
/// smallest are left out and counted.
pub(crate) const TASKS_CAP: usize = 1024;

impl World {
    /// Whether a process is in the subtree of `root`. With `None` every process is.
    pub(crate) fn in_scope(&self, row: &ProcessRow, root: Option<u64>) -> bool {
        match (root, row.cgroup) {
            (None, _) => true,
            (Some(root), Some(id)) => self.cgroups.in_tree(id, root),
            (Some(_), None) => false,
        }
    }

    /// Live processes of the subtree of `root` (of the machine for `None`), largest first, and how
    /// many were left out.
    pub(crate) fn tasks(&self, root: Option<u64>) -> (Vec<TaskRow>, u64) {
        let mut rows: Vec<TaskRow> = self
            .processes
            .iter()
            .filter(|row| row.exited.is_none() && self.in_scope(row, root))
            .filter_map(|row| self.sums_of(row).map(|sums| task_row(row, &sums)))
            .collect();
        rows.sort_by_key(|t| (std::cmp::Reverse(resident(t)), t.pid, t.start_boot_ns));
        let left_out = rows.len().saturating_sub(TASKS_CAP);
        rows.truncate(TASKS_CAP);
        (rows, left_out as u64)
    }

    /// How much processes grew up to a moment, largest growth of the last second first.
    pub(crate) fn growth(&self, at_ns: u64, include: impl Fn(&ProcessRow) -> bool) -> Vec<Growth> {
        let mut rows: Vec<Growth> =
            self.processes.iter().filter(|row| include(row)).filter_map(|row| growth_of(row, at_ns)).collect();
        let grown = |g: &Growth| (g.last_1s_bytes, g.last_10s_bytes, g.last_100ms_bytes, g.rss_bytes);
        rows.sort_by(|a, b| {
            grown(b).cmp(&grown(a)).then_with(|| (a.pid, a.start_boot_ns).cmp(&(b.pid, b.start_boot_ns)))
        });
        rows.truncate(GROWTH_CAP);
        rows
    }

    /// Sum over the address spaces of these processes. A shared one counts once.
    pub(crate) fn sum_over(&self, keys: impl Iterator<Item = ProcessKey>) -> Sums {
        let mut serials: Vec<u64> = keys.filter_map(|key| self.processes.get(key)?.mm).collect();
        serials.sort_unstable();
        serials.dedup();
        let mut total = Sums::default();
        serials.iter().filter_map(|s| self.space_sums(*s)).for_each(|sums| total.add(&sums));
        total
    }

    /// Mapping notes of the subtree of `root` within a window, oldest first; the newest `cap` of
    /// them.
    pub(crate) fn notes(&self, root: Option<u64>, from_ns: u64, to_ns: u64, cap: usize) -> Vec<MappingNote> {
        let mut notes: Vec<MappingNote> = self
            .cgroups
            .iter()
            .filter(|(id, row)| !row.notes.is_empty() && root.is_none_or(|root| self.cgroups.in_tree(*id, root)))
            .flat_map(|(_, row)| row.notes.iter())
            .filter(|n| (from_ns..=to_ns).contains(&n.boot_ns))
            .cloned()
            .collect();
        notes.sort_by_key(|n| (n.boot_ns, n.pid, n.address));
        notes.drain(..notes.len().saturating_sub(cap));
        notes
    }
}

/// Resident memory of a task row in bytes: anon, file and shmem.
pub(crate) fn resident(t: &TaskRow) -> u64 {
    t.anon_bytes.saturating_add(t.file_bytes).saturating_add(t.shmem_bytes)
}

fn task_row(row: &ProcessRow, sums: &Sums) -> TaskRow {
    TaskRow {
        pid: row.pid,
        start_boot_ns: row.exact.then_some(row.start_boot_ns),
        comm: row.comm.clone(),
        anon_bytes: sums.anon,
        file_bytes: sums.file,
        shmem_bytes: sums.shmem,
        swap_bytes: sums.swap,
        peak_bytes: row.peak.unwrap_or(0).max(sums.resident()),
        victim: false,
    }
}

fn growth_of(row: &ProcessRow, at_ns: u64) -> Option<Growth> {
    const MILLI: u64 = 1_000_000;
    let rss = row.history.at(at_ns)?;
    if row.exited.is_some_and(|(exit, _)| exit < at_ns) {
        return None;
    }
    let over = |window: u64| {
        let then = at_ns.saturating_sub(window);
        let before = row.history.at(then).or((row.exact && row.start_boot_ns >= then).then_some(0))?;
        Some(i64::try_from(i128::from(rss) - i128::from(before)).unwrap_or(i64::MAX))
    };
    Some(Growth {
        pid: row.pid,
        start_boot_ns: row.start_boot_ns,
        comm: row.comm.clone(),
        rss_bytes: rss,
        last_100ms_bytes: over(100 * MILLI),
        last_1s_bytes: over(1000 * MILLI),
        last_10s_bytes: over(10_000 * MILLI),
    })
}
