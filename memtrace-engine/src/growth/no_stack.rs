//! Why growth has no stack.

/// Why growth has no stack.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum NoStackReason {
    /// The process began with it, or the kernel or another process grew it.
    Outside,
    /// It grew since the last stack of the process, by less than a sample interval.
    Pending,
    /// The process ended before its mappings could be read.
    Gone,
    /// Registers or stack could not be read.
    Unreadable,
    /// The cap of paths was reached.
    NotKept,
}

impl NoStackReason {
    /// The reason in the incident file.
    pub(crate) const fn text(self) -> &'static str {
        match self {
            Self::Outside => "begun with at fork or exec, or grown by the kernel or another process",
            Self::Pending => "since the last stack of its process: less than a sampling step, or not yet told apart",
            Self::Gone => "the process had ended before its mappings could be read",
            Self::Unreadable => "registers or stack could not be read",
            Self::NotKept => "more paths than are kept",
        }
    }
}
