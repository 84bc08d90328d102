//! Resident memory: follows every address space and sends a record when it moved by its threshold.
//!
//! The kernel calls this hook for every page it counts, under the page-table lock. So: guard first,
//! read little, emit rarely. What is known of an address space is its record in `MMS`, whose life
//! is
//!
//! ```text
//!            fork, exec (hooks/task.rs)      first update seen here, or first charge
//!                         |                         |
//!  ( absent ) ------------+---------- follow -------+------> ( blank )
//!      ^                                                        |  threshold_pages == 0:
//!      |                                                        |  other CPUs leave it alone
//!      |                                                        |
//!      |                                                        |  every member read,
//!      |                                                        v  RSS_FIRST sent
//!      |     update, less than `recheck` since the         +----------+
//!      |     last reading: only counted  ------------------|          |
//!      |                                                   | followed |
//!      |     one member moved by `recheck`: it is read,    |          |
//!      |     its growth counted, a stack taken if due -----|          |
//!      |                                                   |          |
//!      |     sum moved by the threshold: all members read, |          |
//!      |     RSS_MOVED sent -------------------------------|          |
//!      |                                                   +----------+
//!      |                                                        |  mm->owner is 0 when the sum has
//!      |                                                        v  moved by the threshold
//!      |                                                   +----------+
//!      |     sum fell by a 16th of the peak, or to 0:      |  dying   |  RSS_DYING: nothing grows,
//!      |     RSS_MOVED sent -------------------------------|          |  the fall is only sketched
//!      |                                                   +----------+
//!      |                                                        |
//!      +------ end: MmGone sent <----- exit_mmap, or, where ----+
//!                                      that hook is off, the last page is gone
//! ```
//!
//! An exec replaces a process' address space: the old one ends, the new one begins blank.
//! `exit_mmap` ends a record from whatever state it is in.
//!
//! Three numbers of pages bound what is not known yet, each far below the one before: the threshold
//! (`rss_threshold_bytes`, or the cgroup's own), what makes a record; `recheck`, an eighth of it,
//! after which a member's counter is read exactly; and skips, at most 16 updates of one page that a
//! CPU lets pass without a look at the record ([`allow_skips`]).

use aya_ebpf::EbpfContext;
use aya_ebpf::bindings::BPF_ANY;
use aya_ebpf::macros::{btf_tracepoint, raw_tracepoint};
use aya_ebpf::programs::{BtfTracePointContext, RawTracePointContext};
use memtrace_common::control::{LossReason, Ring};
use memtrace_common::event::{
    CAUSE_TOUCH, MmGone, RSS_APPROXIMATE, RSS_DYING, RSS_FIRST, RSS_MOVED, RssChange, Task, UNKNOWN,
};

use crate::emit::{boot_ns, emit, lose};
use crate::kernel::{self, bytes, current, is_kthread, pointer, read};
use crate::maps::{
    BLANK, LAST_UPDATE, LastUpdate, MMS, MemberState, MmState, NOT_SEEN, PendingGrowth, RSS_THRESHOLDS, atomic_add,
};
use crate::memory::{load, lookup, store, value};
use crate::stack::{self, SampleSubject};
use crate::{arch, bpf_calls, control, fault, field, layout, set};

/// Most updates that a CPU skips in a row.
const MAX_SKIPS: u32 = 16;

/// `rss_stat(mm, member)`, with a third argument `count` before 6.2.
#[raw_tracepoint(tracepoint = "rss_stat")]
fn rss_stat(ctx: RawTracePointContext) -> i32 {
    let (mm, member) = (ctx.arg::<u64>(0), ctx.arg::<i32>(1) as u32);
    update(&ctx, mm, member, kernel::rss_approximate(mm, member))
}

/// The same by a typed pointer: what every update is looked at for is read without a helper call.
#[btf_tracepoint(function = "rss_stat")]
fn rss_stat_btf(ctx: BtfTracePointContext) -> i32 {
    let (mm, member) = (ctx.arg::<*const u8>(0), ctx.arg::<i32>(1) as u32);
    let approximate = kernel::rss_approximate_typed(mm, member);
    update(&ctx, mm as u64, member, approximate)
}

