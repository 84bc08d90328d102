//! Call frame information (CFI) of one module: the rule that leads from a frame to its caller.
//!
//! Compilers write a frame description entry (FDE) for each function into `.eh_frame`, or into
//! `.debug_frame`: a small program that says, for each instruction, where the caller's registers
//! are. `.eh_frame_hdr` is a sorted table of the entries; where a linker wrote none,
//! [`Cfi::build_index`] makes one.
//!
//! This uses gimli directly and not framehop, which wraps it: a DWARF expression may jump
//! backwards, and framehop 0.16 does not bound its steps, so a file that a container brings along
//! could hang the agent. Here everything a file can ask for is bounded: bytes of an entry, steps of
//! an expression, depth of the row stack (4, by gimli), work per stack.

use gimli::{
    BaseAddresses, CfaRule, CieOrFde, CommonInformationEntry, DebugFrame, EhFrame, EndianSlice, Evaluation,
    EvaluationResult, Expression, FrameDescriptionEntry, LittleEndian, Location, Reader, Register, RegisterRule,
    UnwindContext, UnwindExpression, UnwindOffset, UnwindSection, Value,
};

use crate::elf::{ElfHeaders, UnwindSections};
use crate::rule::{MissingWord, Registers, Rule, StackCopy, UnwindStep};

/// Longest entry in bytes. Compilers write a few hundred, at most some thousand.
const MAX_ENTRY_BYTES: usize = 64 << 10;
/// What a lookup takes of the work of a stack at least, bytes.
const LEAST_ENTRY_WORK: usize = 32;
/// Most steps of an expression; that of a PLT takes 10.
const MAX_STEPS: u32 = 256;
/// Most words of memory and registers that one expression may ask for.
const MAX_REQUESTS: usize = 64;
/// Bytes of entries read to index a section without `.eh_frame_hdr`.
const MAX_INDEX_WORK: usize = 32 << 20;

type Bytes<'a> = EndianSlice<'a, LittleEndian>;

/// DWARF numbers of the registers that unwinding follows, by architecture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegisterColumns {
    sp: Register,
    fp: Register,
    /// The column of the return address; on arm64 it is a register, x30.
    ra: Register,
    /// The return address of a leaf function is in a register.
    has_link_register: bool,
}

impl RegisterColumns {
    /// System V ABI of x86_64.
    pub const X86_64: Self = Self { sp: Register(7), fp: Register(6), ra: Register(16), has_link_register: false };
    /// AAPCS64 of arm64.
    pub const AARCH64: Self = Self { sp: Register(31), fp: Register(29), ra: Register(30), has_link_register: true };
    /// The architecture this was built for.
    pub const NATIVE: Self = if cfg!(target_arch = "aarch64") { Self::AARCH64 } else { Self::X86_64 };
}

/// Index of a section without `.eh_frame_hdr`: stated address of the code and offset of its entry,
/// sorted. Bounded by `MAX_INDEX_WORK`.
#[derive(Clone, Debug, Default)]
pub struct EntryIndex(Vec<(u64, usize)>);

impl EntryIndex {
    /// Heap size in bytes.
    pub fn memory_estimate(&self) -> usize {
        self.0.capacity().saturating_mul(size_of::<(u64, usize)>())
    }
}

/// Looks up rules in the unwind sections of one module.
pub struct Cfi<'a> {
    headers: &'a ElfHeaders,
    unwind: &'a UnwindSections,
    index: Option<&'a EntryIndex>,
    columns: RegisterColumns,
    bases: BaseAddresses,
}

/// Memory that lookups reuse: a context takes some kilobytes.
#[derive(Default)]
pub struct CfiScratch {
    context: UnwindContext<usize>,
}

