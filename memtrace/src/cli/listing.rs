//! Incidents and SIGKILLs as tables, for the verbs that list them.

use jiff::Timestamp;

use memtrace_incident::units;
use memtrace_incident::{Incident, Pressure, PressureLimit};
use memtrace_incident::{SigkillCause, SigkillEntry};
use memtrace_report::plain;

/// Most characters of a cgroup's path. Those of Kubernetes have about 200.
const PATH_WIDTH: usize = 256;

/// Incidents as a table, in the order given. Strings from the files are escaped.
pub(super) fn table<'a>(incidents: impl IntoIterator<Item = &'a Incident>) -> String {
    let head = ["ID", "WHEN (UTC)", "KIND", "VICTIM", "LIMIT", "PEAK", "CGROUP"].map(str::to_owned);
    columns(std::iter::once(head).chain(incidents.into_iter().map(row)))
}

/// Entries of the SIGKILL ledger as a table, in the order given. Strings from the ledger are escaped.
pub(super) fn sigkills(entries: &[SigkillEntry]) -> String {
    let head = ["WHEN (UTC)", "PROCESS", "CGROUP", "SENT BY"].map(str::to_owned);
    let rows = entries.iter().flat_map(|entry| std::iter::once(sigkill(entry)).chain(more(entry)));
    columns(std::iter::once(head).chain(rows))
}

pub(super) fn columns<const N: usize>(rows: impl Iterator<Item = [String; N]>) -> String {
    let rows: Vec<[String; N]> = rows.collect();
    let mut widths = [0; N];
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut out = String::new();
    for row in &rows {
        let mut line = String::new();
        for (width, cell) in widths.iter().zip(row) {
            line.push_str(&format!("{cell:<width$}  "));
        }
        out.push_str(line.trim_end());
        out.push('\n');
    }
    out
}

/// The wall time of an incident; `None` when the file has none that parses.
pub(super) fn wall(incident: &Incident) -> Option<Timestamp> {
    incident.at.wall.parse().ok()
}

fn row(incident: &Incident) -> [String; 7] {
    let victims = incident.oom.as_ref().map_or(&[][..], |oom| &oom.victims);
    let victim = match (victims, &incident.recording) {
        ([victim], _) => format!("{} ({})", plain::elide(&victim.comm, 24, true), victim.pid),
        ([first, rest @ ..], _) => format!("{} ({}) +{}", plain::elide(&first.comm, 24, true), first.pid, rest.len()),
        ([], Some(recording)) => plain::elide(&recording.command.join(" "), 24, true),
        ([], None) => match &incident.pressure {
            Some(pressure) => match pressure.under_oom_ns {
                Some(ns) => format!("none ({})", units::duration(ns)),
                None => format!("none ({})", units::count(pressure.hits, "hit", "hits")),
            },
            None => "-".to_owned(),
        },
    };
    // After a kill the limit and peak that count are those of the cgroup that ran out.
    let full = incident.oom.as_ref().and_then(|oom| oom.oom_cgroup.as_ref()).unwrap_or(&incident.cgroup);
    let limit = match &incident.pressure {
        Some(Pressure { limit: PressureLimit::High, .. }) => format!("{} (high)", units::known(full.high_bytes)),
        _ => full.limit_bytes.map_or_else(|| "none".to_owned(), units::bytes),
    };
    [
        plain::elide(&incident.id, 26, true),
        when(&incident.at.wall),
        incident.kind.name().to_owned(),
        victim,
        limit,
        units::known(full.peak_bytes),
        path(incident.cgroup.path.as_deref()),
    ]
}

pub(super) fn path(path: Option<&str>) -> String {
    path.map_or_else(|| "unknown".to_owned(), |path| plain::elide(path, PATH_WIDTH, true))
}

pub(super) fn when(wall: &str) -> String {
    let parsed: Option<Timestamp> = wall.parse().ok();
    parsed.map_or_else(|| plain::elide(wall, 24, true), |wall| wall.strftime("%Y-%m-%d %H:%M:%S").to_string())
}

fn sigkill(entry: &SigkillEntry) -> [String; 4] {
    let process = |comm: &str, pid: u32| format!("{} ({pid})", plain::elide(comm, 24, true));
    let itself = (entry.sender_pid, entry.sender_start_boot_ns) == (entry.pid, entry.start_boot_ns);
    let sender = if itself { "itself".to_owned() } else { process(&entry.sender_comm, entry.sender_pid) };
    let sent_by = match entry.cause {
        SigkillCause::Oom => {
            let incident =
                entry.incident.as_deref().map_or_else(|| "unknown".to_owned(), |id| plain::elide(id, 26, true));
            format!("the OOM killer, incident {incident}")
        }
        SigkillCause::CgroupKill => format!("{sender} by cgroup.kill"),
        SigkillCause::Process => sender,
        SigkillCause::PidNamespace => format!("the end of its pid namespace, {sender}"),
        SigkillCause::ParentDeath => format!("the death of its parent, {sender}"),
        SigkillCause::Kernel => "the kernel, not for memory".to_owned(),
    };
    [when(&entry.wall), process(&entry.comm, entry.pid), path(entry.cgroup_path.as_deref()), sent_by]
}

