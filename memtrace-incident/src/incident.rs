//! The incident: everything memtrace knows about one kill, spike, near miss or recording, as the file holds it.
//!
//! This is the published contract (`memtrace schema`). Sizes are bytes, times boot-clock
//! nanoseconds; `null` is "unknown", never 0. Written as `<id>.memtrace`: zstd over this JSON.

use serde::{Deserialize, Serialize};

use crate::{AllocationPath, Allocations, Kind, Loss, capped};

/// Version of the incident file this build writes; it reads this one and the one before.
pub const SCHEMA: u32 = 1;

/// One incident or recording.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Incident {
    /// Version of this format.
    pub schema: u32,
    /// ULID: time of the event in its first half, derived from the event itself in its second, so that a
    /// replay gives the same id.
    pub id: String,
    /// What this is about.
    pub kind: Kind,
    /// When it happened (for a recording: when it ended).
    pub at: At,
    /// The machine.
    pub host: Host,
    /// The cgroup it is about: the victim's, the spike's, the near miss's, the one that was stuck, the recording's.
    pub cgroup: Cgroup,
    /// The OOM kill; null for spikes and recordings without one.
    pub oom: Option<Oom>,
    /// The limit that was hit without a kill, for a near miss and where tasks were stuck; not there otherwise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pressure: Option<Pressure>,
    /// The command, for a recording.
    pub recording: Option<Recording>,
    /// The memory curve of `cgroup` (for an ancestor kill, `oom.oom_cgroup` has its own counters per kill).
    pub timeline: Timeline,
    /// Growth of processes up to the event, most grown first.
    #[serde(deserialize_with = "capped::growth")]
    pub growth: Vec<Growth>,
    /// Large mappings made and given back before the event, oldest first.
    #[serde(deserialize_with = "capped::mappings")]
    pub mappings: Vec<MappingNote>,
    /// Stacks that grew memory in the window, weighted in bytes, heaviest first within each cause.
    #[serde(deserialize_with = "capped::allocation_paths")]
    pub allocation_paths: Vec<AllocationPath>,
    /// When each of them grew it, and what grew without a stack; not there when no stacks were taken.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allocations: Option<Allocations>,
    /// What memory was made of at the event.
    pub composition: Composition,
    /// What it means, with its evidence.
    pub verdict: Verdict,
    /// What is missing from this file.
    #[serde(deserialize_with = "capped::losses")]
    pub losses: Vec<LossNote>,
}

/// A moment on both clocks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct At {
    /// Boot clock (CLOCK_BOOTTIME), from the kernel hook.
    pub boot_ns: u64,
    /// The same moment as wall time, RFC 3339 UTC with nanoseconds.
    pub wall: String,
    /// How far `wall` may be off, from the reading of the two clocks.
    pub wall_uncertainty_ns: u64,
}

/// The machine the incident happened on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Host {
    /// Host name.
    pub hostname: String,
    /// Kernel release (`uname -r`).
    pub kernel: String,
    /// Boot id: boot-clock times of two files compare only when it is equal.
    pub boot_id: String,
    /// CPUs online.
    pub cpus: u32,
    /// Memory of the machine.
    pub memory_bytes: u64,
    /// Page size.
    pub page_bytes: u64,
    /// Pages the kernel may charge to a cgroup ahead of use, per CPU (the stock), in bytes; usage is exact
    /// up to this times `cpus`.
    pub charge_batch_bytes: u64,
}

/// A memory cgroup at the event.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Cgroup {
    /// kernfs id: inode of its directory in the memory hierarchy.
    pub id: u64,
    /// Path from the root of the memory hierarchy; null when it could not be learnt.
    pub path: Option<String>,
    /// Which cgroup version its memory controller is on: 1 or 2.
    pub version: u32,
    /// Its limit; null when it has none.
    pub limit_bytes: Option<u64>,
    /// Its usage at the event, as the kernel compares it with the limit.
    pub usage_bytes: Option<u64>,
    /// Highest usage ever (the kernel's watermark).
    pub peak_bytes: Option<u64>,
    /// `memory.high`; null when it has none.
    pub high_bytes: Option<u64>,
    /// v2 swap usage; v1 memory and swap together.
    pub swap_usage_bytes: Option<u64>,
    /// v2 swap limit; v1 limit of memory and swap together; null when none.
    pub swap_limit_bytes: Option<u64>,
    /// How often a charge hit the limit.
    pub failcnt: Option<u64>,
    /// Container, read off the path.
    pub container: Option<Container>,
    /// Pod, read off the path.
    pub kubernetes: Option<Kubernetes>,
}

