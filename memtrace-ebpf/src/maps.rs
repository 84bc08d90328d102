//! Every map, with its cap, and what its values mean. Only map types that 5.10 has.
#![allow(missing_docs, reason = "the map macro makes the statics")]

use core::arch::asm;

use aya_ebpf::macros::map;
use aya_ebpf::maps::{Array, HashMap, LruHashMap, PerCpuArray, RingBuf};
use memtrace_common::control::{Control, LOSS_SLOTS, MAX_CPUS, SENT_SLOTS, StackBudget};
use memtrace_common::event::{StackSample, Task};
use memtrace_common::layout::KernelLayout;

use crate::field;
use crate::memory::{load, store};

/// Offsets of the running kernel, set by userspace before load and frozen.
#[unsafe(no_mangle)]
pub static LAYOUT: KernelLayout = KernelLayout::NOTHING;

/// Settings, set by userspace before load and frozen.
#[unsafe(no_mangle)]
pub static CONTROL: Control = Control {
    rss_threshold_bytes: 0,
    mapping_bytes: 0,
    mm_salt: 0,
    memory_hierarchy_id: 0,
    cpus: 0,
    page_shift: 0,
    percpu_lookup: 0,
    exit_mmap: 0,
    task_pt_regs: 0,
    reclaim_interval_ns: 0,
    sample_interval_bytes: 0,
    stack_budget_ppm: 0,
    stack_copy_bytes: 0,
    thread_bytes: 0,
    rss_from_charges: 0,
    reserved: 0,
};

/// Reads one frozen layout field; a constant to the verifier.
#[macro_export]
macro_rules! layout {
    ($field:ident) => {
        unsafe { core::ptr::read_volatile(&raw const $crate::maps::LAYOUT.$field) }
    };
}

/// Reads one frozen setting; a constant to the verifier.
#[macro_export]
macro_rules! control {
    ($field:ident) => {
        unsafe { core::ptr::read_volatile(&raw const $crate::maps::CONTROL.$field) }
    };
}

/// What is remembered of one rss_stat member (anon, file, shmem, swap) of an address space.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct MemberState {
    /// Pages at the last exact reading.
    pub exact: i64,
    /// The counter's global part (`percpu_counter.count`) at that reading.
    pub approximate: i64,
    /// Updates of the counter since that reading.
    pub updates: i64,
    /// Pages up to which growth has been counted.
    pub counted: i64,
}

/// Adds to memory that other CPUs add to. The value from before is not asked for: 5.10 has no
/// instruction that returns it, and core has no atomics for a target without compare-and-swap.
#[inline(always)]
pub fn atomic_add(to: *mut i64, amount: i64) {
    unsafe { asm!("lock *(u64 *)({to} + 0) += {amount}", to = in(reg) to, amount = in(reg) amount) };
}

/// What has grown since a stack was last taken for it.
///
/// CPUs add to it and take from it at once. Every change is atomic, and the CPU that takes a stack
/// takes off just what that stack stands for, so nothing is lost or counted twice.
#[repr(C)]
pub struct PendingGrowth {
    /// Since the last sample, in the unit of its owner: pages or bytes. Below 0 for a moment when
    /// two CPUs took off the same.
    grown: i64,
    /// Take a stack at this much; 0: not decided yet.
    next: i64,
    /// Stacks taken.
    taken: u64,
}

impl PendingGrowth {
    /// Nothing has grown yet.
    pub const NOTHING: Self = Self { grown: 0, next: 0, taken: 0 };

    /// Adds; takes off when negative.
    #[inline(always)]
    pub fn add(this: *mut Self, amount: i64) {
        atomic_add(field!(this.grown), amount);
    }

    /// What has grown, in the owner's unit.
    #[inline(always)]
    pub fn grown(this: *mut Self) -> i64 {
        load(field!(this.grown))
    }

    /// How much must have grown for the next stack.
    #[inline(always)]
    pub fn next(this: *mut Self) -> i64 {
        load(field!(this.next))
    }

    /// Sets how much must have grown for the next stack.
    #[inline(always)]
    pub fn set_next(this: *mut Self, next: i64) {
        store(field!(this.next), next);
    }

    /// Stacks taken so far.
    #[inline(always)]
    pub fn taken(this: *mut Self) -> u64 {
        unsafe { (*this).taken }
    }

