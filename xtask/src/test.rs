//! `cargo xtask test`: every layer that this machine can run, and a plain word about the others.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::build::{self, OBJECT_VARIABLE};
use crate::libtest::{Reader, Tally};
use crate::place::{Place, Profile, has_btf, is_root};
use crate::run::{cargo, say, shown};
use crate::vm::instructions::Extent;
use crate::{setup, vm};

/// Names the built agent for the black-box tests, which run it and never link it.
const AGENT_VARIABLE: &str = "MEMTRACE_BIN";

/// Test targets of memtrace-tests, by the start of their name, that need neither root nor eBPF.
const UNPRIVILEGED: [&str; 4] = ["cli", "golden", "replay", "report"];

/// Those that need a browser, and nothing of the kernel.
const IN_BROWSER: &str = "browser_";

/// Those that would hurt this machine: they only run in machines of their own.
const HARMFUL: &str = "vm_";

/// Failed tests that run once more; of more the machine is not the cause.
const MOST_AGAIN: usize = 3;

/// Arguments of `cargo xtask test`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Test the optimized build
    #[arg(long)]
    release: bool,
    /// Leave out the kernel matrix, which takes the longest
    #[arg(long)]
    no_vm: bool,
    /// Only tests whose name contains this
    filter: Option<String>,
}

/// One layer and how it ended.
struct Layer {
    name: String,
    ended: Ended,
    /// What passed without having tested, and why; what ran once more.
    remarks: Vec<String>,
}

enum Ended {
    Ran {
        tally: Tally,
        success: bool,
    },
    /// It could not run on this machine.
    Impossible {
        why: String,
    },
    /// It was not wanted.
    LeftOut {
        why: &'static str,
    },
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
    let Targets { unprivileged, in_browser, in_kernel } = split_targets(test_targets(&place.root.join("tests/tests"))?);

    let mut layers = Vec::new();
    let mut units = command();
    units.args(["--workspace", "--exclude", "memtrace-ebpf", "--exclude", "memtrace-tests"]);
    layers.push(layer("unit and property tests", units, filter)?);

    let mut shared = command();
    shared.args(["--package", "memtrace-tests", "--lib", "--bins"]);
    layers.push(layer("the tests' own programs", shared, filter)?);

    if !unprivileged.is_empty() {
        let mut black_box = command();
        black_box.args(["--package", "memtrace-tests"]).args(select(&unprivileged));
        layers.push(layer("black box, no privileges", black_box, filter)?);
    }
    if !in_browser.is_empty() {
        let mut browser = command();
        browser.args(["--package", "memtrace-tests"]).args(select(&in_browser));
        layers.push(layer("black box, in a browser", browser, filter)?);
    }
    if !in_kernel.is_empty() {
        let name = "black box, in this kernel";
        match cannot_trace() {
            Some(why) => layers.push(Layer::without_tests(name, Ended::Impossible { why: why.to_owned() })),
            None => {
                let kernel = || {
                    let mut kernel = command();
                    kernel.args(["--package", "memtrace-tests"]).args(select(&in_kernel));
                    // They share one kernel: a second agent's view of the first one's workload would be noise.
                    kernel.args(["--", "--test-threads=1"]);
                    kernel
                };
                layers.push(kernel_layer(name, kernel, filter)?);
            }
        }
    }
    layers.extend(kernel_matrix(place, profile, args));
    layers.push(instructions(place, profile, args));
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

/// The machines of the matrix, each a layer.
fn kernel_matrix(place: &Place, profile: Profile, args: &Args) -> Vec<Layer> {
    let name = "the kernel matrix";
    if args.no_vm {
        return vec![Layer::without_tests(name, Ended::LeftOut { why: "as was asked for (--no-vm)" })];
    }
    match setup::machines().and_then(|()| vm::matrix(place, profile, &vm::Args::whole(args.filter.clone()))) {
        Ok(Some(reports)) => reports.into_iter().map(Layer::of_machine).collect(),
        Ok(None) => vec![Layer::without_tests(name, Ended::LeftOut { why: "none of its tests has that in its name" })],
        Err(error) => vec![Layer::without_tests(name, Ended::Impossible { why: format!("{error:#}") })],
    }
}

/// What the agent adds to each operation, on every kernel, held against what is committed.
fn instructions(place: &Place, profile: Profile, args: &Args) -> Layer {
    let name = "instructions";
    if args.no_vm {
        return Layer::without_tests(name, Ended::LeftOut { why: "as was asked for (--no-vm)" });
    }
    if args.filter.as_ref().is_some_and(|filter| !name.contains(filter.as_str())) {
        return Layer::without_tests(name, Ended::LeftOut { why: "it has not that in its name" });
    }
    match vm::instructions::run(place, profile, Extent::Together, false) {
        Ok(found) => {
            for failure in &found.failures {
                say(format_args!("{name}: FAILED {failure}"));
            }
            let ended = Ended::Ran { tally: found.tally, success: found.failures.is_empty() };
            Layer { name: name.to_owned(), ended, remarks: found.remarks }
        }
        Err(error) => Layer::without_tests(name, Ended::Impossible { why: format!("{error:#}") }),
    }
}

impl Layer {
    fn without_tests(name: &str, ended: Ended) -> Self {
        Self { name: name.to_owned(), ended, remarks: Vec::new() }
    }

