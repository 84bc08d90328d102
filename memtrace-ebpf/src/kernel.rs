//! The only reader of kernel memory: every field through the layout, every read checked.
//!
//! Addresses of kernel objects are plain `u64`; 0 is "none". A value that cannot be read is
//! [`UNKNOWN`]. Struct paths and fallbacks: ARCHITECTURE.md, Kernel layout.

use core::ptr::{read_volatile, write_volatile};

use aya_ebpf::helpers::bpf_probe_read_kernel;
use aya_ebpf::helpers::generated::{bpf_get_current_task, bpf_probe_read_kernel as bpf_probe_read_kernel_buffer};
use memtrace_common::control::MAX_CPUS;
use memtrace_common::event::{Memcg, NO_LIMIT, Task, UNKNOWN, UNKNOWN_I32};
use memtrace_common::layout::ABSENT;

use crate::maps::{PERCPU_OFFSETS, WALK, Walk};
use crate::{control, layout};

/// `PF_KTHREAD` in task_struct.flags (include/linux/sched.h).
const PF_KTHREAD: u32 = 0x0020_0000;
/// `PF_EXITING`.
const PF_EXITING: u32 = 0x0000_0004;
/// More pages than any machine has; "no limit" is above it on every page size (PAGE_COUNTER_MAX).
const NO_LIMIT_PAGES: u64 = 1 << 46;
/// Deepest cgroup nesting that is walked.
const MAX_DEPTH: u32 = 16;
/// Largest charge batch of any kernel, pages (MEMCG_CHARGE_BATCH: 32 to 5.10, 64 since).
const CHARGE_BATCH_PAGES: u64 = 64;

/// Reads a `T` at `base + offset`; `None` when the base is null, the field absent or the read fails.
#[inline(always)]
pub fn read<T>(base: u64, offset: u32) -> Option<T> {
    if base == 0 || offset == ABSENT {
        return None;
    }
    unsafe { bpf_probe_read_kernel((base + offset as u64) as *const T) }.ok()
}

/// Copies `T` from `at`; whether it could be read.
#[inline(always)]
pub fn copy<T>(into: *mut T, at: u64) -> bool {
    unsafe { bpf_probe_read_kernel_buffer(into.cast(), size_of::<T>() as u32, at as *const _) == 0 }
}

/// Reads a pointer; 0 when it cannot be read.
#[inline(always)]
pub fn pointer(base: u64, offset: u32) -> u64 {
    read(base, offset).unwrap_or(0)
}

/// Reads a `u32`; 0 when it cannot be read. (Comparing two `Option`s reads a register the verifier sees unset.)
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
    unsafe {
        (*into).tgid = read(task, layout!(task_tgid)).unwrap_or(0);
        (*into).tid = read(task, layout!(task_pid)).unwrap_or(0);
        (*into).start_boot_ns = read(leader, layout!(task_start_boottime)).unwrap_or(UNKNOWN);
        // As words: as bytes they are set and moved one by one, in loops that every path of a program is verified with.
        let comm = read::<[u64; 2]>(task, layout!(task_comm)).unwrap_or([0; 2]);
        (&raw mut (*into).comm).cast::<[u64; 2]>().write(comm);
    }
}

/// Copies the identity of a task, word by word as [`read_task`] does.
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

/// The memory cgroup of a task (its effective css on v2): mem_cgroup address, whose first member is the css.
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

/// A page limit in bytes: LONG_MAX / PAGE_SIZE pages is "no limit" (PAGE_COUNTER_MAX).
#[inline(always)]
fn limit_bytes(pages: Option<u64>) -> u64 {
    match pages {
        None => UNKNOWN,
        Some(pages) if pages >= (i64::MAX as u64) >> control!(page_shift) => NO_LIMIT,
        Some(pages) => bytes(pages),
    }
}

/// Fills `into` with all unknown. Written one by one: what the compiler makes one of is set byte by byte.
#[inline(always)]
pub fn unknown_memcg(into: *mut Memcg) {
    unsafe {
        write_volatile(&raw mut (*into).cgroup_id, UNKNOWN);
        write_volatile(&raw mut (*into).usage_bytes, UNKNOWN);
        write_volatile(&raw mut (*into).limit_bytes, UNKNOWN);
        write_volatile(&raw mut (*into).watermark_bytes, UNKNOWN);
        write_volatile(&raw mut (*into).failcnt, UNKNOWN);
        write_volatile(&raw mut (*into).swap_usage_bytes, UNKNOWN);
        write_volatile(&raw mut (*into).swap_limit_bytes, UNKNOWN);
        write_volatile(&raw mut (*into).high_bytes, UNKNOWN);
    }
}

/// Fills `into` with the counters of a mem_cgroup.
#[inline(always)]
pub fn read_memcg(memcg: u64, into: *mut Memcg) {
    let id = if memcg == 0 { UNKNOWN } else { memcg_id(memcg) };
    read_known_memcg(memcg, id, into);
}

