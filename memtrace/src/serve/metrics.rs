//! The metrics: one table, which `/metrics` and `docs/metrics.md` are made from.
//!
//! A metric is one entry of [`METRICS`]: name, help, type, unit, label, and how its value is read from a
//! [`MetricsSnapshot`]. The text is made when somebody asks for it; nothing is kept between two requests.

use prometheus_client::collector::Collector;
use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, MetricEncoder};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::{Registry, Unit};

use memtrace_incident::Kind;

use super::MetricsSnapshot;
use memtrace_engine::snapshot::CgroupView;
use memtrace_incident::SigkillCause;

/// Cgroups with series of their own, those with a limit and the most memory first.
pub const MAX_CGROUP_SERIES: usize = 1000;

/// One metric.
struct Metric {
    /// Name without `memtrace_`, unit and `_total`, which are added to it.
    name: &'static str,
    /// One sentence without a full stop.
    help: &'static str,
    /// A counter, else a gauge.
    counter: bool,
    unit: Option<Unit>,
    value: Value,
}

/// How a metric is read.
enum Value {
    /// One series without a label.
    One(fn(&MetricsSnapshot) -> u64),
    /// One series without a label, of nanoseconds that are shown as seconds.
    Nanoseconds(fn(&MetricsSnapshot) -> u64),
    /// A series for each value of a label.
    Each {
        label: &'static str,
        /// The values of the label, in words.
        #[cfg_attr(not(test), expect(dead_code, reason = "docs/metrics.md is made from it, by a test"))]
        values: &'static str,
        read: fn(&MetricsSnapshot) -> Vec<(String, u64)>,
    },
}

impl Metric {
    const fn counter(name: &'static str, help: &'static str, value: Value) -> Self {
        let unit = if matches!(value, Value::Nanoseconds(_)) { Some(Unit::Seconds) } else { None };
        Self { name, help, counter: true, unit, value }
    }

    const fn gauge(name: &'static str, help: &'static str, value: Value) -> Self {
        Self { name, help, counter: false, unit: None, value }
    }

    const fn bytes(name: &'static str, help: &'static str, value: Value) -> Self {
        Self { name, help, counter: false, unit: Some(Unit::Bytes), value }
    }
}

