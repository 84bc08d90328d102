//! Lines of the kill ledger that no hook led to: a stretch in which no agent watched, and the kills
//! in it, as far as the kernel still knows of them. Each has a `source`; a line without one is a
//! [`KillEntry`]. Readers that know [`KillEntry`] alone skip these lines, because they lack its
//! fields.
//!
//! ```
//! use memtrace_incident::{KillLine, UnwatchedEntry};
//!
//! let line = r#"{"source":"counter","boot_id":"b","boot_ns":9,"wall":"2026-03-01T03:12:45Z",
//!     "since_boot_ns":5,"cgroup_id":7,"cgroup_path":"/app","kills":2}"#;
//! let KillLine::Unwatched(UnwatchedEntry::Counter(counted)) = serde_json::from_str(line).unwrap() else { panic!() };
//! assert_eq!(counted.kills, 2);
//! ```

use serde::{Deserialize, Serialize};

use crate::KillEntry;

/// One line of the kill ledger, `kills.jsonl`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum KillLine {
    /// A stretch without an agent, or what was found out about kills in it.
    Unwatched(UnwatchedEntry),
    /// A kill that hooks saw.
    Kill(KillEntry),
}

/// A line that no hook led to, by its `source`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "source", rename_all = "snake_case")]
pub enum UnwatchedEntry {
    /// No agent watched from one moment to another.
    NotWatched(NotWatched),
    /// A kill that only the kernel log has.
    KernelLog(LoggedKill),
    /// Kills that only the counter of a cgroup has.
    Counter(CountedKills),
    /// How many kills these lines stand for. Follows them.
    UnwatchedKills(UnwatchedKills),
}

/// A moment on both clocks.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Moment {
    /// Boot that `boot_ns` is of (`/proc/sys/kernel/random/boot_id`).
    pub boot_id: String,
    /// Boot clock, nanoseconds.
    pub boot_ns: u64,
    /// Wall time, RFC 3339 UTC.
    pub wall: String,
}

/// No agent watched: between the end of one run and the start of the next.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NotWatched {
    /// The last moment up to which the run before is known to have watched.
    pub from: Moment,
    /// When the hooks of the next run were attached.
    pub to: Moment,
    /// How long that was, nanoseconds; by the wall clock when the machine was booted in between,
    /// and null when that went backwards.
    pub duration_ns: Option<u64>,
    /// Whether the machine was booted in between. What the kernel knew before is gone.
    pub rebooted: bool,
    /// Whether the run before stopped properly; null when its journal is gone.
    pub stopped: Option<bool>,
}

/// A kill that the kernel log has and no hook saw.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LoggedKill {
    /// Boot that the times are of.
    pub boot_id: String,
    /// Sequence number of its `Killed process` line in the kernel log of that boot.
    pub kernel_log_seq: u64,
    /// When it was killed, boot clock, nanoseconds. printk's clock is another one: after weeks this
    /// is seconds off.
    pub boot_ns: u64,
    /// The same moment as wall time, RFC 3339 UTC.
    pub wall: String,
    /// Victim's process id; that of a thread when the main thread had exited.
    pub pid: u32,
    /// Victim's name, escaped where not printable.
    pub comm: String,
    /// Victim's real user id; null when the line does not say.
    pub uid: Option<u32>,
    /// Victim's anonymous memory; null when the line does not say.
    pub anon_bytes: Option<u64>,
    /// Victim's file memory; null as above.
    pub file_bytes: Option<u64>,
    /// Victim's shared memory; null as above.
    pub shmem_bytes: Option<u64>,
    /// Victim's cgroup. Null when the kernel did not log it: it does so for ten decisions in five
    /// seconds, and for one victim of a group.
    pub cgroup_path: Option<String>,
    /// Cgroup that ran out; null as above, and when the machine ran out.
    pub oom_cgroup_path: Option<String>,
}

/// Kills in a cgroup that are neither from a hook nor in the kernel log with that cgroup: what is
/// left of the kernel's own count, `oom_kill` in `memory.events.local`, on v1 in
/// `memory.oom_control`. A [`LoggedKill`] without a cgroup can be one of them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CountedKills {
    /// Boot that the times are of.
    pub boot_id: String,
    /// When the count was read, boot clock, nanoseconds.
    pub boot_ns: u64,
    /// The same moment as wall time, RFC 3339 UTC.
    pub wall: String,
    /// When the count before was read, boot clock, nanoseconds.
    pub since_boot_ns: u64,
    /// kernfs id of the cgroup.
    pub cgroup_id: u64,
    /// Path of the cgroup, escaped where not printable.
    pub cgroup_path: String,
    /// How many were killed.
    pub kills: u64,
}

