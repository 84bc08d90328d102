//! Incidents as a table, for the verbs that list them.

use jiff::Timestamp;

use crate::engine::incident::{Incident, Kind};
use crate::report::{plain, units};

/// The table, newest first as given; strings from the files are escaped.
pub(super) fn table<'a>(incidents: impl IntoIterator<Item = &'a Incident>) -> String {
    let head = ["ID", "WHEN (UTC)", "KIND", "VICTIM", "LIMIT", "PEAK", "CGROUP"].map(str::to_owned);
    let rows: Vec<[String; 7]> = std::iter::once(head).chain(incidents.into_iter().map(row)).collect();
    let mut widths = [0; 7];
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

/// The wall time of an incident.
pub(super) fn wall(incident: &Incident) -> Option<Timestamp> {
    incident.at.wall.parse().ok()
}

/// `oom_kill`, as the file says it.
pub(super) fn kind(kind: Kind) -> &'static str {
    match kind {
        Kind::OomKill => "oom_kill",
        Kind::Spike => "spike",
        Kind::Recording => "recording",
    }
}

fn row(incident: &Incident) -> [String; 7] {
    let victims = incident.oom.as_ref().map_or(&[][..], |oom| &oom.victims);
    let victim = match (victims, &incident.recording) {
        ([victim], _) => format!("{} ({})", plain::elide(&victim.comm, 24, true), victim.pid),
        ([first, rest @ ..], _) => format!("{} ({}) +{}", plain::elide(&first.comm, 24, true), first.pid, rest.len()),
        ([], Some(recording)) => plain::elide(&recording.command.join(" "), 24, true),
        ([], None) => "-".to_owned(),
    };
    // Of what ran out: that is what the kill is about.
    let full = incident.oom.as_ref().and_then(|oom| oom.oom_cgroup.as_ref()).unwrap_or(&incident.cgroup);
    let when = wall(incident).map_or_else(
        || plain::elide(&incident.at.wall, 24, true),
        |wall| wall.strftime("%Y-%m-%d %H:%M:%S").to_string(),
    );
    [
        plain::escape(&incident.id),
        when,
        kind(incident.kind).to_owned(),
        victim,
        full.limit_bytes.map_or_else(|| "none".to_owned(), units::bytes),
        units::known(full.peak_bytes),
        incident.cgroup.path.as_deref().map_or_else(|| "unknown".to_owned(), plain::escape),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::fixtures;

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
        assert_eq!(lines.len(), 5, "{table}");
        assert!(table.chars().all(|character| character == '\n' || !plain::is_dangerous(character)));
    }
}
