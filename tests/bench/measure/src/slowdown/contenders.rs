//! The tracers: how each is started, whether it runs here, what it takes, how it ends.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use memtrace_tests::agent::{Agent, AgentOptions};
use memtrace_tests::process;
use rustix::process::Signal;

use crate::usage;

/// Time a tracer gets to attach.
const SETTLE: Duration = Duration::from_millis(1500);
/// One that cannot run here gives up in this time.
const GIVE_UP: Duration = Duration::from_secs(4);
/// One that has much to write at its end.
const END_LIMIT: Duration = Duration::from_secs(60);

/// A tracer, and why it does not run here if it does not.
#[derive(Debug)]
pub(super) struct Contender {
    name: &'static str,
    how: How,
    refusal: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum How {
    Nothing,
    /// The agent, with these arguments.
    Memtrace(&'static [&'static str]),
    Program(&'static [&'static str]),
}

/// Programs of others that stand for the rest where it has to be quick: a probe takes seconds.
const QUICK: [&str; 2] = ["bpftrace, page faults by name (every one)", "perf record -e page-faults -g -a"];

/// What one took in a round.
#[derive(Clone, Copy, Debug)]
pub(super) struct Usage {
    /// CPU, seconds.
    pub(super) cpu_s: f64,
    /// Since its start, seconds.
    pub(super) running_s: f64,
    /// Peak of its resident memory, bytes.
    pub(super) peak_bytes: u64,
}

/// All of them, in the order of the rows; a few when it has to be quick.
pub(super) fn all(quick: bool) -> Vec<Contender> {
    let programs: [(&str, &[&str]); 8] = [
        ("memleak (bcc)", &["memleak-bpfcc", "5"]),
        (
            "bpftrace, page faults by name (tracepoint)",
            &["bpftrace", "-e", "tracepoint:exceptions:page_fault_user { @[comm] = count(); }"],
        ),
        (
            "bpftrace, page faults by name (every one)",
            &["bpftrace", "-e", "software:page-faults:1 { @[comm] = count(); }"],
        ),
        (
            "bpftrace, stacks of page faults (1 in 100)",
            &["bpftrace", "-e", "software:page-faults:100 { @[ustack, comm] = count(); }"],
        ),
        (
            "bpftrace, stacks of page faults (every one)",
            &["bpftrace", "-e", "software:page-faults:1 { @[ustack, comm] = count(); }"],
        ),
        ("perf record -e page-faults -g -a", &["perf", "record", "-e", "page-faults", "-g", "-a", "-o", "-"]),
        (
            "perf record -e page-faults -c 1 -g -a",
            &["perf", "record", "-e", "page-faults", "-c", "1", "-g", "-a", "-o", "-"],
        ),
        ("perf trace -F all -a", &["perf", "trace", "-F", "all", "-a", "-o", "/dev/null"]),
    ];
    let mut all = vec![
        Contender { name: "nothing", how: How::Nothing, refusal: None },
        Contender { name: "memtrace agent", how: How::Memtrace(&[]), refusal: None },
        Contender { name: "memtrace agent --without map", how: How::Memtrace(&["--without", "map"]), refusal: None },
    ];
    let programs = programs.into_iter().filter(|(name, _)| !quick || QUICK.contains(name));
    all.extend(programs.map(|(name, words)| Contender { name, how: How::Program(words), refusal: None }));
    all
}

