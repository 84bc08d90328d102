//! The kernel log as a second witness of kills. Its lines are matched with the kills that hooks
//! saw, by pid and time: printk's clock is not the boot clock, so a line was written at some time
//! between two readings of the log.
//!
//! Every kill has a `Killed process` line (mm/oom_kill.c, `__oom_kill_process`, 5.10 to 7.x). The
//! kernel limits the rate of what stands before it alone, ten kills in five seconds
//! (`oom_kill_process`, `oom_rs`): the dump and the `oom-kill:` line, which names the cgroups. So
//! without that line nothing disagrees; without a `Killed` line the hooks and the log do, unless
//! the kernel overwrote lines. That is decided when the log was read after the kill, and not when
//! the incident closes: in a storm incidents close before.

use std::collections::VecDeque;

use memtrace_incident::KernelLogKill;

use crate::decode::printable;
use crate::input::{KernelLogEvent, KernelLogLine};

const SEC: u64 = 1_000_000_000;
/// Kills of the log that are remembered; the oldest is dropped.
const LINES_CAP: usize = 2048;
/// Kills of the hooks that are remembered, to match lines that come late; the oldest is dropped.
const SEEN_CAP: usize = 1024;
/// Gaps in the log that are remembered; the oldest is dropped.
const GAPS_CAP: usize = 64;
/// A line is read at most this long after the kill that it is about.
const READ_LATE_NS: u64 = 10 * SEC;
/// A line waits this long for the record of its kill, and a kill for its line.
const WAIT_NS: u64 = 2 * SEC;
/// Lines, kills and gaps are dropped after this time; lines and gaps of an open incident stay.
const KEEP_NS: u64 = 60 * SEC;

/// When something was written to the log: after one reading and before the next, boot clock.
#[derive(Clone, Copy, Debug)]
struct Written {
    after_ns: u64,
    read_ns: u64,
}

#[derive(Clone, Debug)]
struct Line {
    kill: KernelLogKill,
    written: Written,
    /// Whether [`KernelLog::unseen`] has looked at it.
    checked: bool,
}

/// A kill that hooks saw.
#[derive(Clone, Copy, Debug)]
struct Seen {
    pid: u32,
    tid: u32,
    kill_ns: u64,
    /// The first tick after it was reported: the log was read since, however late that was.
    ticked_ns: Option<u64>,
}

impl Seen {
    fn has_id(&self, id: u32) -> bool {
        self.pid == id || self.tid == id
    }
}

/// Lines of the log and kills of the hooks, to be matched.
#[derive(Clone, Debug, Default)]
pub(crate) struct KernelLog {
    /// Cap: [`LINES_CAP`].
    lines: VecDeque<Line>,
    /// Kills that hooks saw. Cap: [`SEEN_CAP`].
    seen: VecDeque<Seen>,
    /// Those of them that must have a line, and whether it was the one that the OOM killer chose,
    /// not another of its group. Cap: [`SEEN_CAP`].
    expected: VecDeque<(Seen, bool)>,
    /// Chosen processes whose `oom-kill:` line the kernel's rate limit left out.
    limited: u64,
    /// When lines were lost, and how many. Cap: [`GAPS_CAP`].
    gaps: VecDeque<(Written, u64)>,
    /// The log was read up to this time.
    read_until_ns: u64,
    /// Whether it could not be read any more after that.
    unreadable: bool,
    /// When the latest line was read that was dropped for want of room; 0: none was.
    dropped_ns: u64,
}

