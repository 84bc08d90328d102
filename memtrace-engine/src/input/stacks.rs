//! What the engine is told of stacks: modules, paths of frames, and growth with its path.

use serde::{Deserialize, Serialize};

use memtrace_incident::{Cause, Cut};

/// Paths the engine knows for certain: the newest, by number. An older one may have to be said again.
pub const PATHS_KNOWN: u32 = 8192;

/// A file that code was mapped from.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModuleFound {
    /// Number of this run.
    pub id: u32,
    /// Path as its process had it.
    pub path: String,
    /// Build id, hex.
    pub build_id: Option<String>,
}

/// The frames of a stack: what persists of it. The stack itself never does.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PathFound {
    /// Number of this run.
    pub id: u32,
    /// Innermost first: those in the kernel, then the process' own.
    pub frames: Vec<PathFrame>,
    /// Why the outermost frame was not reached.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cut: Option<Cut>,
}

/// One frame, in few letters: a journal holds many.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct PathFrame {
    /// Number of its module.
    #[serde(rename = "m", default, skip_serializing_if = "Option::is_none")]
    pub module: Option<u32>,
    /// Offset in the module's file, as [`memtrace_incident::Frame::offset`].
    #[serde(rename = "o", default, skip_serializing_if = "Option::is_none")]
    pub offset: Option<u64>,
    /// Function, where it had to be found at once: in the kernel and in JIT-compiled code.
    #[serde(rename = "n", default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// In the kernel.
    #[serde(rename = "k", default, skip_serializing_if = "std::ops::Not::not")]
    pub kernel: bool,
    /// In code that the process wrote itself.
    #[serde(rename = "j", default, skip_serializing_if = "std::ops::Not::not")]
    pub jit: bool,
}

/// Memory grew by `weight_bytes` since the last stack of the same process (or cgroup, for a charge) and cause.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StackFound {
    /// When the stack was taken.
    pub boot_ns: u64,
    /// Process.
    pub pid: u32,
    /// Thread.
    pub tid: u32,
    /// Start of the process, boot clock.
    pub start_boot_ns: u64,
    /// Name of the thread.
    pub comm: String,
    /// Opaque identity of the address space.
    pub mm_id: u64,
    /// kernfs id of the memory cgroup.
    pub cgroup_id: u64,
    /// How memory was taken.
    pub cause: Cause,
    /// Bytes it stands for.
    pub weight_bytes: u64,
    /// Touch: everything the address space has grown by since it is followed, this included.
    pub grown_bytes: u64,
    /// Touch: where; map and brk: where the mapping begins.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<u64>,
    /// Map and brk: its size.
    #[serde(default)]
    pub size_bytes: u64,
    /// Number of its path.
    pub path: u32,
}
