//! What happened while no agent ran (pure): how long that was, and which processes were killed.
//!
//! Two witnesses are left. The kernel log names processes, but overwrites its oldest records, and
//! the line with the cgroup is limited to ten kills in five seconds. The counters of cgroups are
//! exact, but name no process, and go with their cgroup. So a kill is looked for in the log first,
//! by the number of the record up to which the run before had read, and what is then left of a
//! counter's difference is a count. Kills that hooks saw are in the ledger, from both runs; they
//! are left out of both. Example: a counter went from 2 to 7; the ledger has one kill since, the
//! log two more with that cgroup; the ledger gets these two, and a count of 2.
//!
//! Everything is compared within one boot: after another boot all that the kernel has is unwatched.

use std::collections::BTreeMap;

use super::watch_state::{Baseline, WatchState};
use crate::cgroup::oom_kills::OomKillCounts;
use crate::kernel::log::backlog::{Backlog, KilledProcess};
use memtrace_engine::decode::printable;
use memtrace_incident::{
    CountedKills, KillEntry, KillLine, LoggedKill, Moment, NotWatched, UnwatchedEntry, UnwatchedKills,
};

/// Counts of cgroups that get a line, those with the most kills first; the others are counted.
const COUNTED_CAP: usize = 1024;
/// Kills of the log that get a line; the others are counted. With the counts it is less than a
/// ledger holds back.
const LOGGED_CAP: usize = 2048;
/// A kill is counted and its SIGKILL sent under one spinlock (mm/oom_kill.c, `__oom_kill_process`):
/// a SIGKILL this soon after a count was read can be in it. Whether one between the two times of a
/// reading is in it is not known.
const COUNTED_BEFORE_NS: u64 = 1_000_000;
/// Times of a kill by hook and log differ by this much at most, and by what the clocks drift apart.
const CLOCKS_DIFFER_NS: u64 = 2_000_000_000;
/// CLOCK_MONOTONIC_RAW and printk's clock drift apart by less than one part in this (20 ppm): each
/// has its own rounded factor from the same counter.
const DRIFT_PARTS: u64 = 50_000;
/// What the engine puts behind a path that the hook has cut (`PATH_CUT` in memtrace-common).
const CUT: char = '…';
/// Bytes of such a path at least. Names of cgroups may end as a cut path does.
const CUT_FROM: usize = memtrace_common::event::PATH_BYTES - 8;

/// What is known of the run before.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct LastRun {
    /// Last moment in its journal.
    pub(super) watched_until: Moment,
    /// Whether it stopped properly.
    pub(super) stopped: bool,
}

/// The stretch between the run before and `now`; `None` when there was no run before. The journal
/// knows to a tenth of a second until when it watched, the state file to ten seconds.
pub(super) fn not_watched(state: Option<&WatchState>, journal: Option<&LastRun>, now: &Moment) -> Option<NotWatched> {
    let candidates = [state.map(|state| &state.watched_until), journal.map(|run| &run.watched_until)];
    let this_boot = |moment: &&Moment| moment.boot_id == now.boot_id;
    let known = candidates.into_iter().flatten();
    let last = known.clone().filter(this_boot).max_by_key(|moment| moment.boot_ns);
    let from = last.or_else(|| known.max_by(|a, b| a.wall.cmp(&b.wall)))?;
    let rebooted = from.boot_id != now.boot_id;
    let duration_ns =
        if rebooted { wall_ns_between(from, now) } else { Some(now.boot_ns.saturating_sub(from.boot_ns)) };
    let stopped = journal.filter(|run| run.watched_until.boot_id == from.boot_id).map(|run| run.stopped);
    Some(NotWatched { from: from.clone(), to: now.clone(), duration_ns, rebooted, stopped })
}

fn wall_ns_between(from: &Moment, to: &Moment) -> Option<u64> {
    let parse = |moment: &Moment| moment.wall.parse::<jiff::Timestamp>().ok();
    let (from, to) = (parse(from)?, parse(to)?);
    u64::try_from(to.as_nanosecond().checked_sub(from.as_nanosecond())?).ok()
}

/// From where on kills of the stretch are to be found.
pub(super) fn baseline(state: Option<WatchState>, gap: &NotWatched) -> Baseline {
    if gap.rebooted {
        return Baseline::of_boot(&gap.to.boot_id);
    }
    let known = state.and_then(|state| state.baseline).filter(|known| known.boot_id == gap.to.boot_id);
    known.unwrap_or_else(|| Baseline::at(&gap.from))
}