/// One counter of an address space was updated; `approximate` is its global part.
///
/// Between two exact readings the global part shows the large changes. The small ones, of one page
/// each, are bounded by the number of updates: a batch of them moves the global part
/// (lib/percpu_counter.c `percpu_counter_add_batch`).
#[inline(always)]
fn update(ctx: &impl EbpfContext, mm: u64, member: u32, approximate: i64) -> i32 {
    let Some(last) = value(LAST_UPDATE.get_ptr_mut(0)) else { return 0 };
    let Some(seen) = last.approximate.get_mut((member & 3) as usize) else { return 0 };
    // Most updates are of the address space that this CPU looked at last, and say nothing new. Only
    // anonymous memory is skipped: an update of another member can be the 16 pages around a fault.
    if last.mm == mm && *seen == approximate && last.skips_left != 0 && member == layout!(mm_anonpages) {
        last.skips_left -= 1;
        return 0;
    }
    let skipped = if last.mm == mm { last.skips_allowed - last.skips_left } else { 0 };
    if last.mm != mm {
        *last = LastUpdate { mm, approximate: [NOT_SEEN; 4], skips_left: 0, skips_allowed: 0 };
    }
    // A number from here on: the verifier allows no sums of a typed pointer.
    let mm = load(&raw const last.mm);
    let Some(state) = value(MMS.get_ptr_mut(mm)) else {
        return follow_unknown(mm);
    };
    if state.threshold_pages == 0 {
        return 0;
    }
    let Some(seen) = last.approximate.get_mut((member & 3) as usize) else { return 0 };
    *seen = approximate;
    allow_skips(last, state.threshold_pages);
    if let Some(anon) = state.members.get_mut((layout!(mm_anonpages) & 3) as usize) {
        anon.updates += skipped as i64;
    }
    // One masked index, and its pointer from there on: older verifiers lose a bound that was
    // checked on a copy.
    let Some(known) = state.members.get_mut((member & 3) as usize) else { return 0 };
    known.updates += 1;
    // Three members can each be this far behind: see `emit_if_moved` for what that leaves
    // unreported.
    let recheck = state.threshold_pages >> 3;
    // Without the exit_mmap hook an address space ends with its last page, once it has no owner.
    let ending = control!(exit_mmap) == 0 && approximate <= 0 && pointer(mm, layout!(mm_owner)) == 0;
    if !ending && known.updates < recheck && (approximate - known.approximate).abs() < recheck {
        return 0;
    }
    if ending {
        read_all(mm, member, state);
        if resident(state) == 0 {
            end(mm);
            return 0;
        }
    }
    let dying = state.flags & RSS_DYING as u64 != 0;
    let Some(known) = state.members.get_mut((member & 3) as usize) else { return 0 };
    read_one(mm, member, member, approximate, known);
    // Growth is counted at the member's own event only: before 6.2 a reading at another member's
    // event holds the running thread's cache, but no other thread's. What is torn down does not
    // grow again, so its falls need no second reading.
    let grown = if dying { 0 } else { count_growth(mm, member, member, known, recheck.max(2)) };
    if grown > 0 && member != layout!(mm_swapents) {
        atomic_add(&raw mut state.grown_pages, grown);
        sample_touch(ctx, mm, grown, state);
    }
    emit_if_moved(mm, member, state);
    0
}

/// Reads the running thread's address space because its cgroup is charged or pays back: for kernels
/// or runs without the rss hook. The page that is charged now is counted only afterwards, so a
/// record is behind by up to a batch of charges a CPU.
#[inline(always)]
pub fn scan(ctx: &impl EbpfContext) {
    let task = current();
    let mm = pointer(task, layout!(task_mm));
    if mm == 0 || is_kthread(task) {
        return;
    }
    let Some(state) = value(MMS.get_ptr_mut(mm)) else {
        follow(mm, task, false);
        return;
    };
    if state.threshold_pages == 0 {
        return;
    }
    read_all(mm, kernel::NOT_REPORTED, state);
    let fall = (state.threshold_pages >> 3).max(2);
    let mut grown = 0;
    for (member, known) in state.members.iter_mut().enumerate() {
        let member = member as u32;
        let more = count_growth(mm, member, kernel::NOT_REPORTED, known, fall);
        if more > 0 && member != layout!(mm_swapents) {
            grown += more;
        }
    }
    if grown > 0 {
        atomic_add(&raw mut state.grown_pages, grown);
        sample_touch(ctx, mm, grown, state);
    }
    emit_if_moved(mm, kernel::NOT_REPORTED, state);
}