impl<'a> Cfi<'a> {
    /// Over unwind sections that were read, and indexed if they need it.
    pub fn new(
        headers: &'a ElfHeaders,
        unwind: &'a UnwindSections,
        index: Option<&'a EntryIndex>,
        columns: RegisterColumns,
    ) -> Self {
        let mut bases = BaseAddresses::default();
        if let Some(section) = &headers.eh_frame {
            bases = bases.set_eh_frame(section.address);
        }
        if let Some(section) = &headers.eh_frame_hdr {
            bases = bases.set_eh_frame_hdr(section.address);
        }
        if let Some(address) = headers.text_address {
            bases = bases.set_text(address);
        }
        if let Some(address) = headers.got_address {
            bases = bases.set_got(address);
        }
        Self { headers, unwind, index, columns, bases }
    }

    /// The rule for the code at a stated address. `work` is the budget that is left, in bytes of
    /// entries; when it has fallen to 0 the answer, [`Rule::Broken`], is about the budget and not
    /// about the module.
    pub fn rule(&self, address: u64, scratch: &mut CfiScratch, work: &mut usize) -> Rule {
        self.with_section(address, work, |this, found| match found {
            FoundEntry::EhFrame(section, fde) => this.rule_of(section, fde, address, scratch),
            FoundEntry::DebugFrame(section, fde) => this.rule_of(section, fde, address, scratch),
            FoundEntry::Uncovered => Rule::Uncovered,
            FoundEntry::Broken => Rule::Broken,
        })
    }

    /// Steps to the caller by evaluating the expressions of a [`Rule::Complex`].
    pub fn step(
        &self,
        address: u64,
        registers: &Registers,
        stack: &StackCopy<'_>,
        scratch: &mut CfiScratch,
        work: &mut usize,
    ) -> UnwindStep {
        self.with_section(address, work, |this, found| match found {
            FoundEntry::EhFrame(section, fde) => this.step_of(section, fde, address, registers, stack, scratch),
            FoundEntry::DebugFrame(section, fde) => this.step_of(section, fde, address, registers, stack, scratch),
            FoundEntry::Uncovered | FoundEntry::Broken => UnwindStep::Broken,
        })
    }

    /// Whether [`Cfi::build_index`] is needed before anything can be found.
    pub fn needs_index(&self) -> bool {
        self.index.is_none() && self.table().is_none()
    }

    /// Indexes all entries up to the first broken one.
    pub fn build_index(&self) -> EntryIndex {
        let mut found = Vec::new();
        if let Some(bytes) = &self.unwind.eh_frame {
            index_entries(&self.eh_frame(bytes), &self.bases, &mut found);
        } else if let Some(bytes) = &self.unwind.debug_frame {
            index_entries(&self.debug_frame(bytes), &self.bases, &mut found);
        }
        found.sort_unstable();
        found.shrink_to_fit();
        EntryIndex(found)
    }

