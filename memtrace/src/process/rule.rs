//! From the registers of a frame to those of its caller: what a rule says, applied to a slice of the stack.

/// User registers of a frame.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Registers {
    /// Instruction pointer: rip, pc.
    pub ip: u64,
    /// Stack pointer: rsp, sp.
    pub sp: u64,
    /// Frame pointer, where there is one: rbp, x29.
    pub fp: u64,
    /// Where a leaf function returns to: x30; `None` on x86_64, and in frames where it is not known.
    pub lr: Option<u64>,
}

/// Why a word of the stack is not there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Missing {
    /// It lies beyond the end of the copied slice.
    Beyond,
    /// It lies below the stack pointer, or nowhere near the stack.
    Elsewhere,
}

/// A slice of a stack, from its stack pointer up.
#[derive(Clone, Copy)]
pub struct Slice<'a> {
    start: u64,
    bytes: &'a [u8],
}

/// A stack above its stack pointer is at most so large; what is farther away is taken for no stack of this thread.
const MAX_STACK_BYTES: u64 = 64 << 20;

impl<'a> Slice<'a> {
    /// `bytes` as they are at `start` and above.
    pub fn new(start: u64, bytes: &'a [u8]) -> Self {
        Self { start, bytes }
    }

    /// The word at `address`.
    pub fn word(&self, address: u64) -> Result<u64, Missing> {
        let at = address.checked_sub(self.start).filter(|at| *at < MAX_STACK_BYTES).ok_or(Missing::Elsewhere)?;
        let at = usize::try_from(at).map_err(|_| Missing::Elsewhere)?;
        let word = self.bytes.get(at..).and_then(|rest| rest.first_chunk());
        word.map(|word| u64::from_le_bytes(*word)).ok_or(Missing::Beyond)
    }
}

/// How to find the caller; what is cached per address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    /// The outermost frame: its return address is undefined.
    Outermost,
    /// The common form.
    Plain {
        /// The canonical frame address is the frame pointer's (else the stack pointer's) value plus `cfa_offset`.
        from_fp: bool,
        /// See `from_fp`.
        cfa_offset: i32,
        /// Where the caller's frame pointer is, from the frame address; `None`: it is unchanged.
        saved_fp: Option<i32>,
        /// Where the return address is, from the frame address; `None`: in the link register.
        saved_ra: Option<i32>,
        /// The frame was interrupted by a signal, so that the return address is no return address.
        signal: bool,
    },
    /// Expressions: to be evaluated with the registers at hand each time.
    Complex,
    /// No entry for this address.
    Uncovered,
    /// There is an entry, but it is broken, too long or in a form that nothing here understands.
    Broken,
}

/// The caller of a frame, or why there is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Its registers, and whether it was interrupted where its instruction pointer is.
    Caller(Registers, bool),
    /// There is none: the outermost frame.
    Outermost,
    /// A word is missing.
    Missing(Missing),
    /// The information is broken or leads nowhere.
    Broken,
}

impl Rule {
    /// Applies the rule to the registers of a frame.
    pub fn apply(self, registers: &Registers, stack: &Slice<'_>) -> Step {
        let Self::Plain { from_fp, cfa_offset, saved_fp, saved_ra, signal } = self else {
            return if self == Self::Outermost { Step::Outermost } else { Step::Broken };
        };
        let base = if from_fp { registers.fp } else { registers.sp };
        let Some(cfa) = base.checked_add_signed(cfa_offset.into()) else { return Step::Broken };
        let word =
            |offset: i32| cfa.checked_add_signed(offset.into()).ok_or(Missing::Elsewhere).and_then(|a| stack.word(a));
        let ra = match saved_ra {
            Some(offset) => word(offset),
            None => registers.lr.ok_or(Missing::Elsewhere),
        };
        let fp = match saved_fp.map(word) {
            // Already popped, in an epilogue whose information does not say so.
            None | Some(Err(Missing::Elsewhere)) => registers.fp,
            Some(Ok(fp)) => fp,
            Some(Err(Missing::Beyond)) => return Step::Missing(Missing::Beyond),
        };
        match ra {
            Ok(0) => Step::Outermost,
            Ok(ip) => Step::Caller(Registers { ip, sp: cfa, fp, lr: None }, signal),
            Err(missing) => Step::Missing(missing),
        }
    }
}
