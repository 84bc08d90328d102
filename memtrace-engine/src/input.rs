//! Everything that the engine takes: wire records from the rings, and facts, which come from other
//! sources. The journal stores each input before the engine gets it, so a replay is exact.

use memtrace_incident::Host;
use serde::{Deserialize, Serialize};

mod stacks;

pub use stacks::{ModuleFound, PATH_TICKS, PATHS_KNOWN, PathFound, PathFrame, StackFound, bytes_of_frames};

/// One input.
#[derive(Clone, Debug, PartialEq)]
pub enum Input<'a> {
    /// The bytes of a wire record, as they were in the ring.
    Record(&'a [u8]),
    /// An input that does not come from a ring.
    Fact(Fact),
}

impl Input<'_> {
    /// When this input was made, boot clock, nanoseconds. `None` for facts without a time and for
    /// records that are too short for a header.
    pub fn boot_ns(&self) -> Option<u64> {
        match self {
            // `boot_ns` of `event::Header` is at offset 8 of every record.
            Input::Record(bytes) => bytes.get(8..16).and_then(|at| at.try_into().ok()).map(u64::from_le_bytes),
            Input::Fact(
                Fact::Anchor { boot_ns, .. }
                | Fact::Tick { boot_ns }
                | Fact::OomControl { boot_ns, .. }
                | Fact::RecordingBegin { boot_ns, .. }
                | Fact::RecordingEnd { boot_ns, .. }
                | Fact::Stop { boot_ns },
            ) => Some(*boot_ns),
            Input::Fact(Fact::Cgroup(found)) => Some(found.boot_ns),
            Input::Fact(Fact::Process(found)) => Some(found.boot_ns),
            Input::Fact(Fact::KernelLog(line)) => Some(line.read_boot_ns),
            Input::Fact(Fact::Stack(found)) => Some(found.boot_ns),
            Input::Fact(
                Fact::Start { .. } | Fact::KernelStack { .. } | Fact::Losses { .. } | Fact::Module(_) | Fact::Path(_),
            ) => None,
        }
    }
}

/// An input that does not come from a ring. The journal stores it as JSON.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "fact", rename_all = "snake_case")]
pub enum Fact {
    /// Start of a run. The first input of every journal.
    Start {
        /// The machine that the run is on.
        host: Host,
        /// Settings of the engine for this run.
        settings: Settings,
    },
    /// Boot clock and wall clock, read together.
    Anchor {
        /// Boot clock, nanoseconds.
        boot_ns: u64,
        /// Wall clock, nanoseconds since the Unix epoch.
        wall_ns: i64,
        /// Half the time that reading both clocks took, nanoseconds.
        uncertainty_ns: u64,
    },
    /// A memory cgroup that exists: found at start, or looked up because a record named it.
    Cgroup(CgroupFound),
    /// A process that ran already when tracing began.
    Process(ProcessFound),
    /// A kernel log line about an OOM kill.
    KernelLog(KernelLogLine),
    /// Function names of the trigger's kernel stack at a mark. The addresses are never stored.
    KernelStack {
        /// Victim's process id.
        victim_pid: u32,
        /// Victim's start, boot clock, nanoseconds.
        victim_start_boot_ns: u64,
        /// Function names, innermost first.
        functions: Vec<String>,
    },
    /// A module that frames lie in. Comes before the first path that names it, and again in every
    /// journal segment.
    Module(ModuleFound),
    /// The frames of a stack. Comes before the first stack that has them, and again in every
    /// journal segment.
    Path(PathFound),
    /// A sample: memory grew, with the stack that grew it.
    Stack(StackFound),
    /// Loss counters of the kernel side and of the session, as totals since their start.
    Losses {
        /// Label and total so far; only those that are not 0.
        totals: Vec<(String, u64)>,
    },
    /// `memory.oom_control` of a watched cgroup (v1), when it changed.
    OomControl {
        /// kernfs id of the cgroup.
        cgroup_id: u64,
        /// When it was read, boot clock, nanoseconds.
        boot_ns: u64,
        /// `oom_kill_disable`: the OOM killer of the cgroup is off.
        kill_disabled: bool,
        /// `under_oom`: the cgroup is out of memory and tasks wait.
        under_oom: bool,
    },
    /// Every source was read up to this time, so windows that end before it can close. Also comes
    /// before every batch of records.
    Tick {
        /// Boot clock, nanoseconds.
        boot_ns: u64,
    },
    /// Begin a recording of a cgroup with its descendants, or of a process with its descendants.
    RecordingBegin {
        /// kernfs id of the cgroup; null to follow a process.
        cgroup_id: Option<u64>,
        /// Process id of a running process to follow; null for a cgroup.
        pid: Option<u32>,
        /// Program and arguments; empty when a running process or cgroup is recorded.
        command: Vec<String>,
        /// Boot clock, nanoseconds.
        boot_ns: u64,
    },
    /// End the recording. The engine emits [`crate::output::Output::Save`] with kind `recording`.
    RecordingEnd {
        /// Boot clock, nanoseconds.
        boot_ns: u64,
        /// Exit code of the command; null when it was killed by a signal or still runs.
        exit_code: Option<i32>,
        /// Signal that killed the command; null otherwise.
        signal: Option<i32>,
        /// Peak of the cgroup from `memory.peak` (v1 `memory.max_usage_in_bytes`); null when
        /// unknown.
        cgroup_peak_bytes: Option<u64>,
    },
    /// The run ends: close every open incident now.
    Stop {
        /// Boot clock, nanoseconds.
        boot_ns: u64,
    },
}

