//! Slots for machines: how many run at the same time, and which waiting machine is next.

use std::collections::BTreeSet;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use anyhow::Result;
use memtrace_harness::libtest::SecondTry;
use memtrace_harness::run::say;

use crate::machine::{EmulatedMachine, MachineOutcome, MachineParts};

/// How often a machine is booted at most, when its emulator fails.
const BOOTS: usize = 3;

/// Limits how many machines run at the same time, across all callers. The machine that takes
/// longest goes first, so that it does not end up running alone at the end.
pub struct Slots {
    queue: Mutex<Queue>,
    moved: Condvar,
}

/// A place in the queue: rank, then a sequence number.
type Turn = (usize, u64);

#[derive(Default)]
struct Queue {
    free: usize,
    waiting: BTreeSet<Turn>,
    /// Sequence numbers given out so far.
    given: u64,
}

impl Slots {
    /// This many slots, or one for each CPU.
    pub fn new(count: Option<usize>) -> Self {
        let count = count.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from));
        Self { queue: Mutex::new(Queue { free: count.max(1), ..Queue::default() }), moved: Condvar::new() }
    }

    /// Joins the queue. The caller must then call `with`.
    fn line_up(&self, rank: usize) -> Turn {
        let mut queue = self.lock();
        queue.given += 1;
        let turn = (rank, queue.given);
        queue.waiting.insert(turn);
        turn
    }

    /// Runs `work` once a slot is free and nobody is ahead in the queue.
    fn with<T>(&self, turn: Turn, work: impl FnOnce() -> T) -> T {
        let queue = self.lock();
        let not_yet = |queue: &mut Queue| queue.free == 0 || queue.waiting.first() != Some(&turn);
        let mut queue = self.moved.wait_while(queue, not_yet).unwrap_or_else(PoisonError::into_inner);
        queue.waiting.remove(&turn);
        queue.free -= 1;
        drop(queue);
        self.moved.notify_all();
        let done = work();
        self.lock().free += 1;
        self.moved.notify_all();
        done
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Runs the machines as slots become free. Returns their results in the order of `machines`.
pub(crate) fn boot(machines: &[EmulatedMachine], parts: &MachineParts, slots: &Slots) -> Vec<Result<MachineOutcome>> {
    // all join the queue before any thread starts, so that the order is by rank and not by
    // scheduling
    let turns: Vec<Turn> = machines.iter().map(|machine| slots.line_up(parts.rank(machine))).collect();
    std::thread::scope(|scope| {
        let running: Vec<_> = machines
            .iter()
            .zip(turns)
            .map(|(machine, turn)| scope.spawn(move || slots.with(turn, || booted(machine, parts))))
            .collect();
        let ended = running.into_iter().map(|thread| thread.join());
        ended.map(|ended| ended.unwrap_or_else(|_| Err(anyhow::anyhow!("its thread panicked")))).collect()
    })
}

/// Runs a machine; boots it again if its emulator failed.
fn booted(machine: &EmulatedMachine, parts: &MachineParts) -> Result<MachineOutcome> {
    say(format_args!("{}: booting Linux {}", machine.name(), machine.ready.release));
    let mut outcome = machine.run(parts)?;
    let mut tries = Vec::new();
    // such an end says nothing about the tests
    while outcome.said.not_a_test && tries.len() + 1 < BOOTS {
        let why = outcome.said.troubles.join("; ");
        say(format_args!("{}: {why}; no fault of the tests: booting once more", machine.name()));
        outcome = machine.run(parts)?;
        let (test, passed) = ("the machine itself".to_owned(), !outcome.said.not_a_test);
        tries.push(SecondTry { test, said: vec![why], passed });
    }
    outcome.said.second_tries.extend(tries);
    Ok(outcome)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_the_machines_that_wait_the_one_of_the_lowest_rank_is_next() {
        let (slots, order) = (Slots::new(Some(1)), Mutex::new(Vec::new()));
        std::thread::scope(|scope| {
            let (slots, order) = (&slots, &order);
            for turn in [3, 1, 2, 1].map(|rank| slots.line_up(rank)) {
                scope.spawn(move || slots.with(turn, || order.lock().unwrap().push(turn)));
            }
        });
        assert_eq!(order.into_inner().unwrap(), [(1, 2), (1, 4), (2, 3), (3, 1)]);
    }
}
