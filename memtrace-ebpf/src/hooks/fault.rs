//! User page faults: remembers the address, for the growth that follows on the same thread.

use aya_ebpf::helpers::bpf_get_current_pid_tgid;
use aya_ebpf::macros::raw_tracepoint;
use aya_ebpf::programs::RawTracePointContext;

use crate::maps::LAST_FAULT;

/// `page_fault_user(address, regs, error_code)`, before the fault is handled. x86 only.
#[raw_tracepoint(tracepoint = "page_fault_user")]
fn page_fault_user(ctx: RawTracePointContext) -> i32 {
    if let Some(last) = LAST_FAULT.get_ptr_mut(0) {
        unsafe {
            (*last).pid_tgid = bpf_get_current_pid_tgid();
            (*last).address = ctx.arg(0);
        }
    }
    0
}

/// Address of the fault the running thread is in, once. `None` where the hook is not attached.
#[inline(always)]
pub fn take_fault() -> Option<u64> {
    let last = LAST_FAULT.get_ptr_mut(0)?;
    unsafe {
        if (*last).pid_tgid == 0 || (*last).pid_tgid != bpf_get_current_pid_tgid() {
            return None;
        }
        (*last).pid_tgid = 0;
        Some((*last).address)
    }
}
