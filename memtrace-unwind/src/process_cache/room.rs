//! Which processes go when processes, mappings or perf maps are at their cap.
//!
//! As with modules, those of the user who holds most of it go first, and of these the one used longest
//! ago; of a process that was never read no user is known, and all of those count as one. An eighth of
//! the room is made at once, because each time takes a look at all processes. Who is evicted pays for
//! it: to free thousands of mappings takes time, which is not the doing of whoever needs the room.

use std::collections::BTreeMap;

use super::{CachedProcess, MAX_JIT_BYTES, MAX_MAP_BYTES, MAX_PROCESSES, ProcessCache};
use crate::gate::ProcessKey;
use crate::perf_map::PerfMap;
use crate::unwind::MappedCode;

/// What a user holds, and by which processes: when each was used last, and how much it holds.
type Holder = (usize, Vec<(u64, ProcessKey, usize)>);

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
        let mut by_user: BTreeMap<Option<u32>, Holder> = BTreeMap::new();
        let mut total: usize = 0;
        for (key, process) in &self.processes {
            let holds = held(process);
            total = total.saturating_add(holds);
            if holds > 0 && *key != but {
                let (sum, candidates) = by_user.entry(process.credentials.user()).or_default();
                *sum = sum.saturating_add(holds);
                candidates.push((process.used, *key, holds));
            }
        }
        // Newest first: the last one goes.
        by_user.values_mut().for_each(|(_, candidates)| candidates.sort_unstable_by(|one, other| other.cmp(one)));
        while total > most
            && let Some((user, (sum, candidates))) = by_user.iter_mut().max_by_key(|(_, (sum, _))| *sum)
            && let Some((_, key, holds)) = candidates.pop()
        {
            (*sum, total) = (sum.saturating_sub(holds), total.saturating_sub(holds));
            let user = *user;
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