/// Every metric, in the order in which they are shown.
static METRICS: &[Metric] = &[
    Metric::gauge(
        "build",
        "Version of memtrace",
        Value::Each {
            label: "version",
            values: "the version; the value is always 1",
            read: |_| vec![(env!("CARGO_PKG_VERSION").to_owned(), 1)],
        },
    ),
    Metric::counter("oom_kills", "Processes the OOM killer killed or chose", Value::One(|now| now.counters.kills)),
    Metric::counter(
        "sigkills",
        "Processes that got SIGKILL, by who sent it; one entry of the ledger each",
        Value::Each {
            label: "cause",
            values: "`oom`, `cgroup_kill`, `process`, `pid_namespace`, `parent_death`, `kernel`",
            read: |now| {
                let count = |cause| now.counters.sigkills.get(&cause).copied().unwrap_or(0);
                SigkillCause::ALL.into_iter().map(|cause| (cause.name().to_owned(), count(cause))).collect()
            },
        },
    ),
    Metric::counter("spikes", "Spikes that ended without a kill", Value::One(|now| now.counters.spikes)),
    Metric::counter(
        "near_misses",
        "Times a limit was hit and nobody was killed; at most one a minute for each cgroup",
        Value::One(|now| now.counters.near_misses),
    ),
    Metric::counter(
        "stuck",
        "Times a cgroup ran out of memory with its OOM killer off (memory.oom_control)",
        Value::One(|now| now.counters.stuck),
    ),
    Metric::gauge(
        "cgroups_stuck",
        "Cgroups that wait for memory with their OOM killer off",
        Value::One(|now| now.counts.stuck_cgroups),
    ),
    Metric::counter(
        "disagreements",
        "Kills seen by only one of the kernel log and the hooks",
        Value::One(|now| now.counters.disagreements),
    ),
    Metric::counter(
        "kernel_log_limited",
        "Kills whose cgroup is not in the kernel log: it names it for ten decisions in five seconds; no disagreement",
        Value::One(|now| now.counts.kernel_log_limited),
    ),
    Metric::counter(
        "unwatched",
        "Time before this start in which no agent watched, as far as it is known",
        Value::Nanoseconds(|now| now.counters.unwatched_ns),
    ),
    Metric::counter(
        "unwatched_kills",
        "OOM kills of that time in the kernel log or in counters of cgroups, at least; not in oom_kills",
        Value::One(|now| now.counters.unwatched_kills),
    ),
    Metric::counter(
        "incidents_saved",
        "Incident files written",
        Value::Each {
            label: "kind",
            values: "`oom_kill`, `spike`, `near_miss`, `stuck`",
            read: |now| {
                let count = |kind| now.counters.saved.get(&kind).copied().unwrap_or(0);
                // The agent makes no recordings.
                let kinds = Kind::ALL.into_iter().filter(|kind| *kind != Kind::Recording);
                kinds.map(|kind| (kind.name().to_owned(), count(kind))).collect()
            },
        },
    ),
    Metric::counter(
        "incident_write_failures",
        "Incidents or ledger lines that could not be written",
        Value::One(|now| now.counters.write_failures),
    ),
    Metric::gauge(
        "incidents_waiting",
        "Incidents that wait to be written; a write that failed is tried again",
        Value::One(|now| now.incidents_waiting),
    ),
    Metric::counter(
        "incidents_given_up",
        "Incidents that were never written, because too many waited or one could not be encoded",
        Value::One(|now| now.counters.given_up),
    ),
    Metric::counter(
        "incidents_named",
        "Incidents whose stack frames were given function names",
        Value::One(|now| now.incidents_named),
    ),
    Metric::counter(
        "incidents_not_named",
        "Incidents whose stack frames could not be named; reports show offsets",
        Value::One(|now| now.incidents_not_named),
    ),
    Metric::counter(
        "incidents_dropped",
        "Incident files deleted for size or age",
        Value::One(|now| now.counters.dropped),
    ),
    Metric::counter(
        "http_connections",
        "Connections to the HTTP server",
        Value::Each {
            label: "outcome",
            values: "`accepted`, `crowded_out` (closed to make room), `timed_out`, `not_accepted` (no descriptor)",
            read: |now| now.connections.iter().map(|(outcome, count)| ((*outcome).to_owned(), *count)).collect(),
        },
    ),
    Metric::counter(
        "http_refused",
        "HTTP requests refused before they were looked at",
        Value::Each {
            label: "reason",
            values: "`foreign_host` (a Host that is not allowed), `no_token`, `wrong_token`, `not_here` (not on loopback, \
                     and no token is configured)",
            read: |now| now.refused.iter().map(|(reason, count)| ((*reason).to_owned(), *count)).collect(),
        },
    ),
    Metric::counter(
        "journal_write_failures",
        "Journal frames that could not be written",
        Value::One(|now| now.journal_failures),
    ),
    Metric::counter(
        "log_lines_lost",
        "Lines of the agent's log that were not written, because nobody read those before",
        Value::One(|now| now.log_lines_lost),
    ),
    Metric::counter(
        "records",
        "Records the kernel side sent",
        Value::Each {
            label: "ring",
            values: "`ledger`, `samples`, `stacks`",
            read: |now| now.sent.iter().map(|(ring, sent)| ((*ring).to_owned(), *sent)).collect(),
        },
    ),
    Metric::counter(
        "lost",
        "What was lost, by ring or part and reason",
        Value::Each {
            label: "what",
            values: "a label of the table below; a series appears with its first loss",
            read: |now| now.counts.losses.iter().map(|(what, count)| (what.clone(), *count)).collect(),
        },
    ),
    Metric::counter("stacks", "Stacks of growing processes that were unwound", Value::One(|now| now.stacks)),
    Metric::counter(
        "stacks_thinned",
        "Stacks left out to stay within the budget; the next one stands for their bytes",
        Value::One(|now| now.stack_cost.thinned),
    ),
    Metric::counter(
        "stack_kernel",
        "Time the kernel side spent on stacks",
        Value::Nanoseconds(|now| now.stack_cost.kernel_ns),
    ),
    Metric::counter(
        "stack_user",
        "Time the agent spent on stacks, and the thread of the stack worker that unwinds: what sampling is adjusted to",
        Value::Nanoseconds(|now| now.stack_cost.user_ns),
    ),
    Metric::counter(
        "stack_worker_cpu",
        "CPU time of the stack workers, for all that they do: unwinding, reading files",
        Value::Nanoseconds(|now| now.stack_worker_cpu_ns),
    ),
    Metric::gauge(
        "stack_workers",
        "Processes that unwind stacks",
        Value::Each {
            label: "state",
            values: "`running`: 1, or 0 while there are no stacks; `stuck`: killed, waiting for a file system to let go",
            read: |now| now.stack_workers.iter().map(|(state, count)| ((*state).to_owned(), *count)).collect(),
        },
    ),
    Metric::gauge(
        "stack_readings_late",
        "Readings of other programs' files that were given up and have not ended",
        Value::One(|now| now.stack_readings_late),
    ),
    Metric::counter("bad_records", "Records that could not be decoded", Value::One(|now| now.counts.bad_records)),
    Metric::gauge("open_incidents", "Incidents still gathering", Value::One(|now| now.counts.open_incidents)),
    Metric::gauge("cgroups", "Memory cgroups followed", Value::One(|now| now.counts.cgroups)),
    Metric::gauge("processes", "Live processes followed", Value::One(|now| now.counts.processes)),
    Metric::bytes(
        "self_memory",
        "Memory of the agent itself",
        Value::Each {
            label: "part",
            values: "`resident`, `maps` (its BPF maps and rings), `stack_worker` (resident)",
            read: |now| {
                let parts = [
                    ("resident", now.resident_bytes),
                    ("maps", now.map_bytes),
                    ("stack_worker", now.stack_worker_bytes),
                ];
                parts.into_iter().filter_map(|(part, bytes)| Some((part.to_owned(), bytes?))).collect()
            },
        },
    ),
    Metric::gauge(
        "hook_attached",
        "1 if the hook is attached, else 0",
        Value::Each {
            label: "hook",
            values: "the hooks, as `memtrace doctor` lists them",
            read: |now| now.hooks.iter().map(|(hook, on)| ((*hook).to_owned(), u64::from(*on))).collect(),
        },
    ),
    Metric::bytes(
        "cgroup_usage",
        "Usage as the kernel compares it with the limit, as last seen",
        Value::Each { label: "path", values: PATHS, read: |now| each_cgroup(now, |row| row.usage_bytes) },
    ),
    Metric::bytes(
        "cgroup_peak",
        "Highest usage of the cgroup ever",
        Value::Each { label: "path", values: PATHS, read: |now| each_cgroup(now, |row| row.peak_bytes) },
    ),
    Metric::bytes(
        "cgroup_limit",
        "Limit of the cgroup",
        Value::Each { label: "path", values: PATHS, read: |now| each_cgroup(now, |row| row.limit_bytes) },
    ),
];

