//! The hooks: their stable names, the programs behind them, what each needs and what is lost without it.
//!
//! A hook has up to three programs in order of preference, of which one runs. `map`, for example,
//! is best served by fexit programs on the five mapping calls, of x86_64 or of aarch64; where the
//! kernel cannot attach to functions, one program on the tracepoint `sys_exit` sees the same calls
//! among all others.

use serde::{Deserialize, Serialize};

/// An event of the kernel that memtrace is told of. The names are what `--without` takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum Hook {
    /// Resident memory of every process.
    Rss,
    /// The OOM killer marks its victim.
    Oom,
    /// SIGKILL is sent, by the kernel or by a process.
    Kill,
    /// A process starts.
    Fork,
    /// A process executes another program.
    Exec,
    /// A process ends.
    Exit,
    /// An address space ends.
    ExitMmap,
    /// A cgroup is made.
    CgroupMkdir,
    /// A cgroup is removed.
    CgroupRmdir,
    /// A process moves to another cgroup.
    CgroupAttach,
    /// A cgroup at its limit begins to reclaim.
    ReclaimBegin,
    /// Reclaim for a cgroup ends.
    ReclaimEnd,
    /// mmap, munmap, mremap, brk or madvise returns.
    Map,
    /// The OOM killer decides to kill.
    OomDecision,
    /// A charge against a memory cgroup.
    Charge,
}

/// Whether memtrace runs at all without a hook.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum HookNeed {
    /// Without it what memtrace says would be wrong.
    Required,
    /// Without it something is lost, and the loss is reported.
    Optional,
}

/// A kernel function, with what its program takes for granted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Function {
    /// Its name.
    pub name: &'static str,
    /// How many parameters it has; with another number the program would read the wrong ones.
    pub args: u32,
    /// The architecture (`uname -m`) whose kernels have it; `None`: every kernel.
    pub arch: Option<&'static str>,
}

/// As its name.
impl Serialize for Function {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name)
    }
}

/// `oom_kill_process(oc, message)`.
const OOM_KILL_PROCESS: Function = Function { name: "oom_kill_process", args: 2, arch: None };
/// `page_counter_try_charge(counter, pages, fail)`.
const TRY_CHARGE: Function = Function { name: "page_counter_try_charge", args: 3, arch: None };
/// `page_counter_uncharge(counter, pages)`.
const UNCHARGE: Function = Function { name: "page_counter_uncharge", args: 2, arch: None };

/// What `uname -m` says.
const X86_64: &str = "x86_64";
/// What `uname -m` says.
const AARCH64: &str = "aarch64";

/// Charges and what is paid back.
const CHARGES_FENTRY: Program = fentry("charge_fentry", TRY_CHARGE).together(&[fentry("uncharge_fentry", UNCHARGE)]);
const CHARGES_KPROBE: Program = kprobe("charge_kprobe", TRY_CHARGE).together(&[kprobe("uncharge_kprobe", UNCHARGE)]);
/// The mapping calls of x86_64 (arch/x86/include/asm/syscall_wrapper.h).
const CALLS_X86: Program = syscall_exit("mmap_exit", "__x64_sys_mmap", X86_64).together(&[
    syscall_exit("munmap_exit", "__x64_sys_munmap", X86_64),
    syscall_exit("mremap_exit", "__x64_sys_mremap", X86_64),
    syscall_exit("brk_exit", "__x64_sys_brk", X86_64),
    syscall_exit("madvise_exit", "__x64_sys_madvise", X86_64),
]);
/// The mapping calls of aarch64 (arch/arm64/include/asm/syscall_wrapper.h).
const CALLS_ARM64: Program = syscall_exit("mmap_exit", "__arm64_sys_mmap", AARCH64).together(&[
    syscall_exit("munmap_exit", "__arm64_sys_munmap", AARCH64),
    syscall_exit("mremap_exit", "__arm64_sys_mremap", AARCH64),
    syscall_exit("brk_exit", "__arm64_sys_brk", AARCH64),
    syscall_exit("madvise_exit", "__arm64_sys_madvise", AARCH64),
]);

/// How a program is attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "kind", content = "target", rename_all = "snake_case")]
pub enum Attach {
    /// A raw tracepoint, by the tracepoint's name.
    RawTracepoint(&'static str),
    /// A BTF tracepoint: a raw one whose arguments have types the verifier knows.
    TypedTracepoint(&'static str),
    /// The entry of a function, by a BPF trampoline (5.5).
    Fentry(Function),
    /// The exit of a function, by a BPF trampoline (5.5).
    Fexit(Function),
    /// The entry of a function, by a breakpoint.
    Kprobe(Function),
}

impl std::fmt::Display for Attach {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::RawTracepoint(target) => write!(f, "raw tracepoint {target}"),
            Self::TypedTracepoint(target) => write!(f, "typed tracepoint {target}"),
            Self::Fentry(target) => write!(f, "fentry {}", target.name),
            Self::Fexit(target) => write!(f, "fexit {}", target.name),
            Self::Kprobe(target) => write!(f, "kprobe {}", target.name),
        }
    }
}

