//! The kill ledger as a table: OOM kills, by whom they are known, and times in which no agent
//! watched.

use super::listing::{columns, path, when};
use memtrace_incident::{KillLine, UnwatchedEntry, units};
use memtrace_report::plain;

/// Lines of the ledger as a table, in the order given. Strings from the ledger are escaped.
pub(super) fn table(lines: &[KillLine]) -> String {
    let head = ["WHEN (UTC)", "VICTIM", "CGROUP", "KNOWN FROM"].map(str::to_owned);
    columns(std::iter::once(head).chain(lines.iter().map(row)))
}

fn row(line: &KillLine) -> [String; 4] {
    let process = |comm: &str, pid: u32| format!("{} ({pid})", plain::elide(comm, 24, true));
    let kills = |number| units::count(number, "kill", "kills");
    let (what, cgroup, known_from) = match line {
        KillLine::Kill(kill) => {
            let what = if kill.killed { "" } else { "only chosen, " };
            let known_from = format!("{what}incident {}", plain::elide(&kill.incident, 26, true));
            (process(&kill.comm, kill.pid), path(kill.cgroup_path.as_deref()), known_from)
        }
        KillLine::Unwatched(UnwatchedEntry::KernelLog(kill)) => {
            (process(&kill.comm, kill.pid), path(kill.cgroup_path.as_deref()), "the kernel log, not watched".to_owned())
        }
        KillLine::Unwatched(UnwatchedEntry::Counter(counted)) => {
            (kills(counted.kills), path(Some(&counted.cgroup_path)), "the cgroup's counter, not watched".to_owned())
        }
        KillLine::Unwatched(UnwatchedEntry::UnwatchedKills(found)) => {
            let what = match found.kills {
                0 => "no kill found".to_owned(),
                number => format!("{} in all", kills(number)),
            };
            (what, String::new(), total(found.kills, found.kernel_log_lines_lost))
        }
        KillLine::Unwatched(UnwatchedEntry::NotWatched(gap)) => {
            let duration = gap.duration_ns.map_or_else(|| "an unknown time".to_owned(), units::duration);
            let why = match (gap.rebooted, gap.stopped) {
                (true, _) => "the machine was booted",
                (false, Some(true)) => "the agent was stopped",
                (false, Some(false)) => "the agent was killed",
                (false, None) => "no agent ran",
            };
            let until = format!("{why}, not watched until {}", when(&gap.to.wall));
            return [when(&gap.from.wall), format!("not watched for {duration}"), String::new(), until];
        }
    };
    [when(line.wall()), what, cgroup, known_from]
}

fn total(found: u64, lines_lost: Option<u64>) -> String {
    let found = if found == 0 { "not watched" } else { "at least, not watched" };
    match lines_lost {
        Some(0) => found.to_owned(),
        Some(lost) => format!("{found}; {} of the kernel log lost", units::count(lost, "line", "lines")),
        None => format!("{found}; what the kernel log lacks is not known"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use memtrace_incident::{CountedKills, LoggedKill, Moment, NotWatched, UnwatchedKills};

    #[test]
    fn a_row_a_line_and_nothing_dangerous() {
        let wall = || "2026-03-01T03:12:45.123456789Z".to_owned();
        let moment = |boot_ns| Moment { boot_id: "b".into(), boot_ns, wall: wall() };
        let gap = NotWatched {
            from: moment(1),
            to: moment(2),
            duration_ns: Some(12_000_000_000),
            rebooted: false,
            stopped: Some(false),
        };
        let logged = LoggedKill {
            boot_id: "b".into(),
            kernel_log_seq: 5,
            boot_ns: 1,
            wall: wall(),
            pid: 7,
            comm: "wor\x1bker".into(),
            uid: None,
            anon_bytes: None,
            file_bytes: None,
            shmem_bytes: None,
            cgroup_path: None,
            oom_cgroup_path: None,
        };
        let counted = CountedKills {
            boot_id: "b".into(),
            boot_ns: 1,
            wall: wall(),
            since_boot_ns: 0,
            cgroup_id: 3,
            cgroup_path: "/app".into(),
            kills: 2,
        };
        let found =
            UnwatchedKills { wall: wall(), kills: 3, kernel_log_lines_lost: Some(1), ..UnwatchedKills::default() };
        let entries = [
            UnwatchedEntry::NotWatched(gap),
            UnwatchedEntry::KernelLog(logged),
            UnwatchedEntry::Counter(counted),
            UnwatchedEntry::UnwatchedKills(found),
            UnwatchedEntry::UnwatchedKills(UnwatchedKills { wall: wall(), ..UnwatchedKills::default() }),
        ];
        let table = table(&entries.map(KillLine::Unwatched));
        for said in [
            "not watched for 12 s",
            "the agent was killed, not watched until 2026-03-01 03:12:45",
            "unknown  the kernel log",
            "2 kills",
            "3 kills in all",
            "1 line of the kernel log lost",
            "no kill found",
            "not watched; what the kernel log lacks is not known",
        ] {
            assert!(table.contains(said), "{said}: {table}");
        }
        assert!(table.chars().all(|character| character == '\n' || !plain::is_dangerous(character)));
    }
}
