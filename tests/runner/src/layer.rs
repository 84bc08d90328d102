//! One layer of tests: runs its executables, reads their output and records the result.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use memtrace_harness::built::TestExecutable;
use memtrace_harness::libtest::{LibtestReader, RetryExtent, SecondTry, Tally, retried};
use memtrace_harness::run::{say, shown};
use memtrace_vm::MachineReport;

/// Most failed tests that are run once more. If more fail, the cause is not the machine.
const MOST_AGAIN: usize = 3;

/// A layer and its result.
pub(crate) struct Layer {
    pub(crate) name: String,
    pub(crate) ended: LayerOutcome,
    /// What did not run or was left out, and why.
    pub(crate) remarks: Vec<String>,
    /// Tests that were run once more.
    pub(crate) second_tries: Vec<SecondTry>,
    /// Wall-clock time. Layers overlap, so their times do not add up to the run's.
    pub(crate) took: Duration,
}

/// Result of a layer.
pub(crate) enum LayerOutcome {
    Ran {
        tally: Tally,
        success: bool,
    },
    /// The layer has no tests of its own, and succeeded.
    Done,
    /// The layer cannot run on this machine.
    Impossible {
        why: String,
    },
    /// The layer was not asked for.
    LeftOut {
        why: &'static str,
    },
}

/// Runs the executables of a layer.
pub(crate) struct LayerRunner<'a> {
    /// Path of the agent under test.
    pub(crate) memtrace: &'a Path,
    /// Runs only tests whose name contains this.
    pub(crate) filter: Option<&'a str>,
}

impl Layer {
    /// A layer with this result, without remarks, that took no time.
    pub(crate) fn ended(name: &str, ended: LayerOutcome) -> Self {
        let (remarks, second_tries) = (Vec::new(), Vec::new());
        Self { name: name.to_owned(), ended, remarks, second_tries, took: Duration::ZERO }
    }

    /// Runs a layer that has no tests of its own: set-up, a build, a check.
    pub(crate) fn of_work(name: &str, work: impl FnOnce() -> Result<()>) -> Self {
        let begin = Instant::now();
        let ended = match work() {
            Ok(()) => LayerOutcome::Done,
            Err(error) => {
                say(format_args!("{name}: FAILED: {error:#}"));
                LayerOutcome::Ran { tally: Tally { failed: 1, ..Tally::default() }, success: false }
            }
        };
        Self { took: begin.elapsed(), ..Self::ended(name, ended) }
    }

    /// The layer of one machine of the kernel matrix.
    pub(crate) fn of_machine(report: MachineReport) -> Self {
        for failure in &report.failures {
            say(format_args!("{}: FAILED {failure}", report.name));
        }
        let ended = LayerOutcome::Ran { tally: report.tally, success: report.tally.failed == 0 };
        let (name, remarks, second_tries) = (format!("kernel {}", report.name), report.remarks, report.second_tries);
        Self { name, ended, remarks, second_tries, took: report.took }
    }
}

impl LayerRunner<'_> {
    /// Runs a layer's executables one after another.
    pub(crate) fn layer(&self, name: &str, executables: &[&TestExecutable]) -> Result<Layer> {
        self.run(name, executables, &[], 0)
    }

    /// Runs tests that share this machine's kernel, one at a time: a second agent would see the
    /// first one's workload as noise. Other activity on the machine can disturb a test, so a few
    /// failed tests are run once more, alone, as in the emulated machines; the summary lists them.
    pub(crate) fn kernel_layer(&self, name: &str, executables: &[&TestExecutable]) -> Result<Layer> {
        self.run(name, executables, &["--test-threads=1"], MOST_AGAIN)
    }

    fn run(&self, name: &str, executables: &[&TestExecutable], options: &[&str], most_again: usize) -> Result<Layer> {
        let begin = Instant::now();
        let (mut tally, mut success, mut again_left) = (Tally::default(), true, most_again);
        let (mut remarks, mut second_tries) = (Vec::new(), Vec::new());
        for executable in executables {
            let arguments: Vec<&str> = options.iter().copied().chain(self.filter).collect();
            let (reader, went_well) = self.run_executable(name, executable, &arguments)?;
            remarks.extend(reader.not_run.iter().map(|what| format!("not run: {what}")));
            let Some(failed) = reader.few_failed(again_left).filter(|_| !went_well) else {
                tally = tally.plus(reader.tally());
                success &= went_well;
                continue;
            };
            again_left -= failed.len();
            let exactly = [options, &["--exact"]].concat();
            let arguments: Vec<&str> = exactly.into_iter().chain(failed.iter().map(String::as_str)).collect();
            let (again, went_well) = self.run_executable(name, executable, &arguments)?;
            let joined = retried(&executable.name, &reader, &again, RetryExtent::Failed);
            tally = tally.plus(joined.tally);
            success &= went_well && joined.second_tries.iter().all(|one| one.passed);
            second_tries.extend(joined.second_tries);
        }
        let ended = LayerOutcome::Ran { tally, success };
        Ok(Layer { remarks, second_tries, took: begin.elapsed(), ..Layer::ended(name, ended) })
    }

    /// Runs an executable, passes its output on and reads it. Returns what was read and whether the
    /// exit code was 0.
    fn run_executable(
        &self,
        layer: &str,
        executable: &TestExecutable,
        arguments: &[&str],
    ) -> Result<(LibtestReader, bool)> {
        let mut command = Command::new(&executable.path);
        // as cargo does: in the package's directory, and with its path
        command.current_dir(&executable.dir).env("CARGO_MANIFEST_DIR", &executable.dir);
        command.args(arguments).env(AGENT_VARIABLE, self.memtrace);
        say(format_args!("{layer}: {}", shown(&command)));
        let failed = || format!("failed to run {}", executable.path.display());
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().with_context(failed)?;
        let stdout = child.stdout.take().context("failed to take the output of a test")?;
        let mut reader = LibtestReader::default();
        for line in BufReader::new(stdout).split(b'\n') {
            let line = line.with_context(failed)?;
            let line = String::from_utf8_lossy(&line);
            let _ = writeln!(std::io::stdout(), "{line}");
            reader.line(&line);
        }
        let success = child.wait().with_context(failed)?.success();
        Ok((reader, success))
    }
}

/// Environment variable that names the agent for the black-box tests.
const AGENT_VARIABLE: &str = "MEMTRACE_BIN";
