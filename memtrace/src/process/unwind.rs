//! A slice of a stack, and the registers it belongs to, as frames.
//!
//! Call frame information first; where there is none (code written at run time, Go, assembly) frame pointers, but only
//! ones that lead to code. What the kernel walked by frame pointers is joined on where that gets farther.

use std::sync::Arc;

use super::cfi::Scratch;
use super::maps::Maps;
use super::modules::{Module, ModuleId, Modules};
use super::rule::{Missing, Registers, Rule, Slice, Step};
use memtrace_incident::Cut;

/// Frames of one stack.
pub const MAX_FRAMES: usize = 512;
/// Bytes of unwind entries that are looked at for one stack: what compilers write takes some hundred a frame.
const MAX_WORK: usize = 1 << 20;
/// Rules that are remembered, by module and address.
const MAX_RULES: usize = 8192;
/// Bits of an address on arm64, if no mapping has more; the bits above may hold a signature of a return address.
const ADDRESS_BITS: u64 = (1 << 48) - 1;

/// A stack of addresses, and what they mean.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stack {
    /// Innermost first. Cap: [`MAX_FRAMES`].
    pub frames: Vec<Found>,
    /// Why the outermost frame is not there; `None` when it is.
    pub cut: Option<Cut>,
    /// An address was met that no known mapping holds: the mappings may be old.
    pub needs_maps: bool,
}

/// A frame.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// Whose code.
    pub module: Option<ModuleId>,
    /// Offset in the module's file of the instruction: for a return address of the byte before it.
    pub offset: Option<u64>,
    /// Name, of code that the process wrote itself.
    pub name: Option<Arc<str>>,
    /// Code that the process wrote itself, or from a file that is no ELF file.
    pub jit: bool,
    /// The address in the process: the instruction pointer, and return addresses.
    pub address: u64,
}

/// The mapped code of one process.
#[derive(Clone, Debug, Default)]
pub struct Code {
    /// Executable mappings.
    pub maps: Maps,
    /// Of each mapping its module, and what to subtract from an address to get the one the file states.
    pub modules: Vec<Option<(ModuleId, Option<u64>)>>,
}

impl Code {
    /// Where an address is.
    fn place(&self, address: u64) -> Option<Place> {
        let (index, mapping) = self.maps.find(address)?;
        let module = self.modules.get(index).copied().flatten();
        let offset = address.checked_sub(mapping.start)?.checked_add(mapping.offset)?;
        let stated = module.and_then(|(_, bias)| Some(address.wrapping_sub(bias?)));
        let is_kernels = matches!(&*mapping.path, "[vdso]" | "[vsyscall]" | "[uprobes]");
        Some(Place { module: module.map(|(id, _)| id), offset, stated, is_kernels })
    }

    fn holds(&self, return_address: u64) -> bool {
        return_address.checked_sub(1).is_some_and(|address| self.maps.find(address).is_some())
    }

    /// Heap bytes, about.
    pub fn memory_estimate(&self) -> usize {
        let modules = self.modules.capacity().saturating_mul(size_of::<Option<(ModuleId, Option<u64>)>>());
        self.maps.memory_estimate().saturating_add(modules)
    }
}

struct Place {
    module: Option<ModuleId>,
    offset: u64,
    /// `None` without an ELF file.
    stated: Option<u64>,
    /// Mapped by the kernel, not by the process.
    is_kernels: bool,
}

/// Walks stacks; one for all processes.
pub struct Unwinder {
    /// Rules by module and stated address; one that hashes to the same place is overwritten. Cap: [`MAX_RULES`].
    rules: Vec<Option<(ModuleId, u64, Rule)>>,
    scratch: Scratch,
}

impl Default for Unwinder {
    fn default() -> Self {
        Self { rules: vec![None; MAX_RULES], scratch: Scratch::default() }
    }
}

impl std::fmt::Debug for Unwinder {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Unwinder").finish_non_exhaustive()
    }
}

impl Unwinder {
    /// The frames of a thread with these registers, whose stack has `slice` at its stack pointer. `frame_pointers` is
    /// what the kernel walked: the instruction pointer and return addresses, innermost first; zeros are none.
    pub fn unwind(
        &mut self,
        modules: &mut Modules,
        code: &Code,
        registers: Registers,
        slice: &[u8],
        frame_pointers: &[u64],
    ) -> Stack {
        let walk = self.walk(modules, code, registers, slice);
        let joined = join(walk, frame_pointers, code);
        let place = |hop: &Hop| {
            let Some(place) = code.place(hop.lookup()) else {
                return Found { address: hop.address, ..Found::default() };
            };
            let jit = match place.module {
                Some(id) => modules.get(id).is_some_and(Module::is_written),
                None => !place.is_kernels,
            };
            let offset = place.module.is_some().then_some(place.offset);
            Found { module: place.module, offset, name: None, jit, address: hop.address }
        };
        Stack { frames: joined.hops.iter().map(place).collect(), cut: joined.cut, needs_maps: joined.needs_maps }
    }

    /// Heap bytes.
    pub fn memory_estimate(&self) -> usize {
        self.rules.capacity().saturating_mul(size_of::<Option<(ModuleId, u64, Rule)>>())
    }

