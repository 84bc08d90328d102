//! The model of which process and cgroup holds how much memory.
//!
//! Memory belongs to an address space, and an address space counts for the cgroup of its owner. So
//! processes that share an address space count once, and what a cgroup holds is a sum over address
//! spaces. For example, a `vfork` child adds a process to the table and no memory to its cgroup.

use std::collections::{BTreeMap, VecDeque};

use memtrace_common::event as wire;
use memtrace_incident::MappingNote;

use crate::capacity;
use crate::decode::{Reading, cgroup_id, field_text, known, printable};
use crate::input::{CgroupFound, ProcessFound, Settings};

mod address_spaces;
mod cgroups;
mod changes;
mod processes;
mod queries;
mod timeline;
mod view;

use address_spaces::AddressSpace;
pub use cgroups::CGROUPS_CAP;
pub(crate) use cgroups::{CgroupRow, Cgroups, Need};
pub(crate) use changes::Changes;
pub use processes::PROCESSES_CAP;
pub(crate) use processes::{ProcessKey, ProcessRow, Processes, comm};
pub(crate) use queries::{GROWTH_CAP, TASKS_CAP, VICTIMS_CAP, resident};
pub use timeline::MAX_BEFORE_NS;
pub(crate) use timeline::{CURVE_CAP, Curve, Point, Sums, TIMELINE_CAP, columns};
pub(crate) use view::{Moments, VIEW_NOTES_CAP, View, ViewOf};

use processes::History;

/// Address spaces whose last user has exited and that are not torn down yet; the oldest is dropped.
const DYING_CAP: usize = 4096;
/// Such an address space is dropped after this time, in case the record of its end was lost.
const DYING_NS: u64 = 2_000_000_000;

/// Processes, address spaces and cgroups.
#[derive(Clone, Debug)]
pub(crate) struct World {
    pub(crate) processes: Processes,
    pub(crate) cgroups: Cgroups,
    /// By serial. Cap: [`processes::PROCESSES_CAP`] and [`DYING_CAP`].
    pub(crate) spaces: BTreeMap<u64, AddressSpace>,
    /// Serial by identity on the wire. Cap: as `spaces`.
    pub(crate) by_mm_id: BTreeMap<u64, u64>,
    /// When the last user exited, and the serial; oldest first. Cap: [`DYING_CAP`].
    dying: VecDeque<(u64, u64)>,
    pub(crate) next_space: u64,
    before_ns: u64,
    /// When sums were built again last.
    rebuilt_ns: u64,
    /// What the current input changed. Emptied after each input.
    pub(crate) changes: Changes,
}

impl Default for World {
    fn default() -> Self {
        let settings = Settings::default();
        let mut processes = Processes::default();
        processes.ticks_per_second = settings.ticks_per_second;
        Self {
            processes,
            cgroups: Cgroups::default(),
            spaces: BTreeMap::new(),
            by_mm_id: BTreeMap::new(),
            dying: VecDeque::new(),
            next_space: 0,
            before_ns: settings.before_ns,
            rebuilt_ns: 0,
            changes: Changes::default(),
        }
    }
}

impl World {
    pub(crate) fn configure(&mut self, settings: &Settings) {
        self.before_ns = settings.before_ns.min(MAX_BEFORE_NS);
        self.processes.ticks_per_second = settings.ticks_per_second;
    }