/// printk's clock beside the boot clock, at one moment.
#[derive(Clone, Copy, Debug)]
pub(super) struct LogClock {
    pub(super) boot_ns: u64,
    pub(super) raw_ns: u64,
}

impl LogClock {
    /// The boot time of a line, as near as it is known.
    fn boot_ns(self, printk_ns: u64) -> u64 {
        self.boot_ns.saturating_sub(self.raw_ns.saturating_sub(printk_ns))
    }

    /// How far that can be off.
    fn tolerance_ns(self) -> u64 {
        CLOCKS_DIFFER_NS.saturating_add(self.raw_ns / DRIFT_PARTS)
    }
}

/// What the kernel still knew when the hooks were attached.
#[derive(Clone, Debug)]
pub(super) struct Gathered {
    pub(super) baseline: Baseline,
    /// `None` when the log is not read, or cannot be.
    pub(super) backlog: Option<Backlog>,
    /// Whether the log is to be read.
    pub(super) log_wanted: bool,
    pub(super) counts: OomKillCounts,
    pub(super) clock: LogClock,
}

impl Gathered {
    /// From where on the next run has to look.
    pub(super) fn into_baseline(self) -> Baseline {
        Baseline {
            boot_id: self.baseline.boot_id,
            since_boot_ns: self.clock.boot_ns,
            kernel_log_seq: self.backlog.and_then(|backlog| backlog.next_seq),
            counts: self.counts,
        }
    }

    /// Lines for the ledger, which has every kill that hooks saw until `clock`; none when nothing
    /// was killed and no line of the log was lost: nothing found is not nothing lost. `wall` is the
    /// wall time of a boot time.
    pub(super) fn account(&self, ledger: &[KillLine], wall: impl Fn(u64) -> String) -> Vec<UnwatchedEntry> {
        let known = Known::of(ledger, &self.baseline);
        let logged = self.logged(&known, &wall);
        let without_cgroup = logged.iter().filter(|kill| kill.cgroup_path.is_none()).count() as u64;
        let with_cgroup = (logged.len() as u64).saturating_sub(without_cgroup);
        let (mut counted, cgroups_not_compared) = self.counted(&known, &logged, &wall);
        let counts = counted.iter().fold(0, |sum: u64, counted| sum.saturating_add(counted.kills));
        let overflow = self.backlog.as_ref().map_or(0, |backlog| backlog.left_out);
        let log_is_whole = self.backlog.as_ref().map_or(!self.log_wanted, |backlog| backlog.lost == Some(0));
        if logged.is_empty() && counts == 0 && overflow == 0 && log_is_whole {
            return Vec::new();
        }
        let lines = logged.len().min(LOGGED_CAP);
        counted.sort_by(|a, b| (b.kills, &a.cgroup_path).cmp(&(a.kills, &b.cgroup_path)));
        let beyond: u64 = counted.iter().skip(COUNTED_CAP).map(|counted| counted.kills).sum();
        let unlisted = (logged.len() as u64).saturating_sub(lines as u64);
        let total = UnwatchedKills {
            boot_id: self.baseline.boot_id.clone(),
            boot_ns: self.clock.boot_ns,
            wall: wall(self.clock.boot_ns),
            since_boot_ns: self.baseline.since_boot_ns,
            kills: with_cgroup.saturating_add(without_cgroup.max(counts)),
            with_cgroup,
            without_cgroup,
            counted: counts,
            kernel_log_lines_lost: self.backlog.as_ref().and_then(|backlog| backlog.lost),
            left_out: overflow.saturating_add(unlisted).saturating_add(beyond),
            cgroups_not_compared,
        };
        let logged = logged.into_iter().take(LOGGED_CAP).map(UnwatchedEntry::KernelLog);
        let counted = counted.into_iter().take(COUNTED_CAP).map(UnwatchedEntry::Counter);
        logged.chain(counted).chain([UnwatchedEntry::UnwatchedKills(total)]).collect()
    }

