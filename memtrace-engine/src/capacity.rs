//! Gives memory back that a collection has allocated and does not use: a queue never shrinks by
//! itself, and what it took in a storm it would hold for good.

use std::collections::VecDeque;

/// Lets a queue shrink to its items when it has room for more than twice as many; room for `room`
/// items stays.
pub(crate) fn shrink<T>(queue: &mut VecDeque<T>, room: usize) {
    let most = queue.len().max(room);
    if queue.capacity() > most.saturating_mul(2) {
        queue.shrink_to(most);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_queue_keeps_its_items_and_little_more() {
        let mut queue: VecDeque<u64> = (0..10_000).collect();
        shrink(&mut queue, 16);
        assert!(queue.capacity() >= 10_000, "it is used");
        queue.drain(..9_990);
        shrink(&mut queue, 16);
        assert!(queue.capacity() < 32 && queue.iter().copied().eq(9_990..10_000));
    }
}
