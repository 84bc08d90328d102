//! Second tries across runs. A single one may be the machine's fault; a test that needs one more
//! than once in ten runs has a bug, and fails the run.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use memtrace_harness::checkout::Checkout;
use memtrace_harness::libtest::SecondTry;

/// Number of recent runs that are judged, including this one.
const RUNS: usize = 10;
/// Second tries allowed for one test within those runs.
const MOST: usize = 1;
/// Number of runs kept in the file.
const KEPT: usize = 100;

/// Environment variable that names another file than `target/test-runs.jsonl`, for instance one
/// that outlives the checkout.
const VARIABLE: &str = "MEMTRACE_TEST_RUNS";

/// Path of the history, one JSON object a line for each run.
pub(crate) fn file(checkout: &Checkout) -> PathBuf {
    std::env::var_os(VARIABLE).map_or_else(|| checkout.target.join("test-runs.jsonl"), PathBuf::from)
}

/// Appends this run and returns a sentence for each test that needed too many second tries.
pub(crate) fn add(file: &Path, date: &str, second_tries: &[SecondTry]) -> Result<Vec<String>> {
    let old = match std::fs::read_to_string(file) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
        Err(error) => return Err(error).with_context(|| format!("failed to read {}", file.display())),
    };
    let tests: BTreeSet<&str> = second_tries.iter().map(|second_try| second_try.test.as_str()).collect();
    let line = json!({ "date": date, "second_tries": tests }).to_string();
    let mut lines: Vec<&str> = old.lines().collect();
    lines.push(&line);
    let kept = lines.get(lines.len().saturating_sub(KEPT)..).unwrap_or_default();
    std::fs::write(file, kept.join("\n") + "\n").with_context(|| format!("failed to write {}", file.display()))?;
    Ok(bugs(kept))
}

/// Judges the most recent runs. A line that cannot be parsed counts as a run without second tries.
fn bugs(lines: &[&str]) -> Vec<String> {
    let last = lines.get(lines.len().saturating_sub(RUNS)..).unwrap_or_default();
    let mut counts: BTreeMap<String, usize> = BTreeMap::new();
    for run in last.iter().filter_map(|line| serde_json::from_str::<Value>(line).ok()) {
        let tests = run.get("second_tries").and_then(Value::as_array).into_iter().flatten();
        for test in tests.filter_map(Value::as_str) {
            *counts.entry(test.to_owned()).or_default() += 1;
        }
    }
    let many = counts.into_iter().filter(|(_, count)| *count > MOST);
    many.map(|(test, count)| {
        format!("{test} needed a second try in {count} of the last {} runs: find out why", last.len())
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn second_try(test: &str) -> SecondTry {
        SecondTry { test: test.to_owned(), said: Vec::new(), passed: true }
    }

    #[test]
    fn a_test_that_needs_more_than_one_in_ten_runs_is_named() {
        let file = std::env::temp_dir().join(format!("memtrace-runs-{}.jsonl", std::process::id()));
        let _ = std::fs::remove_file(&file);
        let run = |tests: &[&str]| {
            let tries: Vec<SecondTry> = tests.iter().map(|test| second_try(test)).collect();
            add(&file, "2026-01-02", &tries).unwrap()
        };
        assert!(run(&["a::b", "a::b"]).is_empty(), "twice in one run is once");
        for _ in 0..8 {
            assert!(run(&[]).is_empty());
        }
        assert_eq!(run(&["a::b", "c::d"]), ["a::b needed a second try in 2 of the last 10 runs: find out why"]);
        assert!(run(&[]).is_empty(), "the first one is eleven runs ago");
        let text = std::fs::read_to_string(&file).unwrap();
        assert!(
            text.lines().count() == 11 && text.starts_with("{\"date\":\"2026-01-02\",\"second_tries\":[\"a::b\"]}\n")
        );
        std::fs::remove_file(&file).unwrap();
    }

    #[test]
    fn what_is_kept_is_bounded_and_what_cannot_be_read_counts_for_nothing() {
        let file = std::env::temp_dir().join(format!("memtrace-runs-many-{}.jsonl", std::process::id()));
        std::fs::write(&file, "not a run\n".repeat(3 * KEPT)).unwrap();
        assert!(add(&file, "2026-01-02", &[second_try("a")]).unwrap().is_empty());
        assert_eq!(std::fs::read_to_string(&file).unwrap().lines().count(), KEPT);
        std::fs::remove_file(&file).unwrap();
    }
}
