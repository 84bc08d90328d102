//! What the model's kernel does besides killing: processes, memory and cgroups, each with the records of its hooks.

use memtrace_common::event::*;

use crate::model::{Held, MIB, Process, SEC, StackNote, Told, World};
use crate::wire::{self, Ring, blank, bytes};

/// How memory is to grow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sort {
    Anon,
    File,
    Shmem,
}

impl World {
    /// A process that ran before anybody looked.
    pub(crate) fn found(&mut self, cgroup: u64, held: Held) -> u32 {
        let pid = self.new_pid();
        let start_ns = self.now.saturating_sub(SEC * (10 + self.rng.below(500))) + self.rng.below(SEC);
        let space = self.new_space(pid, cgroup, held);
        let process = Process { start_ns, ..self.process(pid, 1, cgroup, space, "old") };
        let owner = process.key();
        self.processes.insert(pid, process);
        if let Some(s) = self.spaces.get_mut(&space) {
            s.told = Some(Told { held, owner, cgroup });
        }
        pid
    }

    fn process(&mut self, pid: u32, parent: u32, cgroup: u64, space: u64, name: &str) -> Process {
        let threads = if self.rng.percent(30) { self.rng.range(1, 3) as u32 } else { 0 };
        Process {
            pid,
            start_ns: self.now,
            parent,
            name: name.to_owned(),
            cgroup,
            space,
            threads,
            leader_gone: threads > 0 && self.rng.percent(20),
            marked: Default::default(),
            killed: false,
            dies_ns: None,
            spared: self.rng.percent(3),
        }
    }

    /// clone(2); with `shares` as vfork does it.
    pub(crate) fn fork(&mut self, parent: u32, shares: bool) -> Option<u32> {
        let p = self.processes.get(&parent).filter(|p| p.dies_ns.is_none())?.clone();
        let held = self.spaces.get(&p.space)?.held;
        let many = self.processes.len() as u64 >= u64::from(self.switches.pids) / 2;
        if many || !shares && self.full(p.cgroup, held.resident()).is_some() {
            return None;
        }
        let hook = self.hook();
        let pid = self.new_pid();
        let space = if shares { p.space } else { self.new_space(pid, p.cgroup, held) };
        let child = self.process(pid, parent, p.cgroup, space, &p.name);
        self.processes.insert(pid, child);
        let parent_task = self.some_thread(parent);
        let fork = Fork {
            parent: parent_task,
            child: self.thread(pid, 0),
            cgroup_id: p.cgroup,
            flags: u32::from(shares) * FORK_SHARES_MM,
            ..blank(hook)
        };
        self.emit(hook, Ring::Ledger, bytes(&fork));
        if shares {
            if let Some(s) = self.spaces.get_mut(&space) {
                s.users.push(pid);
            }
        } else {
            self.follow(space, true);
        }
        Some(pid)
    }

    /// A child of the init process, of which nobody knows more.
    pub(crate) fn born(&mut self, cgroup: u64) -> u32 {
        let hook = self.hook();
        let pid = self.new_pid();
        let space = self.new_space(pid, cgroup, Held { anon: 32 * 1024, ..Held::default() });
        let child = self.process(pid, 1, cgroup, space, "init");
        self.processes.insert(pid, child);
        let (parent, child) = (wire::task(1, 1, 7, "init"), self.thread(pid, 0));
        let fork = Fork { parent, child, cgroup_id: cgroup, ..blank(hook) };
        self.emit(hook, Ring::Ledger, bytes(&fork));
        self.follow(space, true);
        pid
    }

