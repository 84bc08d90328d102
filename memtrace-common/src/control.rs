//! What userspace gives the kernel side before and while it runs, and what the kernel side counts.

/// Settings, frozen into .rodata at load. All sizes are bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(zerocopy::IntoBytes, zerocopy::Immutable))]
pub struct Control {
    /// RSS threshold (flag `--quantum`): emit when resident memory, or a cgroup's usage, moved by
    /// this much. A cgroup can have a threshold of its own.
    pub rss_threshold_bytes: u64,
    /// Emit a [`crate::event::Mapping`] when calls add up to this much.
    pub mapping_bytes: u64,
    /// XORed into addresses of `mm_struct`s that identify address spaces, so that records and the
    /// journal hold no kernel addresses.
    pub mm_salt: u64,
    /// Hierarchy of the memory controller: 0 on cgroup v2.
    pub memory_hierarchy_id: u32,
    /// CPUs that can come online (length of the per-CPU counters), at most [`MAX_CPUS`].
    pub cpus: u32,
    /// log2 of the page size.
    pub page_shift: u32,
    /// 1 when the running kernel has bpf_map_lookup_percpu_elem (5.19), by which per-CPU counters are summed.
    pub percpu_lookup: u32,
    /// 1 when the exit_mmap hook is planned: an address space ends with its call, else with its
    /// last page.
    pub exit_mmap: u32,
    /// 1 when the running kernel has bpf_task_pt_regs (5.15), by which user registers are found.
    pub task_pt_regs: u32,
    /// Minimum time between two reclaim-begin records of one CPU, in nanoseconds.
    pub reclaim_interval_ns: u64,
    /// Take a stack when a process, or a cgroup, grew by this much; 0: take none. A cgroup can have
    /// an interval of its own.
    pub sample_interval_bytes: u64,
    /// Parts per million of one CPU's time that taking and unwinding stacks may cost.
    pub stack_budget_ppm: u64,
    /// Bytes of user stack to copy, unless the process has its own number.
    pub stack_copy_bytes: u32,
    /// Size of a kernel stack (THREAD_SIZE): where user registers are without bpf_task_pt_regs; 0 when unknown.
    pub thread_bytes: u32,
    /// 1: there is no rss hook, so address spaces are read at charges.
    pub rss_from_charges: u32,
    /// Zero.
    pub reserved: u32,
}

/// Name of the `Control` global in the object.
pub const CONTROL: &str = "CONTROL";
/// Name of the [`crate::layout::KernelLayout`] global in the object.
pub const LAYOUT: &str = "LAYOUT";

/// Most CPUs whose counter slots are summed.
pub const MAX_CPUS: u32 = 512;

/// The rings, by what may be lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u32)]
pub enum Ring {
    /// Kills, forks, execs, exits, cgroup life: not to be lost. A kill wakes the reader at once,
    /// and the last quarter of the ring is kept free for kills.
    Ledger = 0,
    /// Memory readings, mappings, reclaim, charges: a lost one makes a curve coarser.
    Samples = 1,
    /// Stacks: large, and nothing else depends on them.
    Stacks = 2,
}

/// Every ring with the name of its map and its label in metrics and reports.
pub const RINGS: [(Ring, &str, &str); 3] =
    [(Ring::Ledger, "LEDGER", "ledger"), (Ring::Samples, "SAMPLES", "samples"), (Ring::Stacks, "STACKS", "stacks")];

/// Why a record, or part of what it should say, was lost on the kernel side.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u32)]
pub enum LossReason {
    /// The ring had no room.
    RingFull = 0,
    /// The table of address spaces was full: the process is not followed.
    TableFull = 1,
    /// A victim that was marked by a bare pid and could not be found.
    NoOwner = 2,
    /// What a record is about could not be read: the cgroup of an owner, the address space of a victim.
    Unreadable = 3,
    /// Left out on purpose to bound the rate.
    RateLimited = 4,
    /// A 32-bit caller's mapping call, whose arguments are not read.
    Compat = 5,
    /// Two threads mapped at once: the stack of one stands for the bytes of both, the other mapping has none.
    Merged = 6,
}

/// What taking stacks has cost, and may: the value of the STACK_BUDGET map.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable))]
pub struct StackBudget {
    /// Time that may be spent now, nanoseconds; below 0 nothing is taken.
    pub tokens_ns: i64,
    /// When `tokens_ns` was last added to, boot clock.
    pub filled_ns: u64,
    /// What userspace had spent on stacks when it was last taken off `tokens_ns`, nanoseconds.
    pub user_spent_ns: u64,
    /// Time spent in the kernel on stacks since the start, nanoseconds.
    pub spent_ns: u64,
    /// Stacks taken.
    pub taken: u64,
    /// Stacks left out because the budget was used up: the next one stands for their bytes too.
    pub thinned: u64,
    /// As `tokens_ns`, of the eighth of the budget that is kept for growth of many intervals
    /// without a stack.
    pub large_tokens_ns: i64,
}

/// How many [`LossReason`]s there are.
pub const LOSS_REASONS: u32 = 7;

/// Labels of [`LossReason`], by its number.
pub const LOSS_LABELS: [&str; LOSS_REASONS as usize] =
    ["ring_full", "table_full", "no_owner", "unreadable", "rate_limited", "compat", "merged"];

/// Index into the LOSSES per-CPU array.
pub const fn loss_index(ring: Ring, reason: LossReason) -> u32 {
    ring as u32 * LOSS_REASONS + reason as u32
}

/// Length of the LOSSES per-CPU array.
pub const LOSS_SLOTS: u32 = 3 * LOSS_REASONS;
/// Length of the SENT per-CPU array: records put into each ring.
pub const SENT_SLOTS: u32 = 3;
