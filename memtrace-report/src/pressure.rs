//! The sentences of the text report about a limit that was hit without a kill: a near miss of
//! `memory.max`, a slow-down by `memory.high`, or a v1 cgroup stuck with its OOM killer off.

use memtrace_incident::{Incident, Kind, Pressure, PressureLimit, units};

use super::Style;
use super::text::short_place;

/// The first line of the report.
pub(super) fn headline(incident: &Incident, pressure: &Pressure, style: &Style) -> String {
    let cgroup = &incident.cgroup;
    let place = short_place(cgroup, style);
    let hits = hits(pressure);
    let of = |bytes: Option<u64>| bytes.map_or_else(|| " (unknown)".to_owned(), |b| format!(" of {}", units::bytes(b)));
    if let Some(ns) = pressure.under_oom_ns {
        let of = of(cgroup.limit_bytes);
        let (title, waited) = (Kind::Stuck.title(), units::duration(ns));
        return format!("{title}: {place} waited {waited} at its limit{of} with its OOM killer off.");
    }
    match pressure.limit {
        PressureLimit::Max => {
            let title = Kind::NearMiss.title();
            format!("{title}: {place} hit its limit{}, {hits}; nobody was killed.", of(cgroup.limit_bytes))
        }
        PressureLimit::High => format!("Slowed down: {place} hit its memory.high{}, {hits}.", of(cgroup.high_bytes)),
    }
}

/// The fact line: hits, time that tasks were held up, state of the OOM killer.
pub(super) fn fact_line(pressure: &Pressure) -> String {
    let mut text = format!(
        "{} at {}",
        hits(pressure),
        match pressure.limit {
            PressureLimit::Max => "the limit",
            PressureLimit::High => "memory.high",
        }
    );
    match pressure.stalled_ns {
        None => text.push_str(", time that tasks were held up unknown"),
        Some(0) => text.push_str(", no task held up for 1 ms or more"),
        Some(ns) => text.push_str(&format!(", tasks held up {}", units::duration(ns))),
    }
    if let Some(ns) = pressure.under_oom_ns {
        text.push_str(&format!(", under OOM {}", units::duration(ns)));
    }
    match pressure.oom_kill_disabled {
        Some(true) => text.push_str("; OOM killer off"),
        Some(false) => text.push_str("; OOM killer on"),
        None => {}
    }
    text
}

fn hits(pressure: &Pressure) -> String {
    let span = pressure.until_boot_ns.saturating_sub(pressure.from_boot_ns);
    let hits = units::count(pressure.hits, "hit", "hits");
    if pressure.hits > 1 { format!("{hits} in {}", units::duration(span)) } else { hits }
}