    /// execve(2): a new address space in place of the old one.
    pub(crate) fn exec(&mut self, pid: u32, name: &str) {
        let Some(p) = self.processes.get(&pid).filter(|p| p.dies_ns.is_none()) else { return };
        let (old, cgroup) = (p.space, p.cgroup);
        // Whoever called vfork waits until the child lets go of their space.
        if self.processes.values().any(|child| child.parent == pid && child.space == old) {
            return;
        }
        // The new one is there before the old one is let go: it never has its identity.
        let held = Held { anon: 64 * 1024, file: 512 * 1024, ..Held::default() };
        let space = self.new_space(pid, cgroup, held);
        self.leave(pid, old, false);
        if let Some(p) = self.processes.get_mut(&pid) {
            (p.space, p.name, p.threads, p.leader_gone) = (space, name.to_owned(), 0, false);
        }
        let hook = self.hook();
        let mm_id = self.spaces.get(&space).map_or(UNKNOWN, |s| s.mm_id);
        let exec = Exec { task: self.thread(pid, 0), cgroup_id: cgroup, mm_id, ..blank(hook) };
        self.emit(hook, Ring::Ledger, bytes(&exec));
        self.follow(space, true);
    }

    /// A process stops using an address space, which may be the end of it.
    fn leave(&mut self, pid: u32, serial: u64, may_linger: bool) {
        let Some(space) = self.spaces.get_mut(&serial) else { return };
        space.users.retain(|user| *user != pid);
        if space.owner == Some(pid) {
            space.owner = space.users.first().copied();
        }
        if !space.users.is_empty() {
            return;
        }
        if may_linger && self.rng.percent(15) {
            let until = self.now + self.rng.below(SEC + SEC / 2);
            self.lingering.push((until, serial));
        } else {
            self.tear_down(serial);
        }
    }

    /// exit_mmap: the memory falls, then the space is gone.
    pub(crate) fn tear_down(&mut self, serial: u64) {
        let Some(space) = self.spaces.get(&serial) else { return };
        let (held, followed) = (space.held, space.followed);
        if followed && held.resident() > 4 * MIB && self.rng.percent(50) {
            let half = Held { anon: held.anon / 2, ..held };
            self.set_held(serial, half);
            self.reading(serial, RSS_MOVED);
        }
        let hook = self.hook();
        if let Some(space) = self.spaces.get(&serial).filter(|s| s.followed) {
            let gone = MmGone {
                task: space.seen,
                mm_id: space.mm_id,
                cgroup_id: space.cgroup,
                peak_bytes: space.peak,
                grown_bytes: space.grown,
                ..blank(hook)
            };
            self.emit(hook, Ring::Ledger, bytes(&gone));
        }
        self.drop_space(serial);
    }

    /// The last thread of a process exits.
    pub(crate) fn exit(&mut self, pid: u32) {
        let Some(p) = self.processes.get(&pid).cloned() else { return };
        let task = self.some_thread(pid);
        if self.switches.exit_first {
            self.tell_exit(&p, task);
            self.leave(pid, p.space, true);
        } else {
            self.leave(pid, p.space, true);
            self.tell_exit(&p, task);
        }
        self.processes.remove(&pid);
    }

    fn tell_exit(&mut self, p: &Process, task: Task) {
        let hook = self.hook();
        let memcg = if self.rng.percent(10) { wire::unread(p.cgroup) } else { self.memcg(p.cgroup) };
        let peak = self.spaces.get(&p.space).map_or(0, |s| s.peak);
        let exit = Exit { task, memcg, max_rss_bytes: peak, exit_code: if p.killed { 9 } else { 0 }, ..blank(hook) };
        self.emit(hook, Ring::Ledger, bytes(&exit));
    }

    /// The hook begins to follow an address space.
    fn follow(&mut self, serial: u64, new: bool) {
        if let Some(space) = self.spaces.get_mut(&serial) {
            space.followed = true;
            if new {
                space.grown = space.held.resident();
            }
        }
        self.reading(serial, RSS_FIRST);
    }