impl Contender {
    /// As a row is called.
    pub(super) fn name(&self) -> &'static str {
        self.name
    }

    /// Whether it is ours, at its defaults.
    pub(super) fn is_memtrace(&self) -> bool {
        self.how == How::Memtrace(&[])
    }

    /// How often a round has it.
    pub(super) fn turns(&self, quick: bool) -> usize {
        match (&self.how, &self.refusal) {
            (_, Some(_)) => 0,
            (How::Nothing | How::Memtrace([]), None) if !quick => 2,
            (_, None) => 1,
        }
    }

    /// Why it does not run here.
    pub(super) fn refusal(&self) -> Option<&str> {
        self.refusal.as_deref()
    }

    /// It does not, or no longer; what it did before counts no more.
    pub(super) fn refuse(&mut self, why: String) {
        self.refusal = Some(why);
    }

    /// Starts it once, to see whether it runs here at all.
    pub(super) fn probe(&mut self, dir: &Path) -> anyhow::Result<()> {
        let How::Program(words) = self.how else { return Ok(()) };
        let mut tried = Tracer::start(words, dir, true)?;
        let begin = Instant::now();
        while begin.elapsed() < GIVE_UP {
            if tried.child.try_wait().context("failed to look at a tracer")?.is_some() {
                self.refusal = Some(format!("does not run here: {}", tried.complaint()));
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        if let Err(error) = tried.stop() {
            self.refusal = Some(format!("{error:#}"));
        }
        Ok(())
    }

    /// Starts it and lets it attach.
    pub(super) fn start(&self, dir: &Path) -> anyhow::Result<Running> {
        let begin = Instant::now();
        let what = match self.how {
            How::Nothing => Kind::Nothing,
            How::Memtrace(arguments) => Kind::Agent(AgentOptions::below(dir).with(arguments).start()?),
            How::Program(words) => {
                let tracer = Tracer::start(words, dir, false)?;
                std::thread::sleep(SETTLE);
                Kind::Tracer(tracer)
            }
        };
        Ok(Running { what, begin })
    }
}

/// A tracer that was started; killed when dropped.
pub(super) struct Running {
    what: Kind,
    begin: Instant,
}

enum Kind {
    Nothing,
    Agent(Agent),
    Tracer(Tracer),
}

impl Running {
    /// What it took so far; `None` of nothing.
    pub(super) fn usage(&self) -> anyhow::Result<Option<Usage>> {
        let pid = match &self.what {
            Kind::Nothing => return Ok(None),
            Kind::Agent(agent) => agent.pid(),
            Kind::Tracer(tracer) => tracer.child.id(),
        };
        Ok(Some(Usage {
            cpu_s: usage::cpu_seconds(pid)?,
            running_s: self.begin.elapsed().as_secs_f64(),
            peak_bytes: usage::status_bytes(pid, "VmHWM")?,
        }))
    }

    /// Ends it; an error says that it did not run to the end, or did not end.
    pub(super) fn stop(&mut self) -> anyhow::Result<()> {
        match &mut self.what {
            Kind::Nothing => Ok(()),
            Kind::Agent(agent) => agent.stop().map(drop),
            Kind::Tracer(tracer) => tracer.stop(),
        }
    }
}

/// A program that traces until it is interrupted; killed when dropped.
struct Tracer {
    child: Child,
    said: PathBuf,
}

impl Tracer {
    /// What it traces goes nowhere, unless all that it says is wanted; what it complains of goes to a file.
    fn start(words: &[&str], dir: &Path, all: bool) -> anyhow::Result<Self> {
        let (program, arguments) = words.split_first().context("a tracer without a name")?;
        let said = dir.join("said");
        let file = File::create(&said).with_context(|| format!("failed to create {}", said.display()))?;
        let mut command = Command::new(program);
        let out = if all { file.try_clone().context("failed to share a file")?.into() } else { Stdio::null() };
        command.args(arguments).current_dir(dir).stdin(Stdio::null()).stdout(out).stderr(file);
        let child = command.spawn().with_context(|| format!("failed to start {program}"))?;
        Ok(Self { child, said })
    }

    fn stop(&mut self) -> anyhow::Result<()> {
        if let Some(status) = self.child.try_wait().context("failed to look at a tracer")? {
            bail!("ended by itself with {status}: {}", self.complaint());
        }
        process::signal(self.child.id(), Signal::INT)?;
        process::wait_at_most(&mut self.child, END_LIMIT).map(drop)
    }

    fn complaint(&self) -> String {
        complaint(&String::from_utf8_lossy(&std::fs::read(&self.said).unwrap_or_default()))
    }
}

impl Drop for Tracer {
    fn drop(&mut self) {
        // Already ended is fine.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The line that says what is wrong: the first that sounds like it, else the last.
fn complaint(said: &str) -> String {
    let sounds =
        |line: &&str| ["ERROR: tr", "Unable", "not found", "Failed", "failed"].iter().any(|word| line.contains(word));
    let lines = || said.lines().map(str::trim).filter(|line| !line.is_empty());
    let line = lines().filter(|line| !line.contains("modprobe")).find(sounds).or_else(|| lines().next_back());
    line.unwrap_or("it said nothing").chars().take(200).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wrong_is_in_one_line() {
        let bpftrace =
            "stdin:1:1-38: ERROR: tracepoint not found: exceptions:page_fault_user\ntracepoint:... { }\n~~~~~\n";
        assert_eq!(complaint(bpftrace), "stdin:1:1-38: ERROR: tracepoint not found: exceptions:page_fault_user");
        let bcc = "modprobe: FATAL: Module kheaders not found\nUnable to find kernel headers. Try\nException: Failed\n";
        assert_eq!(complaint(bcc), "Unable to find kernel headers. Try");
        assert_eq!(complaint("a\n\nb\n"), "b");
        assert_eq!(complaint(""), "it said nothing");
    }

    #[test]
    fn who_does_not_run_has_no_turn() {
        let mut contender = Contender { name: "x", how: How::Memtrace(&[]), refusal: None };
        assert_eq!((contender.turns(false), contender.turns(true)), (2, 1));
        contender.refuse("y".to_owned());
        assert_eq!(contender.turns(false), 0);
    }

    #[test]
    fn who_stands_for_the_rest_is_one_of_them() {
        let names: Vec<&str> = all(true).iter().map(Contender::name).collect();
        assert!(QUICK.iter().all(|name| names.contains(name)), "{names:?}");
    }
}
