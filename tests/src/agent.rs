//! Drives `memtrace agent` from outside: start, readiness, stop, kill, its lists and its HTTP API.

use std::ffi::OsStr;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use rustix::process::Signal;
use serde_json::Value;

use crate::cage::Cage;
use crate::deadline::Deadline;
use crate::{privileges, process, programs};

/// How long the agent may take to be ready. Loading the programs takes more than half a minute with
/// 64 emulated CPUs on two real ones.
const START_LIMIT: Duration = Duration::from_secs(120);
/// Metrics that are longer are made once in [`SHARED_FOR`] (docs/reference.md).
const SHARED_BYTES: usize = 128 << 10;
const SHARED_FOR: Duration = Duration::from_secs(1);
/// How long an answer over HTTP may take. Long enough for an emulated machine in a storm of kills.
const ANSWER_LIMIT: Duration = Duration::from_secs(60);
const STOP_LIMIT: Duration = Duration::from_secs(20);
/// How long a line of the log may take.
const LOG_LIMIT: Duration = Duration::from_secs(20);

/// Command-line options of an agent.
#[derive(Clone, Debug)]
pub struct AgentOptions {
    /// `--state-dir`.
    pub state_dir: PathBuf,
    /// `--journal-dir`.
    pub journal_dir: PathBuf,
    /// `--socket`.
    pub socket: PathBuf,
    /// The address in `--listen`.
    pub listen: Ipv4Addr,
    /// Further arguments.
    pub extra: Vec<String>,
    /// Directory of the memory cgroup that it runs in; `None`: that of the test.
    pub cgroup_dir: Option<PathBuf>,
    /// Mask of the capabilities that it may have; `None`: those of the test.
    pub capabilities: Option<u64>,
}

impl AgentOptions {
    /// State and journal directories below `dir`, and the socket.
    pub fn below(dir: &Path) -> Self {
        let (state_dir, journal_dir) = (dir.join("state"), dir.join("journal"));
        let (socket, listen) = (dir.join("socket"), Ipv4Addr::LOCALHOST);
        Self { state_dir, journal_dir, socket, listen, extra: Vec::new(), cgroup_dir: None, capabilities: None }
    }

    /// In a memory cgroup of its own.
    pub fn inside(mut self, cage: &Cage) -> Self {
        self.cgroup_dir = Some(cage.dir().to_owned());
        self
    }

    /// With these capabilities at most.
    pub fn with_capabilities(self, mask: u64) -> Self {
        Self { capabilities: Some(mask), ..self }
    }

    /// Adds arguments.
    pub fn with(mut self, arguments: &[&str]) -> Self {
        self.extra.extend(arguments.iter().map(|argument| (*argument).to_owned()));
        self
    }

    /// The command that starts the agent, listening on `port`.
    pub fn command(&self, port: u16) -> anyhow::Result<Command> {
        let mut command = match self.capabilities {
            Some(mask) => privileges::command(mask, programs::memtrace()?)?,
            None => programs::memtrace_command()?,
        };
        if let Some(dir) = &self.cgroup_dir {
            command.arg("exec-in").arg("--cgroup").arg(dir).arg("--").arg(programs::memtrace()?);
        }
        command.arg("agent").arg("--state-dir").arg(&self.state_dir).arg("--journal-dir").arg(&self.journal_dir);
        command.arg("--socket").arg(&self.socket).arg("--listen").arg(format!("{}:{port}", self.listen));
        command.args(&self.extra);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        Ok(command)
    }

