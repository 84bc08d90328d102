//! User page faults: remembers the address, for the growth that follows on the same thread.

use aya_ebpf::helpers::bpf_get_current_pid_tgid;
use aya_ebpf::macros::raw_tracepoint;
use aya_ebpf::programs::RawTracePointContext;

use memtrace_common::event::UNKNOWN;

use crate::maps::LAST_FAULT;

/// `page_fault_user(address, regs, error_code)`, before the fault is handled. x86 only.
#[raw_tracepoint(tracepoint = "page_fault_user")]
fn page_fault_user(ctx: RawTracePointContext) -> i32 {
    if let Some(last) = LAST_FAULT.get_ptr_mut(0) {
        let pid_tgid = bpf_get_current_pid_tgid();
        unsafe {
            (*last).count = if (*last).pid_tgid == pid_tgid { (*last).count + 1 } else { 1 };
            (*last).pid_tgid = pid_tgid;
            (*last).address = ctx.arg(0);
        }
    }
    0
}

/// Address of the running thread's last fault on this CPU and how many it took here since it was asked last;
/// ([`UNKNOWN`], 0) when another thread faulted here since, or where the hook is not attached.
#[inline(always)]
pub fn take_faults() -> (u64, u64) {
    let Some(last) = LAST_FAULT.get_ptr_mut(0) else { return (UNKNOWN, 0) };
    unsafe {
        if (*last).pid_tgid == 0 || (*last).pid_tgid != bpf_get_current_pid_tgid() {
            return (UNKNOWN, 0);
        }
        (*last).pid_tgid = 0;
        ((*last).address, (*last).count)
    }
}

/// Address of the running thread's last user fault on this CPU, [`UNKNOWN`] as in [`take_faults`]; leaves the count.
#[inline(always)]
pub fn last_fault() -> u64 {
    let Some(last) = LAST_FAULT.get_ptr_mut(0) else { return UNKNOWN };
    unsafe { if (*last).pid_tgid == bpf_get_current_pid_tgid() { (*last).address } else { UNKNOWN } }
}
