//! Memory cgroups by kernfs id: path, parent, counters, resident memory summed over the subtree,
//! and the curve.
//!
//! A record names a cgroup by id alone. Its path and parent arrive later as a fact, which the
//! engine requests. When a parent arrives late, the sums of the tree are built again.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::RangeInclusive;

use memtrace_incident::MappingNote;

use super::timeline::RecentCurve;
use super::{Point, Sums};
use crate::decode::{Limit, Reading};

/// Cgroups in the table, with removed ones. At the cap removed ones are dropped first, then the
/// longest silent ones.
pub(crate) const CGROUPS_CAP: usize = 4096;
/// Removed cgroups that stay in the table, so that late incidents still have their path.
const TOMBSTONES_CAP: usize = 1024;
/// Cgroups dropped at once when the table is full, because sorting it for each would be slow.
const EVICT_BATCH: usize = 128;
/// Ancestors that a change is added to.
pub(crate) const DEPTH_CAP: usize = 16;
/// Readings over all curves, about 15 MiB. Above it the curves of the longest silent cgroups are
/// dropped.
pub(crate) const POINTS_CAP: usize = 180_000;
/// Mapping notes of one cgroup; the oldest is dropped.
const NOTES_CAP: usize = 256;
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
    /// Ids to look up. The engine drains them after each input.
    pub(crate) lookups: Vec<u64>,
    pub(crate) evicted: u64,
    pub(crate) curves_dropped: u64,
    /// Whether a row with memory was ever dropped. If so, a new row may have memory already, and
    /// sums have to be rebuilt for it.
    lossy: bool,
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

    /// Inserts the cgroup when it is not in the table, and requests a lookup when its path is
    /// unknown. Returns whether sums have to be rebuilt, because a row with memory was dropped.
    pub(crate) fn ensure(&mut self, id: u64, boot_ns: u64) -> bool {
        let rebuild = !self.rows.contains_key(&id) && {
            self.make_room();
            self.rows.insert(id, CgroupRow::default());
            self.lossy
        };
        let Some(row) = self.rows.get_mut(&id) else { return rebuild };
        row.last_ns = row.last_ns.max(boot_ns);
        let due = row.lookup_ns.is_none_or(|asked| boot_ns >= asked.saturating_add(LOOKUP_RETRY_NS));
        if row.path.is_none() && !row.removed && due {
            row.lookup_ns = Some(boot_ns);
            self.lookups.push(id);
        }
        rebuild
    }

    /// Sets parent and path, as far as they are given. Returns whether sums have to be rebuilt.
    pub(crate) fn learn(&mut self, id: u64, parent: Option<u64>, path: Option<String>, boot_ns: u64) -> bool {
        let known = self.rows.contains_key(&id);
        let mut rebuild = !known && {
            self.make_room();
            self.rows.insert(id, CgroupRow { last_ns: boot_ns, ..CgroupRow::default() });
            self.lossy
        };
        let cyclic = parent.is_some_and(|p| self.in_tree(p, id));
        let Some(row) = self.rows.get_mut(&id) else { return rebuild };
        if path.is_some() {
            row.path = path;
        }
        if parent.is_some() && row.parent != parent && !cyclic {
            row.parent = parent;
            self.reshaped += u64::from(known);
            rebuild |= !row.tree.is_zero();
        }
        if let Some(parent) = parent.filter(|p| !cyclic && !self.rows.contains_key(p)) {
            rebuild |= self.ensure(parent, boot_ns);
        }
        rebuild
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

    fn forget(&mut self, id: u64) {
        let Some(row) = self.rows.remove(&id) else { return };
        self.points = self.points.saturating_sub(row.timeline.len());
        self.lossy |= !row.tree.is_zero();
    }

    fn make_room(&mut self) {
        if self.rows.len() < CGROUPS_CAP {
            return;
        }
        let class = |row: &CgroupRow| match row {
            CgroupRow { removed: true, .. } => 0u8,
            CgroupRow { path: None, tree, .. } if tree.is_zero() => 1,
            CgroupRow { tree, .. } if tree.is_zero() => 2,
            _ => 3,
        };
        let mut order: Vec<(u8, u64, u64)> = self
            .rows
            .iter()
            .filter(|(id, _)| !self.pinned.contains(id))
            .map(|(id, row)| (class(row), row.last_ns, *id))
            .collect();
        order.sort_unstable();
        for (_, _, id) in order.into_iter().take(EVICT_BATCH) {
            self.forget(id);
            self.evicted += 1;
        }
        let rows = &self.rows;
        self.tombstones.retain(|id| rows.contains_key(id));
    }

    /// Replaces `old` with `new` in the sums of a cgroup and its ancestors, for one address space.
    pub(crate) fn account(&mut self, id: u64, old: &Sums, new: &Sums) {
        if old == new {
            return;
        }
        for (i, member) in self.chain(id).into_iter().enumerate() {
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
        for row in self.rows.values_mut() {
            row.own = Sums::default();
            row.tree = Sums::default();
        }
        for (id, sums) in spaces {
            self.account(id, &Sums::default(), &sums);
        }
    }

    /// Stores a reading and adds it to the curve. Ancestors get a point with their sums and without
    /// usage. Every new point is appended to `new_points`.
    pub(crate) fn read(&mut self, boot_ns: u64, reading: &Reading, before_ns: u64, new_points: &mut Vec<(u64, Point)>) {
        let Some(id) = reading.cgroup_id else { return };
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
        let rows: usize =
            self.rows.values().map(|r| r.path.as_ref().map_or(0, String::len) + r.notes.len() * 128).sum();
        rows + self.rows.len() * (size_of::<CgroupRow>() + 32) + self.points * size_of::<Point>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reading(id: u64, usage: u64) -> Reading {
        Reading { cgroup_id: Some(id), usage: Some(usage), limit: Limit::Bytes(1 << 20), ..Reading::default() }
    }

    #[test]
    fn unknown_ids_are_asked_for_once_and_again_later() {
        let mut cgroups = Cgroups::default();
        cgroups.ensure(5, 1_000);
        cgroups.ensure(5, 2_000);
        assert_eq!(cgroups.lookups, [5]);
        cgroups.ensure(5, 1_000 + LOOKUP_RETRY_NS);
        assert_eq!(cgroups.lookups, [5, 5]);
        cgroups.learn(5, Some(1), Some("/a".into()), 0);
        assert_eq!(cgroups.lookups, [5, 5, 1], "the parent is unknown too");
        cgroups.ensure(5, 1 << 50);
        assert_eq!(cgroups.lookups.len(), 3);
    }

    #[test]
    fn sums_go_up_the_tree_also_when_the_parent_is_learnt_late() {
        let mut cgroups = Cgroups::default();
        let sums = Sums::of(10, 5, 1, 0);
        cgroups.ensure(5, 0);
        cgroups.account(5, &Sums::default(), &sums);
        assert!(cgroups.learn(5, Some(2), Some("/a/b".into()), 0), "a changed tree needs a rebuild");
        cgroups.learn(2, Some(1), Some("/a".into()), 0);
        cgroups.rebuild([(5, sums)].into_iter());
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
    fn a_cycle_is_refused() {
        let mut cgroups = Cgroups::default();
        cgroups.learn(1, Some(2), None, 0);
        cgroups.learn(2, Some(1), None, 0);
        cgroups.learn(3, Some(3), None, 0);
        assert_eq!(cgroups.chain(1), [1, 2]);
        assert_eq!(cgroups.chain(3), [3]);
    }

    #[test]
    fn rows_tombstones_and_points_are_bounded() {
        let mut cgroups = Cgroups::default();
        cgroups.pinned.insert(1);
        cgroups.learn(1, None, Some("/pinned".into()), 0);
        cgroups.remove(1);
        for id in 2..10_000u64 {
            cgroups.learn(id, None, Some(format!("/{id}")), id);
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