/// Whether a line can be about a kill at this time.
fn near(written: Written, kill_ns: u64) -> bool {
    written.read_ns.saturating_add(WAIT_NS) >= kill_ns && written.after_ns <= kill_ns.saturating_add(READ_LATE_NS)
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
        let after_ns = if self.read_until_ns == 0 { read_ns } else { self.read_until_ns.min(read_ns) };
        let written = Written { after_ns, read_ns };
        match &line.line {
            KernelLogEvent::Gap { lines } => push(&mut self.gaps, GAPS_CAP, (written, *lines)),
            KernelLogEvent::Unreadable => self.unreadable = true,
            KernelLogEvent::Killed { pid, .. } => {
                self.put(*pid, written, |k| k.killed_line_ns.is_none(), |k| k.killed_line_ns = Some(line.printk_ns));
            }
            KernelLogEvent::OomKill { constraint, oom_memcg, task_memcg, pid, .. } => {
                let text = |t: &Option<String>| t.as_ref().map(|t| printable(t.as_bytes()));
                self.put(
                    *pid,
                    written,
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
        written: Written,
        vacant: impl Fn(&KernelLogKill) -> bool,
        write: impl FnOnce(&mut KernelLogKill),
    ) {
        let read_ns = written.read_ns;
        let soon = |l: &Line| l.written.read_ns.abs_diff(read_ns) <= READ_LATE_NS;
        let fits = |l: &&mut Line| l.kill.pid == pid && soon(l) && vacant(&l.kill);
        if let Some(found) = self.lines.iter_mut().find(fits) {
            write(&mut found.kill);
            return;
        }
        let mut kill = KernelLogKill { pid, ..KernelLogKill::default() };
        write(&mut kill);
        if let Some(oldest) = self.lines.front().filter(|_| self.lines.len() >= LINES_CAP) {
            self.dropped_ns = self.dropped_ns.max(oldest.written.read_ns);
        }
        push(&mut self.lines, LINES_CAP, Line { kill, written, checked: false });
    }

    /// A hook saw that this process was killed or chosen.
    pub(crate) fn hook_saw(&mut self, pid: u32, tid: u32, kill_ns: u64) {
        push(&mut self.seen, SEEN_CAP, Seen { pid, tid, kill_ns, ticked_ns: None });
    }

    /// This process was killed, so the log must have a line about it. `chosen`: by the OOM killer
    /// itself, so that it may have two.
    pub(crate) fn expect(&mut self, pid: u32, tid: u32, kill_ns: u64, chosen: bool) {
        push(&mut self.expected, SEEN_CAP, (Seen { pid, tid, kill_ns, ticked_ns: None }, chosen));
    }

    /// How many kills have no `oom-kill:` line, because the kernel limits their rate.
    pub(crate) fn limited(&self) -> u64 {
        self.limited
    }

    /// Whether the log was read since this time, and no line of then was dropped: what it has about
    /// a kill then is known.
    pub(crate) fn knows(&self, kill_ns: u64) -> bool {
        let dropped = self.dropped_ns > 0 && self.dropped_ns.saturating_add(WAIT_NS) >= kill_ns;
        self.read_until_ns >= kill_ns && !dropped
    }

    /// Whether the log could not be read any more, and not since this time.
    pub(crate) fn was_unreadable(&self, kill_ns: u64) -> bool {
        self.unreadable && self.read_until_ns < kill_ns
    }

    /// Whether the log cannot be read any more.
    pub(crate) fn is_unreadable(&self) -> bool {
        self.unreadable
    }

    /// What the log has about a kill. The pid in the log is the id of the thread that the kernel
    /// picked because it still had an address space (mm/oom_kill.c, find_lock_task_mm).
    pub(crate) fn about(&self, pid: u32, tid: u32, kill_ns: u64) -> Option<&KernelLogKill> {
        self.lines
            .iter()
            .filter(|l| (l.kill.pid == pid || l.kill.pid == tid) && near(l.written, kill_ns))
            .min_by_key(|l| l.written.read_ns.abs_diff(kill_ns))
            .map(|l| &l.kill)
    }

    /// How many lines were lost around a kill.
    pub(crate) fn lost_near(&self, kill_ns: u64) -> u64 {
        let near = self.gaps.iter().filter(|(written, _)| near(*written, kill_ns));
        near.fold(0, |sum, (_, lines)| sum.saturating_add(*lines))
    }

    /// The log was read up to this time: forgets what is old, but for what may be about a kill at
    /// `oldest_ns` or later.
    pub(crate) fn tick(&mut self, now: u64, oldest_ns: Option<u64>) {
        if !self.unreadable {
            self.read_until_ns = now;
        }
        let needed = |written: Written| {
            let of_open = oldest_ns.is_some_and(|ns| written.read_ns.saturating_add(WAIT_NS) >= ns);
            of_open || written.read_ns.saturating_add(KEEP_NS) > now
        };
        for seen in self.seen.iter_mut().chain(self.expected.iter_mut().map(|(seen, _)| seen)) {
            seen.ticked_ns.get_or_insert(now);
        }
        self.lines.retain(|l| needed(l.written));
        self.seen.retain(|seen| seen.ticked_ns.is_none_or(|ns| ns.saturating_add(KEEP_NS) > now));
        self.gaps.retain(|(written, _)| needed(*written));
    }

    /// Process ids that were killed according to the log and that no hook saw. Each is returned
    /// once, after [`WAIT_NS`].
    pub(crate) fn unseen(&mut self, now: u64) -> Vec<u32> {
        let seen = &self.seen;
        let mut unseen = Vec::new();
        for l in self.lines.iter_mut().filter(|l| !l.checked && l.written.read_ns.saturating_add(WAIT_NS) <= now) {
            l.checked = true;
            let id = l.kill.pid;
            let seen_by_hook = seen.iter().any(|seen| seen.has_id(id) && near(l.written, seen.kill_ns));
            if !seen_by_hook && l.kill.killed_line_ns.is_some() {
                unseen.push(id);
            }
        }
        unseen
    }

    /// Process ids of expected kills that the log has no line about, although it was read since and
    /// no lines of that time were lost. Each is returned once, after [`WAIT_NS`].
    pub(crate) fn silent(&mut self, now: u64) -> Vec<u32> {
        let is_due = |(seen, _): &&(Seen, bool)| seen.ticked_ns.is_some_and(|ns| ns.saturating_add(WAIT_NS) <= now);
        let count = self.expected.iter().take_while(is_due).count();
        let due: Vec<(Seen, bool)> = self.expected.drain(..count).collect();
        let mut silent = Vec::new();
        for (seen, chosen) in due {
            if self.lost_near(seen.kill_ns) > 0 || !self.knows(seen.kill_ns) {
                continue;
            }
            let lines = self.about(seen.pid, seen.tid, seen.kill_ns);
            match lines.map(|kill| (kill.killed_line_ns.is_some(), kill.oom_line_ns.is_some())) {
                Some((true, named)) => self.limited = self.limited.saturating_add(u64::from(chosen && !named)),
                _ => silent.push(seen.pid),
            }
        }
        silent
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
        let mut unseen = |sec: u64| {
            log.tick(sec * SEC, None);
            log.unseen(sec * SEC)
        };
        assert!(unseen(11).is_empty());
        assert_eq!(unseen(12), [7]);
        assert!(unseen(13).is_empty());
        unseen(200);
        assert!(log.lines.is_empty() && log.seen.is_empty());
    }

    #[test]
    fn a_kill_without_a_line_is_reported_once_the_log_was_read() {
        let mut log = KernelLog::default();
        log.tick(10 * SEC, None);
        for pid in [5, 6] {
            log.hook_saw(pid, pid, 11 * SEC);
            log.expect(pid, pid, 11 * SEC, pid == 5);
        }
        assert!(!log.knows(11 * SEC) && log.silent(10 * SEC).is_empty());
        log.line(&killed(5, 12 * SEC));
        let mut silent = |sec: u64| {
            log.tick(sec * SEC, None);
            (log.knows(11 * SEC), log.silent(sec * SEC), log.unseen(sec * SEC))
        };
        assert_eq!(silent(12), (true, vec![], vec![]));
        assert_eq!(silent(14), (true, vec![6], vec![]));
        assert_eq!(silent(16), (true, vec![], vec![]));
        assert_eq!(log.limited(), 1, "5 has one line of two");
        // Lines that were lost say nothing about a kill.
        log.expect(7, 7, 17 * SEC, true);
        let line = KernelLogEvent::Gap { lines: 3 };
        log.line(&KernelLogLine { printk_ns: 1, read_boot_ns: 18 * SEC, line });
        log.tick(18 * SEC, None);
        log.tick(20 * SEC, None);
        assert!(log.silent(20 * SEC).is_empty() && log.expected.is_empty());
    }

    #[test]
    fn a_log_that_is_read_a_minute_late_agrees() {
        let mut log = KernelLog::default();
        log.tick(10 * SEC, None);
        // The recorder was stopped until now.
        log.hook_saw(5, 5, 11 * SEC);
        log.expect(5, 5, 11 * SEC, true);
        log.line(&killed(5, 100 * SEC));
        for sec in [100, 101, 103] {
            log.tick(sec * SEC, None);
            assert!(log.silent(sec * SEC).is_empty() && log.unseen(sec * SEC).is_empty(), "{sec}");
        }
        assert_eq!(log.about(5, 5, 11 * SEC).and_then(|kill| kill.killed_line_ns), Some(100 * SEC - 7));
    }

    #[test]
    fn a_log_that_cannot_be_read_any_more_says_nothing_about_later_kills() {
        let mut log = KernelLog::default();
        log.line(&killed(5, 10 * SEC));
        log.tick(10 * SEC, None);
        log.hook_saw(5, 5, 10 * SEC);
        log.expect(5, 5, 10 * SEC, true);
        log.line(&KernelLogLine { printk_ns: 0, read_boot_ns: 11 * SEC, line: KernelLogEvent::Unreadable });
        for pid in [6, 7] {
            log.hook_saw(pid, pid, 11 * SEC);
            log.expect(pid, pid, 11 * SEC, true);
        }
        for sec in 11..20 {
            log.tick(sec * SEC, None);
            assert_eq!((log.silent(sec * SEC), log.unseen(sec * SEC)), (vec![], vec![]), "{sec}");
        }
        assert!(log.knows(10 * SEC) && !log.knows(11 * SEC) && log.was_unreadable(11 * SEC));
        assert!(log.expected.is_empty() && !log.was_unreadable(10 * SEC));
    }

    #[test]
    fn what_an_open_incident_needs_is_kept_and_what_was_dropped_is_not_missed() {
        let mut log = KernelLog::default();
        log.line(&killed(5, 10 * SEC));
        log.line(&KernelLogLine { printk_ns: 1, read_boot_ns: 10 * SEC, line: KernelLogEvent::Gap { lines: 3 } });
        log.tick(500 * SEC, Some(9 * SEC));
        assert!(log.about(5, 5, 10 * SEC).is_some() && log.lost_near(10 * SEC) == 3);
        log.tick(500 * SEC, None);
        assert!(log.lines.is_empty() && log.gaps.is_empty());
        (0..=LINES_CAP as u32).for_each(|pid| log.line(&killed(pid, 500 * SEC)));
        assert!(!log.knows(500 * SEC), "its line may be the one that was dropped");
        log.tick(600 * SEC, None);
        assert!(log.knows(600 * SEC));
    }
}
