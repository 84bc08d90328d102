//! The only reader of kernel memory: every field through the layout, every read checked.
//!
//! Addresses of kernel objects are plain `u64`; 0 is "none". A value that cannot be read is
//! [`UNKNOWN`]. So `pointer(task, layout!(task_mm))` is the kernel's `task->mm`, wherever this
//! kernel keeps it. Struct paths and fallbacks: ARCHITECTURE.md, Kernel layout.

use aya_ebpf::helpers::generated::{bpf_get_current_task, bpf_probe_read_kernel as bpf_probe_read_kernel_buffer};
use aya_ebpf::helpers::{bpf_probe_read_kernel, bpf_probe_read_kernel_str_bytes};
use memtrace_common::control::MAX_CPUS;
use memtrace_common::event::{Memcg, NO_LIMIT, Task, UNKNOWN, UNKNOWN_I32};
use memtrace_common::layout::ABSENT;

use crate::maps::{AncestorWalk, PERCPU_OFFSETS, WALK};
use crate::memory::{load, store};
use crate::{control, field, layout, set};

/// `PF_KTHREAD` in task_struct.flags (include/linux/sched.h).
const PF_KTHREAD: u32 = 0x0020_0000;
/// `PF_EXITING` in task_struct.flags.
const PF_EXITING: u32 = 0x0000_0004;
/// More pages than any machine has. "No limit" is above it on every page size: PAGE_COUNTER_MAX,
/// LONG_MAX / PAGE_SIZE (include/linux/page_counter.h).
const NO_LIMIT_PAGES: u64 = 1 << 46;
/// Ancestors of a cgroup that are looked at, itself included.
const MAX_DEPTH: u32 = 16;
/// Largest charge batch of any kernel, pages (include/linux/memcontrol.h MEMCG_CHARGE_BATCH: 32 up
/// to 5.10, 64 since).
const CHARGE_BATCH_PAGES: u64 = 64;

/// Reads a `T` at `base + offset`; `None` when the base is null, the field absent or the read fails.
#[inline(always)]
pub fn read<T>(base: u64, offset: u32) -> Option<T> {
    if base == 0 || offset == ABSENT {
        return None;
    }
    unsafe { bpf_probe_read_kernel((base + offset as u64) as *const T) }.ok()
}

/// Copies a `T` from kernel memory at `at`; whether it could be read.
#[inline(always)]
pub fn copy<T>(into: *mut T, at: u64) -> bool {
    unsafe { bpf_probe_read_kernel_buffer(into.cast(), size_of::<T>() as u32, at as *const _) == 0 }
}

/// Copies a string of the kernel, cut to what fits; its length in bytes, 0 when it cannot be read.
#[inline(always)]
pub fn read_string<const BYTES: usize>(at: u64, into: *mut [u8; BYTES]) -> usize {
    let into = unsafe { &mut *into };
    unsafe { bpf_probe_read_kernel_str_bytes(at as *const u8, into) }.map_or(0, |text| text.len())
}

/// Reads a pointer; 0 when it cannot be read.
#[inline(always)]
pub fn pointer(base: u64, offset: u32) -> u64 {
    read(base, offset).unwrap_or(0)
}

/// Reads a `u32`; 0 when it cannot be read. Not an `Option`: code that compares two of them reads a
/// register which the verifier sees unset.
#[inline(always)]
pub fn read_u32(base: u64, offset: u32) -> u32 {
    read(base, offset).unwrap_or(0)
}

/// Pages to bytes; [`UNKNOWN`] stays.
#[inline(always)]
pub fn bytes(pages: u64) -> u64 {
    if pages == UNKNOWN { UNKNOWN } else { pages << control!(page_shift) }
}

/// The running thread's task_struct.
#[inline(always)]
pub fn current() -> u64 {
    unsafe { bpf_get_current_task() }
}

/// Whether a task is exiting.
#[inline(always)]
pub fn is_exiting(task: u64) -> bool {
    read_u32(task, layout!(task_flags)) & PF_EXITING != 0
}

/// Whether a task is a kernel thread (it may borrow a user address space).
#[inline(always)]
pub fn is_kthread(task: u64) -> bool {
    read::<u32>(task, layout!(task_flags)).unwrap_or(0) & PF_KTHREAD != 0
}

/// Fills `into` with the identity of a task.
#[inline(always)]
pub fn read_task(task: u64, into: *mut Task) {
    let leader = pointer(task, layout!(task_group_leader));
    set!(into => {
        tgid: read(task, layout!(task_tgid)).unwrap_or(0),
        tid: read(task, layout!(task_pid)).unwrap_or(0),
        start_boot_ns: read(leader, layout!(task_start_boottime)).unwrap_or(UNKNOWN),
    });
    // As words: bytes are set and moved one by one, in loops that every path of a program is
    // verified with.
    let comm = read::<[u64; 2]>(task, layout!(task_comm)).unwrap_or([0; 2]);
    let into_comm = field!(into.comm).cast::<[u64; 2]>();
    unsafe { into_comm.write(comm) };
}

