//! Every map, with its cap. Only map types that 5.10 has.
#![allow(missing_docs, reason = "the map macro makes the statics")]

use core::arch::asm;
use core::ptr::{read_volatile, write_volatile};

use aya_ebpf::macros::map;
use aya_ebpf::maps::{Array, HashMap, LruHashMap, PerCpuArray, RingBuf};
use memtrace_common::control::{Control, LOSS_SLOTS, MAX_CPUS, SENT_SLOTS, StackBudget};
use memtrace_common::event::{StackSample, Task};
use memtrace_common::layout::KernelLayout;

/// Offsets of the running kernel, set by userspace before load and frozen.
#[unsafe(no_mangle)]
pub static LAYOUT: KernelLayout = KernelLayout::NOTHING;

/// Settings, set by userspace before load and frozen.
#[unsafe(no_mangle)]
pub static CONTROL: Control = Control {
    quantum_bytes: 0,
    mapping_bytes: 0,
    mm_salt: 0,
    memory_hierarchy_id: 0,
    cpus: 0,
    page_shift: 0,
    percpu_lookup: 0,
    exit_mmap: 0,
    task_pt_regs: 0,
    reclaim_interval_ns: 0,
    sample_bytes: 0,
    stack_budget_ppm: 0,
    slice_bytes: 0,
    thread_bytes: 0,
    charges_tell: 0,
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

/// What is remembered of one rss_stat member of an address space.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct MemberState {
    /// Pages at the last exact reading.
    pub exact: i64,
    /// The counter's global part (`percpu_counter.count`) at that reading.
    pub approximate: i64,
    /// Updates since that reading.
    pub updates: i64,
    /// Pages up to which growth has been counted.
    pub counted: i64,
}

/// Adds to memory that other CPUs add to. What was there before is not asked for: 5.10 has no instruction for that, and
/// core has no atomics for a target without compare-and-swap.
#[inline(always)]
pub fn atomic_add(to: *mut i64, amount: i64) {
    unsafe { asm!("lock *(u64 *)({to} + 0) += {amount}", to = in(reg) to, amount = in(reg) amount) };
}

/// What has grown since a stack was last taken for it. CPUs add to it and take from it at once: every change is atomic,
/// and whoever takes a stack takes away just what it stands for, so that nothing is lost or counted twice.
#[repr(C)]
pub struct Pending {
    /// Since the last sample, in the unit of its owner: pages or bytes. Below 0 for a moment when two took the same.
    grown: i64,
    /// Take a stack at this much; 0: not yet decided.
    next: i64,
    /// Stacks taken.
    pub taken: u64,
}

impl Pending {
    /// Nothing has grown yet.
    pub const NOTHING: Self = Self { grown: 0, next: 0, taken: 0 };

    /// Adds, or takes away.
    #[inline(always)]
    pub fn add(this: *mut Self, amount: i64) {
        atomic_add(unsafe { &raw mut (*this).grown }, amount);
    }

    /// What has grown.
    #[inline(always)]
    pub fn grown(this: *mut Self) -> i64 {
        unsafe { read_volatile(&raw const (*this).grown) }
    }

    /// When the next stack is due.
    #[inline(always)]
    pub fn next(this: *mut Self) -> i64 {
        unsafe { read_volatile(&raw const (*this).next) }
    }

    /// Sets when the next stack is due.
    #[inline(always)]
    pub fn set_next(this: *mut Self, next: i64) {
        unsafe { write_volatile(&raw mut (*this).next, next) };
    }
}

/// What is remembered of one address space between two of its records.
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
    /// Pages that make a record.
    pub quantum_pages: i64,
    /// Bytes mapped since the last mapping record.
    pub mapped_bytes: u64,
    /// Bytes unmapped since the last mapping record.
    pub unmapped_bytes: u64,
    /// When the last mapping record was sent.
    pub mapping_ns: u64,
    /// Break at the last brk, 0 when not seen.
    pub brk: u64,
    /// `event::RSS_DYING` once the owner is gone.
    pub flags: u64,
    /// 1: it was told to have fallen, and its cgroup was not read since.
    pub fell: u64,
    /// Every step up of resident memory, pages; added to as [`Pending`] is.
    pub grown_pages: i64,
    /// Pages the process itself has touched since its last sample.
    pub touched: Pending,
    /// Bytes it has mapped since its last sample.
    pub mapped: Pending,
    /// Bytes its break has grown since its last sample.
    pub broken: Pending,
}

/// What is remembered of a cgroup's charges.
#[repr(C)]
pub struct Charges {
    /// Usage in pages at the last charge record.
    pub usage: u64,
    /// Pages charged in system calls since the last sample.
    pub charged: Pending,
}

/// Room of a [`Scratch`] slice: the largest slice, as a mask, and one more page that a copy may begin at its end.
pub const SCRATCH_SLICE: usize = (1 << 16) + 4096;

