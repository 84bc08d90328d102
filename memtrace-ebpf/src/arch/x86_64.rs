//! x86_64: members of `struct pt_regs` (arch/x86/include/asm/ptrace.h) and system call numbers
//! (arch/x86/entry/syscalls/syscall_64.tbl).

use memtrace_common::event::{CALL_BRK, CALL_MADVISE, CALL_MMAP, CALL_MREMAP, CALL_MUNMAP};

use crate::kernel::read;
use crate::layout;

/// `__USER32_CS` (arch/x86/include/asm/segment.h): the code segment of 32-bit programs.
const USER32_CS: u64 = 0x23;
/// The two privilege bits of a code segment: 3 in user mode.
const USER_MODE: u64 = 3;

/// The number of the system call, below 0 when there is none.
///
/// In an exception `orig_ax` is -1 (arch/x86/entry/entry_64.S).
#[inline(always)]
pub fn call_number(regs: u64) -> i64 {
    read(regs, layout!(regs_orig_ax)).unwrap_or(-1)
}

#[inline(always)]
pub fn mapping_call(number: i64) -> u32 {
    match number {
        9 => CALL_MMAP,
        11 => CALL_MUNMAP,
        12 => CALL_BRK,
        25 => CALL_MREMAP,
        28 => CALL_MADVISE,
        _ => 0,
    }
}

#[inline(always)]
pub fn is_compat(regs: u64) -> bool {
    read::<u64>(regs, layout!(regs_cs)).unwrap_or(0) & 0xffff == USER32_CS
}

/// Where an argument of a system call is in `pt_regs`: rdi, rsi, rdx, r10.
#[inline(always)]
pub fn argument_offset(index: u32) -> u32 {
    match index {
        0 => layout!(regs_di),
        1 => layout!(regs_si),
        2 => layout!(regs_dx),
        _ => layout!(regs_r10),
    }
}

/// Whether these are registers of user mode, by the code segment.
#[inline(always)]
pub fn in_user_mode(regs: u64) -> bool {
    read::<u64>(regs, layout!(regs_cs)).is_some_and(|cs| cs & USER_MODE == USER_MODE)
}

#[inline(always)]
pub fn frame_pointer(regs: u64) -> u64 {
    read(regs, layout!(regs_bp)).unwrap_or(0)
}
