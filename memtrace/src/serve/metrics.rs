//! OpenMetrics text, made when it is asked for.

use prometheus_client::collector::Collector;
use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::{Registry, Unit};

use super::Readings;
use memtrace_engine::snapshot::CgroupView;
use memtrace_incident::SigkillCause;

/// Cgroups with series of their own, those with a limit and the most memory first.
const MAX_CGROUPS: usize = 1000;

/// The metrics of one moment.
pub(super) fn text(readings: &Readings) -> String {
    let mut registry = Registry::with_prefix("memtrace");
    registry.register_collector(Box::new(Moment { families: families(readings) }));
    let mut text = String::new();
    // Writing to a String does not fail.
    let _ = encode(&mut text, &registry);
    text
}

/// One metric name with its series.
#[derive(Debug)]
struct Family {
    name: &'static str,
    help: &'static str,
    unit: Option<Unit>,
    counter: bool,
    /// Of a counter of seconds: nanoseconds.
    series: Vec<(Vec<(&'static str, String)>, u64)>,
}

#[derive(Debug)]
struct Moment {
    families: Vec<Family>,
}

impl Collector for Moment {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        for family in &self.families {
            let kind = if family.counter { MetricType::Counter } else { MetricType::Gauge };
            let mut metric = encoder.encode_descriptor(family.name, family.help, family.unit.as_ref(), kind)?;
            for (labels, value) in &family.series {
                let encoder = metric.encode_family(labels)?;
                if family.counter && matches!(family.unit, Some(Unit::Seconds)) {
                    ConstCounter::new(*value as f64 / 1e9).encode(encoder)?;
                } else if family.counter {
                    ConstCounter::new(*value).encode(encoder)?;
                } else {
                    // A gauge is signed; no size here comes near.
                    ConstGauge::new(i64::try_from(*value).unwrap_or(i64::MAX)).encode(encoder)?;
                }
            }
        }
        Ok(())
    }
}

fn counter(name: &'static str, help: &'static str, value: u64) -> Family {
    Family { name, help, unit: None, counter: true, series: vec![(Vec::new(), value)] }
}

fn seconds(name: &'static str, help: &'static str, nanoseconds: u64) -> Family {
    Family { unit: Some(Unit::Seconds), ..counter(name, help, nanoseconds) }
}

fn gauge(name: &'static str, help: &'static str, value: u64) -> Family {
    Family { name, help, unit: None, counter: false, series: vec![(Vec::new(), value)] }
}

fn families(readings: &Readings) -> Vec<Family> {
    let Readings { counters, counts, snapshot, .. } = readings;
    let label = |name: &'static str, value: &str| vec![(name, value.to_owned())];
    let mut families = vec![
        Family {
            name: "build",
            help: "Version of memtrace",
            unit: None,
            counter: false,
            series: vec![(label("version", env!("CARGO_PKG_VERSION")), 1)],
        },
        counter("oom_kills", "Processes the OOM killer killed or chose", counters.kills),
        Family {
            name: "sigkills",
            help: "Processes that got SIGKILL, by who sent it; one entry of the ledger each",
            unit: None,
            counter: true,
            series: SigkillCause::ALL
                .into_iter()
                .map(|cause| (label("cause", cause.name()), counters.sigkills.get(&cause).copied().unwrap_or(0)))
                .collect(),
        },
        counter("spikes", "Spikes that ended without a kill", counters.spikes),
        counter(
            "near_misses",
            "Times a limit was hit and nobody was killed, at most once a minute and cgroup",
            counters.near_misses,
        ),
        counter(
            "stuck",
            "Times a cgroup ran out of memory with its OOM killer off (memory.oom_control)",
            counters.stuck,
        ),
        gauge("cgroups_stuck", "Cgroups that wait for memory with their OOM killer off", counts.stuck_cgroups),
        counter("disagreements", "Kills that only one of kernel log and hooks knows", counters.disagreements),
        Family {
            name: "incidents_saved",
            help: "Incident files written",
            unit: None,
            counter: true,
            series: vec![
                (label("kind", "oom_kill"), counters.saved_oom_kills),
                (label("kind", "spike"), counters.saved_spikes),
                (label("kind", "near_miss"), counters.saved_near_misses),
                (label("kind", "stuck"), counters.saved_stuck),
            ],
        },
        counter(
            "incident_write_failures",
            "Incidents or ledger lines that could not be written",
            counters.write_failures,
        ),
        counter("incidents_named", "Incidents whose functions got names", readings.incidents_named),
        counter(
            "incidents_not_named",
            "Incidents that got no names since something failed; reports show offsets",
            readings.incidents_not_named,
        ),
        counter("incidents_dropped", "Incidents dropped for size or age", counters.dropped),
        counter("journal_write_failures", "Journal frames that could not be written", readings.journal_failures),
        Family {
            name: "records",
            help: "Records the kernel side sent",
            unit: None,
            counter: true,
            series: readings.sent.iter().map(|(ring, sent)| (label("ring", ring), *sent)).collect(),
        },
        Family {
            name: "lost",
            help: "What was lost, by ring and reason",
            unit: None,
            counter: true,
            series: readings.losses.iter().map(|(what, lost)| (label("what", what), *lost)).collect(),
        },
        counter("stacks", "Stacks of growing processes that were unwound", readings.stacks),
        counter(
            "stacks_thinned",
            "Stacks left out to stay within the budget; the next one stands for their bytes",
            readings.stack_cost.thinned,
        ),
        seconds("stack_kernel", "Time the kernel side spent on stacks", readings.stack_cost.kernel_ns),
        seconds("stack_user", "Time the agent spent on stacks", readings.stack_cost.user_ns),
        counter("bad_records", "Records that could not be decoded", counts.bad_records),
        gauge("open_incidents", "Incidents still gathering", counts.open_incidents),
        gauge("cgroups", "Memory cgroups followed", counts.cgroups),
        gauge("processes", "Processes followed", counts.processes),
        Family {
            name: "self_memory",
            help: "Memory of the agent itself",
            unit: Some(Unit::Bytes),
            counter: false,
            series: [("resident", readings.resident_bytes), ("maps", readings.map_bytes)]
                .into_iter()
                .filter_map(|(part, bytes)| Some((label("part", part), bytes?)))
                .collect(),
        },
        Family {
            name: "hook_attached",
            help: "1 for a hook that is attached",
            unit: None,
            counter: false,
            series: readings.hooks.iter().map(|(hook, on)| (label("hook", hook), u64::from(*on))).collect(),
        },
    ];
    let mut rows: Vec<_> = snapshot.cgroups.iter().filter(|row| row.usage_bytes.is_some()).collect();
    rows.sort_by_key(|row| (row.limit_bytes.is_none(), std::cmp::Reverse(row.usage_bytes)));
    rows.truncate(MAX_CGROUPS);
    let mut each = |name, help, value: &dyn Fn(&CgroupView) -> Option<u64>| {
        let series = rows.iter().filter_map(|row| Some((label("path", row.path.as_deref()?), value(row)?))).collect();
        families.push(Family { name, help, unit: Some(Unit::Bytes), counter: false, series });
    };
    each("cgroup_usage", "Usage as the kernel compares it with the limit, as last seen", &|row| row.usage_bytes);
    each("cgroup_peak", "Highest usage of the cgroup ever", &|row| row.peak_bytes);
    each("cgroup_limit", "Limit of the cgroup", &|row| row.limit_bytes);
    families
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_is_openmetrics_and_names_cannot_break_it() {
        let cgroup = CgroupView { path: Some("/a\"b\n\\c".into()), usage_bytes: Some(5), ..CgroupView::default() };
        let mut readings = Readings { losses: vec![("samples/ring_full".into(), 3)], ..Readings::default() };
        readings.snapshot.cgroups.push(cgroup);
        let text = text(&readings);
        assert!(text.ends_with("# EOF\n"), "{text}");
        assert!(text.contains("memtrace_lost_total{what=\"samples/ring_full\"} 3\n"), "{text}");
        assert!(text.contains("memtrace_sigkills_total{cause=\"cgroup_kill\"} 0\n"), "{text}");
        assert!(text.contains(r#"memtrace_cgroup_usage_bytes{path="/a\"b\n\\c"} 5"#), "{text}");
    }
}
