//! A copied stack and the registers it belongs to, walked to frames.
//!
//! Call frame information comes first. Where a module has none (code written at run time, Go,
//! assembly) the walk follows frame pointers, but only to addresses that lie in mapped code: a
//! register that holds something else would lead anywhere. The kernel has walked frame pointers
//! too, when it took the sample; where its chain gets farther, the rest of it is appended.
//!
//! The stack pointer must rise with every step, so a walk ends.

use std::sync::Arc;

use crate::cfi::CfiScratch;
use crate::maps::Maps;
use crate::modules::{Module, ModuleId, Modules};
use crate::rule::{MissingWord, Registers, Rule, StackCopy, UnwindStep};

/// Most frames of one stack.
pub const MAX_FRAMES: usize = 512;
/// Bytes of unwind entries read for one stack, in all walks of it. Entries of compilers take some
/// hundred bytes.
pub const MAX_WORK: usize = 1 << 20;
/// The same for ordinary code: an entry of 128 bytes for each of the frames.
pub(crate) const ORDINARY_WORK: usize = MAX_FRAMES * 128;
/// Rules that are cached, by module and address.
const MAX_RULES: usize = 8192;
/// Address bits on arm64 if no mapping needs more; the bits above may hold the signature of a
/// return address (pointer authentication).
const ADDRESS_BITS: u64 = (1 << 48) - 1;

/// The frames of one stack.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UnwoundStack {
    /// Innermost first. Cap: [`MAX_FRAMES`].
    pub frames: Vec<UnwoundFrame>,
    /// Why the outermost frame is missing; `None` when the walk reached it.
    pub truncation: Option<Truncation>,
    /// The walk met an address that no mapping holds: the mappings may be out of date.
    pub needs_maps: bool,
    /// A frame lies in a mapping that nobody has looked at, or else in one that could not be opened
    /// yet: its index in [`MappedCode::modules`]. Once it is open, the walk may get farther.
    pub needs_module: Option<usize>,
}

/// Why a walk ended before the outermost frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Truncation {
    /// The copy ended before the stack did.
    StackCopy,
    /// Code of no known module, without a frame pointer that led on.
    UnknownCode,
    /// The unwind information of a module was missing, broken or led nowhere.
    UnwindInfo,
    /// The stack has more than [`MAX_FRAMES`] frames.
    FrameLimit,
}

/// One frame, still without the name of its function.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UnwoundFrame {
    /// The file the code was mapped from; `None` for anonymous memory and unknown addresses.
    pub module: Option<ModuleId>,
    /// Offset of the instruction in the module's file; for a return address, of the byte before
    /// it, which lies inside the call.
    pub offset: Option<u64>,
    /// Function name, of code that the process wrote at run time.
    pub name: Option<Arc<str>>,
    /// The process wrote this code at run time: it lies in anonymous memory, or in a file that is
    /// not an ELF file.
    pub jit: bool,
    /// Address in the process: the instruction pointer of the innermost frame, else a return
    /// address.
    pub address: u64,
}

/// The mapped code of one process.
#[derive(Clone, Debug, Default)]
pub struct MappedCode {
    /// Executable mappings, by address.
    pub maps: Maps,
    /// For each mapping its module. As long as `maps`.
    pub modules: Vec<MappedModule>,
}

/// What is known of the file behind a mapping. Files are opened when a frame lies in them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MappedModule {
    /// Nobody has looked yet.
    Unknown,
    /// Known by its path only: it could not be opened yet.
    Unread(ModuleId),
    /// Opened. Its load bias is the address in memory minus the address that the file states;
    /// `None` if the file cannot be read as ELF.
    Read(ModuleId, Option<u64>),
    /// Anonymous memory.
    Anonymous,
}

impl MappedModule {
    /// The module, if it is known.
    pub fn module(self) -> Option<ModuleId> {
        match self {
            Self::Read(id, _) | Self::Unread(id) => Some(id),
            Self::Unknown | Self::Anonymous => None,
        }
    }

    /// The module, if its file was opened.
    pub fn read_module(self) -> Option<ModuleId> {
        match self {
            Self::Read(id, _) => Some(id),
            Self::Unread(_) | Self::Unknown | Self::Anonymous => None,
        }
    }
}

