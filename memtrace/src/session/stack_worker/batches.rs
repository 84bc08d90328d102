//! Batches that have come from stack workers and wait to be taken.

use std::collections::VecDeque;

use crate::stacks::messages::Batch;

/// Batches that wait.
const MAX_BATCHES: usize = 64;
/// Bytes of the messages that they came in.
const MAX_BYTES: usize = 2 << 20;

/// Cap: [`MAX_BATCHES`] and [`MAX_BYTES`], and one batch; while it is reached nothing more is taken
/// from the socket.
#[derive(Debug, Default)]
pub(super) struct Batches {
    /// Each with the number of its worker, and its bytes.
    waiting: VecDeque<(u64, Batch, usize)>,
    bytes: usize,
}

impl Batches {
    pub(super) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    pub(super) fn is_full(&self) -> bool {
        self.waiting.len() >= MAX_BATCHES || self.bytes >= MAX_BYTES
    }

    pub(super) fn push(&mut self, worker: u64, batch: Batch, bytes: usize) {
        self.bytes = self.bytes.saturating_add(bytes);
        self.waiting.push_back((worker, batch, bytes));
    }

    pub(super) fn give_memory_back(&mut self) {
        self.waiting.shrink_to_fit();
    }

    /// The next one, with the number of the worker that its numbers are of.
    pub(super) fn pop(&mut self) -> Option<(u64, Batch)> {
        let (worker, batch, bytes) = self.waiting.pop_front()?;
        self.bytes = self.bytes.saturating_sub(bytes);
        Some((worker, batch))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn they_are_bounded_by_number_and_bytes() {
        let mut batches = Batches::default();
        (0..MAX_BATCHES).for_each(|_| batches.push(1, Batch::default(), 1));
        assert!(batches.is_full() && batches.pop().is_some() && !batches.is_full());
        batches.push(2, Batch::default(), MAX_BYTES);
        assert!(batches.is_full());
        let workers: Vec<u64> = std::iter::from_fn(|| batches.pop()).map(|(worker, _)| worker).collect();
        assert!(workers.len() == MAX_BATCHES && workers.ends_with(&[1, 2]));
        assert!(batches.is_empty() && !batches.is_full());
    }
}