    /// Kills in the log that the ledger has neither from a hook nor from the log.
    fn logged(&self, known: &Known<'_>, wall: impl Fn(u64) -> String) -> Vec<LoggedKill> {
        let kills = self.backlog.iter().flat_map(|backlog| &backlog.kills);
        let (since, tolerance) = (self.baseline.since_boot_ns, self.clock.tolerance_ns());
        let numbered = self.baseline.kernel_log_seq.is_some();
        let is_new = |kill: &&KilledProcess| {
            let at = self.clock.boot_ns(kill.printk_ns);
            let in_time = numbered || at.saturating_add(tolerance) >= since;
            // A log that was read late has lines of kills before `since` too.
            let is_hooked = known.hooked_near(kill.pid, at, tolerance);
            in_time && !is_hooked && !known.logged.iter().any(|before| before.kernel_log_seq == kill.seq)
        };
        let text = |path: &Option<String>| path.as_ref().map(|path| printable(path.as_bytes()));
        let entry = |kill: &KilledProcess| {
            let boot_ns = self.clock.boot_ns(kill.printk_ns).clamp(since, self.clock.boot_ns.max(since));
            LoggedKill {
                boot_id: self.baseline.boot_id.clone(),
                kernel_log_seq: kill.seq,
                boot_ns,
                wall: wall(boot_ns),
                pid: kill.pid,
                comm: printable(kill.comm.as_bytes()),
                uid: kill.uid,
                anon_bytes: kill.anon_bytes,
                file_bytes: kill.file_bytes,
                shmem_bytes: kill.shmem_bytes,
                cgroup_path: text(&kill.cgroup_path),
                oom_cgroup_path: text(&kill.oom_cgroup_path),
            }
        };
        kills.filter(is_new).map(entry).collect()
    }

    /// What is left of the counters' differences, and how many cgroups cannot be compared.
    fn counted(
        &self,
        known: &Known<'_>,
        logged: &[LoggedKill],
        wall: impl Fn(u64) -> String,
    ) -> (Vec<CountedKills>, u64) {
        let before: BTreeMap<(u64, &str), (u64, u64, u64)> = self
            .baseline
            .counts
            .cgroups
            .iter()
            .map(|cgroup| {
                let count = (cgroup.kills, cgroup.read_boot_ns, cgroup.read_until_ns());
                ((cgroup.id, cgroup.path.as_str()), count)
            })
            .collect();
        let mut in_log: BTreeMap<&str, u64> = BTreeMap::new();
        for path in known.logged.iter().copied().chain(logged).filter_map(|kill| kill.cgroup_path.as_deref()) {
            let count = in_log.entry(path).or_default();
            *count = count.saturating_add(1);
        }
        let (mut counted, mut not_compared) = (Vec::new(), 0u64);
        for now in &self.counts.cgroups {
            // One that is not in a complete list was made later, unless it had another name then
            // (version 1).
            let made_later = self.baseline.counts.complete
                && before.range((now.id, "")..).next().is_none_or(|next| next.0.0 != now.id);
            let since = self.baseline.since_boot_ns;
            let fresh = made_later.then_some((0, since, since));
            let listed = before.get(&(now.id, now.path.as_str())).copied().or(fresh);
            let Some((kills, read_ns, read_until_ns)) = listed else {
                not_compared = not_compared.saturating_add(u64::from(now.kills > 0));
                continue;
            };
            // A counter that fell is that of another cgroup with the same id and path.
            let more = now.kills.checked_sub(kills).unwrap_or(now.kills);
            if more == 0 {
                continue;
            }
            let path = printable(now.path.as_bytes());
            let counted_before = known.counted_in(&path, now.id, read_ns);
            let (seen, perhaps) =
                known.hooked_in(&path, (read_ns, read_until_ns), (now.read_boot_ns, now.read_until_ns()));
            let explained = seen.saturating_add(counted_before);
            let left = more.saturating_sub(explained).saturating_sub(in_log.get(path.as_str()).copied().unwrap_or(0));
            // What may be in the difference is not claimed a second time.
            not_compared = not_compared.saturating_add(u64::from(left > 0 && perhaps > 0));
            let left = left.saturating_sub(perhaps);
            if left > 0 {
                counted.push(CountedKills {
                    boot_id: self.baseline.boot_id.clone(),
                    boot_ns: now.read_boot_ns,
                    wall: wall(now.read_boot_ns),
                    since_boot_ns: read_ns,
                    cgroup_id: now.id,
                    cgroup_path: path,
                    kills: left,
                });
            }
        }
        (counted, not_compared)
    }
}

