//! Which processes go when processes, mappings or perf maps are at their cap.
//!
//! [`Holders`] has the rule; of a process that was never read no user is known. An eighth of the room is
//! made at once, because each time takes a look at all processes. Who is evicted pays for it: to free
//! thousands of mappings takes time, which is not the doing of whoever needs the room.

use super::{CachedProcess, MAX_JIT_BYTES, MAX_MAP_BYTES, MAX_PROCESSES, ProcessCache};
use crate::gate::ProcessKey;
use crate::holders::Holders;
use crate::perf_map::PerfMap;
use crate::unwind::MappedCode;

impl CachedProcess {
    fn map_bytes(&self) -> usize {
        self.code.as_ref().map_or(0, MappedCode::memory_estimate)
    }

    fn jit_bytes(&self) -> usize {
        self.jit.as_ref().map_or(0, PerfMap::memory_estimate)
    }
}

impl ProcessCache {
    pub(super) fn make_room_for_processes(&mut self, but: ProcessKey) {
        if self.processes.len() > MAX_PROCESSES {
            self.make_room(but, MAX_PROCESSES / 8 * 7, |_| 1);
        }
    }

    pub(super) fn make_room_for_maps(&mut self, but: ProcessKey) {
        if self.map_bytes > MAX_MAP_BYTES {
            self.make_room(but, MAX_MAP_BYTES / 8 * 7, CachedProcess::map_bytes);
        }
    }

    pub(super) fn make_room_for_jit(&mut self, but: ProcessKey) {
        if self.jit_bytes > MAX_JIT_BYTES {
            self.make_room(but, MAX_JIT_BYTES / 8 * 7, CachedProcess::jit_bytes);
        }
    }

    /// Evicts processes other than `but` until no more than `most` is held.
    fn make_room(&mut self, but: ProcessKey, most: usize, held: impl Fn(&CachedProcess) -> usize) {
        self.modules.gate.settle();
        let mut holders = Holders::new();
        for (key, process) in &self.processes {
            let size = held(process);
            if *key == but {
                holders.add_fixed(size);
            } else {
                holders.add(process.credentials.user(), (process.used, *key, size));
            }
        }
        for (user, key) in holders.what_goes(most) {
            self.evict(key);
            self.modules.gate.settle_as(key, user);
            self.counts.forgotten = self.counts.forgotten.saturating_add(1);
        }
    }

    pub(super) fn evict(&mut self, key: ProcessKey) {
        if let Some(process) = self.processes.remove(&key) {
            self.map_bytes = self.map_bytes.saturating_sub(process.map_bytes());
            self.jit_bytes = self.jit_bytes.saturating_sub(process.jit_bytes());
        }
    }
}
