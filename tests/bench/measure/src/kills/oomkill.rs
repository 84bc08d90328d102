//! Debian's two `oomkill` tools: starts them, and reads what they saw or why they did not run.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context;
use memtrace_tests::process;
use rustix::process::Signal;

/// Programs and their packages.
pub(super) const PEERS: [(&str, &str); 2] = [("oomkill-bpfcc", "bpfcc-tools"), ("oomkill", "libbpf-tools")];

/// Time after which a tool that still runs is assumed to trace: one compiles its program first.
const START: Duration = Duration::from_secs(10);
/// How long one may take to end.
const END: Duration = Duration::from_secs(20);

/// The running tools, in the order of [`PEERS`]; killed when dropped.
pub(super) struct Peers(Vec<Result<Running, String>>);

struct Running {
    child: Child,
    /// Output goes to a file: nobody reads along, and a full pipe would block it.
    printed: File,
}

impl Drop for Running {
    fn drop(&mut self) {
        // an error means that it has ended already
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Peers {
    /// Starts both, and waits until each traces or has ended.
    pub(super) fn start() -> Self {
        let start = |(program, _): &(&str, &str)| Running::start(program).map_err(|error| format!("{error:#}"));
        let mut peers = Self(PEERS.iter().map(start).collect());
        let begin = Instant::now();
        while begin.elapsed() < START && peers.0.iter().any(Result::is_ok) {
            std::thread::sleep(Duration::from_millis(100));
            for peer in &mut peers.0 {
                if let Some(why) = peer.as_mut().ok().and_then(Running::ended) {
                    *peer = Err(why);
                }
            }
        }
        peers
    }

    /// Stops them. Returns what each printed, or why it did not run.
    pub(super) fn finish(self) -> Vec<Result<String, String>> {
        let printed = |peer: Result<Running, String>| peer?.finish().map_err(|error| format!("{error:#}"));
        self.0.into_iter().map(printed).collect()
    }
}

impl Running {
    fn start(program: &str) -> anyhow::Result<Self> {
        let printed = tempfile::tempfile().context("failed to make a file")?;
        let stdout = printed.try_clone().context("failed to share a file")?;
        let mut command = Command::new(program);
        command.stdin(Stdio::null()).stdout(stdout).stderr(Stdio::piped());
        let child = command.spawn().context("failed to start it")?;
        Ok(Self { child, printed })
    }

    /// Why it has ended, if it has: the first and the last line of its output.
    fn ended(&mut self) -> Option<String> {
        let status = self.child.try_wait().ok()??;
        let mut said = String::new();
        // an unreadable file has no lines to show
        let _ = self.child.stderr.take().map(|mut stderr| stderr.read_to_string(&mut said));
        let mut lines = said.lines().map(str::trim).filter(|line| !line.is_empty());
        let (first, last) = (lines.next(), lines.next_back());
        let words: Vec<&str> = [first, last].into_iter().flatten().collect();
        Some(format!("ended with {status}: {}", words.join(" .. ")))
    }

    fn finish(mut self) -> anyhow::Result<String> {
        process::signal(self.child.id(), Signal::INT)?;
        process::wait_at_most(&mut self.child, END)?;
        self.printed.seek(SeekFrom::Start(0)).context("failed to rewind what it printed")?;
        let mut printed = String::new();
        self.printed.read_to_string(&mut printed).context("failed to read what it printed")?;
        Ok(printed)
    }
}
