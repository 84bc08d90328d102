//! Lines of the ledgers beside the incident files: `kills.jsonl`, `sigkills.jsonl`.

use serde::{Deserialize, Serialize};

/// One line of the kill ledger.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KillEntry {
    /// Id of the incident this kill belongs to.
    pub incident: String,
    /// Boot clock, nanoseconds.
    pub boot_ns: u64,
    /// Wall time, RFC 3339.
    pub wall: String,
    /// Victim's process id.
    pub pid: u32,
    /// Victim's start, boot clock.
    pub start_boot_ns: u64,
    /// Victim's name.
    pub comm: String,
    /// Victim's cgroup path, when known.
    pub cgroup_path: Option<String>,
    /// Usage of the cgroup that ran out.
    pub usage_bytes: Option<u64>,
    /// Its limit.
    pub limit_bytes: Option<u64>,
    /// Trigger's process id.
    pub trigger_pid: u32,
    /// The kernel sent SIGKILL.
    pub killed: bool,
}

/// One line of the ledger of SIGKILLs: a process that got one, and who sent the first that was delivered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SigkillEntry {
    /// When it was sent, boot clock, nanoseconds.
    pub boot_ns: u64,
    /// Wall time, RFC 3339.
    pub wall: String,
    /// Process that got it.
    pub pid: u32,
    /// Its start, boot clock.
    pub start_boot_ns: u64,
    /// Its name.
    pub comm: String,
    /// kernfs id of its memory cgroup.
    pub cgroup_id: Option<u64>,
    /// Path of its memory cgroup, when known.
    pub cgroup_path: Option<String>,
    /// Why it was sent.
    pub cause: SigkillCause,
    /// Process that sent it, or in whose context the kernel did; for an OOM kill whose allocation failed.
    pub sender_pid: u32,
    /// The sender's start, boot clock.
    pub sender_start_boot_ns: u64,
    /// The sender's name.
    pub sender_comm: String,
    /// Id of the incident, for an OOM kill.
    pub incident: Option<String>,
}

/// Why a SIGKILL was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SigkillCause {
    /// The OOM killer.
    Oom,
    /// Somebody wrote to cgroup.kill: the sender.
    CgroupKill,
    /// A process by kill(2) or the like; the process itself also where the kernel ends it by force_sig.
    Process,
    /// The init of its pid namespace exited (or its tracer, with PTRACE_O_EXITKILL): the sender.
    PidNamespace,
    /// Its parent exited, and it had asked for SIGKILL then (PR_SET_PDEATHSIG).
    ParentDeath,
    /// The kernel for another reason, such as RLIMIT_CPU.
    Kernel,
}

impl SigkillCause {
    /// All of them.
    pub const ALL: [Self; 6] =
        [Self::Oom, Self::CgroupKill, Self::Process, Self::PidNamespace, Self::ParentDeath, Self::Kernel];

    /// The name in the ledger.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Oom => "oom",
            Self::CgroupKill => "cgroup_kill",
            Self::Process => "process",
            Self::PidNamespace => "pid_namespace",
            Self::ParentDeath => "parent_death",
            Self::Kernel => "kernel",
        }
    }
}
