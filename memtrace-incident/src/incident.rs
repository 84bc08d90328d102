//! The incident: everything memtrace knows about one kill, spike, near miss, stuck cgroup or
//! recording, in the form of the file.
//!
//! These types are the published format (`memtrace schema`). Sizes are bytes, times are nanoseconds
//! of the boot clock, and `null` means "unknown", which is never written as 0. A file is named
//! `<id>.memtrace` and holds this JSON compressed with zstd.

use serde::{Deserialize, Serialize};

use crate::{AllocationPath, Allocations, Kind, Loss, Timeline, capped};

/// Version of the incident file that this build writes. It reads this version and the one before
/// it; before 1 there is none.
pub const SCHEMA: u32 = 1;

/// One incident or recording.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Incident {
    /// Version of this format: 1.
    pub schema: u32,
    /// ULID. Its first part is the wall time of the event. The rest is a hash of the event itself,
    /// so that a replay gives the same id.
    pub id: String,
    /// What kind of event this incident is about.
    pub kind: Kind,
    /// When the event happened; for a recording, when it ended.
    pub at: At,
    /// The machine that it happened on.
    pub host: Host,
    /// The cgroup that the incident is about: the victim's cgroup, the one whose limit was
    /// approached or hit, or the recorded one.
    pub cgroup: Cgroup,
    /// The OOM kill; null when there was none.
    pub oom: Option<Oom>,
    /// The limit that was hit without a kill, for near misses and stuck cgroups; absent otherwise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pressure: Option<Pressure>,
    /// What was recorded; null when this is not a recording.
    pub recording: Option<Recording>,
    /// The memory curve of `cgroup`. When an ancestor ran out of memory and its usage was read in
    /// the window, the curve of that ancestor (`oom.oom_cgroup`).
    pub timeline: Timeline,
    /// How much processes grew up to the event, largest growth first.
    #[serde(deserialize_with = "capped::growth")]
    pub growth: Vec<Growth>,
    /// Large mapping calls before the event, oldest first.
    #[serde(deserialize_with = "capped::mappings")]
    pub mappings: Vec<MappingNote>,
    /// Stacks that grew memory in the window, ordered by cause and then by weight, heaviest first.
    #[serde(deserialize_with = "capped::allocation_paths")]
    pub allocation_paths: Vec<AllocationPath>,
    /// When each path grew memory, and what grew without a stack; absent when no stacks were taken.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allocations: Option<Allocations>,
    /// What the memory consisted of at the event.
    pub composition: Composition,
    /// What happened in one sentence, with the facts it rests on.
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
    /// How far `wall` may be off: half the time that reading both clocks took.
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
    /// Boot id (`/proc/sys/kernel/random/boot_id`). Boot-clock times of two files compare only when
    /// it is equal.
    pub boot_id: String,
    /// Number of CPUs online.
    pub cpus: u32,
    /// Memory of the machine (`MemTotal`).
    pub memory_bytes: u64,
    /// Page size of the kernel.
    pub page_bytes: u64,
    /// How much the kernel may charge to a cgroup ahead of use, per CPU (the stock). Usage is exact
    /// up to this times `cpus`.
    pub charge_batch_bytes: u64,
    /// Size of a transparent huge page: the most that the kernel charges to a cgroup at once for
    /// anonymous memory and folios of the page cache. Null when the kernel has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub huge_page_bytes: Option<u64>,
}

