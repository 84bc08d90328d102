//! Resident memory: follows every address space, emits when it moved by a quantum.
//!
//! Runs under the page-table lock for every page: guard first, read little, emit rarely.

use aya_ebpf::bindings::BPF_ANY;
use aya_ebpf::macros::raw_tracepoint;
use aya_ebpf::programs::RawTracePointContext;
use memtrace_common::control::{Loss, Ring};
use memtrace_common::event::{MmGone, RSS_APPROXIMATE, RSS_DYING, RSS_FIRST, RSS_QUANTUM, RssChange, Task, UNKNOWN};

use super::fault::take_faults;
use crate::emit::{boot_ns, emit, lose};
use crate::kernel::{self, bytes, current, is_kthread, pointer, read};
use crate::maps::{MMS, MemberState, MmState, QUANTA};
use crate::{control, layout};

/// `rss_stat(mm, member)`, with a third argument `count` before 6.2.
#[raw_tracepoint(tracepoint = "rss_stat")]
fn rss_stat(ctx: RawTracePointContext) -> i32 {
    let mm: u64 = ctx.arg(0);
    let member: u32 = ctx.arg::<i32>(1) as u32;
    let Some(state) = MMS.get_ptr_mut(mm) else {
        return first_sight(mm);
    };
    let state = unsafe { &mut *state };
    // Between two exact readings the counter's global part tells of big steps, the number of
    // updates bounds the small ones (one page each; a batch moves the global part).
    let approximate = kernel::rss_approximate(mm, member);
    // One masked look-up, and its pointer from there on: older verifiers lose a bound that was checked on a copy.
    let Some(known) = state.members.get_mut((member & 3) as usize) else { return 0 };
    known.updates += 1;
    // Three members can each be a step behind: with the threshold below less than a quantum stays untold.
    let step = state.quantum_pages >> 3;
    // Without the exit_mmap hook the last page of an address space nobody owns tells its end.
    let ending = control!(exit_mmap) == 0 && approximate <= 0 && pointer(mm, layout!(mm_owner)) == 0;
    if !ending && known.updates < step && (approximate - known.approximate).abs() < step {
        return 0;
    }
    if ending {
        read_all(mm, member, state);
        if resident(state) == 0 {
            forget(mm);
            return 0;
        }
    }
    let Some(known) = state.members.get_mut((member & 3) as usize) else { return 0 };
    read_one(mm, member, member, approximate, known);

    let sum = resident(state);
    // A new peak is told in steps of half a quantum, everything else when it moved by one, less what the guard above
    // may have let pass: what is recorded is never off by more than a quantum.
    let mut threshold = state.quantum_pages - 3 * step;
    if sum > state.peak_pages {
        state.peak_pages = sum;
        threshold = state.quantum_pages >> 1;
    }
    let swap = member_pages(state, layout!(mm_swapents));
    let moved = (sum - state.sent_pages).abs() + (swap - state.sent_swap_pages).abs();
    if moved < threshold {
        return 0;
    }
    if state.flags & RSS_DYING as u64 == 0 && pointer(mm, layout!(mm_owner)) == 0 {
        state.flags |= RSS_DYING as u64;
    }
    // An address space that is torn down only sketches its fall.
    if state.flags & RSS_DYING as u64 != 0 && sum != 0 && moved < state.peak_pages >> 4 {
        return 0;
    }
    read_all(mm, member, state);
    emit_change(mm, state, RSS_QUANTUM, boot_ns());
    0
}

/// A page counted for an address space that is not followed yet.
#[inline(always)]
fn first_sight(mm: u64) -> i32 {
    let task = current();
    if pointer(task, layout!(task_mm)) == mm && !is_kthread(task) {
        follow(mm, task);
        return 0;
    }
    let owner = pointer(mm, layout!(mm_owner));
    if owner != 0 && pointer(owner, layout!(task_mm)) == mm {
        follow(mm, owner);
    }
    // Else it is being built by fork or exec, whose hooks follow it when it is ready, or it is torn down and
    // was never seen to change: nothing grows there.
    0
}

/// The process of a task by its first thread, whose name is the process' own.
#[inline(always)]
fn read_leader(task: u64, into: &mut Task) {
    let leader = pointer(task, layout!(task_group_leader));
    kernel::read_task(if leader == 0 { task } else { leader }, into);
}

/// Starts to follow an address space owned by `task` and reports what it holds.
#[inline(always)]
pub fn follow(mm: u64, task: u64) {
    // On the stack: a per-CPU scratch could be taken over by another task between two reads.
    let mut fresh = MmState {
        task: Task { tgid: 0, tid: 0, start_boot_ns: UNKNOWN, comm: [0; 16] },
        cgroup_id: UNKNOWN,
        members: [MemberState { exact: 0, approximate: 0, updates: 0 }; 4],
        sent_pages: 0,
        sent_swap_pages: 0,
        peak_pages: 0,
        quantum_pages: (control!(quantum_bytes) >> control!(page_shift)) as i64,
        mapped_bytes: 0,
        unmapped_bytes: 0,
        mapping_ns: 0,
        brk: read(mm, layout!(mm_brk)).unwrap_or(0),
        flags: 0,
    };
    read_leader(task, &mut fresh.task);
    if MMS.insert(mm, &fresh, BPF_ANY as u64).is_err() {
        lose(Ring::Samples, Loss::TableFull);
        return;
    }
    let Some(state) = MMS.get_ptr_mut(mm) else { return };
    let state = unsafe { &mut *state };
    read_all(mm, kernel::NOT_REPORTED, state);
    state.peak_pages = resident(state);
    emit_change(mm, state, RSS_FIRST, boot_ns());
}

