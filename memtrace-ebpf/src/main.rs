//! The kernel side of memtrace: hooks read, records leave through three rings. No policy here.
//!
//! A hook (`hooks/`) guards, reads and emits. `kernel` is the only reader of kernel memory, `emit`
//! the only writer of rings, `arch` the only place that knows an architecture's registers and call
//! numbers. Every offset and setting is a constant in `.rodata` by the time the kernel's verifier
//! sees the programs, so a branch that this kernel or machine does not need is never verified.
//!
//! # The rule for `unsafe`
//!
//! Programs run only after the verifier has proven that no path of them touches memory they may not
//! touch: their stack, a map value, a reserved ring record, their context. A wrong pointer is a
//! program that does not load, not a crash. So `unsafe` here promises nothing that a comment could
//! prove better, and the rule is about what the verifier does not see: types.
//!
//! 1. Reads of kernel memory go through `kernel::read` and `kernel::copy`, which cannot fault
//!    (`bpf_probe_read_kernel`). Reads of maps, records and the context are proven by the verifier.
//! 2. Writes go through typed helpers: `set!` and `field!` (fields by name, checked by the
//!    compiler), `memory::value` (a map value as what it is), `memory::store` (one that must not be
//!    optimised), `maps::atomic_add` and `maps::PendingGrowth` (memory that other CPUs add to).
//! 3. Helpers of the kernel that take a bare pointer and a size are wrapped once, in `bpf_calls`,
//!    `kernel` or `emit`, with the size taken from the type.
//! 4. A `SAFETY` comment stands only where something must hold that neither the verifier nor a type
//!    checks: another CPU at the same value, a program that is interrupted by another one.
#![no_std]
#![no_main]
// `maps::atomic_add` is the one instruction that core does not offer on this target. aya-ebpf needs
// the same feature, so every compiler that builds this crate allows it.
#![feature(asm_experimental_arch)]

mod arch;
mod bpf_calls;
mod emit;
mod fault;
mod hooks;
mod kernel;
mod maps;
mod memory;
mod stack;

/// Helpers such as `bpf_probe_read_kernel` are only for programs with a GPL-compatible licence
/// (kernel/bpf/verifier.c `check_helper_call`).
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    // Never compiled into a program that loads: the verifier refuses an endless loop.
    loop {}
}
