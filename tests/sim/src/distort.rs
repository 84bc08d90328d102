//! What happens to records between hook and engine: they wait, overtake one another, are lost (and counted), and what
//! nobody sent comes too.

use std::collections::BTreeMap;

use memtrace_common::event::KINDS;

use crate::model::{Emitted, MS};
use crate::rng::Rng;
use crate::wire::Ring;

/// What a run does to its records.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Distortion {
    /// A ring is behind by up to this, nanoseconds. At most 90 ms: later than that the engine need not wait.
    pub(crate) late_ns: u64,
    /// Records overtake one another inside a ring too.
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
    pub(crate) lost: Lost,
    /// Inputs that are no records, so far.
    pub(crate) garbage: u64,
}

impl Rings {
    pub(crate) fn new(rng: Rng, how: Distortion) -> Self {
        let (lost, garbage) = (Lost::default(), 0);
        Self { rng, how, waiting: Vec::new(), ready: BTreeMap::new(), lost, garbage }
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
            let ready = self.ready.entry(e.ring).or_default();
            let ready_ns = if self.how.wild { e.ns + late } else { (*ready).max(e.ns + late) };
            // Nothing is held up for longer, or a ring that is always late would fall behind for good.
            let ready_ns = ready_ns.min(e.ns + self.how.late_ns);
            *ready = ready_ns;
            self.waiting.push(Waiting { ready_ns, emitted: e });
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

/// The longest that a ring may be behind.
pub(crate) const LATE_MOST: u64 = 90 * MS;