/// The label of what is told of each cgroup. The number is [`MAX_CGROUP_SERIES`].
const PATHS: &str = "at most 1000 cgroups: those with a limit first, then by usage";

/// One number of each cgroup that has series of its own, by path.
fn each_cgroup(now: &MetricsSnapshot, number: fn(&CgroupView) -> Option<u64>) -> Vec<(String, u64)> {
    now.cgroups.iter().filter_map(|row| Some((row.path.clone()?, number(row)?))).collect()
}

/// The metrics as OpenMetrics text.
pub(super) fn text(snapshot: MetricsSnapshot) -> String {
    let mut registry = Registry::with_prefix("memtrace");
    registry.register_collector(Box::new(Exposition(snapshot)));
    let mut text = String::new();
    // Writing to a String does not fail.
    let _ = encode(&mut text, &registry);
    text
}

#[derive(Debug)]
struct Exposition(MetricsSnapshot);

impl Collector for Exposition {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        for metric in METRICS {
            let kind = if metric.counter { MetricType::Counter } else { MetricType::Gauge };
            let mut series = encoder.encode_descriptor(metric.name, metric.help, metric.unit.as_ref(), kind)?;
            let no_label: [(&str, &str); 0] = [];
            match &metric.value {
                Value::One(read) => number(metric, read(&self.0), series.encode_family(&no_label)?)?,
                Value::Nanoseconds(read) => {
                    let seconds = read(&self.0) as f64 / 1e9;
                    ConstCounter::new(seconds).encode(series.encode_family(&no_label)?)?;
                }
                Value::Each { label, read, .. } => {
                    for (value, count) in read(&self.0) {
                        number(metric, count, series.encode_family(&[(*label, value)])?)?;
                    }
                }
            }
        }
        Ok(())
    }
}

fn number(metric: &Metric, value: u64, encoder: MetricEncoder<'_>) -> Result<(), std::fmt::Error> {
    if metric.counter {
        ConstCounter::new(value).encode(encoder)
    } else {
        // A gauge is signed; no size here comes near.
        ConstGauge::new(i64::try_from(value).unwrap_or(i64::MAX)).encode(encoder)
    }
}

#[cfg(test)]
mod tests;