impl Attach {
    /// The function, unless it is a tracepoint.
    pub const fn function(self) -> Option<Function> {
        match self {
            Self::RawTracepoint(_) | Self::TypedTracepoint(_) => None,
            Self::Fentry(function) | Self::Fexit(function) | Self::Kprobe(function) => Some(function),
        }
    }
}

/// One eBPF program: its function in the object and where it is attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Program {
    /// Function name in the object.
    pub name: &'static str,
    /// Where it is attached.
    pub attach: Attach,
    /// Programs that are attached together with it: all or none.
    #[serde(skip_serializing_if = "<[Self]>::is_empty")]
    pub with: &'static [Self],
}

/// For people: `fexit __x64_sys_mmap and 4 more`.
impl std::fmt::Display for Program {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.attach)?;
        if !self.with.is_empty() {
            write!(f, " and {} more", self.with.len())?;
        }
        Ok(())
    }
}

impl Program {
    /// The program and what is attached with it.
    pub fn all(&self) -> impl Iterator<Item = &Self> {
        std::iter::once(self).chain(self.with)
    }

    const fn together(self, with: &'static [Self]) -> Self {
        Self { with, ..self }
    }
}

const fn raw(name: &'static str, tracepoint: &'static str) -> Program {
    Program { name, attach: Attach::RawTracepoint(tracepoint), with: &[] }
}

const fn typed(name: &'static str, tracepoint: &'static str) -> Program {
    Program { name, attach: Attach::TypedTracepoint(tracepoint), with: &[] }
}

const fn fentry(name: &'static str, function: Function) -> Program {
    Program { name, attach: Attach::Fentry(function), with: &[] }
}

/// A system call's function: `regs`, the user's registers, is its only parameter (arch/*/include/asm/syscall_wrapper.h).
const fn syscall_exit(program: &'static str, name: &'static str, arch: &'static str) -> Program {
    Program { name: program, attach: Attach::Fexit(Function { name, args: 1, arch: Some(arch) }), with: &[] }
}

const fn kprobe(name: &'static str, function: Function) -> Program {
    Program { name, attach: Attach::Kprobe(function), with: &[] }
}

impl Hook {
    /// Every hook, in the order of attaching and reporting.
    pub const ALL: [Self; 15] = [
        Self::Rss,
        Self::Oom,
        Self::Kill,
        Self::Fork,
        Self::Exec,
        Self::Exit,
        Self::ExitMmap,
        Self::CgroupMkdir,
        Self::CgroupRmdir,
        Self::CgroupAttach,
        Self::ReclaimBegin,
        Self::ReclaimEnd,
        Self::Map,
        Self::OomDecision,
        Self::Charge,
    ];

    /// The stable name.
    pub const fn name(self) -> &'static str {
        self.about().name
    }

    /// Whether memtrace runs without it.
    pub const fn need(self) -> HookNeed {
        self.about().need
    }

    /// Its programs in order of preference; the first that the kernel takes is used.
    pub const fn programs(self) -> &'static [Program] {
        self.about().programs
    }

    /// Sets of [`memtrace_common::layout::KernelLayout`] fields: it works when one set is there in full.
    pub const fn fields(self) -> &'static [&'static [&'static str]] {
        self.about().fields
    }

    /// What is lost without it, one sentence.
    pub const fn lost(self) -> &'static str {
        self.about().lost
    }

    /// The hook of this name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|hook| hook.name() == name)
    }

    const fn about(self) -> About {
        match self {
            Self::Rss => RSS,
            Self::Oom => OOM,
            Self::Kill => KILL,
            Self::Fork => FORK,
            Self::Exec => EXEC,
            Self::Exit => EXIT,
            Self::ExitMmap => EXIT_MMAP,
            Self::CgroupMkdir => CGROUP_MKDIR,
            Self::CgroupRmdir => CGROUP_RMDIR,
            Self::CgroupAttach => CGROUP_ATTACH,
            Self::ReclaimBegin => RECLAIM_BEGIN,
            Self::ReclaimEnd => RECLAIM_END,
            Self::Map => MAP,
            Self::OomDecision => OOM_DECISION,
            Self::Charge => CHARGE,
        }
    }
}

