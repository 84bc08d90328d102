//! A trial: an agent of the test's own, and the incidents it records.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, ensure};
use serde_json::Value;
use tempfile::TempDir;

use crate::actor::Actor;
use crate::agent::{Agent, AgentOptions, json_of};
use crate::cage::Cage;
use crate::deadline::Deadline;
use crate::{growth, json, process, programs};

/// How long incidents may take to appear.
const WAIT_LIMIT: Duration = Duration::from_secs(90);
/// Answers of the agent after which it has taken in what happened before the first of them.
const TURNS: usize = 5;
/// Most kills until one has stacks.
const KILLS: usize = 5;
/// How long a stack worker may take to be started.
const WORKER_LIMIT: Duration = Duration::from_secs(60);
/// Polling interval.
const LOOK: Duration = Duration::from_millis(100);
/// Time in which a surplus incident would appear.
const SETTLE: Duration = Duration::from_millis(700);

/// An agent with directories of its own.
#[derive(Debug)]
pub struct Trial {
    /// The agent.
    pub agent: Agent,
    dir: TempDir,
}

impl Trial {
    /// Starts an agent with short windows and further arguments.
    pub fn begin(arguments: &[&str]) -> anyhow::Result<Self> {
        Self::begin_with(|options| options.with(arguments))
    }

    /// The same in a memory cgroup of its own.
    pub fn begin_inside(cage: &Cage, arguments: &[&str]) -> anyhow::Result<Self> {
        Self::begin_with(|options| options.with(arguments).inside(cage))
    }

    /// The same with these capabilities at most.
    pub fn begin_with_capabilities(mask: u64, arguments: &[&str]) -> anyhow::Result<Self> {
        Self::begin_with(|options| options.with(arguments).with_capabilities(mask))
    }

    fn begin_with(more: impl FnOnce(AgentOptions) -> AgentOptions) -> anyhow::Result<Self> {
        programs::require_root()?;
        let dir = tempfile::tempdir().context("failed to make a directory for the agent")?;
        let agent = more(AgentOptions::below(dir.path()).with(&["--after", "300ms"])).start()?;
        Ok(Self { agent, dir })
    }

    /// Starts a workload that takes `--gate` and lets it go on when the agent has had time to read
    /// its mappings, which it does with the first stack of a process. So whether the rest has
    /// stacks does not depend on how soon the agent gets a CPU then.
    pub fn start_known(&self, cage: &Cage, arguments: &[&str]) -> anyhow::Result<Actor> {
        self.start_known_from(cage.command(programs::path("workload")?)?, arguments)
    }

    /// Like [`Trial::start_known`], with a command that becomes `workload`.
    pub fn start_known_from(&self, command: Command, arguments: &[&str]) -> anyhow::Result<Actor> {
        let gated: Vec<&str> = arguments.iter().copied().chain(["--gate"]).collect();
        let mut actor = Actor::from_command(command, &gated)?;
        actor.until("gated")?;
        // The agent answers between two turns of its loop, and empties its rings in each.
        for _ in 0..TURNS {
            self.agent.metric("memtrace_stacks_total")?;
            std::thread::sleep(LOOK);
        }
        Ok(actor)
    }

    /// The incident of a kill of `program`, a `workload`, once one `has_stacks`. A host under load can
    /// lose the stacks of a kill, which is told elsewhere: then another one is killed, five in all.
    pub fn kill_with_stacks(
        &self,
        program: &Path,
        has_stacks: impl Fn(&Value) -> anyhow::Result<bool>,
    ) -> anyhow::Result<Value> {
        for _ in 0..KILLS {
            let cage = Cage::new("stacks", 64 << 20)?;
            let burst = ["burst", "--mib", "256", "--touch", "--threads", "2"];
            self.start_known_from(cage.command(program)?, &burst)?.finish()?.was_killed()?;
            let incident = self.kills(&[&cage], 1)?.pop().context("no incident")?;
            cage.remove()?;
            if has_stacks(&incident)? {
                return Ok(incident);
            }
        }
        anyhow::bail!("none of {KILLS} kills has a stack; the agent said:\n{}", self.agent.stderr())
    }

    /// A kill of `workload` is recorded, and has stacks of the program.
    pub fn kills_have_stacks(&self) -> anyhow::Result<()> {
        let is_unwound = |(path, _): &(&Value, u64)| growth::user_frames(path).count() > 0;
        let has_stacks = |incident: &Value| Ok(growth::touching(incident)?.iter().any(is_unwound));
        self.kill_with_stacks(&programs::path("workload")?, has_stacks).map(drop)
    }

    /// How the agent was started.
    pub fn options(&self) -> &AgentOptions {
        self.agent.options()
    }

    /// Directory of everything the agent writes; removed with the trial.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Full incidents about these cgroups. Waits for `count` of them and a moment longer; fails on
    /// any other number.
    pub fn incidents(&self, cages: &[&Cage], count: usize) -> anyhow::Result<Vec<Value>> {
        self.incidents_that(|_| true, cages, count)
    }

