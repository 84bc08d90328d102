//! The hooks: their stable names, the programs behind them, what each needs and what is lost without it.

use serde::{Deserialize, Serialize};

/// A place in the kernel memtrace listens at. The names are what `--without` takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum Hook {
    /// Resident memory of every process.
    Rss,
    /// The OOM killer marks its victim.
    Oom,
    /// SIGKILL sent by the kernel.
    Kill,
    /// A process starts.
    Fork,
    /// A process becomes another program.
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
    /// It has reclaimed.
    ReclaimEnd,
    /// A page fault of user code.
    Fault,
    /// mmap, brk and their kin return.
    Map,
    /// The OOM killer decides.
    OomDecision,
    /// A charge against a memory cgroup.
    Charge,
}

/// Whether memtrace runs at all without a hook.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// Without it memtrace has nothing true to say.
    Required,
    /// Without it something is lost, and said.
    Optional,
}

/// How a program is attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "kind", content = "target", rename_all = "snake_case")]
pub enum Attach {
    /// A raw tracepoint, by the tracepoint's name.
    RawTracepoint(&'static str),
    /// The entry of a function, by BTF.
    Fentry(&'static str),
    /// The entry of a function, by a breakpoint.
    Kprobe(&'static str),
}

impl std::fmt::Display for Attach {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::RawTracepoint(target) => write!(f, "raw tracepoint {target}"),
            Self::Fentry(target) => write!(f, "fentry {target}"),
            Self::Kprobe(target) => write!(f, "kprobe {target}"),
        }
    }
}

/// One eBPF program: its function in the object and where it goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Program {
    /// Function name in the object.
    pub name: &'static str,
    /// Where it is attached.
    pub attach: Attach,
}

const fn raw(name: &'static str, tracepoint: &'static str) -> Program {
    Program { name, attach: Attach::RawTracepoint(tracepoint) }
}

const fn fentry(name: &'static str, function: &'static str) -> Program {
    Program { name, attach: Attach::Fentry(function) }
}

const fn kprobe(name: &'static str, function: &'static str) -> Program {
    Program { name, attach: Attach::Kprobe(function) }
}

impl Hook {
    /// Every hook, in the order of attaching and reporting.
    pub const ALL: [Self; 16] = [
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
        Self::Fault,
        Self::Map,
        Self::OomDecision,
        Self::Charge,
    ];

    /// The stable name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Rss => "rss",
            Self::Oom => "oom",
            Self::Kill => "kill",
            Self::Fork => "fork",
            Self::Exec => "exec",
            Self::Exit => "exit",
            Self::ExitMmap => "exit_mmap",
            Self::CgroupMkdir => "cgroup_mkdir",
            Self::CgroupRmdir => "cgroup_rmdir",
            Self::CgroupAttach => "cgroup_attach",
            Self::ReclaimBegin => "reclaim_begin",
            Self::ReclaimEnd => "reclaim_end",
            Self::Fault => "fault",
            Self::Map => "map",
            Self::OomDecision => "oom_decision",
            Self::Charge => "charge",
        }
    }

    /// Whether memtrace runs without it.
    pub const fn need(self) -> Need {
        match self {
            Self::Rss | Self::Oom | Self::Kill | Self::Fork | Self::Exec | Self::Exit => Need::Required,
            _ => Need::Optional,
        }
    }

    /// Its programs in order of preference; the first that attaches is used.
    pub const fn programs(self) -> &'static [Program] {
        const PROGRAMS: [&[Program]; 16] = [
            &[raw("rss_stat", "rss_stat")],
            &[raw("mark_victim", "mark_victim")],
            &[raw("signal_generate", "signal_generate")],
            &[raw("process_fork", "sched_process_fork")],
            &[raw("process_exec", "sched_process_exec")],
            &[raw("process_exit", "sched_process_exit")],
            &[raw("exit_mmap", "exit_mmap")],
            &[raw("cgroup_mkdir", "cgroup_mkdir")],
            &[raw("cgroup_rmdir", "cgroup_rmdir")],
            &[raw("cgroup_attach", "cgroup_attach_task")],
            &[raw("reclaim_begin", "mm_vmscan_memcg_reclaim_begin")],
            &[raw("reclaim_end", "mm_vmscan_memcg_reclaim_end")],
            &[raw("page_fault_user", "page_fault_user")],
            &[raw("sys_exit", "sys_exit")],
            &[fentry("oom_decision_fentry", "oom_kill_process"), kprobe("oom_decision_kprobe", "oom_kill_process")],
            &[fentry("charge_fentry", "page_counter_try_charge"), kprobe("charge_kprobe", "page_counter_try_charge")],
        ];
        match self {
            Self::Rss => PROGRAMS[0],
            Self::Oom => PROGRAMS[1],
            Self::Kill => PROGRAMS[2],
            Self::Fork => PROGRAMS[3],
            Self::Exec => PROGRAMS[4],
            Self::Exit => PROGRAMS[5],
            Self::ExitMmap => PROGRAMS[6],
            Self::CgroupMkdir => PROGRAMS[7],
            Self::CgroupRmdir => PROGRAMS[8],
            Self::CgroupAttach => PROGRAMS[9],
            Self::ReclaimBegin => PROGRAMS[10],
            Self::ReclaimEnd => PROGRAMS[11],
            Self::Fault => PROGRAMS[12],
            Self::Map => PROGRAMS[13],
            Self::OomDecision => PROGRAMS[14],
            Self::Charge => PROGRAMS[15],
        }
    }
}
