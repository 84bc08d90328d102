//! Assertions about incidents. Each fails with both the expected and the actual value.

use anyhow::{Context, ensure};
use serde_json::Value;

use crate::cage::Cage;
use crate::json;

/// One mebibyte.
pub const MIB: u64 = 1 << 20;

/// The text at `pointer` is `expected`.
pub fn says(incident: &Value, pointer: &str, expected: &str) -> anyhow::Result<()> {
    let found = json::text(incident, pointer)?;
    ensure!(found == expected, "{pointer} is {found:?}, not {expected:?}, in {}", json::text(incident, "/id")?);
    Ok(())
}

/// The number at `pointer` is `expected`.
pub fn counts(incident: &Value, pointer: &str, expected: u64) -> anyhow::Result<()> {
    let found = json::number(incident, pointer)?;
    ensure!(found == expected, "{pointer} is {found}, not {expected}, in {}", json::text(incident, "/id")?);
    Ok(())
}

/// Sentences of `doctor --json` about what is missing, as incidents repeat them.
pub fn announced(report: &Value) -> anyhow::Result<Vec<String>> {
    let hooks = json::list(report, "/hooks")?.iter();
    let lost = hooks.filter_map(|h| Some(format!("{}: {}", h.get("hook")?.as_str()?, h.get("lost")?.as_str()?)));
    let notes = json::list(report, "/notes")?.iter().filter_map(|note| Some(note.get("what")?.as_str()?.to_owned()));
    let mut all: Vec<String> = lost.chain(notes).collect();
    all.sort();
    Ok(all)
}

/// Losses of an incident without a count: hooks that are not attached, and what else the kernel or privileges do not allow.
pub fn degraded(incident: &Value) -> anyhow::Result<Vec<String>> {
    let losses = json::list(incident, "/losses")?.iter().filter(|loss| loss.get("count").is_some_and(Value::is_null));
    let mut all: Vec<String> = losses.filter_map(|loss| Some(loss.get("what")?.as_str()?.to_owned())).collect();
    all.sort();
    Ok(all)
}

/// The incident is a kill in this cgroup because of its own limit: checks kind, path, limit and
/// scope.
pub fn ran_out_itself(incident: &Value, cage: &Cage) -> anyhow::Result<()> {
    says(incident, "/kind", "oom_kill")?;
    says(incident, "/cgroup/path", cage.path())?;
    counts(incident, "/cgroup/id", cage.id())?;
    counts(incident, "/cgroup/limit_bytes", cage.limit())?;
    says(incident, "/oom/scope", "cgroup")?;
    says(incident, "/oom/oom_cgroup/path", cage.path())?;
    ends_near_the_limit(incident, cage.limit())
}

/// The curve's last usage before the kill is within 1 MiB below the limit.
pub fn ends_near_the_limit(incident: &Value, limit: u64) -> anyhow::Result<()> {
    ends_within(incident, limit, MIB)
}

/// The curve's last usage before the event is at most so many bytes below the limit.
pub fn ends_within(incident: &Value, limit: u64, below: u64) -> anyhow::Result<()> {
    let at = json::number(incident, "/at/boot_ns")?;
    let times = json::list(incident, "/timeline/columns/boot_ns")?;
    let usage = json::list(incident, "/timeline/columns/usage_bytes")?;
    let before = times.iter().zip(usage).filter(|(time, _)| time.as_u64().is_some_and(|time| time <= at));
    let last = before.filter_map(|(_, usage)| usage.as_u64()).next_back().context("no usage up to the kill")?;
    ensure!(last <= limit && last + below >= limit, "the curve ends at {last}, the limit is {limit}");
    Ok(())
}

/// Victims that were killed: (pid, name).
pub fn killed(incident: &Value) -> anyhow::Result<Vec<(u32, String)>> {
    let victims = json::list(incident, "/oom/victims")?;
    victims
        .iter()
        .filter(|victim| victim.get("killed") == Some(&Value::Bool(true)))
        .map(|victim| Ok((u32::try_from(json::number(victim, "/pid")?)?, json::text(victim, "/comm")?.to_owned())))
        .collect()
}

/// This process was killed and no other.
pub fn only_victim(incident: &Value, pid: u32, comm: &str) -> anyhow::Result<()> {
    let killed = killed(incident)?;
    ensure!(killed == [(pid, comm.to_owned())], "killed were {killed:?}, not {comm} ({pid})");
    Ok(())
}

/// Largest value of a column of the curve.
pub fn highest(incident: &Value, column: &str) -> anyhow::Result<u64> {
    let values = json::list(incident, &format!("/timeline/columns/{column}"))?;
    values.iter().filter_map(Value::as_u64).max().with_context(|| format!("no {column} in the curve"))
}
