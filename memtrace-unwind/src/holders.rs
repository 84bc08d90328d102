//! What goes when something that all users share is at its cap.
//!
//! It goes from the user who holds most of it, and of that user's what was used longest ago. So nobody
//! loses, and pays again for, what others want room for, as long as he holds no more than an equal
//! share: a user who has more than there is room for makes room with his own.

use std::collections::{BTreeMap, BinaryHeap, VecDeque};

/// Who holds it; `None`: not known, and all of those count as one.
type User = Option<u32>;

/// Something that is held: when it was used last, what it is, and how much of the room it takes.
type Held<K> = (u64, K, usize);

/// What there is of something, by its holders.
#[derive(Debug)]
pub(crate) struct Holders<K> {
    total: usize,
    may_go: BTreeMap<User, (usize, Vec<Held<K>>)>,
}

impl<K: Copy + Ord> Holders<K> {
    pub(crate) fn new() -> Self {
        Self { total: 0, may_go: BTreeMap::new() }
    }

    /// Adds something that takes room and stays.
    pub(crate) fn add_fixed(&mut self, size: usize) {
        self.total = self.total.saturating_add(size);
    }

    /// Adds something that may go, if it takes any room.
    pub(crate) fn add(&mut self, user: User, (used, what, size): Held<K>) {
        self.add_fixed(size);
        if size > 0 {
            let (sum, held) = self.may_go.entry(user).or_default();
            *sum = sum.saturating_add(size);
            held.push((used, what, size));
        }
    }

    /// What goes, and whose it was, so that no more than `most` is left.
    pub(crate) fn what_goes(self, most: usize) -> Vec<(User, K)> {
        let mut holders: BinaryHeap<(usize, User, VecDeque<Held<K>>)> = BinaryHeap::new();
        for (user, (sum, mut held)) in self.may_go {
            held.sort_unstable();
            holders.push((sum, user, held.into()));
        }
        let (mut total, mut goes) = (self.total, Vec::new());
        while total > most
            && let Some((sum, user, mut held)) = holders.pop()
        {
            let Some((_, what, size)) = held.pop_front() else { continue };
            goes.push((user, what));
            total = total.saturating_sub(size);
            holders.push((sum.saturating_sub(size), user, held));
        }
        goes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn holders(held: &[(u32, u64, usize)]) -> Holders<u64> {
        let mut holders = Holders::new();
        held.iter().for_each(|(user, used, size)| holders.add(Some(*user), (*used, *used, *size)));
        holders
    }

    #[test]
    fn who_holds_most_makes_room_with_what_was_used_longest_ago() {
        let held = [(1, 9, 40), (1, 3, 40), (1, 7, 40), (2, 1, 50), (3, 2, 0)];
        assert_eq!(holders(&held).what_goes(170), []);
        assert_eq!(holders(&held).what_goes(140), [(Some(1), 3)]);
        assert_eq!(holders(&held).what_goes(90), [(Some(1), 3), (Some(1), 7)]);
        // Then the second user has more than the first.
        assert_eq!(holders(&held).what_goes(60), [(Some(1), 3), (Some(1), 7), (Some(2), 1)]);
        let mut all = holders(&held);
        all.add_fixed(1000);
        assert_eq!(all.what_goes(0).len(), 4, "what stays is not among what goes");
    }
}
