//! The runner: runs the test executables one after another, then `memtrace doctor`; or one
//! benchmark.

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

/// The agent under test. The programs of the tests are in the same directory.
const MEMTRACE: &str = "/memtrace/memtrace";
/// Directory of the test executables.
const TESTS: &str = "/memtrace/tests";
/// The benchmark program.
const BENCH: &str = "/memtrace/bench";
/// Library that, preloaded into doctor, logs how many instructions the verifier processed for each
/// program.
const VERIFIER_LOG: &str = "/memtrace/verifier_log.so";
/// Directory shared with the host.
const OUT: &str = "/tmp/out";
/// Written by the host: names of executables to leave out, one a line.
const LEFT_OUT: &str = "/tmp/out/left-out";
/// Prefix of tests that harm the machine and therefore run last.
const HARMFUL: &str = "vm_";
/// Most failed tests of an executable that are run once more. If more fail, the cause is not the
/// machine.
const MOST_AGAIN: usize = 3;
/// Rounds of tests that repeat themselves; fewer than on real hardware, because everything takes
/// many times longer here.
const ROUNDS: &str = "3";
/// Time to boot on an emulator that has a host CPU to itself, seconds.
const QUIET_BOOT_S: f64 = 2.0;
/// Factor by which a machine may become slower than it was at boot, as others start beside it.
const MARGIN: f64 = 4.0;
/// Interval of the heartbeat to the host.
const ALIVE: Duration = Duration::from_secs(5);

/// Runs the tests or the benchmark. There are no time limits here: the host gives up a machine that
/// makes no progress.
pub(crate) fn everything() -> anyhow::Result<()> {
    prepare::enter_tests()?;
    // a test may exhaust memory, and the runner must survive to report that
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
    // booting is all kernel work, so its duration measures the emulator's speed
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
        // An emulated CPU may stand still for longer than a test waits: run it once more. The host
        // reports both.
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

/// Exit code of libtest when tests failed.
const FAILED: i32 = 101;

/// Runs a test executable and copies its output to the console. Returns its exit status and the
/// failed tests.
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
    // A process that a test left behind may hold the pipe open: it closes when that process is
    // killed below.
    let reader = std::thread::spawn(move || {
        let mut failed = BTreeSet::new();
        for line in BufReader::new(stdout).split(b'\n').map_while(Result::ok) {
            let line = String::from_utf8_lossy(&line);
            if let Some(test) = line.strip_prefix("---- ").and_then(|rest| rest.strip_suffix(" stdout ----")) {
                failed.insert(test.to_owned());
            }
            // A closed console cannot be reported anywhere.
            let _ = writeln!(std::io::stdout().lock(), "{line}");
        }
        failed
    });
    let ended = child.wait().context("failed to wait for a program")?;
    kill_the_rest();
    let failed = reader.join().unwrap_or_default();
    Ok((ended, failed))
}

/// Runs a benchmark with comma-separated arguments; its output goes to the shared directory.
fn benchmark(arguments: &str) -> anyhow::Result<()> {
    let path = Path::new(OUT).join("bench.json");
    let file = fs::File::create(&path).with_context(|| format!("failed to create {}", path.display()))?;
    say(format_args!("begin bench"));
    let mut command = Command::new(BENCH);
    command.args(arguments.split(',')).env("MEMTRACE_BIN", MEMTRACE).env("TMPDIR", "/tmp").stdout(file);
    // the kernel starts process 1 without PATH
    command.env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
    let begin = Instant::now();
    let ended = run(&mut command)?;
    say(format_args!("end bench after {} s: {}", begin.elapsed().as_secs(), how(ended)));
    Ok(())
}

/// Value of `memtrace.NAME=` on the kernel command line.
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

/// Starts a program with the default OOM score, unlike the runner's.
fn start(command: &mut Command) -> anyhow::Result<Child> {
    let child = command.stdin(Stdio::null()).process_group(0).spawn().context("failed to start a program")?;
    let _ = fs::write(format!("/proc/{}/oom_score_adj", child.id()), "0");
    Ok(child)
}

/// Waits for its end, then kills every process it left behind.
fn run(command: &mut Command) -> anyhow::Result<ExitStatus> {
    let ended = start(command)?.wait().context("failed to wait for a program")?;
    kill_the_rest();
    Ok(ended)
}

/// Kills all other processes, so that the next executable starts on an idle machine.
fn kill_the_rest() {
    let numbered = |entry: fs::DirEntry| entry.file_name().to_string_lossy().parse::<i32>().ok();
    let pids = fs::read_dir("/proc").into_iter().flatten().filter_map(Result::ok).filter_map(numbered);
    for pid in pids.filter(|pid| *pid != 1 && u32::try_from(*pid) != Ok(std::process::id())) {
        // kernel threads have no executable and take no signal
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

/// Runs `memtrace doctor` and saves its output and the verifier's log for the host.
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