/// Pages by which a member has grown since its growth was last counted; below 0 when it fell. A
/// fall is taken over when it is `fall` pages at least.
#[inline(always)]
fn count_growth(mm: u64, member: u32, reported: u32, known: &mut MemberState, fall: i64) -> i64 {
    // What looks like a fall may be a reading that another CPU has overtaken since. If it were
    // taken over, the pages that come back would count as growth. So it is believed when a second
    // reading says so too.
    let counted = &raw mut known.counted;
    let mut exact = known.exact;
    if exact <= load(counted) - fall {
        exact = kernel::rss_pages(mm, member, reported);
    }
    // Nothing between the reading and the writing, where another CPU could write too.
    let grown = exact - load(counted);
    if grown > 0 || grown <= -fall {
        store(counted, exact);
    }
    grown
}

/// Sends a record when the sum has moved enough since the last one.
#[inline(always)]
fn emit_if_moved(mm: u64, reported: u32, state: &mut MmState) {
    let recheck = state.threshold_pages >> 3;
    let sum = resident(state);
    // A new peak is sent in steps of half the threshold. Everything else when it moved by the
    // threshold less what three members may be behind, so that what is recorded is never off by
    // more than it.
    let mut threshold = state.threshold_pages - 3 * recheck;
    if sum > state.peak_pages {
        state.peak_pages = sum;
        threshold = state.threshold_pages >> 1;
    }
    let swap = member_pages(state, layout!(mm_swapents));
    let moved = (sum - state.sent_pages).abs() + (swap - state.sent_swap_pages).abs();
    if moved < threshold {
        return;
    }
    if state.flags & RSS_DYING as u64 == 0 && pointer(mm, layout!(mm_owner)) == 0 {
        state.flags |= RSS_DYING as u64;
    }
    // The fall of an address space that is torn down is only sketched.
    if state.flags & RSS_DYING as u64 != 0 && sum != 0 && moved < state.peak_pages >> 4 {
        return;
    }
    // A reading costs a look at every CPU, and most of the time only one member moves. Before 6.2
    // threads keep pages to themselves that no update shows, so everything is read.
    let moved_since = state.members.iter().fold(0, |all, known| all | known.updates);
    if layout!(rss_is_percpu) == 0 || moved_since != 0 {
        read_all(mm, reported, state);
    }
    emit_change(mm, state, RSS_MOVED, boot_ns());
}

/// Allows this CPU to skip its next few updates: with `recheck` far less than the threshold, and a
/// random number of them, which no loop of a program can keep in step with.
#[inline(always)]
fn allow_skips(last: &mut LastUpdate, threshold_pages: i64) {
    // All CPUs together skip half the threshold on average: on a large machine only large processes
    // have anything to skip.
    let share = (threshold_pages as u32 >> 1).checked_div(control!(cpus)).unwrap_or(0);
    let most = (threshold_pages as u32 >> 3).min(MAX_SKIPS).min(share);
    // Without the exit_mmap hook the last page of an address space ends it, and must not be
    // skipped.
    let skips = if most < 2 || control!(exit_mmap) == 0 { 0 } else { (most >> 1) + bpf_calls::random() % most };
    last.skips_left = skips;
    last.skips_allowed = skips;
}