    /// Resident memory of an address space moved.
    pub(crate) fn rss(&mut self, r: &wire::RssChange) {
        let ns = r.header.boot_ns;
        let reading = Reading::from(&r.memcg);
        let dying = r.flags & wire::RSS_DYING != 0;
        let key = if dying { self.find(&r.task) } else { Some(self.lookup_or_insert(&r.task, r.memcg.cgroup_id, ns)) };
        self.ensure(reading.cgroup_id, ns);
        let row = key.and_then(|k| self.processes.get(k));
        let live_mm = row.filter(|row| row.exited.is_none()).map(|row| row.mm);
        // A record that was overtaken by that of a move.
        let moved_to = row.filter(|row| row.cgroup_ns > ns && !dying).and_then(|row| row.cgroup);
        let cgroup = moved_to.or(reading.cgroup_id);
        if let (Some(id), Some(key), Some(_), wire::RSS_FIRST, false) = (known(r.mm_id), key, live_mm, r.reason, dying)
        {
            self.drop_former(id, key, ns);
        }
        let space = match (known(r.mm_id), live_mm) {
            (Some(id), Some(_)) if !dying => self.named_space(id, key.unwrap_or_default(), cgroup, ns),
            (Some(id), _) => self.owned_by(id, &r.task, ns).or_else(|| self.left_space(id, key?, ns)),
            (None, mm) => mm.flatten(),
        };
        if let (Some(key), Some(serial), true, Some(_)) = (key, space, !dying, live_mm) {
            self.attach_space(key, serial);
        }
        // A late record of the program before says nothing about this one, but of those who share it.
        let current = space.is_some() || dying || known(r.mm_id).is_none();
        let space =
            space.or_else(|| known(r.mm_id).filter(|_| live_mm.is_some()).and_then(|id| self.space_then(id, ns)));
        let mut resident = None;
        // A record that comes after a newer one of the same space says nothing about now.
        if let Some(serial) = space
            && let Some(before) = self.spaces.get_mut(&serial).filter(|space| space.read_ns <= ns)
        {
            before.read_ns = ns;
            before.owner = key.unwrap_or(before.owner);
            let sums = Sums::from_wire(&r.rss, before.sums);
            self.set_space(serial, cgroup, sums);
            resident = Some(sums.resident());
        }
        if let Some(row) = key.and_then(|k| self.processes.get_mut(k)).filter(|_| current) {
            let now = resident.unwrap_or_else(|| Sums::from_wire(&r.rss, Sums::default()).resident());
            row.raise_peak(now.max(known(r.peak_bytes).unwrap_or(0)));
            row.history.push(ns, now);
        }
        self.read(ns, &reading);
        self.changes.processes.extend(key);
        self.changes.moved = key.map(|key| (key, ns));
    }

    /// A process was created.
    pub(crate) fn fork(&mut self, r: &wire::Fork) {
        let ns = r.header.boot_ns;
        self.ensure(cgroup_id(r.cgroup_id), ns);
        let parent = self.find(&r.parent);
        if r.flags & wire::FORK_SHARES_MM != 0
            && let Some(parent) = parent
        {
            self.expect_space(parent, ns);
        }
        let (serial, shared) = parent
            .and_then(|k| self.processes.get(k))
            .map_or((None, None), |row| (Some(row.serial), row.mm.filter(|_| r.flags & wire::FORK_SHARES_MM != 0)));
        // The record is late and the parent has another program since.
        let shared = shared.filter(|space| !self.is_newer(*space, ns));
        let key = self.lookup_or_insert(&r.child, r.cgroup_id, ns);
        if let Some(row) = self.processes.get_mut(key) {
            row.parent_pid = r.parent.tgid;
            row.parent_serial = serial.filter(|s| *s != row.serial);
            let fresh = row.mm.is_none() && row.exited.is_none();
            if let Some(space) = shared.filter(|_| fresh) {
                self.attach_space(key, space);
            }
        }
        self.changes.processes.push(key);
    }

    /// A process replaced its program, and with it its address space.
    pub(crate) fn exec(&mut self, r: &wire::Exec) {
        let ns = r.header.boot_ns;
        self.ensure(cgroup_id(r.cgroup_id), ns);
        let key = self.lookup_or_insert(&r.task, r.cgroup_id, ns);
        let alive = self.processes.get(key).is_some_and(|row| row.exited.is_none());
        let named = known(r.mm_id).filter(|_| alive);
        if let Some(id) = named {
            self.drop_former(id, key, ns);
        }
        let space = named.and_then(|id| self.space_of(id, key, cgroup_id(r.cgroup_id), ns));
        if named.is_some() && space.is_none() {
            return;
        }
        if let Some(row) = self.processes.get_mut(key).filter(|row| row.exited.is_none()) {
            row.comm = comm(&r.task);
        }
        if let Some(space) = space {
            self.attach_space(key, space);
            // Peak and history belong to the program before.
            if let Some(row) = self.processes.get_mut(key) {
                row.peak = None;
                row.history = History::default();
            }
        } else if let Some(old) = self.processes.get_mut(key).and_then(|row| row.mm.take()) {
            self.release(old);
        }
        self.changes.processes.push(key);
        self.changes.exec = Some((key, ns));
    }

    /// A process exited. Its memory counts until its address space is torn down.
    pub(crate) fn exit(&mut self, r: &wire::Exit) {
        let Some(key) = self.find(&r.task) else { return };
        let Some(row) = self.processes.get_mut(key) else { return };
        row.update_comm(&r.task);
        row.max_rss = row.max_rss.max(known(r.max_rss_bytes));
        self.mark_exited(key, r.header.boot_ns, Some(r.exit_code));
        self.changes.processes.push(key);
    }

    /// An address space was torn down. The record may come after the first record of the next space
    /// with the same identity.
    pub(crate) fn mm_gone(&mut self, r: &wire::MmGone) {
        if let Some(serial) = self.owned_by(r.mm_id, &r.task, r.header.boot_ns) {
            self.drop_space(serial);
        }
        let Some(key) = self.find(&r.task) else { return };
        let Some(row) = self.processes.get_mut(key) else { return };
        if let Some(peak) = known(r.peak_bytes) {
            row.raise_peak(peak);
        }
        self.changes.processes.push(key);
    }

