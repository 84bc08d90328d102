//! Memory cgroups by kernfs id: path, parent, counters, resident memory summed over the subtree,
//! and the curve.
//!
//! A record names a cgroup by id alone. Its path and parent arrive later as a fact, which the
//! engine requests. When a parent arrives late, the sums of the tree move to it. What happens when there
//! are more cgroups than the table has room for is in [`room`].

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::RangeInclusive;

use memtrace_incident::MappingNote;

mod room;

pub(crate) use room::Need;

use super::timeline::RecentCurve;
use super::{Point, Sums};
use crate::capacity;
use crate::decode::{Limit, Reading};

/// Cgroups in the table, with removed ones. At the cap removed ones are dropped first, then idle
/// ones; a cgroup that finds no room is counted and not followed.
pub const CGROUPS_CAP: usize = 4096;
/// Removed cgroups that stay in the table, so that late incidents still have their path.
const TOMBSTONES_CAP: usize = 1024;
/// Ancestors that a change is added to.
pub(crate) const DEPTH_CAP: usize = 16;
/// Readings over all curves, about 15 MiB. Above it the curves of the longest silent cgroups are
/// dropped.
pub(crate) const POINTS_CAP: usize = 180_000;
/// Mapping notes of one cgroup; the oldest is dropped.
const NOTES_CAP: usize = 256;
/// Readings and notes stay this much longer than an incident looks back, because a near miss is
/// reported long after it began.
const SLACK_NS: u64 = 60_000_000_000;
/// A lookup without an answer is requested again after this time.
const LOOKUP_RETRY_NS: u64 = 5_000_000_000;

/// One memory cgroup.
#[derive(Clone, Debug, Default)]
pub(crate) struct CgroupRow {
    pub(crate) parent: Option<u64>,
    pub(crate) path: Option<String>,
    pub(crate) removed: bool,
    /// Latest counters. Values that a reading lacks are from older ones.
    pub(crate) last: Reading,
    last_reading_ns: u64,
    /// Sum over the address spaces of this cgroup alone.
    pub(crate) own: Sums,
    /// Sum over the address spaces of its subtree.
    pub(crate) tree: Sums,
    pub(crate) timeline: RecentCurve,
    /// Oldest first. Cap: [`NOTES_CAP`].
    pub(crate) notes: VecDeque<MappingNote>,
    lookup_ns: Option<u64>,
    /// Whether its OOM killer is off (v1 `memory.oom_control`); `None` when that was not read.
    pub(crate) kill_disabled: Option<bool>,
    /// When the session was last requested to watch `memory.oom_control`, boot clock.
    pub(crate) watch_requested_ns: Option<u64>,
    /// RSS threshold of its processes in bytes, when it is not the one of the settings.
    pub(crate) rss_threshold: Option<u64>,
    last_ns: u64,
}

/// All cgroups.
#[derive(Clone, Debug, Default)]
pub(crate) struct Cgroups {
    /// By kernfs id. Cap: [`CGROUPS_CAP`].
    rows: BTreeMap<u64, CgroupRow>,
    /// Removed cgroups, oldest first. Cap: [`TOMBSTONES_CAP`].
    tombstones: VecDeque<u64>,
    /// Readings over all curves. Cap: [`POINTS_CAP`].
    points: usize,
    /// Cgroups that an open incident or a recording refers to, which are never dropped. Cap: that
    /// of open incidents times their victims, with ancestors.
    pub(crate) pinned: BTreeSet<u64>,
    /// Cgroups to look up, and whether a kill waits for it. The engine drains them after each input.
    pub(crate) lookups: Vec<(u64, bool)>,
    pub(crate) evicted: u64,
    /// Readings and facts of cgroups that found no room.
    pub(crate) over_cap: u64,
    /// Whether nothing can be dropped before the next tick, for [`Need::Named`] and [`Need::Made`].
    full: [bool; 2],
    pub(crate) curves_dropped: u64,
    /// Whether a cgroup that is not removed was dropped or found no room, and its memory may still be
    /// in no row. If so, a new row may have memory already.
    lossy: bool,
    /// Whether such a row was inserted, so that sums have to be rebuilt for it.
    pub(crate) stale: bool,
    /// The longest chain that memory was added to so far.
    longest_chain: usize,
    /// How often the parent of a known cgroup changed. Recordings check their scope again then.
    pub(crate) reshaped: u64,
}

impl Cgroups {
    pub(crate) fn len(&self) -> usize {
        self.rows.len()
    }

