//! The tracers that are compared: how each is started, whether it runs here, what it takes, how it
//! ends.

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
/// Time in which a tracer that cannot run here gives up.
const GIVE_UP: Duration = Duration::from_secs(4);
/// Time for one that writes much at its end.
const END_LIMIT: Duration = Duration::from_secs(60);

/// A tracer, and the reason if it does not run here.
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

/// Peers for a quick run: starting each of the others to see whether it runs takes seconds.
const QUICK: [&str; 2] = ["bpftrace, page faults by name (every one)", "perf record -e page-faults -g -a"];

/// Resources a tracer took in a round.
#[derive(Clone, Copy, Debug)]
pub(super) struct Usage {
    /// CPU time, seconds.
    pub(super) cpu_s: f64,
    /// Time since its start, seconds.
    pub(super) running_s: f64,
    /// Peak resident memory, bytes.
    pub(super) peak_bytes: u64,
}

/// All contenders in the order of the rows; a few for a quick run.
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
    /// Name of its row.
    pub(super) fn name(&self) -> &'static str {
        self.name
    }

    /// Whether it is our agent at defaults.
    pub(super) fn is_memtrace(&self) -> bool {
        self.how == How::Memtrace(&[])
    }

    /// Runs of it in each round.
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

    /// Marks it as not running here; earlier results no longer count.
    pub(super) fn refuse(&mut self, why: String) {
        self.refusal = Some(why);
    }

    /// Starts it once to find out whether it runs here.
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

    /// Starts it and waits until it is attached.
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

/// A started tracer; killed when dropped.
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
    /// Resources taken so far; `None` if nothing runs.
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

    /// Stops it. Fails if it did not run to the end or did not stop.
    pub(super) fn stop(&mut self) -> anyhow::Result<()> {
        match &mut self.what {
            Kind::Nothing => Ok(()),
            Kind::Agent(agent) => agent.stop().map(drop),
            Kind::Tracer(tracer) => tracer.stop(),
        }
    }
}

/// A program that traces until interrupted; killed when dropped.
struct Tracer {
    child: Child,
    said: PathBuf,
}

impl Tracer {
    /// Starts it. Its stdout is discarded unless wanted; its stderr goes to a file.
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
        // an error means that it has ended already
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The line that explains a failure: the first that looks like an error, else the last.
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
