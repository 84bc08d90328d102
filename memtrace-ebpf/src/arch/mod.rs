//! What differs between architectures: where a thread's user registers are, and system call
//! numbers.
//!
//! One object serves x86_64 and aarch64 alike, so nothing here is decided at compile time. The
//! kernel's own BTF says which members `struct pt_regs` has (`layout.rs`), and the members are
//! named differently: `orig_ax` and `ip` are x86_64's, `syscallno` and `pc` are aarch64's. A member
//! that is absent is a constant to the verifier, so the other architecture's branch is dead code to
//! it.
//!
//! (What is decided when the object is built is how aya-ebpf takes a kprobe's arguments out of
//! `pt_regs`: the build passes `bpf_target_arch`.)

mod aarch64;
mod x86_64;

use aya_ebpf::helpers::generated::{bpf_get_current_task_btf, bpf_task_pt_regs};
use memtrace_common::layout::ABSENT;

use crate::kernel::{current, pointer, read};
use crate::{control, layout};

/// The architecture of the running kernel: x86_64, else aarch64.
#[derive(Clone, Copy)]
pub struct Arch {
    x86_64: bool,
}

/// The registers that a stack walk begins with.
pub struct CodeRegisters {
    /// Instruction pointer; 0 when the registers cannot be read.
    pub ip: u64,
    /// Stack pointer; 0 when the registers cannot be read.
    pub sp: u64,
    /// Frame pointer: rbp, x29.
    pub bp: u64,
    /// aarch64: link register, x30; else 0.
    pub lr: u64,
}

impl Arch {
    /// By the name that `struct pt_regs` has for the system call number.
    #[inline(always)]
    pub fn running() -> Self {
        Self { x86_64: layout!(regs_orig_ax) != ABSENT }
    }

    /// Which of the mapping calls (`event::CALL_*`) the registers of a system call say, 0 for
    /// another.
    #[inline(always)]
    pub fn mapping_call(self, regs: u64) -> u32 {
        if self.x86_64 {
            x86_64::mapping_call(x86_64::call_number(regs))
        } else {
            aarch64::mapping_call(aarch64::call_number(regs))
        }
    }

    /// Whether a 32-bit program is calling: its numbers for these calls are others.
    #[inline(always)]
    pub fn is_compat(self, regs: u64) -> bool {
        if self.x86_64 { x86_64::is_compat(regs) } else { aarch64::is_compat(regs) }
    }

    /// One argument of a system call, counted from 0; 0 when it cannot be read.
    #[inline(always)]
    pub fn argument(self, regs: u64, index: u32) -> u64 {
        if self.x86_64 {
            let offset = x86_64::argument_offset(index);
            read(regs, offset).unwrap_or(0)
        } else if index == 0 {
            read(regs, aarch64::first_argument_offset()).unwrap_or(0)
        } else {
            read(regs, aarch64::register_offset(index)).unwrap_or(0)
        }
    }
}

/// Address of the running thread's user registers, 0 when they are not found.
///
/// By `bpf_task_pt_regs` (5.15), else at the end of the kernel stack, where every entry from user
/// mode leaves them (arch/*/include/asm/processor.h `task_pt_regs`).
#[inline(always)]
pub fn user_registers() -> u64 {
    if control!(task_pt_regs) == 1 {
        return unsafe { bpf_task_pt_regs(bpf_get_current_task_btf()) } as u64;
    }
    let stack = pointer(current(), layout!(task_stack));
    if stack == 0 || control!(thread_bytes) == 0 || layout!(regs_size) == ABSENT {
        return 0;
    }
    let regs = stack + control!(thread_bytes) as u64 - layout!(regs_size) as u64;
    // A kernel stack of another size (KASAN) has something else there.
    let plausible = x86_64::in_user_mode(regs);
    if layout!(regs_cs) != ABSENT && !plausible { 0 } else { regs }
}

/// Whether the running thread is in a system call, by its user registers; else it is in an
/// exception, which has no system call number.
#[inline(always)]
pub fn in_system_call(regs: u64) -> bool {
    if layout!(regs_orig_ax) != ABSENT {
        return x86_64::call_number(regs) >= 0;
    }
    aarch64::call_number(regs) >= 0
}

/// Where the running thread was in user mode.
#[inline(always)]
pub fn code_registers(regs: u64) -> CodeRegisters {
    let x86 = layout!(regs_ip) != ABSENT;
    let ip = read(regs, if x86 { layout!(regs_ip) } else { layout!(regs_pc) }).unwrap_or(0u64);
    let sp = read(regs, layout!(regs_sp)).unwrap_or(0u64);
    let (bp, lr) = if x86 { (x86_64::frame_pointer(regs), 0) } else { aarch64::frame_and_link(regs) };
    CodeRegisters { ip, sp, bp, lr }
}
