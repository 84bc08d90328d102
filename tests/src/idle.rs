//! Workloads that hold memory and do nothing, and what the agent reports about them.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use serde_json::Value;

use crate::agent::Agent;
use crate::deadline::Deadline;
use crate::process::{self, ProcRss};
use crate::{json, programs};

/// Time after `ready` until counters have settled.
const SETTLE_TIME: Duration = Duration::from_millis(500);

/// How long the agent may take to list a process.
const KNOWN_LIMIT: Duration = Duration::from_secs(20);

/// A workload that has printed `ready` and does not change until its stdin closes.
#[derive(Debug)]
pub struct IdleWorkload {
    child: Child,
    /// Kept open until the end: the workload prints once more then.
    stdout: BufReader<ChildStdout>,
    processes: Vec<(u32, u64)>,
}

impl IdleWorkload {
    /// Starts `workload` with these arguments and waits until it is ready and its counters have settled.
    pub fn start(arguments: &[&str]) -> anyhow::Result<Self> {
        let mut command = Command::new(programs::path("workload")?);
        command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().context("failed to start the workload")?;
        let (pid, mut stdout) = (child.id(), BufReader::new(child.stdout.take().context("no stdout")?));
        let mut processes = Vec::new();
        for line in stdout.by_ref().lines() {
            let event: Value = serde_json::from_str(&line?)?;
            let speaker = u32::try_from(json::number(&event, "/pid")?)?;
            let what = json::text(&event, "/event")?;
            if what == "start" {
                processes.push((speaker, json::number(&event, "/start_ticks")?));
            }
            if what == "ready" && speaker == pid {
                std::thread::sleep(SETTLE_TIME);
                return Ok(Self { child, stdout, processes });
            }
        }
        bail!("{arguments:?} was never ready")
    }

    /// Pid and start time (clock ticks since boot) of each of its processes.
    pub fn processes(&self) -> &[(u32, u64)] {
        &self.processes
    }

    /// Closes its stdin; fails unless it exits successfully within `limit`.
    pub fn end(mut self, limit: Duration) -> anyhow::Result<()> {
        drop(self.child.stdin.take());
        std::io::copy(&mut self.stdout, &mut std::io::sink())?;
        let status = process::wait_at_most(&mut self.child, limit)?;
        ensure!(status.success(), "the workload ended with {status}");
        Ok(())
    }
}

/// Resident memory of a process as the agent's API reports it; waits until the agent lists the process.
pub fn recorded(agent: &Agent, pid: u32, start_ticks: u64) -> anyhow::Result<ProcRss> {
    let deadline = Deadline::after(KNOWN_LIMIT);
    loop {
        let answer = agent.get_json(&format!("/api/processes?pid={pid}"))?;
        let known = json::list(&answer, "")?.iter().find(|process| {
            let start = process.get("start_boot_ns").and_then(Value::as_u64).map(process::ticks_of_ns);
            process.get("pid").and_then(Value::as_u64) == Some(u64::from(pid)) && start == Some(start_ticks)
        });
        if let Some(known) = known {
            return Ok(ProcRss {
                anon: json::number(known, "/anon_bytes")?,
                file: json::number(known, "/file_bytes")?,
                shmem: json::number(known, "/shmem_bytes")?,
            });
        }
        ensure!(!deadline.has_passed(), "the agent does not know process {pid}: {answer}");
        std::thread::sleep(Duration::from_millis(100));
    }
}
