//! Every map, with its cap. Only map types that 5.10 has.
#![allow(missing_docs, reason = "the map macro makes the statics")]

use aya_ebpf::macros::map;
use aya_ebpf::maps::{Array, HashMap, LruHashMap, PerCpuArray, RingBuf};
use memtrace_common::control::{Control, LOSS_SLOTS, MAX_CPUS, SENT_SLOTS};
use memtrace_common::event::Task;
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
    reserved: 0,
    reclaim_interval_ns: 0,
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
}

/// What is remembered of one address space between two of its records.
#[repr(C)]
#[derive(Clone, Copy)]
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
}

/// The last user fault of a CPU.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct LastFault {
    /// Thread that faulted; 0: used up.
    pub pid_tgid: u64,
    /// Where.
    pub address: u64,
    /// Faults of this thread in a row.
    pub count: u64,
}

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
pub static STACKS: RingBuf = RingBuf::with_byte_size(1 << 18, 0);

/// Address spaces by mm_struct address; userspace sets the cap.
#[map]
pub static MMS: HashMap<u64, MmState> = HashMap::with_max_entries(32768, 0);
/// Quantum in bytes of cgroups that have their own, by cgroup id; set by userspace. Removed cgroups age out.
#[map]
pub static QUANTA: LruHashMap<u64, u64> = LruHashMap::with_max_entries(4096, 0);
/// Usage in pages at the last charge record, by address of the page counter.
#[map]
pub static CHARGED: LruHashMap<u64, u64> = LruHashMap::with_max_entries(4096, 0);
/// Begin of the last reclaim a thread did for a cgroup, by thread id.
#[map]
pub static RECLAIMING: LruHashMap<u32, u64> = LruHashMap::with_max_entries(4096, 0);
/// Address of each CPU's per-CPU area minus the allocation address, found once by `percpu_init`.
#[map]
pub static PERCPU_OFFSETS: Array<u64> = Array::with_max_entries(MAX_CPUS, 0);
/// Only exists to learn those offsets from.
#[map]
pub static PERCPU_PROBE: PerCpuArray<u64> = PerCpuArray::with_max_entries(1, 0);

#[map]
pub static LAST_FAULT: PerCpuArray<LastFault> = PerCpuArray::with_max_entries(1, 0);
#[map]
pub static LAST_KILL: PerCpuArray<LastKill> = PerCpuArray::with_max_entries(1, 0);
#[map]
pub static RECLAIM_GATE: PerCpuArray<ReclaimGate> = PerCpuArray::with_max_entries(1, 0);
/// Losses by `control::loss_index`.
#[map]
pub static LOSSES: PerCpuArray<u64> = PerCpuArray::with_max_entries(LOSS_SLOTS, 0);
/// Records sent, by ring.
#[map]
pub static SENT: PerCpuArray<u64> = PerCpuArray::with_max_entries(SENT_SLOTS, 0);
