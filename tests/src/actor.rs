//! A running workload: started, listened to and waited for.

use std::io::{BufRead, BufReader, Lines, Write};
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, ensure};
use serde_json::Value;

use crate::cage::Cage;
use crate::{json, process, programs};

/// How long a workload may take to end.
const END_LIMIT: Duration = Duration::from_secs(180);

/// A running workload; killed when dropped.
#[derive(Debug)]
pub struct Actor {
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
    said: Vec<Value>,
}

/// A workload that has ended, and what it printed.
#[derive(Debug)]
pub struct EndedWorkload {
    /// Process id of the program that was started.
    pub pid: u32,
    /// Exit status.
    pub status: ExitStatus,
    /// All events that it and its children printed.
    pub said: Vec<Value>,
}

impl Actor {
    /// Starts `workload` with these arguments, in `cage` or in the test's own cgroup.
    pub fn start(cage: Option<&Cage>, arguments: &[&str]) -> anyhow::Result<Self> {
        let workload = programs::path("workload")?;
        let command = match cage {
            Some(cage) => cage.command(workload)?,
            None => Command::new(workload),
        };
        Self::from_command(command, arguments)
    }

    /// Like [`Actor::start`], with a command that becomes `workload`.
    pub fn from_command(mut command: Command, arguments: &[&str]) -> anyhow::Result<Self> {
        command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = command.spawn().with_context(|| format!("failed to start {command:?}"))?;
        let stdout = child.stdout.take().context("a workload has no stdout")?;
        Ok(Self { child, lines: BufReader::new(stdout).lines(), said: Vec::new() })
    }

    /// Process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Reads until it prints this event.
    pub fn until(&mut self, event: &str) -> anyhow::Result<&Value> {
        while self.hear()? {
            if self.said.last().is_some_and(|said| said.get("event").is_some_and(|name| name == event)) {
                return self.said.last().context("it said nothing");
            }
        }
        anyhow::bail!("the workload ended before it said {event}; it said {:?}", self.said)
    }

    /// Continues a gated workload: writes a line to its stdin.
    pub fn tell(&mut self) -> anyhow::Result<()> {
        let stdin = self.child.stdin.as_mut().context("its stdin is closed")?;
        stdin.write_all(b"\n").context("failed to write to a workload")
    }

    /// Closes its stdin, reads the rest of its output and waits for its end.
    pub fn finish(mut self) -> anyhow::Result<EndedWorkload> {
        drop(self.child.stdin.take());
        while self.hear()? {}
        let status = process::wait_at_most(&mut self.child, END_LIMIT)?;
        Ok(EndedWorkload { pid: self.child.id(), status, said: std::mem::take(&mut self.said) })
    }

    fn hear(&mut self) -> anyhow::Result<bool> {
        let Some(line) = self.lines.next() else { return Ok(false) };
        let line = line.context("failed to listen to a workload")?;
        let said = serde_json::from_str(&line).with_context(|| format!("a workload said {line}"))?;
        self.said.push(said);
        Ok(true)
    }
}

impl Drop for Actor {
    fn drop(&mut self) {
        // an error means that it has ended already
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl EndedWorkload {
    /// Events of this name, oldest first.
    pub fn all(&self, event: &str) -> impl Iterator<Item = &Value> {
        self.said.iter().filter(move |said| said.get("event").is_some_and(|name| name == event))
    }

    /// First event of this name; fails if there is none.
    pub fn one(&self, event: &str) -> anyhow::Result<&Value> {
        self.all(event).next().with_context(|| format!("the workload never said {event} but {:?}", self.said))
    }

    /// Pid of the child that this event names.
    pub fn child(&self, event: &str) -> anyhow::Result<u32> {
        u32::try_from(json::number(self.one(event)?, "/child")?).context("not a process id")
    }

    /// It ended by itself, with 0.
    pub fn succeeded(&self) -> anyhow::Result<()> {
        ensure!(self.status.success(), "the workload ended with {}", self.status);
        Ok(())
    }

    /// Fails unless it was killed by SIGKILL.
    pub fn was_killed(&self) -> anyhow::Result<()> {
        let code = process::shell_code(self.status);
        ensure!(code == 137, "the workload ended with {}, not by SIGKILL; it said {:?}", self.status, self.said);
        Ok(())
    }
}
