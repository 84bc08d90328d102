//! Reclaim on behalf of a memory cgroup: its limit was hit, a kill may follow.

use aya_ebpf::bindings::BPF_ANY;
use aya_ebpf::helpers::bpf_get_current_pid_tgid;
use aya_ebpf::macros::raw_tracepoint;
use aya_ebpf::programs::RawTracePointContext;
use memtrace_common::control::{Loss, Ring};
use memtrace_common::event::{RECLAIM_BEGIN, RECLAIM_END, Reclaim};

use crate::control;
use crate::emit::{boot_ns, emit, lose};
use crate::kernel::{self, bytes, current};
use crate::maps::{RECLAIM_GATE, RECLAIMING, Reclaiming};

/// Reclaims shorter than this end without a record, until those of a thread add up to it.
const WORTH_TELLING_NS: u64 = 1_000_000;
/// See [`reclaimed_lately`].
const LATELY_NS: u64 = 1_000_000_000;

/// `mm_vmscan_memcg_reclaim_begin`; its arguments changed order in 7.3 and are not read.
#[raw_tracepoint(tracepoint = "mm_vmscan_memcg_reclaim_begin")]
fn reclaim_begin(_ctx: RawTracePointContext) -> i32 {
    let now = boot_ns();
    let tid = bpf_get_current_pid_tgid() as u32;
    match RECLAIMING.get_ptr_mut(tid) {
        Some(reclaiming) => unsafe { (*reclaiming).begin_ns = now },
        None => {
            let first = Reclaiming { begin_ns: now, untold_ns: 0, untold_bytes: 0 };
            let _ = RECLAIMING.insert(tid, first, BPF_ANY as u64);
        }
    }
    let Some(gate) = RECLAIM_GATE.get_ptr_mut(0) else { return 0 };
    let gate = unsafe { &mut *gate };
    if now.saturating_sub(gate.sent_ns) < control!(reclaim_interval_ns) {
        gate.suppressed += 1;
        lose(Ring::Samples, Loss::RateLimited);
        return 0;
    }
    gate.sent_ns = now;
    send(now, RECLAIM_BEGIN, 0, 0, gate.suppressed as u32);
    gate.suppressed = 0;
    0
}

/// `mm_vmscan_memcg_reclaim_end(nr_reclaimed, ...)`.
#[raw_tracepoint(tracepoint = "mm_vmscan_memcg_reclaim_end")]
fn reclaim_end(ctx: RawTracePointContext) -> i32 {
    let now = boot_ns();
    let tid = bpf_get_current_pid_tgid() as u32;
    // Kept: an OOM kill that follows asks for it. Threads that are gone age out.
    let Some(reclaiming) = RECLAIMING.get_ptr_mut(tid) else { return 0 };
    let reclaiming = unsafe { &mut *reclaiming };
    reclaiming.untold_ns += now.saturating_sub(reclaiming.begin_ns);
    reclaiming.untold_bytes += bytes(ctx.arg(0));
    if reclaiming.untold_ns >= WORTH_TELLING_NS {
        send(now, RECLAIM_END, reclaiming.untold_ns, reclaiming.untold_bytes, 0);
        reclaiming.untold_ns = 0;
        reclaiming.untold_bytes = 0;
    }
    0
}

/// Whether the running thread has reclaimed for a memory cgroup within the last second. Between that and the mark of a
/// victim lies no more than the kernel's own report, which a slow console can draw out.
#[inline(always)]
pub fn reclaimed_lately(now: u64) -> bool {
    let tid = bpf_get_current_pid_tgid() as u32;
    match unsafe { RECLAIMING.get(tid) } {
        Some(reclaiming) => now.saturating_sub(reclaiming.begin_ns) < LATELY_NS,
        None => false,
    }
}

#[inline(always)]
fn send(at_ns: u64, phase: u32, duration_ns: u64, reclaimed_bytes: u64, suppressed: u32) {
    emit::<Reclaim>(Ring::Samples, at_ns, |record| unsafe {
        kernel::read_task(current(), &raw mut (*record).task);
        kernel::read_memcg(kernel::memcg_of(current()), &raw mut (*record).memcg);
        (*record).duration_ns = duration_ns;
        (*record).reclaimed_bytes = reclaimed_bytes;
        (*record).phase = phase;
        (*record).suppressed = suppressed;
    });
}
