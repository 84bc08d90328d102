//! Helpers of the kernel by typed names: sizes come from types, not from callers.

use aya_ebpf::EbpfContext;
use aya_ebpf::bindings::BPF_F_USER_STACK;
use aya_ebpf::helpers::generated::{
    bpf_get_prandom_u32, bpf_get_smp_processor_id, bpf_get_stack, bpf_ktime_get_boot_ns, bpf_ringbuf_query,
};
use aya_ebpf::maps::RingBuf;

/// `BPF_RB_AVAIL_DATA` (include/uapi/linux/bpf.h): ask a ring for the bytes not read yet.
const AVAIL_DATA: u64 = 0;
/// `BPF_RB_RING_SIZE`: ask a ring for its size.
const RING_SIZE: u64 = 1;

/// Boot-clock nanoseconds.
#[inline(always)]
pub fn boot_ns() -> u64 {
    unsafe { bpf_ktime_get_boot_ns() }
}

/// Number of the CPU this runs on.
#[inline(always)]
pub fn cpu() -> u32 {
    unsafe { bpf_get_smp_processor_id() as u32 }
}

/// A pseudo-random number.
#[inline(always)]
pub fn random() -> u32 {
    unsafe { bpf_get_prandom_u32() }
}

/// Bytes of a ring that are not read yet, and its size in bytes.
#[inline(always)]
pub fn ring_state(ring: *mut RingBuf) -> (u64, u64) {
    unsafe { (bpf_ringbuf_query(ring.cast(), AVAIL_DATA), bpf_ringbuf_query(ring.cast(), RING_SIZE)) }
}

/// Writes the running thread's kernel stack, innermost frame first; how many frames were written.
#[inline(always)]
pub fn kernel_stack<const FRAMES: usize>(ctx: &impl EbpfContext, into: *mut [u64; FRAMES]) -> u32 {
    get_stack(ctx, into, 0)
}

/// As [`kernel_stack`], of the user stack by frame pointers.
#[inline(always)]
pub fn user_stack<const FRAMES: usize>(ctx: &impl EbpfContext, into: *mut [u64; FRAMES]) -> u32 {
    get_stack(ctx, into, BPF_F_USER_STACK as u64)
}

#[inline(always)]
fn get_stack<const FRAMES: usize>(ctx: &impl EbpfContext, into: *mut [u64; FRAMES], flags: u64) -> u32 {
    let got = unsafe { bpf_get_stack(ctx.as_ptr(), into.cast(), (FRAMES * 8) as u32, flags) };
    if got > 0 { got as u32 / 8 } else { 0 }
}