    /// A process moved into a cgroup. The address space that it owns counts there from now on.
    pub(crate) fn attach(&mut self, r: &wire::CgroupAttach) {
        let ns = r.header.boot_ns;
        let Some(id) = cgroup_id(r.cgroup_id) else { return };
        if r.whole_process == 0 && r.task.tid != r.task.tgid {
            return;
        }
        self.ensure(Some(id), ns);
        let key = self.lookup_or_insert(&r.task, r.cgroup_id, ns);
        let mm = self.processes.get(key).filter(|row| row.cgroup_ns <= ns).and_then(|row| row.mm);
        if let Some((serial, sums)) =
            mm.and_then(|s| self.spaces.get(&s).filter(|space| space.owner == key).map(|space| (s, space.sums)))
        {
            self.set_space(serial, Some(id), sums);
        }
        self.changes.processes.push(key);
    }

    /// A cgroup was made or removed.
    pub(crate) fn cgroup_change(&mut self, r: &wire::CgroupChange) {
        let ns = r.header.boot_ns;
        let reading = Reading::from(&r.memcg);
        let Some(id) = reading.cgroup_id else { return };
        let bytes = usize::try_from(r.path_len).ok().and_then(|len| r.path.get(..len)).unwrap_or(&r.path);
        let mut path = field_text(bytes);
        if r.flags & wire::PATH_CUT != 0 {
            path.push('…');
        }
        let need = if r.change == wire::CGROUP_MADE { Need::Made } else { Need::Named };
        if self.cgroups.learn(id, cgroup_id(r.parent_id), (!path.is_empty()).then_some(path), ns, need) {
            self.rebuild();
        }
        if let Some(row) = self.cgroups.get_mut(id).filter(|_| r.change == wire::CGROUP_MADE) {
            row.removed = false;
        }
        self.read(ns, &reading);
        if r.change == wire::CGROUP_REMOVED {
            self.cgroups.remove(id);
        }
    }

    /// A mapping call.
    pub(crate) fn mapping(&mut self, r: &wire::Mapping) {
        let Some(id) = cgroup_id(r.cgroup_id) else { return };
        self.ensure(Some(id), r.header.boot_ns);
        let size = i64::try_from(r.size_bytes).unwrap_or(i64::MAX);
        let (call, grew) = match r.call {
            wire::CALL_MMAP => ("mmap", true),
            wire::CALL_MUNMAP => ("munmap", false),
            wire::CALL_MREMAP => ("mremap", r.grew != 0),
            wire::CALL_BRK => ("brk", r.grew != 0),
            wire::CALL_MADVISE => ("madvise", false),
            _ => ("unknown", r.grew != 0),
        };
        let note = MappingNote {
            boot_ns: r.header.boot_ns,
            pid: r.task.tgid,
            comm: comm(&r.task),
            call: call.to_owned(),
            address: Some(r.address),
            change_bytes: if grew { size } else { -size },
            small_mapped_bytes: known(r.mapped_bytes).unwrap_or(0),
            small_unmapped_bytes: known(r.unmapped_bytes).unwrap_or(0),
        };
        self.cgroups.note(id, note.clone());
        self.changes.mapped = Some((id, note));
    }

    /// The OOM killer marked a victim. The mark has the exact resident memory of the victim, while
    /// the last reading may differ by the RSS threshold, so the sums take the mark's figure.
    pub(crate) fn mark(&mut self, m: &wire::OomVictim) {
        let Some(key) = self.find(&m.victim) else { return };
        let Some(serial) = self.processes.get(key).and_then(|row| row.mm) else { return };
        let Some(sums) = self.spaces.get(&serial).map(|s| Sums::from_wire(&m.rss, s.sums)) else { return };
        let ns = m.header.boot_ns;
        // After a newer reading the mark is late, and the space may be somebody else's by now.
        let read = known(m.rss.anon_bytes).is_some();
        if let Some(space) =
            self.spaces.get_mut(&serial).filter(|space| read && space.read_ns.max(space.since_ns) <= ns)
        {
            space.read_ns = ns;
            self.set_space(serial, None, sums);
        }
        if let Some(row) = self.processes.get_mut(key) {
            row.history.push(ns, sums.resident());
            row.raise_peak(sums.resident());
        }
    }

    /// Takes a reading of a cgroup's counters and adds it to the curve.
    pub(crate) fn read(&mut self, boot_ns: u64, reading: &Reading) {
        if let Some(id) = reading.cgroup_id {
            self.ensure(Some(id), boot_ns);
            self.cgroups.read(boot_ns, reading, self.before_ns, &mut self.changes.points);
        }
    }

