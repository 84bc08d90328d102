//! Resident memory: follows every address space, emits when it moved by a quantum.
//!
//! Runs under the page-table lock for every page: guard first, read little, emit rarely.

use core::ptr::{read_volatile, write_volatile};

use aya_ebpf::EbpfContext;
use aya_ebpf::bindings::BPF_ANY;
use aya_ebpf::helpers::generated::bpf_get_prandom_u32;
use aya_ebpf::macros::{btf_tracepoint, raw_tracepoint};
use aya_ebpf::programs::{BtfTracePointContext, RawTracePointContext};
use memtrace_common::control::{Loss, Ring};
use memtrace_common::event::{
    CAUSE_TOUCH, MmGone, RSS_APPROXIMATE, RSS_DYING, RSS_FIRST, RSS_QUANTUM, RssChange, Task, UNKNOWN,
};

use crate::emit::{boot_ns, emit, lose};
use crate::kernel::{self, bytes, current, is_kthread, pointer, read};
use crate::maps::{BLANK, MMS, MemberState, MmState, NOT_SEEN, Pending, QUANTA, SEEN, Seen, atomic_add};
use crate::stack::{self, Growth};
use crate::{control, fault, layout};

/// Most updates of one CPU that are let go of in a row.
const MOST_LEFT: u32 = 16;

/// `rss_stat(mm, member)`, with a third argument `count` before 6.2.
#[raw_tracepoint(tracepoint = "rss_stat")]
fn rss_stat(ctx: RawTracePointContext) -> i32 {
    let (mm, member) = (ctx.arg::<u64>(0), ctx.arg::<i32>(1) as u32);
    update(&ctx, mm, member, kernel::rss_approximate(mm, member))
}

/// The same, by types: what every update is looked at for is read without a call.
#[btf_tracepoint(function = "rss_stat")]
fn rss_stat_btf(ctx: BtfTracePointContext) -> i32 {
    let (mm, member) = (ctx.arg::<*const u8>(0), ctx.arg::<i32>(1) as u32);
    let approximate = kernel::rss_approximate_typed(mm, member);
    update(&ctx, mm as u64, member, approximate)
}

/// A counter was updated.
#[inline(always)]
fn update(ctx: &impl EbpfContext, mm: u64, member: u32, approximate: i64) -> i32 {
    // Between two exact readings the counter's global part tells of big steps, the number of updates bounds the small ones
    // (one page each; a batch moves the global part). Most are of the address space this CPU looked at last, and say
    // nothing new.
    let Some(seen) = SEEN.get_ptr_mut(0) else { return 0 };
    let seen = unsafe { &mut *seen };
    let Some(known) = seen.approximate.get_mut((member & 3) as usize) else { return 0 };
    // Of anonymous memory alone: an update of the others can be the 16 pages around a fault.
    if seen.mm == mm && *known == approximate && seen.left != 0 && member == layout!(mm_anonpages) {
        seen.left -= 1;
        return 0;
    }
    let let_go = if seen.mm == mm { seen.granted - seen.left } else { 0 };
    if seen.mm != mm {
        *seen = Seen { mm, approximate: [NOT_SEEN; 4], left: 0, granted: 0 };
    }
    // A number from here on: of a typed pointer the verifier allows no sums.
    let mm = unsafe { read_volatile(&raw const seen.mm) };
    let Some(state) = MMS.get_ptr_mut(mm) else {
        return first_sight(mm);
    };
    let state = unsafe { &mut *state };
    if state.quantum_pages == 0 {
        return 0;
    }
    let Some(known) = seen.approximate.get_mut((member & 3) as usize) else { return 0 };
    *known = approximate;
    grant(seen, state.quantum_pages);
    if let Some(anon) = state.members.get_mut((layout!(mm_anonpages) & 3) as usize) {
        anon.updates += let_go as i64;
    }
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
    let dying = state.flags & RSS_DYING as u64 != 0;
    let Some(known) = state.members.get_mut((member & 3) as usize) else { return 0 };
    read_one(mm, member, member, approximate, known);
    // Only at its own event: before 6.2 a reading at another member's event holds the running thread's cache, and no
    // other's. What is torn down does not grow again: its falls need no second reading.
    let grown = if dying { 0 } else { count(mm, member, member, known, step.max(2)) };
    if grown > 0 && member != layout!(mm_swapents) {
        atomic_add(&raw mut state.grown_pages, grown);
        touched(ctx, mm, grown, state);
    }
    tell(mm, member, state);
    0
}

