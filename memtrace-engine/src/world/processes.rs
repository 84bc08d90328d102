//! Processes by (pid, start on the boot clock), because the kernel uses a pid again. A process that
//! ran already when tracing began has its start in clock ticks only, until a record has the exact
//! start.

use std::collections::{BTreeMap, VecDeque};

use memtrace_common::event::Task;

use crate::decode::field_text;

/// Processes in the table, with exited ones. At the cap the longest dead are dropped first, then
/// the longest silent.
pub const PROCESSES_CAP: usize = 32_768;
/// An exited process stays in the table for this long, so that incidents that close later list it.
const DEAD_KEEP_NS: u64 = 60_000_000_000;
/// Exited processes that memory is kept allocated for; above four times as many it is given back.
const DEAD_ROOM: usize = 1024;
/// Processes dropped at once when the table is full, because sorting it for each would be slow.
const EVICT_BATCH: usize = 1024;
/// Readings in the history of one process; older ones are thinned.
const HISTORY_CAP: usize = 64;

/// Process id and start on the boot clock.
pub(crate) type ProcessKey = (u32, u64);

/// One process.
#[derive(Clone, Debug)]
pub(crate) struct ProcessRow {
    /// Unique for the life of the engine. Unlike the key it does not change when the start becomes
    /// exact.
    pub(crate) serial: u64,
    pub(crate) pid: u32,
    pub(crate) start_boot_ns: u64,
    /// Whether `start_boot_ns` is exact. Otherwise it is computed from `start_ticks`.
    pub(crate) exact: bool,
    pub(crate) start_ticks: u64,
    pub(crate) parent_pid: u32,
    pub(crate) parent_serial: Option<u64>,
    pub(crate) comm: String,
    pub(crate) cgroup: Option<u64>,
    /// When the record was made that says so, boot clock; 0 when a fact said it.
    pub(crate) cgroup_ns: u64,
    /// Serial of its address space.
    pub(crate) mm: Option<u64>,
    /// Serial of the address space it used when it exited, which others may still use.
    pub(crate) left_mm: Option<u64>,
    /// Highest sum of anon, file and shmem of its current program, in bytes.
    pub(crate) peak: Option<u64>,
    pub(crate) max_rss: Option<u64>,
    /// When it exited, or was found to be gone, and its exit code.
    pub(crate) exited: Option<(u64, Option<u32>)>,
    pub(crate) history: History,
    pub(crate) last_ns: u64,
}

impl ProcessRow {
    pub(crate) fn key(&self) -> ProcessKey {
        (self.pid, self.start_boot_ns)
    }

    /// Takes the name from a thread. The main thread's name is that of the process; the name of
    /// another thread is used only while there is none.
    pub(crate) fn update_comm(&mut self, task: &Task) {
        if task.tid == task.tgid || self.comm.is_empty() {
            let name = comm(task);
            if !name.is_empty() && self.comm != name {
                self.comm = name;
            }
        }
    }

    pub(crate) fn raise_peak(&mut self, bytes: u64) {
        self.peak = self.peak.max(Some(bytes));
    }
}

/// Resident memory of one process over the last 20 seconds and more, coarser with age. It is used
/// to compute growth, so each bucket keeps its last value and not its highest.
#[derive(Clone, Debug, Default)]
pub(crate) struct History {
    /// Time and bytes, oldest first. Cap: [`HISTORY_CAP`].
    points: VecDeque<(u64, u64)>,
}

impl History {
    pub(crate) fn push(&mut self, boot_ns: u64, rss: u64) {
        match self.points.back_mut() {
            Some(last) if last.0 > boot_ns => return,
            Some(last) if last.0 / 10_000_000 == boot_ns / 10_000_000 => *last = (boot_ns, rss),
            _ => self.points.push_back((boot_ns, rss)),
        }
        if self.points.len() > HISTORY_CAP {
            self.thin(boot_ns);
        }
    }

    fn thin(&mut self, newest: u64) {
        let bucket = |ns: u64| match newest.saturating_sub(ns) {
            0..200_000_000 => (0, ns / 10_000_000),
            200_000_000..2_000_000_000 => (1, ns / 100_000_000),
            2_000_000_000..20_000_000_000 => (2, ns / 1_000_000_000),
            _ => (3, 0),
        };
        let mut kept: VecDeque<(u64, u64)> = VecDeque::with_capacity(HISTORY_CAP + 1);
        for point in self.points.drain(..) {
            match kept.back_mut() {
                Some(last) if bucket(last.0) == bucket(point.0) => *last = point,
                _ => kept.push_back(point),
            }
        }
        while kept.len() > HISTORY_CAP {
            kept.pop_front();
        }
        self.points = kept;
    }

    /// The last value at or before a moment, in bytes.
    pub(crate) fn at(&self, boot_ns: u64) -> Option<u64> {
        self.points.iter().rev().find(|(ns, _)| *ns <= boot_ns).map(|(_, rss)| *rss)
    }

