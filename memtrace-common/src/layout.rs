//! Where the running kernel keeps what memtrace reads: offsets in bytes, named here, found in the
//! kernel's own BTF by userspace (`kernel/btf.rs`), read by the eBPF side (`kernel.rs`).
//!
//! The struct is frozen into .rodata before the programs load, so a branch on an absent field is
//! dead code to the verifier.

/// A field this kernel does not have.
pub const ABSENT: u32 = u32::MAX;

/// Declares [`KernelLayout`] together with the table userspace fills it from.
macro_rules! layout {
    ($($(#[$meta:meta])* $need:ident $field:ident = $kind:ident($($arg:literal),+);)*) => {
        /// Offsets (bytes) and facts of one kernel. Every field is a `u32`; [`ABSENT`] where the kernel has none.
        #[repr(C)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub struct KernelLayout {
            $($(#[$meta])* pub $field: u32,)*
        }

        impl KernelLayout {
            /// A layout with nothing found.
            pub const NOTHING: Self = Self { $($field: ABSENT,)* };

            /// Fills every field through `find`; names the required ones that were not found.
            ///
            /// `missing` is called once for each [`FieldNeed::Required`] field that stays
            /// [`ABSENT`].
            pub fn fill(
                mut find: impl FnMut(&FieldSource) -> Option<u32>,
                mut missing: impl FnMut(&'static str, &FieldSource),
            ) -> Self {
                let mut layout = Self::NOTHING;
                $(
                    let source = FieldSource::$kind($($arg),+);
                    match find(&source) {
                        Some(value) => layout.$field = value,
                        None if matches!(FieldNeed::$need, FieldNeed::Required) => missing(stringify!($field), &source),
                        None => {}
                    }
                )*
                layout
            }

            /// Every field by name, in order, for reports and snapshots.
            pub fn each(&self, mut show: impl FnMut(&'static str, u32)) {
                $(show(stringify!($field), self.$field);)*
            }
        }
    };
}

/// Whether memtrace can do without a field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FieldNeed {
    /// Without it the rss and OOM hooks mean nothing.
    Required,
    /// Without it one value is unknown or one hook does less.
    Optional,
}

/// How a layout field is found in BTF. A path such as `"memory.usage"` descends through members,
/// anonymous structs and unions included; alternatives are separated by `|`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FieldSource {
    /// Byte offset of a member path in a struct: `Member("mm_struct", "owner")`.
    Member(&'static str, &'static str),
    /// Size in bytes of a struct: `Size("percpu_counter")`.
    Size(&'static str),
    /// Value of an enumerator: `Enumerator("memory_cgrp_id")`.
    Enumerator(&'static str),
    /// 1 when a member's type is an array of the named struct, 0 when it is something else:
    /// `IsArrayOf("mm_struct", "rss_stat", "percpu_counter")`.
    IsArrayOf(&'static str, &'static str, &'static str),
    /// Number of parameters of a tracepoint's `btf_trace_*` prototype, the leading context pointer not counted.
    TracepointArgs(&'static str),
    /// 1 when a tracepoint parameter (0-based, context not counted) is a pointer, 0 when it is a number.
    TracepointArgIsPointer(&'static str, u32),
}

layout! {
    /// `task_struct.mm`: the address space.
    Required task_mm = Member("task_struct", "mm");
    /// `task_struct.pid`: thread id.
    Required task_pid = Member("task_struct", "pid");
    /// `task_struct.tgid`: process id.
    Required task_tgid = Member("task_struct", "tgid");
    /// `task_struct.comm`.
    Required task_comm = Member("task_struct", "comm");
    /// `task_struct.group_leader`.
    Required task_group_leader = Member("task_struct", "group_leader");
    /// `task_struct.start_boottime` (`real_start_time` before 5.5).
    Required task_start_boottime = Member("task_struct", "start_boottime|real_start_time");
    /// `task_struct.flags`: PF_KTHREAD.
    Required task_flags = Member("task_struct", "flags");
    /// `task_struct.cgroups`: the css_set.
    Required task_cgroups = Member("task_struct", "cgroups");
    /// `task_struct.signal`.
    Required task_signal = Member("task_struct", "signal");
    /// `task_struct.exit_code`.
    Optional task_exit_code = Member("task_struct", "exit_code");
    /// `task_struct.rss_stat`: the per-task cache of 6.1 and older (SPLIT_RSS_COUNTING).
    Optional task_rss_cache = Member("task_struct", "rss_stat.count");
    /// `signal_struct.oom_score_adj`.
    Optional signal_oom_score_adj = Member("signal_struct", "oom_score_adj");
    /// `signal_struct.maxrss`: pages.
    Optional signal_maxrss = Member("signal_struct", "maxrss");
    /// `signal_struct.live`: threads still alive (atomic_t).
    Optional signal_live = Member("signal_struct", "live");
    /// `signal_struct.group_exit_code`.
    Optional signal_group_exit_code = Member("signal_struct", "group_exit_code");
    /// `mm_struct.rss_stat`: the counters.
    Required mm_rss_stat = Member("mm_struct", "rss_stat");
    /// 1: an array of percpu_counter (6.2 and newer); 0: atomic longs.
    Required rss_is_percpu = IsArrayOf("mm_struct", "rss_stat", "percpu_counter");
    /// `mm_struct.owner` (CONFIG_MEMCG).
    Optional mm_owner = Member("mm_struct", "owner");
    /// `mm_struct.total_vm`: pages.
    Optional mm_total_vm = Member("mm_struct", "total_vm");
    /// `mm_struct.hiwater_rss`: pages.
    Optional mm_hiwater_rss = Member("mm_struct", "hiwater_rss");
    /// `mm_struct.pgtables_bytes` (atomic_long).
    Optional mm_pgtables_bytes = Member("mm_struct", "pgtables_bytes");
    /// `mm_struct.brk`: the current break.
    Optional mm_brk = Member("mm_struct", "brk");
    /// Size of one percpu_counter.
    Optional percpu_counter_size = Size("percpu_counter");
    /// `percpu_counter.count`.
    Optional percpu_counter_count = Member("percpu_counter", "count");
    /// `percpu_counter.counters`: per-CPU pointer to s32.
    Optional percpu_counter_counters = Member("percpu_counter", "counters");
    /// `bpf_array.pptrs`: how the per-CPU bases are learnt.
    Optional bpf_array_pptrs = Member("bpf_array", "pptrs");
    /// `css_set.subsys`.
    Required css_set_subsys = Member("css_set", "subsys");
    /// Index of the memory controller in it.
    Required memory_cgrp_id = Enumerator("memory_cgrp_id");
    /// `cgroup_subsys_state.cgroup`; the css is the first member of mem_cgroup.
    Required css_cgroup = Member("cgroup_subsys_state", "cgroup");
    /// `cgroup.kn`.
    Required cgroup_kn = Member("cgroup", "kn");
    /// `cgroup.root`.
    Required cgroup_root = Member("cgroup", "root");
    /// `cgroup.subsys`: the css pointers of a cgroup.
    Required cgroup_subsys = Member("cgroup", "subsys");
    /// `cgroup_root.hierarchy_id`.
    Required cgroup_root_hierarchy_id = Member("cgroup_root", "hierarchy_id");
    /// `kernfs_node.id`: the inode number.
    Required kernfs_id = Member("kernfs_node", "id");
    /// `kernfs_node.parent` (`__parent` from 6.16).
    Optional kernfs_parent = Member("kernfs_node", "parent|__parent");
    /// `mem_cgroup.memory`: the page counter that is compared with the limit.
    Required memcg_memory = Member("mem_cgroup", "memory");
    /// `mem_cgroup.swap` (v2) or `memsw` (v1), a union.
    Optional memcg_swap = Member("mem_cgroup", "swap");
    /// `mem_cgroup.oom_group`.
    Optional memcg_oom_group = Member("mem_cgroup", "oom_group");
    /// `page_counter.usage` (atomic_long, pages).
    Required counter_usage = Member("page_counter", "usage");
    /// `page_counter.max`: pages.
    Required counter_max = Member("page_counter", "max");
    /// `page_counter.high`: pages.
    Optional counter_high = Member("page_counter", "high");
    /// `page_counter.watermark`: pages.
    Optional counter_watermark = Member("page_counter", "watermark");
    /// `page_counter.failcnt`.
    Optional counter_failcnt = Member("page_counter", "failcnt");
    /// `page_counter.parent`.
    Optional counter_parent = Member("page_counter", "parent");
    /// `oom_control.memcg`.
    Optional oom_memcg = Member("oom_control", "memcg");
    /// `oom_control.order`.
    Optional oom_order = Member("oom_control", "order");
    /// `oom_control.chosen`.
    Optional oom_chosen = Member("oom_control", "chosen");
    /// `oom_control.constraint`.
    Optional oom_constraint = Member("oom_control", "constraint");
    /// Index of file pages in rss_stat.
    Required mm_filepages = Enumerator("MM_FILEPAGES");
    /// Index of anonymous pages.
    Required mm_anonpages = Enumerator("MM_ANONPAGES");
    /// Index of swap entries.
    Required mm_swapents = Enumerator("MM_SWAPENTS");
    /// Index of shared memory pages.
    Required mm_shmempages = Enumerator("MM_SHMEMPAGES");
    /// 1: `mark_victim(task, uid)`; 0: `mark_victim(pid)`.
    Optional mark_victim_is_task = TracepointArgIsPointer("mark_victim", 0);
    /// Parameters of sched_process_exit: 2 from 6.16 (`group_dead`).
    Optional exit_args = TracepointArgs("sched_process_exit");
    /// `pt_regs.orig_ax` (x86_64): system call number.
    Optional regs_orig_ax = Member("pt_regs", "orig_ax");
    /// `pt_regs.di`: first argument.
    Optional regs_di = Member("pt_regs", "di");
    /// `pt_regs.si`: second argument.
    Optional regs_si = Member("pt_regs", "si");
    /// `pt_regs.dx`: third argument.
    Optional regs_dx = Member("pt_regs", "dx");
    /// `pt_regs.r10`: fourth argument.
    Optional regs_r10 = Member("pt_regs", "r10");
    /// `pt_regs.cs`: tells 32-bit callers.
    Optional regs_cs = Member("pt_regs", "cs");
    /// `pt_regs.syscallno` (arm64).
    Optional regs_syscallno = Member("pt_regs", "syscallno");
    /// `pt_regs.orig_x0` (arm64): first argument, kept over the call.
    Optional regs_orig_x0 = Member("pt_regs", "orig_x0");
    /// `pt_regs.regs` (arm64): x0 to x30.
    Optional regs_regs = Member("pt_regs", "user_regs.regs|regs");
    /// `pt_regs.pstate` (arm64): bit 4 tells 32-bit callers.
    Optional regs_pstate = Member("pt_regs", "user_regs.pstate|pstate");
    /// `pt_regs.ip` (x86_64): instruction pointer.
    Optional regs_ip = Member("pt_regs", "ip");
    /// `pt_regs.sp`: stack pointer.
    Optional regs_sp = Member("pt_regs", "sp|user_regs.sp");
    /// `pt_regs.bp` (x86_64): frame pointer.
    Optional regs_bp = Member("pt_regs", "bp");
    /// `pt_regs.pc` (arm64): instruction pointer.
    Optional regs_pc = Member("pt_regs", "user_regs.pc|pc");
    /// Size of `pt_regs`: they are at the end of the kernel stack.
    Optional regs_size = Size("pt_regs");
    /// `vm_fault.vma`: the mapping a fault is in.
    Optional fault_vma = Member("vm_fault", "vma");
    /// `vm_fault.address`: its page.
    Optional fault_address = Member("vm_fault", "address");
    /// `vm_area_struct.vm_mm`: the address space of a mapping.
    Optional vma_mm = Member("vm_area_struct", "vm_mm");
    /// `vm_area_struct.vm_start`.
    Optional vma_start = Member("vm_area_struct", "vm_start");
    /// `vm_area_struct.vm_end`.
    Optional vma_end = Member("vm_area_struct", "vm_end");
    /// `task_struct.stack`: the kernel stack.
    Optional task_stack = Member("task_struct", "stack");
}
