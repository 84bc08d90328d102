//! Charges to a memory cgroup, in batches: usage at a resolution RSS alone does not give.

use aya_ebpf::EbpfContext;
use aya_ebpf::bindings::BPF_ANY;
use aya_ebpf::macros::{fentry, kprobe};
use aya_ebpf::programs::{FEntryContext, ProbeContext};
use memtrace_common::control::Ring;
use memtrace_common::event::{CAUSE_CHARGE, Charge, UNKNOWN};

use super::rss;
use crate::emit::{boot_ns, emit};
use crate::kernel::{self, bytes, current, read};
use crate::maps::{CHARGED, Charges, Pending};
use crate::stack::{self, Growth};
use crate::{control, layout};

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

/// A cgroup pays back. Where charges tell of address spaces, the one of who frees has become smaller.
#[inline(always)]
fn uncharge(ctx: &impl EbpfContext, counter: u64) {
    let memcg = of_current(counter);
    if memcg == 0 {
        return;
    }
    if control!(charges_tell) == 1 {
        rss::look(ctx);
    }
    let Some(known) = CHARGED.get_ptr_mut(counter) else { return };
    moved(memcg, counter, unsafe { &mut (*known).usage }, 0);
}

/// Reports when the usage moved by a quantum since it was told last.
#[inline(always)]
fn moved(memcg: u64, counter: u64, told: &mut u64, pages: u64) {
    let usage: u64 = read(counter, layout!(counter_usage)).unwrap_or(0);
    let quantum = control!(quantum_bytes) >> control!(page_shift);
    if usage.abs_diff(*told) >= quantum {
        *told = usage;
        report(memcg, pages);
    }
}

/// Reports the usage of the running thread's cgroup after a call that gave memory back: what resident memory said came
/// before the kernel paid back.
#[inline(always)]
pub fn given_back() {
    report(kernel::memcg_of(current()), 0);
}

/// The running thread's memory cgroup when this is the counter that is compared with its limit, else 0: swap,
/// kernel-memory and hugetlb counters pass here too, and those of others.
#[inline(always)]
fn of_current(counter: u64) -> u64 {
    let memcg = kernel::memcg_of(current());
    if memcg != 0 && memcg + layout!(memcg_memory) as u64 == counter { memcg } else { 0 }
}

/// Reports when the usage of the running thread's own cgroup moved by a quantum, and who charges it.
#[inline(always)]
fn charge(ctx: &impl EbpfContext, counter: u64, pages: u64) {
    let memcg = of_current(counter);
    if memcg == 0 {
        return;
    }
    if control!(charges_tell) == 1 {
        rss::look(ctx);
    }
    let Some(known) = CHARGED.get_ptr_mut(counter) else {
        let usage: u64 = read(counter, layout!(counter_usage)).unwrap_or(0);
        let fresh = Charges { usage, charged: Pending::NOTHING };
        let _ = CHARGED.insert(counter, fresh, BPF_ANY as u64);
        report(memcg, pages);
        return;
    };
    let known = unsafe { &mut *known };
    // What a page fault of the program charges, the rss hook sees better.
    let regs = stack::user_registers();
    if stack::in_system_call(regs) {
        let pending = &raw mut known.charged;
        Pending::add(pending, pages as i64);
        let growth = Growth {
            cause: CAUSE_CHARGE,
            mm_id: 0,
            cgroup_id: UNKNOWN,
            memcg,
            grown_bytes: 0,
            address: UNKNOWN,
            size_bytes: 0,
            shift: control!(page_shift),
        };
        stack::sample(ctx, regs, pending, &growth);
    }
    moved(memcg, counter, &mut known.usage, pages);
}

#[inline(always)]
fn report(memcg: u64, pages: u64) {
    emit::<Charge>(Ring::Samples, boot_ns(), |record| unsafe {
        kernel::read_task(current(), &raw mut (*record).task);
        kernel::read_memcg(memcg, &raw mut (*record).memcg);
        (*record).charge_bytes = bytes(pages);
    });
}