    fn heard(name: &str, reader: &Reader, success: bool) -> Self {
        let remarks = reader.not_run.iter().map(|what| format!("not run: {what}")).collect();
        Self { name: name.to_owned(), ended: Ended::Ran { tally: reader.tally(), success }, remarks }
    }

    /// Takes in how the tests that had failed, all that went wrong, went when they ran once more.
    fn tried_again(&mut self, failed: &BTreeSet<String>, again: &Reader, went_well: bool) {
        let second = again.tally();
        // All of them must have run: a test that is not found passes by not being there.
        let all_ran = second.passed + second.failed == failed.len() as u64;
        if let Ended::Ran { tally, success } = &mut self.ended
            && all_ran
        {
            tally.passed += second.passed;
            tally.failed -= second.passed;
            *success = went_well;
        }
        self.remarks.extend(failed.iter().map(|test| {
            let ended = if all_ran && !again.failed.contains(test) { "passed" } else { "failed again" };
            format!("second try of {test}, which had failed: {ended}")
        }));
    }

    fn of_machine(report: vm::Report) -> Self {
        for failure in &report.failures {
            say(format_args!("{}: FAILED {failure}", report.name));
        }
        let ended = Ended::Ran { tally: report.tally, success: report.tally.failed == 0 };
        Self { name: format!("kernel {}", report.name), ended, remarks: report.remarks }
    }
}

fn layer(name: &str, mut command: Command, filter: Option<&str>) -> Result<Layer> {
    command.arg("--").args(filter);
    let (reader, success) = hear(name, command)?;
    Ok(Layer::heard(name, &reader, success))
}

/// What else goes on in a shared machine can come between a real kernel and a test: as in the machines of the matrix, a
/// few that failed run once more, alone, and the summary says which.
fn kernel_layer(name: &str, command: impl Fn() -> Command, filter: Option<&str>) -> Result<Layer> {
    let mut first = command();
    first.args(filter);
    let (reader, success) = hear(name, first)?;
    let mut layer = Layer::heard(name, &reader, success);
    let Some(failed) = reader.few_failed(MOST_AGAIN) else { return Ok(layer) };
    let mut second = command();
    second.arg("--exact").args(failed);
    let (again, success) = hear(name, second)?;
    layer.tried_again(failed, &again, success);
    Ok(layer)
}

/// Runs a layer's tests, shows what they print and reads it; and whether all went well.
fn hear(name: &str, mut command: Command) -> Result<(Reader, bool)> {
    say(format_args!("{name}: {}", shown(&command)));
    let mut child = command.stdout(Stdio::piped()).spawn().with_context(|| format!("failed to start {name}"))?;
    let stdout = child.stdout.take().context("failed to take the output of cargo test")?;
    let mut reader = Reader::default();
    for line in BufReader::new(stdout).split(b'\n') {
        let line = line.with_context(|| format!("failed to read the output of {name}"))?;
        let line = String::from_utf8_lossy(&line);
        let _ = writeln!(std::io::stdout(), "{line}");
        reader.line(&line);
    }
    let success = child.wait().with_context(|| format!("failed to wait for {name}"))?.success();
    Ok((reader, success))
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
    for Layer { name, ended, remarks } in layers {
        match ended {
            Ended::Ran { tally, success } => {
                summary.total = summary.total.plus(*tally);
                summary.lines.push(format!("{name}: {tally}"));
                if !success {
                    let what = if tally.failed == 0 { "did not build or was cut short" } else { "has failures" };
                    summary.troubles.push(format!("{name} {what}"));
                }
            }
            Ended::Impossible { why } => {
                summary.lines.push(format!("{name}: NOT RUN, {why}"));
                if ci {
                    summary.troubles.push(format!("{name} could not run here and CI=true: {why}"));
                }
            }
            Ended::LeftOut { why } => summary.lines.push(format!("{name}: NOT RUN, {why}")),
        }
        summary.lines.extend(remarks.iter().map(|remark| format!("  {remark}")));
    }
    if summary.total.passed + summary.total.failed == 0 {
        summary.troubles.push("no test ran".to_owned());
    }
    summary
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

/// Test targets of memtrace-tests by what they need.
#[derive(Debug, Default, PartialEq, Eq)]
struct Targets {
    unprivileged: Vec<String>,
    in_browser: Vec<String>,
    in_kernel: Vec<String>,
}

fn split_targets(names: Vec<String>) -> Targets {
    let mut targets = Targets::default();
    for name in names.into_iter().filter(|name| !name.starts_with(HARMFUL)) {
        let group = if name.starts_with(IN_BROWSER) {
            &mut targets.in_browser
        } else if UNPRIVILEGED.iter().any(|prefix| name.starts_with(prefix)) {
            &mut targets.unprivileged
        } else {
            &mut targets.in_kernel
        };
        group.push(name);
    }
    targets
}

fn select(names: &[String]) -> Vec<String> {
    names.iter().flat_map(|name| ["--test".to_owned(), name.clone()]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_targets_need_the_kernel_and_harmful_ones_a_machine_of_their_own() {
        let names = ["browser_page", "cli", "golden_v1", "kernel_oom", "something", "vm_machine"];
        let targets = split_targets(names.map(str::to_owned).to_vec());
        assert_eq!(targets.unprivileged, ["cli", "golden_v1"]);
        assert_eq!(targets.in_browser, ["browser_page"]);
        assert_eq!(targets.in_kernel, ["kernel_oom", "something"]);
    }

    #[test]
    fn a_layer_that_could_not_run_fails_only_ci() {
        let units = Ended::Ran { tally: Tally { passed: 1, failed: 0, skipped: 0 }, success: true };
        let kernel = Ended::Impossible { why: "not root".to_owned() };
        let layers = [Layer::without_tests("units", units), Layer::without_tests("in the kernel", kernel)];
        assert!(sum_up(&layers, false).troubles.is_empty());
        assert!(sum_up(&layers, false).lines.iter().any(|line| line.contains("NOT RUN")));
        assert_eq!(sum_up(&layers, true).troubles.len(), 1);
    }

    #[test]
    fn a_layer_that_was_not_wanted_fails_nothing() {
        let units = Ended::Ran { tally: Tally { passed: 1, failed: 0, skipped: 0 }, success: true };
        let matrix = Ended::LeftOut { why: "as was asked for" };
        let layers = [Layer::without_tests("units", units), Layer::without_tests("matrix", matrix)];
        assert!(sum_up(&layers, true).troubles.is_empty());
    }

    #[test]
    fn what_did_not_run_is_told_with_its_layer() {
        let ended = Ended::Ran { tally: Tally { passed: 1, failed: 0, skipped: 1 }, success: true };
        let layer = Layer { name: "units".to_owned(), ended, remarks: vec!["not run: swap: no disk".to_owned()] };
        assert_eq!(sum_up(&[layer], true).lines, ["units: 1 passed, 0 failed, 1 skipped", "  not run: swap: no disk"]);
    }

    #[test]
    fn a_second_try_counts_where_it_ran_and_is_told() {
        let heard = |lines: &str| {
            let mut reader = Reader::default();
            lines.lines().for_each(|line| drop(reader.line(line)));
            reader
        };
        let closing =
            |passed: u32, failed: u32| format!("test result: ok. {passed} passed; {failed} failed; 0 ignored\n");
        let first = format!("test a ... ok\ntest b ... FAILED\ntest c ... FAILED\n{}", closing(1, 2));
        let cases = [
            (format!("test b ... ok\ntest c ... ok\n{}", closing(2, 0)), true, (3, 0, true)),
            (format!("test b ... ok\ntest c ... FAILED\n{}", closing(1, 1)), false, (2, 1, false)),
            (closing(0, 0), true, (1, 2, false)),
        ];
        for (again, went_well, (passed, failed, success)) in cases {
            let first = heard(&first);
            let mut layer = Layer::heard("kernel", &first, false);
            layer.tried_again(&first.failed, &heard(&again), went_well);
            let Ended::Ran { tally, success: found } = layer.ended else { panic!("it ran") };
            assert_eq!((tally.passed, tally.failed, found), (passed, failed, success), "{again}");
            assert_eq!(layer.remarks.len(), 2);
        }
    }

    #[test]
    fn a_layer_that_did_not_build_fails() {
        let ended = Ended::Ran { tally: Tally { passed: 1, failed: 0, skipped: 0 }, success: false };
        assert_eq!(sum_up(&[Layer::without_tests("units", ended)], false).troubles.len(), 1);
    }

    #[test]
    fn a_run_of_no_test_fails() {
        let ended = Ended::Ran { tally: Tally::default(), success: true };
        assert_eq!(sum_up(&[Layer::without_tests("units", ended)], false).troubles, ["no test ran"]);
    }
}