/// Looks at the running thread's address space because its cgroup is charged, or pays back: where no hook tells of each
/// update. What is charged now is counted only afterwards: what is told is behind by up to a batch of charges a CPU.
#[inline(always)]
pub fn look(ctx: &impl EbpfContext) {
    let task = current();
    let mm = pointer(task, layout!(task_mm));
    if mm == 0 || is_kthread(task) {
        return;
    }
    let Some(state) = MMS.get_ptr_mut(mm) else {
        follow(mm, task, false);
        return;
    };
    let state = unsafe { &mut *state };
    if state.quantum_pages == 0 {
        return;
    }
    read_all(mm, kernel::NOT_REPORTED, state);
    let fall = (state.quantum_pages >> 3).max(2);
    let mut grown = 0;
    for (member, known) in state.members.iter_mut().enumerate() {
        let member = member as u32;
        let more = count(mm, member, kernel::NOT_REPORTED, known, fall);
        if more > 0 && member != layout!(mm_swapents) {
            grown += more;
        }
    }
    if grown > 0 {
        atomic_add(&raw mut state.grown_pages, grown);
        touched(ctx, mm, grown, state);
    }
    tell(mm, kernel::NOT_REPORTED, state);
}

/// Pages by which a member has grown since growth was counted last, or fallen, by so many at least.
#[inline(always)]
fn count(mm: u64, member: u32, reported: u32, known: &mut MemberState, fall: i64) -> i64 {
    // What looks like a fall may be a reading that another CPU has overtaken since: only a second one is believed, or what
    // comes back would be growth.
    let counted = &raw mut known.counted;
    let mut exact = known.exact;
    if exact <= unsafe { read_volatile(counted) } - fall {
        exact = kernel::rss_pages(mm, member, reported);
    }
    // Nothing between the reading and the writing, where another CPU could write too.
    let grown = exact - unsafe { read_volatile(counted) };
    if grown > 0 || grown <= -fall {
        unsafe { write_volatile(counted, exact) };
    }
    grown
}

/// Sends a record when the sum has moved enough since the last one.
#[inline(always)]
fn tell(mm: u64, reported: u32, state: &mut MmState) {
    let step = state.quantum_pages >> 3;
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
        return;
    }
    if state.flags & RSS_DYING as u64 == 0 && pointer(mm, layout!(mm_owner)) == 0 {
        state.flags |= RSS_DYING as u64;
    }
    // An address space that is torn down only sketches its fall.
    if state.flags & RSS_DYING as u64 != 0 && sum != 0 && moved < state.peak_pages >> 4 {
        return;
    }
    // On a machine of many CPUs every reading is dear, and most of the time only one member moves. Before 6.2 threads keep
    // some to themselves, of which no update tells.
    let moved_since = state.members.iter().fold(0, |all, known| all | known.updates);
    if layout!(rss_is_percpu) == 0 || moved_since != 0 {
        read_all(mm, reported, state);
    }
    emit_change(mm, state, RSS_QUANTUM, boot_ns());
}

/// Lets go of the next few updates of this CPU: together with the step below far less than a quantum, and a number that
/// no loop of the program can keep in step with.
#[inline(always)]
fn grant(seen: &mut Seen, quantum_pages: i64) {
    // All CPUs together let go of half a quantum on average: on a large machine only large processes have any to let go of.
    let share = (quantum_pages as u32 >> 1).checked_div(control!(cpus)).unwrap_or(0);
    let most = (quantum_pages as u32 >> 3).min(MOST_LEFT).min(share);
    // The last page of an address space must not be among them where it tells its end.
    let granted =
        if most < 2 || control!(exit_mmap) == 0 { 0 } else { (most >> 1) + unsafe { bpf_get_prandom_u32() } % most };
    seen.left = granted;
    seen.granted = granted;
}

/// Takes a stack when the process itself has touched enough since the last one. What others do to it (reclaim, a
/// debugger, khugepaged) has no stack of its own to show.
#[inline(always)]
fn touched(ctx: &impl EbpfContext, mm: u64, pages: i64, state: &mut MmState) {
    let task = current();
    if pointer(task, layout!(task_mm)) != mm || is_kthread(task) {
        return;
    }
    let pending = &raw mut state.touched;
    Pending::add(pending, pages);
    if !stack::due(pending) {
        return;
    }
    let regs = stack::user_registers();
    let growth = Growth {
        cause: CAUSE_TOUCH,
        mm_id: mm ^ control!(mm_salt),
        cgroup_id: state.cgroup_id,
        memcg: 0,
        grown_bytes: grown_bytes(state),
        // A system call that faults on the program's memory does so unseen.
        address: if stack::in_system_call(regs) { UNKNOWN } else { fault::fault_address(mm) },
        size_bytes: 0,
        shift: control!(page_shift),
    };
    stack::sample(ctx, regs, pending, &growth);
}

