//! `cargo xtask demo`: a real OOM kill in a memory cgroup of its own, recorded and explained.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use memtrace_harness::built::Built;
use memtrace_harness::checkout::{Checkout, Profile, has_btf, is_root};
use memtrace_harness::run::{output, say, shown};
use memtrace_harness::{build, setup};

/// Limit of the demo's cgroup, and how much the workload asks for.
const LIMIT: &str = "120M";
const WANT_MIB: &str = "200";

const READY_WITHIN: Duration = Duration::from_secs(30);
const INCIDENT_WITHIN: Duration = Duration::from_secs(60);
const NAMES_WITHIN: Duration = Duration::from_secs(20);
const STOP_WITHIN: Duration = Duration::from_secs(15);

/// Arguments of `cargo xtask demo`.
#[derive(clap::Args)]
pub(crate) struct Args {}

/// Runs the verb.
pub(crate) fn run(checkout: &Checkout, _args: &Args) -> Result<()> {
    if !is_root() {
        bail!(
            "the demo loads eBPF programs and makes a cgroup, so it needs root: sudo -E env PATH=$PATH cargo xtask demo"
        );
    }
    if !has_btf() {
        bail!("this kernel publishes no BTF at /sys/kernel/btf/vmlinux, so memtrace cannot run here");
    }
    setup::bpf(checkout)?;
    let object = build::ebpf(checkout)?;
    let built = Built::programs(checkout, Profile::Release, &object)?;
    let memtrace = built.program("memtrace")?;

    let state = Scratch::new()?;
    let mut agent = Agent::start(memtrace, &state)?;
    agent.wait_ready()?;
    kill_something(&built)?;
    let id = wait_for_incident(memtrace, &state, &mut agent)?;
    agent.wait_named(&id);

    say(format_args!("memtrace report {id}"));
    let mut report = Command::new(memtrace);
    report.args(["report", &id, "--state-dir"]).arg(&state.0);
    let text = output(&mut report)?;
    let _ = write!(std::io::stdout(), "\n{text}\n");
    agent.stop()
}

/// Runs the workload in the cgroup. It is meant to be killed, so its exit code proves nothing; the
/// incident does.
fn kill_something(built: &Built) -> Result<()> {
    let mut cage = Command::new(built.program("oomcage")?);
    cage.args(["--limit", LIMIT, "--"]).arg(built.program("workload")?).args(["burst", "--mib", WANT_MIB]);
    say(format_args!("{}: a program that wants {WANT_MIB} MiB under a limit of {LIMIT}", shown(&cage)));
    let status = cage.status().context("failed to start oomcage")?;
    say(format_args!("the program ended with {status}"));
    if status.success() {
        bail!("the program was not killed: is the limit of its cgroup enforced here (swap, nested limits)?");
    }
    if status.code() == Some(125) {
        bail!("oomcage could not make or enter its cgroup");
    }
    Ok(())
}

fn wait_for_incident(memtrace: &Path, state: &Scratch, agent: &mut Agent) -> Result<String> {
    say(format_args!("waiting for the incident to close"));
    let deadline = Instant::now() + INCIDENT_WITHIN;
    loop {
        let mut list = Command::new(memtrace);
        list.args(["incidents", "--json", "--state-dir"]).arg(&state.0);
        if let Some(id) = first_kill(&output(&mut list)?)? {
            return Ok(id);
        }
        if let Some(status) = agent.child.try_wait().context("failed to look after the agent")? {
            bail!("the agent ended with {status} before it saved an incident");
        }
        if Instant::now() > deadline {
            bail!("no incident within {} s of the kill", INCIDENT_WITHIN.as_secs());
        }
        std::thread::sleep(Duration::from_millis(250));
    }
}

/// Id of the first incident that has a victim, in the output of `memtrace incidents --json`.
fn first_kill(incidents: &str) -> Result<Option<String>> {
    let incidents: serde_json::Value =
        serde_json::from_str(incidents).context("`memtrace incidents --json` printed something else")?;
    let list = incidents.as_array().context("`memtrace incidents --json` is not an array")?;
    let killed = |incident: &&serde_json::Value| {
        incident.pointer("/oom/victims").and_then(|victims| victims.as_array()).is_some_and(|v| !v.is_empty())
    };
    Ok(list.iter().find(killed).and_then(|incident| incident.get("id")?.as_str()).map(str::to_owned))
}

