//! Checks of what a recording attributes: whether its parts add up, and how much each function has.

use std::collections::BTreeMap;

use anyhow::{Context, ensure};
use serde_json::Value;

use crate::json;

/// Bytes by function.
pub type Bytes = BTreeMap<String, u64>;

/// Parses the last line that a workload with known truth printed: bytes by the innermost function
/// that touched them.
pub fn truth(printed: &[u8]) -> anyhow::Result<Bytes> {
    let printed = String::from_utf8_lossy(printed);
    let line = printed.lines().last().context("the workload printed nothing")?;
    let told: Value = serde_json::from_str(line).with_context(|| format!("the workload printed {line}"))?;
    let touch = json::at(&told, "/touch")?.as_object().context("touch is not an object")?;
    let entry = |(name, bytes): (&String, &Value)| Some((name.clone(), bytes.as_u64()?));
    touch.iter().map(|part| entry(part).with_context(|| format!("the workload printed {line}"))).collect()
}

/// Checks that attributed and unattributed bytes add up to the growth, and so do the samples.
/// Returns the growth.
pub fn adds_up(incident: &Value) -> anyhow::Result<u64> {
    let growth = json::number(incident, "/allocations/growth_bytes")?;
    let attributed = json::number(incident, "/allocations/attributed_bytes")?;
    let reasons = json::list(incident, "/allocations/unattributed")?;
    let unattributed: u64 = reasons.iter().filter_map(|part| part.get("bytes")?.as_u64()).sum();
    ensure!(attributed + unattributed == growth, "{attributed} + {unattributed} is not {growth}: {reasons:?}");
    let with: u64 = touching(incident)?.iter().map(|(_, weight)| weight).sum();
    ensure!(with == attributed, "samples with a stack add up to {with}, not {attributed}");
    let rows = rows(incident)?;
    let without: u64 = rows.iter().filter(|(path, _)| path.is_none()).map(|(_, weight)| weight).sum();
    ensure!(without == unattributed, "samples without a stack add up to {without}, not {unattributed}");
    Ok(growth)
}

/// Samples of resident memory that have a stack: (path, bytes the sample stands for).
pub fn touching(incident: &Value) -> anyhow::Result<Vec<(&Value, u64)>> {
    let paths = json::list(incident, "/allocation_paths")?;
    let mut found = Vec::new();
    for (index, weight) in rows(incident)? {
        let Some(index) = index else { continue };
        let path = paths.get(index).with_context(|| format!("a sample of path {index}, there are {}", paths.len()))?;
        if path.get("cause").and_then(Value::as_str) == Some("touch") {
            found.push((path, weight));
        }
    }
    Ok(found)
}

fn rows(incident: &Value) -> anyhow::Result<Vec<(Option<usize>, u64)>> {
    let column = |name: &str| json::list(incident, &format!("/allocations/samples/{name}"));
    let (times, paths, weights) = (column("boot_ns")?, column("path")?, column("weight_bytes")?);
    let even = times.len() == paths.len() && times.len() == weights.len();
    ensure!(even, "{} times, {} paths, {} weights", times.len(), paths.len(), weights.len());
    let row = |(path, weight): (&Value, &Value)| -> anyhow::Result<(Option<usize>, u64)> {
        let weight = weight.as_u64().with_context(|| format!("a weight of {weight}"))?;
        ensure!(path.is_null() || path.is_u64(), "a path of {path}");
        Ok((path.as_u64().map(usize::try_from).transpose()?, weight))
    };
    paths.iter().zip(weights).map(row).collect()
}

/// Frames of a path outside the kernel, innermost first.
pub fn user_frames(path: &Value) -> impl Iterator<Item = &Value> {
    let frames = path.get("frames").and_then(Value::as_array).into_iter().flatten();
    frames.filter(|frame| frame.get("kernel") != Some(&Value::Bool(true)))
}

