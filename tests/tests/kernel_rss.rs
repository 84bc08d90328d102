//! At quiet moments the agent's view of a process equals /proc/PID/status: one thread, eight threads, a fork.

#![allow(clippy::indexing_slicing, reason = "a panic is how a test fails")]

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use memtrace_tests::agent::{Agent, Options};
use memtrace_tests::figures::say;
use memtrace_tests::json;
use memtrace_tests::process::{self, Rss};
use memtrace_tests::programs::{self, require_root};
use serde_json::Value;

const QUANTUM: u64 = 256 << 10;
/// A quiet moment is one a while after the last change.
const QUIET: Duration = Duration::from_millis(500);

/// A workload that said `ready` and stays as it is until its stdin closes.
struct Quiet {
    child: Child,
    /// Open until the workload has ended: it speaks once more then.
    stdout: BufReader<ChildStdout>,
    /// The processes: pid and start in clock ticks.
    processes: Vec<(u32, u64)>,
}

impl Quiet {
    fn start(arguments: &[&str]) -> anyhow::Result<Self> {
        let mut command = Command::new(programs::path("workload")?);
        command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().context("failed to start the workload")?;
        let (pid, mut stdout) = (child.id(), BufReader::new(child.stdout.take().context("no stdout")?));
        let mut processes = Vec::new();
        for line in stdout.by_ref().lines() {
            let event: Value = serde_json::from_str(&line?)?;
            let speaker = u32::try_from(json::number(&event, "/pid")?)?;
            if event["event"] == "start" {
                processes.push((speaker, json::number(&event, "/start_ticks")?));
            }
            if event["event"] == "ready" && speaker == pid {
                std::thread::sleep(QUIET);
                return Ok(Self { child, stdout, processes });
            }
        }
        anyhow::bail!("{arguments:?} was never ready")
    }

    fn end(mut self) -> anyhow::Result<()> {
        drop(self.child.stdin.take());
        std::io::copy(&mut self.stdout, &mut std::io::sink())?;
        let status = process::wait_at_most(&mut self.child, Duration::from_secs(10))?;
        ensure!(status.success(), "the workload ended with {status}");
        Ok(())
    }
}

/// What the agent knows about a process; waits a little for it to be there.
fn recorded(agent: &Agent, pid: u32, start_ticks: u64) -> anyhow::Result<Rss> {
    let begin = Instant::now();
    loop {
        let answer = agent.get_json(&format!("/api/processes?pid={pid}"))?;
        let known = json::list(&answer, "")?.iter().find(|process| {
            let start = process["start_boot_ns"].as_u64().map(process::ticks_of_ns);
            process["pid"] == pid && start == Some(start_ticks)
        });
        if let Some(known) = known {
            return Ok(Rss {
                anon: json::number(known, "/anon_bytes")?,
                file: json::number(known, "/file_bytes")?,
                shmem: json::number(known, "/shmem_bytes")?,
            });
        }
        ensure!(begin.elapsed() < Duration::from_secs(5), "the agent does not know process {pid}: {answer}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// Compares every process of the workload three times.
fn compare(agent: &Agent, name: &str, quiet: &Quiet) -> anyhow::Result<()> {
    for _ in 0..3 {
        for &(pid, start) in &quiet.processes {
            let said = recorded(agent, pid, start)?;
            let truth = Rss::read(pid)?;
            let off = said.total().abs_diff(truth.total());
            say(format_args!("{name:<10} pid {pid}: off by {off} B; recorded {said:?}, /proc {truth:?}"));
            ensure!(off <= QUANTUM, "{name}: off by {off} B; recorded {said:?}, /proc {truth:?}");
        }
        std::thread::sleep(Duration::from_millis(200));
    }
    Ok(())
}

#[test]
fn recorded_rss_equals_proc_at_quiet_moments() -> anyhow::Result<()> {
    require_root()?;
    let dir = tempfile::tempdir()?;
    let mut agent = Options::below(dir.path()).start()?;
    let hold = |threads: &'static str| {
        ["hold", "--anon-mib", "40", "--file-mib", "16", "--shmem-mib", "8", "--threads", threads]
    };
    for (name, arguments) in [
        ("1 thread", hold("1").as_slice()),
        ("8 threads", hold("8").as_slice()),
        ("forked", ["forked", "--mib", "24"].as_slice()),
    ] {
        let quiet = Quiet::start(arguments)?;
        ensure!(quiet.processes.len() == if name == "forked" { 2 } else { 1 }, "{name}: {:?}", quiet.processes);
        compare(&agent, name, &quiet).with_context(|| format!("the agent said:\n{}", agent.stderr()))?;
        quiet.end()?;
    }
    agent.stop()?;
    Ok(())
}