    #[cfg(test)]
    fn len(&self) -> usize {
        self.points.len()
    }

    /// Bytes that memory is allocated for.
    fn bytes(&self) -> usize {
        self.points.capacity() * size_of::<(u64, u64)>()
    }
}

/// All processes.
#[derive(Clone, Debug, Default)]
pub(crate) struct Processes {
    /// Cap: [`PROCESSES_CAP`].
    rows: BTreeMap<ProcessKey, ProcessRow>,
    /// Exited processes, oldest first. Cap: [`PROCESSES_CAP`].
    dead: VecDeque<(u64, ProcessKey)>,
    next_serial: u64,
    pub(crate) ticks_per_second: u64,
    pub(crate) evicted: u64,
}

impl Processes {
    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.rows.len()
    }

    /// Processes that have not exited.
    pub(crate) fn live(&self) -> usize {
        self.rows.len().saturating_sub(self.dead())
    }

    /// Processes that have exited and are still in the table.
    pub(crate) fn dead(&self) -> usize {
        self.dead.len()
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &ProcessRow> {
        self.rows.values()
    }

    pub(crate) fn get(&self, key: ProcessKey) -> Option<&ProcessRow> {
        self.rows.get(&key)
    }

    pub(crate) fn get_mut(&mut self, key: ProcessKey) -> Option<&mut ProcessRow> {
        self.rows.get_mut(&key)
    }

    pub(crate) fn of_pid(&self, pid: u32) -> impl DoubleEndedIterator<Item = &ProcessRow> {
        self.rows.range((pid, 0)..=(pid, u64::MAX)).map(|(_, row)| row)
    }

    pub(crate) fn ticks(&self, start_boot_ns: u64) -> u64 {
        let ticks = u128::from(start_boot_ns) * u128::from(self.ticks_per_second.max(1)) / 1_000_000_000;
        u64::try_from(ticks).unwrap_or(u64::MAX)
    }

    pub(crate) fn start_of_ticks(&self, ticks: u64) -> u64 {
        let ns = u128::from(ticks) * 1_000_000_000 / u128::from(self.ticks_per_second.max(1));
        u64::try_from(ns).unwrap_or(u64::MAX)
    }

    /// The key of a process. A row whose start is known in clock ticks only gets the exact start.
    pub(crate) fn find(&mut self, pid: u32, start_boot_ns: u64) -> Option<ProcessKey> {
        let key = (pid, start_boot_ns);
        if self.rows.get(&key).is_some_and(|row| row.exact) {
            return Some(key);
        }
        let ticks = self.ticks(start_boot_ns);
        let near = self.of_pid(pid).find(|r| !r.exact && r.start_ticks.abs_diff(ticks) <= 1).map(ProcessRow::key)?;
        let mut row = self.rows.remove(&near)?;
        row.start_boot_ns = start_boot_ns;
        row.exact = true;
        self.dead.iter_mut().filter(|(_, k)| *k == near).for_each(|(_, k)| *k = key);
        self.rows.insert(key, row);
        Some(key)
    }

    /// The key of a process by its start in clock ticks. One tick of difference is tolerated,
    /// because the kernel rounds.
    pub(crate) fn find_by_ticks(&self, pid: u32, start_ticks: u64) -> Option<ProcessKey> {
        let ticks_of = |r: &ProcessRow| if r.exact { self.ticks(r.start_boot_ns) } else { r.start_ticks };
        self.of_pid(pid).find(|r| ticks_of(r).abs_diff(start_ticks) <= 1).map(ProcessRow::key)
    }

    /// Inserts a row. The caller has made room and checked that there is none.
    pub(crate) fn insert(&mut self, key: ProcessKey, exact: bool, start_ticks: u64, boot_ns: u64) {
        self.next_serial += 1;
        let row = ProcessRow {
            serial: self.next_serial,
            pid: key.0,
            start_boot_ns: key.1,
            exact,
            start_ticks,
            parent_pid: 0,
            parent_serial: None,
            comm: String::new(),
            cgroup: None,
            cgroup_ns: 0,
            mm: None,
            left_mm: None,
            peak: None,
            max_rss: None,
            exited: None,
            history: History::default(),
            last_ns: boot_ns,
        };
        self.rows.insert(key, row);
    }

    /// Marks a process as exited. Returns the address space that it no longer uses.
    pub(crate) fn exit(&mut self, key: ProcessKey, boot_ns: u64, code: Option<u32>) -> Option<u64> {
        let row = self.rows.get_mut(&key)?;
        if row.exited.is_some() {
            if code.is_some() {
                row.exited = Some((boot_ns, code));
            }
            return None;
        }
        row.exited = Some((boot_ns, code));
        self.dead.push_back((boot_ns, key));
        row.left_mm = row.mm.take();
        row.left_mm
    }

    /// Drops processes that exited long ago. Returns address spaces that lost a user.
    pub(crate) fn tick(&mut self, now: u64) -> Vec<u64> {
        let mut released = Vec::new();
        while self.dead.front().is_some_and(|(ns, _)| ns.saturating_add(DEAD_KEEP_NS) < now) {
            let Some((_, key)) = self.dead.pop_front() else { break };
            if self.rows.get(&key).is_some_and(|row| row.exited.is_some()) {
                released.extend(self.rows.remove(&key).and_then(|row| row.mm));
            }
        }
        // After a fork storm the memory of the queue is given back.
        if self.dead.capacity() > 4 * self.dead.len().max(DEAD_ROOM) {
            self.dead.shrink_to(DEAD_ROOM);
        }
        released
    }

    /// Makes room for one more process; drops the longest dead first, then the longest silent.
    /// Returns address spaces that lost a user.
    pub(crate) fn make_room(&mut self) -> Vec<u64> {
        let mut released = Vec::new();
        while self.rows.len() >= PROCESSES_CAP {
            let Some((_, key)) = self.dead.pop_front() else { break };
            if self.rows.get(&key).is_some_and(|row| row.exited.is_some()) {
                released.extend(self.rows.remove(&key).and_then(|row| row.mm));
                self.evicted += 1;
            }
        }
        if self.rows.len() >= PROCESSES_CAP {
            let mut silent: Vec<(u64, ProcessKey)> = self.rows.values().map(|r| (r.last_ns, r.key())).collect();
            silent.sort_unstable();
            for (_, key) in silent.into_iter().take(EVICT_BATCH) {
                released.extend(self.rows.remove(&key).and_then(|row| row.mm));
                self.evicted += 1;
            }
        }
        released
    }

    pub(crate) fn memory_estimate(&self) -> usize {
        let history: usize = self.rows.values().map(|r| r.history.bytes() + r.comm.len()).sum();
        self.rows.len() * (size_of::<ProcessRow>() + 32) + self.dead.capacity() * 24 + history
    }
}