/// Copies the identity of a task in words, for the same reason as [`read_task`].
#[inline(always)]
pub fn copy_task(from: &Task, into: *mut Task) {
    let from: *const u64 = (&raw const *from).cast();
    let into: *mut u64 = into.cast();
    unsafe {
        let words = [*from, *from.add(1), *from.add(2), *from.add(3)];
        into.write(words[0]);
        into.add(1).write(words[1]);
        into.add(2).write(words[2]);
        into.add(3).write(words[3]);
    }
}
const _: () = assert!(size_of::<Task>() == 32 && align_of::<Task>() == 8 && core::mem::offset_of!(Task, comm) == 16);

/// Address of a task's mem_cgroup, whose first member is its css; on v2 the effective one.
#[inline(always)]
pub fn memcg_of(task: u64) -> u64 {
    let css_set = pointer(task, layout!(task_cgroups));
    pointer(css_set, layout!(css_set_subsys) + 8 * layout!(memory_cgrp_id))
}

/// kernfs id of a cgroup: the inode number of its directory, on v1 and v2.
#[inline(always)]
pub fn cgroup_id(cgroup: u64) -> u64 {
    read(pointer(cgroup, layout!(cgroup_kn)), layout!(kernfs_id)).unwrap_or(UNKNOWN)
}

/// kernfs id of a mem_cgroup's cgroup.
#[inline(always)]
pub fn memcg_id(memcg: u64) -> u64 {
    cgroup_id(pointer(memcg, layout!(css_cgroup)))
}

/// Whether a cgroup belongs to the hierarchy that carries the memory controller.
#[inline(always)]
pub fn in_memory_hierarchy(cgroup: u64) -> bool {
    let root = pointer(cgroup, layout!(cgroup_root));
    root != 0 && read_u32(root, layout!(cgroup_root_hierarchy_id)) == control!(memory_hierarchy_id)
}

/// A page limit in bytes; PAGE_COUNTER_MAX is "no limit".
#[inline(always)]
fn limit_bytes(pages: Option<u64>) -> u64 {
    match pages {
        None => UNKNOWN,
        Some(pages) if pages >= (i64::MAX as u64) >> control!(page_shift) => NO_LIMIT,
        Some(pages) => bytes(pages),
    }
}

/// Makes every field unknown, one store each: a store that the compiler joins is done byte by byte.
#[inline(always)]
fn set_memcg_unknown(into: *mut Memcg) {
    store(field!(into.cgroup_id), UNKNOWN);
    store(field!(into.usage_bytes), UNKNOWN);
    store(field!(into.limit_bytes), UNKNOWN);
    store(field!(into.watermark_bytes), UNKNOWN);
    store(field!(into.failcnt), UNKNOWN);
    store(field!(into.swap_usage_bytes), UNKNOWN);
    store(field!(into.swap_limit_bytes), UNKNOWN);
    store(field!(into.high_bytes), UNKNOWN);
}

/// Fills `into` with the counters of a mem_cgroup; all unknown for 0.
#[inline(always)]
pub fn read_memcg(memcg: u64, into: *mut Memcg) {
    let id = if memcg == 0 { UNKNOWN } else { memcg_id(memcg) };
    read_known_memcg(memcg, id, into);
}

/// As [`read_memcg`], of one whose id is known.
#[inline(always)]
pub fn read_known_memcg(memcg: u64, id: u64, into: *mut Memcg) {
    set_memcg_unknown(into);
    set!(into => { cgroup_id: id });
    if memcg == 0 {
        return;
    }
    let counter = memcg + layout!(memcg_memory) as u64;
    let usage: u64 = read(counter, layout!(counter_usage)).unwrap_or(UNKNOWN);
    // The root's counter is not charged: 0 there is not a reading.
    let unread = usage == 0 && pointer(counter, layout!(counter_parent)) == 0;
    set!(into => {
        usage_bytes: if unread { UNKNOWN } else { bytes(usage) },
        limit_bytes: limit_bytes(read(counter, layout!(counter_max))),
        watermark_bytes: bytes(read(counter, layout!(counter_watermark)).unwrap_or(UNKNOWN)),
        failcnt: read(counter, layout!(counter_failcnt)).unwrap_or(UNKNOWN),
        high_bytes: limit_bytes(read(counter, layout!(counter_high))),
    });
    if layout!(memcg_swap) != ABSENT {
        let swap = memcg + layout!(memcg_swap) as u64;
        set!(into => {
            swap_usage_bytes: bytes(read(swap, layout!(counter_usage)).unwrap_or(UNKNOWN)),
            swap_limit_bytes: limit_bytes(read(swap, layout!(counter_max))),
        });
    }
}

