//! Where the page fault that is being handled happened.
//!
//! The rss hook is called with an address space, not with an address, and few of its calls need
//! one: only those that a stack is taken at. So the address is searched for instead of being noted
//! at every fault. The kernel describes a fault in a `struct vm_fault` on its stack while it
//! handles it (mm/memory.c `__handle_mm_fault`), a few frames below the user's registers. Words
//! there are taken for one only when they name a mapping of this address space and an address
//! inside of it.

use memtrace_common::event::UNKNOWN;
use memtrace_common::layout::ABSENT;

use crate::arch::user_registers;
use crate::kernel::{copy, pointer, read};
use crate::layout;
use crate::maps::{FRAME_WORDS, FRAMES};
use crate::memory::load;

/// Kernel addresses have their highest bit set, user addresses have not.
const KERNEL: u64 = 1 << 63;
/// Bits below a page: `vm_fault.address` has none of them.
const IN_PAGE: u64 = 4095;

/// Address of the page, [`UNKNOWN`] where none is found. The running thread must have come into the
/// kernel by a fault.
///
/// Global, as [`crate::kernel::sum_slots`]. It looks for the registers itself: a global function
/// takes numbers only, and the verifier knows the registers as a typed pointer.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn fault_address(mm: u64) -> u64 {
    let regs = user_registers();
    if layout!(fault_vma) == ABSENT || layout!(fault_address) == ABSENT || layout!(vma_mm) == ABSENT || regs == 0 {
        return UNKNOWN;
    }
    let Some(frames) = FRAMES.get_ptr_mut(0) else { return UNKNOWN };
    if !copy(frames, regs.wrapping_sub((FRAME_WORDS * 8) as u64)) {
        return UNKNOWN;
    }
    let apart = (layout!(fault_address).wrapping_sub(layout!(fault_vma)) >> 3) as usize;
    // From the registers down: what is nearest to them is alive, what is far below may be left from earlier.
    for below in 1..FRAME_WORDS {
        let at = FRAME_WORDS - 1 - below;
        let word = |index: usize| load(frames.cast::<u64>().wrapping_add(index & (FRAME_WORDS - 1)));
        let (vma, address) = (word(at), word(at + apart));
        if at + apart >= FRAME_WORDS || vma & KERNEL == 0 || address & (KERNEL | IN_PAGE) != 0 || address == 0 {
            continue;
        }
        if is_in_mapping(vma, address, mm) {
            return address;
        }
    }
    UNKNOWN
}

/// Whether `vma` is a mapping of that address space that holds the address. Global too: the loop
/// above is long.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn is_in_mapping(vma: u64, address: u64, mm: u64) -> bool {
    pointer(vma, layout!(vma_mm)) == mm
        && read(vma, layout!(vma_start)).unwrap_or(u64::MAX) <= address
        && address < read(vma, layout!(vma_end)).unwrap_or(0)
}