    /// The hook sends a reading of an address space.
    pub(crate) fn reading(&mut self, serial: u64, reason: u32) {
        let hook = self.hook();
        let Some(space) = self.spaces.get(&serial) else { return };
        let owner = space.owner.and_then(|pid| self.processes.get(&pid)).map(|p| (p.key(), p.cgroup));
        let seen = owner.map_or(space.seen, |((pid, _), _)| self.thread(pid, 0));
        let cgroup = owner.map_or(space.cgroup, |(_, cgroup)| cgroup);
        let memcg = if owner.is_some() { self.memcg(cgroup) } else { wire::unread(cgroup) };
        let record = RssChange {
            task: seen,
            mm_id: space.mm_id,
            memcg,
            rss: space.held.wire(),
            peak_bytes: space.peak,
            virtual_bytes: space.peak * 2,
            reason,
            flags: if owner.is_none() { RSS_DYING } else { 0 },
            grown_bytes: space.grown,
            ..blank(hook)
        };
        self.emit(hook, Ring::Samples, bytes(&record));
        let Some(space) = self.spaces.get_mut(&serial) else { return };
        let owner = (seen.tgid, seen.start_boot_ns);
        space.seen = seen;
        space.sent = space.held;
        space.told = Some(Told { held: space.held, owner, cgroup });
    }

    /// What an address space holds from now on, charged to its cgroup.
    pub(crate) fn set_held(&mut self, serial: u64, held: Held) {
        let Some(space) = self.spaces.get_mut(&serial) else { return };
        let (before, after, cgroup) = (space.held.resident(), held.resident(), space.cgroup);
        space.held = held;
        space.peak = space.peak.max(after);
        space.grown += after.saturating_sub(before);
        space.unsampled += after.saturating_sub(before);
        self.charge(cgroup, after.saturating_sub(before));
        self.uncharge(cgroup, before.saturating_sub(after));
    }

    /// The hook looks whether an address space moved far enough.
    pub(crate) fn moved(&mut self, serial: u64) {
        let Some(space) = self.spaces.get(&serial) else { return };
        if !space.followed {
            self.follow(serial, false);
            return;
        }
        let moved = space.held.resident().abs_diff(space.sent.resident()) + space.held.swap.abs_diff(space.sent.swap);
        if moved >= self.threshold(space.cgroup) {
            self.reading(serial, RSS_MOVED);
        }
    }

    /// A process touches memory. Whoever has no room reclaims, and then the OOM killer comes.
    pub(crate) fn touch(&mut self, pid: u32, size: u64, sort: Sort) {
        let Some(p) = self.processes.get(&pid) else { return };
        let (serial, exiting) = (p.space, p.dies_ns.is_some());
        let Some(space) = self.spaces.get(&serial) else { return };
        let cgroup = space.cgroup;
        for _ in 0..3 {
            let Some(full) = self.full(cgroup, size) else { break };
            if let Some(c) = self.cgroups.get_mut(&full) {
                c.failcnt += 1;
            }
            self.reclaim(pid, full, size);
            if self.full(cgroup, size).is_some() && !self.out_of_memory(pid, Some(full)) {
                return;
            }
        }
        if exiting || self.full(cgroup, size).is_some() {
            return;
        }
        let Some(space) = self.spaces.get(&serial) else { return };
        let mut held = space.held;
        match sort {
            Sort::Anon => held.anon += size,
            Sort::File => held.file += size,
            Sort::Shmem => held.shmem += size,
        }
        self.set_held(serial, held);
        self.sample(pid, serial);
        self.moved(serial);
        let high = self.cgroups.get(&cgroup).is_some_and(|c| c.usage > c.high);
        if high && self.rng.percent(30) {
            self.reclaim(pid, cgroup, 0);
        }
    }

    /// A stack, when it has grown enough.
    fn sample(&mut self, pid: u32, serial: u64) {
        let step = self.switches.sample_bytes;
        let task = self.some_thread(pid);
        let Some(space) = self.spaces.get_mut(&serial) else { return };
        if step == 0 || space.unsampled < step || space.owner != Some(pid) {
            return;
        }
        let weight = std::mem::take(&mut space.unsampled);
        let (mm_id, cgroup, grown) = (space.mm_id, space.cgroup, space.grown);
        self.stacks.push(StackNote { ns: self.now, task, mm_id, cgroup, weight, grown });
    }

