//! Tests of the metrics: the text, and the documentation that is made from the table.

use std::fmt::Write as _;

use memtrace_incident::Loss;

use super::*;

#[test]
fn the_text_is_openmetrics_and_names_cannot_break_it() {
    let cgroup = CgroupView { path: Some("/a\"b\n\\c".into()), usage_bytes: Some(5), ..CgroupView::default() };
    let mut snapshot = MetricsSnapshot::default();
    snapshot.counts.losses.insert("samples/ring_full".into(), 3);
    snapshot.stack_cost.user_ns = 1_500_000_000;
    snapshot.resident_bytes = Some(7);
    snapshot.cgroups.push(cgroup);
    let text = text(snapshot);
    assert!(text.ends_with("# EOF\n"), "{text}");
    for line in [
        "memtrace_oom_kills_total{} 0\n",
        "memtrace_lost_total{what=\"samples/ring_full\"} 3\n",
        "memtrace_sigkills_total{cause=\"cgroup_kill\"} 0\n",
        "memtrace_stack_user_seconds_total{} 1.5\n",
        "memtrace_self_memory_bytes{part=\"resident\"} 7\n",
        "# TYPE memtrace_open_incidents gauge\n",
        r#"memtrace_cgroup_usage_bytes{path="/a\"b\n\\c"} 5"#,
    ] {
        assert!(text.contains(line), "{line} is not in\n{text}");
    }
}

/// Name in the exposition.
fn full_name(metric: &Metric) -> String {
    let unit = metric.unit.as_ref().map_or_else(String::new, |unit| format!("_{}", unit.as_str()));
    format!("memtrace_{}{unit}{}", metric.name, if metric.counter { "_total" } else { "" })
}

#[test]
fn series_have_the_names_that_are_documented() {
    let text = text(MetricsSnapshot::default());
    for metric in METRICS.iter().filter(|metric| !matches!(metric.value, Value::Each { .. })) {
        assert!(text.contains(&format!("\n{}{{}} ", full_name(metric))), "{} is not in\n{text}", full_name(metric));
    }
}

fn reference() -> String {
    let mut out = String::from(
        "# Metrics\n\n\
         `memtrace agent` serves these at `/metrics` as OpenMetrics text. Counters start at 0 when the agent starts; \
         a gauge is the value at the moment of the request.\n\n\
         This page is made from the table in `memtrace/src/serve/metrics.rs`; a test compares the two.\n\n\
         | metric | type | unit | meaning | label |\n|---|---|---|---|---|\n",
    );
    for metric in METRICS {
        let kind = if metric.counter { "counter" } else { "gauge" };
        let unit = metric.unit.as_ref().map_or("", Unit::as_str);
        let label = match &metric.value {
            Value::Each { label, values, .. } => format!("`{label}`: {values}"),
            _ => String::new(),
        };
        let _ = writeln!(out, "| `{}` | {kind} | {unit} | {} | {label} |", full_name(metric), metric.help);
    }
    out.push_str(
        "\n## Losses\n\n\
         The values of `what` in `memtrace_lost_total`, which an incident has in `losses` for its own window. RING is \
         `ledger`, `samples` or `stacks`; HOOK is one that `memtrace doctor` lists.\n\n\
         | label | meaning |\n|---|---|\n",
    );
    for loss in Loss::all() {
        let prefix = match loss {
            Loss::NotRun => "HOOK/",
            _ if !loss.label().contains('/') => "RING/",
            _ => "",
        };
        let _ = writeln!(out, "| `{prefix}{}` | {} |", loss.label(), loss.sentence());
    }
    out
}

#[test]
fn the_published_metrics_are_these() {
    crate::blessed::check("docs/metrics.md", &reference());
}
