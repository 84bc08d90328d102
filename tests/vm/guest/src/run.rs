//! The runner: one test executable after another, then what `memtrace doctor` says; or a benchmark.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context;
use memtrace_tests::deadline::SLOWNESS;
use memtrace_tests::process;
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
/// What the host has put there: executables that do not run on this machine, one a line.
const LEFT_OUT: &str = "/tmp/out/left-out";
/// Tests that hurt the machine, which therefore come last.
const HARMFUL: &str = "vm_";
/// Failed tests of an executable that run once more; of more the machine is not the cause.
const MOST_AGAIN: usize = 3;
/// Rounds of tests that repeat themselves: everything takes many times longer here.
const ROUNDS: &str = "3";
/// Seconds that a machine takes to boot where its emulator has a processor to itself.
const QUIET_BOOT_S: f64 = 2.0;
/// How much slower than it booted a machine may become: others boot beside it, and the host has more to do.
const MARGIN: f64 = 4.0;
/// How often the host is told that this machine is there.
const ALIVE: Duration = Duration::from_secs(5);

/// Runs what there is to run. Nothing here has a limit in time: the host gives a machine up that makes no progress.
pub(crate) fn everything() -> anyhow::Result<()> {
    prepare::enter_tests()?;
    // a test may use up the machine's memory, and what tells of it has to survive that
    fs::write("/proc/self/oom_score_adj", "-1000").context("failed to protect the runner")?;
    if let Some(bench) = argument("bench") {
        benchmark(&bench)?;
        say(format_args!("done"));
        return Ok(());
    }
    std::thread::spawn(|| {
        loop {
            say(format_args!("alive"));
            std::thread::sleep(ALIVE);
        }
    });
    // the whole boot is the kernel's own work, and takes two seconds on an emulator that nothing disturbs
    let slowness = (process::boot_ns() as f64 / 1e9 / QUIET_BOOT_S * MARGIN).to_string();
    let left_out = fs::read_to_string(LEFT_OUT).unwrap_or_default();
    for test in executables()? {
        let name = test.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if left_out.lines().any(|line| line == name) {
            continue;
        }
        say(format_args!("begin {name}"));
        let begin = Instant::now();
        let filter = argument("filter");
        let chosen: Vec<&str> = filter.iter().map(String::as_str).collect();
        let (mut ended, failed) = run_tests(&test, &slowness, &chosen)?;
        // An emulated CPU may stand still for longer than a test waits. Once more, and the host tells of it.
        if ended.code() == Some(FAILED) && (1..=MOST_AGAIN).contains(&failed.len()) {
            let failed: Vec<&str> = failed.iter().map(String::as_str).collect();
            say(format_args!("again {name} {}", failed.join(" ")));
            (ended, _) = run_tests(&test, &slowness, &[&["--exact"], failed.as_slice()].concat())?;
        } else if ended.signal().is_some() {
            say(format_args!("again {name}"));
            (ended, _) = run_tests(&test, &slowness, &chosen)?;
        }
        say(format_args!("end {name} after {} s: {}", begin.elapsed().as_secs(), how(ended)));
    }
    doctor()?;
    say(format_args!("done"));
    Ok(())
}

/// What libtest ends with when tests failed, which it has told of.
const FAILED: i32 = 101;

/// Runs a test executable: how it ended, and the tests that failed. What it prints goes on to the console.
fn run_tests(test: &Path, slowness: &str, arguments: &[&str]) -> anyhow::Result<(ExitStatus, BTreeSet<String>)> {
    let mut command = Command::new(test);
    command.arg("--test-threads=1").args(arguments);
    command.envs([("MEMTRACE_BIN", MEMTRACE), ("TMPDIR", "/tmp")]);
    command.envs([
        ("MEMTRACE_TESTS_VM", "1"),
        ("MEMTRACE_TESTS_OUT", OUT),
        (SLOWNESS, slowness),
        ("MEMTRACE_TESTS_ROUNDS", ROUNDS),
        ("RUST_BACKTRACE", "0"),
    ]);
    let mut child = start(command.stdout(Stdio::piped()))?;
    let stdout = child.stdout.take().context("a test has no stdout")?;
    // Whoever a test left behind may hold the pipe open: it is read until it closes, which is when they are killed.
    let reader = std::thread::spawn(move || {
        let mut failed = BTreeSet::new();
        for line in BufReader::new(stdout).split(b'\n').map_while(Result::ok) {
            let line = String::from_utf8_lossy(&line);
            if let Some(test) = line.strip_prefix("---- ").and_then(|rest| rest.strip_suffix(" stdout ----")) {
                failed.insert(test.to_owned());
            }
            // Nobody is left to tell that the console is gone.
            let _ = writeln!(std::io::stdout().lock(), "{line}");
        }
        failed
    });
    let ended = child.wait().context("failed to wait for a program")?;
    kill_the_rest();
    let failed = reader.join().unwrap_or_default();
    Ok((ended, failed))
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
    let ended = run(&mut command)?;
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

/// Starts a program that is, unlike the runner, as any other process to the OOM killer.
fn start(command: &mut Command) -> anyhow::Result<Child> {
    let child = command.stdin(Stdio::null()).process_group(0).spawn().context("failed to start a program")?;
    let _ = fs::write(format!("/proc/{}/oom_score_adj", child.id()), "0");
    Ok(child)
}

/// Waits for its end; leaves no process behind.
fn run(command: &mut Command) -> anyhow::Result<ExitStatus> {
    let ended = start(command)?.wait().context("failed to wait for a program")?;
    kill_the_rest();
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

fn how(ended: ExitStatus) -> String {
    match (ended.code(), ended.signal()) {
        (Some(0), _) => "passed".to_owned(),
        (Some(FAILED), _) => "failed".to_owned(),
        (_, Some(signal)) => format!("died of signal {signal}"),
        (code, _) => format!("exit code {code:?}"),
    }
}

/// What doctor says of this kernel, and what the verifier said meanwhile.
fn doctor() -> anyhow::Result<()> {
    let (path, log) = (Path::new(OUT).join("doctor.json"), Path::new(OUT).join("verifier.log"));
    let file = fs::File::create(&path).with_context(|| format!("failed to create {}", path.display()))?;
    let mut command = Command::new(MEMTRACE);
    command.args(["doctor", "--json"]).stdout(file);
    command.env("LD_PRELOAD", VERIFIER_LOG).env("MEMTRACE_VERIFIER_LOG", log);
    let ended = run(&mut command).context("failed to run doctor")?;
    if !ended.success() {
        say(format_args!("trouble doctor: {}", how(ended)));
    }
    Ok(())
}