    /// Counts a stack that was taken.
    #[inline(always)]
    pub fn count_taken(this: *mut Self) {
        unsafe { (*this).taken += 1 };
    }
}

/// What is remembered of one address space between two of its records. Its life: `hooks/rss.rs`.
#[repr(C)]
pub struct MmState {
    /// Owner, as last resolved.
    pub task: Task,
    /// Its memory cgroup, as last resolved.
    pub cgroup_id: u64,
    /// What is known of each rss_stat member.
    pub members: [MemberState; 4],
    /// anon + file + shmem pages in the last record.
    pub sent_pages: i64,
    /// Swap entries in the last record.
    pub sent_swap_pages: i64,
    /// Highest anon + file + shmem pages.
    pub peak_pages: i64,
    /// Pages that must have moved for a record; 0 until the first reading is complete.
    pub threshold_pages: i64,
    /// Bytes mapped since the last mapping record.
    pub mapped_bytes: u64,
    /// Bytes unmapped since the last mapping record.
    pub unmapped_bytes: u64,
    /// When the last mapping record was sent.
    pub mapping_ns: u64,
    /// Program break after the last brk(2); 0 when none was seen.
    pub brk: u64,
    /// `event::RSS_DYING` once the owner is gone.
    pub flags: u64,
    /// 1: a record said that it fell, and the usage of its cgroup was not reported since.
    pub fall_reported: u64,
    /// Every rise of resident memory added up, pages; changed by [`atomic_add`] only.
    pub grown_pages: i64,
    /// Pages the process itself has touched since its last sample.
    pub touched: PendingGrowth,
    /// Bytes it has mapped since its last sample.
    pub mapped: PendingGrowth,
    /// Bytes its break has grown since its last sample.
    pub broken: PendingGrowth,
}

/// What is remembered of a cgroup's charges.
#[repr(C)]
pub struct ChargeState {
    /// Usage in pages at the last charge record.
    pub usage: u64,
    /// Pages charged in system calls since the last sample.
    pub charged: PendingGrowth,
}

/// Room for a stack copy: what the mask of its length allows, and one more page that begins at its
/// end.
const STACK_COPY_ROOM: usize = (1 << 16) + 4096;

/// Where a sample is put together, one for each CPU: it is too large for a program's stack, and its
/// size is not known soon enough to reserve it in a ring.
#[repr(C)]
pub struct SampleScratch {
    /// Token of the program that uses it; 0: none. A program can be interrupted by another one on
    /// the same CPU.
    pub owner: u64,
    /// Bytes of the page that is being copied.
    pub length: u64,
    /// The record.
    pub sample: StackSample,
    /// The copy of the user stack, right behind the record.
    pub stack_copy: [u8; STACK_COPY_ROOM],
}

/// The last update that the rss hook looked at on a CPU, by which it skips those that say nothing
/// new without a look at the address space's record.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct LastUpdate {
    /// Address of the mm_struct.
    pub mm: u64,
    /// The global part of each counter; [`NOT_SEEN`] of one that was not looked at since.
    pub approximate: [i64; 4],
    /// Updates that may still be skipped.
    pub skips_left: u32,
    /// Updates that could be skipped since the last one that was not.
    pub skips_allowed: u32,
}

/// A value that no counter has.
pub const NOT_SEEN: i64 = i64::MIN;

/// Words of kernel stack in which a fault is looked for; a power of two.
pub const FRAME_WORDS: usize = 128;

/// The last SIGKILL that the kernel itself sent on a CPU.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct LastKill {
    /// Address of the target's task_struct, for the mark_victim variant that only has a pid.
    pub target: u64,
    /// Process id of the target.
    pub tgid: u32,
    /// Zero.
    pub reserved: u32,
    /// When it was sent, boot clock.
    pub boot_ns: u64,
}

/// What a walk up a cgroup's ancestors has found so far. It is in a map because the verifier
/// remembers nothing of a map's contents: paths through the walk that differ only in these become
/// one, and the program loads in a tenth of the time.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct AncestorWalk {
    /// The mem_cgroup with the least room, 0 when none qualifies.
    pub found: u64,
    /// Its room, pages.
    pub least_pages: u64,
    /// Not 0: one of them did run out, however much room there is by now.
    pub certain: u64,
}