/// The row for SIGKILLs that have none of their own, below the entry that stands for them.
fn more(entry: &SigkillEntry) -> Option<[String; 4]> {
    let more = entry.more.as_ref()?;
    let who = match entry.sender_uid.filter(|_| more.same_sender) {
        Some(uid) => format!("user {uid} in {}", path(entry.sender_cgroup_path.as_deref())),
        None if more.same_sender => "the same".to_owned(),
        None => "several users and cgroups".to_owned(),
    };
    let what = format!("{} more", more.count);
    Some([when(&more.from), what, String::new(), format!("{who}, until {}", when(&more.until))])
}

#[cfg(test)]
mod tests {
    use super::*;
    use memtrace_incident::{MoreSigkills, fixtures};

    #[test]
    fn a_row_a_sigkill() {
        let entry = |cause, sender_pid, incident: Option<&str>| SigkillEntry {
            boot_ns: 1,
            wall: "2026-03-01T03:12:45.123456789Z".into(),
            pid: 7,
            start_boot_ns: 1,
            comm: "wor\x1bker".into(),
            cgroup_id: None,
            cgroup_path: (cause == SigkillCause::Oom).then(|| "/app".into()),
            cause,
            sender_pid,
            sender_start_boot_ns: 1,
            sender_comm: "sh".into(),
            sender_uid: Some(1000),
            sender_cgroup_id: None,
            sender_cgroup_path: Some("/user".into()),
            more: None,
            incident: incident.map(Into::into),
        };
        let entries = [
            entry(SigkillCause::Oom, 8, Some("01KJHQ3V4D9T4X0Y6S5R2M8ZNC")),
            entry(SigkillCause::CgroupKill, 8, None),
            entry(SigkillCause::Process, 7, None),
            entry(SigkillCause::PidNamespace, 8, None),
            entry(SigkillCause::ParentDeath, 8, None),
            entry(SigkillCause::Kernel, 8, None),
        ];
        let table = sigkills(&entries);
        let sent_by: Vec<&str> = table.lines().skip(1).map(|line| line.rsplit("  ").next().unwrap()).collect();
        let expected = [
            "the OOM killer, incident 01KJHQ3V4D9T4X0Y6S5R2M8ZNC",
            "sh (8) by cgroup.kill",
            "itself",
            "the end of its pid namespace, sh (8)",
            "the death of its parent, sh (8)",
            "the kernel, not for memory",
        ];
        assert_eq!(sent_by, expected, "{table}");
        let (from, until) = ("2026-03-01T03:00:00Z".into(), "2026-03-01T03:10:00Z".into());
        let more = MoreSigkills { count: 70, from, until, same_sender: true };
        let flood = sigkills(&[SigkillEntry { more: Some(more), ..entry(SigkillCause::Process, 8, None) }]);
        let last = flood.lines().last().unwrap();
        assert!(last.starts_with("2026-03-01 03:00:00  70 more "), "{flood}");
        assert!(last.ends_with("user 1000 in /user, until 2026-03-01 03:10:00"), "{flood}");
        assert!(table.contains("2026-03-01 03:12:45  wor"), "{table}");
        assert!(table.chars().all(|character| character == '\n' || !plain::is_dangerous(character)));
    }

    #[test]
    fn a_row_an_incident() {
        let table = table(&[fixtures::burst(), fixtures::group(), fixtures::recording(), fixtures::hostile()]);
        let lines: Vec<&str> = table.lines().collect();
        assert!(
            lines[1].starts_with("01KJHQ3V4D9T4X0Y6S5R2M8ZNC  2026-03-01 03:12:45       oom_kill   worker (4242)"),
            "{table}"
        );
        assert!(lines[2].contains("java (7001) +2") && lines[2].contains("1 GiB"), "{table}");
        assert!(lines[3].contains("make -j4 all"), "{table}");
        let near_miss = super::table(&[fixtures::near_miss()]);
        assert!(near_miss.contains("near_miss  none (42 hits)  400 MiB (high)  450 MiB"), "{near_miss}");
        assert_eq!(lines.len(), 5, "{table}");
        assert!(table.chars().all(|character| character == '\n' || !plain::is_dangerous(character)));
    }
}