impl MappedCode {
    fn place(&self, address: u64) -> Option<CodePlace> {
        let (index, mapping) = self.maps.find(address)?;
        let mapped = self.modules.get(index).copied().unwrap_or(MappedModule::Anonymous);
        let offset = address.checked_sub(mapping.start)?.checked_add(mapping.offset)?;
        let (module, bias) = match mapped {
            MappedModule::Read(id, bias) => (Some(id), bias),
            MappedModule::Unread(id) => (Some(id), None),
            MappedModule::Unknown | MappedModule::Anonymous => (None, None),
        };
        let stated = bias.map(|bias| address.wrapping_sub(bias));
        let by_kernel = matches!(&*mapping.path, "[vdso]" | "[vsyscall]" | "[uprobes]");
        Some(CodePlace { index, mapped, module, offset, stated, by_kernel, has_file: mapping.has_file() })
    }

    fn holds(&self, return_address: u64) -> bool {
        return_address.checked_sub(1).is_some_and(|address| self.maps.find(address).is_some())
    }

    /// Approximate heap size in bytes.
    pub fn memory_estimate(&self) -> usize {
        let modules = self.modules.capacity().saturating_mul(size_of::<MappedModule>());
        self.maps.memory_estimate().saturating_add(modules)
    }
}

struct CodePlace {
    /// Index of the mapping.
    index: usize,
    mapped: MappedModule,
    module: Option<ModuleId>,
    /// Offset in the mapped file, bytes.
    offset: u64,
    /// The address as the file states it; `None` without an ELF file.
    stated: Option<u64>,
    /// The kernel mapped this code, not the process.
    by_kernel: bool,
    has_file: bool,
}

impl CodePlace {
    /// Why a walk that finds no caller of a frame here is incomplete.
    fn truncation(&self) -> Truncation {
        if self.stated.is_some() { Truncation::UnwindInfo } else { Truncation::UnknownCode }
    }
}

/// Walks stacks. One serves all processes: rules belong to modules, which processes share.
pub struct Unwinder {
    /// Direct-mapped cache: rules by a hash of module and stated address. Cap: [`MAX_RULES`].
    rules: Vec<Option<(ModuleId, u64, Rule)>>,
    scratch: CfiScratch,
}

impl Default for Unwinder {
    fn default() -> Self {
        Self { rules: vec![None; MAX_RULES], scratch: CfiScratch::default() }
    }
}

impl std::fmt::Debug for Unwinder {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Unwinder").finish_non_exhaustive()
    }
}

/// The frame that a walk is at.
#[derive(Clone, Copy)]
struct Cursor {
    registers: Registers,
    /// The thread is at this instruction; else `ip` is a return address.
    exact: bool,
}

impl Unwinder {
    /// Walks the stack of a thread with these registers. `stack_copy` holds the stack from its
    /// stack pointer up. `frame_pointers` is the chain that the kernel walked: the instruction
    /// pointer, then return addresses, innermost first; a zero ends it. `work` is what is left of
    /// [`MAX_WORK`]; without any, there are the rules that are cached, and frame pointers.
    pub fn unwind(
        &mut self,
        modules: &mut Modules,
        code: &MappedCode,
        registers: Registers,
        stack_copy: &[u8],
        frame_pointers: &[u64],
        work: &mut usize,
    ) -> UnwoundStack {
        let walk = self.walk(modules, code, registers, stack_copy, work);
        let joined = join(walk, frame_pointers, code);
        let (mut unknown, mut unread) = (None, None);
        let mut frame = |hop: &Hop| {
            let Some(place) = code.place(hop.lookup()) else {
                return UnwoundFrame { address: hop.address, ..UnwoundFrame::default() };
            };
            let jit = match place.module {
                Some(id) => modules.get(id).is_some_and(Module::is_generated),
                None => !place.by_kernel && !place.has_file,
            };
            match place.mapped {
                MappedModule::Unknown => unknown = unknown.or(Some(place.index)),
                MappedModule::Unread(_) => unread = unread.or(Some(place.index)),
                MappedModule::Read(..) | MappedModule::Anonymous => {}
            }
            let offset = place.module.is_some().then_some(place.offset);
            UnwoundFrame { module: place.module, offset, name: None, jit, address: hop.address }
        };
        let frames = joined.hops.iter().map(&mut frame).collect();
        let needs_module = unknown.or(unread);
        UnwoundStack { frames, truncation: joined.truncation, needs_maps: joined.needs_maps, needs_module }
    }

    /// Heap size in bytes.
    pub fn memory_estimate(&self) -> usize {
        self.rules.capacity().saturating_mul(size_of::<Option<(ModuleId, u64, Rule)>>())
    }