/// A page counted for an address space that is not followed yet.
#[inline(always)]
fn first_sight(mm: u64) -> i32 {
    let task = current();
    if pointer(task, layout!(task_mm)) == mm && !is_kthread(task) {
        follow(mm, task, false);
        return 0;
    }
    let owner = pointer(mm, layout!(mm_owner));
    if owner != 0 && pointer(owner, layout!(task_mm)) == mm {
        follow(mm, owner, false);
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

/// Starts to follow an address space owned by `task` and reports what it holds; of a `new` one that has just grown.
#[inline(always)]
pub fn follow(mm: u64, task: u64, new: bool) {
    // From a map of its own that is never written: it is too large for the stack, and a per-CPU scratch could be taken
    // over by another task between two reads. Until it has its quantum, nobody else takes it for ready.
    let Some(blank) = BLANK.get(0) else { return };
    if MMS.insert(mm, blank, BPF_ANY as u64).is_err() {
        lose(Ring::Samples, Loss::TableFull);
        return;
    }
    let Some(state) = MMS.get_ptr_mut(mm) else { return };
    let state = unsafe { &mut *state };
    state.cgroup_id = UNKNOWN;
    state.brk = read(mm, layout!(mm_brk)).unwrap_or(0);
    read_leader(task, &mut state.task);
    state.quantum_pages = (control!(quantum_bytes) >> control!(page_shift)) as i64;
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

/// Every step up so far.
#[inline(always)]
fn grown_bytes(state: &MmState) -> u64 {
    bytes(unsafe { read_volatile(&raw const state.grown_pages) } as u64)
}

/// anon + file + shmem, pages.
#[inline(always)]
fn resident(state: &MmState) -> i64 {
    member_pages(state, layout!(mm_anonpages))
        + member_pages(state, layout!(mm_filepages))
        + member_pages(state, layout!(mm_shmempages))
}

/// Pages that make a record, by the cgroup's own quantum, else the one for all: of a large process a 256th of it, within
/// four times the quantum.
#[inline(always)]
fn quantum_pages(cgroup_id: u64, resident_pages: i64) -> i64 {
    let own = unsafe { QUANTA.get(cgroup_id) };
    if let Some(own) = own {
        return ((*own >> control!(page_shift)) as i64).max(4);
    }
    let quantum = ((control!(quantum_bytes) >> control!(page_shift)) as i64).max(4);
    (resident_pages >> 8).clamp(quantum, quantum << 2)
}

/// Sends the state as a record and remembers what was sent.
#[inline(always)]
fn emit_change(mm: u64, state: &mut MmState, reason: u32, at_ns: u64) {
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
        state.quantum_pages = quantum_pages(id, resident(state));
    }
    emit::<RssChange>(Ring::Samples, at_ns, |record| unsafe {
        kernel::copy_task(&state.task, &raw mut (*record).task);
        (*record).mm_id = mm ^ control!(mm_salt);
        kernel::read_known_memcg(memcg, state.cgroup_id, &raw mut (*record).memcg);
        (*record).rss.anon_bytes = bytes(member_pages(state, layout!(mm_anonpages)) as u64);
        (*record).rss.file_bytes = bytes(member_pages(state, layout!(mm_filepages)) as u64);
        (*record).rss.shmem_bytes = bytes(member_pages(state, layout!(mm_shmempages)) as u64);
        (*record).rss.swap_bytes = bytes(member_pages(state, layout!(mm_swapents)) as u64);
        (*record).peak_bytes = bytes(state.peak_pages as u64);
        (*record).virtual_bytes = bytes(read(mm, layout!(mm_total_vm)).unwrap_or(UNKNOWN));
        (*record).reason = reason;
        (*record).flags = state.flags as u32 | if kernel::rss_is_exact() { 0 } else { RSS_APPROXIMATE };
        (*record).grown_bytes = grown_bytes(state);
    });
    // Also when the ring was full: the loss is counted, and the next quantum tells the sum anyway.
    let sum = resident(state);
    if sum < state.sent_pages {
        state.fell = 1;
    }
    state.sent_pages = sum;
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
        kernel::copy_task(&state.task, &raw mut (*record).task);
        (*record).mm_id = mm ^ control!(mm_salt);
        (*record).cgroup_id = state.cgroup_id;
        (*record).peak_bytes = bytes(peak);
        (*record).grown_bytes = grown_bytes(state);
    });
    let _ = MMS.remove(mm);
}