/// A temporary state directory, removed on drop.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Result<Self> {
        let dir = std::env::temp_dir().join(format!("memtrace-demo-{}", std::process::id()));
        std::fs::create_dir(&dir).with_context(|| format!("failed to create {}", dir.display()))?;
        Ok(Self(dir))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.0) {
            say(format_args!("failed to remove {}: {error}", self.0.display()));
        }
    }
}

/// The agent that is demonstrated; killed on drop if it still runs.
struct Agent {
    child: Child,
    log: Receiver<String>,
}

impl Agent {
    fn start(memtrace: &Path, state: &Scratch) -> Result<Self> {
        let port =
            TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).context("failed to find a free port")?;
        let mut command = Command::new(memtrace);
        command.args(["agent", "--listen", &port.to_string(), "--state-dir"]).arg(&state.0);
        command.arg("--journal-dir").arg(state.0.join("journal")).args(["--socket", "off"]);
        command.stdin(Stdio::null()).env("NO_COLOR", "1");
        say(format_args!("starting {}", shown(&command)));
        let mut child = command.stderr(Stdio::piped()).spawn().context("failed to start the agent")?;
        let stderr = child.stderr.take().context("failed to take the agent's log")?;
        let (lines, log) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(std::result::Result::ok) {
                let _ = writeln!(std::io::stderr(), "agent: {line}");
                // the receiver is not read after `ready`; the log is still passed on to stderr
                let _ = lines.send(line);
            }
        });
        Ok(Self { child, log })
    }

    /// Waits until the functions of an incident have names or the agent says that there are none,
    /// at most 20 s. The report is shown either way.
    fn wait_named(&self, id: &str) {
        say(format_args!("waiting for the names of functions"));
        let deadline = Instant::now() + NAMES_WITHIN;
        while let Some(left) = deadline.checked_duration_since(Instant::now()) {
            match self.log.recv_timeout(left) {
                Ok(line) if line.contains(id) && (line.contains("named functions") || line.contains("no names")) => {
                    return;
                }
                Ok(_) => {}
                Err(_) => return,
            }
        }
    }

    fn wait_ready(&mut self) -> Result<()> {
        let deadline = Instant::now() + READY_WITHIN;
        loop {
            match self.log.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(line) if says_ready(&line) => return Ok(()),
                Ok(_) => {}
                Err(RecvTimeoutError::Timeout) => bail!("the agent was not ready within {} s", READY_WITHIN.as_secs()),
                Err(RecvTimeoutError::Disconnected) => {
                    let status = self.child.wait().context("failed to wait for the agent")?;
                    bail!("the agent ended with {status} before it was ready; `memtrace doctor` says what is missing");
                }
            }
        }
    }

    /// Stops the agent with SIGTERM, as an init system does.
    fn stop(mut self) -> Result<()> {
        say(format_args!("stopping the agent"));
        output(Command::new("kill").args(["-TERM", &self.child.id().to_string()]))?;
        let deadline = Instant::now() + STOP_WITHIN;
        while Instant::now() < deadline {
            if let Some(status) = self.child.try_wait().context("failed to wait for the agent")? {
                if !status.success() {
                    bail!("the agent ended with {status} when asked to stop");
                }
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        bail!("the agent did not stop within {} s of SIGTERM", STOP_WITHIN.as_secs())
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// Whether a log line contains the word `ready`, alone or after the logger's prefix.
fn says_ready(line: &str) -> bool {
    line.split(|c: char| !c.is_ascii_alphanumeric()).any(|word| word == "ready")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ready_is_a_word_of_its_own() {
        assert!(says_ready("ready"));
        assert!(says_ready("2025-01-01T00:00:00Z  INFO memtrace::agent: ready listen=127.0.0.1:9469"));
        assert!(!says_ready("INFO already running"));
    }

    #[test]
    fn an_incident_without_victims_is_waited_past() {
        assert_eq!(first_kill("[]").unwrap(), None);
        let list = r#"[{"id": "A", "oom": null}, {"id": "B", "oom": {"victims": [{"pid": 7}]}}]"#;
        assert_eq!(first_kill(list).unwrap().as_deref(), Some("B"));
        assert!(first_kill("no incidents").is_err());
    }
}
