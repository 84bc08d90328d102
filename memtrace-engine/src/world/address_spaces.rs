//! Address spaces: creation, sharing, release, and the cgroup that each counts for.
//!
//! The kernel side identifies an address space by `mm_id`, which the kernel uses again after the
//! space is gone, and records may arrive late. So every space has a serial number of its own, and
//! `since_ns` tells which records are about it.

use memtrace_common::event as wire;

use super::{ProcessKey, Sums, World};

/// An address space.
#[derive(Clone, Debug)]
pub(crate) struct AddressSpace {
    /// Identity on the wire; `None` for a process that ran already when tracing began.
    pub(crate) mm_id: Option<u64>,
    /// When it was first named, boot clock. Older records are about the space that had the identity
    /// before.
    pub(crate) since_ns: u64,
    pub(crate) owner: ProcessKey,
    pub(crate) cgroup: Option<u64>,
    pub(crate) sums: Sums,
    /// The newest record that `sums` is from, boot clock.
    pub(crate) read_ns: u64,
    pub(crate) users: u32,
}

impl AddressSpace {
    /// Whether nothing is known of its memory yet.
    pub(super) fn is_unread(&self) -> bool {
        self.mm_id.is_none() && self.sums.is_zero()
    }
}

impl World {
    /// The serial of the space with this identity, which is created when there is none. A space
    /// without users is dropped first: the kernel has given its identity to a new space. `None` for a
    /// late record: the process has a newer space, or the identity is that of a newer one.
    pub(super) fn space_of(&mut self, mm_id: u64, of: ProcessKey, cgroup: Option<u64>, ns: u64) -> Option<u64> {
        let own = self.processes.get(of).and_then(|row| row.mm);
        let taken = self.by_mm_id.get(&mm_id).copied();
        if own.is_some() && own == taken {
            return own;
        }
        if own.is_some_and(|own| self.is_newer(own, ns)) {
            return None;
        }
        if let Some(serial) = taken {
            if self.spaces.get(&serial).is_some_and(|space| space.users > 0) {
                return Some(serial).filter(|serial| !self.is_newer(*serial, ns));
            }
            self.drop_space(serial);
        }
        Some(self.new_space(Some(mm_id), of, cgroup, ns))
    }

    /// Whether a space was first named after `ns`, so that a record of `ns` is not about it.
    pub(super) fn is_newer(&self, serial: u64, ns: u64) -> bool {
        self.spaces.get(&serial).is_some_and(|space| space.mm_id.is_some() && space.since_ns > ns)
    }

    /// Drops the space that had this identity before, because a process that does not use it has
    /// begun a new one with it: the records of the end of its users are late, or lost.
    pub(super) fn drop_former(&mut self, mm_id: u64, of: ProcessKey, ns: u64) {
        let own = self.processes.get(of).and_then(|row| row.mm);
        let Some(taken) = self.by_mm_id.get(&mm_id).copied().filter(|taken| own != Some(*taken)) else { return };
        let former = |space: &AddressSpace| space.owner != of && space.since_ns.max(space.read_ns) <= ns;
        if self.spaces.get(&taken).is_some_and(former) {
            self.drop_space(taken);
        }
    }

    /// The serial of the space that had this identity then, if it is in use.
    pub(super) fn space_then(&self, mm_id: u64, ns: u64) -> Option<u64> {
        let serial = self.by_mm_id.get(&mm_id).copied()?;
        let in_use = self.spaces.get(&serial).is_some_and(|space| space.users > 0);
        (in_use && !self.is_newer(serial, ns)).then_some(serial)
    }

    /// As [`World::space_of`], for a reading: where the space of the process has no identity so far,
    /// it is this one.
    pub(super) fn named_space(&mut self, mm_id: u64, of: ProcessKey, cgroup: Option<u64>, ns: u64) -> Option<u64> {
        let unnamed = self.processes.get(of).and_then(|row| row.mm).filter(|serial| {
            let space = self.spaces.get(serial).filter(|space| space.mm_id.is_none());
            // The kernel names another user when the owner has left.
            let left = |owner| self.processes.get(owner).is_none_or(|row| row.mm != Some(*serial));
            space.is_some_and(|space| space.owner == of || left(space.owner))
        });
        match unnamed {
            Some(serial) if self.name_space(serial, mm_id, ns) => Some(serial),
            _ => self.space_of(mm_id, of, cgroup, ns),
        }
    }