/// A container as its cgroup path names it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Container {
    /// Container id.
    pub id: String,
    /// Runtime, when the path says it: `containerd`, `cri-o`, `docker`, `podman`.
    pub runtime: Option<String>,
}

/// A pod as its cgroup path names it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Kubernetes {
    /// Pod UID.
    pub pod_uid: String,
    /// Quality of service: `guaranteed`, `burstable`, `besteffort`.
    pub qos: Option<String>,
}

/// An OOM kill.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Oom {
    /// What ran out.
    pub scope: Scope,
    /// The cgroup that ran out; null for a global OOM or when unknown.
    pub oom_cgroup: Option<Cgroup>,
    /// memory.oom.group applied: the whole cgroup was killed.
    pub group_kill: bool,
    /// The task whose allocation failed, not necessarily a victim.
    pub trigger: Process,
    /// kernfs id and path of the trigger's own cgroup.
    pub trigger_cgroup: Option<Cgroup>,
    /// Kernel functions of the failed charge, innermost first; empty when not captured.
    #[serde(deserialize_with = "capped::functions")]
    pub trigger_kernel_stack: Vec<String>,
    /// Everyone who was killed or chosen, in kernel order.
    #[serde(deserialize_with = "capped::victims")]
    pub victims: Vec<Victim>,
    /// Processes of the cgroup at the kill, largest first.
    #[serde(deserialize_with = "capped::tasks")]
    pub tasks: Vec<TaskRow>,
    /// What the kernel log said about this kill; null when it was not read or said nothing.
    pub kernel_log: Option<KernelLogKill>,
}

/// A limit that was hit while nobody was killed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Pressure {
    /// When it was hit first, boot clock.
    pub from_boot_ns: u64,
    /// When it was last seen hit or reclaimed for.
    pub until_boot_ns: u64,
    /// Which limit. Of both the hard one.
    pub limit: PressureLimit,
    /// How often it was hit in that time.
    pub hits: u64,
    /// How long reclaim held tasks up, in sum; those it held for less than 1 ms, and pauses that `memory.high` imposes
    /// between reclaims, are not in it. Null when the end of reclaim is not seen.
    pub stalled_ns: Option<u64>,
    /// The cgroup's OOM killer was off (v1 `memory.oom_control`); null when unknown, as always on v2, which has no such
    /// switch.
    pub oom_kill_disabled: Option<bool>,
    /// How long tasks waited for memory with the OOM killer off; null for a near miss.
    pub under_oom_ns: Option<u64>,
    /// Processes of the cgroup then, largest first.
    #[serde(deserialize_with = "capped::tasks")]
    pub tasks: Vec<TaskRow>,
}

/// A limit of a cgroup.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum PressureLimit {
    /// The hard limit: `memory.max`, `memory.limit_in_bytes`.
    Max,
    /// `memory.high`: tasks are slowed down, nobody is killed for it.
    High,
}

/// What ran out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum Scope {
    /// The victim's own cgroup.
    Cgroup,
    /// An ancestor of the victim's cgroup (a pod, a slice).
    Ancestor,
    /// The machine.
    Global,
    /// The memory nodes of a cpuset.
    Cpuset,
    /// Not found out.
    Unknown,
}

/// A process at one moment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Process {
    /// Process id (tgid).
    pub pid: u32,
    /// Thread id.
    pub tid: u32,
    /// Start, boot clock; with `pid` it is unique on this boot.
    pub start_boot_ns: u64,
    /// Name, escaped where not printable.
    pub comm: String,
}

