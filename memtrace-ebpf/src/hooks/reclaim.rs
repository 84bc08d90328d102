//! Reclaim on behalf of a memory cgroup (mm/vmscan.c `try_to_free_mem_cgroup_pages`): its limit or
//! memory.high was hit, and a kill may follow.

use aya_ebpf::bindings::BPF_ANY;
use aya_ebpf::helpers::bpf_get_current_pid_tgid;
use aya_ebpf::macros::raw_tracepoint;
use aya_ebpf::programs::RawTracePointContext;
use memtrace_common::control::{LossReason, Ring};
use memtrace_common::event::{RECLAIM_BEGIN, RECLAIM_END, Reclaim};

use crate::emit::{boot_ns, emit, lose};
use crate::kernel::{self, bytes, current};
use crate::maps::{RECLAIM_GATE, RECLAIMING, Reclaiming};
use crate::memory::{lookup, value};
use crate::{control, field, set};

/// Reclaims shorter than this end without a record, until those of a thread add up to it.
const MIN_REPORTED_NS: u64 = 1_000_000;
/// See [`reclaimed_lately`].
const LATELY_NS: u64 = 1_000_000_000;

/// `mm_vmscan_memcg_reclaim_begin`; its arguments changed order in 7.3 and are not read.
#[raw_tracepoint(tracepoint = "mm_vmscan_memcg_reclaim_begin")]
fn reclaim_begin(_ctx: RawTracePointContext) -> i32 {
    let now = boot_ns();
    let tid = bpf_get_current_pid_tgid() as u32;
    match RECLAIMING.get_ptr_mut(tid) {
        Some(reclaiming) => set!(reclaiming => { begin_ns: now }),
        None => {
            let first = Reclaiming { begin_ns: now, unreported_ns: 0, unreported_bytes: 0 };
            let _ = RECLAIMING.insert(tid, first, BPF_ANY as u64);
        }
    }
    let Some(gate) = value(RECLAIM_GATE.get_ptr_mut(0)) else { return 0 };
    if now.saturating_sub(gate.sent_ns) < control!(reclaim_interval_ns) {
        gate.suppressed += 1;
        lose(Ring::Samples, LossReason::RateLimited);
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
    let Some(reclaiming) = value(RECLAIMING.get_ptr_mut(tid)) else { return 0 };
    reclaiming.unreported_ns += now.saturating_sub(reclaiming.begin_ns);
    reclaiming.unreported_bytes += bytes(ctx.arg(0));
    if reclaiming.unreported_ns >= MIN_REPORTED_NS {
        send(now, RECLAIM_END, reclaiming.unreported_ns, reclaiming.unreported_bytes, 0);
        reclaiming.unreported_ns = 0;
        reclaiming.unreported_bytes = 0;
    }
    0
}

/// Whether the running thread has reclaimed for a memory cgroup within the last second. Between its
/// reclaim and the mark of a victim lies only the kernel's report, which a slow console can draw
/// out.
#[inline(always)]
pub fn reclaimed_lately(now: u64) -> bool {
    let tid = bpf_get_current_pid_tgid() as u32;
    match lookup(&RECLAIMING, tid) {
        Some(reclaiming) => now.saturating_sub(reclaiming.begin_ns) < LATELY_NS,
        None => false,
    }
}

#[inline(always)]
fn send(at_ns: u64, phase: u32, duration_ns: u64, reclaimed_bytes: u64, suppressed: u32) {
    emit::<Reclaim>(Ring::Samples, at_ns, |record| {
        kernel::read_task(current(), field!(record.task));
        kernel::read_memcg(kernel::memcg_of(current()), field!(record.memcg));
        set!(record => {
            duration_ns: duration_ns,
            reclaimed_bytes: reclaimed_bytes,
            phase: phase,
            suppressed: suppressed,
        });
    });
}
