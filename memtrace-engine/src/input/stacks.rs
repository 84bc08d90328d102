//! Facts about stacks: modules, paths (the frames of a stack), and samples that refer to a path.
//!
//! Modules and paths have numbers, so that a journal holds the frames of a stack once and not with
//! every sample.

use std::sync::Arc;

use memtrace_incident::{Cause, Cut};
use serde::{Deserialize, Serialize};

/// How many paths the engine never forgets: the latest of those that were sent, or that a stack
/// referred to, within [`PATH_TICKS`]. Before a stack refers to another path, that has to be sent
/// again.
pub const PATHS_KNOWN: u32 = 8192;
/// How many ticks ([`super::Fact::Tick`]) the engine remembers a path for that no sample refers to.
pub const PATH_TICKS: u64 = 1800;

/// A file that code was mapped from.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModuleFound {
    /// Number of the module, unique within the run.
    pub id: u32,
    /// Path of the file as its process saw it.
    pub path: String,
    /// Build id of the file, in hexadecimal; `None` when it has none.
    pub build_id: Option<String>,
}

/// The frames of a stack. Only they persist; the copy of the stack never does.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PathFound {
    /// Number of the path, unique within the run.
    pub id: u32,
    /// Frames, innermost first: kernel frames, then frames of the process. Whoever remembers the
    /// path shares them.
    pub frames: Arc<[PathFrame]>,
    /// Why the frames end before the outermost one; `None` when they do not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cut: Option<Cut>,
}

/// One frame. Its JSON keys have one letter, because a journal holds many frames.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct PathFrame {
    /// Number of the module, as in [`ModuleFound::id`]; `None` in the kernel and when it is not
    /// known.
    #[serde(rename = "m", default, skip_serializing_if = "Option::is_none")]
    pub module: Option<u32>,
    /// Offset in the module's file, as in [`memtrace_incident::Frame::offset`].
    #[serde(rename = "o", default, skip_serializing_if = "Option::is_none")]
    pub offset: Option<u64>,
    /// Function name, for frames that can be named only while the process lives: in the kernel and
    /// in JIT-compiled code.
    #[serde(rename = "n", default, skip_serializing_if = "Option::is_none")]
    pub name: Option<Arc<str>>,
    /// Whether this is a kernel frame.
    #[serde(rename = "k", default, skip_serializing_if = "std::ops::Not::not")]
    pub kernel: bool,
    /// Whether this is code that the process compiled itself.
    #[serde(rename = "j", default, skip_serializing_if = "std::ops::Not::not")]
    pub jit: bool,
}

/// Bytes of frames in memory, as if nobody shared them.
pub fn bytes_of_frames(frames: &[PathFrame]) -> usize {
    let names = frames.iter().filter_map(|frame| frame.name.as_ref()).map(|name| name.len());
    names.fold(size_of_val(frames), usize::saturating_add)
}

/// A sample: memory grew by `weight_bytes` since the previous stack of the same cause and process
/// (for a charge: of the same cgroup).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StackFound {
    /// When the stack was taken, boot clock, nanoseconds.
    pub boot_ns: u64,
    /// Process id (tgid).
    pub pid: u32,
    /// Thread id.
    pub tid: u32,
    /// Start of the process, boot clock, nanoseconds.
    pub start_boot_ns: u64,
    /// Name of the thread.
    pub comm: String,
    /// Identity of the address space; see `mm_id` in the wire records.
    pub mm_id: u64,
    /// kernfs id of the memory cgroup.
    pub cgroup_id: u64,
    /// How memory was taken.
    pub cause: Cause,
    /// Bytes that the sample stands for.
    pub weight_bytes: u64,
    /// For `touch`: total growth of the address space since it is followed, with this sample.
    pub grown_bytes: u64,
    /// For `touch`: the address that was touched. For `map` and `brk`: where the mapping begins.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<u64>,
    /// For `map` and `brk`: size of the mapping.
    #[serde(default)]
    pub size_bytes: u64,
    /// Number of the path, as in [`PathFound::id`].
    pub path: u32,
}