/// The table behind [`Hook`]'s functions.
struct About {
    name: &'static str,
    need: HookNeed,
    programs: &'static [Program],
    fields: &'static [&'static [&'static str]],
    lost: &'static str,
}

use HookNeed::{Optional, Required};

const ANY: &[&[&str]] = &[];

const RSS: About = About {
    name: "rss",
    need: Required,
    programs: const { &[typed("rss_stat_btf", "rss_stat"), raw("rss_stat", "rss_stat")] },
    fields: ANY,
    lost: "There is no timeline of memory and nothing to attribute growth with.",
};

const OOM: About = About {
    name: "oom",
    need: Required,
    programs: const { &[raw("mark_victim", "mark_victim")] },
    fields: &[&["mark_victim_is_task"]],
    lost: "OOM kills are not seen.",
};

const KILL: About = About {
    name: "kill",
    need: Required,
    programs: const { &[raw("signal_generate", "signal_generate")] },
    fields: ANY,
    lost: "A process the OOM killer killed cannot be told from one it only marked, \
           and group kills are not seen in full.",
};

const FORK: About = About {
    name: "fork",
    need: Required,
    programs: const { &[raw("process_fork", "sched_process_fork")] },
    fields: ANY,
    lost: "New processes have no parent and no start, so memory cannot be tied to a process.",
};

const EXEC: About = About {
    name: "exec",
    need: Required,
    programs: const { &[raw("process_exec", "sched_process_exec")] },
    fields: ANY,
    lost: "Processes keep the name and the address space of the program they were forked from.",
};

const EXIT: About = About {
    name: "exit",
    need: Required,
    programs: const { &[raw("process_exit", "sched_process_exit")] },
    fields: ANY,
    lost: "Processes never end, so memory is counted that is long freed.",
};

const EXIT_MMAP: About = About {
    name: "exit_mmap",
    need: Optional,
    programs: const { &[raw("exit_mmap", "exit_mmap")] },
    fields: ANY,
    lost: "The end of an address space is told by the exit of its process, a little early.",
};

const CGROUP_MKDIR: About = About {
    name: "cgroup_mkdir",
    need: Optional,
    programs: const { &[raw("cgroup_mkdir", "cgroup_mkdir")] },
    fields: ANY,
    lost: "Cgroups that live for less than a moment stay without a path.",
};

const CGROUP_RMDIR: About = About {
    name: "cgroup_rmdir",
    need: Optional,
    programs: const { &[raw("cgroup_rmdir", "cgroup_rmdir")] },
    fields: ANY,
    lost: "Removed cgroups are forgotten by age only.",
};

const CGROUP_ATTACH: About = About {
    name: "cgroup_attach",
    need: Optional,
    programs: const { &[raw("cgroup_attach", "cgroup_attach_task")] },
    fields: ANY,
    lost: "A process that moves to another cgroup is noticed at its next reading.",
};

const RECLAIM_BEGIN: About = About {
    name: "reclaim_begin",
    need: Optional,
    programs: const { &[raw("reclaim_begin", "mm_vmscan_memcg_reclaim_begin")] },
    fields: ANY,
    lost: "There is no warning before a kill, and near misses are not seen.",
};

const RECLAIM_END: About = About {
    name: "reclaim_end",
    need: Optional,
    programs: const { &[raw("reclaim_end", "mm_vmscan_memcg_reclaim_end")] },
    fields: ANY,
    lost: "How long tasks were held up by reclaim is unknown.",
};

const MAP: About = About {
    name: "map",
    need: Optional,
    programs: const { &[CALLS_X86, CALLS_ARM64, raw("sys_exit", "sys_exit")] },
    fields: &[
        &["regs_orig_ax", "regs_di", "regs_si", "regs_dx", "regs_r10"],
        &["regs_syscallno", "regs_orig_x0", "regs_regs"],
    ],
    lost: "The list of mappings (mmap, brk and their kin) is empty, and so are the allocation paths of these calls.",
};

const OOM_DECISION: About = About {
    name: "oom_decision",
    need: Optional,
    programs: const { &[fentry("oom_decision_fentry", OOM_KILL_PROCESS), kprobe("oom_decision_kprobe", OOM_KILL_PROCESS)] },
    fields: &[&["oom_memcg", "oom_chosen"]],
    lost: "The cgroup that ran out is inferred from the page counters and the kernel log \
           instead of read from the OOM killer.",
};

const CHARGE: About = About {
    name: "charge",
    need: Optional,
    programs: &[CHARGES_FENTRY, CHARGES_KPROBE],
    fields: ANY,
    lost: "Growth that is not a process's own memory (page cache, sockets, kernel) is only seen \
           when a process of the cgroup changes, reclaims or is killed.",
};

impl std::fmt::Display for Hook {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}
