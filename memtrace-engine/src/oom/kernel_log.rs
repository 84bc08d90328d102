//! The kernel log as a second witness of kills. Its lines are matched with the kills that hooks
//! saw, by pid and time: printk's clock is not the boot clock, so the time is when the line was
//! read.

use std::collections::VecDeque;

use memtrace_incident::KernelLogKill;

use crate::decode::printable;
use crate::input::{KernelLogEvent, KernelLogLine};

const SEC: u64 = 1_000_000_000;
/// Kills of the log that are remembered; the oldest is dropped.
const LINES_CAP: usize = 256;
/// Kills of the hooks that are remembered, to match lines that come late; the oldest is dropped.
const SEEN_CAP: usize = 1024;
/// Gaps in the log that are remembered; the oldest is dropped.
const GAPS_CAP: usize = 64;
/// A line is read at most this long after the kill that it is about.
const READ_LATE_NS: u64 = 10 * SEC;
/// A line waits this long for the record of its kill.
const WAIT_NS: u64 = 2 * SEC;
/// Lines, kills and gaps are dropped after this time.
const KEEP_NS: u64 = 60 * SEC;

#[derive(Clone, Debug)]
struct Line {
    kill: KernelLogKill,
    read_ns: u64,
    /// Whether [`KernelLog::unseen`] has looked at it.
    checked: bool,
}

/// Lines of the log and kills of the hooks, to be matched.
#[derive(Clone, Debug, Default)]
pub(crate) struct KernelLog {
    /// Cap: [`LINES_CAP`].
    lines: VecDeque<Line>,
    /// pid, tid and time of kills that hooks saw. Cap: [`SEEN_CAP`].
    seen: VecDeque<(u32, u32, u64)>,
    /// When a gap was found, and how many lines it has. Cap: [`GAPS_CAP`].
    gaps: VecDeque<(u64, u64)>,
}

fn near(read_ns: u64, kill_ns: u64) -> bool {
    read_ns.saturating_add(WAIT_NS) >= kill_ns && read_ns <= kill_ns.saturating_add(READ_LATE_NS)
}

fn push<T>(queue: &mut VecDeque<T>, cap: usize, item: T) {
    if queue.len() >= cap {
        queue.pop_front();
    }
    queue.push_back(item);
}

impl KernelLog {
    pub(crate) fn line(&mut self, line: &KernelLogLine) {
        let read_ns = line.read_boot_ns;
        match &line.line {
            KernelLogEvent::Gap { lines } => push(&mut self.gaps, GAPS_CAP, (read_ns, *lines)),
            KernelLogEvent::Killed { pid, .. } => {
                self.put(*pid, read_ns, |k| k.killed_line_ns.is_none(), |k| k.killed_line_ns = Some(line.printk_ns));
            }
            KernelLogEvent::OomKill { constraint, oom_memcg, task_memcg, pid, .. } => {
                let text = |t: &Option<String>| t.as_ref().map(|t| printable(t.as_bytes()));
                self.put(
                    *pid,
                    read_ns,
                    |k| k.oom_line_ns.is_none(),
                    |k| {
                        k.oom_line_ns = Some(line.printk_ns);
                        k.constraint = Some(printable(constraint.as_bytes()));
                        k.oom_memcg = text(oom_memcg);
                        k.task_memcg = text(task_memcg);
                    },
                );
            }
        }
    }

    /// Writes a line into the entry of its kill, so that both lines of one kill are in one entry.
    fn put(
        &mut self,
        pid: u32,
        read_ns: u64,
        vacant: impl Fn(&KernelLogKill) -> bool,
        write: impl FnOnce(&mut KernelLogKill),
    ) {
        let fits = |l: &&mut Line| l.kill.pid == pid && l.read_ns.abs_diff(read_ns) <= READ_LATE_NS && vacant(&l.kill);
        if let Some(found) = self.lines.iter_mut().find(fits) {
            write(&mut found.kill);
            return;
        }
        let mut kill = KernelLogKill { pid, ..KernelLogKill::default() };
        write(&mut kill);
        push(&mut self.lines, LINES_CAP, Line { kill, read_ns, checked: false });
    }

