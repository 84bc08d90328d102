//! Lines of the two ledgers beside the incident files. A ledger is a file of JSON lines that is
//! only appended to: `kills.jsonl` has a line for each OOM victim, and those of
//! [`crate::UnwatchedEntry`]; `sigkills.jsonl` has one for each process that got SIGKILL from
//! anywhere.

use serde::{Deserialize, Serialize};

/// One line of the kill ledger, `kills.jsonl`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KillEntry {
    /// Id of the incident that this kill belongs to. The incident is saved later.
    pub incident: String,
    /// When the victim was killed (SIGKILL) or chosen, boot clock, nanoseconds.
    pub boot_ns: u64,
    /// The same moment as wall time, RFC 3339 UTC.
    pub wall: String,
    /// Victim's process id (tgid).
    pub pid: u32,
    /// Victim's thread that was marked, whose id the kernel log has; absent when it was the first
    /// one (mm/oom_kill.c, find_lock_task_mm).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tid: Option<u32>,
    /// Victim's start, boot clock, nanoseconds.
    pub start_boot_ns: u64,
    /// Victim's name, escaped where not printable.
    pub comm: String,
    /// Victim's cgroup path; null when it is not known.
    pub cgroup_path: Option<String>,
    /// Usage of the cgroup that ran out of memory; null when it was not read.
    pub usage_bytes: Option<u64>,
    /// Limit of the cgroup that ran out of memory; null when it has none or was not read.
    pub limit_bytes: Option<u64>,
    /// Process id of the trigger, whose allocation failed.
    pub trigger_pid: u32,
    /// Whether the kernel sent SIGKILL. False: the victim was chosen while it was already exiting.
    pub killed: bool,
    /// Boot that the times are of (`/proc/sys/kernel/random/boot_id`); absent in lines of earlier
    /// versions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot_id: Option<String>,
}

/// One line of the SIGKILL ledger, `sigkills.jsonl`: a process that got SIGKILL, and the sender of
/// the first one that was delivered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SigkillEntry {
    /// When the signal was sent, boot clock, nanoseconds.
    pub boot_ns: u64,
    /// The same moment as wall time, RFC 3339 UTC.
    pub wall: String,
    /// Process id (tgid) of the target.
    pub pid: u32,
    /// Start of the target, boot clock, nanoseconds.
    pub start_boot_ns: u64,
    /// Name of the target, escaped where not printable.
    pub comm: String,
    /// kernfs id of the target's memory cgroup; null when it was not read.
    pub cgroup_id: Option<u64>,
    /// Path of the target's memory cgroup; null when it is not known.
    pub cgroup_path: Option<String>,
    /// Why it was sent.
    pub cause: SigkillCause,
    /// Process id of the sender. When the kernel sent it: of the process in whose context it did
    /// so, for an OOM kill the trigger.
    pub sender_pid: u32,
    /// The sender's start, boot clock, nanoseconds.
    pub sender_start_boot_ns: u64,
    /// The sender's name, escaped where not printable.
    pub sender_comm: String,
    /// The sender's real user id; null when the kernel sent it for memory, and when it is not known.
    #[serde(default)]
    pub sender_uid: Option<u32>,
    /// kernfs id of the sender's memory cgroup; null when it is not known, and as above.
    #[serde(default)]
    pub sender_cgroup_id: Option<u64>,
    /// Path of the sender's memory cgroup; null as above.
    #[serde(default)]
    pub sender_cgroup_path: Option<String>,
    /// Id of the incident, for an OOM kill; null otherwise.
    pub incident: Option<String>,
    /// SIGKILLs of the same sender before this one that have no line of their own; absent when
    /// there are none. Whoever sends very many fills only a share of the ledger.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub more: Option<MoreSigkills>,
}

/// SIGKILLs that have no line of their own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MoreSigkills {
    /// How many.
    pub count: u64,
    /// When the first was sent, wall time, RFC 3339 UTC.
    pub from: String,
    /// When the last was sent, wall time, RFC 3339 UTC.
    pub until: String,
    /// Whether all were sent by the same user from the same cgroup. False: by several, of whom none
    /// has a share of its own.
    pub same_sender: bool,
}

/// Why a SIGKILL was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SigkillCause {
    /// The OOM killer sent it.
    Oom,
    /// The sender wrote to `cgroup.kill`.
    CgroupKill,
    /// A process sent it with kill(2) or a similar call. Also when the kernel ends a process with
    /// `force_sig`: then the sender is the target itself.
    Process,
    /// The sender exited and was the init of the target's pid namespace, or its tracer with
    /// PTRACE_O_EXITKILL.
    PidNamespace,
    /// The target's parent exited, and the target had requested SIGKILL for that
    /// (PR_SET_PDEATHSIG).
    ParentDeath,
    /// The kernel sent it for another reason, such as RLIMIT_CPU.
    Kernel,
}

impl SigkillCause {
    /// Every cause.
    pub const ALL: [Self; 6] =
        [Self::Oom, Self::CgroupKill, Self::Process, Self::PidNamespace, Self::ParentDeath, Self::Kernel];

    /// The name in the ledger: `cgroup_kill`.
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
