//! What goes when modules, open files or unwind data are at their cap.
//!
//! [`Holders`] has the rule. A holder is the user on whose account a module was made known or its
//! unwind data was read. Of modules and open files an eighth goes at once: looking for what goes takes
//! a look at all of them.

use super::{MAX_MODULES, MAX_OPEN, MAX_UNWIND_BYTES, Module, ModuleId, ModuleKey, Modules, UnwindState};
use crate::holders::Holders;

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
        let mut holders = Holders::new();
        for (id, module) in &self.modules {
            let size = held(module);
            if Some(*id) == but || module.key == ModuleKey::Vdso {
                holders.add_fixed(size);
            } else {
                holders.add(module.owner, (module.used, *id, size));
            }
        }
        holders.what_goes(most).into_iter().map(|(_, id)| id).collect()
    }

    fn unload(&mut self, id: ModuleId) {
        let Some(module) = self.modules.get_mut(&id) else { return };
        if let UnwindState::Read(data) = std::mem::replace(&mut module.unwind, UnwindState::Unread) {
            self.unwind_bytes = self.unwind_bytes.saturating_sub(data.bytes());
        }
    }
}