/// Name of a wire task, escaped where not printable.
pub(crate) fn comm(task: &Task) -> String {
    field_text(&task.comm)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> Processes {
        Processes { ticks_per_second: 100, ..Processes::default() }
    }

    #[test]
    fn a_process_found_running_gets_its_exact_start() {
        let mut t = table();
        t.insert((7, t.start_of_ticks(123)), false, 123, 0);
        assert_eq!(t.find(7, 1_290_000_000), None, "six ticks away is another process");
        assert_eq!(t.find(7, 1_239_999_999), Some((7, 1_239_999_999)));
        let row = t.get((7, 1_239_999_999)).unwrap();
        assert!(row.exact);
        assert_eq!(t.len(), 1);
        assert_eq!(t.find_by_ticks(7, 124), Some((7, 1_239_999_999)));
        assert_eq!(t.find(7, 1_235_000_000), None, "an exact row matches exactly");
    }

    #[test]
    fn history_answers_for_the_past_and_stays_small() {
        let mut h = History::default();
        for i in 0..30_000u64 {
            h.push(i * 1_000_000, i);
        }
        assert!(h.len() <= HISTORY_CAP);
        let now = 29_999u64;
        assert_eq!(h.at(now * 1_000_000), Some(now));
        for (ago, off) in [(100u64, 10u64), (1000, 100), (10_000, 1000)] {
            let value = h.at((now - ago) * 1_000_000).unwrap();
            assert!(value <= now - ago && value + off >= now - ago, "{ago}: {value}");
        }
        h.push(5, 0);
        assert_eq!(h.at(now * 1_000_000), Some(now), "late readings do not rewrite it");
    }

    #[test]
    fn exited_processes_are_counted_apart_and_give_their_memory_back() {
        let mut t = table();
        for pid in 0..30_000 {
            t.insert((pid, 1), true, 0, 0);
            if pid >= 100 {
                t.exit((pid, 1), 10, Some(0));
            }
        }
        assert_eq!((t.live(), t.dead()), (100, 29_900));
        assert!(t.tick(10 + DEAD_KEEP_NS).is_empty() && t.dead() == 29_900);
        t.tick(11 + DEAD_KEEP_NS);
        assert_eq!((t.live(), t.dead(), t.len()), (100, 0, 100));
        assert!(t.dead.capacity() <= 4 * DEAD_ROOM, "{}", t.dead.capacity());
    }

    #[test]
    fn exited_processes_are_evicted_first_then_the_longest_silent() {
        let mut t = table();
        for pid in 0..PROCESSES_CAP as u32 {
            t.insert((pid, 1), true, 0, u64::from(pid));
        }
        t.exit((5, 1), 10, Some(0));
        assert!(t.make_room().is_empty());
        assert!(t.get((5, 1)).is_none() && t.len() == PROCESSES_CAP - 1);
        t.insert((99_999, 1), true, 0, 1 << 40);
        t.make_room();
        assert!(t.get((0, 1)).is_none() && t.get((99_999, 1)).is_some());
        assert_eq!(t.evicted, 1 + EVICT_BATCH as u64);
    }
}
