//! What the engine emits: requests, which its session carries out and may answer with facts, and
//! outputs, which the caller of the session handles.

use memtrace_incident::{Incident, KillEntry, PressureLimit, SigkillEntry};

/// What one or more inputs led to, in order. The engine only appends; the caller drains both lists.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Out {
    /// For the session. At most a few for each input.
    pub requests: Vec<Request>,
    /// For the caller of the session. At most a few for each input, and one for each incident that
    /// a tick closes.
    pub outputs: Vec<Output>,
}

/// What the engine asks its session to do. The session must not drop a request, because the engine
/// emits it once and does not wait for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// Look up a cgroup that a record named and no fact has described, and answer with
    /// [`crate::input::Fact::Cgroup`]; no answer when the cgroup is gone. Until then its path and
    /// its parent are unknown, so its memory counts for no ancestor. The engine repeats the request
    /// at most every 5 s, when further records name the cgroup, and at each kill.
    LookUpCgroup {
        /// kernfs id.
        id: u64,
        /// A kill waits for the answer, so it comes before others.
        urgent: bool,
    },
    /// Read `memory.oom_control` of a v1 cgroup that may be at its limit, for some seconds and for
    /// as long as it is under OOM, and answer with [`crate::input::Fact::OomControl`] at every
    /// change. Emitted at most once a second for each cgroup.
    WatchOomControl {
        /// kernfs id of the cgroup.
        cgroup_id: u64,
    },
    /// Set the RSS threshold of a cgroup, because its limit became small or no longer is. Emitted
    /// once for each change; the latest request for a cgroup counts.
    SetRssThreshold {
        /// kernfs id of the cgroup.
        cgroup_id: u64,
        /// How far resident memory of a process has to move for a record.
        threshold_bytes: u64,
    },
}

/// What the caller of the session has to do. The caller reports failures; the engine does not
/// repeat an output.
#[derive(Clone, Debug, PartialEq)]
pub enum Output {
    /// Write this line to the kill ledger and sync it at once. The incident follows later.
    Kill(KillEntry),
    /// Write this line to the SIGKILL ledger. No sync is needed.
    Sigkill(SigkillEntry),
    /// Save this finished incident.
    Save(Box<Incident>),
    /// Report this finding in the log and in metrics.
    Alert(Finding),
}

/// Something that is worth reporting at once: it becomes a log line and a counter.
#[derive(Clone, Debug, PartialEq)]
pub enum Finding {
    /// The OOM killer killed or chose a process.
    OomKill {
        /// Id of the incident, which is saved when its window closes.
        incident: String,
        /// kernfs id of the first victim's cgroup.
        cgroup_id: Option<u64>,
        /// Process id of the first victim.
        pid: u32,
        /// Name of the first victim.
        comm: String,
        /// Path of the first victim's cgroup; `None` when it is not known.
        cgroup_path: Option<String>,
    },
    /// Usage rose close to the limit and fell again.
    Spike {
        /// Id of the incident.
        incident: String,
        /// Path of the cgroup; `None` when it is not known.
        cgroup_path: Option<String>,
        /// Highest usage of the spike.
        peak_bytes: u64,
        /// Limit of the cgroup.
        limit_bytes: u64,
    },
    /// A limit was hit and reclaim ran, without a kill.
    NearMiss {
        /// Id of the incident.
        incident: String,
        /// Path of the cgroup; `None` when it is not known.
        cgroup_path: Option<String>,
        /// kernfs id of the cgroup.
        cgroup_id: u64,
        /// Which limit was hit.
        limit: PressureLimit,
        /// How often that limit was hit.
        hits: u64,
        /// How long reclaim delayed tasks, summed, nanoseconds; `None` when the end of reclaim is
        /// not seen.
        stalled_ns: Option<u64>,
    },
    /// A cgroup is out of memory with its OOM killer off. Its tasks wait until memory is freed, the
    /// limit is raised or the OOM killer is switched on.
    Stuck {
        /// Id of the incident, which is saved when the cgroup is no longer stuck.
        incident: String,
        /// Path of the cgroup; `None` when it is not known.
        cgroup_path: Option<String>,
        /// Usage of the cgroup; `None` when it was not read.
        usage_bytes: Option<u64>,
        /// Limit of the cgroup; `None` when it was not read.
        limit_bytes: Option<u64>,
        /// Number of processes in the cgroup and below it.
        tasks: u64,
    },
    /// A cgroup is no longer stuck.
    Unstuck {
        /// Id of the incident, the same as in [`Finding::Stuck`].
        incident: String,
        /// Path of the cgroup; `None` when it is not known.
        cgroup_path: Option<String>,
        /// How long the cgroup was under OOM, nanoseconds.
        under_oom_ns: u64,
    },
    /// Only one of kernel log and hooks has a kill.
    Disagreement {
        /// Process id of the victim.
        pid: u32,
        /// The source that has it: `kernel_log` or `hook`.
        only_in: String,
    },
}
