//! Wire records: what an eBPF program puts into a ring, byte for byte.
//!
//! Every record starts with a [`Header`]; `kind` says which struct follows. Structs have no
//! padding and fixed sizes, checked at compile time below. Kind numbers are assigned by hand and
//! never reused. All sizes are bytes, all times are boot-clock nanoseconds (`CLOCK_BOOTTIME`,
//! `bpf_ktime_get_boot_ns`). A `u64` that the kernel side could not read is [`UNKNOWN`].

#[cfg(feature = "user")]
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// The value of a `u64` field that could not be read: unknown, never 0.
pub const UNKNOWN: u64 = u64::MAX;
/// An unknown `u32` (a user id that a record does not have).
pub const UNKNOWN_U32: u32 = u32::MAX;
/// Size of a [`Kill`] in journals that were written before it had the sender's user id, in bytes.
pub const KILL_SIZE_BEFORE: usize = 96;
/// An unknown `i32` (an `oom_score_adj` that could not be read).
pub const UNKNOWN_I32: i32 = i32::MIN;

/// Declares the records: derives for userspace, compile-time size, and the kind table.
macro_rules! records {
    ($($(#[$meta:meta])* $kind:literal $name:ident ($konst:ident) $size:literal { $($(#[$fmeta:meta])* $field:ident: $ty:ty,)* })*) => {
        $(
            $(#[$meta])*
            #[repr(C)]
            #[derive(Clone, Copy, Debug)]
            #[cfg_attr(feature = "user", derive(FromBytes, IntoBytes, Immutable, KnownLayout, PartialEq, Eq))]
            pub struct $name {
                /// Kind, size, CPU and time of this record.
                pub header: Header,
                $($(#[$fmeta])* pub $field: $ty,)*
            }
            #[doc = concat!("Header kind of [`", stringify!($name), "`].")]
            pub const $konst: u16 = $kind;
            const _: () = assert!(size_of::<$name>() == $size, stringify!($name));
            const _: () = assert!($size % 8 == 0 && align_of::<$name>() == 8);
            impl WireRecord for $name {
                const KIND: u16 = $kind;
                const VITAL: bool = matches!($kind, 16 | 17 | 24);
            }
        )*
        /// Every kind with its record's size in bytes, for total decoding and tests.
        pub const KINDS: &[(u16, usize, &str)] = &[$(($kind, $size, stringify!($name))),*];
    };
}

/// A record type, with its kind number.
pub trait WireRecord {
    /// The value of [`Header::kind`] for this type.
    const KIND: u16;
    /// A kill: wakes the reader at once, and the last quarter of its ring is kept free for it.
    const VITAL: bool;
}

/// First 16 bytes of every record.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[cfg_attr(feature = "user", derive(FromBytes, IntoBytes, Immutable, KnownLayout, PartialEq, Eq))]
pub struct Header {
    /// Which record follows, see [`KINDS`].
    pub kind: u16,
    /// Size of the whole record in bytes, header included.
    pub size: u16,
    /// CPU the hook ran on.
    pub cpu: u32,
    /// When the hook ran, boot clock.
    pub boot_ns: u64,
}
const _: () = assert!(size_of::<Header>() == 16);

/// A process (thread group) and the thread of it that was seen.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[cfg_attr(feature = "user", derive(FromBytes, IntoBytes, Immutable, KnownLayout, PartialEq, Eq))]
pub struct Task {
    /// Process id (the kernel's tgid), in the initial pid namespace.
    pub tgid: u32,
    /// Thread id, in the initial pid namespace.
    pub tid: u32,
    /// Start of the process: `group_leader->start_boottime`, boot clock. With `tgid` it is unique.
    pub start_boot_ns: u64,
    /// Thread name, NUL padded, any bytes.
    pub comm: [u8; 16],
}
const _: () = assert!(size_of::<Task>() == 32);

/// One reading of a memory cgroup's page counters.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[cfg_attr(feature = "user", derive(FromBytes, IntoBytes, Immutable, KnownLayout, PartialEq, Eq))]
pub struct Memcg {
    /// kernfs id of the cgroup in the memory hierarchy: the inode number of its directory.
    pub cgroup_id: u64,
    /// `memory.usage`: what the kernel compares with the limit.
    pub usage_bytes: u64,
    /// `memory.max`; [`NO_LIMIT`] when there is none.
    pub limit_bytes: u64,
    /// `memory.watermark`: the highest usage ever.
    pub watermark_bytes: u64,
    /// `memory.failcnt`: how often a charge hit the limit.
    pub failcnt: u64,
    /// v2 `swap.usage`; on v1 `memsw.usage` (memory and swap together).
    pub swap_usage_bytes: u64,
    /// v2 `swap.max`; on v1 `memsw.max`.
    pub swap_limit_bytes: u64,
    /// `memory.high`; [`NO_LIMIT`] when there is none.
    pub high_bytes: u64,
}
const _: () = assert!(size_of::<Memcg>() == 64);

/// `limit_bytes` of a cgroup without a limit.
pub const NO_LIMIT: u64 = u64::MAX - 1;

/// Resident memory of one address space, by kind; exact sums over the per-CPU counters.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[cfg_attr(feature = "user", derive(FromBytes, IntoBytes, Immutable, KnownLayout, PartialEq, Eq))]
pub struct Rss {
    /// MM_ANONPAGES.
    pub anon_bytes: u64,
    /// MM_FILEPAGES.
    pub file_bytes: u64,
    /// MM_SHMEMPAGES.
    pub shmem_bytes: u64,
    /// MM_SWAPENTS.
    pub swap_bytes: u64,
}
const _: () = assert!(size_of::<Rss>() == 32);

/// Bytes of a path in a cgroup record; a longer path is cut and flagged.
pub const PATH_BYTES: usize = 512;
/// Frames of a kernel stack in a [`KernelStack`] or [`StackSample`] record.
pub const KERNEL_FRAMES: usize = 48;
/// Frames that the kernel found by frame pointers in a [`StackSample`] record (kernel.perf_event_max_stack is 127).
pub const USER_FRAMES: usize = 127;
/// Most bytes of a user stack that follow a [`StackSample`]: with it they stay below the largest [`Header::size`].
pub const MAX_STACK_COPY_BYTES: usize = 60 << 10;

/// [`StackSample::cause`]: resident memory grew.
pub const CAUSE_TOUCH: u32 = 1;
/// [`StackSample::cause`]: mmap or mremap.
pub const CAUSE_MAP: u32 = 2;
/// [`StackSample::cause`]: brk.
pub const CAUSE_BRK: u32 = 3;
/// [`StackSample::cause`]: charged to the cgroup in a system call.
pub const CAUSE_CHARGE: u32 = 4;

/// [`RssChange::flags`]: the per-CPU counters could not be summed, values may be off by the batch.
pub const RSS_APPROXIMATE: u32 = 1;
/// [`RssChange::flags`]: the address space is being torn down (its owner has exited).
pub const RSS_DYING: u32 = 2;

/// [`RssChange::reason`]: the sum moved by the threshold.
pub const RSS_MOVED: u32 = 1;
/// [`RssChange::reason`]: first sight of this address space (exec, fork, or found running).
pub const RSS_FIRST: u32 = 2;

/// [`Mapping::call`]: mmap(2).
pub const CALL_MMAP: u32 = 1;
/// [`Mapping::call`]: munmap(2).
pub const CALL_MUNMAP: u32 = 2;
/// [`Mapping::call`]: mremap(2).
pub const CALL_MREMAP: u32 = 3;
/// [`Mapping::call`]: brk(2).
pub const CALL_BRK: u32 = 4;
/// [`Mapping::call`]: madvise(2) that gives memory back.
pub const CALL_MADVISE: u32 = 5;

/// [`Reclaim::phase`]: reclaim on behalf of a cgroup begins (its limit or memory.high was hit).
pub const RECLAIM_BEGIN: u32 = 1;
/// [`Reclaim::phase`]: that reclaim ended.
pub const RECLAIM_END: u32 = 2;

/// [`Kill::sender_code`]: SEND_SIG_NOINFO to one thread: cgroup.kill.
pub const SENDER_NOINFO: u32 = 0;
/// [`Kill::sender_code`]: SEND_SIG_PRIV: the kernel itself, e.g. the OOM killer.
pub const SENDER_KERNEL: u32 = 1;
/// [`Kill::sender_code`]: a process sent it: a siginfo was passed, or, as by kill(2) of 7.3, none, to a whole process.
pub const SENDER_PROCESS: u32 = 2;
/// [`Kill::sender_code`]: the kernel, from a task that is exiting: the init of a pid namespace takes the namespace with
/// it (kernel/pid_namespace.c zap_pid_ns_processes).
pub const SENDER_EXITING: u32 = 3;
/// [`Kill::sender_code`]: SEND_SIG_NOINFO from a task that is exiting: its child asked for SIGKILL at its parent's death
/// (prctl PR_SET_PDEATHSIG).
pub const SENDER_PARENT: u32 = 4;

/// [`OomVictim::scope`]: which cgroup ran out was not found.
pub const SCOPE_UNKNOWN: u32 = 0;
/// [`OomVictim::scope`]: a memory cgroup ran out ([`OomVictim::oom`]).
pub const SCOPE_MEMCG: u32 = 1;
/// [`OomVictim::scope`]: no cgroup on the trigger's path was at its limit: the machine (or its cpuset) ran out.
pub const SCOPE_GLOBAL: u32 = 2;

/// [`OomVictim::flags`]: a SIGKILL sent by the kernel to the same process preceded this mark.
/// Without it the victim was only chosen while already exiting.
pub const VICTIM_KILLED: u32 = 1;
/// [`OomVictim::flags`]: `memory.oom.group` is set between the victim's cgroup and the one that ran out.
pub const VICTIM_GROUP: u32 = 2;
/// [`OomVictim::flags`]: `rss` may be off by the per-CPU batch.
pub const VICTIM_RSS_APPROXIMATE: u32 = 4;

/// [`Fork::flags`]: the child shares its parent's address space (vfork, CLONE_VM).
pub const FORK_SHARES_MM: u32 = 1;

/// [`CgroupChange::change`]: created.
pub const CGROUP_MADE: u32 = 1;
/// [`CgroupChange::change`]: removed; `memcg` holds its last reading.
pub const CGROUP_REMOVED: u32 = 2;
/// [`CgroupChange::flags`]: `path` was longer than [`PATH_BYTES`].
pub const PATH_CUT: u32 = 1;

records! {
    /// SAMPLES. Resident memory of one address space moved, with its cgroup's counters.
    1 RssChange (KIND_RSS) 184 {
        /// Owner of the address space (never merely `current`).
        task: Task,
        /// Opaque identity of the address space; equal for processes that share it.
        mm_id: u64,
        /// Counters of the owner's memory cgroup.
        memcg: Memcg,
        /// What is resident now.
        rss: Rss,
        /// Highest sum of anon, file and shmem seen by the hook for this address space.
        peak_bytes: u64,
        /// `mm->total_vm`.
        virtual_bytes: u64,
        /// Why now: [`RSS_MOVED`] or [`RSS_FIRST`].
        reason: u32,
        /// [`RSS_APPROXIMATE`], [`RSS_DYING`].
        flags: u32,
        /// Every rise of the sum of anon, file and shmem since this address space is followed,
        /// added up. For one that was made while the hook was on, what it began with is included.
        grown_bytes: u64,
    }
    /// SAMPLES. A mapping call succeeded and was large, or many small ones added up.
    2 Mapping (KIND_MAPPING) 104 {
        /// The calling thread.
        task: Task,
        /// kernfs id of its memory cgroup.
        cgroup_id: u64,
        /// Start address of the mapping now (old start for munmap and madvise, new break for brk).
        address: u64,
        /// Bytes mapped, unmapped, or advised by this call. For brk and mremap the absolute change.
        size_bytes: u64,
        /// Bytes mapped since the last record of this address space, small calls included.
        mapped_bytes: u64,
        /// Bytes given back since the last record of this address space, small calls included.
        unmapped_bytes: u64,
        /// `CALL_*`.
        call: u32,
        /// 1: grew; 0: shrank (brk, mremap).
        grew: u32,
        /// mmap: flags argument; madvise: advice; else 0.
        argument: u64,
    }
    /// SAMPLES. Reclaim in a memory cgroup: the limit was hit, a kill may follow.
    3 Reclaim (KIND_RECLAIM) 136 {
        /// The thread that has to reclaim.
        task: Task,
        /// Counters of that thread's memory cgroup.
        memcg: Memcg,
        /// End only: how long the thread reclaimed since its last end record, nanoseconds. Short
        /// reclaims have no end record of their own.
        duration_ns: u64,
        /// End only: what it reclaimed since its last end record.
        reclaimed_bytes: u64,
        /// [`RECLAIM_BEGIN`] or [`RECLAIM_END`].
        phase: u32,
        /// Begin records of this CPU not sent since the last one (rate limit).
        suppressed: u32,
    }
    /// SAMPLES. A cgroup's usage moved by the threshold: a charge (page_counter_try_charge), or
    /// what was paid back (page_counter_uncharge, or after a mapping call that gave as much back).
    4 Charge (KIND_CHARGE) 120 {
        /// The charging thread.
        task: Task,
        /// Counters of its memory cgroup, before this charge.
        memcg: Memcg,
        /// Bytes being charged; 0 when it was paid back.
        charge_bytes: u64,
    }
    /// LEDGER when the kernel sent SIGKILL, SAMPLES when somebody else did.
    16 Kill (KIND_KILL) 104 {
        /// The sender: `current`. For an OOM kill it is the thread whose allocation failed.
        sender: Task,
        /// The thread it is sent to.
        target: Task,
        /// kernfs id of the target's memory cgroup.
        cgroup_id: u64,
        /// [`SENDER_NOINFO`], [`SENDER_KERNEL`], [`SENDER_PROCESS`], [`SENDER_EXITING`], [`SENDER_PARENT`].
        sender_code: u32,
        /// The kernel's verdict on delivery (`TRACE_SIGNAL_*`): 0 delivered, 1 ignored, 2 already pending.
        result: u32,
        /// The sender's real user id, in the initial user namespace, or [`UNKNOWN_U32`]: whose share of the ledger
        /// it takes. Journals of earlier versions end before it ([`KILL_SIZE_BEFORE`]).
        sender_uid: u32,
        /// 0.
        reserved: u32,
    }
    /// LEDGER. The OOM killer marked a victim.
    17 OomVictim (KIND_OOM_VICTIM) 328 {
        /// The thread whose allocation failed (`current`), not the victim.
        trigger: Task,
        /// The victim.
        victim: Task,
        /// Counters of the trigger's own cgroup.
        trigger_memcg: Memcg,
        /// Counters of the victim's own cgroup.
        victim_memcg: Memcg,
        /// Counters of the cgroup that ran out; `cgroup_id` [`UNKNOWN`] unless `scope` is [`SCOPE_MEMCG`].
        oom: Memcg,
        /// What the victim held.
        rss: Rss,
        /// The victim's page tables (`mm->pgtables_bytes`).
        pagetable_bytes: u64,
        /// The victim's `oom_score_adj`, or [`UNKNOWN_I32`].
        oom_score_adj: i32,
        /// `SCOPE_*`.
        scope: u32,
        /// `VICTIM_*`.
        flags: u32,
        /// Boot-clock nanoseconds between the SIGKILL and this mark, saturated; 0 when not killed.
        after_kill_ns: u32,
    }
    /// LEDGER. A process was created (not a thread).
    18 Fork (KIND_FORK) 96 {
        /// The parent.
        parent: Task,
        /// The child.
        child: Task,
        /// kernfs id of the child's memory cgroup.
        cgroup_id: u64,
        /// [`FORK_SHARES_MM`].
        flags: u32,
        /// Zero.
        reserved: u32,
    }
    /// LEDGER. A process replaced its program.
    19 Exec (KIND_EXEC) 64 {
        /// The process, with its new name.
        task: Task,
        /// kernfs id of its memory cgroup.
        cgroup_id: u64,
        /// Opaque identity of its new address space.
        mm_id: u64,
    }
    /// LEDGER. The last thread of a process exited.
    20 Exit (KIND_EXIT) 128 {
        /// The process.
        task: Task,
        /// Counters of its memory cgroup, after its memory was given back.
        memcg: Memcg,
        /// `signal->maxrss`: the kernel's own peak RSS, what wait4 reports.
        max_rss_bytes: u64,
        /// `signal->group_exit_code` or `task->exit_code`: status in bits 8 to 15, signal in bits 0 to 6.
        exit_code: u32,
        /// Zero.
        reserved: u32,
    }
    /// LEDGER. An address space is gone (exit_mmap).
    21 MmGone (KIND_MM_GONE) 80 {
        /// Its owner, as last seen.
        task: Task,
        /// Opaque identity of the address space.
        mm_id: u64,
        /// kernfs id of the memory cgroup it was last seen in.
        cgroup_id: u64,
        /// Highest sum of anon, file and shmem, from the hook and `mm->hiwater_rss`.
        peak_bytes: u64,
        /// As [`RssChange::grown_bytes`].
        grown_bytes: u64,
    }
    /// LEDGER. A memory cgroup was created or removed.
    22 CgroupChange (KIND_CGROUP) 616 {
        /// Counters; after creation mostly zero, at removal the last reading.
        memcg: Memcg,
        /// kernfs id of its parent.
        parent_id: u64,
        /// `CGROUP_MADE` or `CGROUP_REMOVED`.
        change: u32,
        /// [`PATH_CUT`].
        flags: u32,
        /// Bytes used in `path`.
        path_len: u64,
        /// Path from the root of the memory hierarchy, starting with `/`, any bytes.
        path: [u8; PATH_BYTES],
    }
    /// LEDGER. A process (or one thread of it) moved into a memory cgroup.
    23 CgroupAttach (KIND_ATTACH) 64 {
        /// The thread that moved.
        task: Task,
        /// kernfs id of the cgroup it moved into.
        cgroup_id: u64,
        /// 1 when the whole process moved.
        whole_process: u64,
    }
    /// LEDGER. The kernel decided on an OOM kill (oom_kill_process, where it can be hooked).
    24 OomDecision (KIND_OOM_DECISION) 152 {
        /// The thread whose allocation failed.
        trigger: Task,
        /// The chosen victim.
        chosen: Task,
        /// Counters of `oom_control.memcg`; `cgroup_id` [`UNKNOWN`] for a global OOM.
        oom: Memcg,
        /// `oom_control.constraint`: 0 none, 1 cpuset, 2 mempolicy, 3 memcg; [`u32::MAX`] unknown.
        constraint: u32,
        /// `oom_control.order`: allocation order; -1 for sysrq.
        order: i32,
    }
    /// STACKS. Kernel stack of the thread whose charge failed, taken at [`OomVictim`].
    32 KernelStack (KIND_KERNEL_STACK) 456 {
        /// The trigger.
        task: Task,
        /// Process id of the victim this stack belongs to.
        victim_tgid: u32,
        /// Frames used in `addresses`.
        frames: u32,
        /// Victim's start, boot clock.
        victim_start_boot_ns: u64,
        /// Return addresses, innermost first. Kernel addresses: never written to disk.
        addresses: [u64; KERNEL_FRAMES],
        /// Zero.
        reserved: u64,
    }
}

/// Largest record in bytes, but for [`StackSample`].
pub const MAX_RECORD_BYTES: usize = 616;

/// STACKS, kind [`KIND_STACK_SAMPLE`]. A process, or a cgroup, grew by its sample interval: which
/// code did it. Followed by `stack_copy_bytes` bytes of the thread's stack, from `sp` up: they hold
/// secrets and are never to be written anywhere.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[cfg_attr(feature = "user", derive(FromBytes, IntoBytes, Immutable, KnownLayout, PartialEq, Eq))]
pub struct StackSample {
    /// Kind, size with the stack copy, CPU and time.
    pub header: Header,
    /// The running thread.
    pub task: Task,
    /// Opaque identity of its address space; 0 for a charge.
    pub mm_id: u64,
    /// kernfs id of the memory cgroup that grew.
    pub cgroup_id: u64,
    /// Bytes this sample stands for: what grew since the last one of the same kind.
    pub weight_bytes: u64,
    /// Touch: as [`RssChange::grown_bytes`], this sample included; else 0.
    pub grown_bytes: u64,
    /// Touch: the address that was touched. Map, brk: where the mapping begins. Else, and where not known, [`UNKNOWN`].
    pub address: u64,
    /// Map: size of the mapping. Brk: growth since the last brk sample. Else 0.
    pub size_bytes: u64,
    /// User instruction pointer; 0 when the registers could not be read.
    pub ip: u64,
    /// User stack pointer.
    pub sp: u64,
    /// User frame pointer: rbp, or x29.
    pub bp: u64,
    /// aarch64: link register, x30; else 0.
    pub lr: u64,
    /// `CAUSE_*`.
    pub cause: u32,
    /// Zero.
    pub reserved: u32,
    /// Frames used in `kernel`.
    pub kernel_frames: u32,
    /// Frames used in `user`.
    pub user_frames: u32,
    /// Bytes of stack that follow.
    pub stack_copy_bytes: u32,
    /// Most bytes of stack that were asked for: with fewer the stack ended, or a page of it could not be read.
    pub stack_copy_cap_bytes: u32,
    /// Kernel return addresses, innermost first: never written anywhere.
    pub kernel: [u64; KERNEL_FRAMES],
    /// User addresses that the kernel found by frame pointers, innermost first.
    pub user: [u64; USER_FRAMES],
}
const _: () = assert!(size_of::<StackSample>() == 1552);
const _: () = assert!(size_of::<StackSample>() + MAX_STACK_COPY_BYTES < u16::MAX as usize);

/// Header kind of [`StackSample`].
pub const KIND_STACK_SAMPLE: u16 = 33;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_are_unique_and_the_largest_is_stated() {
        for (i, (kind, size, name)) in KINDS.iter().enumerate() {
            assert!(KINDS[i + 1..].iter().all(|(k, ..)| k != kind), "{name} reuses kind {kind}");
            assert!(*size <= MAX_RECORD_BYTES, "{name}");
        }
        assert!(KINDS.iter().any(|(_, size, _)| *size == MAX_RECORD_BYTES));
    }
}
