//! The runner: one test executable after another, then what `memtrace doctor` says; or a benchmark.

use std::fs;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context;
use rustix::process::{Pid, Signal, kill_process};

use crate::{prepare, say};

/// The binary under test, and the directory it shares with the programs of the tests.
const MEMTRACE: &str = "/memtrace/memtrace";
/// Where the test executables are.
const TESTS: &str = "/memtrace/tests";
/// The benchmarks.
const BENCH: &str = "/memtrace/bench";
/// Preloaded into doctor, it makes the verifier say how many instructions it processed for each program.
const VERIFIER_LOG: &str = "/memtrace/verifier_log.so";
/// What is put there, the host finds.
const OUT: &str = "/tmp/out";
/// Tests that hurt the machine, which therefore come last.
const HARMFUL: &str = "vm_";
/// How long an executable may take.
const LIMIT: Duration = Duration::from_secs(300);
/// How long a benchmark may take; where the clock counts instructions, these are not the host's seconds.
const BENCH_LIMIT: Duration = Duration::from_secs(3600);
/// How long doctor may take.
const DOCTOR_LIMIT: Duration = Duration::from_secs(90);
/// Rounds of tests that repeat themselves: everything takes many times longer here.
const ROUNDS: &str = "3";

/// Runs what there is to run.
pub(crate) fn everything() -> anyhow::Result<()> {
    prepare::enter_tests()?;
    // a test may use up the machine's memory, and what tells of it has to survive that
    fs::write("/proc/self/oom_score_adj", "-1000").context("failed to protect the runner")?;
    if let Some(bench) = argument("bench") {
        benchmark(&bench)?;
        say(format_args!("done"));
        return Ok(());
    }
    for test in executables()? {
        let name = test.file_name().unwrap_or_default().to_string_lossy().into_owned();
        say(format_args!("begin {name}"));
        let mut command = Command::new(&test);
        command.arg("--test-threads=1").args(argument("filter"));
        command.envs([("MEMTRACE_BIN", MEMTRACE), ("TMPDIR", "/tmp")]);
        command.envs([
            ("MEMTRACE_TESTS_VM", "1"),
            ("MEMTRACE_TESTS_OUT", OUT),
            ("MEMTRACE_TESTS_ROUNDS", ROUNDS),
            ("RUST_BACKTRACE", "0"),
        ]);
        let begin = Instant::now();
        let mut ended = run(&mut command, LIMIT)?;
        if ended.is_some_and(|status| !status.success()) {
            // An emulated CPU may stand still for longer than a test waits. Once more, and the host tells of it.
            say(format_args!("again {name}"));
            ended = run(&mut command, LIMIT)?;
        }
        say(format_args!("end {name} after {} s: {}", begin.elapsed().as_secs(), how(ended)));
    }
    doctor()?;
    say(format_args!("done"));
    Ok(())
}

/// Runs a benchmark, of which the arguments are given with commas between them; what it prints, the host finds.
fn benchmark(arguments: &str) -> anyhow::Result<()> {
    let path = Path::new(OUT).join("bench.json");
    let file = fs::File::create(&path).with_context(|| format!("failed to create {}", path.display()))?;
    say(format_args!("begin bench"));
    let mut command = Command::new(BENCH);
    command.args(arguments.split(',')).env("MEMTRACE_BIN", MEMTRACE).env("TMPDIR", "/tmp").stdout(file);
    // the kernel gives its first process none
    command.env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
    let begin = Instant::now();
    let ended = run(&mut command, BENCH_LIMIT)?;
    say(format_args!("end bench after {} s: {}", begin.elapsed().as_secs(), how(ended)));
    Ok(())
}

/// The value of `memtrace.NAME=` on the kernel's command line.
pub(crate) fn argument(name: &str) -> Option<String> {
    let line = fs::read_to_string("/proc/cmdline").ok()?;
    let value = line
        .split_ascii_whitespace()
        .find_map(|word| word.strip_prefix("memtrace.")?.strip_prefix(name)?.strip_prefix('=').map(str::to_owned));
    value.filter(|value| !value.is_empty())
}

fn executables() -> anyhow::Result<Vec<PathBuf>> {
    let mut found: Vec<PathBuf> = fs::read_dir(TESTS)
        .and_then(|entries| entries.map(|entry| entry.map(|entry| entry.path())).collect())
        .with_context(|| format!("failed to read {TESTS}"))?;
    found.sort_by_key(|path| {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        (name.starts_with(HARMFUL), name)
    });
    Ok(found)
}

/// Waits for its end, at most so long; `None` when it had to be killed. Leaves no process behind.
fn run(command: &mut Command, limit: Duration) -> anyhow::Result<Option<ExitStatus>> {
    let mut child = command.stdin(Stdio::null()).process_group(0).spawn().context("failed to start a program")?;
    // unlike the runner, it is as any other process to the OOM killer
    let _ = fs::write(format!("/proc/{}/oom_score_adj", child.id()), "0");
    let begin = Instant::now();
    let mut ended = child.try_wait().context("failed to wait for a program")?;
    while ended.is_none() && begin.elapsed() < limit {
        std::thread::sleep(Duration::from_millis(50));
        ended = child.try_wait().context("failed to wait for a program")?;
    }
    kill_the_rest();
    if ended.is_none() {
        child.wait().context("failed to wait for a program")?;
    }
    Ok(ended)
}

/// The next executable starts on a machine where nobody else runs.
fn kill_the_rest() {
    let numbered = |entry: fs::DirEntry| entry.file_name().to_string_lossy().parse::<i32>().ok();
    let pids = fs::read_dir("/proc").into_iter().flatten().filter_map(Result::ok).filter_map(numbered);
    for pid in pids.filter(|pid| *pid != 1 && u32::try_from(*pid) != Ok(std::process::id())) {
        // kernel threads have no program and take no signal
        let program = fs::read_link(Path::new("/proc").join(pid.to_string()).join("exe"));
        if let (Ok(_), Some(pid)) = (program, Pid::from_raw(pid)) {
            let _ = kill_process(pid, Signal::KILL);
        }
    }
}

fn how(ended: Option<ExitStatus>) -> String {
    match ended {
        None => "killed, it took too long".to_owned(),
        Some(status) => match (status.code(), status.signal()) {
            (Some(0), _) => "passed".to_owned(),
            // what libtest ends with when tests failed, which it has told of
            (Some(101), _) => "failed".to_owned(),
            (_, Some(signal)) => format!("died of signal {signal}"),
            (code, _) => format!("exit code {code:?}"),
        },
    }
}

/// What doctor says of this kernel, and what the verifier said meanwhile.
fn doctor() -> anyhow::Result<()> {
    let (path, log) = (Path::new(OUT).join("doctor.json"), Path::new(OUT).join("verifier.log"));
    let file = fs::File::create(&path).with_context(|| format!("failed to create {}", path.display()))?;
    let mut command = Command::new(MEMTRACE);
    command.args(["doctor", "--json"]).stdout(file);
    command.env("LD_PRELOAD", VERIFIER_LOG).env("MEMTRACE_VERIFIER_LOG", log);
    let ended = run(&mut command, DOCTOR_LIMIT).context("failed to run doctor")?;
    if ended.is_none_or(|status| !status.success()) {
        say(format_args!("trouble doctor: {}", how(ended)));
    }
    Ok(())
}