    fn with_section<T>(&self, address: u64, work: &mut usize, then: impl FnOnce(&Self, FoundEntry<'_>) -> T) -> T {
        let Some(offset) = self.entry_offset(address) else { return then(self, FoundEntry::Uncovered) };
        let found = if let Some(bytes) = &self.unwind.eh_frame {
            let section = self.eh_frame(bytes);
            match self.entry(&section, offset.into(), address, work) {
                Ok(Some(fde)) => FoundEntry::EhFrame(section, fde),
                Ok(None) => FoundEntry::Uncovered,
                Err(()) => FoundEntry::Broken,
            }
        } else if let Some(bytes) = &self.unwind.debug_frame {
            let section = self.debug_frame(bytes);
            match self.entry(&section, offset.into(), address, work) {
                Ok(Some(fde)) => FoundEntry::DebugFrame(section, fde),
                Ok(None) => FoundEntry::Uncovered,
                Err(()) => FoundEntry::Broken,
            }
        } else {
            FoundEntry::Uncovered
        };
        then(self, found)
    }

    fn eh_frame<'b>(&self, bytes: &'b [u8]) -> EhFrame<Bytes<'b>> {
        let mut section = EhFrame::new(bytes, LittleEndian);
        section.set_address_size(8);
        section.set_vendor(self.vendor());
        section
    }

    fn debug_frame<'b>(&self, bytes: &'b [u8]) -> DebugFrame<Bytes<'b>> {
        let mut section = DebugFrame::new(bytes, LittleEndian);
        section.set_address_size(8);
        section.set_vendor(self.vendor());
        section
    }

    fn vendor(&self) -> gimli::Vendor {
        if self.columns.has_link_register { gimli::Vendor::AArch64 } else { gimli::Vendor::Default }
    }

    fn entry<'b, S: UnwindSection<Bytes<'b>>>(
        &self,
        section: &S,
        offset: S::Offset,
        address: u64,
        work: &mut usize,
    ) -> Result<Option<FrameDescriptionEntry<Bytes<'b>>>, ()> {
        // Also one that is broken takes some time.
        *work = work.saturating_sub(LEAST_ENTRY_WORK);
        if *work == 0 {
            return Err(());
        }
        let fde = section.fde_from_offset(&self.bases, offset, short_cie).map_err(|_| ())?;
        let bytes = fde.entry_len().max(fde.cie().entry_len());
        if bytes > *work {
            *work = 0;
            return Err(());
        }
        *work = work.saturating_sub(bytes);
        if bytes > MAX_ENTRY_BYTES {
            return Err(());
        }
        let past = address.checked_sub(fde.initial_address());
        Ok(past.is_some_and(|past| past < fde.len()).then_some(fde))
    }

    fn rule_of<'b, S: UnwindSection<Bytes<'b>>>(
        &self,
        section: S,
        fde: FrameDescriptionEntry<Bytes<'b>>,
        address: u64,
        scratch: &mut CfiScratch,
    ) -> Rule {
        let signal = fde.is_signal_trampoline();
        let Ok(row) = fde.unwind_info_for_address(&section, &self.bases, &mut scratch.context, address) else {
            return Rule::Broken;
        };
        let saved_ra = match row.register(self.columns.ra) {
            Some(RegisterRule::Undefined) => return Rule::Outermost,
            None if !self.columns.has_link_register => return Rule::Outermost,
            None | Some(RegisterRule::SameValue) if self.columns.has_link_register => None,
            Some(RegisterRule::Offset(offset)) => Some(offset),
            _ => return Rule::Complex,
        };
        let saved_fp = match row.register(self.columns.fp) {
            None | Some(RegisterRule::Undefined | RegisterRule::SameValue) => None,
            Some(RegisterRule::Offset(offset)) => Some(offset),
            _ => return Rule::Complex,
        };
        let (from_fp, cfa_offset) = match row.cfa() {
            CfaRule::RegisterAndOffset { register, offset } if *register == self.columns.sp => (false, *offset),
            CfaRule::RegisterAndOffset { register, offset } if *register == self.columns.fp => (true, *offset),
            CfaRule::RegisterAndOffset { .. } => return Rule::Broken,
            CfaRule::Expression(_) => return Rule::Complex,
        };
        let small = |offset: Option<i64>| offset.map(i32::try_from).transpose();
        match (i32::try_from(cfa_offset), small(saved_fp), small(saved_ra)) {
            (Ok(cfa_offset), Ok(saved_fp), Ok(saved_ra)) => {
                Rule::Plain { from_fp, cfa_offset, saved_fp, saved_ra, signal }
            }
            _ => Rule::Broken,
        }
    }

    fn step_of<'b, S: UnwindSection<Bytes<'b>>>(
        &self,
        section: S,
        fde: FrameDescriptionEntry<Bytes<'b>>,
        address: u64,
        registers: &Registers,
        stack: &StackCopy<'_>,
        scratch: &mut CfiScratch,
    ) -> UnwindStep {
        let signal = fde.is_signal_trampoline();
        let encoding = fde.cie().encoding();
        let Ok(row) = fde.unwind_info_for_address(&section, &self.bases, &mut scratch.context, address) else {
            return UnwindStep::Broken;
        };
        let run = |expression: &UnwindExpression<usize>, first: Option<u64>| -> Result<u64, UnwindStep> {
            let code = expression.get(&section).map_err(|_| UnwindStep::Broken)?;
            self.evaluate(code, encoding, first, registers, stack)
        };
        let walk = || -> Result<Registers, UnwindStep> {
            let cfa = match row.cfa() {
                CfaRule::RegisterAndOffset { register, offset } => self
                    .register(*register, registers)
                    .and_then(|base| base.checked_add_signed(*offset))
                    .ok_or(UnwindStep::Broken)?,
                CfaRule::Expression(expression) => run(expression, None)?,
            };
            let at = |offset: i64| cfa.checked_add_signed(offset).ok_or(UnwindStep::Broken);
            let value = |column: Register| -> Result<Option<u64>, UnwindStep> {
                Ok(Some(match row.register(column) {
                    None | Some(RegisterRule::SameValue) => return Ok(self.register(column, registers)),
                    Some(RegisterRule::Offset(offset)) => stack.word(at(offset)?).map_err(UnwindStep::Missing)?,
                    Some(RegisterRule::ValOffset(offset)) => at(offset)?,
                    Some(RegisterRule::Register(other)) => return Ok(self.register(other, registers)),
                    Some(RegisterRule::Expression(expression)) => {
                        stack.word(run(&expression, Some(cfa))?).map_err(UnwindStep::Missing)?
                    }
                    Some(RegisterRule::ValExpression(expression)) => run(&expression, Some(cfa))?,
                    Some(_) => return Ok(None),
                }))
            };
            let ip = value(self.columns.ra)?.ok_or(UnwindStep::Broken)?;
            let fp = match value(self.columns.fp) {
                Ok(fp) => fp.unwrap_or(registers.fp),
                Err(UnwindStep::Missing(MissingWord::Beyond)) => return Err(UnwindStep::Missing(MissingWord::Beyond)),
                Err(_) => registers.fp,
            };
            // A signal frame states the stack pointer itself; elsewhere it is the CFA.
            let sp = match row.register(self.columns.sp) {
                Some(_) if signal => value(self.columns.sp)?.unwrap_or(cfa),
                _ => cfa,
            };
            Ok(Registers { ip, sp, fp, lr: None })
        };
        match walk() {
            Ok(Registers { ip: 0, .. }) => UnwindStep::Outermost,
            Ok(caller) => UnwindStep::Caller(caller, signal),
            Err(step) => step,
        }
    }

    fn register(&self, register: Register, registers: &Registers) -> Option<u64> {
        match register {
            r if r == self.columns.sp => Some(registers.sp),
            r if r == self.columns.fp => Some(registers.fp),
            r if r == self.columns.ra && self.columns.has_link_register => registers.lr,
            r if r == self.columns.ra => Some(registers.ip),
            _ => None,
        }
    }

    fn evaluate(
        &self,
        code: Expression<Bytes<'_>>,
        encoding: gimli::Encoding,
        first: Option<u64>,
        registers: &Registers,
        stack: &StackCopy<'_>,
    ) -> Result<u64, UnwindStep> {
        let mut evaluation = Evaluation::new(code.0, encoding);
        evaluation.set_max_iterations(MAX_STEPS);
        if let Some(first) = first {
            evaluation.set_initial_value(first);
        }
        let mut result = evaluation.evaluate().map_err(|_| UnwindStep::Broken)?;
        for _ in 0..MAX_REQUESTS {
            result = match result {
                EvaluationResult::Complete => {
                    let address = match evaluation.as_result() {
                        [piece] => match piece.location {
                            Location::Address { address } => Some(address),
                            _ => None,
                        },
                        _ => None,
                    };
                    return address.ok_or(UnwindStep::Broken);
                }
                EvaluationResult::RequiresRegister { register, .. } => {
                    let value = self.register(register, registers).ok_or(UnwindStep::Broken)?;
                    evaluation.resume_with_register(Value::Generic(value))
                }
                EvaluationResult::RequiresMemory { address, size: 8, .. } => {
                    let word = stack.word(address).map_err(UnwindStep::Missing)?;
                    evaluation.resume_with_memory(Value::Generic(word))
                }
                _ => return Err(UnwindStep::Broken),
            }
            .map_err(|_| UnwindStep::Broken)?;
        }
        Err(UnwindStep::Broken)
    }

    /// Offset in its section of the last entry that begins at or below `address`.
    fn entry_offset(&self, address: u64) -> Option<usize> {
        if let Some(index) = self.index {
            let at = index.0.partition_point(|(start, _)| *start <= address).checked_sub(1)?;
            return index.0.get(at).map(|(_, offset)| *offset);
        }
        let (hdr_address, rows) = self.table()?;
        let wanted = i32::try_from(address.wrapping_sub(hdr_address).cast_signed()).ok()?;
        let start = |row: &[u8; 8]| i32::from_le_bytes([row[0], row[1], row[2], row[3]]);
        let row = rows.get(rows.partition_point(|row| start(row) <= wanted).checked_sub(1)?)?;
        let entry = i32::from_le_bytes([row[4], row[5], row[6], row[7]]);
        let entry_address = hdr_address.checked_add_signed(entry.into())?;
        usize::try_from(entry_address.checked_sub(self.headers.eh_frame.as_ref()?.address)?).ok()
    }

    /// Stated address of `.eh_frame_hdr` and the rows of its table. Linkers write one form only:
    /// version 1, signed 32-bit numbers relative to the section.
    fn table(&self) -> Option<(u64, &[[u8; 8]])> {
        const FORM: [u8; 4] = [1, 0x1b, 0x03, 0x3b];
        let address = self.headers.eh_frame_hdr.as_ref()?.address;
        let hdr = self.unwind.eh_frame_hdr.as_deref()?;
        let (form, rest) = hdr.split_first_chunk::<4>()?;
        let (count, table) = rest.get(4..)?.split_first_chunk::<4>()?;
        let (rows, _) = table.as_chunks::<8>();
        let count = usize::try_from(u32::from_le_bytes(*count)).ok()?;
        (*form == FORM && count > 0).then_some((address, rows.get(..count)?))
    }
}