/// A memory cgroup at the event.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Cgroup {
    /// kernfs id: inode number of its directory in the memory hierarchy.
    pub id: u64,
    /// Path from the root of the memory hierarchy; null when it is not known.
    pub path: Option<String>,
    /// Cgroup version of the memory controller: 1 or 2.
    pub version: u32,
    /// Hard limit (`memory.max`; v1 `memory.limit_in_bytes`); null when it has none.
    pub limit_bytes: Option<u64>,
    /// Usage at the event: the page counter, which the kernel compares with the limit.
    pub usage_bytes: Option<u64>,
    /// Highest usage so far (the kernel's watermark).
    pub peak_bytes: Option<u64>,
    /// `memory.high`; null when it has none.
    pub high_bytes: Option<u64>,
    /// Swap usage; on v1 memory and swap together.
    pub swap_usage_bytes: Option<u64>,
    /// Swap limit; on v1 the limit of memory and swap together; null when it has none.
    pub swap_limit_bytes: Option<u64>,
    /// How often a charge hit the limit.
    pub failcnt: Option<u64>,
    /// Container, as far as the path names one.
    pub container: Option<Container>,
    /// Pod, as far as the path names one.
    pub kubernetes: Option<Kubernetes>,
}

/// A container, as the cgroup path names it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Container {
    /// Container id: 64 hexadecimal digits.
    pub id: String,
    /// Runtime, when the path names it: `containerd`, `cri-o`, `docker`, `podman`.
    pub runtime: Option<String>,
}

/// A pod, as the cgroup path names it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Kubernetes {
    /// Pod UID.
    pub pod_uid: String,
    /// Quality of service class: `guaranteed`, `burstable`, `besteffort`.
    pub qos: Option<String>,
}

/// An OOM kill: one decision of the OOM killer with all its victims.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Oom {
    /// Whose memory ran out.
    pub scope: Scope,
    /// The cgroup that ran out of memory; null for a global OOM or when unknown.
    pub oom_cgroup: Option<Cgroup>,
    /// Whether `memory.oom.group` applied: the whole cgroup was killed.
    pub group_kill: bool,
    /// The task whose allocation failed, not necessarily a victim.
    pub trigger: Process,
    /// The trigger's own cgroup; null when it was not read.
    pub trigger_cgroup: Option<Cgroup>,
    /// Kernel functions of the trigger at the mark, innermost first; empty when not captured.
    #[serde(deserialize_with = "capped::functions")]
    pub trigger_kernel_stack: Vec<String>,
    /// Every process that was killed or chosen, in the order of the kernel.
    #[serde(deserialize_with = "capped::victims")]
    pub victims: Vec<Victim>,
    /// Processes of the cgroup at the kill, largest first.
    #[serde(deserialize_with = "capped::tasks")]
    pub tasks: Vec<TaskRow>,
    /// What the kernel log has about this kill; null when it was not read or has no line.
    pub kernel_log: Option<KernelLogKill>,
}

/// A limit that was hit without a kill.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Pressure {
    /// When the limit was first hit, boot clock.
    pub from_boot_ns: u64,
    /// When the limit was last hit, or reclaim for it last ended.
    pub until_boot_ns: u64,
    /// Which limit was hit; the hard limit when both were.
    pub limit: PressureLimit,
    /// How often that limit was hit.
    pub hits: u64,
    /// How long reclaim delayed tasks, summed over tasks. Delays below 1 ms are not counted, nor
    /// are the pauses that `memory.high` imposes between reclaims. Null when the end of reclaim is
    /// not seen.
    pub stalled_ns: Option<u64>,
    /// Whether the cgroup's OOM killer was off (v1 `memory.oom_control`). Null when unknown, and
    /// always on v2, which has no such switch.
    pub oom_kill_disabled: Option<bool>,
    /// How long tasks waited for memory because the OOM killer was off; null for a near miss.
    pub under_oom_ns: Option<u64>,
    /// Processes of the cgroup at the event, largest first.
    #[serde(deserialize_with = "capped::tasks")]
    pub tasks: Vec<TaskRow>,
}

/// A limit of a cgroup.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum PressureLimit {
    /// The hard limit: `memory.max`, on v1 `memory.limit_in_bytes`.
    Max,
    /// `memory.high`: the kernel slows tasks down above it and kills none.
    High,
}