    /// A hook saw that this process was killed or chosen.
    pub(crate) fn hook_saw(&mut self, pid: u32, tid: u32, kill_ns: u64) {
        push(&mut self.seen, SEEN_CAP, (pid, tid, kill_ns));
    }

    /// What the log has about a kill. The pid in the log is the id of the thread that the kernel
    /// picked because it still had an address space (mm/oom_kill.c, find_lock_task_mm).
    pub(crate) fn about(&self, pid: u32, tid: u32, kill_ns: u64) -> Option<&KernelLogKill> {
        self.lines
            .iter()
            .filter(|l| (l.kill.pid == pid || l.kill.pid == tid) && near(l.read_ns, kill_ns))
            .min_by_key(|l| l.read_ns.abs_diff(kill_ns))
            .map(|l| &l.kill)
    }

    /// How many lines were lost around a kill.
    pub(crate) fn lost_near(&self, kill_ns: u64) -> u64 {
        self.gaps.iter().filter(|(ns, _)| near(*ns, kill_ns)).fold(0, |sum, (_, lines)| sum.saturating_add(*lines))
    }

    /// Process ids that were killed according to the log and that no hook saw. Each is returned
    /// once, after [`WAIT_NS`].
    pub(crate) fn unseen(&mut self, now: u64) -> Vec<u32> {
        let seen = &self.seen;
        let mut unseen = Vec::new();
        for l in self.lines.iter_mut().filter(|l| !l.checked && l.read_ns.saturating_add(WAIT_NS) <= now) {
            l.checked = true;
            let id = l.kill.pid;
            let seen_by_hook = seen.iter().any(|(pid, tid, ns)| (*pid == id || *tid == id) && near(l.read_ns, *ns));
            if !seen_by_hook && l.kill.killed_line_ns.is_some() {
                unseen.push(id);
            }
        }
        self.lines.retain(|l| l.read_ns.saturating_add(KEEP_NS) > now);
        self.seen.retain(|(_, _, ns)| ns.saturating_add(KEEP_NS) > now);
        self.gaps.retain(|(ns, _)| ns.saturating_add(KEEP_NS) > now);
        unseen
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn killed(pid: u32, read_boot_ns: u64) -> KernelLogLine {
        let line = KernelLogEvent::Killed { pid, comm: "x".into() };
        KernelLogLine { printk_ns: read_boot_ns - 7, read_boot_ns, line }
    }

    #[test]
    fn both_lines_of_a_kill_make_one_entry_and_two_kills_make_two() {
        let mut log = KernelLog::default();
        let oom = KernelLogEvent::OomKill {
            constraint: "CONSTRAINT_MEMCG".into(),
            oom_memcg: Some("/a\x1b".into()),
            task_memcg: None,
            comm: "x".into(),
            pid: 5,
        };
        log.line(&KernelLogLine { printk_ns: 1, read_boot_ns: 10 * SEC, line: oom });
        log.line(&killed(5, 10 * SEC));
        log.line(&killed(5, 12 * SEC));
        let kill = log.about(5, 5, 10 * SEC - 5).unwrap();
        assert_eq!((kill.oom_memcg.as_deref(), kill.killed_line_ns), (Some("/a\\x1b"), Some(10 * SEC - 7)));
        assert_eq!(log.lines.len(), 2);
        assert_eq!(log.about(5, 5, 50 * SEC), None);
    }

    #[test]
    fn a_line_without_a_hook_record_is_reported_once() {
        let mut log = KernelLog::default();
        log.hook_saw(5, 6, 9 * SEC);
        log.line(&killed(6, 10 * SEC));
        log.line(&killed(7, 10 * SEC));
        log.line(&killed(8, 10 * SEC));
        log.hook_saw(8, 8, 10 * SEC);
        assert!(log.unseen(11 * SEC).is_empty());
        assert_eq!(log.unseen(12 * SEC), [7]);
        assert!(log.unseen(13 * SEC).is_empty());
        log.unseen(200 * SEC);
        assert!(log.lines.is_empty() && log.seen.is_empty());
    }
}