    #[cfg(test)]
    fn points(&self) -> usize {
        self.points
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (u64, &CgroupRow)> {
        self.rows.iter().map(|(id, row)| (*id, row))
    }

    pub(crate) fn get(&self, id: u64) -> Option<&CgroupRow> {
        self.rows.get(&id)
    }

    pub(crate) fn get_mut(&mut self, id: u64) -> Option<&mut CgroupRow> {
        self.rows.get_mut(&id)
    }

    pub(crate) fn path(&self, id: Option<u64>) -> Option<String> {
        self.rows.get(&id?)?.path.clone()
    }

    pub(crate) fn id_of_path(&self, path: &str) -> Option<u64> {
        self.rows.iter().find(|(_, row)| row.path.as_deref() == Some(path)).map(|(id, _)| *id)
    }

    /// The cgroup and its ancestors, as far as they are known, innermost first.
    pub(crate) fn chain(&self, id: u64) -> Vec<u64> {
        let mut chain = Vec::new();
        let mut next = Some(id);
        while let Some(id) = next {
            if chain.len() > DEPTH_CAP || chain.contains(&id) {
                break;
            }
            chain.push(id);
            next = self.rows.get(&id).and_then(|row| row.parent);
        }
        chain
    }

    pub(crate) fn in_tree(&self, id: u64, root: u64) -> bool {
        let mut next = Some(id);
        for _ in 0..=64 {
            match next {
                Some(id) if id == root => return true,
                Some(id) => next = self.rows.get(&id).and_then(|row| row.parent),
                None => return false,
            }
        }
        false
    }

    /// The curve of a cgroup within a span of boot-clock times, oldest first.
    pub(crate) fn rows(&self, id: u64, span: RangeInclusive<u64>) -> impl Iterator<Item = &Point> {
        self.rows.get(&id).into_iter().flat_map(move |row| row.timeline.rows(span.clone()))
    }

    /// What its subtree held at a moment; what it holds now when the curve does not reach back.
    pub(crate) fn sums_at(&self, id: u64, boot_ns: u64) -> Sums {
        let then = self.rows(id, 0..=boot_ns).last().map(|point| point.sums);
        then.or(self.rows.get(&id).map(|row| row.tree)).unwrap_or_default()
    }

    /// Inserts the cgroup when it is not in the table and there is room for it, and requests a
    /// lookup when its path is unknown.
    pub(crate) fn ensure(&mut self, id: u64, boot_ns: u64, need: Need) {
        if !self.insert(id, boot_ns, need) {
            return;
        }
        let Some(row) = self.rows.get_mut(&id) else { return };
        row.last_ns = row.last_ns.max(boot_ns);
        let due = row.lookup_ns.is_none_or(|asked| boot_ns >= asked.saturating_add(LOOKUP_RETRY_NS));
        if row.path.is_none() && !row.removed && (due || need == Need::Kill) {
            row.lookup_ns = Some(boot_ns);
            self.lookups.push((id, need == Need::Kill));
        }
    }

    /// Whether the cgroup is in the table, after inserting it if there is room.
    fn insert(&mut self, id: u64, boot_ns: u64, need: Need) -> bool {
        if self.rows.contains_key(&id) {
            return true;
        }
        if !self.make_room(boot_ns, need) {
            self.lossy = true;
            return false;
        }
        self.rows.insert(id, CgroupRow { last_ns: boot_ns, ..CgroupRow::default() });
        self.stale |= self.lossy;
        true
    }

    /// Sets parent and path, as far as they are given. Returns whether sums have to be rebuilt.
    pub(crate) fn learn(
        &mut self,
        id: u64,
        parent: Option<u64>,
        path: Option<String>,
        boot_ns: u64,
        need: Need,
    ) -> bool {
        let known = self.rows.contains_key(&id);
        if !self.insert(id, boot_ns, need) {
            self.over_cap += 1;
            return false;
        }
        let cyclic = parent.is_some_and(|p| self.in_tree(p, id));
        let Some(row) = self.rows.get_mut(&id) else { return false };
        if path.is_some() {
            row.path = path;
        }
        let moved = parent.is_some() && row.parent != parent && !cyclic;
        if moved {
            self.reshaped += u64::from(known);
        }
        if let Some(parent) = parent.filter(|p| !cyclic && !self.rows.contains_key(p)) {
            self.ensure(parent, boot_ns, need);
        }
        moved && !self.move_below(id, parent)
    }

    /// Makes a cgroup a child of `parent`, with what its subtree holds. Returns false when sums have
    /// to be rebuilt, because chains that become longer than [`DEPTH_CAP`] are cut.
    fn move_below(&mut self, id: u64, parent: Option<u64>) -> bool {
        let Some(tree) = self.rows.get(&id).map(|row| row.tree) else { return true };
        self.for_ancestors(id, |row| row.tree.subtract(&tree));
        if let Some(row) = self.rows.get_mut(&id) {
            row.parent = parent;
        }
        self.for_ancestors(id, |row| row.tree.add(&tree));
        tree.is_zero() || self.longest_chain + self.chain(id).len() <= DEPTH_CAP
    }

    fn for_ancestors(&mut self, id: u64, mut each: impl FnMut(&mut CgroupRow)) {
        for ancestor in self.chain(id).into_iter().skip(1) {
            let Some(row) = self.rows.get_mut(&ancestor) else { break };
            each(row);
        }
    }

    /// Marks a cgroup as removed. Its path and curve stay until [`TOMBSTONES_CAP`] is reached.
    pub(crate) fn remove(&mut self, id: u64) {
        if let Some(row) = self.rows.get_mut(&id).filter(|row| !row.removed) {
            row.removed = true;
            self.tombstones.push_back(id);
        }
        let mut kept = VecDeque::new();
        while self.tombstones.len() + kept.len() > TOMBSTONES_CAP {
            let Some(oldest) = self.tombstones.pop_front() else { break };
            if self.pinned.contains(&oldest) {
                kept.push_back(oldest);
            } else {
                self.forget(oldest);
            }
        }
        kept.into_iter().rev().for_each(|id| self.tombstones.push_front(id));
    }

    /// Drops a row. What its subtree holds no longer counts for its ancestors.
    fn forget(&mut self, id: u64) {
        let Some((tree, removed)) = self.rows.get(&id).map(|row| (row.tree, row.removed)) else { return };
        self.lossy |= !removed || !tree.is_zero();
        self.for_ancestors(id, |row| row.tree.subtract(&tree));
        if let Some(row) = self.rows.remove(&id) {
            self.points = self.points.saturating_sub(row.timeline.len());
        }
    }

    /// Replaces `old` with `new` in the sums of a cgroup and its ancestors, for one address space.
    pub(crate) fn account(&mut self, id: u64, old: &Sums, new: &Sums) {
        if old == new {
            return;
        }
        let chain = self.chain(id);
        self.longest_chain = self.longest_chain.max(chain.len());
        for (i, member) in chain.into_iter().enumerate() {
            let Some(row) = self.rows.get_mut(&member) else { break };
            if i == 0 {
                row.own.add(new);
                row.own.subtract(old);
            }
            row.tree.add(new);
            row.tree.subtract(old);
        }
    }

    /// Computes all sums again from the address spaces, after the tree changed.
    pub(crate) fn rebuild(&mut self, spaces: impl Iterator<Item = (u64, Sums)>) {
        self.stale = false;
        for row in self.rows.values_mut() {
            row.own = Sums::default();
            row.tree = Sums::default();
        }
        let mut unaccounted = false;
        for (id, sums) in spaces {
            unaccounted |= !self.rows.contains_key(&id);
            self.account(id, &Sums::default(), &sums);
        }
        // Sums end at an ancestor that has no row.
        let ends = |row: &CgroupRow| row.parent.is_some_and(|parent| !self.rows.contains_key(&parent));
        unaccounted |= self.rows.values().any(|row| !row.tree.is_zero() && ends(row));
        self.lossy &= unaccounted;
    }

    /// Stores a reading and adds it to the curve. Ancestors get a point with their sums and without
    /// usage. Every new point is appended to `new_points`. A reading of a cgroup that found no room
    /// is counted.
    pub(crate) fn read(&mut self, boot_ns: u64, reading: &Reading, before_ns: u64, new_points: &mut Vec<(u64, Point)>) {
        let Some(id) = reading.cgroup_id else { return };
        self.over_cap += u64::from(!self.rows.contains_key(&id));
        for (i, member) in self.chain(id).into_iter().enumerate() {
            let Some(row) = self.rows.get_mut(&member) else { break };
            row.last_ns = row.last_ns.max(boot_ns);
            let own;
            let shown = if i == 0 {
                row.last = if boot_ns >= row.last_reading_ns { reading.or(&row.last) } else { row.last.or(reading) };
                row.last_reading_ns = row.last_reading_ns.max(boot_ns);
                own = Reading { limit: reading.limit.or(row.last.limit), ..*reading };
                &own
            } else {
                own = Reading { limit: row.last.limit, ..Reading::default() };
                &own
            };
            let point = Point::new(boot_ns, shown, row.tree);
            let before = row.timeline.len();
            row.timeline.insert(point, before_ns);
            self.points = (self.points + row.timeline.len()).saturating_sub(before);
            new_points.push((member, point));
        }
        if self.points > POINTS_CAP {
            self.drop_curves(id);
        }
    }

    fn drop_curves(&mut self, active: u64) {
        let mut order: Vec<(bool, u64, u64)> = self
            .rows
            .iter()
            .filter(|(id, row)| **id != active && row.timeline.len() > 0)
            .map(|(id, row)| (self.pinned.contains(id), row.last_ns, *id))
            .collect();
        order.sort_unstable();
        for (_, _, id) in order {
            if self.points <= POINTS_CAP / 8 * 7 {
                break;
            }
            if let Some(row) = self.rows.get_mut(&id) {
                self.points = self.points.saturating_sub(row.timeline.len());
                row.timeline.clear();
                self.curves_dropped += 1;
            }
        }
    }

    pub(crate) fn note(&mut self, id: u64, note: MappingNote) {
        if let Some(row) = self.rows.get_mut(&id) {
            if row.notes.len() >= NOTES_CAP {
                row.notes.pop_front();
            }
            row.notes.push_back(note);
        }
    }

    /// Drops readings and notes that no incident can need but the last reading; gives memory back.
    pub(crate) fn tidy(&mut self, now: u64, before_ns: u64) {
        let oldest_ns = now.saturating_sub(before_ns.saturating_add(SLACK_NS));
        for row in self.rows.values_mut() {
            let before = row.timeline.len();
            row.timeline.tidy(oldest_ns);
            self.points = (self.points + row.timeline.len()).saturating_sub(before);
            while row.notes.front().is_some_and(|note| note.boot_ns < oldest_ns) {
                row.notes.pop_front();
            }
            capacity::shrink(&mut row.notes, 4);
        }
        capacity::shrink(&mut self.tombstones, 64);
    }

    /// Limit of a cgroup in bytes; `None` when it has none or it is unknown.
    pub(crate) fn limit(&self, id: u64) -> Option<u64> {
        self.rows.get(&id).and_then(|row| row.last.limit.bytes())
    }

    /// The smallest known limit of the cgroup and its ancestors, in bytes.
    pub(crate) fn effective_limit(&self, id: u64) -> Option<u64> {
        self.chain(id).into_iter().filter_map(|member| self.limit(member)).min()
    }

    /// Takes counters of a fact that only identifies the cgroup: fills gaps and never overwrites.
    pub(crate) fn fill(&mut self, id: u64, limit: Option<u64>, peak: Option<u64>) {
        if let Some(row) = self.rows.get_mut(&id) {
            row.last.cgroup_id = Some(id);
            row.last.limit = row.last.limit.or(limit.map_or(Limit::Unknown, Limit::Bytes));
            row.last.watermark = row.last.watermark.max(peak);
        }
    }

    pub(crate) fn memory_estimate(&self) -> usize {
        let of_row = |row: &CgroupRow| {
            let curve = row.timeline.capacity() * size_of::<Point>();
            row.path.as_ref().map_or(0, String::len) + row.notes.capacity() * 128 + curve
        };
        let rows: usize = self.rows.values().map(of_row).sum();
        rows + self.rows.len() * (size_of::<CgroupRow>() + 32) + self.tombstones.capacity() * 8
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reading(id: u64, usage: u64) -> Reading {
        Reading { cgroup_id: Some(id), usage: Some(usage), limit: Limit::Bytes(1 << 20), ..Reading::default() }
    }

    fn ids(cgroups: &Cgroups) -> Vec<u64> {
        cgroups.lookups.iter().map(|(id, _)| *id).collect()
    }

    #[test]
    fn unknown_ids_are_asked_for_once_and_again_later() {
        let mut cgroups = Cgroups::default();
        cgroups.ensure(5, 1_000, Need::Named);
        cgroups.ensure(5, 2_000, Need::Named);
        assert_eq!(ids(&cgroups), [5]);
        cgroups.ensure(5, 1_000 + LOOKUP_RETRY_NS, Need::Named);
        assert_eq!(ids(&cgroups), [5, 5]);
        cgroups.learn(5, Some(1), Some("/a".into()), 0, Need::Named);
        assert_eq!(ids(&cgroups), [5, 5, 1], "the parent is unknown too");
        cgroups.ensure(5, 1 << 50, Need::Named);
        assert_eq!(cgroups.lookups.len(), 3);
    }

    #[test]
    fn sums_go_up_the_tree_also_when_the_parent_is_learnt_late() {
        let mut cgroups = Cgroups::default();
        let sums = Sums::of(10, 5, 1, 0);
        cgroups.ensure(5, 0, Need::Named);
        cgroups.account(5, &Sums::default(), &sums);
        assert!(!cgroups.learn(5, Some(2), Some("/a/b".into()), 0, Need::Named), "no chain is cut");
        cgroups.learn(2, Some(1), Some("/a".into()), 0, Need::Named);
        assert_eq!((cgroups.get(1).unwrap().tree, cgroups.get(1).unwrap().own), (sums, Sums::default()));
        let less = Sums::of(4, 5, 1, 0);
        cgroups.account(5, &sums, &less);
        assert_eq!((cgroups.get(2).unwrap().tree, cgroups.get(5).unwrap().own), (less, less));
        let mut new_points = Vec::new();
        cgroups.read(7, &reading(5, 99), 1 << 40, &mut new_points);
        let usages: Vec<_> = new_points.iter().map(|(id, p)| (*id, p.usage(), p.sums.anon)).collect();
        assert_eq!(usages, [(5, Some(99), 4), (2, None, 4), (1, None, 4)]);
    }

    #[test]
    fn a_moved_tree_has_the_sums_of_a_rebuilt_one() {
        let mut cgroups = Cgroups::default();
        let sums = Sums::of(3, 2, 1, 0);
        let held: Vec<(u64, Sums)> = (1..=40).map(|id| (id, sums)).collect();
        for (id, sums) in &held {
            cgroups.ensure(*id, 0, Need::Named);
            cgroups.account(*id, &Sums::default(), sums);
        }
        // Short chains, another parent, and chains that are cut.
        let moves = (2..=9).map(|id| (id, id / 2)).chain([(4, 1), (8, 3)]).chain((10..40).map(|id| (id + 1, id)));
        for (id, parent) in moves {
            if cgroups.learn(id, Some(parent), None, 0, Need::Named) {
                cgroups.rebuild(held.iter().copied());
            }
            let mut rebuilt = cgroups.clone();
            rebuilt.rebuild(held.iter().copied());
            let trees = |of: &Cgroups| -> Vec<Sums> { of.iter().map(|(_, row)| row.tree).collect() };
            assert_eq!(trees(&cgroups), trees(&rebuilt), "{id} below {parent}");
        }
    }

    #[test]
    fn a_cycle_is_refused() {
        let mut cgroups = Cgroups::default();
        cgroups.learn(1, Some(2), None, 0, Need::Named);
        cgroups.learn(2, Some(1), None, 0, Need::Named);
        cgroups.learn(3, Some(3), None, 0, Need::Named);
        assert_eq!(cgroups.chain(1), [1, 2]);
        assert_eq!(cgroups.chain(3), [3]);
    }

    #[test]
    fn rows_tombstones_and_points_are_bounded() {
        let mut cgroups = Cgroups::default();
        cgroups.pinned.insert(1);
        cgroups.learn(1, None, Some("/pinned".into()), 0, Need::Named);
        cgroups.remove(1);
        for id in 2..10_000u64 {
            cgroups.learn(id, None, Some(format!("/{id}")), id, Need::Made);
            if id % 2 == 0 {
                cgroups.remove(id);
            }
        }
        assert!(cgroups.len() <= CGROUPS_CAP && cgroups.tombstones.len() <= TOMBSTONES_CAP && cgroups.evicted > 0);
        assert_eq!(cgroups.path(Some(1)).as_deref(), Some("/pinned"));
        let mut new_points = Vec::new();
        for i in 0..400_000u64 {
            cgroups.read(1_000_000_000 + i * 1000, &reading(9_000 + i % 900, i), 1 << 40, &mut new_points);
            new_points.clear();
            assert!(cgroups.points() <= POINTS_CAP + 1);
        }
        let real: usize = cgroups.iter().map(|(_, row)| row.timeline.len()).sum();
        assert_eq!(real, cgroups.points());
        assert!(cgroups.curves_dropped > 0);
    }
}