    /// A fact described a cgroup. With usage the fact is a reading too.
    pub(crate) fn cgroup_found(&mut self, found: &CgroupFound) {
        let Some(id) = cgroup_id(found.id) else { return };
        let path = printable(found.path.as_bytes());
        let parent = found.parent_id.and_then(cgroup_id);
        if self.cgroups.learn(id, parent, (!path.is_empty()).then_some(path), found.boot_ns, Need::Named) {
            self.rebuild();
        }
        if self.cgroups.get(id).is_none() {
            return;
        }
        match found.usage_bytes {
            None => self.cgroups.fill(id, found.limit_bytes, found.peak_bytes),
            Some(usage) => {
                let limit = found.limit_bytes.map_or(crate::decode::Limit::Unlimited, crate::decode::Limit::Bytes);
                let reading = Reading {
                    cgroup_id: Some(id),
                    usage: Some(usage),
                    limit,
                    watermark: found.peak_bytes,
                    ..Reading::default()
                };
                self.read(found.boot_ns, &reading);
            }
        }
    }

    /// A fact described a process that ran already when tracing began. What records have set stays.
    pub(crate) fn process_found(&mut self, found: &ProcessFound) {
        let sums = Sums::of(found.anon_bytes, found.file_bytes, found.shmem_bytes, found.swap_bytes);
        let cgroup = cgroup_id(found.cgroup_id);
        let known = self.processes.find_by_ticks(found.pid, found.start_ticks);
        let key = match known {
            Some(key) => key,
            None => {
                self.make_room();
                let start = self.processes.start_of_ticks(found.start_ticks);
                self.processes.insert((found.pid, start), false, found.start_ticks, found.boot_ns);
                if let Some(row) = self.processes.get_mut((found.pid, start)) {
                    row.parent_pid = found.parent_pid;
                    row.comm = printable(found.comm.as_bytes());
                }
                (found.pid, start)
            }
        };
        let lacks_cgroup = self.processes.get(key).is_some_and(|row| row.cgroup.is_none());
        let wants_cgroup = cgroup.is_some() && lacks_cgroup;
        if wants_cgroup {
            self.ensure(cgroup, found.boot_ns);
        }
        let Some(row) = self.processes.get_mut(key) else { return };
        row.cgroup = row.cgroup.or(cgroup);
        let unread = row.mm.is_none_or(|mm| self.spaces.get(&mm).is_some_and(AddressSpace::is_unread));
        let wants_space = unread && row.exited.is_none() && !sums.is_zero();
        if wants_space {
            row.history.push(found.boot_ns, sums.resident());
            row.raise_peak(sums.resident().max(found.peak_bytes));
            let cgroup = row.cgroup;
            if let Some(serial) = self.expect_space(key, found.boot_ns) {
                self.set_space(serial, cgroup, sums);
            }
        }
        if known.is_none() || wants_cgroup || wants_space {
            self.changes.processes.push(key);
        }
    }

    /// Drops address spaces and processes whose time is over.
    pub(crate) fn tick(&mut self, now: u64) {
        while self.dying.front().is_some_and(|(ns, _)| ns.saturating_add(DYING_NS) < now) {
            let Some((_, serial)) = self.dying.pop_front() else { break };
            self.drop_unused(serial);
        }
        for serial in self.processes.tick(now) {
            self.release(serial);
        }
        self.cgroups.tick();
        self.rebuild_if_due(now);
    }

    /// Drops readings and mappings that no incident can need any more, and gives memory back.
    pub(crate) fn tidy(&mut self, now: u64) {
        self.cgroups.tidy(now, self.before_ns);
        capacity::shrink(&mut self.dying, 64);
    }

    /// Resident memory of a process now; `None` when it has no known address space.
    pub(crate) fn sums_of(&self, row: &ProcessRow) -> Option<Sums> {
        self.space_sums(row.mm?)
    }

    pub(crate) fn space_sums(&self, serial: u64) -> Option<Sums> {
        self.spaces.get(&serial).filter(|space| !space.is_unread()).map(|space| space.sums)
    }

    /// The key of a wire task, as [`Processes::find`]. A process that gets its exact start, and with
    /// it another key, still owns its address space.
    pub(crate) fn find(&mut self, task: &wire::Task) -> Option<ProcessKey> {
        let key = self.processes.find(task.tgid, task.start_boot_ns)?;
        if let Some(space) = self.processes.get(key).and_then(|row| row.mm).and_then(|mm| self.spaces.get_mut(&mm))
            && space.owner != key
            && space.owner.0 == key.0
            && self.processes.get(space.owner).is_none()
        {
            space.owner = key;
        }
        Some(key)
    }

