//! What happens when there are more cgroups than the table has room for.
//!
//! With a plain "drop what was silent longest", 5,000 busy cgroups in a table of 4,096 would drop a
//! cgroup at each record, just before its next one, and ask for the path of the one that comes in.
//! So a cgroup that is merely named gets the room of removed and of idle ones, or none: then it is
//! not followed, and its readings are counted ([`memtrace_incident::Loss::CgroupsOverCap`]). A
//! cgroup that was just made comes with its path and gets the room of any that holds no memory. One
//! that a kill or a recording is about gets room in any case.

use super::{CGROUPS_CAP, CgroupRow, Cgroups};
use crate::world::World;

/// Cgroups dropped at once, because going through the table for each would be slow. For a kill,
/// which is rare, one is dropped.
const EVICT_BATCH: usize = 128;
/// A cgroup without memory and without a record for this long is idle. Shorter would ask for the
/// same cgroups more often.
const IDLE_NS: u64 = 10_000_000_000;

/// Sums that lack a cgroup are built again at most once in this time, because that costs as much as
/// there are processes and cgroups.
const REBUILD_NS: u64 = 1_000_000_000;

/// What a cgroup is wanted in the table for, with ever more that is dropped for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Need {
    /// A record or a fact names it.
    Named,
    /// It was made.
    Made,
    /// A kill or a recording is about it. Its path is looked up before that of others.
    Kill,
}

/// What dropping a row costs, cheapest first.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Class {
    Removed,
    WithoutPath,
    WithoutMemory,
    /// Others are below it.
    Above,
    /// It or a cgroup below it has memory.
    WithMemory,
}

impl World {
    /// Inserts cgroups that a kill or a recording is about, whatever has to be dropped for them.
    pub(crate) fn keep(&mut self, ids: impl IntoIterator<Item = u64>, ns: u64) {
        ids.into_iter().for_each(|id| self.cgroups.ensure(id, ns, Need::Kill));
        if self.cgroups.stale {
            self.rebuild();
        }
    }

    /// Builds the sums again that lack a cgroup which found no room before.
    pub(in crate::world) fn rebuild_if_due(&mut self, now: u64) {
        if self.cgroups.stale && now >= self.rebuilt_ns.saturating_add(REBUILD_NS) {
            self.rebuilt_ns = now;
            self.rebuild();
        }
    }
}

impl Cgroups {
    /// From now on there may be something to drop again.
    pub(crate) fn tick(&mut self) {
        self.full = [false; 2];
    }

    /// Drops rows if the table is full; false when there is none that may be dropped for this need.
    pub(super) fn make_room(&mut self, now: u64, need: Need) -> bool {
        if self.rows.len() < CGROUPS_CAP {
            return true;
        }
        if self.full.get(need as usize).is_some_and(|full| *full) {
            return false;
        }
        let most = if need == Need::Kill { 1 } else { EVICT_BATCH };
        for (_, _, id) in self.droppable(now, need).into_iter().take(most) {
            self.forget(id);
            self.evicted += 1;
        }
        let rows = &self.rows;
        self.tombstones.retain(|id| rows.contains_key(id));
        let room = self.rows.len() < CGROUPS_CAP;
        if let Some(full) = self.full.get_mut(need as usize) {
            *full = !room;
        }
        room
    }

    /// The rows that may be dropped: class, last record and id, cheapest first.
    fn droppable(&self, now: u64, need: Need) -> Vec<(Class, u64, u64)> {
        let idle = |row: &CgroupRow| row.last_ns.saturating_add(IDLE_NS) <= now;
        let may = |row: &CgroupRow| match need {
            Need::Named => row.removed || (row.tree.is_zero() && idle(row)),
            Need::Made => row.removed || row.tree.is_zero(),
            Need::Kill => true,
        };
        let mut order: Vec<(Class, u64, u64)> = self
            .rows
            .iter()
            .filter(|(id, row)| may(row) && !self.pinned.contains(id))
            .map(|(id, row)| (class(row), row.last_ns, *id))
            .collect();
        if order.is_empty() {
            return order;
        }
        let mut parents: Vec<u64> = self.rows.values().filter_map(|row| row.parent).collect();
        parents.sort_unstable();
        for (class, _, id) in &mut order {
            if *class != Class::Removed && parents.binary_search(id).is_ok() {
                *class = (*class).max(Class::Above);
            }
        }
        order.retain(|(class, ..)| need == Need::Kill || *class < Class::Above);
        order.sort_unstable();
        order
    }
}