    /// Starts the agent and waits until it reports that it is ready.
    pub fn start(&self) -> anyhow::Result<Agent> {
        let port = free_port()?;
        let mut child = self.command(port)?.spawn().context("failed to start the agent")?;
        let said = Arc::new(Mutex::new(Vec::new()));
        let stderr = child.stderr.take().context("the agent has no stderr")?;
        let listener = Arc::clone(&said);
        std::thread::spawn(move || {
            for line in BufReader::new(stderr).split(b'\n').map_while(Result::ok) {
                let (heard_ns, line) = (process::boot_ns(), String::from_utf8_lossy(&line).into_owned());
                listener.lock().unwrap_or_else(PoisonError::into_inner).push((heard_ns, line));
            }
        });
        let mut agent = Agent { child, said, port, options: self.clone() };
        let deadline = Deadline::after(START_LIMIT);
        while !agent.says("ready") {
            if let Some(status) = agent.child.try_wait().context("failed to look at the agent")? {
                std::thread::sleep(Duration::from_millis(100));
                bail!("the agent ended with {status} before it was ready; it said:\n{}", agent.stderr());
            }
            ensure!(
                !deadline.has_passed(),
                "the agent was not ready after {:?}; it said:\n{}",
                deadline.limit(),
                agent.stderr()
            );
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(agent)
    }

    /// Output of `memtrace incidents --json`: the incidents without timeline and allocation paths.
    pub fn incidents(&self) -> anyhow::Result<Vec<Value>> {
        let mut command = programs::memtrace_command()?;
        command.args(["incidents", "--json", "--state-dir"]).arg(&self.state_dir);
        let listed = json_of(command)?;
        listed.as_array().cloned().context("memtrace incidents --json is not an array")
    }

    /// Output of `memtrace report ID --format json`, byte for byte.
    pub fn report_bytes(&self, id: &str) -> anyhow::Result<Vec<u8>> {
        let mut command = programs::memtrace_command()?;
        command.args(["report", id, "--format", "json", "--state-dir"]).arg(&self.state_dir);
        Ok(successful(command)?.stdout)
    }

    /// The full incident.
    pub fn report(&self, id: &str) -> anyhow::Result<Value> {
        serde_json::from_slice(&self.report_bytes(id)?).with_context(|| format!("the report of {id} is not JSON"))
    }

    /// Lists incidents until `enough` holds or the time is up. Returns the last list in either
    /// case.
    pub fn incidents_when(&self, limit: Duration, enough: impl Fn(&[Value]) -> bool) -> anyhow::Result<Vec<Value>> {
        let deadline = Deadline::after(limit);
        loop {
            let listed = self.incidents()?;
            if enough(&listed) || deadline.has_passed() {
                return Ok(listed);
            }
            std::thread::sleep(Duration::from_millis(250));
        }
    }
}

/// A running agent; killed when dropped.
#[derive(Debug)]
pub struct Agent {
    child: Child,
    /// Lines of its stderr, and when they were read (boot clock, ns).
    said: Arc<Mutex<Vec<(u64, String)>>>,
    port: u16,
    options: AgentOptions,
}

impl Agent {
    /// Process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Port it listens on.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Options it was started with.
    pub fn options(&self) -> &AgentOptions {
        &self.options
    }

    /// Its stderr so far.
    pub fn stderr(&self) -> String {
        let said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        said.iter().map(|(_, line)| line.as_str()).collect::<Vec<_>>().join("\n")
    }

    /// Whether a line of its stderr contains `text`.
    pub fn says(&self, text: &str) -> bool {
        self.heard(&[text]).is_some()
    }

    /// Whether a line of its stderr contains `text`, now or soon: the agent's log is written beside what it does.
    pub fn comes_to_say(&self, text: &str) -> bool {
        let deadline = Deadline::after(LOG_LIMIT);
        while !self.says(text) && !deadline.has_passed() {
            std::thread::sleep(Duration::from_millis(10));
        }
        self.says(text)
    }