    fn walk(
        &mut self,
        modules: &mut Modules,
        code: &MappedCode,
        registers: Registers,
        bytes: &[u8],
        work: &mut usize,
    ) -> Walk {
        let stack = StackCopy::new(registers.sp, bytes);
        let mut walk = Walk::default();
        let top = code.maps.all().last().map_or(0, |mapping| mapping.end).checked_next_power_of_two();
        let mask = top.map_or(u64::MAX, |top| top.saturating_sub(1) | ADDRESS_BITS);
        let mut cursor = Cursor { registers, exact: true };
        walk.truncation = loop {
            let hop = Hop { address: cursor.registers.ip, exact: cursor.exact };
            let Some(place) = code.place(hop.lookup()) else {
                // The instruction pointer is a frame even if the mappings do not hold it. A return
                // address outside of code is more likely a wrong guess.
                if walk.hops.is_empty() {
                    walk.hops.push(hop);
                }
                walk.needs_maps = true;
                break Some(Truncation::UnknownCode);
            };
            walk.hops.push(hop);
            if walk.hops.len() >= MAX_FRAMES {
                break Some(Truncation::FrameLimit);
            }
            let (step, guessed) = self.step(modules, code, &place, &cursor, &stack, work);
            match step {
                UnwindStep::Caller(mut caller, interrupted) => {
                    if cfg!(target_arch = "aarch64") {
                        caller.ip &= mask;
                    }
                    let Cursor { registers, exact } = cursor;
                    let forward =
                        caller.sp > registers.sp || (exact && caller.sp == registers.sp && caller.ip != registers.ip);
                    if !forward {
                        break Some(Truncation::UnwindInfo);
                    }
                    if guessed && !code.holds(caller.ip) {
                        break Some(place.truncation());
                    }
                    cursor = Cursor { registers: caller, exact: interrupted };
                }
                // What a frame pointer says in place of a rule that there was no work left for.
                UnwindStep::Outermost if guessed && *work == 0 && place.stated.is_some() => {
                    break Some(Truncation::UnwindInfo);
                }
                UnwindStep::Outermost => break None,
                UnwindStep::Missing(MissingWord::Beyond) => break Some(Truncation::StackCopy),
                UnwindStep::Missing(MissingWord::Elsewhere) | UnwindStep::Broken => break Some(place.truncation()),
            }
        };
        walk
    }

    /// The caller of a frame; true if it is a guess.
    fn step(
        &mut self,
        modules: &mut Modules,
        code: &MappedCode,
        place: &CodePlace,
        cursor: &Cursor,
        stack: &StackCopy<'_>,
        work: &mut usize,
    ) -> (UnwindStep, bool) {
        let registers = &cursor.registers;
        let rule = match (place.module, place.stated) {
            (Some(module), Some(stated)) => self.rule(modules, module, stated, work),
            _ => None,
        };
        let step = match rule {
            None | Some(Rule::Broken | Rule::Uncovered) => None,
            Some(Rule::Complex) => match (place.module.and_then(|id| modules.unwind_data(id)), place.stated) {
                (Some(data), Some(stated)) => Some(data.cfi().step(stated, registers, stack, &mut self.scratch, work)),
                _ => None,
            },
            Some(rule) => Some(rule.apply(registers, stack)),
        };
        match step {
            Some(step) if step != UnwindStep::Broken => (step, false),
            _ if rule == Some(Rule::Uncovered) && cursor.exact => (leaf(code, registers, stack), true),
            _ => (by_frame_pointer(registers, stack), true),
        }
    }

    fn rule(&mut self, modules: &mut Modules, module: ModuleId, stated: u64, work: &mut usize) -> Option<Rule> {
        let hash = (stated ^ u64::from(module.0).rotate_left(32)).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40;
        let at = usize::try_from(hash).ok()?.checked_rem(self.rules.len())?;
        if let Some(Some((known, address, rule))) = self.rules.get(at)
            && (*known, *address) == (module, stated)
        {
            return Some(*rule);
        }
        if *work == 0 {
            return Some(Rule::Broken);
        }
        let data = modules.unwind_data(module)?;
        let rule = data.cfi().rule(stated, &mut self.scratch, work);
        // With no work left the answer is about this stack's budget, not about the module.
        if *work > 0
            && let Some(slot) = self.rules.get_mut(at)
        {
            *slot = Some((module, stated, rule));
        }
        Some(rule)
    }
}

