//! The kernel side of memtrace: hooks read, records leave through three rings. No policy here.
#![no_std]
#![no_main]
// For the one instruction that core does not offer on this target; the compiler that builds this allows it anyway, for
// aya-ebpf.
#![feature(asm_experimental_arch)]
// The layout macros carry their own `unsafe`, also inside unsafe blocks.
#![allow(unused_unsafe)]

mod emit;
mod fault;
mod hooks;
mod kernel;
mod maps;
mod stack;

/// GPL-only helpers (bpf_probe_read_kernel) need a compatible licence.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    // Never compiled into a program that loads: the verifier refuses an endless loop.
    loop {}
}