/// What was found out about kills that no hook saw.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnwatchedKills {
    /// Boot that the times are of.
    pub boot_id: String,
    /// When the kernel log and the counts were read, boot clock, nanoseconds.
    pub boot_ns: u64,
    /// The same moment as wall time, RFC 3339 UTC.
    pub wall: String,
    /// From when on they were accounted for, boot clock, nanoseconds.
    pub since_boot_ns: u64,
    /// How many kills there were at least: `with_cgroup`, and the larger one of `without_cgroup`
    /// and `counted`, which can be the same kills. More than that were in cgroups that are gone.
    pub kills: u64,
    /// Lines of the kernel log that name the cgroup.
    pub with_cgroup: u64,
    /// Lines of the kernel log that do not.
    pub without_cgroup: u64,
    /// Kills in counts of cgroups.
    pub counted: u64,
    /// Lines of the kernel log that were overwritten before they were read; null when the log was
    /// not read, or it is not known where the run before had ended to read.
    pub kernel_log_lines_lost: Option<u64>,
    /// Kills in the kernel log, or in counts of cgroups, that have no line because there were too
    /// many.
    pub left_out: u64,
    /// Cgroups whose count is not compared, because that of before is not known.
    pub cgroups_not_compared: u64,
}

impl UnwatchedEntry {
    /// When it happened, or was found out: wall time, RFC 3339 UTC.
    pub fn wall(&self) -> &str {
        match self {
            Self::NotWatched(gap) => &gap.to.wall,
            Self::KernelLog(kill) => &kill.wall,
            Self::Counter(counted) => &counted.wall,
            Self::UnwatchedKills(kills) => &kills.wall,
        }
    }
}

impl KillLine {
    /// When it happened, or was found out: wall time, RFC 3339 UTC.
    pub fn wall(&self) -> &str {
        match self {
            Self::Unwatched(entry) => entry.wall(),
            Self::Kill(kill) => &kill.wall,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a reader of version 0.1 knows of a line: it has no `source`.
    const OLD: &str = r#"{"incident":"01ARZ3NDEKTSV4RRFFQ69G5FAV","boot_ns":1,"wall":"2026-03-01T03:12:45Z","pid":7,
        "start_boot_ns":2,"comm":"a","cgroup_path":null,"usage_bytes":null,"limit_bytes":null,"trigger_pid":3,
        "killed":true}"#;

    #[test]
    fn a_line_without_a_source_is_a_kill_as_before() {
        let line: KillLine = serde_json::from_str(OLD).unwrap();
        assert!(matches!(&line, KillLine::Kill(kill) if kill.pid == 7 && kill.boot_id.is_none()));
        let written = serde_json::to_string(&line).unwrap();
        assert_eq!(written, OLD.replace("\n        ", ""));
    }

    #[test]
    fn other_lines_come_back_and_older_readers_skip_them() {
        let at = Moment { boot_id: "b".into(), boot_ns: 5, wall: "2026-03-01T03:12:45Z".into() };
        let gap = NotWatched { from: at.clone(), to: at, duration_ns: Some(0), rebooted: false, stopped: None };
        let kills = UnwatchedKills { kills: 3, ..UnwatchedKills::default() };
        for (entry, source) in [
            (UnwatchedEntry::NotWatched(gap), "not_watched"),
            (UnwatchedEntry::UnwatchedKills(kills), "unwatched_kills"),
        ] {
            let line = KillLine::Unwatched(entry);
            let text = serde_json::to_string(&line).unwrap();
            assert!(text.starts_with(&format!("{{\"source\":\"{source}\",")), "{text}");
            assert_eq!(serde_json::from_str::<KillLine>(&text).unwrap(), line);
            assert!(serde_json::from_str::<KillEntry>(&text).is_err());
        }
        assert!(serde_json::from_str::<KillLine>(r#"{"source":"of_a_later_version"}"#).is_err());
    }
}