/// Whose memory ran out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum Scope {
    /// The victim's own cgroup.
    Cgroup,
    /// An ancestor of the victim's cgroup (a pod, a slice).
    Ancestor,
    /// The whole machine.
    Global,
    /// The memory nodes of a cpuset.
    Cpuset,
    /// It could not be determined.
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
    /// Start, boot clock. Together with `pid` it is unique within a boot.
    pub start_boot_ns: u64,
    /// Name (`comm`), escaped where not printable.
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
    /// Name (`comm`), escaped where not printable.
    pub comm: String,
    /// kernfs id of its memory cgroup; null when it was not read.
    pub cgroup_id: Option<u64>,
    /// Path of its memory cgroup; null when it is not known.
    pub cgroup_path: Option<String>,
    /// When it was killed (SIGKILL) or chosen, boot clock.
    pub at_boot_ns: u64,
    /// Resident anonymous memory.
    pub anon_bytes: Option<u64>,
    /// Resident file pages.
    pub file_bytes: Option<u64>,
    /// Resident shared memory and tmpfs.
    pub shmem_bytes: Option<u64>,
    /// Swap entries.
    pub swap_bytes: Option<u64>,
    /// Page tables.
    pub pagetable_bytes: Option<u64>,
    /// `oom_score_adj` of the process.
    pub oom_score_adj: Option<i32>,
    /// Whether the kernel sent it SIGKILL. False: it was chosen while it was already exiting.
    pub killed: bool,
    /// Whether it was killed because it shares its address space with a victim.
    pub shares_mm: bool,
    /// When its last thread exited, boot clock; null when that was not seen before the file was
    /// built.
    pub exit_boot_ns: Option<u64>,
}

/// One row of the task table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct TaskRow {
    /// Process id (tgid).
    pub pid: u32,
    /// Start, boot clock. Null for a process that ran already when tracing began and whose exact
    /// start is not known.
    pub start_boot_ns: Option<u64>,
    /// Name (`comm`), escaped where not printable.
    pub comm: String,
    /// Resident anonymous memory.
    pub anon_bytes: u64,
    /// Resident file pages.
    pub file_bytes: u64,
    /// Resident shared memory and tmpfs.
    pub shmem_bytes: u64,
    /// Swap entries.
    pub swap_bytes: u64,
    /// Highest sum of anon, file and shmem that was seen.
    pub peak_bytes: u64,
    /// Whether it is among the victims.
    pub victim: bool,
}

/// What the kernel log has about a kill, to check the hooks against.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct KernelLogKill {
    /// printk time of the "Killed process" line, nanoseconds (the log has microseconds).
    pub killed_line_ns: Option<u64>,
    /// printk time of the `oom-kill:` line, nanoseconds. The kernel limits the rate of these lines.
    pub oom_line_ns: Option<u64>,
    /// `constraint=` of the `oom-kill:` line, such as `CONSTRAINT_MEMCG`.
    pub constraint: Option<String>,
    /// `oom_memcg=` of the `oom-kill:` line: path of the cgroup that ran out.
    pub oom_memcg: Option<String>,
    /// `task_memcg=` of the `oom-kill:` line: path of the victim's cgroup.
    pub task_memcg: Option<String>,
    /// Process or thread id that these lines name.
    pub pid: u32,
}

/// What a recording recorded.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Recording {
    /// Program and arguments; empty when a running process or cgroup was recorded.
    #[serde(deserialize_with = "capped::command")]
    pub command: Vec<String>,
    /// When the recording began, boot clock.
    pub start_boot_ns: u64,
    /// From begin to end.
    pub duration_ns: u64,
    /// Exit code of the command; null when it was killed by a signal or still runs.
    pub exit_code: Option<i32>,
    /// Signal that killed the command; null otherwise.
    pub signal: Option<i32>,
    /// Every process that ran, highest peak first.
    #[serde(deserialize_with = "capped::processes")]
    pub processes: Vec<RecordedProcess>,
    /// Processes that ran but are not listed.
    pub processes_left_out: u64,
    /// Ids of the OOM kill incidents during the recording.
    #[serde(deserialize_with = "capped::oom_incidents")]
    pub oom_incidents: Vec<String>,
}