/// What a thread has reclaimed for cgroups.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Reclaiming {
    /// When it last began, boot clock.
    pub begin_ns: u64,
    /// Time it spent since its last end record.
    pub unreported_ns: u64,
    /// Bytes it reclaimed since its last end record.
    pub unreported_bytes: u64,
}

/// Rate limit of reclaim records, per CPU.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct ReclaimGate {
    /// When the last begin record was sent, boot clock.
    pub sent_ns: u64,
    /// Begins left out since.
    pub suppressed: u64,
}

/// Rings; userspace sets the sizes.
#[map]
pub static LEDGER: RingBuf = RingBuf::with_byte_size(1 << 20, 0);
#[map]
pub static SAMPLES: RingBuf = RingBuf::with_byte_size(4 << 20, 0);
#[map]
pub static STACKS: RingBuf = RingBuf::with_byte_size(4 << 20, 0);

/// Address spaces by mm_struct address; userspace sets the cap.
#[map]
pub static MMS: HashMap<u64, MmState> = HashMap::with_max_entries(32768, 0);
/// One entry, all zero and never written: how the record of an address space begins.
#[map]
pub static BLANK: Array<MmState> = Array::with_max_entries(1, 0);
/// Bytes that make a record in cgroups that have their own threshold, by cgroup id; set by
/// userspace. Removed cgroups age out.
#[map]
pub static RSS_THRESHOLDS: LruHashMap<u64, u64> = LruHashMap::with_max_entries(4096, 0);
/// Charges by address of the page counter.
#[map]
pub static CHARGED: LruHashMap<u64, ChargeState> = LruHashMap::with_max_entries(4096, 0);
/// Sample interval in bytes of cgroups that have their own, by cgroup id; set by userspace.
#[map]
pub static SAMPLE_INTERVALS: LruHashMap<u64, u64> = LruHashMap::with_max_entries(4096, 0);
/// Bytes of stack to copy of processes whose stacks are deep, by process id; set by userspace.
#[map]
pub static STACK_COPIES: LruHashMap<u32, u32> = LruHashMap::with_max_entries(4096, 0);
/// What taking stacks has cost, and may. One entry.
#[map]
pub static STACK_BUDGET: Array<StackBudget> = Array::with_max_entries(1, 0);
/// What userspace has spent on stacks since the start, nanoseconds; set by it. One entry.
#[map]
pub static USER_SPENT: Array<u64> = Array::with_max_entries(1, 0);
/// Scratch memory of samples, by CPU; userspace sets how many.
#[map]
pub static SCRATCH: Array<SampleScratch> = Array::with_max_entries(1, 0);
/// Threads that reclaim for a cgroup, by thread id.
#[map]
pub static RECLAIMING: LruHashMap<u32, Reclaiming> = LruHashMap::with_max_entries(4096, 0);
/// Address of each CPU's per-CPU area minus the allocation address, found once by `percpu_init`.
#[map]
pub static PERCPU_OFFSETS: Array<u64> = Array::with_max_entries(MAX_CPUS, 0);
/// Exists only for `percpu_init` to learn those offsets from.
#[map]
pub static PERCPU_PROBE: PerCpuArray<u64> = PerCpuArray::with_max_entries(1, 0);

/// One entry.
#[map]
pub static LAST_UPDATE: PerCpuArray<LastUpdate> = PerCpuArray::with_max_entries(1, 0);
/// A copy of the kernel stack below the user registers. One entry.
#[map]
pub static FRAMES: PerCpuArray<[u64; FRAME_WORDS]> = PerCpuArray::with_max_entries(1, 0);
/// One entry.
#[map]
pub static LAST_KILL: PerCpuArray<LastKill> = PerCpuArray::with_max_entries(1, 0);
/// One entry.
#[map]
pub static WALK: PerCpuArray<AncestorWalk> = PerCpuArray::with_max_entries(1, 0);
/// One entry.
#[map]
pub static RECLAIM_GATE: PerCpuArray<ReclaimGate> = PerCpuArray::with_max_entries(1, 0);
/// Losses by `control::loss_index`.
#[map]
pub static LOSSES: PerCpuArray<u64> = PerCpuArray::with_max_entries(LOSS_SLOTS, 0);
/// Records sent, by ring.
#[map]
pub static SENT: PerCpuArray<u64> = PerCpuArray::with_max_entries(SENT_SLOTS, 0);
