//! Allocation paths as the incident file holds them: which code grew memory, by how much, and when.
//!
//! Ledgers that must not be added up. `touch` is resident memory: who first touched a page, which is when the kernel
//! gives it. `map` and `brk` are address space: who asked for it, whether it was ever touched or not. `charge` is what
//! system calls charged to the cgroup: page cache, sockets, kernel memory, and what they touch for the process.

use serde::{Deserialize, Serialize};

use crate::{Process, capped};

/// A stack that grew memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct AllocationPath {
    /// Bytes it stands for in the window of this file: the sum of its samples' weights. 0 for a path that is only here
    /// because another's `mapped_by` names it.
    pub weight_bytes: u64,
    /// How memory was taken.
    pub cause: Cause,
    /// Who.
    pub process: Process,
    /// Frames, innermost first: those in the kernel, then the process' own. One that was inlined comes before the one
    /// it is inlined into.
    #[serde(deserialize_with = "capped::frames")]
    pub frames: Vec<Frame>,
    /// Why `frames` does not reach the outermost frame of the thread; null when it does.
    #[serde(default)]
    pub cut: Option<Cut>,
    /// Touch only: index in `allocation_paths` of the path (cause `map` or `brk`) that made the mapping that was touched;
    /// null when it is not known.
    #[serde(default)]
    pub mapped_by: Option<u32>,
}

/// How memory was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum Cause {
    /// First touch of a page: resident memory grew.
    Touch,
    /// mmap or mremap: address space grew.
    Map,
    /// brk: the heap's address space grew.
    Brk,
    /// Charged to the cgroup in a system call.
    Charge,
}

impl Cause {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Touch, Self::Map, Self::Brk, Self::Charge];

    /// The name in the file.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Touch => "touch",
            Self::Map => "map",
            Self::Brk => "brk",
            Self::Charge => "charge",
        }
    }
}

/// Why a stack does not reach the outermost frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum Cut {
    /// The copied slice of the stack ended before the stack did.
    Slice,
    /// Code that no known module holds, and no frame pointer that led on.
    Module,
    /// A module's unwind information was missing, broken or led nowhere.
    Unwind,
    /// More frames than are kept.
    Frames,
    /// Registers or stack could not be read; only the kernel's frames are there.
    Registers,
    /// The process had ended before its mappings could be read.
    Gone,
}

impl Cut {
    /// The name in the file.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Slice => "slice",
            Self::Module => "module",
            Self::Unwind => "unwind",
            Self::Frames => "frames",
            Self::Registers => "registers",
            Self::Gone => "gone",
        }
    }
}

/// One frame.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Frame {
    /// Path of the module as its process had it, `[vdso]` or `[jit]`; null in the kernel and where nothing is known.
    pub module: Option<String>,
    /// Its build id, hex.
    pub build_id: Option<String>,
    /// Offset in the module's file of the instruction: for every frame but the innermost of the process the byte before
    /// the return address, which is inside the call. For `[jit]` and unknown modules null: an address that means nothing
    /// once the process is gone.
    pub offset: Option<u64>,
    /// Function, demangled; null when it is not known.
    pub symbol: Option<String>,
    /// Source file.
    pub file: Option<String>,
    /// Source line.
    pub line: Option<u32>,
    /// Inlined into the next frame.
    pub inlined: bool,
    /// In the kernel.
    #[serde(default)]
    pub kernel: bool,
}

/// When memory grew, by which path, and what grew without one.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Allocations {
    /// Growth of resident memory in the window: every step up of every process in scope, as the kernel counted it. What
    /// was given back in between is not subtracted. Equal to `attributed_bytes` + `unattributed_bytes`, and to the sum
    /// of the weights of all touch samples and of those without a path.
    pub growth_bytes: u64,
    /// Of that, what has a stack: the sum of the weights of all touch samples.
    pub attributed_bytes: u64,
    /// Of that, what has none, by reason; largest first.
    #[serde(deserialize_with = "capped::reasons")]
    pub unattributed: Vec<Unattributed>,
    /// Bytes a process grew between two of its samples, on average, where nothing was thinned.
    pub sample_bytes: u64,
    /// Stacks the budget left out in the window: the next one of the same process stands for its bytes too.
    pub thinned: u64,
    /// The samples, oldest first.
    pub samples: AllocationSamples,
    /// Samples that were joined with a neighbour of the same path to bound this file: totals are kept, times are
    /// coarser.
    pub joined: u64,
}

impl Allocations {
    /// Growth without a stack.
    pub fn unattributed_bytes(&self) -> u64 {
        self.unattributed.iter().fold(0, |sum, part| sum.saturating_add(part.bytes))
    }
}

/// Growth without a stack.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Unattributed {
    /// Why there is none.
    pub why: String,
    /// How much.
    pub bytes: u64,
}

/// Columns of equal length.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct AllocationSamples {
    /// When, boot clock.
    #[serde(deserialize_with = "capped::samples")]
    pub boot_ns: Vec<u64>,
    /// Index in `allocation_paths`; null for growth of resident memory without a stack.
    #[serde(deserialize_with = "capped::samples")]
    pub path: Vec<Option<u32>>,
    /// Bytes it stands for.
    #[serde(deserialize_with = "capped::samples")]
    pub weight_bytes: Vec<u64>,
}

impl AllocationSamples {
    /// The rows, oldest first; as many as the shortest column has.
    pub fn rows(&self) -> impl Iterator<Item = (u64, Option<u32>, u64)> + '_ {
        let pairs = self.boot_ns.iter().zip(&self.path).zip(&self.weight_bytes);
        pairs.map(|((boot_ns, path), weight)| (*boot_ns, *path, *weight))
    }
}
