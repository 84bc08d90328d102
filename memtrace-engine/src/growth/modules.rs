//! The modules that frames refer to, by number.

use std::collections::{BTreeMap, BTreeSet};

use crate::input::ModuleFound;

/// Modules; above it those that no path refers to are dropped, then those that were referred to
/// longest ago. More than twice what the reader of stacks has stated at any time.
pub(super) const MODULES_CAP: usize = 10_000;
/// Bytes of all modules, likewise: a program decides how long the paths of its files are.
pub(super) const MODULE_BYTES_CAP: usize = 5 << 20;

#[derive(Clone, Debug)]
struct Module {
    found: ModuleFound,
    /// The tick in which it was stated, or a path that refers to it.
    used: u64,
}

/// Cap: [`MODULES_CAP`] and [`MODULE_BYTES_CAP`], and one module.
#[derive(Clone, Debug, Default)]
pub(super) struct Modules {
    modules: BTreeMap<u32, Module>,
    bytes: usize,
}

fn bytes_of(found: &ModuleFound) -> usize {
    size_of::<Module>() + found.path.len() + found.build_id.as_ref().map_or(0, String::len)
}

impl Modules {
    pub(super) fn get(&self, id: u32) -> Option<&ModuleFound> {
        self.modules.get(&id).map(|module| &module.found)
    }

    /// Whether there is no room for this one.
    pub(super) fn is_full_for(&self, id: u32) -> bool {
        (self.modules.len() >= MODULES_CAP || self.bytes >= MODULE_BYTES_CAP) && !self.modules.contains_key(&id)
    }

    pub(super) fn insert(&mut self, found: &ModuleFound, tick: u64) {
        self.bytes = self.bytes.saturating_add(bytes_of(found));
        let before = self.modules.insert(found.id, Module { found: found.clone(), used: tick });
        self.bytes = self.bytes.saturating_sub(before.map_or(0, |module| bytes_of(&module.found)));
    }

    pub(super) fn mark_used(&mut self, id: u32, tick: u64) {
        if let Some(module) = self.modules.get_mut(&id) {
            module.used = tick;
        }
    }

    /// Makes room: drops modules that are not `referred` to, then those that were used longest ago.
    /// The path of a module that was stated in this `tick` may still come.
    pub(super) fn forget(&mut self, referred: &BTreeSet<u32>, tick: u64) {
        let order = |(id, module): (&u32, &Module)| {
            (referred.contains(id) || module.used.saturating_add(1) >= tick, module.used, *id)
        };
        let mut order: Vec<(bool, u64, u32)> = self.modules.iter().map(order).collect();
        order.sort_unstable();
        for (.., id) in order {
            if self.modules.len() < MODULES_CAP / 8 * 7 && self.bytes < MODULE_BYTES_CAP / 8 * 7 {
                break;
            }
            let dropped = self.modules.remove(&id);
            self.bytes = self.bytes.saturating_sub(dropped.map_or(0, |module| bytes_of(&module.found)));
        }
    }

    /// Drops modules that are not `referred` to and were not used since the tick `oldest`.
    pub(super) fn forget_unused(&mut self, referred: &BTreeSet<u32>, oldest: u64) {
        self.modules.retain(|id, module| module.used >= oldest || referred.contains(id));
        self.bytes = self.modules.values().map(|module| bytes_of(&module.found)).sum();
    }

    /// Approximate bytes in memory.
    pub(super) fn memory_estimate(&self) -> usize {
        self.bytes.saturating_add(self.modules.len().saturating_mul(32))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn insert(modules: &mut Modules, id: u32, path: &str, referred: &BTreeSet<u32>) {
        if modules.is_full_for(id) {
            modules.forget(referred, u64::from(id));
        }
        modules.insert(&ModuleFound { id, path: path.to_owned(), build_id: None }, u64::from(id));
    }

    #[test]
    fn bytes_are_bounded_and_what_is_referred_to_or_was_used_last_stays() {
        let (mut modules, long) = (Modules::default(), "x".repeat(4096));
        let referred: BTreeSet<u32> = (0..100).collect();
        for id in 0..3 * MODULES_CAP as u32 {
            insert(&mut modules, id, &long, &referred);
            insert(&mut modules, id, &long, &referred);
            modules.mark_used(500, u64::MAX);
            assert!(modules.bytes <= MODULE_BYTES_CAP + 8192);
        }
        let held: usize = modules.modules.values().map(|module| bytes_of(&module.found)).sum();
        assert_eq!(held, modules.bytes);
        let last = 3 * MODULES_CAP as u32 - 1;
        assert!((0..100).chain([500, last]).all(|id| modules.get(id).is_some()) && modules.get(101).is_none());
    }

    #[test]
    fn their_number_is_bounded_even_if_all_are_referred_to() {
        let (mut modules, referred) = (Modules::default(), (0..40_000).collect());
        (0..30_000).for_each(|id| insert(&mut modules, id, "/a", &referred));
        assert!(modules.modules.len() <= MODULES_CAP && modules.get(29_999).is_some());
        modules.forget_unused(&(1..25_000).collect(), 29_000);
        assert!(modules.get(28_000).is_none() && modules.get(29_000).is_some());
        assert!(modules.get(24_999).is_some());
    }
}