/// A process the OOM killer killed or chose.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Victim {
    /// Process id (tgid).
    pub pid: u32,
    /// Start, boot clock.
    pub start_boot_ns: u64,
    /// Name, escaped where not printable.
    pub comm: String,
    /// kernfs id of its memory cgroup.
    pub cgroup_id: Option<u64>,
    /// Path of its memory cgroup.
    pub cgroup_path: Option<String>,
    /// When it was killed (SIGKILL) or chosen, boot clock.
    pub at_boot_ns: u64,
    /// Resident anonymous memory.
    pub anon_bytes: Option<u64>,
    /// Resident file pages.
    pub file_bytes: Option<u64>,
    /// Resident shared memory.
    pub shmem_bytes: Option<u64>,
    /// Swapped out.
    pub swap_bytes: Option<u64>,
    /// Page tables.
    pub pagetable_bytes: Option<u64>,
    /// Its oom_score_adj.
    pub oom_score_adj: Option<i32>,
    /// The kernel sent it SIGKILL; false: only chosen while it was already exiting.
    pub killed: bool,
    /// Killed because it shares its address space with a victim.
    pub shares_mm: bool,
    /// When its last thread exited; null when not yet seen.
    pub exit_boot_ns: Option<u64>,
}

/// One row of the task table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct TaskRow {
    /// Process id.
    pub pid: u32,
    /// Start, boot clock; null for a process found running whose exact start is not known.
    pub start_boot_ns: Option<u64>,
    /// Name.
    pub comm: String,
    /// Resident anonymous memory.
    pub anon_bytes: u64,
    /// Resident file pages.
    pub file_bytes: u64,
    /// Resident shared memory.
    pub shmem_bytes: u64,
    /// Swapped out.
    pub swap_bytes: u64,
    /// Highest sum of anon, file and shmem.
    pub peak_bytes: u64,
    /// It is among the victims.
    pub victim: bool,
}

/// The kernel log's view of a kill, as a cross-check.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct KernelLogKill {
    /// printk's clock of the "Killed process" line, nanoseconds (microsecond resolution).
    pub killed_line_ns: Option<u64>,
    /// printk's clock of the `oom-kill:` line, which is rate-limited.
    pub oom_line_ns: Option<u64>,
    /// `constraint=` of the `oom-kill:` line.
    pub constraint: Option<String>,
    /// `oom_memcg=`.
    pub oom_memcg: Option<String>,
    /// `task_memcg=`.
    pub task_memcg: Option<String>,
    /// pid in those lines.
    pub pid: u32,
}

/// The command of a recording.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Recording {
    /// Program and arguments; empty when a running process or cgroup was recorded.
    #[serde(deserialize_with = "capped::command")]
    pub command: Vec<String>,
    /// Start, boot clock.
    pub start_boot_ns: u64,
    /// How long it took.
    pub duration_ns: u64,
    /// Exit code; null when killed or still running.
    pub exit_code: Option<i32>,
    /// Signal that ended it.
    pub signal: Option<i32>,
    /// Every process that ran, by peak.
    #[serde(deserialize_with = "capped::processes")]
    pub processes: Vec<RecordedProcess>,
    /// How many more processes ran than are listed.
    pub processes_left_out: u64,
    /// Ids of OOM kills during the recording.
    #[serde(deserialize_with = "capped::oom_incidents")]
    pub oom_incidents: Vec<String>,
}

/// One process of a recording.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct RecordedProcess {
    /// Process id.
    pub pid: u32,
    /// Start, boot clock.
    pub start_boot_ns: u64,
    /// Last name it had.
    pub comm: String,
    /// Highest sum of anon, file and shmem of the program it ran last (a fork without exec starts with its parent's).
    pub peak_bytes: Option<u64>,
    /// The kernel's own peak (`signal->maxrss`, what `time -v` prints); null until it exits, and when that figure is of
    /// a program that ran in this process before an exec.
    pub max_rss_bytes: Option<u64>,
    /// Exit status: wait(2) encoding; null until it exits.
    pub exit_code: Option<u32>,
}

/// The curve: columns of equal length, one row a reading.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Timeline {
    /// The readings.
    pub columns: Columns,
    /// Readings left out because the timeline keeps less of what is older.
    pub thinned: u64,
}

