//! Allocation paths in the incident file: which code grew memory, by how much, and when.
//!
//! The causes count different things, so their bytes must not be added up. `touch` is resident
//! memory, counted when a page is first touched, because the kernel allocates it then. `map` and
//! `brk` are address space, counted when it is requested, whether or not it is ever touched.
//! `charge` is what system calls charge to the cgroup: page cache, sockets, kernel memory, and
//! pages that they touch for the process.

use serde::{Deserialize, Serialize};

use crate::{Process, capped};

/// A stack that grew memory, of one process and with one cause.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct AllocationPath {
    /// Bytes that the path stands for in the window of this file: the sum of the weights of its
    /// samples. 0 for a path that is listed only because the `mapped_by` of another names it.
    pub weight_bytes: u64,
    /// How memory was taken.
    pub cause: Cause,
    /// The process that ran it.
    pub process: Process,
    /// Frames, innermost first: kernel frames, then frames of the process. An inlined function
    /// comes before the function that it is inlined into.
    #[serde(deserialize_with = "capped::frames")]
    pub frames: Vec<Frame>,
    /// Why `frames` ends before the outermost frame of the thread; null when it does not.
    #[serde(default)]
    pub cut: Option<Cut>,
    /// For `touch`: index in `allocation_paths` of the path (cause `map` or `brk`) that created the
    /// mapping that was touched; null when that is not known, and for the other causes.
    #[serde(default)]
    pub mapped_by: Option<u32>,
}

/// How memory was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum Cause {
    /// A page was touched for the first time: resident memory grew.
    Touch,
    /// `mmap` or `mremap`: address space grew.
    Map,
    /// `brk`: the address space of the heap grew.
    Brk,
    /// A system call charged memory to the cgroup.
    Charge,
}

impl Cause {
    /// Every cause, in the order of the file.
    pub const ALL: [Self; 4] = [Self::Touch, Self::Map, Self::Brk, Self::Charge];

    /// The name in the file: `touch`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Touch => "touch",
            Self::Map => "map",
            Self::Brk => "brk",
            Self::Charge => "charge",
        }
    }
}

/// Why a stack ends before the outermost frame of the thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum Cut {
    /// The copy of the stack was too short.
    Slice,
    /// A frame lies in no known module, and frame pointers did not lead further.
    Module,
    /// The unwind information of a module was missing or broken, or did not lead further.
    Unwind,
    /// The stack has more frames than are stored.
    Frames,
    /// Registers or stack could not be read, so only kernel frames are listed.
    Registers,
    /// The process had ended before its mappings could be read.
    Gone,
}

impl Cut {
    /// The name in the file: `slice`.
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

/// One frame of a stack.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Frame {
    /// Path of the module as its process saw it, or `[vdso]` or `[jit]`; null for kernel frames and
    /// when it is not known.
    pub module: Option<String>,
    /// Build id of the module, in hexadecimal.
    pub build_id: Option<String>,
    /// Offset of the instruction in the module's file. Except for the innermost frame of the
    /// process, this is the byte before the return address, which lies inside the call instruction.
    /// Null for `[jit]` and unknown modules, whose addresses mean nothing once the process is gone.
    pub offset: Option<u64>,
    /// Function name, demangled; null when it is not known.
    pub symbol: Option<String>,
    /// Source file; null when it is not known.
    pub file: Option<String>,
    /// Source line; null when it is not known.
    pub line: Option<u32>,
    /// Whether this function is inlined into the next frame.
    pub inlined: bool,
    /// Whether this is a kernel frame.
    #[serde(default)]
    pub kernel: bool,
}

/// When memory grew, by which path, and how much grew without a stack.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Allocations {
    /// Growth of resident memory in the window: all increases of all processes in scope, as the
    /// kernel counted them. Memory that was given back in between is not subtracted. Equal to
    /// `attributed_bytes` plus the bytes in `unattributed`, and to the sum of the weights of all
    /// touch samples and of all samples without a path.
    pub growth_bytes: u64,
    /// The part of the growth that has a stack: the sum of the weights of all touch samples.
    pub attributed_bytes: u64,
    /// The part of the growth that has no stack, by reason, largest first.
    #[serde(deserialize_with = "capped::reasons")]
    pub unattributed: Vec<Unattributed>,
    /// The sample interval: how many bytes a process grows between two of its samples, on average,
    /// when nothing is thinned.
    pub sample_bytes: u64,
    /// Stacks that were left out in the window to stay within the stack budget. The next stack of
    /// the same process stands for their bytes too.
    pub thinned: u64,
    /// The samples, oldest first.
    pub samples: AllocationSamples,
    /// Samples that were joined with a neighbour of the same path to bound this file. Totals stay
    /// exact, times are coarser.
    pub joined: u64,
}

impl Allocations {
    /// Growth without a stack, in bytes, summed over the reasons.
    pub fn unattributed_bytes(&self) -> u64 {
        self.unattributed.iter().fold(0, |sum, part| sum.saturating_add(part.bytes))
    }
}

/// Growth without a stack, for one reason.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Unattributed {
    /// Why there is no stack.
    pub why: String,
    /// How much grew.
    pub bytes: u64,
}

/// The samples, as columns of equal length. Row i of every column is one sample.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct AllocationSamples {
    /// When memory grew, boot clock, ascending.
    #[serde(deserialize_with = "capped::samples")]
    pub boot_ns: Vec<u64>,
    /// Index in `allocation_paths`; null for growth of resident memory without a stack.
    #[serde(deserialize_with = "capped::samples")]
    pub path: Vec<Option<u32>>,
    /// Bytes that the sample stands for.
    #[serde(deserialize_with = "capped::samples")]
    pub weight_bytes: Vec<u64>,
}

impl AllocationSamples {
    /// The rows as (`boot_ns`, `path`, `weight_bytes`), oldest first; as many as the shortest
    /// column has.
    pub fn rows(&self) -> impl Iterator<Item = (u64, Option<u32>, u64)> + '_ {
        let pairs = self.boot_ns.iter().zip(&self.path).zip(&self.weight_bytes);
        pairs.map(|((boot_ns, path), weight)| (*boot_ns, *path, *weight))
    }
}
