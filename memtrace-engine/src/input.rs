//! What goes into the engine.

use memtrace_incident::Host;
use serde::{Deserialize, Serialize};

mod stacks;

pub use stacks::{ModuleFound, PATHS_KNOWN, PathFound, PathFrame, StackFound};

/// One input. The journal stores each before the engine sees it, so a replay is exact.
#[derive(Clone, Debug, PartialEq)]
pub enum Input<'a> {
    /// A wire record, as the ring had it.
    Record(&'a [u8]),
    /// Everything else.
    Fact(Fact),
}

impl Input<'_> {
    /// When this input was made, where it says so.
    pub fn boot_ns(&self) -> Option<u64> {
        match self {
            // Bytes 8 to 16 of every record (`event::Header`).
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

/// An input that does not come from a ring. Stored as JSON in the journal.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "fact", rename_all = "snake_case")]
pub enum Fact {
    /// Start of a run: the machine and the engine's settings. First in every journal.
    Start {
        /// The machine.
        host: Host,
        /// Settings the engine decides with.
        settings: Settings,
    },
    /// The two clocks read together.
    Anchor {
        /// Boot clock, nanoseconds.
        boot_ns: u64,
        /// Wall clock, nanoseconds since the Unix epoch.
        wall_ns: i64,
        /// Half the time the reading took.
        uncertainty_ns: u64,
    },
    /// A memory cgroup that exists: found at start or after a record named an unknown id.
    Cgroup(CgroupFound),
    /// A process found running at start.
    Process(ProcessFound),
    /// A kernel log line about an OOM kill.
    KernelLog(KernelLogLine),
    /// Names of a kernel stack taken at a kill (the addresses themselves are never stored).
    KernelStack {
        /// Victim's process id.
        victim_pid: u32,
        /// Victim's start, boot clock.
        victim_start_boot_ns: u64,
        /// Function names, innermost first.
        functions: Vec<String>,
    },
    /// A module that frames lie in. Said before the first path that names it, and again in every journal segment.
    Module(ModuleFound),
    /// Frames of a stack. Said before the first stack that has them, and again in every journal segment.
    Path(PathFound),
    /// Memory grew, and this code did it.
    Stack(StackFound),
    /// Loss counters of the kernel side and of the reader, as totals since the start.
    Losses {
        /// `ring/reason` and the total so far; only those that are not 0.
        totals: Vec<(String, u64)>,
    },
    /// What memory.oom_control of a watched cgroup says (v1), when it changed.
    OomControl {
        /// kernfs id.
        cgroup_id: u64,
        /// When it was read, boot clock, nanoseconds.
        boot_ns: u64,
        /// Its OOM killer is off.
        kill_disabled: bool,
        /// It is out of memory: tasks wait.
        under_oom: bool,
    },
    /// Time passes: windows close. Also sent before every batch of records.
    Tick {
        /// Boot clock, nanoseconds.
        boot_ns: u64,
    },
    /// Begin a recording: everything about this cgroup and its descendants goes into one file.
    RecordingBegin {
        /// kernfs id of the cgroup, or null to follow one process.
        cgroup_id: Option<u64>,
        /// Process id, when a running process is followed.
        pid: Option<u32>,
        /// Program and arguments.
        command: Vec<String>,
        /// Boot clock, nanoseconds.
        boot_ns: u64,
    },
    /// End the recording: the engine answers with [`crate::output::Output::Save`] of kind `recording`.
    RecordingEnd {
        /// Boot clock, nanoseconds.
        boot_ns: u64,
        /// Exit code of the command.
        exit_code: Option<i32>,
        /// Signal that ended it.
        signal: Option<i32>,
        /// The kernel's own peak of the cgroup, read from its file.
        cgroup_peak_bytes: Option<u64>,
    },
    /// The agent stops: close every open incident now.
    Stop {
        /// Boot clock, nanoseconds.
        boot_ns: u64,
    },
}

/// Settings the engine decides with; part of the journal, so that a replay decides the same.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Settings {
    /// History kept before an event, nanoseconds.
    pub before_ns: u64,
    /// How long an incident gathers after its event, nanoseconds.
    pub after_ns: u64,
    /// The rss hook's quantum, bytes.
    pub quantum_bytes: u64,
    /// Cgroup version of the memory controller: 1 or 2.
    pub cgroup_version: u32,
    /// Kernel clock ticks per second in /proc start times.
    pub ticks_per_second: u64,
    /// Whether the kernel log is read, so that a kill missing from it can be reported.
    pub kernel_log: bool,
    /// Whether SIGKILL is seen (signal_generate attached), so that "marked without a kill" can be told.
    pub kills_seen: bool,
    /// Whether the end of reclaim is seen, so that it can be told how long tasks were held up.
    pub stalls_seen: bool,
    /// Hooks of the plan that are not attached, with what is lost without them.
    pub degraded: Vec<String>,
    /// Save spikes as incidents.
    pub spikes: bool,
    /// Save near misses as incidents.
    pub near_misses: bool,
    /// A stack is taken when a process grew by about this much; 0: none are taken.
    pub sample_bytes: u64,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            before_ns: 30_000_000_000,
            after_ns: 500_000_000,
            quantum_bytes: 256 * 1024,
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

/// A memory cgroup as its files show it. `None`: no such file, or no limit.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CgroupFound {
    /// kernfs id (inode of its directory).
    pub id: u64,
    /// kernfs id of its parent; `None` for the root.
    pub parent_id: Option<u64>,
    /// Path from the root of the memory hierarchy, starting with `/`.
    pub path: String,
    /// When it was read, boot clock.
    pub boot_ns: u64,
    /// memory.current or memory.usage_in_bytes.
    pub usage_bytes: Option<u64>,
    /// memory.max or memory.limit_in_bytes; `None` also for "max".
    pub limit_bytes: Option<u64>,
    /// memory.peak or memory.max_usage_in_bytes.
    pub peak_bytes: Option<u64>,
}

/// A process found running. Its exact start is not in /proc: `start_ticks` is `start_boot_ns` cut to clock ticks.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessFound {
    /// Process id.
    pub pid: u32,
    /// Parent's process id.
    pub parent_pid: u32,
    /// Field 22 of /proc/PID/stat.
    pub start_ticks: u64,
    /// Name.
    pub comm: String,
    /// kernfs id of its memory cgroup.
    pub cgroup_id: u64,
    /// When it was read, boot clock.
    pub boot_ns: u64,
    /// RssAnon.
    pub anon_bytes: u64,
    /// RssFile.
    pub file_bytes: u64,
    /// RssShmem.
    pub shmem_bytes: u64,
    /// VmSwap.
    pub swap_bytes: u64,
    /// VmHWM.
    pub peak_bytes: u64,
}

/// A line of the kernel log about an OOM kill.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KernelLogLine {
    /// printk's clock, nanoseconds (microsecond resolution).
    pub printk_ns: u64,
    /// When the line was read, boot clock.
    pub read_boot_ns: u64,
    /// What it says.
    pub line: KernelLogEvent,
}

/// What a kernel log line says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "line", rename_all = "snake_case")]
pub enum KernelLogEvent {
    /// `oom-kill:constraint=...` (rate-limited by the kernel).
    OomKill {
        /// `constraint=`.
        constraint: String,
        /// `oom_memcg=`, absent for a global OOM.
        oom_memcg: Option<String>,
        /// `task_memcg=`.
        task_memcg: Option<String>,
        /// `task=`.
        comm: String,
        /// `pid=`.
        pid: u32,
    },
    /// `... Killed process PID (comm) ...` (one per kill).
    Killed {
        /// Process id.
        pid: u32,
        /// Name.
        comm: String,
    },
    /// Lines were lost: sequence numbers jumped.
    Gap {
        /// How many.
        lines: u64,
    },
}
