//! Workloads that stand still, and what the agent knows of them then.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use serde_json::Value;

use crate::agent::Agent;
use crate::patience::Patience;
use crate::process::{self, Rss};
use crate::{json, programs};

/// A quiet moment is one a while after the last change.
const QUIET: Duration = Duration::from_millis(500);

/// How long the agent may take to know a process.
const KNOWN_LIMIT: Duration = Duration::from_secs(20);

/// A workload that said `ready` and stays as it is until its stdin closes.
#[derive(Debug)]
pub struct Quiet {
    child: Child,
    /// Open until the workload has ended: it speaks once more then.
    stdout: BufReader<ChildStdout>,
    processes: Vec<(u32, u64)>,
}

impl Quiet {
    /// Starts `workload` with these arguments and waits until it is quiet.
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
                std::thread::sleep(QUIET);
                return Ok(Self { child, stdout, processes });
            }
        }
        bail!("{arguments:?} was never ready")
    }

    /// Its processes: pid and start in clock ticks.
    pub fn processes(&self) -> &[(u32, u64)] {
        &self.processes
    }

    /// Lets it end, which it has to within `limit`.
    pub fn end(mut self, limit: Duration) -> anyhow::Result<()> {
        drop(self.child.stdin.take());
        std::io::copy(&mut self.stdout, &mut std::io::sink())?;
        let status = process::wait_at_most(&mut self.child, limit)?;
        ensure!(status.success(), "the workload ended with {status}");
        Ok(())
    }
}

/// What the agent knows about a process; waits a little for it to be there.
pub fn recorded(agent: &Agent, pid: u32, start_ticks: u64) -> anyhow::Result<Rss> {
    let patience = Patience::of(KNOWN_LIMIT);
    loop {
        let answer = agent.get_json(&format!("/api/processes?pid={pid}"))?;
        let known = json::list(&answer, "")?.iter().find(|process| {
            let start = process.get("start_boot_ns").and_then(Value::as_u64).map(process::ticks_of_ns);
            process.get("pid").and_then(Value::as_u64) == Some(u64::from(pid)) && start == Some(start_ticks)
        });
        if let Some(known) = known {
            return Ok(Rss {
                anon: json::number(known, "/anon_bytes")?,
                file: json::number(known, "/file_bytes")?,
                shmem: json::number(known, "/shmem_bytes")?,
            });
        }
        ensure!(!patience.is_over(), "the agent does not know process {pid}: {answer}");
        std::thread::sleep(Duration::from_millis(100));
    }
}