/// One process of a recording.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct RecordedProcess {
    /// Process id (tgid).
    pub pid: u32,
    /// Start, boot clock.
    pub start_boot_ns: u64,
    /// Its last name (`comm`), escaped where not printable.
    pub comm: String,
    /// Highest sum of anon, file and shmem of the program that it ran last. A fork without exec
    /// starts with its parent's pages.
    pub peak_bytes: Option<u64>,
    /// The kernel's own peak (`signal->maxrss`, which `time -v` prints). Null until the process
    /// exits, and when the figure belongs to a program that ran in this process before an exec.
    pub max_rss_bytes: Option<u64>,
    /// Exit status in the encoding of wait(2); null until it exits.
    pub exit_code: Option<u32>,
}

/// How much the resident memory of one process changed up to the event.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Growth {
    /// Process id (tgid).
    pub pid: u32,
    /// Start, boot clock.
    pub start_boot_ns: u64,
    /// Name (`comm`), escaped where not printable.
    pub comm: String,
    /// Resident memory at the event: anon + file + shmem.
    pub rss_bytes: u64,
    /// Change over the last 100 ms, negative when it shrank. Null when the process is older than
    /// that and its memory was not read before.
    pub last_100ms_bytes: Option<i64>,
    /// Change over the last second; null as above.
    pub last_1s_bytes: Option<i64>,
    /// Change over the last ten seconds; null as above.
    pub last_10s_bytes: Option<i64>,
}

/// A call that changed the address space of a process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct MappingNote {
    /// When the call was made, boot clock.
    pub boot_ns: u64,
    /// Process id (tgid).
    pub pid: u32,
    /// Name (`comm`) of the calling thread, escaped where not printable.
    pub comm: String,
    /// Name of the call: `mmap`, `munmap`, `mremap`, `brk`, `madvise`, `unknown`.
    pub call: String,
    /// Where the mapping begins. Absent over HTTP: who can connect may not be who may know it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<u64>,
    /// How much address space it added; negative when it gave some back.
    pub change_bytes: i64,
    /// What smaller calls added since the note before this one.
    pub small_mapped_bytes: u64,
    /// What smaller calls gave back since the note before this one.
    pub small_unmapped_bytes: u64,
}

/// What the memory of the cgroup consisted of at the event.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Composition {
    /// Resident anonymous memory of the cgroup's processes, summed.
    pub anon_bytes: Option<u64>,
    /// Resident file pages of the cgroup's processes, summed.
    pub file_bytes: Option<u64>,
    /// Resident shared memory of the cgroup's processes, summed.
    pub shmem_bytes: Option<u64>,
    /// Swap entries of the cgroup's processes, summed.
    pub swap_bytes: Option<u64>,
    /// Usage minus anon and shmem, where that is positive: page cache, unmapped tmpfs, kernel
    /// memory, sockets, and memory of processes that are not followed. Null when usage is unknown.
    pub unattributed_bytes: Option<i64>,
}

/// What happened, in words.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Verdict {
    /// One sentence for the reader of a report.
    pub summary: String,
    /// The facts that the sentence rests on, one each.
    #[serde(deserialize_with = "capped::evidence")]
    pub evidence: Vec<String>,
}

/// Something that is missing from the file: a [`Loss`], or a hook or source that is off.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct LossNote {
    /// What is missing: the label of a loss, such as `samples/ring_full`, or the name of a hook or
    /// source, a colon, and what its absence means.
    pub what: String,
    /// How many were lost since the window began; null when that cannot be counted.
    pub count: Option<u64>,
}

impl LossNote {
    /// A loss with its count; `None` when it cannot be counted.
    pub fn of(loss: Loss, count: Option<u64>) -> Self {
        Self { what: loss.label().to_owned(), count }
    }

    /// A loss with its count, or `None` when the count is 0.
    pub fn counted(loss: Loss, count: u64) -> Option<Self> {
        (count > 0).then(|| Self::of(loss, Some(count)))
    }
}