    /// The same of OOM kills: where the CPUs are slow, there may be near misses and spikes before them.
    pub fn kills(&self, cages: &[&Cage], count: usize) -> anyhow::Result<Vec<Value>> {
        self.incidents_of("oom_kill", cages, count)
    }

    /// The same of incidents of one kind.
    pub fn incidents_of(&self, kind: &str, cages: &[&Cage], count: usize) -> anyhow::Result<Vec<Value>> {
        self.incidents_that(|incident| json::text(incident, "/kind").is_ok_and(|of| of == kind), cages, count)
    }

    fn incidents_that(
        &self,
        wanted: impl Fn(&Value) -> bool,
        cages: &[&Cage],
        count: usize,
    ) -> anyhow::Result<Vec<Value>> {
        let ours = |incident: &&Value| {
            let id = incident.pointer("/cgroup/id").and_then(Value::as_u64);
            wanted(incident) && cages.iter().any(|cage| Some(cage.id()) == id)
        };
        self.wait_for(WAIT_LIMIT, |listed| listed.iter().filter(ours).count() >= count)?;
        std::thread::sleep(SETTLE);
        let listed = self.options().incidents()?;
        let found: Vec<&Value> = listed.iter().filter(ours).collect();
        if found.len() != count {
            let told: Vec<String> = listed.iter().map(brief).collect();
            anyhow::bail!(
                "{} incidents instead of {count}; all there are:\n{}\nthe agent said:\n{}",
                found.len(),
                told.join("\n"),
                self.agent.stderr()
            );
        }
        let whole = |id: &str| self.agent.get_json(&format!("/api/incidents/{id}"));
        found.into_iter().map(|incident| whole(json::text(incident, "/id")?)).collect()
    }

    /// Waits until the incidents that the agent lists over HTTP satisfy `enough`, or the time is
    /// up. Lists only after the agent has saved one, because listing reads every incident.
    pub fn wait_for(&self, limit: Duration, enough: impl Fn(&[Value]) -> bool) -> anyhow::Result<()> {
        let deadline = Deadline::after(limit);
        let mut seen = None;
        loop {
            let saved = self.agent.metric("memtrace_incidents_saved_total")?;
            if saved != seen {
                let listed = self.agent.get_json("/api/incidents?limit=1000")?;
                if enough(listed.as_array().context("/api/incidents is not an array")?) {
                    return Ok(());
                }
                seen = saved;
            }
            if deadline.has_passed() {
                return Ok(());
            }
            std::thread::sleep(LOOK);
        }
    }

    /// The one incident about a cgroup.
    pub fn incident(&self, cage: &Cage) -> anyhow::Result<Value> {
        self.incidents(&[cage], 1)?.pop().context("no incident")
    }

    /// Output of `memtrace incidents --sigkills --json`: who sent each SIGKILL, newest first.
    pub fn sigkills(&self) -> anyhow::Result<Vec<Value>> {
        let mut command = programs::memtrace_command()?;
        command.args(["incidents", "--sigkills", "--json", "--state-dir"]).arg(&self.options().state_dir);
        json_of(command)?.as_array().cloned().context("memtrace incidents --sigkills --json is not an array")
    }

    /// Process id of the stack worker, once one runs.
    pub fn running_worker(&self) -> anyhow::Result<u32> {
        let deadline = Deadline::after(WORKER_LIMIT);
        loop {
            if let Some(pid) = self.stack_worker()? {
                return Ok(pid);
            }
            ensure!(!deadline.has_passed(), "no stack worker runs; the agent said:\n{}", self.agent.stderr());
            std::thread::sleep(LOOK);
        }
    }

    /// Process id of the stack worker; `None` while none runs.
    pub fn stack_worker(&self) -> anyhow::Result<Option<u32>> {
        let children = process::children(self.agent.pid())?;
        let is_worker = |pid: &u32| {
            std::fs::read_to_string(format!("/proc/{pid}/cmdline")).is_ok_and(|words| words.contains("stack-worker"))
        };
        Ok(children.into_iter().find(is_worker))
    }

    /// Stops the agent; fails unless it exits successfully.
    pub fn end(mut self) -> anyhow::Result<()> {
        let status = self.agent.stop()?;
        ensure!(status.code() == Some(0), "the agent ended with {status}; it said:\n{}", self.agent.stderr());
        Ok(())
    }
}

/// An incident as one line, for messages.
fn brief(incident: &Value) -> String {
    let at = |pointer: &str| incident.pointer(pointer).cloned().unwrap_or_default();
    let victims = incident.pointer("/oom/victims").and_then(Value::as_array).cloned().unwrap_or_default();
    let victims: Vec<String> =
        victims.iter().map(|v| format!("{} {} killed {}", v["comm"], v["pid"], v["killed"])).collect();
    format!("{} {} scope {} in {} victims {victims:?}", at("/id"), at("/kind"), at("/oom/scope"), at("/cgroup/path"))
}