    fn walk(&mut self, modules: &mut Modules, code: &Code, mut registers: Registers, slice: &[u8]) -> Walk {
        let stack = Slice::new(registers.sp, slice);
        let mut walk = Walk::default();
        let mut work = MAX_WORK;
        let mask = code.maps.all().last().map_or(0, |mapping| mapping.end).checked_next_power_of_two();
        let mask = mask.map_or(u64::MAX, |top| top.saturating_sub(1) | ADDRESS_BITS);
        let mut exact = true;
        loop {
            let hop = Hop { address: registers.ip, exact };
            let Some(place) = code.place(hop.lookup()) else {
                // An instruction pointer is one whatever the mappings say; a return address that is not in code is
                // rather a wrong guess.
                if walk.hops.is_empty() {
                    walk.hops.push(hop);
                }
                walk.needs_maps = true;
                walk.cut = Some(Cut::Module);
                return walk;
            };
            walk.hops.push(hop);
            if walk.hops.len() >= MAX_FRAMES {
                walk.cut = Some(Cut::Frames);
                return walk;
            }
            let (step, guessed) = self.step(modules, code, &place, &registers, exact, &stack, &mut work);
            match step {
                Step::Caller(mut caller, interrupted) => {
                    if cfg!(target_arch = "aarch64") {
                        caller.ip &= mask;
                    }
                    let forward =
                        caller.sp > registers.sp || (exact && caller.sp == registers.sp && caller.ip != registers.ip);
                    if !forward {
                        walk.cut = Some(Cut::Unwind);
                        return walk;
                    }
                    if guessed && !code.holds(caller.ip) {
                        walk.cut = Some(if place.stated.is_some() { Cut::Unwind } else { Cut::Module });
                        return walk;
                    }
                    registers = caller;
                    exact = interrupted;
                }
                Step::Outermost => return walk,
                Step::Missing(Missing::Beyond) => {
                    walk.cut = Some(Cut::Slice);
                    return walk;
                }
                Step::Missing(Missing::Elsewhere) | Step::Broken => {
                    walk.cut = Some(if place.stated.is_some() { Cut::Unwind } else { Cut::Module });
                    return walk;
                }
            }
        }
    }

    /// The caller of a frame, and whether that is a guess.
    #[expect(clippy::too_many_arguments, reason = "one step of one loop")]
    fn step(
        &mut self,
        modules: &mut Modules,
        code: &Code,
        place: &Place,
        registers: &Registers,
        exact: bool,
        stack: &Slice<'_>,
        work: &mut usize,
    ) -> (Step, bool) {
        let rule = match (place.module, place.stated) {
            (Some(module), Some(stated)) => self.rule(modules, module, stated, work),
            _ => None,
        };
        let step = match rule {
            None | Some(Rule::Broken) => None,
            Some(Rule::Uncovered) => None,
            Some(Rule::Complex) => match (place.module.and_then(|id| modules.unwind_data(id)), place.stated) {
                (Some(data), Some(stated)) => Some(data.cfi().step(stated, registers, stack, &mut self.scratch, work)),
                _ => None,
            },
            Some(rule) => Some(rule.apply(registers, stack)),
        };
        match step {
            Some(step) if step != Step::Broken => (step, false),
            _ if rule == Some(Rule::Uncovered) && exact => (leaf(code, registers, stack), true),
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
        let data = modules.unwind_data(module)?;
        let rule = data.cfi().rule(stated, &mut self.scratch, work);
        if *work > 0
            && let Some(slot) = self.rules.get_mut(at)
        {
            *slot = Some((module, stated, rule));
        }
        Some(rule)
    }
}

/// Assembly without unwind information that was interrupted: rather a leaf that has pushed nothing.
fn leaf(code: &Code, registers: &Registers, stack: &Slice<'_>) -> Step {
    let caller = match registers.lr {
        Some(lr) => Registers { ip: lr, lr: None, ..*registers },
        None => match stack.word(registers.sp) {
            Ok(ip) => Registers { ip, sp: registers.sp.wrapping_add(8), ..*registers },
            Err(missing) => return Step::Missing(missing),
        },
    };
    if code.holds(caller.ip) { Step::Caller(caller, false) } else { by_frame_pointer(registers, stack) }
}

/// Frames linked by their frame pointers: the caller's, and above it the return address.
fn by_frame_pointer(registers: &Registers, stack: &Slice<'_>) -> Step {
    // The kernel starts programs and runtimes start threads with none: what is in that frame has no caller.
    if registers.fp == 0 {
        return Step::Outermost;
    }
    if registers.fp < registers.sp || !registers.fp.is_multiple_of(8) {
        return Step::Missing(Missing::Elsewhere);
    }
    let (Some(above), Some(sp)) = (registers.fp.checked_add(8), registers.fp.checked_add(16)) else {
        return Step::Broken;
    };
    match (stack.word(registers.fp), stack.word(above)) {
        (Ok(_), Ok(0)) => Step::Outermost,
        (Ok(fp), Ok(ip)) => Step::Caller(Registers { ip, sp, fp, lr: None }, false),
        (Err(missing), _) | (_, Err(missing)) => Step::Missing(missing),
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Hop {
    address: u64,
    /// The thread is at this instruction; else it is a return address.
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
    cut: Option<Cut>,
    needs_maps: bool,
}

/// Where a walk and a chain of return addresses agree, outermost in the walk: a recursion has the same address many
/// times, so the place with most agreement below it counts.
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

/// Of a walk that was cut and the chain that the kernel walked the longer one, joined at the outermost frame that both
/// have. Why it was cut stays: that the chain reached the outermost frame, nothing says.
fn join(mut walk: Walk, chain: &[u64], code: &Code) -> Walk {
    if walk.cut.is_none() || walk.cut == Some(Cut::Frames) {
        return walk;
    }
    let chain: Vec<u64> = chain.iter().copied().take(MAX_FRAMES).take_while(|address| *address != 0).collect();
    // The first is an instruction pointer; the chain is as good as its addresses are code.
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
        walk.cut = Some(Cut::Frames);
    }
    walk
}
