//! Charges to a memory cgroup: its usage, also where no process' resident memory moves (page cache,
//! sockets, the kernel's own).
//!
//! The kernel charges a page counter in batches (mm/page_counter.c `page_counter_try_charge`), so
//! this hook runs far less often than pages are touched.

use aya_ebpf::EbpfContext;
use aya_ebpf::bindings::BPF_ANY;
use aya_ebpf::macros::{fentry, kprobe};
use aya_ebpf::programs::{FEntryContext, ProbeContext};
use memtrace_common::control::Ring;
use memtrace_common::event::{CAUSE_CHARGE, Charge, UNKNOWN};

use super::rss;
use crate::emit::{boot_ns, emit};
use crate::kernel::{self, bytes, current, read};
use crate::maps::{CHARGED, ChargeState, PendingGrowth};
use crate::memory::value;
use crate::stack::{self, SampleSubject};
use crate::{arch, control, field, layout, set};

/// `page_counter_try_charge(counter, nr_pages, fail)` by fentry.
#[fentry(function = "page_counter_try_charge")]
fn charge_fentry(ctx: FEntryContext) -> i32 {
    charge(&ctx, ctx.arg(0), ctx.arg(1));
    0
}

/// `page_counter_try_charge(counter, nr_pages, fail)` by kprobe.
#[kprobe]
fn charge_kprobe(ctx: ProbeContext) -> u32 {
    charge(&ctx, ctx.arg(0).unwrap_or(0), ctx.arg(1).unwrap_or(0));
    0
}

/// `page_counter_uncharge(counter, nr_pages)` by fentry.
#[fentry(function = "page_counter_uncharge")]
fn uncharge_fentry(ctx: FEntryContext) -> i32 {
    uncharge(&ctx, ctx.arg(0));
    0
}

/// `page_counter_uncharge(counter, nr_pages)` by kprobe.
#[kprobe]
fn uncharge_kprobe(ctx: ProbeContext) -> u32 {
    uncharge(&ctx, ctx.arg(0).unwrap_or(0));
    0
}

/// A cgroup pays back. Without the rss hook this is when the address space of the thread that frees
/// is read again.
#[inline(always)]
fn uncharge(ctx: &impl EbpfContext, counter: u64) {
    let memcg = of_current(counter);
    if memcg == 0 {
        return;
    }
    if control!(rss_from_charges) == 1 {
        rss::scan(ctx);
    }
    let Some(known) = value(CHARGED.get_ptr_mut(counter)) else { return };
    moved(memcg, counter, &mut known.usage, 0);
}

/// Reports when the usage moved by the threshold since it was reported last. Both in pages.
#[inline(always)]
fn moved(memcg: u64, counter: u64, reported: &mut u64, pages: u64) {
    let usage: u64 = read(counter, layout!(counter_usage)).unwrap_or(0);
    let threshold = control!(rss_threshold_bytes) >> control!(page_shift);
    if usage.abs_diff(*reported) >= threshold {
        *reported = usage;
        report(memcg, pages);
    }
}

/// Reports the usage of the running thread's cgroup after a call that gave memory back. The rss
/// hook saw the pages go before the kernel uncharged them.
#[inline(always)]
pub fn given_back() {
    report(kernel::memcg_of(current()), 0);
}

/// The running thread's memory cgroup when this is the counter that the kernel compares with its
/// limit, else 0: counters of swap, kernel memory and hugetlb pass here too, and those of other
/// cgroups.
#[inline(always)]
fn of_current(counter: u64) -> u64 {
    let memcg = kernel::memcg_of(current());
    if memcg != 0 && memcg + layout!(memcg_memory) as u64 == counter { memcg } else { 0 }
}

/// Reports when the usage of the running thread's own cgroup moved by the threshold, and samples
/// who charges it.
#[inline(always)]
fn charge(ctx: &impl EbpfContext, counter: u64, pages: u64) {
    let memcg = of_current(counter);
    if memcg == 0 {
        return;
    }
    if control!(rss_from_charges) == 1 {
        rss::scan(ctx);
    }
    let Some(known) = value(CHARGED.get_ptr_mut(counter)) else {
        let usage: u64 = read(counter, layout!(counter_usage)).unwrap_or(0);
        let fresh = ChargeState { usage, charged: PendingGrowth::NOTHING };
        let _ = CHARGED.insert(counter, fresh, BPF_ANY as u64);
        report(memcg, pages);
        return;
    };
    // What a page fault of the program charges, the rss hook sees better.
    let regs = arch::user_registers();
    if arch::in_system_call(regs) {
        let pending = &raw mut known.charged;
        PendingGrowth::add(pending, pages as i64);
        let subject = SampleSubject {
            cause: CAUSE_CHARGE,
            mm_id: 0,
            cgroup_id: UNKNOWN,
            memcg,
            grown_bytes: 0,
            address: UNKNOWN,
            size_bytes: 0,
            shift: control!(page_shift),
        };
        stack::sample(ctx, regs, pending, &subject);
    }
    moved(memcg, counter, &mut known.usage, pages);
}

#[inline(always)]
fn report(memcg: u64, pages: u64) {
    emit::<Charge>(Ring::Samples, boot_ns(), |record| {
        kernel::read_task(current(), field!(record.task));
        kernel::read_memcg(memcg, field!(record.memcg));
        set!(record => { charge_bytes: bytes(pages) });
    });
}
