//! aarch64: members of `struct pt_regs` (arch/arm64/include/asm/ptrace.h) and system call numbers
//! (include/uapi/asm-generic/unistd.h).

use memtrace_common::event::{CALL_BRK, CALL_MADVISE, CALL_MMAP, CALL_MREMAP, CALL_MUNMAP};
use memtrace_common::layout::ABSENT;

use crate::kernel::read;
use crate::layout;

/// `PSR_MODE32_BIT` in `pstate`: a 32-bit program.
const PSR_MODE32_BIT: u64 = 0x10;
/// The frame pointer is x29.
const FRAME_POINTER: u32 = 29;
/// The link register is x30.
const LINK_REGISTER: u32 = 30;

/// The number of the system call, below 0 when there is none.
///
/// In an exception `syscallno` is NO_SYSCALL, -1 (arch/arm64/include/asm/ptrace.h).
#[inline(always)]
pub fn call_number(regs: u64) -> i64 {
    read::<i32>(regs, layout!(regs_syscallno)).unwrap_or(-1) as i64
}

#[inline(always)]
pub fn mapping_call(number: i64) -> u32 {
    match number {
        222 => CALL_MMAP,
        215 => CALL_MUNMAP,
        214 => CALL_BRK,
        216 => CALL_MREMAP,
        233 => CALL_MADVISE,
        _ => 0,
    }
}

#[inline(always)]
pub fn is_compat(regs: u64) -> bool {
    read::<u64>(regs, layout!(regs_pstate)).unwrap_or(0) & PSR_MODE32_BIT != 0
}

/// Where the first argument of a system call is in `pt_regs`: the result is put into x0, so the
/// kernel keeps it in `orig_x0`.
#[inline(always)]
pub fn first_argument_offset() -> u32 {
    layout!(regs_orig_x0)
}

/// Where a register x0 to x30 is in `pt_regs`; x1 and on are arguments of a system call.
#[inline(always)]
pub fn register_offset(number: u32) -> u32 {
    layout!(regs_regs) + 8 * number
}

/// Frame pointer and link register.
#[inline(always)]
pub fn frame_and_link(regs: u64) -> (u64, u64) {
    (register(regs, FRAME_POINTER), register(regs, LINK_REGISTER))
}

#[inline(always)]
fn register(regs: u64, number: u32) -> u64 {
    if layout!(regs_regs) == ABSENT { 0 } else { read(regs, register_offset(number)).unwrap_or(0) }
}