/// Settings of the engine. They are part of the journal, so that a replay decides the same.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Settings {
    /// How far an incident reaches back before its event, nanoseconds (flag `--before`).
    pub before_ns: u64,
    /// How long an incident stays open after its event, nanoseconds (flag `--after`).
    pub after_ns: u64,
    /// RSS threshold (flag `--quantum`), bytes: how far resident memory of a process has to move
    /// for a record.
    #[serde(rename = "quantum_bytes")]
    pub rss_threshold_bytes: u64,
    /// Cgroup version of the memory controller: 1 or 2.
    pub cgroup_version: u32,
    /// Clock ticks a second (`sysconf(_SC_CLK_TCK)`), the unit of start times in /proc.
    pub ticks_per_second: u64,
    /// Whether the kernel log is read. Only then is a kill that is missing from it a disagreement.
    pub kernel_log: bool,
    /// Whether SIGKILLs are seen (signal_generate is attached). Otherwise every mark counts as a
    /// kill.
    pub kills_seen: bool,
    /// Whether the end of reclaim is seen. Otherwise it is unknown how long reclaim delayed tasks.
    pub stalls_seen: bool,
    /// Hooks that are not attached, each as its name, a colon, and what is lost without it.
    pub degraded: Vec<String>,
    /// Whether spikes become incidents.
    pub spikes: bool,
    /// Whether near misses become incidents.
    pub near_misses: bool,
    /// Sample interval (flag `--sample`), bytes: how much a process grows between two stacks, on
    /// average. 0: no stacks are taken.
    pub sample_bytes: u64,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            before_ns: 30_000_000_000,
            after_ns: 500_000_000,
            rss_threshold_bytes: 256 * 1024,
            cgroup_version: 2,
            ticks_per_second: 100,
            kernel_log: false,
            kills_seen: true,
            stalls_seen: true,
            degraded: Vec::new(),
            spikes: true,
            near_misses: true,
            sample_bytes: 0,
        }
    }
}

/// A memory cgroup, as its files show it. A value is `None` when there is no such file or no limit.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CgroupFound {
    /// kernfs id: inode number of its directory.
    pub id: u64,
    /// kernfs id of its parent; `None` for the root.
    pub parent_id: Option<u64>,
    /// Path from the root of the memory hierarchy, starting with `/`; escaped where not printable, and cut
    /// when it is very long, so it need not lead to the cgroup.
    pub path: String,
    /// When the files were read, boot clock, nanoseconds.
    pub boot_ns: u64,
    /// `memory.current`, on v1 `memory.usage_in_bytes`. `None` also when the fact only identifies
    /// the cgroup, as in a preamble.
    pub usage_bytes: Option<u64>,
    /// `memory.max`, on v1 `memory.limit_in_bytes`; `None` also for "max".
    pub limit_bytes: Option<u64>,
    /// `memory.peak`, on v1 `memory.max_usage_in_bytes`.
    pub peak_bytes: Option<u64>,
}

/// A process that ran already when tracing began. /proc has its start only in clock ticks; the
/// exact start comes with its first record.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessFound {
    /// Process id (tgid).
    pub pid: u32,
    /// Parent's process id.
    pub parent_pid: u32,
    /// Start on the boot clock in clock ticks (field 22 of /proc/PID/stat).
    pub start_ticks: u64,
    /// Name of the main thread (field 2 of /proc/PID/stat), at most 15 bytes.
    pub comm: String,
    /// kernfs id of its memory cgroup; 0 when unknown.
    pub cgroup_id: u64,
    /// When /proc was read, boot clock, nanoseconds.
    pub boot_ns: u64,
    /// `RssAnon` of /proc/PID/status.
    pub anon_bytes: u64,
    /// `RssFile` of /proc/PID/status.
    pub file_bytes: u64,
    /// `RssShmem` of /proc/PID/status.
    pub shmem_bytes: u64,
    /// `VmSwap` of /proc/PID/status.
    pub swap_bytes: u64,
    /// `VmHWM` of /proc/PID/status, the kernel's peak.
    pub peak_bytes: u64,
}

/// A line of the kernel log about an OOM kill.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KernelLogLine {
    /// printk time of the line, nanoseconds (the log has microseconds).
    pub printk_ns: u64,
    /// When the line was read, boot clock, nanoseconds. printk's clock is not the boot clock.
    pub read_boot_ns: u64,
    /// The parsed line.
    pub line: KernelLogEvent,
}

/// A parsed line of the kernel log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "line", rename_all = "snake_case")]
pub enum KernelLogEvent {
    /// `oom-kill:constraint=...`. The kernel limits the rate of these lines.
    OomKill {
        /// `constraint=`, such as `CONSTRAINT_MEMCG`.
        constraint: String,
        /// `oom_memcg=`: path of the cgroup that ran out; absent for a global OOM.
        oom_memcg: Option<String>,
        /// `task_memcg=`: path of the victim's cgroup.
        task_memcg: Option<String>,
        /// `task=`: name of the victim.
        comm: String,
        /// `pid=`: process or thread id of the victim.
        pid: u32,
    },
    /// `... Killed process PID (comm) ...`, one line for each kill.
    Killed {
        /// Process or thread id of the victim.
        pid: u32,
        /// Name of the victim.
        comm: String,
    },
    /// The kernel overwrote lines before they were read: sequence numbers have a gap.
    Gap {
        /// How many lines.
        lines: u64,
    },
    /// The log cannot be read any more: nothing is known of kills since it was read last.
    Unreadable,
}