    /// The serial of the space that a process left when it exited, which gets this identity: others use it, and nothing
    /// was read of it before.
    pub(super) fn left_space(&mut self, mm_id: u64, of: ProcessKey, ns: u64) -> Option<u64> {
        let serial = self.processes.get(of)?.left_mm?;
        let unnamed = |space: &AddressSpace| space.mm_id.is_none() && space.owner == of && space.users > 0;
        self.spaces.get(&serial).filter(|space| unnamed(space))?;
        self.name_space(serial, mm_id, ns).then_some(serial)
    }

    /// Gives a space its identity, unless a space in use has it. A record of `ns` has said so: it was there by then.
    fn name_space(&mut self, serial: u64, mm_id: u64, ns: u64) -> bool {
        if let Some(taken) = self.by_mm_id.get(&mm_id).copied() {
            if self.spaces.get(&taken).is_some_and(|space| space.users > 0) {
                return false;
            }
            self.drop_space(taken);
        }
        if let Some(space) = self.spaces.get_mut(&serial) {
            space.mm_id = Some(mm_id);
            space.since_ns = space.since_ns.min(ns);
        }
        self.by_mm_id.insert(mm_id, serial);
        true
    }

    /// The space of a live process, which is created when there is none, without identity until the
    /// first reading. `None` when the process has exited.
    pub(super) fn expect_space(&mut self, owner: ProcessKey, ns: u64) -> Option<u64> {
        let row = self.processes.get(owner).filter(|row| row.exited.is_none())?;
        if row.mm.is_some() {
            return row.mm;
        }
        let serial = self.new_space(None, owner, row.cgroup, ns);
        self.attach_space(owner, serial);
        Some(serial)
    }

    /// The serial of the space with this identity, if this task owned it at that time.
    pub(crate) fn owned_by(&self, mm_id: u64, task: &wire::Task, ns: u64) -> Option<u64> {
        let serial = self.by_mm_id.get(&mm_id).copied()?;
        let space = self.spaces.get(&serial)?;
        (space.owner == (task.tgid, task.start_boot_ns) && space.since_ns <= ns).then_some(serial)
    }

    pub(crate) fn new_space(
        &mut self,
        mm_id: Option<u64>,
        owner: ProcessKey,
        cgroup: Option<u64>,
        since_ns: u64,
    ) -> u64 {
        self.next_space += 1;
        let serial = self.next_space;
        let sums = Sums::default();
        let space = AddressSpace { mm_id, since_ns, owner, cgroup, sums, read_ns: 0, users: 0 };
        self.spaces.insert(serial, space);
        if let Some(id) = mm_id {
            self.by_mm_id.insert(id, serial);
        }
        serial
    }

    pub(crate) fn attach_space(&mut self, key: ProcessKey, serial: u64) {
        let Some(row) = self.processes.get_mut(key) else { return };
        if row.mm == Some(serial) {
            return;
        }
        let old = row.mm.replace(serial);
        if let Some(space) = self.spaces.get_mut(&serial) {
            space.users = space.users.saturating_add(1);
        }
        if let Some(old) = old {
            self.release(old);
        }
    }

    pub(crate) fn release(&mut self, serial: u64) {
        let Some(space) = self.spaces.get_mut(&serial) else { return };
        space.users = space.users.saturating_sub(1);
        self.drop_unused(serial);
    }

    pub(crate) fn drop_unused(&mut self, serial: u64) {
        if self.spaces.get(&serial).is_some_and(|space| space.users == 0) {
            self.drop_space(serial);
        }
    }

    pub(crate) fn drop_space(&mut self, serial: u64) {
        let Some(space) = self.spaces.remove(&serial) else { return };
        if let Some(id) = space.mm_id {
            self.by_mm_id.remove(&id);
        }
        if let Some(cgroup) = space.cgroup {
            self.cgroups.account(cgroup, &space.sums, &Sums::default());
        }
        if let Some(row) = self.processes.get_mut(space.owner).filter(|row| row.mm == Some(serial)) {
            row.mm = None;
        }
    }

    pub(crate) fn set_space(&mut self, serial: u64, cgroup: Option<u64>, sums: Sums) {
        let Some(space) = self.spaces.get_mut(&serial) else { return };
        let (old_cgroup, old) = (space.cgroup, space.sums);
        space.cgroup = cgroup.or(old_cgroup);
        space.sums = sums;
        let new_cgroup = space.cgroup;
        if old_cgroup == new_cgroup {
            if let Some(id) = new_cgroup {
                self.cgroups.account(id, &old, &sums);
            }
            return;
        }
        if let Some(id) = old_cgroup {
            self.cgroups.account(id, &old, &Sums::default());
        }
        if let Some(id) = new_cgroup {
            self.cgroups.account(id, &Sums::default(), &sums);
        }
    }
}