    /// When the first line that contains each of these was read (boot clock, ns).
    pub fn heard(&self, texts: &[&str]) -> Option<u64> {
        let said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        said.iter().find(|(_, line)| texts.iter().all(|text| line.contains(text))).map(|(heard_ns, _)| *heard_ns)
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> anyhow::Result<bool> {
        Ok(self.child.try_wait().context("failed to look at the agent")?.is_none())
    }

    /// Sends SIGTERM and waits for its end.
    pub fn stop(&mut self) -> anyhow::Result<ExitStatus> {
        process::signal(self.child.id(), Signal::TERM)?;
        let ended = process::wait_at_most(&mut self.child, STOP_LIMIT);
        ended.with_context(|| format!("the agent ignored SIGTERM; it said:\n{}", self.stderr()))
    }

    /// Sends SIGKILL and waits for its end.
    pub fn kill_9(&mut self) -> anyhow::Result<()> {
        self.child.kill().context("failed to kill the agent")?;
        self.child.wait().context("failed to wait for the agent")?;
        Ok(())
    }

    /// Kills it between two writes: SIGSTOP lets a write finish that SIGKILL could cut off at a
    /// page boundary.
    pub fn kill_9_at_rest(&mut self) -> anyhow::Result<()> {
        process::stop(self.child.id())?;
        self.kill_9()
    }

    /// HTTP GET: status and body.
    pub fn get(&self, path: &str) -> anyhow::Result<(u16, String)> {
        get(self.port, path)
    }

    /// HTTP GET of a JSON document. Fails unless the status is 200.
    pub fn get_json(&self, path: &str) -> anyhow::Result<Value> {
        let (status, body) = self.get(path)?;
        ensure!(status == 200, "GET {path} gave {status}: {body}");
        serde_json::from_str(&body).with_context(|| format!("GET {path} is not JSON: {body}"))
    }

    /// Sum of a metric over its label sets, not from before this call; `None` if it is missing.
    pub fn metric(&self, name: &str) -> anyhow::Result<Option<f64>> {
        let get = || -> anyhow::Result<String> {
            let (status, body) = self.get("/metrics")?;
            ensure!(status == 200, "GET /metrics gave {status}");
            Ok(body)
        };
        let mut body = get()?;
        // On a machine with hundreds of cgroups.
        if body.len() > SHARED_BYTES {
            std::thread::sleep(SHARED_FOR);
            body = get()?;
        }
        Ok(sum_metric(&body, name))
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        // an error means that it has ended already
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A port of the loopback address that is free at this moment.
pub fn free_port() -> anyhow::Result<u16> {
    let listener = TcpListener::bind("127.0.0.1:0").context("failed to find a free port")?;
    Ok(listener.local_addr().context("failed to find a free port")?.port())
}

/// HTTP/1.1 GET on the loopback address: status and body.
pub fn get(port: u16, path: &str) -> anyhow::Result<(u16, String)> {
    request(SocketAddr::from((Ipv4Addr::LOCALHOST, port)), path, "")
}

/// HTTP/1.1 GET with further headers, each with its line end: status and body.
pub fn request(address: SocketAddr, path: &str, headers: &str) -> anyhow::Result<(u16, String)> {
    let mut stream = TcpStream::connect(address).with_context(|| format!("failed to connect to {address}"))?;
    stream.set_read_timeout(Some(Deadline::after(ANSWER_LIMIT).limit())).context("failed to set a read timeout")?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: {address}\r\n{headers}Connection: close\r\n\r\n")
        .with_context(|| format!("failed to ask for {path}"))?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).with_context(|| format!("failed to read the answer to {path}"))?;
    parse_answer(&String::from_utf8_lossy(&answer)).with_context(|| format!("bad answer to GET {path}"))
}

/// Runs a command. Fails unless it succeeds.
pub fn successful(mut command: Command) -> anyhow::Result<Output> {
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("failed to run {command:?}"))?;
    // some programs report errors on stdout, `doctor` for one
    let said = if output.stderr.is_empty() { &output.stdout } else { &output.stderr };
    let said = String::from_utf8_lossy(said);
    ensure!(output.status.success(), "{command:?} ended with {}; it said:\n{said}", output.status);
    Ok(output)
}

/// Runs a command that must succeed and print JSON.
pub fn json_of(command: Command) -> anyhow::Result<Value> {
    let shown = format!("{command:?}");
    let output = successful(command)?;
    serde_json::from_slice(&output.stdout)
        .with_context(|| format!("{shown} did not print JSON but {}", String::from_utf8_lossy(&output.stdout)))
}

/// Runs a command under `memtrace record` as root. Returns the command's output and the recording
/// as JSON.
pub fn record<S: AsRef<OsStr>>(
    file: &Path,
    options: &[&str],
    command: &[S],
    env: &[(&str, &str)],
) -> anyhow::Result<(Output, Value)> {
    let mut record = programs::memtrace_command()?;
    record.env_remove("SUDO_UID").env_remove("SUDO_GID").env_remove("SUDO_USER").envs(env.iter().copied());
    record.arg("record").args(options).arg("-o").arg(file).arg("--").args(command);
    let output = record.stdin(Stdio::null()).output().context("failed to run memtrace record")?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(file.is_file(), "no recording after {}; it said:\n{said}", output.status);
    let mut report = programs::memtrace_command()?;
    report.arg("report").arg(file).args(["--format", "json"]);
    let incident = json_of(report)?;
    Ok((output, incident))
}

fn parse_answer(answer: &str) -> anyhow::Result<(u16, String)> {
    let (head, body) = answer.split_once("\r\n\r\n").context("no end of headers")?;
    let status = head.split(' ').nth(1).and_then(|code| code.parse().ok()).context("no status")?;
    let chunked = head.lines().any(|line| line.to_ascii_lowercase().starts_with("transfer-encoding: chunked"));
    if !chunked {
        return Ok((status, body.to_owned()));
    }
    let (mut whole, mut rest) = (String::new(), body);
    while let Some((length, after)) = rest.split_once("\r\n") {
        let length = usize::from_str_radix(length.trim(), 16).context("bad chunk length")?;
        whole.push_str(after.get(..length).context("chunk cut short")?);
        if length == 0 {
            break;
        }
        rest = after.get(length + 2..).context("chunk cut short")?;
    }
    Ok((status, whole))
}

fn sum_metric(text: &str, name: &str) -> Option<f64> {
    let values = text.lines().filter_map(|line| {
        let rest = line.strip_prefix(name)?;
        let value = match rest.strip_prefix('{') {
            Some(labelled) => labelled.split_once('}')?.1,
            None => rest.strip_prefix(' ')?,
        };
        value.split_ascii_whitespace().next()?.parse::<f64>().ok()
    });
    values.fold(None, |sum, value| Some(sum.unwrap_or(0.0) + value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_plain_and_chunked_answers() {
        let plain = parse_answer("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").unwrap();
        assert_eq!(plain, (200, "ok".to_owned()));
        let chunked = "HTTP/1.1 404 Not Found\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nno\r\n1\r\n!\r\n0\r\n\r\n";
        assert_eq!(parse_answer(chunked).unwrap(), (404, "no!".to_owned()));
        assert!(parse_answer("HTTP/1.1").is_err());
    }

    #[test]
    fn sums_a_metric_over_its_labels() {
        let text = "# TYPE a counter\na_total{x=\"1\"} 2\na_total{x=\"2\"} 3 # {id=\"q\"} 1\na_total_more 9\nb 1\n";
        assert_eq!(sum_metric(text, "a_total"), Some(5.0));
        assert_eq!(sum_metric(text, "b"), Some(1.0));
        assert_eq!(sum_metric(text, "c"), None);
    }
}