fn class(row: &CgroupRow) -> Class {
    match row {
        CgroupRow { removed: true, .. } => Class::Removed,
        CgroupRow { tree, .. } if !tree.is_zero() => Class::WithMemory,
        CgroupRow { path: None, .. } => Class::WithoutPath,
        _ => Class::WithoutMemory,
    }
}

#[cfg(test)]
mod tests {
    use super::super::*;
    use super::*;

    const SEC: u64 = 1_000_000_000;
    const CAP: u64 = CGROUPS_CAP as u64;

    /// A full table: `memory` of the cgroups hold memory, all were named at one second.
    fn full(memory: u64) -> Cgroups {
        let mut cgroups = Cgroups::default();
        for id in 1..=CAP {
            cgroups.learn(id, None, Some(format!("/{id}")), SEC, Need::Named);
            if id <= memory {
                cgroups.account(id, &Sums::default(), &Sums::of(1, 0, 0, 0));
            }
        }
        cgroups.lookups.clear();
        assert_eq!((cgroups.len(), cgroups.evicted, cgroups.over_cap), (CGROUPS_CAP, 0, 0));
        cgroups
    }

    fn has(cgroups: &Cgroups, id: u64) -> bool {
        cgroups.get(id).is_some()
    }

    #[test]
    fn busy_cgroups_over_the_cap_are_counted_and_neither_followed_nor_asked_for() {
        let mut cgroups = full(0);
        let mut new_points = Vec::new();
        for round in 0..20u64 {
            for id in 1..=CAP + 1000 {
                let reading = Reading { cgroup_id: Some(id), usage: Some(1), ..Reading::default() };
                cgroups.ensure(id, (2 + round) * SEC, Need::Named);
                cgroups.read((2 + round) * SEC, &reading, 1 << 40, &mut new_points);
            }
            cgroups.tick();
        }
        assert_eq!((cgroups.evicted, cgroups.over_cap, cgroups.lookups.len()), (0, 20_000, 0));
        assert!(has(&cgroups, 1) && has(&cgroups, CAP) && !has(&cgroups, CAP + 1));
    }

    #[test]
    fn a_named_cgroup_gets_the_room_of_removed_and_idle_ones() {
        let mut cgroups = full(CAP - 2);
        cgroups.ensure(9999, SEC + IDLE_NS - 1, Need::Named);
        assert!(!has(&cgroups, 9999), "none is idle");
        cgroups.ensure(9999, SEC + IDLE_NS, Need::Named);
        assert!(!has(&cgroups, 9999), "not before the next tick");
        cgroups.tick();
        cgroups.ensure(9999, SEC + IDLE_NS, Need::Named);
        assert!(has(&cgroups, 9999) && !has(&cgroups, CAP) && !has(&cgroups, CAP - 1) && has(&cgroups, 1));
        assert_eq!((cgroups.evicted, &cgroups.lookups[..]), (2, &[(9999, false)][..]));
        let mut cgroups = full(0);
        cgroups.remove(7);
        cgroups.ensure(9999, SEC, Need::Named);
        assert!(has(&cgroups, 9999) && !has(&cgroups, 7) && cgroups.tombstones.is_empty());
    }

