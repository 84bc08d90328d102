//! What goes when modules, open files or unwind data are at their cap.
//!
//! It goes from the user who holds most of it, and of that user's what was used longest ago. So nobody
//! loses, and pays again for, what others want room for, as long as he holds no more than an equal
//! share: a user who has more code than there is room for makes room with his own. A holder is the
//! user on whose account a module was made known or its unwind data was read.
//!
//! Of modules and open files an eighth goes at once: looking for what goes takes a look at all of
//! them.

use std::collections::{BTreeMap, BinaryHeap, VecDeque};

use super::{MAX_MODULES, MAX_OPEN, MAX_UNWIND_BYTES, Module, ModuleId, ModuleKey, Modules, UnwindState};

/// Something that may go: when it was used last, what it is, and how much it holds.
type Candidate = (u64, ModuleId, usize);

impl Modules {
    pub(super) fn make_room_for_unwind_data(&mut self) {
        if self.unwind_bytes <= MAX_UNWIND_BYTES {
            return;
        }
        let bytes = |module: &Module| match &module.unwind {
            UnwindState::Read(data) => data.bytes(),
            UnwindState::Unread | UnwindState::Unavailable => 0,
        };
        // Also what was read just now may go: who wants all of the room gets what others leave.
        for id in self.what_goes(MAX_UNWIND_BYTES, None, bytes) {
            self.unload(id);
            self.losses.unloaded = self.losses.unloaded.saturating_add(1);
        }
    }

    /// Closes files, but not that of module `but`.
    pub(super) fn make_room_for_files(&mut self, but: ModuleId) {
        if self.open <= MAX_OPEN {
            return;
        }
        let open = |module: &Module| usize::from(module.file.is_some());
        for id in self.what_goes(MAX_OPEN / 8 * 7, Some(but), open) {
            if self.modules.get_mut(&id).is_some_and(|module| module.file.take().is_some()) {
                self.open = self.open.saturating_sub(1);
                self.losses.closed = self.losses.closed.saturating_add(1);
            }
        }
    }

    /// Forgets modules, but not the module `but`.
    pub(super) fn make_room_for_modules(&mut self, but: ModuleId) {
        if self.modules.len() <= MAX_MODULES {
            return;
        }
        for id in self.what_goes(MAX_MODULES / 8 * 7, Some(but), |_| 1) {
            self.unload(id);
            if let Some(module) = self.modules.remove(&id) {
                self.ids.remove(&module.key);
                self.open = self.open.saturating_sub(usize::from(module.file.is_some()));
            }
            self.losses.forgotten = self.losses.forgotten.saturating_add(1);
        }
    }

    /// What goes so that no more than `most` is left of what modules hold; never the vdso, which all
    /// processes have.
    fn what_goes(&self, most: usize, but: Option<ModuleId>, held: impl Fn(&Module) -> usize) -> Vec<ModuleId> {
        let mut by_owner: BTreeMap<Option<u32>, (usize, Vec<Candidate>)> = BTreeMap::new();
        let mut total: usize = 0;
        for (id, module) in &self.modules {
            let bytes = held(module);
            total = total.saturating_add(bytes);
            if bytes > 0 && Some(*id) != but && module.key != ModuleKey::Vdso {
                let (sum, candidates) = by_owner.entry(module.owner).or_default();
                *sum = sum.saturating_add(bytes);
                candidates.push((module.used, *id, bytes));
            }
        }
        let mut holders: BinaryHeap<(usize, VecDeque<Candidate>)> = BinaryHeap::new();
        for (_, (sum, mut candidates)) in by_owner {
            candidates.sort_unstable();
            holders.push((sum, candidates.into()));
        }
        let mut goes = Vec::new();
        while total > most
            && let Some((sum, mut candidates)) = holders.pop()
        {
            let Some((_, id, bytes)) = candidates.pop_front() else { continue };
            goes.push(id);
            total = total.saturating_sub(bytes);
            holders.push((sum.saturating_sub(bytes), candidates));
        }
        goes
    }

    fn unload(&mut self, id: ModuleId) {
        let Some(module) = self.modules.get_mut(&id) else { return };
        if let UnwindState::Read(data) = std::mem::replace(&mut module.unwind, UnwindState::Unread) {
            self.unwind_bytes = self.unwind_bytes.saturating_sub(data.bytes());
        }
    }
}
