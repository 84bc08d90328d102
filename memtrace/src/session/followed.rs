//! Which processes the stack worker is told of.

use std::collections::{BTreeSet, VecDeque};

use memtrace_unwind::gate::ProcessKey;

/// Processes of which each set remembers the newest.
const MAX_PROCESSES: usize = 4096;
/// Processes whose mappings the worker is asked to read in one tick.
const MAX_PREFETCHED: usize = 64;

/// A process' end reaches the recorder at once, and its last stacks later: both orders occur.
#[derive(Debug, Default)]
pub(super) struct Followed {
    /// The worker most likely has them cached.
    sampled: Newest,
    ended: Newest,
    /// In this tick. Cap: [`MAX_PREFETCHED`].
    prefetched: BTreeSet<ProcessKey>,
}

impl Followed {
    /// A stack of the process came. True: the worker is to be told that it has ended.
    pub(super) fn sampled(&mut self, process: ProcessKey) -> bool {
        self.sampled.insert(process);
        self.ended.remove(process)
    }

    /// The process has ended. True: the worker is to be told.
    pub(super) fn ended(&mut self, process: ProcessKey) -> bool {
        let is_known = self.sampled.remove(process);
        if !is_known {
            self.ended.insert(process);
        }
        is_known
    }

    /// The process hit a limit. True: the worker is to be asked for its mappings.
    pub(super) fn hit_limit(&mut self, process: ProcessKey) -> bool {
        self.prefetched.len() < MAX_PREFETCHED && self.prefetched.insert(process)
    }

    /// Another tick.
    pub(super) fn tick(&mut self) {
        self.prefetched.clear();
    }
}

/// A set that forgets the oldest. Cap: [`MAX_PROCESSES`].
#[derive(Debug, Default)]
struct Newest {
    set: BTreeSet<ProcessKey>,
    /// In the order in which they came, with some that were removed. Cap: twice that.
    order: VecDeque<ProcessKey>,
}

impl Newest {
    fn insert(&mut self, process: ProcessKey) {
        if !self.set.insert(process) {
            return;
        }
        self.order.push_back(process);
        while self.set.len() > MAX_PROCESSES
            && let Some(oldest) = self.order.pop_front()
        {
            self.set.remove(&oldest);
        }
        if self.order.len() >= 2 * MAX_PROCESSES {
            let set = &self.set;
            self.order.retain(|process| set.contains(process));
        }
    }

    fn remove(&mut self, process: ProcessKey) -> bool {
        self.set.remove(&process)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_end_is_told_in_either_order() {
        let mut followed = Followed::default();
        assert!(!followed.sampled((1, 1)) && followed.ended((1, 1)), "after its stacks");
        assert!(!followed.ended((2, 1)) && followed.sampled((2, 1)), "before them");
        assert!(!followed.sampled((2, 1)), "once");
        assert!(!followed.ended((3, 1)) && !followed.sampled((3, 2)), "another process of that id");
    }

    #[test]
    fn a_limit_that_is_hit_again_and_again_is_told_once_a_tick() {
        let mut followed = Followed::default();
        assert!(followed.hit_limit((1, 1)) && !followed.hit_limit((1, 1)));
        assert_eq!((2..1000).filter(|pid| followed.hit_limit((*pid, 1))).count(), MAX_PREFETCHED - 1);
        followed.tick();
        assert!(followed.hit_limit((1, 1)));
    }

    #[test]
    fn the_newest_are_remembered() {
        let mut newest = Newest::default();
        for pid in 0..10 * MAX_PROCESSES as u32 {
            newest.insert((pid, 1));
            assert!(pid % 3 == 0 || newest.remove((pid, 1)));
        }
        assert!(newest.set.len() <= MAX_PROCESSES && newest.order.len() <= 2 * MAX_PROCESSES);
        (0..MAX_PROCESSES as u32).for_each(|pid| newest.insert((pid, 2)));
        assert!(newest.set.len() == MAX_PROCESSES && (0..MAX_PROCESSES as u32).all(|pid| newest.remove((pid, 2))));
    }
}
