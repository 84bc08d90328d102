//! Processes that something was said of already. Bounded: the oldest is forgotten.

use std::collections::{BTreeSet, VecDeque};

use crate::world::ProcessKey;

/// Most processes.
pub(super) const CAP: usize = 4096;

/// A set of processes that keeps the latest.
#[derive(Clone, Debug, Default)]
pub(super) struct RecentProcesses {
    /// Oldest first. Cap: [`CAP`].
    order: VecDeque<ProcessKey>,
    /// The same processes, to look up.
    set: BTreeSet<ProcessKey>,
}

impl RecentProcesses {
    pub(super) fn contains(&self, key: &ProcessKey) -> bool {
        self.set.contains(key)
    }

    pub(super) fn insert(&mut self, key: ProcessKey) {
        if !self.set.insert(key) {
            return;
        }
        self.order.push_back(key);
        if self.order.len() > CAP
            && let Some(oldest) = self.order.pop_front()
        {
            self.set.remove(&oldest);
        }
    }

    pub(super) fn len(&self) -> usize {
        self.order.len()
    }

    pub(super) fn memory_estimate(&self) -> usize {
        self.len() * 2 * size_of::<ProcessKey>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_is_forgotten() {
        let mut recent = RecentProcesses::default();
        for pid in 0..=CAP as u32 {
            recent.insert((pid, 1));
            recent.insert((pid, 1));
        }
        assert!(!recent.contains(&(0, 1)) && recent.contains(&(1, 1)) && recent.contains(&(CAP as u32, 1)));
        assert_eq!((recent.order.len(), recent.set.len()), (CAP, CAP));
    }
}
