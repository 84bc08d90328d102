//! Cgroups of the model: made, removed, moved into, limited.

use memtrace_common::event::*;

use crate::model::{Cgroup, World};
use crate::wire::{self, Ring, blank, bytes};

impl World {
    /// mkdir. The path may have been another's, the id never was.
    pub(crate) fn make_cgroup(&mut self, parent: u64, name: &str, told: bool) -> Option<u64> {
        let above = self.cgroups.get(&parent).filter(|c| !c.removed)?.path.clone();
        let path = format!("{}/{name}", if above == "/" { "" } else { &above });
        if self.cgroups.values().any(|c| !c.removed && c.path == path) {
            return None;
        }
        let id = self.new_id();
        let cgroup = Cgroup {
            parent: Some(parent),
            path,
            max: NO_LIMIT,
            high: NO_LIMIT,
            usage: 0,
            watermark: 0,
            failcnt: 0,
            swap: 0,
            cache: 0,
            group: !self.switches.v1 && self.rng.percent(15),
            kill_disabled: self.switches.v1 && self.rng.percent(25),
            under_oom: false,
            removed: false,
        };
        self.cgroups.insert(id, cgroup);
        if told {
            self.change(id, CGROUP_MADE);
        }
        Some(id)
    }

    fn change(&mut self, id: u64, change: u32) {
        let hook = self.hook();
        let Some(c) = self.cgroups.get(&id) else { return };
        let (path, path_len, flags) = wire::path(&c.path);
        let (memcg, parent_id) = (self.memcg(id), c.parent.unwrap_or(0));
        let record = CgroupChange { memcg, parent_id, change, flags, path_len, path, ..blank(hook) };
        self.emit(hook, Ring::Ledger, bytes(&record));
    }

    /// rmdir: nobody may be in it, but much may still be charged to it.
    pub(crate) fn remove_cgroup(&mut self, id: u64) {
        let below = self.cgroups.values().any(|c| c.parent == Some(id) && !c.removed);
        let inside = self.processes.values().any(|p| p.cgroup == id);
        if below || inside || self.cgroups.get(&id).is_none_or(|c| c.removed || c.parent.is_none()) {
            return;
        }
        self.change(id, CGROUP_REMOVED);
        if let Some(c) = self.cgroups.get_mut(&id) {
            c.removed = true;
        }
        self.reap_cgroups();
    }

    /// A process moves; the memory it owns goes along.
    pub(crate) fn attach(&mut self, pid: u32, to: u64) {
        let Some(p) = self.processes.get_mut(&pid).filter(|p| p.dies_ns.is_none() && p.cgroup != to) else { return };
        p.cgroup = to;
        let (key, serial) = (p.key(), p.space);
        if let Some(space) = self.spaces.get_mut(&serial).filter(|s| s.owner == Some(pid)) {
            let (from, bytes) = (std::mem::replace(&mut space.cgroup, to), space.held.resident());
            self.uncharge(from, bytes);
            self.charge(to, bytes);
        }
        // Later than the reading before: of a move and a reading of one nanosecond on two CPUs no record says which came
        // first, when the reading arrives last.
        self.now += 1;
        let hook = self.hook();
        let task = self.thread(pid, 0);
        let attach = CgroupAttach { task, cgroup_id: to, whole_process: 1, ..blank(hook) };
        self.emit(hook, Ring::Ledger, bytes(&attach));
        if let Some(told) = self.spaces.get_mut(&serial).and_then(|s| s.told.as_mut()).filter(|t| t.owner == key) {
            told.cgroup = to;
        }
    }

    /// memory.max or memory.high is written: no record says so, the next reading does.
    pub(crate) fn limit(&mut self, id: u64, max: u64, high: u64) {
        if let Some(c) = self.cgroups.get_mut(&id).filter(|c| c.parent.is_some()) {
            (c.max, c.high) = (max, high);
        }
    }
}