    #[cfg(test)]
    fn spaces(&self) -> usize {
        self.spaces.len()
    }

    pub(crate) fn memory_estimate(&self) -> usize {
        self.processes.memory_estimate()
            + self.cgroups.memory_estimate()
            + self.spaces.len() * 180
            + self.dying.capacity() * 16
    }

    /// The key of a live process, which is inserted when there is none. Older processes with the
    /// same pid are marked as exited.
    fn lookup_or_insert(&mut self, task: &wire::Task, cgroup: u64, ns: u64) -> ProcessKey {
        let key = match self.find(task) {
            Some(key) => key,
            None => {
                let key = (task.tgid, task.start_boot_ns);
                let stale: Vec<ProcessKey> = self
                    .processes
                    .of_pid(task.tgid)
                    .filter(|r| r.exited.is_none() && r.start_boot_ns < key.1)
                    .map(ProcessRow::key)
                    .collect();
                for old in stale {
                    self.mark_exited(old, ns, None);
                }
                self.make_room();
                let ticks = self.processes.ticks(task.start_boot_ns);
                self.processes.insert(key, true, ticks, ns);
                key
            }
        };
        if let Some(row) = self.processes.get_mut(key).filter(|row| row.exited.is_none()) {
            row.update_comm(task);
            if ns >= row.cgroup_ns
                && let Some(id) = cgroup_id(cgroup)
            {
                (row.cgroup, row.cgroup_ns) = (Some(id), ns);
            }
            row.last_ns = row.last_ns.max(ns);
        }
        key
    }

    fn make_room(&mut self) {
        for serial in self.processes.make_room() {
            self.release(serial);
        }
    }

    fn ensure(&mut self, id: Option<u64>, ns: u64) {
        if let Some(id) = id {
            self.cgroups.ensure(id, ns, Need::Named);
        }
    }

    fn rebuild(&mut self) {
        self.cgroups.rebuild(self.spaces.values().filter_map(|s| s.cgroup.map(|id| (id, s.sums))));
    }

