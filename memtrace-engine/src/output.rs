//! What comes out of the engine: requests, which its session carries out and answers with facts, and
//! outputs, which are for the session's caller.

use memtrace_incident::{Incident, KillEntry, PressureLimit, SigkillEntry};

/// What one or more inputs led to, in order. The caller empties it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Out {
    /// For the session.
    pub requests: Vec<Request>,
    /// For the session's caller.
    pub outputs: Vec<Output>,
}

/// What the engine asks of its session. None may be dropped: each is made once and taken for done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// A record named a cgroup nobody has described: look it up and answer with [`crate::input::Fact::Cgroup`], or
    /// with nothing when it is gone. It is asked again only for a later record of the same cgroup, seconds later; until
    /// then its path and its parent are unknown, and with them whose memory it counts as.
    LookUpCgroup {
        /// kernfs id.
        id: u64,
    },
    /// A cgroup on version 1 may be at its limit: read its memory.oom_control for some seconds, and as long as it is out
    /// of memory, and answer with [`crate::input::Fact::OomControl`] at every change. Made at most once a second for a
    /// cgroup.
    WatchOomControl {
        /// kernfs id.
        cgroup_id: u64,
        /// Its path.
        path: String,
    },
    /// A cgroup's limit is small, or no longer is: emit a reading of its processes whenever resident memory moved by
    /// this much. Made once a change of the limit; the last one for a cgroup counts.
    SetRssThreshold {
        /// kernfs id.
        cgroup_id: u64,
        /// Bytes.
        threshold_bytes: u64,
    },
}

/// What the session's caller has to do. One that fails is the caller's to report: the engine does not repeat it.
#[derive(Clone, Debug, PartialEq)]
pub enum Output {
    /// Put this kill on disk at once: it must survive whatever happens to the rest.
    Kill(KillEntry),
    /// Write down who sent this SIGKILL; nothing waits for it.
    Sigkill(SigkillEntry),
    /// Write this finished incident.
    Save(Box<Incident>),
    /// Report this to whoever listens.
    Alert(Finding),
}

/// Something worth a line in the log.
#[derive(Clone, Debug, PartialEq)]
pub enum Finding {
    /// The OOM killer killed or chose a process.
    OomKill {
        /// Incident id.
        incident: String,
        /// kernfs id of the victim's cgroup.
        cgroup_id: Option<u64>,
        /// Victim.
        pid: u32,
        /// Its name.
        comm: String,
        /// Its cgroup path.
        cgroup_path: Option<String>,
    },
    /// Memory rose close to the limit and fell again.
    Spike {
        /// Incident id.
        incident: String,
        /// Cgroup path.
        cgroup_path: Option<String>,
        /// Highest usage.
        peak_bytes: u64,
        /// Limit.
        limit_bytes: u64,
    },
    /// A limit was hit, reclaim ran, nobody was killed.
    NearMiss {
        /// Incident id.
        incident: String,
        /// Cgroup path.
        cgroup_path: Option<String>,
        /// kernfs id.
        cgroup_id: u64,
        /// Which limit.
        limit: PressureLimit,
        /// How often it was hit in the window.
        hits: u64,
        /// How long tasks were held up, nanoseconds; unknown without the end of reclaim.
        stalled_ns: Option<u64>,
    },
    /// A cgroup ran out of memory and its OOM killer is off: its tasks wait until somebody helps.
    Stuck {
        /// Id of the incident that is saved when it is over.
        incident: String,
        /// Cgroup path.
        cgroup_path: Option<String>,
        /// Its usage.
        usage_bytes: Option<u64>,
        /// Its limit.
        limit_bytes: Option<u64>,
        /// Processes in it.
        tasks: u64,
    },
    /// That is over.
    Unstuck {
        /// Incident id.
        incident: String,
        /// Cgroup path.
        cgroup_path: Option<String>,
        /// How long it took, nanoseconds.
        under_oom_ns: u64,
    },
    /// The kernel log and the hooks disagree about a kill.
    Disagreement {
        /// Process id.
        pid: u32,
        /// Which source has it: `kernel_log` or `hook`.
        only_in: String,
    },
}
