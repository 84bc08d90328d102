//! The most entries that each list of an incident file may have, and what all of them may hold
//! together. [`crate::codec::decode`] refuses a file with more, which bounds the memory of a
//! reader. The engine has lower caps of its own and asserts at compile time that they stay below
//! these.

/// Bytes of one string. A reader leaves the middle of a longer one out; a path of the kernel is no
/// longer (PATH_MAX).
pub const TEXT: usize = 4096;
/// What all objects, list entries and strings of a file may take in memory or in a report, in
/// bytes, as [`crate::codec::decode`] estimates it.
pub const MEMORY: u64 = 144 << 20;

/// Processes in [`crate::Incident::growth`].
pub const GROWTH: usize = 1024;
/// Entries of [`crate::Incident::mappings`].
pub const MAPPINGS: usize = 16_384;
/// Paths in [`crate::Incident::allocation_paths`].
pub const ALLOCATION_PATHS: usize = 16_384;
/// Frames of one path, with inlined functions.
pub const FRAMES: usize = 4096;
/// Frames of all paths together.
pub const ALL_FRAMES: usize = 262_144;
/// Entries of [`crate::Incident::losses`].
pub const LOSSES: usize = 1024;
/// Functions in [`crate::Oom::trigger_kernel_stack`].
pub const FUNCTIONS: usize = 256;
/// Victims in [`crate::Oom::victims`].
pub const VICTIMS: usize = 8192;
/// Rows of a task table: [`crate::Oom::tasks`], [`crate::Pressure::tasks`].
pub const TASKS: usize = 8192;
/// Words in [`crate::Recording::command`]. `execve` takes fewer.
pub const COMMAND: usize = 1 << 20;
/// Processes in [`crate::Recording::processes`].
pub const PROCESSES: usize = 16_384;
/// Ids in [`crate::Recording::oom_incidents`].
pub const OOM_INCIDENTS: usize = 4096;
/// Rows of [`crate::Columns`].
pub const ROWS: usize = 131_072;
/// Sentences in [`crate::Verdict::evidence`].
pub const EVIDENCE: usize = 256;
/// Reasons in [`crate::Allocations::unattributed`].
pub const REASONS: usize = 256;
/// Rows of [`crate::AllocationSamples`].
pub const SAMPLES: usize = 131_072;