    fn mark_exited(&mut self, key: ProcessKey, ns: u64, code: Option<u32>) {
        let Some(serial) = self.processes.exit(key, ns, code) else { return };
        let Some(space) = self.spaces.get_mut(&serial) else { return };
        space.users = space.users.saturating_sub(1);
        if space.users > 0 {
            return;
        }
        if self.dying.len() >= DYING_CAP
            && let Some((_, oldest)) = self.dying.pop_front()
        {
            self.drop_unused(oldest);
        }
        self.dying.push_back((ns, serial));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_support::{self, MIB, Tweak};

    fn tree(world: &World, id: u64) -> u64 {
        world.cgroups.get(id).map_or(0, |row| row.tree.anon)
    }

    fn held(world: &World, pid: u32) -> Option<u64> {
        let row = world.processes.get((pid, test_support::start(pid))).unwrap();
        world.sums_of(row).map(|sums| sums.anon)
    }

    #[test]
    fn a_late_reading_replaces_neither_a_newer_one_nor_a_newer_move() {
        let mut world = World::default();
        world.rss(&test_support::rss(3_000, 10, 5, 77, 50 * MIB));
        world.rss(&test_support::rss(2_000, 10, 5, 77, 20 * MIB));
        assert_eq!(tree(&world, 5), 50 * MIB);
        world.attach(&test_support::attach(5_000, 10, 6));
        world.rss(&test_support::rss(4_000, 10, 5, 77, 60 * MIB));
        assert_eq!((tree(&world, 5), tree(&world, 6)), (0, 60 * MIB));
        world.attach(&test_support::attach(4_500, 10, 7));
        assert_eq!((tree(&world, 6), tree(&world, 7)), (60 * MIB, 0), "a late move");
        // The first reading comes after the move, or after the program is another.
        world.fork(&test_support::fork(6_000, 10, 11, 6, 0));
        world.attach(&test_support::attach(6_200, 11, 7));
        world.rss(&test_support::rss(6_100, 11, 6, 78, MIB));
        assert_eq!((tree(&world, 6), tree(&world, 7)), (60 * MIB, MIB));
        world.exec(&test_support::exec(6_500, 11, 7, "next", 0, 79));
        world.rss(&test_support::rss(6_600, 11, 7, 79, 2 * MIB));
        world.rss(&test_support::rss(6_300, 11, 7, 78, 9 * MIB));
        assert_eq!((tree(&world, 7), held(&world, 11)), (2 * MIB, Some(2 * MIB)));
    }

    #[test]
    fn a_late_mark_does_not_replace_what_the_next_user_of_an_identity_holds() {
        let mut world = World::default();
        let own = test_support::memcg(5, MIB);
        world.rss(&test_support::rss(1_000, 10, 5, 77, 50 * MIB));
        world.rss(&test_support::rss(3_000, 11, 6, 77, 20 * MIB));
        world.mark(&test_support::victim(2_000, 90, 10, own, own, 55 * MIB));
        assert_eq!(held(&world, 11), Some(20 * MIB));
        world.mark(&test_support::victim(4_000, 90, 11, own, own, 21 * MIB));
        assert_eq!(held(&world, 11), Some(21 * MIB), "one in time does");
    }

    #[test]
    fn the_next_user_of_an_identity_has_its_own_space_when_the_end_of_the_former_is_late() {
        let first =
            |ns, pid, bytes| wire::RssChange { reason: wire::RSS_FIRST, ..test_support::rss(ns, pid, 5, 77, bytes) };
        let mut world = World::default();
        world.rss(&first(1_000, 10, 50 * MIB));
        world.rss(&first(3_000, 11, 20 * MIB));
        world.mm_gone(&test_support::mm_gone(2_000, 10, 77, 50 * MIB));
        world.exit(&test_support::exit(2_100, 10, 5, 0));
        world.mm_gone(&test_support::mm_gone(2_900, 11, 77, 50 * MIB));
        assert_eq!((tree(&world, 5), held(&world, 11)), (20 * MIB, Some(20 * MIB)), "after a reading");
        world.fork(&test_support::fork(3_500, 1, 12, 5, 0));
        world.exec(&test_support::exec(4_000, 12, 5, "next", 0, 77));
        world.rss(&first(4_100, 12, MIB));
        world.mm_gone(&test_support::mm_gone(3_900, 11, 77, 50 * MIB));
        assert_eq!((tree(&world, 5), held(&world, 12)), (MIB, Some(MIB)), "after an exec");
    }

    #[test]
    fn a_late_record_of_a_fork_does_not_share_the_next_program_of_the_parent() {
        let mut world = World::default();
        world.rss(&test_support::rss(1_000, 10, 5, 77, 50 * MIB));
        world.rss(&test_support::rss(3_000, 10, 5, 78, 2 * MIB));
        world.fork(&test_support::fork(2_000, 10, 11, 5, wire::FORK_SHARES_MM));
        assert_eq!((held(&world, 10), held(&world, 11)), (Some(2 * MIB), None));
    }

    #[test]
    fn a_late_reading_of_a_process_that_moved_and_exited_counts_where_it_went() {
        let mut world = World::default();
        world.rss(&test_support::rss(1_000, 10, 5, 77, 50 * MIB));
        world.attach(&test_support::attach(3_000, 10, 6));
        world.fork(&test_support::fork(3_500, 10, 11, 6, wire::FORK_SHARES_MM));
        world.exit(&test_support::exit(4_000, 10, 6, 0));
        world.rss(&test_support::rss(2_000, 10, 5, 77, 60 * MIB));
        assert_eq!((tree(&world, 5), tree(&world, 6)), (0, 60 * MIB));
    }

    #[test]
    fn a_late_first_reading_of_a_process_that_exited_is_of_who_shares_its_memory() {
        let mut world = World::default();
        world.fork(&test_support::fork(1_000, 1, 10, 5, 0));
        world.fork(&test_support::fork(2_000, 10, 11, 5, wire::FORK_SHARES_MM));
        world.exit(&test_support::exit(3_000, 10, 5, 0));
        world.rss(&test_support::rss(1_500, 10, 5, 77, 40 * MIB));
        assert_eq!((tree(&world, 5), held(&world, 11)), (40 * MIB, Some(40 * MIB)));
        world.rss(&test_support::rss(1_600, 10, 5, 77, 50 * MIB));
        assert_eq!((tree(&world, 5), held(&world, 11)), (50 * MIB, Some(50 * MIB)));
        world.rss(&test_support::rss(4_000, 11, 5, 77, 60 * MIB));
        assert_eq!((tree(&world, 5), world.spaces()), (60 * MIB, 1));
    }

    #[test]
    fn memory_of_a_process_found_running_counts_once_when_it_is_shared() {
        let mut world = World::default();
        let start_ticks = world.processes.ticks(test_support::start(10));
        let found =
            ProcessFound { pid: 10, start_ticks, cgroup_id: 5, anon_bytes: 40 * MIB, ..ProcessFound::default() };
        world.process_found(&found);
        world.fork(&test_support::fork(1_000, 10, 11, 5, wire::FORK_SHARES_MM));
        world.rss(&test_support::rss(2_000, 10, 5, 77, 50 * MIB));
        assert_eq!((tree(&world, 5), world.spaces(), held(&world, 11)), (50 * MIB, 1, Some(50 * MIB)));
        // The exact start makes another key: the memory is still its own and moves with it.
        let mut world = World::default();
        world.process_found(&found);
        world.attach(&test_support::attach(1_000, 10, 6));
        assert_eq!((tree(&world, 5), tree(&world, 6)), (0, 40 * MIB));
    }

    #[test]
    fn a_child_that_shares_memory_before_its_first_reading_is_its_user() {
        let mut world = World::default();
        world.fork(&test_support::fork(1_000, 1, 10, 5, 0));
        world.fork(&test_support::fork(2_000, 10, 11, 5, wire::FORK_SHARES_MM));
        assert_eq!((held(&world, 10), held(&world, 11)), (None, None), "nobody has read it");
        world.rss(&test_support::rss(1_500, 10, 5, 77, 50 * MIB));
        assert_eq!((tree(&world, 5), held(&world, 11)), (50 * MIB, Some(50 * MIB)));
    }

    #[test]
    fn processes_that_share_an_address_space_count_once() {
        let mut world = World::default();
        world.rss(&test_support::rss(1_000, 10, 5, 77, 50 * MIB).owned_by(100));
        world.fork(&test_support::fork(2_000, 10, 11, 5, wire::FORK_SHARES_MM));
        assert_eq!(tree(&world, 5), 50 * MIB);
        world.exit(&test_support::exit(3_000, 10, 5, 9));
        world.tick(10_000_000_000);
        assert_eq!(tree(&world, 5), 50 * MIB, "the sharer still holds it");
        world.exit(&test_support::exit(4_000, 11, 5, 9));
        assert_eq!(tree(&world, 5), 50 * MIB, "not yet torn down");
        world.mm_gone(&test_support::mm_gone(5_000, 10, 77, 60 * MIB));
        assert_eq!((tree(&world, 5), world.spaces()), (0, 0));
        assert_eq!(world.processes.get((10, test_support::start(10))).unwrap().peak, Some(60 * MIB));
    }

    #[test]
    fn exec_replaces_and_attach_moves_memory() {
        let mut world = World::default();
        world.rss(&test_support::rss(1_000, 10, 5, 77, 50 * MIB));
        world.attach(&test_support::attach(1_500, 10, 6));
        assert_eq!((tree(&world, 5), tree(&world, 6)), (0, 50 * MIB));
        world.exec(&test_support::exec(2_000, 10, 6, "new", 10, 78));
        assert_eq!((tree(&world, 6), world.spaces()), (0, 1));
        world.rss(&test_support::rss(3_000, 10, 6, 78, 3 * MIB));
        let row = world.processes.get((10, test_support::start(10))).unwrap();
        assert_eq!((tree(&world, 6), row.peak), (3 * MIB, Some(3 * MIB)));
    }

    #[test]
    fn memory_without_a_teardown_record_is_dropped_and_late_records_do_not_restore_it() {
        let mut world = World::default();
        world.rss(&test_support::rss(1_000, 10, 5, 77, 50 * MIB));
        world.exit(&test_support::exit(2_000, 10, 5, 0));
        world.tick(2_000 + DYING_NS + 1);
        assert_eq!((tree(&world, 5), world.spaces()), (0, 0));
        world.rss(&test_support::rss(1_500, 10, 5, 77, 50 * MIB));
        assert_eq!((tree(&world, 5), world.spaces()), (0, 0));
    }

    #[test]
    fn an_identity_taken_over_while_the_old_space_is_dying_is_a_new_space() {
        let mut world = World::default();
        world.rss(&test_support::rss(1_000, 10, 5, 77, 50 * MIB));
        world.exit(&test_support::exit(2_000, 10, 5, 0));
        world.rss(&test_support::rss(3_000, 11, 6, 77, 20 * MIB));
        assert_eq!((tree(&world, 5), tree(&world, 6), world.spaces()), (0, 20 * MIB, 1));
        world.tick(2_000 + DYING_NS + 1);
        assert_eq!(tree(&world, 6), 20 * MIB, "the dying one was another");
    }

    #[test]
    fn records_of_an_older_space_do_not_touch_the_one_that_has_its_identity_now() {
        for exit_first in [true, false] {
            let mut world = World::default();
            world.rss(&test_support::rss(1_000, 10, 5, 77, 50 * MIB));
            if exit_first {
                world.exit(&test_support::exit(2_000, 10, 5, 0));
            }
            world.rss(&test_support::rss(11_000, 11, 6, 77, 20 * MIB));
            world.exit(&test_support::exit(2_000, 10, 5, 0));
            let mut falling = test_support::rss(9_000, 10, 5, 77, 40 * MIB);
            falling.flags = wire::RSS_DYING;
            world.rss(&falling);
            world.mm_gone(&test_support::mm_gone(10_000, 10, 77, 60 * MIB));
            assert_eq!((tree(&world, 5), tree(&world, 6), world.spaces()), (0, 20 * MIB, 1), "{exit_first}");
            assert_eq!(world.processes.get((10, test_support::start(10))).unwrap().peak, Some(60 * MIB));
            world.tick(20_000 + DYING_NS);
            assert_eq!(tree(&world, 6), 20 * MIB);
            world.exit(&test_support::exit(30_000, 11, 6, 0));
            world.mm_gone(&test_support::mm_gone(31_000, 11, 77, 20 * MIB));
            assert_eq!((tree(&world, 6), world.spaces()), (0, 0));
        }
    }

    #[test]
    fn a_process_that_execs_back_onto_an_identity_keeps_its_memory() {
        let mut world = World::default();
        world.rss(&test_support::rss(1_000, 10, 5, 77, 50 * MIB));
        world.rss(&test_support::rss(11_000, 10, 5, 78, MIB));
        world.rss(&test_support::rss(13_000, 10, 5, 77, 20 * MIB));
        world.mm_gone(&test_support::mm_gone(10_000, 10, 77, 50 * MIB));
        world.mm_gone(&test_support::mm_gone(12_000, 10, 78, MIB));
        assert_eq!((tree(&world, 5), world.spaces()), (20 * MIB, 1));
    }

    #[test]
    fn a_found_process_is_replaced_by_its_records_and_not_the_other_way_round() {
        let mut world = World::default();
        let ticks = world.processes.ticks(test_support::start(10));
        let found = ProcessFound {
            pid: 10,
            start_ticks: ticks,
            cgroup_id: 5,
            anon_bytes: 40 * MIB,
            comm: "old\x1b".into(),
            ..ProcessFound::default()
        };
        world.process_found(&found);
        assert_eq!(tree(&world, 5), 40 * MIB);
        world.rss(&test_support::rss(1_000, 10, 5, 77, 50 * MIB));
        assert_eq!((tree(&world, 5), world.processes.len(), world.spaces()), (50 * MIB, 1, 1));
        world.process_found(&found);
        assert_eq!((tree(&world, 5), world.processes.len(), world.spaces()), (50 * MIB, 1, 1));
    }

    #[test]
    fn a_process_does_not_take_the_name_of_a_thread() {
        let mut world = World::default();
        let name = |world: &World| world.processes.get((10, test_support::start(10))).unwrap().comm.clone();
        let thread = |tid, comm| wire::Task { tid, ..test_support::named(10, comm) };
        let mut rss = test_support::rss(1_000, 10, 5, 77, MIB);
        rss.task = thread(12, "worker");
        world.rss(&rss);
        assert_eq!(name(&world), "worker", "better than none");
        rss.task = thread(10, "server");
        world.rss(&rss);
        rss.task = thread(12, "worker");
        world.rss(&rss);
        assert_eq!(name(&world), "server");
        let mut exec = test_support::exec(2_000, 10, 5, "next", 0, 78);
        exec.task.tid = 12;
        world.exec(&exec);
        assert_eq!(name(&world), "next");
        let mut exit = test_support::exit(3_000, 10, 5, 0);
        exit.task = thread(13, "last");
        world.exit(&exit);
        assert_eq!(name(&world), "next");
    }

    #[test]
    fn a_reused_pid_ends_the_older_process() {
        let mut world = World::default();
        world.rss(&test_support::rss(1_000, 10, 5, 77, 50 * MIB));
        let mut second = test_support::rss(2_000, 10, 5, 78, MIB);
        second.task.start_boot_ns += 1_000_000_000;
        world.rss(&second);
        let first = world.processes.get((10, test_support::start(10))).unwrap();
        assert_eq!(first.exited, Some((2_000, None)));
        assert_eq!(world.tasks(Some(5)).0.len(), 1);
    }

    #[test]
    fn growth_before_the_first_reading_is_unknown() {
        let mut world = World::default();
        let s = test_support::start(10);
        world.rss(&test_support::rss(s + 20_000_000_000, 10, 5, 77, 50 * MIB));
        world.rss(&test_support::rss(s + 20_050_000_000, 10, 5, 77, 70 * MIB));
        let g = &world.growth(s + 20_200_000_000, |_| true)[0];
        assert_eq!((g.rss_bytes, g.last_100ms_bytes, g.last_1s_bytes), (70 * MIB, Some(0), None));
        let g = &world.growth(s + 20_140_000_000, |_| true)[0];
        assert_eq!(g.last_100ms_bytes, Some(20 * MIB as i64));
    }
}