    /// Memory is given back; now and then with the mapping call that did it.
    pub(crate) fn give_back(&mut self, pid: u32, percent: u64) {
        let Some(p) = self.processes.get(&pid).filter(|p| p.dies_ns.is_none()) else { return };
        let (serial, cgroup) = (p.space, p.cgroup);
        let Some(space) = self.spaces.get(&serial) else { return };
        let page = |bytes: u64| bytes * (100 - percent.min(100)) / 100 / 4096 * 4096;
        let held = Held { anon: page(space.held.anon), file: page(space.held.file), ..space.held };
        let given = space.held.resident() - held.resident();
        if given >= MIB && self.rng.percent(50) {
            self.map(pid, cgroup, CALL_MUNMAP, given);
        }
        self.set_held(serial, held);
        self.moved(serial);
    }

    pub(crate) fn map(&mut self, pid: u32, cgroup: u64, call: u32, size_bytes: u64) {
        let hook = self.hook();
        let address = 0x7f00_0000_0000 + self.rng.below(1 << 30) * 4096;
        let task = self.some_thread(pid);
        let mapping = Mapping { task, cgroup_id: cgroup, address, size_bytes, call, grew: 1, ..blank(hook) };
        self.emit(hook, Ring::Samples, bytes(&mapping));
    }

    /// Reclaim on behalf of `full`: page cache first, then swap.
    pub(crate) fn reclaim(&mut self, pid: u32, full: u64, size: u64) {
        let Some(cgroup) = self.processes.get(&pid).map(|p| p.cgroup) else { return };
        let task = self.some_thread(pid);
        let hook = self.hook();
        let memcg = self.memcg(cgroup);
        let suppressed = self.rng.below(3) as u32;
        let begin = Reclaim { task, memcg, phase: RECLAIM_BEGIN, suppressed, ..blank(hook) };
        self.emit(hook, Ring::Samples, bytes(&begin));
        let mut freed = 0;
        for id in self.live_cgroups() {
            let cache = self.cgroups.get(&id).map_or(0, |c| c.cache);
            let take = cache.min(size.saturating_sub(freed));
            if take > 0 && self.in_tree(id, full) {
                self.cache(id, take, false);
                freed += take;
            }
        }
        if freed < size && self.rng.percent(15) {
            freed += self.swap_out(full, size - freed);
        }
        let duration_ns = self.rng.below(20_000_000);
        self.now += duration_ns;
        let hook = self.hook();
        let memcg = self.memcg(cgroup);
        let end = Reclaim { task, memcg, phase: RECLAIM_END, duration_ns, reclaimed_bytes: freed, ..blank(hook) };
        self.emit(hook, Ring::Samples, bytes(&end));
    }

    fn swap_out(&mut self, full: u64, size: u64) -> u64 {
        for pid in self.inside(full) {
            let Some(serial) = self.processes.get(&pid).map(|p| p.space) else { continue };
            let Some(space) = self.spaces.get(&serial) else { continue };
            if space.held.anon > size && self.in_tree(space.cgroup, full) {
                let held = Held { anon: space.held.anon - size, swap: space.held.swap + size, ..space.held };
                self.set_held(serial, held);
                self.moved(serial);
                return size;
            }
        }
        0
    }

    /// Page cache of a cgroup grows or shrinks.
    pub(crate) fn cache(&mut self, id: u64, size: u64, grow: bool) {
        if let Some(c) = self.cgroups.get_mut(&id) {
            c.cache = if grow { c.cache + size } else { c.cache.saturating_sub(size) };
        }
        if grow { self.charge(id, size) } else { self.uncharge(id, size) }
    }

    /// A file is read: charged, told before it is counted.
    pub(crate) fn read_file(&mut self, pid: u32, size: u64) {
        let Some(cgroup) = self.processes.get(&pid).filter(|p| p.dies_ns.is_none()).map(|p| p.cgroup) else { return };
        if self.full(cgroup, size).is_some() {
            self.reclaim(pid, cgroup, size);
            return;
        }
        let hook = self.hook();
        let (task, memcg) = (self.some_thread(pid), self.memcg(cgroup));
        let charge = Charge { task, memcg, charge_bytes: size, ..blank(hook) };
        self.emit(hook, Ring::Samples, bytes(&charge));
        self.cache(cgroup, size, true);
    }
}