/// Readings; row i of every column belongs together.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Columns {
    /// When, boot clock, ascending.
    #[serde(deserialize_with = "capped::rows")]
    pub boot_ns: Vec<u64>,
    /// Usage of the cgroup, as the kernel compares it with the limit.
    #[serde(deserialize_with = "capped::rows")]
    pub usage_bytes: Vec<Option<u64>>,
    /// Its limit.
    #[serde(deserialize_with = "capped::rows")]
    pub limit_bytes: Vec<Option<u64>>,
    /// The kernel's watermark.
    #[serde(deserialize_with = "capped::rows")]
    pub watermark_bytes: Vec<Option<u64>>,
    /// Sum of resident anonymous memory of its processes.
    #[serde(deserialize_with = "capped::rows")]
    pub anon_bytes: Vec<u64>,
    /// Sum of resident file pages (a page mapped twice counts twice).
    #[serde(deserialize_with = "capped::rows")]
    pub file_bytes: Vec<u64>,
    /// Sum of resident shared memory (a page mapped twice counts twice).
    #[serde(deserialize_with = "capped::rows")]
    pub shmem_bytes: Vec<u64>,
    /// Sum of swapped-out pages of its processes.
    #[serde(deserialize_with = "capped::rows")]
    pub swap_bytes: Vec<u64>,
    /// Swap usage of the cgroup as the kernel counts it; on cgroup v1 memory and swap together.
    #[serde(deserialize_with = "capped::rows")]
    pub swap_usage_bytes: Vec<Option<u64>>,
    /// Its limit.
    #[serde(deserialize_with = "capped::rows")]
    pub swap_limit_bytes: Vec<Option<u64>>,
}

/// How much one process grew up to the event.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Growth {
    /// Process id.
    pub pid: u32,
    /// Start, boot clock.
    pub start_boot_ns: u64,
    /// Name.
    pub comm: String,
    /// anon + file + shmem at the event.
    pub rss_bytes: u64,
    /// Growth over the last 100 ms; negative when it shrank; null when it was not seen that long ago and did not start since.
    pub last_100ms_bytes: Option<i64>,
    /// Growth over the last second.
    pub last_1s_bytes: Option<i64>,
    /// Growth over the last ten seconds.
    pub last_10s_bytes: Option<i64>,
}

/// A mapping call.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct MappingNote {
    /// When.
    pub boot_ns: u64,
    /// Process id.
    pub pid: u32,
    /// Name.
    pub comm: String,
    /// `mmap`, `munmap`, `mremap`, `brk`, `madvise`.
    pub call: String,
    /// Address.
    pub address: u64,
    /// Bytes; positive when address space grew.
    pub change_bytes: i64,
    /// Bytes mapped by smaller calls since the note before.
    pub small_mapped_bytes: u64,
    /// Bytes given back by smaller calls since the note before.
    pub small_unmapped_bytes: u64,
}

/// What memory was made of at the event.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Composition {
    /// Sum of resident anonymous memory of the cgroup's processes.
    pub anon_bytes: Option<u64>,
    /// Sum of their resident file pages.
    pub file_bytes: Option<u64>,
    /// Sum of their resident shared memory.
    pub shmem_bytes: Option<u64>,
    /// Sum of their swapped-out pages.
    pub swap_bytes: Option<u64>,
    /// Usage minus anon and shmem, where positive: page cache, unmapped tmpfs, kernel memory, sockets, and memory of
    /// processes not followed.
    pub unattributed_bytes: Option<i64>,
}

/// What it means.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Verdict {
    /// One sentence.
    pub summary: String,
    /// Facts it rests on.
    #[serde(deserialize_with = "capped::evidence")]
    pub evidence: Vec<String>,
}

/// Something that is missing: a [`Loss`], or a hook or source that is off (its name, a colon, and what
/// that means).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct LossNote {
    /// What: a ring and reason, a cap, a source.
    pub what: String,
    /// How many, from the start of the window to the event; null when it cannot be counted.
    pub count: Option<u64>,
}

impl LossNote {
    /// A loss, and how many; `None` where it cannot be counted.
    pub fn of(loss: Loss, count: Option<u64>) -> Self {
        Self { what: loss.label().to_owned(), count }
    }

    /// A loss that is counted; `None` where nothing was lost.
    pub fn counted(loss: Loss, count: u64) -> Option<Self> {
        (count > 0).then(|| Self::of(loss, Some(count)))
    }
}