    #[test]
    fn a_made_cgroup_gets_the_room_of_any_that_holds_no_memory() {
        let mut cgroups = full(CAP - 1);
        cgroups.learn(9999, None, Some("/new".into()), SEC, Need::Made);
        assert!(has(&cgroups, 9999) && !has(&cgroups, CAP));
        cgroups.account(9999, &Sums::default(), &Sums::of(1, 0, 0, 0));
        cgroups.learn(9998, None, Some("/next".into()), SEC, Need::Made);
        assert!(!has(&cgroups, 9998));
        assert_eq!((cgroups.evicted, cgroups.over_cap), (1, 1));
    }

    #[test]
    fn a_kill_finds_room_in_any_case_and_its_path_is_asked_for_first() {
        let mut cgroups = full(CAP);
        cgroups.pinned = (2..=CAP).collect();
        cgroups.ensure(9999, SEC, Need::Kill);
        assert!(has(&cgroups, 9999) && !has(&cgroups, 1) && has(&cgroups, 2));
        assert_eq!((cgroups.evicted, &cgroups.lookups[..], cgroups.stale), (1, &[(9999, true)][..], true));
        cgroups.ensure(9999, SEC, Need::Kill);
        assert_eq!(cgroups.lookups.len(), 2, "each kill asks");
    }

    #[test]
    fn a_cgroup_that_others_are_below_stays_and_sums_are_right_without_a_dropped_one() {
        let mut cgroups = full(0);
        cgroups.learn(2, Some(1), None, SEC, Need::Named);
        cgroups.learn(3, Some(2), None, SEC, Need::Named);
        let sums = Sums::of(5, 0, 0, 0);
        cgroups.account(3, &Sums::default(), &sums);
        for id in 10_000..10_000 + CAP {
            cgroups.learn(id, None, None, 2 * SEC, Need::Made);
        }
        assert!(has(&cgroups, 1) && has(&cgroups, 2) && has(&cgroups, 3) && !has(&cgroups, 4));
        // For a kill, one that others are below goes before one with memory.
        cgroups.learn(10_500, Some(10_501), None, SEC, Need::Made);
        for id in 20_000..20_000 + (CGROUPS_CAP - cgroups.len()) as u64 {
            cgroups.ensure(id, SEC, Need::Made);
        }
        cgroups.pinned = cgroups.rows.keys().copied().filter(|id| ![3, 10_501].contains(id)).collect();
        cgroups.ensure(9999, SEC, Need::Kill);
        assert!(has(&cgroups, 3) && !has(&cgroups, 10_501));
        cgroups.forget(3);
        assert_eq!((cgroups.get(1).unwrap().tree, cgroups.get(2).unwrap().tree), Default::default());
        cgroups.stale = false;
        cgroups.ensure(3, 3 * SEC, Need::Kill);
        assert!(cgroups.stale);
    }

    #[test]
    fn once_all_memory_has_a_row_again_new_cgroups_need_no_rebuilding() {
        let mut cgroups = full(0);
        cgroups.pinned = (1..=CAP).collect();
        let sums = Sums::of(5, 0, 0, 0);
        cgroups.ensure(9999, SEC, Need::Made);
        assert!(!has(&cgroups, 9999));
        cgroups.pinned.clear();
        cgroups.tick();
        cgroups.ensure(9998, SEC, Need::Made);
        assert!(cgroups.stale, "it may have memory");
        cgroups.rebuild([(9999, sums)].into_iter());
        cgroups.ensure(9997, SEC, Need::Made);
        assert!(cgroups.stale, "9999 still has no row");
        cgroups.ensure(9999, SEC, Need::Made);
        cgroups.learn(9999, Some(9996), None, SEC, Need::Made);
        cgroups.rows.remove(&9996);
        cgroups.rebuild([(9999, sums)].into_iter());
        cgroups.ensure(9995, SEC, Need::Made);
        assert!(cgroups.stale, "the sums of 9996 are in no row");
        cgroups.ensure(9996, SEC, Need::Made);
        cgroups.rebuild([(9999, sums)].into_iter());
        cgroups.ensure(9994, SEC, Need::Made);
        assert!(!cgroups.stale && cgroups.get(9996).unwrap().tree == sums);
    }
}
