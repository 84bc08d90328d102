//! What happens to records between hook and engine: they wait, overtake one another, are lost (and counted), and what
//! nobody sent comes too.

use std::collections::BTreeMap;

use memtrace_common::event::{Fork, Header, KIND_CGROUP, KIND_FORK, KINDS, Task};
use zerocopy::FromBytes;

use crate::model::{Emitted, MS};
use crate::rng::Rng;
use crate::wire::Ring;

/// What a run does to its records.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Distortion {
    /// A ring is behind by up to this, nanoseconds. At most 90 ms: later than that the engine need not wait.
    pub(crate) late_ns: u64,
    /// Records of different threads overtake one another inside a ring too. A thread's own cannot, and no record of
    /// a process that of its fork: that hook runs in the parent before the child does (kernel_clone in kernel/fork.c).
    pub(crate) wild: bool,
    /// One record in this many is lost; 0: none.
    pub(crate) lose_one_in: u64,
    /// One in this many is followed by bytes that are no record; 0: none.
    pub(crate) garbage_one_in: u64,
}

/// A record that waits in a ring.
#[derive(Clone, Debug)]
struct Waiting {
    ready_ns: u64,
    emitted: Emitted,
}

/// What was lost.
#[derive(Clone, Debug, Default)]
pub(crate) struct Lost {
    /// As the agent counts it.
    pub(crate) totals: BTreeMap<String, u64>,
    /// Decisions of the OOM killer that a lost record was part of.
    pub(crate) decisions: Vec<usize>,
    /// Anything at all.
    pub(crate) any: bool,
}

/// The rings. As many records wait as the model emits within [`Distortion::late_ns`] and a turn of the loop.
#[derive(Debug)]
pub(crate) struct Rings {
    rng: Rng,
    how: Distortion,
    waiting: Vec<Waiting>,
    ready: BTreeMap<Ring, u64>,
    /// When the last record of each thread is read, of wild rings. Cap: threads of the run.
    threads: BTreeMap<(Ring, u32, u64), u64>,
    /// When the record of the fork of each process is read, of wild rings. Cap: processes of the run.
    born: BTreeMap<(u32, u64), u64>,
    pub(crate) lost: Lost,
    /// Inputs that are no records, so far.
    pub(crate) garbage: u64,
}

impl Rings {
    pub(crate) fn new(rng: Rng, how: Distortion) -> Self {
        let (lost, garbage) = (Lost::default(), 0);
        Self {
            rng,
            how,
            waiting: Vec::new(),
            ready: BTreeMap::new(),
            threads: BTreeMap::new(),
            born: BTreeMap::new(),
            lost,
            garbage,
        }
    }

    /// Takes what the hooks have emitted.
    pub(crate) fn accept(&mut self, emitted: Vec<Emitted>) {
        for e in emitted {
            if self.rng.once_in(self.how.lose_one_in) {
                self.lose(&e);
                continue;
            }
            // Mostly a ring is read at once. Now and then a record that is being written holds up those behind it.
            let late = if self.rng.percent(2) { self.rng.below(self.how.late_ns + 1) } else { 0 };
            // Nothing is held up for longer, or a ring that is always late would fall behind for good.
            let ready_ns = self.after(&e).max(e.ns + late).min(e.ns + self.how.late_ns);
            self.follow(&e, ready_ns);
            self.waiting.push(Waiting { ready_ns, emitted: e });
        }
    }

    /// When the records are read that this one cannot overtake.
    fn after(&self, e: &Emitted) -> u64 {
        if !self.how.wild {
            return self.ready.get(&e.ring).copied().unwrap_or_default();
        }
        let Some(task) = task(&e.bytes) else { return 0 };
        let thread = self.threads.get(&(e.ring, task.tid, task.start_boot_ns)).copied().unwrap_or_default();
        let born = self.born.get(&(task.tgid, task.start_boot_ns)).filter(|_| e.ring == Ring::Ledger);
        thread.max(born.copied().unwrap_or_default())
    }

    fn follow(&mut self, e: &Emitted, ready_ns: u64) {
        self.ready.insert(e.ring, ready_ns);
        if let Some(task) = task(&e.bytes).filter(|_| self.how.wild) {
            self.threads.insert((e.ring, task.tid, task.start_boot_ns), ready_ns);
        }
        if let Some(fork) = Fork::read_from_bytes(&e.bytes).ok().filter(|fork| fork.header.kind == KIND_FORK) {
            self.born.insert((fork.child.tgid, fork.child.start_boot_ns), ready_ns);
        }
    }

    fn lose(&mut self, e: &Emitted) {
        let total = self.lost.totals.entry(e.ring.name().to_owned()).or_default();
        *total += 1;
        self.lost.decisions.extend(e.decision);
        self.lost.any = true;
    }

    /// One batch: what can be read now, by the time of its hooks.
    pub(crate) fn drain(&mut self, now: u64) -> Vec<Emitted> {
        let (ready, waiting): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.waiting).into_iter().partition(|w| w.ready_ns <= now);
        self.waiting = waiting;
        let mut batch: Vec<Emitted> = ready.into_iter().map(|w| w.emitted).collect();
        batch.sort_by_key(|e| e.ns);
        batch
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Bytes that are no record, in place of nothing; none in most cases.
    pub(crate) fn garbage(&mut self, like: &[u8]) -> Option<Vec<u8>> {
        if !self.rng.once_in(self.how.garbage_one_in) {
            return None;
        }
        self.garbage += 1;
        let cut = usize::try_from(self.rng.below(like.len() as u64)).unwrap_or(0);
        let mut bytes = like.to_vec();
        match self.rng.below(3) {
            0 => bytes.truncate(cut),
            1 => bytes.push(0),
            _ => {
                let known = |kind: u16| KINDS.iter().any(|(k, ..)| *k == kind);
                let kind = (0..8).map(|_| self.rng.next() as u16).find(|kind| !known(*kind)).unwrap_or(u16::MAX);
                bytes.iter_mut().zip(kind.to_ne_bytes()).for_each(|(to, from)| *to = from);
            }
        }
        Some(bytes)
    }
}

/// The thread that a record is of: it is the first field of each, but of that about a cgroup.
fn task(bytes: &[u8]) -> Option<Task> {
    let (header, rest) = Header::read_from_prefix(bytes).ok()?;
    let (task, _) = Task::read_from_prefix(rest).ok()?;
    (header.kind != KIND_CGROUP).then_some(task)
}

/// The longest that a ring may be behind.
pub(crate) const LATE_MOST: u64 = 90 * MS;