/// As [`read_memcg`], of one whose id is known.
#[inline(always)]
pub fn read_known_memcg(memcg: u64, id: u64, into: *mut Memcg) {
    unknown_memcg(into);
    unsafe { (*into).cgroup_id = id };
    if memcg == 0 {
        return;
    }
    let counter = memcg + layout!(memcg_memory) as u64;
    let usage: u64 = read(counter, layout!(counter_usage)).unwrap_or(UNKNOWN);
    // The root's counter is not charged: 0 there is not a reading.
    let unread = usage == 0 && pointer(counter, layout!(counter_parent)) == 0;
    unsafe {
        (*into).usage_bytes = if unread { UNKNOWN } else { bytes(usage) };
        (*into).limit_bytes = limit_bytes(read(counter, layout!(counter_max)));
        (*into).watermark_bytes = bytes(read(counter, layout!(counter_watermark)).unwrap_or(UNKNOWN));
        (*into).failcnt = read(counter, layout!(counter_failcnt)).unwrap_or(UNKNOWN);
        (*into).high_bytes = limit_bytes(read(counter, layout!(counter_high)));
        if layout!(memcg_swap) != ABSENT {
            let swap = memcg + layout!(memcg_swap) as u64;
            (*into).swap_usage_bytes = bytes(read(swap, layout!(counter_usage)).unwrap_or(UNKNOWN));
            (*into).swap_limit_bytes = limit_bytes(read(swap, layout!(counter_max)));
        }
    }
}

/// The mem_cgroup on the path from `memcg` to the root that ran out, 0 when none did: the one with the least room.
///
/// Unless it is `certain` that one did, it must be at its limit: within a charge batch per CPU, which the stock can hold
/// back, and, as on many CPUs that is more than a small cgroup has, within an eighth of it.
///
/// To be called where nobody else on this CPU can do so in between: under the victim's task_lock. Global, as
/// [`sum_slots`].
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn memcg_that_ran_out(memcg: u64, certain: bool) -> u64 {
    let Some(walk) = WALK.get_ptr_mut(0) else { return 0 };
    let near = CHARGE_BATCH_PAGES * control!(cpus) as u64 + 1;
    unsafe {
        write_volatile(&raw mut (*walk).found, 0);
        write_volatile(&raw mut (*walk).least, if certain { NO_LIMIT_PAGES } else { near });
        write_volatile(&raw mut (*walk).certain, certain as u64);
    }
    let mut counter = if memcg == 0 { 0 } else { memcg + layout!(memcg_memory) as u64 };
    for _ in 0..MAX_DEPTH {
        if counter == 0 {
            break;
        }
        consider(counter, walk);
        counter = pointer(counter, layout!(counter_parent));
    }
    unsafe { read_volatile(&raw const (*walk).found) }
}

/// Takes one page counter of the walk into account.
#[inline(always)]
fn consider(counter: u64, walk: *mut Walk) {
    let Some(usage) = read::<u64>(counter, layout!(counter_usage)) else { return };
    let Some(max) = read::<u64>(counter, layout!(counter_max)) else { return };
    let room = max.saturating_sub(usage);
    let (least, certain) =
        unsafe { (read_volatile(&raw const (*walk).least), read_volatile(&raw const (*walk).certain)) };
    if room < least && max < NO_LIMIT_PAGES && (certain != 0 || room <= max >> 3) {
        unsafe {
            write_volatile(&raw mut (*walk).least, room);
            write_volatile(&raw mut (*walk).found, counter - layout!(memcg_memory) as u64);
        }
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

/// The global part of an RSS counter: exact before 6.2 (but for task caches), off by a batch per CPU since.
#[inline(always)]
pub fn rss_approximate(mm: u64, member: u32) -> i64 {
    let offset = if layout!(rss_is_percpu) == 1 { layout!(percpu_counter_count) } else { 0 };
    read(rss_counter(mm, member), offset).unwrap_or(0)
}

/// As [`rss_approximate`], by a pointer that the verifier knows the type of.
///
/// Such a pointer must be moved by a number that is known when the program is verified, so each member has its own read.
#[inline(always)]
pub fn rss_approximate_typed(mm: *const u8, member: u32) -> i64 {
    let (stride, offset) = if layout!(rss_is_percpu) == 1 {
        (layout!(percpu_counter_size), layout!(percpu_counter_count))
    } else {
        (8, 0)
    };
    let at = |index: u32| unsafe {
        read_volatile(mm.add((layout!(mm_rss_stat) + index * stride + offset) as usize).cast::<i64>())
    };
    match member {
        0 => at(0),
        1 => at(1),
        2 => at(2),
        3 => at(3),
        _ => 0,
    }
}

/// Adds up every CPU's slots of the counter that keeps them here, and of one that keeps its own right behind: the first in
/// the low half, the second in the high one. A slot holds less than a batch, which no number of CPUs takes out of 32 bits.
///
/// A global function to the verifier, which looks at it once, for itself: as part of its callers, whose every path would
/// walk this loop, the programs are too large on a machine of 64 CPUs.
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

/// No member is being reported: see [`rss_pages`].
pub const NOT_REPORTED: u32 = 4;

/// Pages of one rss_stat member: exact where the kernel lets us sum its slots ([`rss_is_exact`]).
///
/// `reported` is the member whose rss_stat event is being handled: before 6.2 the counter then already holds the running
/// thread's cache, which is emptied only afterwards (mm/memory.c sync_mm_rss).
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

/// Pages of every member, as [`rss_pages`] has them, and the global parts they were read with. Where the kernel keeps the
/// slots of the four counters side by side (lib/percpu_counter.c __percpu_counter_init_many, 6.6), with two reads a CPU.
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

/// Whether [`rss_pages`] is exact on this kernel: not where other threads' caches or CPUs' slots stay unseen.
#[inline(always)]
pub fn rss_is_exact() -> bool {
    if layout!(rss_is_percpu) == 1 { control!(percpu_lookup) == 1 } else { layout!(task_rss_cache) == ABSENT }
}

/// A task's oom_score_adj.
#[inline(always)]
pub fn oom_score_adj(task: u64) -> i32 {
    let signal = pointer(task, layout!(task_signal));
    read::<i16>(signal, layout!(signal_oom_score_adj)).map_or(UNKNOWN_I32, i32::from)
}
