//! `cargo xtask test`: every layer that this machine can run, and a plain word about the others.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::build::{self, OBJECT_VARIABLE};
use crate::place::{Place, Profile, has_btf, is_root};
use crate::run::{cargo, say, shown};
use crate::setup;

/// Names the built agent for the black-box tests, which run it and never link it.
const AGENT_VARIABLE: &str = "MEMTRACE_BIN";

/// Test targets of memtrace-tests, by the start of their name, that need neither root nor eBPF.
const UNPRIVILEGED: [&str; 4] = ["cli", "golden", "replay", "report"];

/// Arguments of `cargo xtask test`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Test the optimized build
    #[arg(long)]
    release: bool,
    /// Only tests whose name contains this
    filter: Option<String>,
}

/// What one layer of tests came to.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Tally {
    passed: u64,
    failed: u64,
    skipped: u64,
}

/// One layer and how it ended.
struct Layer {
    name: &'static str,
    ended: Ended,
}

enum Ended {
    Ran { tally: Tally, success: bool },
    Skipped { why: &'static str },
}

/// Runs the verb.
pub(crate) fn run(place: &Place, args: &Args) -> Result<()> {
    setup::bpf(place)?;
    setup::tests()?;
    let profile = Profile::of(args.release);
    let object = build::ebpf(place)?;
    build::agent(place, profile, &object)?;
    build::workloads(place, profile)?;

    let command = || {
        let mut test = cargo(place);
        test.args(["test", "--no-fail-fast"]).args(profile.args());
        test.env(OBJECT_VARIABLE, &object).env(AGENT_VARIABLE, place.bin(profile, "memtrace"));
        test
    };
    let filter = args.filter.as_deref();
    let (unprivileged, in_kernel) = split_targets(test_targets(&place.root.join("tests/tests"))?);

    let mut layers = Vec::new();
    let mut units = command();
    units.args(["--workspace", "--exclude", "memtrace-ebpf", "--exclude", "memtrace-tests"]);
    layers.push(layer("unit and property tests", units, filter, false)?);

    let mut shared = command();
    shared.args(["--package", "memtrace-tests", "--lib", "--bins"]);
    layers.push(layer("the tests' own programs", shared, filter, false)?);

    if !unprivileged.is_empty() {
        let mut black_box = command();
        black_box.args(["--package", "memtrace-tests"]).args(select(&unprivileged));
        layers.push(layer("black box, no privileges", black_box, filter, false)?);
    }
    if !in_kernel.is_empty() {
        let name = "black box, in this kernel";
        match cannot_trace() {
            Some(why) => layers.push(Layer { name, ended: Ended::Skipped { why } }),
            None => {
                let mut kernel = command();
                kernel.args(["--package", "memtrace-tests"]).args(select(&in_kernel));
                layers.push(layer(name, kernel, filter, true)?);
            }
        }
    }
    let summary = sum_up(&layers, std::env::var("CI").is_ok_and(|ci| ci == "true"));
    say(format_args!("summary"));
    for line in &summary.lines {
        say(format_args!("  {line}"));
    }
    let _ = writeln!(std::io::stdout(), "memtrace: {}", summary.total);
    if !summary.troubles.is_empty() {
        bail!("{}", summary.troubles.join("; "));
    }
    Ok(())
}

fn cannot_trace() -> Option<&'static str> {
    if !is_root() {
        Some("not root: run it as `sudo -E env PATH=$PATH cargo xtask test`")
    } else if !has_btf() {
        Some("this kernel has no BTF at /sys/kernel/btf/vmlinux")
    } else {
        None
    }
}

fn layer(name: &'static str, mut command: Command, filter: Option<&str>, one_by_one: bool) -> Result<Layer> {
    command.arg("--");
    if one_by_one {
        // they share one kernel: a second agent's view of the first one's workload would be noise
        command.arg("--test-threads=1");
    }
    command.args(filter);
    say(format_args!("{name}: {}", shown(&command)));
    let mut child = command.stdout(Stdio::piped()).spawn().with_context(|| format!("failed to start {name}"))?;
    let stdout = child.stdout.take().context("failed to take the output of cargo test")?;
    let mut tally = Tally::default();
    for line in BufReader::new(stdout).split(b'\n') {
        let line = line.with_context(|| format!("failed to read the output of {name}"))?;
        let line = String::from_utf8_lossy(&line);
        let _ = writeln!(std::io::stdout(), "{line}");
        if let Some(result) = result_of(&line) {
            tally = tally.plus(result);
        }
    }
    let success = child.wait().with_context(|| format!("failed to wait for {name}"))?.success();
    Ok(Layer { name, ended: Ended::Ran { tally, success } })
}

/// What all layers came to.
struct Summary {
    lines: Vec<String>,
    total: Tally,
    /// Why the run as a whole failed; empty when it did not.
    troubles: Vec<String>,
}