/// The CIE at an offset, unless it is too long: its augmentation is a string without a bound, which is
/// searched for its end.
fn short_cie<'a, S: UnwindSection<Bytes<'a>>>(
    section: &S,
    bases: &BaseAddresses,
    offset: S::Offset,
) -> gimli::Result<CommonInformationEntry<Bytes<'a>>> {
    let mut rest = *section.section();
    rest.skip(UnwindOffset::into(offset))?;
    let (length, _) = rest.read_initial_length()?;
    if length > MAX_ENTRY_BYTES {
        return Err(gimli::Error::UnsupportedOffset);
    }
    section.cie_from_offset(bases, offset)
}

enum FoundEntry<'a> {
    EhFrame(EhFrame<Bytes<'a>>, FrameDescriptionEntry<Bytes<'a>>),
    DebugFrame(DebugFrame<Bytes<'a>>, FrameDescriptionEntry<Bytes<'a>>),
    Uncovered,
    Broken,
}

fn index_entries<'a, S: UnwindSection<Bytes<'a>>>(section: &S, bases: &BaseAddresses, found: &mut Vec<(u64, usize)>) {
    let mut entries = section.entries(bases);
    let mut last: Option<(usize, CommonInformationEntry<Bytes<'a>>)> = None;
    let mut work = MAX_INDEX_WORK;
    while let Ok(Some(entry)) = entries.next() {
        let CieOrFde::Fde(partial) = entry else { continue };
        let fde = partial.parse(|section, bases, offset| {
            let at = UnwindOffset::into(offset);
            if let Some((_, cie)) = last.as_ref().filter(|(known, _)| *known == at) {
                return Ok(cie.clone());
            }
            let cie = short_cie(section, bases, offset)?;
            last = Some((at, cie.clone()));
            Ok(cie)
        });
        let Ok(fde) = fde else { return };
        match work.checked_sub(fde.entry_len().saturating_add(fde.cie().entry_len())) {
            Some(left) => work = left,
            None => return,
        }
        found.push((fde.initial_address(), fde.offset()));
    }
}