/// Interrupted in assembly without unwind information: most likely a leaf that has pushed nothing.
fn leaf(code: &MappedCode, registers: &Registers, stack: &StackCopy<'_>) -> UnwindStep {
    let caller = match registers.lr {
        Some(lr) => Registers { ip: lr, lr: None, ..*registers },
        None => match stack.word(registers.sp) {
            Ok(ip) => Registers { ip, sp: registers.sp.wrapping_add(8), ..*registers },
            Err(missing) => return UnwindStep::Missing(missing),
        },
    };
    if code.holds(caller.ip) { UnwindStep::Caller(caller, false) } else { by_frame_pointer(registers, stack) }
}

/// A frame pointer points at the caller's frame pointer; the return address is the word above it.
fn by_frame_pointer(registers: &Registers, stack: &StackCopy<'_>) -> UnwindStep {
    // The kernel starts programs, and runtimes start threads, with a frame pointer of 0.
    if registers.fp == 0 {
        return UnwindStep::Outermost;
    }
    if registers.fp < registers.sp || !registers.fp.is_multiple_of(8) {
        return UnwindStep::Missing(MissingWord::Elsewhere);
    }
    let (Some(above), Some(sp)) = (registers.fp.checked_add(8), registers.fp.checked_add(16)) else {
        return UnwindStep::Broken;
    };
    match (stack.word(registers.fp), stack.word(above)) {
        (Ok(_), Ok(0)) => UnwindStep::Outermost,
        (Ok(fp), Ok(ip)) => UnwindStep::Caller(Registers { ip, sp, fp, lr: None }, false),
        (Err(missing), _) | (_, Err(missing)) => UnwindStep::Missing(missing),
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Hop {
    address: u64,
    /// The thread is at this instruction; else `address` is a return address.
    exact: bool,
}

impl Hop {
    fn lookup(&self) -> u64 {
        if self.exact { self.address } else { self.address.wrapping_sub(1) }
    }
}

#[derive(Debug, Default)]
struct Walk {
    hops: Vec<Hop>,
    truncation: Option<Truncation>,
    needs_maps: bool,
}

/// The outermost frame of the walk that the chain has too, as an index into each. In a recursion
/// the same address occurs many times: the occurrence with the longest common run below it wins.
fn agreement(hops: &[Hop], returns: &[u64]) -> Option<(usize, usize)> {
    let equal = |mine: usize, theirs: usize| {
        hops.get(mine).zip(returns.get(theirs)).is_some_and(|(hop, address)| hop.address == *address)
    };
    let run = |mine: usize, theirs: usize| {
        (0..=mine.min(theirs))
            .take_while(|back| equal(mine.saturating_sub(*back), theirs.saturating_sub(*back)))
            .count()
    };
    (1..hops.len()).rev().find_map(|mine| {
        let candidates = (0..returns.len()).filter(|theirs| equal(mine, *theirs));
        candidates.max_by_key(|theirs| run(mine, *theirs)).map(|theirs| (mine, theirs))
    })
}

/// Extends an incomplete walk with the kernel's chain, joined at the outermost frame that both
/// have, if the chain is longer. The truncation stays: nothing says that the chain is complete.
fn join(mut walk: Walk, chain: &[u64], code: &MappedCode) -> Walk {
    if walk.truncation.is_none() || walk.truncation == Some(Truncation::FrameLimit) {
        return walk;
    }
    let chain: Vec<u64> = chain.iter().copied().take(MAX_FRAMES).take_while(|address| *address != 0).collect();
    // The first address is the instruction pointer. The chain is used up to the first address that
    // is not in mapped code.
    let returns = chain.get(1..).unwrap_or_default();
    let good = returns.iter().take_while(|address| code.holds(**address)).count();
    let returns = returns.get(..good).unwrap_or_default();
    let hop = |address: &u64| Hop { address: *address, exact: false };
    let common = agreement(&walk.hops, returns);
    match common {
        Some((mine, theirs)) => {
            let tail = returns.get(theirs.saturating_add(1)..).unwrap_or_default();
            if tail.len() > walk.hops.len().saturating_sub(mine.saturating_add(1)) {
                walk.hops.truncate(mine.saturating_add(1));
                walk.hops.extend(tail.iter().map(hop));
            }
        }
        None if returns.len() >= walk.hops.len() => {
            walk.hops.truncate(1);
            walk.hops.extend(returns.iter().map(hop));
        }
        None => {}
    }
    if walk.hops.len() > MAX_FRAMES {
        walk.hops.truncate(MAX_FRAMES);
        walk.truncation = Some(Truncation::FrameLimit);
    }
    walk
}