/// The mem_cgroup between `memcg` and the root that ran out: the one with the least room, 0 when
/// none did.
///
/// Unless it is `certain` that one did, it must be at its limit: within one charge batch a CPU,
/// which per-CPU stocks can hold back (mm/memcontrol.c `refill_stock`), and within an eighth of the
/// limit, since on many CPUs the batches are more than a small cgroup has.
///
/// There is one walk a CPU. Callers hold the victim's task_lock, so no other one on this CPU can
/// begin in between. Global, as [`sum_slots`].
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn memcg_that_ran_out(memcg: u64, certain: bool) -> u64 {
    let Some(walk) = WALK.get_ptr_mut(0) else { return 0 };
    let near = CHARGE_BATCH_PAGES * control!(cpus) as u64 + 1;
    store(field!(walk.found), 0);
    store(field!(walk.least_pages), if certain { NO_LIMIT_PAGES } else { near });
    store(field!(walk.certain), certain as u64);
    let mut counter = if memcg == 0 { 0 } else { memcg + layout!(memcg_memory) as u64 };
    for _ in 0..MAX_DEPTH {
        if counter == 0 {
            break;
        }
        consider(counter, walk);
        counter = pointer(counter, layout!(counter_parent));
    }
    load(field!(walk.found))
}

/// Compares one page counter with the best of the walk so far.
#[inline(always)]
fn consider(counter: u64, walk: *mut AncestorWalk) {
    let Some(usage) = read::<u64>(counter, layout!(counter_usage)) else { return };
    let Some(max) = read::<u64>(counter, layout!(counter_max)) else { return };
    let room = max.saturating_sub(usage);
    let (least, certain) = (load(field!(walk.least_pages)), load(field!(walk.certain)));
    if room < least && max < NO_LIMIT_PAGES && (certain != 0 || room <= max >> 3) {
        store(field!(walk.least_pages), room);
        store(field!(walk.found), counter - layout!(memcg_memory) as u64);
    }
}

/// Whether memory.oom.group is set on the path from `memcg` up to `top` (0: up to the root). Global, as [`sum_slots`].
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn oom_group(memcg: u64, top: u64) -> bool {
    if memcg == 0 || layout!(memcg_oom_group) == ABSENT {
        return false;
    }
    let mut memcg = memcg;
    for _ in 0..MAX_DEPTH {
        if read::<u8>(memcg, layout!(memcg_oom_group)).unwrap_or(0) != 0 {
            return true;
        }
        if memcg == top {
            return false;
        }
        let parent = pointer(memcg + layout!(memcg_memory) as u64, layout!(counter_parent));
        if parent == 0 {
            return false;
        }
        memcg = parent - layout!(memcg_memory) as u64;
    }
    false
}

/// Address of the counter of one rss_stat member.
#[inline(always)]
fn rss_counter(mm: u64, member: u32) -> u64 {
    let stride = if layout!(rss_is_percpu) == 1 { layout!(percpu_counter_size) } else { 8 };
    mm + layout!(mm_rss_stat) as u64 + (member * stride) as u64
}

/// The global part of an RSS counter, pages. Before 6.2 it is exact but for what threads keep to
/// themselves; since then it is off by up to a batch a CPU (lib/percpu_counter.c).
#[inline(always)]
pub fn rss_approximate(mm: u64, member: u32) -> i64 {
    let offset = if layout!(rss_is_percpu) == 1 { layout!(percpu_counter_count) } else { 0 };
    read(rss_counter(mm, member), offset).unwrap_or(0)
}

/// As [`rss_approximate`], by a pointer whose type the verifier knows: read without a helper call.
///
/// Such a pointer may only be moved by a number that is known when the program is verified, so each
/// member has a read of its own.
#[inline(always)]
pub fn rss_approximate_typed(mm: *const u8, member: u32) -> i64 {
    let (stride, offset) = if layout!(rss_is_percpu) == 1 {
        (layout!(percpu_counter_size), layout!(percpu_counter_count))
    } else {
        (8, 0)
    };
    let at =
        |index: u32| load(mm.wrapping_add((layout!(mm_rss_stat) + index * stride + offset) as usize).cast::<i64>());
    match member {
        0 => at(0),
        1 => at(1),
        2 => at(2),
        3 => at(3),
        _ => 0,
    }
}

