//! Names of functions, each in memory once: the same ones are in thousands of paths.

use std::collections::BTreeSet;
use std::sync::Arc;

/// Names that are known, and their bytes; at the cap all are forgotten, and whoever refers to one
/// keeps it.
const MAX_NAMES: usize = 16_384;
const MAX_BYTES: usize = 1 << 20;

/// Cap: `MAX_NAMES` and `MAX_BYTES`, and one name.
#[derive(Debug, Default)]
pub struct SharedNames {
    names: BTreeSet<Arc<str>>,
    bytes: usize,
}

impl SharedNames {
    /// The name, shared with all who asked for the same.
    pub fn share(&mut self, name: &str) -> Arc<str> {
        if let Some(known) = self.names.get(name) {
            return known.clone();
        }
        if self.names.len() >= MAX_NAMES || self.bytes >= MAX_BYTES {
            self.names.clear();
            self.bytes = 0;
        }
        let name: Arc<str> = name.into();
        self.bytes = self.bytes.saturating_add(name.len());
        self.names.insert(name.clone());
        name
    }

    /// Forgets names that nobody refers to.
    pub fn forget_unused(&mut self) {
        self.names.retain(|name| Arc::strong_count(name) > 1);
        self.bytes = self.names.iter().map(|name| name.len()).sum();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_held_once_and_as_long_as_somebody_has_it() {
        let mut names = SharedNames::default();
        let first = names.share("vm_mmap");
        assert!(Arc::ptr_eq(&first, &names.share("vm_mmap")));
        names.share("brk");
        names.forget_unused();
        assert_eq!((names.names.len(), names.bytes), (1, "vm_mmap".len()));
        let long = "x".repeat(1000);
        (0..100_000).for_each(|id| drop(names.share(&format!("{id}{long}"))));
        (0..100_000).for_each(|id| drop(names.share(&format!("{id}"))));
        assert!(names.names.len() <= MAX_NAMES && names.bytes <= MAX_BYTES + 2000);
        assert_eq!(&*first, "vm_mmap");
    }
}