/// Takes a stack when the process itself has touched enough since the last one. Pages that others
/// count for it (reclaim, a debugger, khugepaged) have no stack of the process to show.
#[inline(always)]
fn sample_touch(ctx: &impl EbpfContext, mm: u64, pages: i64, state: &mut MmState) {
    let task = current();
    if pointer(task, layout!(task_mm)) != mm || is_kthread(task) {
        return;
    }
    let pending = &raw mut state.touched;
    PendingGrowth::add(pending, pages);
    if !stack::due(pending) {
        return;
    }
    let regs = arch::user_registers();
    let subject = SampleSubject {
        cause: CAUSE_TOUCH,
        mm_id: mm ^ control!(mm_salt),
        cgroup_id: state.cgroup_id,
        memcg: 0,
        grown_bytes: grown_bytes(state),
        // A system call that faults on the program's memory has no vm_fault next to the user
        // registers.
        address: if arch::in_system_call(regs) { UNKNOWN } else { fault::fault_address(mm) },
        size_bytes: 0,
        shift: control!(page_shift),
    };
    stack::sample(ctx, regs, pending, &subject);
}

/// A page was counted for an address space that is not followed yet: follows it when its owner is
/// known.
#[inline(always)]
fn follow_unknown(mm: u64) -> i32 {
    let task = current();
    if pointer(task, layout!(task_mm)) == mm && !is_kthread(task) {
        follow(mm, task, false);
        return 0;
    }
    let owner = pointer(mm, layout!(mm_owner));
    if owner != 0 && pointer(owner, layout!(task_mm)) == mm {
        follow(mm, owner, false);
    }
    // Else fork or exec is building it, whose hooks follow it when it is ready; or it is torn down
    // and was never seen to change, so nothing grows there.
    0
}

/// Reads the identity of a task's process: its first thread has the process' own name.
#[inline(always)]
fn read_leader(task: u64, into: &mut Task) {
    let leader = pointer(task, layout!(task_group_leader));
    kernel::read_task(if leader == 0 { task } else { leader }, into);
}

/// Starts to follow the address space of `task` and reports what it holds. What a `new` one holds
/// has just grown, and counts as growth.
#[inline(always)]
pub fn follow(mm: u64, task: u64, new: bool) {
    // From a map that is never written: it is too large for a program's stack, and a per-CPU
    // scratch could be taken over by another task in between. Until the threshold is set, other
    // CPUs leave it alone.
    let Some(blank) = BLANK.get(0) else { return };
    if MMS.insert(mm, blank, BPF_ANY as u64).is_err() {
        lose(Ring::Samples, LossReason::TableFull);
        return;
    }
    let Some(state) = value(MMS.get_ptr_mut(mm)) else { return };
    state.cgroup_id = UNKNOWN;
    state.brk = read(mm, layout!(mm_brk)).unwrap_or(0);
    read_leader(task, &mut state.task);
    state.threshold_pages = (control!(rss_threshold_bytes) >> control!(page_shift)) as i64;
    read_all(mm, kernel::NOT_REPORTED, state);
    for known in &mut state.members {
        known.counted = known.exact;
    }
    state.peak_pages = resident(state);
    if new {
        state.grown_pages = state.peak_pages;
    }
    emit_change(mm, state, RSS_FIRST, boot_ns());
}

/// Reads one member exactly into the record; `reported` as for [`kernel::rss_pages`].
#[inline(always)]
fn read_one(mm: u64, member: u32, reported: u32, approximate: i64, known: &mut MemberState) {
    known.exact = kernel::rss_pages(mm, member, reported);
    known.approximate = approximate;
    known.updates = 0;
}