/// Adds up the slots of all CPUs of two counters: the one whose slots are at `counters`, in the low
/// half of the result, and the one whose slots lie right behind, in the high half. A slot holds
/// less than a batch, so that no number of CPUs takes a sum out of 32 bits.
///
/// A global function to the verifier (`no_mangle`, never inlined): it is verified once, by itself.
/// As part of its callers this loop would be walked on every path of theirs, and on a machine of 64
/// CPUs the programs would be too large.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn sum_slots(counters: u64) -> u64 {
    let (mut first, mut second) = (0i32, 0i32);
    let cpus = control!(cpus);
    for cpu in 0..MAX_CPUS {
        if cpu >= cpus {
            break;
        }
        if let Some(offset) = PERCPU_OFFSETS.get(cpu) {
            let address = counters.wrapping_add(*offset);
            match unsafe { bpf_probe_read_kernel(address as *const [i32; 2]) } {
                Ok(slots) => {
                    first = first.wrapping_add(slots[0]);
                    second = second.wrapping_add(slots[1]);
                }
                // What is behind the last counter of a page may not be there.
                Err(_) => {
                    let slot = unsafe { bpf_probe_read_kernel(address as *const i32) };
                    first = first.wrapping_add(slot.unwrap_or(0));
                }
            }
        }
    }
    first as u32 as u64 | (second as u32 as u64) << 32
}

/// The two sums of [`sum_slots`].
#[inline(always)]
fn sums(counters: u64) -> [i64; 2] {
    let both = sum_slots(counters);
    [both as u32 as i32 as i64, (both >> 32) as u32 as i32 as i64]
}

/// `reported` of [`rss_pages`] outside of the rss_stat tracepoint.
pub const NOT_REPORTED: u32 = 4;

/// Pages of one rss_stat member, exact where [`rss_is_exact`].
///
/// `reported` is the member whose rss_stat event is being handled. Before 6.2 the counter then
/// holds the running thread's cache already, which is emptied only afterwards (mm/memory.c
/// `sync_mm_rss`).
#[inline(always)]
pub fn rss_pages(mm: u64, member: u32, reported: u32) -> i64 {
    let counter = rss_counter(mm, member);
    if layout!(rss_is_percpu) == 1 {
        let count: i64 = read(counter, layout!(percpu_counter_count)).unwrap_or(0);
        if control!(percpu_lookup) == 0 {
            return count;
        }
        let counters = pointer(counter, layout!(percpu_counter_counters));
        if counters == 0 { count } else { count + sums(counters)[0] }
    } else {
        let count: i64 = read(counter, 0).unwrap_or(0);
        // 6.1 and older: the running thread's own cache is not yet in the counter.
        let task = current();
        let cache = layout!(task_rss_cache);
        if cache != ABSENT && member != reported && pointer(task, layout!(task_mm)) == mm {
            count + read::<i32>(task, cache + 4 * member).unwrap_or(0) as i64
        } else {
            count
        }
    }
}

/// Pages of every member, as [`rss_pages`] has them, and the global parts they were read with. From
/// 6.6 on the slots of the four counters lie side by side (lib/percpu_counter.c
/// `__percpu_counter_init_many`), and two reads a CPU are enough.
#[inline(always)]
pub fn all_rss_pages(mm: u64, reported: u32) -> ([i64; 4], [i64; 4]) {
    let approximate = [rss_approximate(mm, 0), rss_approximate(mm, 1), rss_approximate(mm, 2), rss_approximate(mm, 3)];
    if layout!(rss_is_percpu) == 1 && control!(percpu_lookup) == 1 {
        let slots = |member| pointer(rss_counter(mm, member), layout!(percpu_counter_counters));
        let (first, last) = (slots(0), slots(3));
        if first != 0 && last.wrapping_sub(first) == 12 {
            let ([zero, one], [two, three]) = (sums(first), sums(first + 8));
            let [a, b, c, d] = approximate;
            return ([a + zero, b + one, c + two, d + three], approximate);
        }
    }
    let pages = |member| rss_pages(mm, member, reported);
    ([pages(0), pages(1), pages(2), pages(3)], approximate)
}

/// Whether [`rss_pages`] is exact on this kernel: not where the caches of other threads (before
/// 6.2) or the slots of CPUs (without `bpf_map_lookup_percpu_elem`) stay unseen.
#[inline(always)]
pub fn rss_is_exact() -> bool {
    if layout!(rss_is_percpu) == 1 { control!(percpu_lookup) == 1 } else { layout!(task_rss_cache) == ABSENT }
}

/// A task's oom_score_adj, [`UNKNOWN_I32`] when it cannot be read.
#[inline(always)]
pub fn oom_score_adj(task: u64) -> i32 {
    let signal = pointer(task, layout!(task_signal));
    read::<i16>(signal, layout!(signal_oom_score_adj)).map_or(UNKNOWN_I32, i32::from)
}
