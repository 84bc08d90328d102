//! How many entries each list of an incident file may have. A reader refuses more; the engine
//! writes fewer, which it asserts against these where it states its own.

/// Processes in [`crate::Incident::growth`].
pub const GROWTH: usize = 1024;
/// Entries of [`crate::Incident::mappings`].
pub const MAPPINGS: usize = 16_384;
/// Paths in [`crate::Incident::allocation_paths`].
pub const ALLOCATION_PATHS: usize = 16_384;
/// Frames of one path: inlined functions are frames too.
pub const FRAMES: usize = 16_384;
/// Entries of [`crate::Incident::losses`].
pub const LOSSES: usize = 1024;
/// Functions of a kernel stack.
pub const FUNCTIONS: usize = 256;
/// Victims of one kill.
pub const VICTIMS: usize = 8192;
/// Rows of a task table.
pub const TASKS: usize = 8192;
/// Words of a recorded command: more than `execve` takes.
pub const COMMAND: usize = 1 << 20;
/// Processes of a recording.
pub const PROCESSES: usize = 16_384;
/// OOM kills during a recording.
pub const OOM_INCIDENTS: usize = 4096;
/// Rows of a timeline.
pub const ROWS: usize = 131_072;
/// Sentences of evidence.
pub const EVIDENCE: usize = 256;
/// Reasons why growth has no stack.
pub const REASONS: usize = 256;
/// Rows of [`crate::AllocationSamples`].
pub const SAMPLES: usize = 131_072;