/// Whether the frame's function name contains `name`.
pub fn is(frame: &Value, function: &str) -> bool {
    frame.get("symbol").and_then(Value::as_str).is_some_and(|symbol| symbol.contains(function))
}

/// Attributed bytes of each of these functions. A stack counts for the innermost of them.
pub fn by_function(incident: &Value, functions: &Bytes) -> anyhow::Result<Bytes> {
    let mut sums: Bytes = functions.keys().map(|name| (name.clone(), 0)).collect();
    for (path, weight) in touching(incident)? {
        let named = user_frames(path).find_map(|frame| functions.keys().find(|name| is(frame, name)));
        if let Some(sum) = named.and_then(|name| sums.get_mut(name)) {
            *sum += weight;
        }
    }
    Ok(sums)
}

/// Checks that each function has what it touched, within 5 %.
pub fn within_five_percent(incident: &Value, truth: &Bytes) -> anyhow::Result<()> {
    agrees(&by_function(incident, truth)?, truth)
}

/// The same for sums over several incidents.
pub fn agrees(found: &Bytes, truth: &Bytes) -> anyhow::Result<()> {
    for (name, bytes) in truth {
        let has = found.get(name).copied().unwrap_or_default();
        ensure!(has.abs_diff(*bytes) * 20 <= *bytes, "{name} touched {bytes} bytes, {has} are attributed: {found:?}");
    }
    Ok(())
}

/// Checks that at least 99 % of the stacks are complete.
pub fn reaches_the_outermost(incident: &Value) -> anyhow::Result<()> {
    let samples = touching(incident)?;
    let mut cuts: BTreeMap<&str, usize> = BTreeMap::new();
    for (path, _) in &samples {
        if let Some(cut) = path.get("cut").and_then(Value::as_str) {
            *cuts.entry(cut).or_default() += 1;
        }
    }
    let cut: usize = cuts.values().sum();
    ensure!(!samples.is_empty() && cut * 100 <= samples.len(), "of {} stacks were cut: {cuts:?}", samples.len());
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn incident() -> Value {
        let path = |cause: &str, symbol: &str, cut: Value| {
            json!({ "cause": cause, "cut": cut, "frames": [
                { "symbol": "handle_mm_fault", "kernel": true }, { "symbol": symbol }, { "symbol": "outer" },
            ] })
        };
        json!({
            "allocation_paths": [
                path("touch", "inner", Value::Null), path("map", "inner", Value::Null),
                path("touch", "other", json!("slice")),
            ],
            "allocations": {
                "growth_bytes": 100, "attributed_bytes": 90, "unattributed": [{ "why": "x", "bytes": 10 }],
                "samples": { "boot_ns": [1, 2, 3, 4], "path": [0, 1, 2, null], "weight_bytes": [60, 500, 30, 10] },
            },
        })
    }

    #[test]
    fn bytes_are_the_innermost_functions() {
        let truth = truth(b"x\n{\"touch\": {\"inner\": 61, \"outer\": 30}}\n").unwrap();
        assert_eq!(adds_up(&incident()).unwrap(), 100);
        assert_eq!(by_function(&incident(), &truth).unwrap().into_values().collect::<Vec<_>>(), [60, 30]);
        within_five_percent(&incident(), &truth).unwrap();
        let wrong = [("inner".to_owned(), 70)].into();
        assert!(within_five_percent(&incident(), &wrong).is_err());
        assert!(reaches_the_outermost(&incident()).is_err());
    }

    #[test]
    fn what_does_not_add_up_fails() {
        for (pointer, wrong) in [
            ("/allocations/attributed_bytes", 80),
            ("/allocations/samples/weight_bytes/0", 61),
            ("/allocations/samples/weight_bytes/3", 9),
            ("/allocations/samples/path/0", 7),
        ] {
            let mut incident = incident();
            *incident.pointer_mut(pointer).unwrap() = json!(wrong);
            assert!(adds_up(&incident).is_err(), "{pointer}");
        }
    }
}