/// Reads one member exactly into the state; `reported` as for [`kernel::rss_pages`].
#[inline(always)]
fn read_one(mm: u64, member: u32, reported: u32, approximate: i64, known: &mut MemberState) {
    known.exact = kernel::rss_pages(mm, member, reported);
    known.approximate = approximate;
    known.updates = 0;
}

/// Reads all members exactly into the state.
#[inline(always)]
fn read_all(mm: u64, reported: u32, state: &mut MmState) {
    for (member, known) in state.members.iter_mut().enumerate() {
        let member = member as u32;
        read_one(mm, member, reported, kernel::rss_approximate(mm, member), known);
    }
    let sum = resident(state);
    if sum > state.peak_pages {
        state.peak_pages = sum;
    }
}

/// Pages of one member as last read; a member the kernel cannot have is 0.
#[inline(always)]
fn member_pages(state: &MmState, member: u32) -> i64 {
    // A racing reader of the slots can see one below zero.
    state.members.get((member & 3) as usize).map_or(0, |known| known.exact.max(0))
}

/// anon + file + shmem, pages.
#[inline(always)]
fn resident(state: &MmState) -> i64 {
    member_pages(state, layout!(mm_anonpages))
        + member_pages(state, layout!(mm_filepages))
        + member_pages(state, layout!(mm_shmempages))
}

/// Sends the state as a record and remembers what was sent.
#[inline(always)]
fn emit_change(mm: u64, state: &mut MmState, reason: u32, at_ns: u64) {
    let (fault_address, faults) = take_faults();
    let owner = pointer(mm, layout!(mm_owner));
    // Who shares an address space can outlive its first owner.
    if owner != 0
        && kernel::read_u32(owner, layout!(task_tgid)) != state.task.tgid
        && pointer(owner, layout!(task_mm)) == mm
    {
        read_leader(owner, &mut state.task);
    }
    let memcg = kernel::memcg_of(owner);
    if owner != 0 && memcg == 0 {
        lose(Ring::Samples, Loss::Unreadable);
    }
    if memcg != 0 {
        let id = kernel::memcg_id(memcg);
        if id != state.cgroup_id {
            state.cgroup_id = id;
        }
        let own = unsafe { QUANTA.get(id) };
        let quantum = own.copied().unwrap_or(control!(quantum_bytes)) >> control!(page_shift);
        state.quantum_pages = (quantum as i64).max(4);
    }
    emit::<RssChange>(Ring::Samples, at_ns, |record| unsafe {
        (*record).task = state.task;
        (*record).mm_id = mm ^ control!(mm_salt);
        kernel::read_memcg(memcg, &raw mut (*record).memcg);
        if memcg == 0 {
            (*record).memcg.cgroup_id = state.cgroup_id;
        }
        (*record).rss.anon_bytes = bytes(member_pages(state, layout!(mm_anonpages)) as u64);
        (*record).rss.file_bytes = bytes(member_pages(state, layout!(mm_filepages)) as u64);
        (*record).rss.shmem_bytes = bytes(member_pages(state, layout!(mm_shmempages)) as u64);
        (*record).rss.swap_bytes = bytes(member_pages(state, layout!(mm_swapents)) as u64);
        (*record).peak_bytes = bytes(state.peak_pages as u64);
        (*record).virtual_bytes = bytes(read(mm, layout!(mm_total_vm)).unwrap_or(UNKNOWN));
        (*record).faults = faults;
        (*record).fault_address = fault_address;
        (*record).reason = reason;
        (*record).flags = state.flags as u32 | if kernel::rss_is_exact() { 0 } else { RSS_APPROXIMATE };
    });
    // Also when the ring was full: the loss is counted, and the next quantum tells the sum anyway.
    state.sent_pages = resident(state);
    state.sent_swap_pages = member_pages(state, layout!(mm_swapents));
}

/// `exit_mmap(mm)`: the address space is gone.
#[raw_tracepoint(tracepoint = "exit_mmap")]
fn exit_mmap(ctx: RawTracePointContext) -> i32 {
    forget(ctx.arg(0));
    0
}

/// Stops following an address space and reports its peak.
#[inline(always)]
fn forget(mm: u64) {
    let Some(state) = MMS.get_ptr_mut(mm) else { return };
    let state = unsafe { &*state };
    // The kernel keeps its own high-water mark, approximate where the counters are.
    let high_water = read::<u64>(mm, layout!(mm_hiwater_rss)).unwrap_or(0);
    let peak = if kernel::rss_is_exact() { state.peak_pages as u64 } else { high_water.max(state.peak_pages as u64) };
    emit::<MmGone>(Ring::Ledger, boot_ns(), |record| unsafe {
        (*record).task = state.task;
        (*record).mm_id = mm ^ control!(mm_salt);
        (*record).cgroup_id = state.cgroup_id;
        (*record).peak_bytes = bytes(peak);
        (*record).reserved = 0;
    });
    let _ = MMS.remove(mm);
}