/// What the ledger has since the baseline.
#[derive(Default)]
struct Known<'a> {
    /// Kills of this boot that hooks saw, and those that may be of it. Cap: the ledger.
    hooked: Vec<&'a KillEntry>,
    /// When those of a process id were. Cap: the ledger.
    hooked_ns: BTreeMap<u32, Vec<u64>>,
    /// Kills that an earlier run found in the log. Cap: the ledger.
    logged: Vec<&'a LoggedKill>,
    /// Counts that an earlier run wrote, and then could not leave its state. Cap: the ledger.
    counted: Vec<&'a CountedKills>,
}

impl<'a> Known<'a> {
    fn of(ledger: &'a [KillLine], baseline: &Baseline) -> Self {
        let mut known = Self::default();
        let ours = |boot_id: &str| boot_id == baseline.boot_id;
        for line in ledger {
            match line {
                KillLine::Kill(kill) if kill.boot_id.as_deref().is_none_or(ours) => {
                    known.hooked.push(kill);
                    // The log has the id of the thread that was marked.
                    for id in std::iter::once(kill.pid).chain(kill.tid) {
                        known.hooked_ns.entry(id).or_default().push(kill.boot_ns);
                    }
                }
                KillLine::Unwatched(UnwatchedEntry::KernelLog(kill))
                    if ours(&kill.boot_id) && baseline.kernel_log_seq.is_none_or(|seq| kill.kernel_log_seq >= seq) =>
                {
                    known.logged.push(kill);
                }
                KillLine::Unwatched(UnwatchedEntry::Counter(counted)) if ours(&counted.boot_id) => {
                    known.counted.push(counted);
                }
                _ => {}
            }
        }
        known
    }

    /// Whether hooks saw a kill of this process id within `tolerance_ns`.
    fn hooked_near(&self, pid: u32, at_ns: u64, tolerance_ns: u64) -> bool {
        let near = |kill_ns: &u64| kill_ns.abs_diff(at_ns) <= tolerance_ns;
        self.hooked_ns.get(&pid).is_some_and(|kills| kills.iter().any(near))
    }

    /// Kills of a cgroup that an earlier run counted after `after_ns`.
    fn counted_in(&self, path: &str, id: u64, after_ns: u64) -> u64 {
        let counted = |counted: &&&CountedKills| {
            counted.cgroup_id == id && counted.cgroup_path == path && counted.boot_ns > after_ns
        };
        self.counted.iter().filter(counted).fold(0u64, |sum, counted| sum.saturating_add(counted.kills))
    }

    /// Kills in a cgroup that hooks saw between two readings of its counter, each from one time to
    /// another: those that the difference has, and those that it may have.
    fn hooked_in(&self, path: &str, first: (u64, u64), second: (u64, u64)) -> (u64, u64) {
        let (surely, perhaps) = (first.1.saturating_add(COUNTED_BEFORE_NS), second.1.saturating_add(COUNTED_BEFORE_NS));
        let (mut seen, mut doubtful) = (0u64, 0u64);
        for kill in self.hooked.iter().filter(|kill| kill.killed && kill.boot_ns > first.0 && kill.boot_ns <= perhaps) {
            if kill.cgroup_path.as_deref().is_some_and(|known| is_path(known, path)) {
                let is_sure = kill.boot_ns > surely && kill.boot_ns <= second.0;
                let count = if is_sure { &mut seen } else { &mut doubtful };
                *count = count.saturating_add(1);
            }
        }
        (seen, doubtful)
    }
}

/// Whether a path of the ledger is this one. The hook cuts long ones, perhaps inside a character.
fn is_path(known: &str, path: &str) -> bool {
    let begin = known.strip_suffix(CUT).filter(|begin| begin.len() >= CUT_FROM);
    known == path || begin.is_some_and(|begin| path.starts_with(without_half_a_character(begin)))
}

/// Without up to three bytes at the end that are escaped, `\xNN`: those of a character have up to four.
fn without_half_a_character(mut text: &str) -> &str {
    for _ in 0..3 {
        let Some((before, code)) = text.rsplit_once("\\x") else { break };
        if code.len() != 2 || !code.bytes().all(|digit| digit.is_ascii_hexdigit()) {
            break;
        }
        text = before;
    }
    text
}

#[cfg(test)]
mod tests;
