//! From the registers of a frame to those of its caller: a rule, applied to a copy of the stack.
//!
//! Most code follows one plain form, [`Rule::Plain`]: the canonical frame address (CFA) is a
//! register plus a constant, and the return address and the caller's frame pointer lie at fixed
//! distances from it. On x86_64, right after `push rbp; mov rbp, rsp`, that is `CFA = rbp + 16`,
//! return address at `CFA - 8`, caller's rbp at `CFA - 16`. Such a rule takes 20 bytes, so it can
//! be cached for each address.

/// User registers of a frame.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Registers {
    /// Instruction pointer: rip, pc.
    pub ip: u64,
    /// Stack pointer: rsp, sp.
    pub sp: u64,
    /// Frame pointer, where code keeps one: rbp, x29.
    pub fp: u64,
    /// Return address of a leaf function: x30; `None` on x86_64, and in frames where it is not
    /// known.
    pub lr: Option<u64>,
}

/// Why a word of the stack cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MissingWord {
    /// It lies above the copied part of the stack.
    Beyond,
    /// It lies below the stack pointer, or too far above it to be on this thread's stack.
    Elsewhere,
}

/// A copy of a stack, from its stack pointer up.
#[derive(Clone, Copy)]
pub struct StackCopy<'a> {
    start: u64,
    bytes: &'a [u8],
}

/// A word farther above the stack pointer than this is not on the stack of this thread.
const MAX_STACK_BYTES: u64 = 64 << 20;

impl<'a> StackCopy<'a> {
    /// `bytes` as they were at address `start` and above.
    pub fn new(start: u64, bytes: &'a [u8]) -> Self {
        Self { start, bytes }
    }

    /// The 8-byte word at `address`.
    pub fn word(&self, address: u64) -> Result<u64, MissingWord> {
        let at = address.checked_sub(self.start).filter(|at| *at < MAX_STACK_BYTES).ok_or(MissingWord::Elsewhere)?;
        let at = usize::try_from(at).map_err(|_| MissingWord::Elsewhere)?;
        let word = self.bytes.get(at..).and_then(|rest| rest.first_chunk());
        word.map(|word| u64::from_le_bytes(*word)).ok_or(MissingWord::Beyond)
    }
}

/// How to find the caller of a frame at one address of a module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    /// The outermost frame: its return address is undefined.
    Outermost,
    /// Registers plus constants; nearly all code has such a rule.
    Plain {
        /// Whether the CFA is counted from the frame pointer; else from the stack pointer.
        from_fp: bool,
        /// Bytes from that register to the CFA.
        cfa_offset: i32,
        /// Bytes from the CFA to the caller's frame pointer; `None`: the register is unchanged.
        saved_fp: Option<i32>,
        /// Bytes from the CFA to the return address; `None`: it is in the link register.
        saved_ra: Option<i32>,
        /// A signal interrupted the caller: its address is that of an instruction, not a return
        /// address.
        signal: bool,
    },
    /// DWARF expressions: evaluated with the registers of each frame, see
    /// [`Cfi::step`](crate::cfi::Cfi::step).
    Complex,
    /// The module has no entry for this address.
    Uncovered,
    /// The entry is broken, too long, or in a form that is not supported.
    Broken,
}

/// The result of one step outwards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UnwindStep {
    /// Registers of the caller; true if a signal interrupted it at its instruction pointer.
    Caller(Registers, bool),
    /// There is no caller: this is the outermost frame.
    Outermost,
    /// A word of the stack that the step needs cannot be read.
    Missing(MissingWord),
    /// The unwind information is broken or leads nowhere.
    Broken,
}

impl Rule {
    /// Applies the rule to the registers of a frame. [`Rule::Complex`] cannot be applied this way
    /// and gives [`UnwindStep::Broken`].
    pub fn apply(self, registers: &Registers, stack: &StackCopy<'_>) -> UnwindStep {
        let Self::Plain { from_fp, cfa_offset, saved_fp, saved_ra, signal } = self else {
            return if self == Self::Outermost { UnwindStep::Outermost } else { UnwindStep::Broken };
        };
        let base = if from_fp { registers.fp } else { registers.sp };
        let Some(cfa) = base.checked_add_signed(cfa_offset.into()) else { return UnwindStep::Broken };
        let word = |offset: i32| {
            cfa.checked_add_signed(offset.into()).ok_or(MissingWord::Elsewhere).and_then(|a| stack.word(a))
        };
        let ra = match saved_ra {
            Some(offset) => word(offset),
            None => registers.lr.ok_or(MissingWord::Elsewhere),
        };
        let fp = match saved_fp.map(word) {
            // An epilogue has popped it already, and its unwind information does not say so.
            None | Some(Err(MissingWord::Elsewhere)) => registers.fp,
            Some(Ok(fp)) => fp,
            Some(Err(MissingWord::Beyond)) => return UnwindStep::Missing(MissingWord::Beyond),
        };
        match ra {
            Ok(0) => UnwindStep::Outermost,
            Ok(ip) => UnwindStep::Caller(Registers { ip, sp: cfa, fp, lr: None }, signal),
            Err(missing) => UnwindStep::Missing(missing),
        }
    }
}
