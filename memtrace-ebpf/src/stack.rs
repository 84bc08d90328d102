//! Stacks: the kernel stack of the thread whose charge failed.

use aya_ebpf::EbpfContext;
use aya_ebpf::helpers::generated::bpf_get_stack;
use memtrace_common::control::Ring;
use memtrace_common::event::{KERNEL_FRAMES, KernelStack};

use crate::emit::emit;
use crate::kernel::{current, read_task};

/// Sends the running thread's kernel stack as that of the trigger of a kill.
#[inline(always)]
pub fn emit_trigger_stack(ctx: &impl EbpfContext, at_ns: u64, victim_tgid: u32, victim_start_boot_ns: u64) {
    emit::<KernelStack>(Ring::Stacks, at_ns, |record| unsafe {
        read_task(current(), &raw mut (*record).task);
        (*record).victim_tgid = victim_tgid;
        (*record).victim_start_boot_ns = victim_start_boot_ns;
        (*record).reserved = 0;
        let size = (KERNEL_FRAMES * 8) as u32;
        let got = bpf_get_stack(ctx.as_ptr(), (&raw mut (*record).addresses).cast(), size, 0);
        (*record).frames = if got > 0 { got as u32 / 8 } else { 0 };
    });
}