fn sum_up(layers: &[Layer], ci: bool) -> Summary {
    let mut summary = Summary { lines: Vec::new(), total: Tally::default(), troubles: Vec::new() };
    for Layer { name, ended } in layers {
        match ended {
            Ended::Ran { tally, success } => {
                summary.total = summary.total.plus(*tally);
                summary.lines.push(format!("{name}: {tally}"));
                if !success {
                    let what = if tally.failed == 0 { "did not build or was cut short" } else { "has failures" };
                    summary.troubles.push(format!("{name} {what}"));
                }
            }
            Ended::Skipped { why } => {
                summary.lines.push(format!("{name}: NOT RUN, {why}"));
                if ci {
                    summary.troubles.push(format!("{name} could not run here and CI=true: {why}"));
                }
            }
        }
    }
    if summary.total.passed + summary.total.failed == 0 {
        summary.troubles.push("no test ran".to_owned());
    }
    summary
}

impl Tally {
    fn plus(self, other: Self) -> Self {
        Self {
            passed: self.passed + other.passed,
            failed: self.failed + other.failed,
            skipped: self.skipped + other.skipped,
        }
    }
}

impl std::fmt::Display for Tally {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} passed, {} failed, {} skipped", self.passed, self.failed, self.skipped)
    }
}

/// Reads libtest's closing line: `test result: ok. 3 passed; 0 failed; 1 ignored; ...`.
fn result_of(line: &str) -> Option<Tally> {
    let (_, counts) = line.strip_prefix("test result: ")?.split_once(". ")?;
    let mut tally = Tally::default();
    for part in counts.split(';') {
        let mut words = part.split_whitespace();
        let (Some(Ok(count)), Some(what)) = (words.next().map(str::parse::<u64>), words.next()) else {
            continue;
        };
        match what {
            "passed" => tally.passed = count,
            "failed" => tally.failed = count,
            "ignored" => tally.skipped = count,
            _ => {}
        }
    }
    Some(tally)
}

/// The names of the test targets in a directory, as cargo finds them.
fn test_targets(dir: &Path) -> Result<Vec<String>> {
    if !dir.is_dir() {
        return Ok(Vec::new());
    }
    let mut names = Vec::new();
    for entry in std::fs::read_dir(dir).with_context(|| format!("failed to read {}", dir.display()))? {
        let path = entry.with_context(|| format!("failed to read {}", dir.display()))?.path();
        let is_target = path.extension().is_some_and(|e| e == "rs") || path.join("main.rs").is_file();
        if is_target && let Some(stem) = path.file_stem() {
            names.push(stem.to_string_lossy().into_owned());
        }
    }
    names.sort();
    Ok(names)
}

fn split_targets(names: Vec<String>) -> (Vec<String>, Vec<String>) {
    names.into_iter().partition(|name| UNPRIVILEGED.iter().any(|prefix| name.starts_with(prefix)))
}

fn select(names: &[String]) -> Vec<String> {
    names.iter().flat_map(|name| ["--test".to_owned(), name.clone()]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn closing_lines_are_counted() {
        let line = "test result: FAILED. 12 passed; 2 failed; 1 ignored; 0 measured; 7 filtered out; finished in 0.10s";
        assert_eq!(result_of(line), Some(Tally { passed: 12, failed: 2, skipped: 1 }));
        assert_eq!(result_of("test engine::test_result ... ok"), None);
        assert_eq!(result_of("running 3 tests"), None);
    }

    #[test]
    fn unknown_targets_are_taken_to_need_the_kernel() {
        let names = ["cli", "golden_v1", "kernel_oom", "something"].map(str::to_owned).to_vec();
        let (unprivileged, in_kernel) = split_targets(names);
        assert_eq!(unprivileged, ["cli", "golden_v1"]);
        assert_eq!(in_kernel, ["kernel_oom", "something"]);
    }

    #[test]
    fn a_layer_that_could_not_run_fails_only_ci() {
        let units = Ended::Ran { tally: Tally { passed: 1, failed: 0, skipped: 0 }, success: true };
        let kernel = Ended::Skipped { why: "not root" };
        let layers = [Layer { name: "units", ended: units }, Layer { name: "in the kernel", ended: kernel }];
        assert!(sum_up(&layers, false).troubles.is_empty());
        assert!(sum_up(&layers, false).lines.iter().any(|line| line.contains("NOT RUN")));
        assert_eq!(sum_up(&layers, true).troubles.len(), 1);
    }

    #[test]
    fn a_layer_that_did_not_build_fails() {
        let ended = Ended::Ran { tally: Tally { passed: 1, failed: 0, skipped: 0 }, success: false };
        assert_eq!(sum_up(&[Layer { name: "units", ended }], false).troubles.len(), 1);
    }

    #[test]
    fn a_run_of_no_test_fails() {
        let ended = Ended::Ran { tally: Tally::default(), success: true };
        assert_eq!(sum_up(&[Layer { name: "units", ended }], false).troubles, ["no test ran"]);
    }
}