/// Where a sample is put together, one for each CPU: it is too large for a stack, and of no fixed size for a ring.
#[repr(C)]
pub struct Scratch {
    /// Who uses it; 0: nobody. Programs can be interrupted by others on the same CPU.
    pub owner: u64,
    /// Bytes of the page that is being copied.
    pub length: u64,
    /// The record.
    pub sample: StackSample,
    /// The stack slice behind it.
    pub slice: [u8; SCRATCH_SLICE],
}

/// What the rss hook saw last on a CPU, so that it can let go of an update that says nothing new by one look.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Seen {
    /// The address space.
    pub mm: u64,
    /// The global part of each counter; [`NOT_SEEN`] of one that was not looked at since.
    pub approximate: [i64; 4],
    /// Updates that may still be let go of.
    pub left: u32,
    /// How many there were to let go of.
    pub granted: u32,
}

/// No counter has this value.
pub const NOT_SEEN: i64 = i64::MIN;

/// Words of kernel stack in which a fault is looked for; a power of two.
pub const FRAME_WORDS: usize = 128;

/// The last SIGKILL sent by the kernel on a CPU.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct LastKill {
    /// task_struct of the target, for the mark_victim variant that only has a pid.
    pub target: u64,
    /// Its process id.
    pub tgid: u32,
    /// Zero.
    pub reserved: u32,
    /// When.
    pub boot_ns: u64,
}

/// What a walk up a cgroup's ancestors has found so far. In a map, since the verifier remembers nothing of a map's
/// contents: ways through the walk that differ only in these become one, and it takes a tenth of the time to load.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Walk {
    /// The mem_cgroup with the least room, 0 when none qualifies.
    pub found: u64,
    /// Its room in pages.
    pub least: u64,
    /// Not 0: one of them did run out, however much room there is by now.
    pub certain: u64,
}

/// What a thread has reclaimed for cgroups.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Reclaiming {
    /// Begin of the last time.
    pub begin_ns: u64,
    /// How long it took it, all times since its last end record.
    pub untold_ns: u64,
    /// Bytes that were won, likewise.
    pub untold_bytes: u64,
}

/// Rate limit of reclaim records, per CPU.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct ReclaimGate {
    /// Last begin record.
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
/// One entry, all zero: how an address space begins.
#[map]
pub static BLANK: Array<MmState> = Array::with_max_entries(1, 0);
/// Quantum in bytes of cgroups that have their own, by cgroup id; set by userspace. Removed cgroups age out.
#[map]
pub static QUANTA: LruHashMap<u64, u64> = LruHashMap::with_max_entries(4096, 0);
/// Charges by address of the page counter.
#[map]
pub static CHARGED: LruHashMap<u64, Charges> = LruHashMap::with_max_entries(4096, 0);
/// Sampling step in bytes of cgroups that have their own, by cgroup id; set by userspace.
#[map]
pub static STEPS: LruHashMap<u64, u64> = LruHashMap::with_max_entries(4096, 0);
/// Bytes of stack to copy of processes whose stacks are deep, by process id; set by userspace.
#[map]
pub static SLICES: LruHashMap<u32, u32> = LruHashMap::with_max_entries(4096, 0);
/// One entry.
#[map]
pub static STACK_BUDGET: Array<StackBudget> = Array::with_max_entries(1, 0);
/// What userspace has spent on stacks since the start, nanoseconds; set by it. One entry.
#[map]
pub static USER_SPENT: Array<u64> = Array::with_max_entries(1, 0);
/// By CPU; userspace sets how many.
#[map]
pub static SCRATCH: Array<Scratch> = Array::with_max_entries(1, 0);
/// By thread id.
#[map]
pub static RECLAIMING: LruHashMap<u32, Reclaiming> = LruHashMap::with_max_entries(4096, 0);
/// Address of each CPU's per-CPU area minus the allocation address, found once by `percpu_init`.
#[map]
pub static PERCPU_OFFSETS: Array<u64> = Array::with_max_entries(MAX_CPUS, 0);
/// Only exists to learn those offsets from.
#[map]
pub static PERCPU_PROBE: PerCpuArray<u64> = PerCpuArray::with_max_entries(1, 0);

#[map]
pub static SEEN: PerCpuArray<Seen> = PerCpuArray::with_max_entries(1, 0);
#[map]
pub static FRAMES: PerCpuArray<[u64; FRAME_WORDS]> = PerCpuArray::with_max_entries(1, 0);
#[map]
pub static LAST_KILL: PerCpuArray<LastKill> = PerCpuArray::with_max_entries(1, 0);
#[map]
pub static WALK: PerCpuArray<Walk> = PerCpuArray::with_max_entries(1, 0);
#[map]
pub static RECLAIM_GATE: PerCpuArray<ReclaimGate> = PerCpuArray::with_max_entries(1, 0);
/// Losses by `control::loss_index`.
#[map]
pub static LOSSES: PerCpuArray<u64> = PerCpuArray::with_max_entries(LOSS_SLOTS, 0);
/// Records sent, by ring.
#[map]
pub static SENT: PerCpuArray<u64> = PerCpuArray::with_max_entries(SENT_SLOTS, 0);