/// Reads all members exactly into the record; `reported` as for [`kernel::rss_pages`].
#[inline(always)]
fn read_all(mm: u64, reported: u32, state: &mut MmState) {
    let (exact, approximate) = kernel::all_rss_pages(mm, reported);
    for (member, known) in state.members.iter_mut().enumerate() {
        (known.exact, known.approximate, known.updates) = (exact[member], approximate[member], 0);
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

/// Every rise of resident memory so far, added up.
#[inline(always)]
fn grown_bytes(state: &MmState) -> u64 {
    bytes(load(&raw const state.grown_pages) as u64)
}

/// anon + file + shmem, pages.
#[inline(always)]
fn resident(state: &MmState) -> i64 {
    member_pages(state, layout!(mm_anonpages))
        + member_pages(state, layout!(mm_filepages))
        + member_pages(state, layout!(mm_shmempages))
}

/// Pages that make a record: the cgroup's own threshold, else the one for all. For a large process
/// a 256th of what it holds, within one and four times that threshold.
#[inline(always)]
fn threshold_pages(cgroup_id: u64, resident_pages: i64) -> i64 {
    let own = lookup(&RSS_THRESHOLDS, cgroup_id);
    if let Some(own) = own {
        return ((own >> control!(page_shift)) as i64).max(4);
    }
    let threshold = ((control!(rss_threshold_bytes) >> control!(page_shift)) as i64).max(4);
    (resident_pages >> 8).clamp(threshold, threshold << 2)
}

/// Sends what is known as an `RssChange`, and remembers what was sent.
#[inline(always)]
fn emit_change(mm: u64, state: &mut MmState, reason: u32, at_ns: u64) {
    let owner = pointer(mm, layout!(mm_owner));
    // A process that shares an address space can outlive its first owner.
    if owner != 0
        && kernel::read_u32(owner, layout!(task_tgid)) != state.task.tgid
        && pointer(owner, layout!(task_mm)) == mm
    {
        read_leader(owner, &mut state.task);
    }
    let memcg = kernel::memcg_of(owner);
    if owner != 0 && memcg == 0 {
        lose(Ring::Samples, LossReason::Unreadable);
    }
    if memcg != 0 {
        let id = kernel::memcg_id(memcg);
        if id != state.cgroup_id {
            state.cgroup_id = id;
        }
        state.threshold_pages = threshold_pages(id, resident(state));
    }
    emit::<RssChange>(Ring::Samples, at_ns, |record| {
        kernel::copy_task(&state.task, field!(record.task));
        set!(record => { mm_id: mm ^ control!(mm_salt) });
        kernel::read_known_memcg(memcg, state.cgroup_id, field!(record.memcg));
        set!(record => {
            rss.anon_bytes: bytes(member_pages(state, layout!(mm_anonpages)) as u64),
            rss.file_bytes: bytes(member_pages(state, layout!(mm_filepages)) as u64),
            rss.shmem_bytes: bytes(member_pages(state, layout!(mm_shmempages)) as u64),
            rss.swap_bytes: bytes(member_pages(state, layout!(mm_swapents)) as u64),
            peak_bytes: bytes(state.peak_pages as u64),
            virtual_bytes: bytes(read(mm, layout!(mm_total_vm)).unwrap_or(UNKNOWN)),
            reason: reason,
            flags: state.flags as u32 | if kernel::rss_is_exact() { 0 } else { RSS_APPROXIMATE },
            grown_bytes: grown_bytes(state),
        });
    });
    // Also when the ring was full: the loss is counted, and the next record has the sum anyway.
    let sum = resident(state);
    if sum < state.sent_pages {
        state.fall_reported = 1;
    }
    state.sent_pages = sum;
    state.sent_swap_pages = member_pages(state, layout!(mm_swapents));
}

/// `exit_mmap(mm)` (mm/mmap.c): the address space is gone.
#[raw_tracepoint(tracepoint = "exit_mmap")]
fn exit_mmap(ctx: RawTracePointContext) -> i32 {
    end(ctx.arg(0));
    0
}

/// Stops following an address space and reports its peak.
#[inline(always)]
fn end(mm: u64) {
    let Some(state) = value(MMS.get_ptr_mut(mm)) else { return };
    // The kernel keeps its own high-water mark, approximate where the counters are.
    let high_water = read::<u64>(mm, layout!(mm_hiwater_rss)).unwrap_or(0);
    let peak = if kernel::rss_is_exact() { state.peak_pages as u64 } else { high_water.max(state.peak_pages as u64) };
    emit::<MmGone>(Ring::Ledger, boot_ns(), |record| {
        kernel::copy_task(&state.task, field!(record.task));
        set!(record => {
            mm_id: mm ^ control!(mm_salt),
            cgroup_id: state.cgroup_id,
            peak_bytes: bytes(peak),
            grown_bytes: grown_bytes(state),
        });
    });
    let _ = MMS.remove(mm);
}
