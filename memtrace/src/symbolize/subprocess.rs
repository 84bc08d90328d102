//! Naming frames in a process of its own.
//!
//! Debug information is large, comes with the traced programs, and blazesym maps it into memory: a
//! file that is truncated while it is read raises SIGBUS, and a crafted one can take any amount of
//! memory or time. None of that must happen to the agent. So the agent starts
//! itself again with the hidden verb `name-frames`. That child has limits on memory and CPU time
//! and is the OOM killer's first choice. It writes a line for each module as soon as it has the
//! names, so a bad file costs its own names only: the parent starts another child with the modules
//! after it.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::Context;
use memtrace_unwind::elf::ElfHeaders;
use memtrace_unwind::modules::OpenModule;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde::{Deserialize, Serialize};
use tracing::debug;

use super::frame_names::{FrameNames, ModuleName, OffsetNames, UnnamedFrames};
use super::symbolizer::Symbolizer;

/// The verb that runs [`child`].
const VERB: &str = "name-frames";
/// Time that all children of one call may take together.
const MAX_TIME: Duration = Duration::from_secs(60);
/// CPU time of a child, seconds.
const MAX_CPU_S: u64 = 40;
/// Private memory of a child (RLIMIT_DATA); mapped files do not count.
const MAX_PRIVATE_BYTES: u64 = 512 << 20;
/// Most children of one call: each but the last has failed at some module.
const MAX_CHILDREN: usize = 8;
/// Largest job, and largest answer, in bytes.
const MAX_MESSAGE_BYTES: u64 = 128 << 20;

/// What a child reads from standard input, as JSON.
#[derive(Debug, Serialize, Deserialize)]
struct Job {
    unnamed: UnnamedFrames,
    /// The modules that are held open, each with a path under which it can be opened.
    modules: Vec<(ModuleName, PathBuf)>,
    debug_dirs: Vec<PathBuf>,
    search: bool,
}

/// Finds names in a child: this program again, with arguments that run [`child`]. Blocks for up to
/// a minute. What has no name, or gets none in time, is left out.
pub fn find(symbolizer: &Symbolizer, unnamed: &UnnamedFrames) -> FrameNames {
    let child = || {
        let mut command = Command::new("/proc/self/exe");
        command.arg0("memtrace").arg(VERB);
        command
    };
    find_by(symbolizer, unnamed, MAX_TIME, child)
}

fn find_by(
    symbolizer: &Symbolizer,
    unnamed: &UnnamedFrames,
    time: Duration,
    mut command: impl FnMut() -> Command,
) -> FrameNames {
    let deadline = Instant::now().checked_add(time);
    let mut answers = FrameNames::default();
    let mut left = unnamed.clone();
    for _ in 0..MAX_CHILDREN {
        if left.0.is_empty() {
            break;
        }
        let reported = match run(&mut command(), symbolizer, &left, deadline, &mut answers) {
            Ok(reported) => reported,
            Err(error) => {
                debug!("failed to name frames: {error:#}");
                break;
            }
        };
        // A child reports every module: it ended at the first one that it did not report.
        let bad = reported.min(left.0.len());
        left.0.drain(..bad.saturating_add(1).min(left.0.len()));
    }
    answers.0.retain(|(_, names)| !names.is_empty());
    answers
}

/// Runs one child and appends its answers. Returns the number of modules it reported.
fn run(
    command: &mut Command,
    symbolizer: &Symbolizer,
    unnamed: &UnnamedFrames,
    deadline: Option<Instant>,
    answers: &mut FrameNames,
) -> anyhow::Result<usize> {
    let job = Job {
        unnamed: unnamed.clone(),
        modules: symbolizer.open_paths(),
        debug_dirs: symbolizer.debug_dirs().to_vec(),
        search: symbolizer.searches(),
    };
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
    let reported = (|| {
        let mut input = child.stdin.take().context("no standard input")?;
        // A child that ends before it has read everything shows in what it reports.
        let _ = input.write_all(&serde_json::to_vec(&job)?);
        drop(input);
        receive(child.stdout.take().context("no standard output")?, deadline, answers)
    })();
    let _ = child.kill();
    // It may be unable to die, on a file system that does not answer: do not wait for that.
    for _ in 0..50 {
        if !matches!(child.try_wait(), Ok(None)) {
            break;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    reported
}

fn receive(output: ChildStdout, deadline: Option<Instant>, answers: &mut FrameNames) -> anyhow::Result<usize> {
    let (sender, lines) = channel();
    std::thread::Builder::new().name("names".to_owned()).spawn(move || {
        for line in BufReader::new(output.take(MAX_MESSAGE_BYTES)).split(b'\n') {
            if line.is_err() || sender.send(line).is_err() {
                break;
            }
        }
    })?;
    let mut reported: usize = 0;
    loop {
        let time = deadline.map_or(MAX_TIME, |deadline| deadline.saturating_duration_since(Instant::now()));
        match lines.recv_timeout(time) {
            Ok(line) => {
                answers.0.push(serde_json::from_slice::<(ModuleName, Vec<OffsetNames>)>(&line?)?);
                reported = reported.saturating_add(1);
            }
            Err(RecvTimeoutError::Disconnected) => return Ok(reported),
            Err(RecvTimeoutError::Timeout) => anyhow::bail!("no answer in time"),
        }
    }
}

/// The child: reads a job and writes a line of JSON for each module. Fails if either stream does.
pub fn child(input: impl Read, mut output: impl Write) -> anyhow::Result<()> {
    confine();
    let job: Job = serde_json::from_reader(input.take(MAX_MESSAGE_BYTES)).context("failed to read what to name")?;
    let open = |((path, build_id), open): &(ModuleName, PathBuf)| {
        let file = std::fs::File::open(open).ok()?;
        let headers = ElfHeaders::read(&file).ok()?;
        Some(OpenModule {
            path: Arc::from(path.as_str()),
            build_id: build_id.as_deref().map(Arc::from),
            headers: Arc::new(headers),
            file: Arc::new(file),
        })
    };
    let modules = job.modules.iter().filter_map(open).collect();
    let symbolizer = Symbolizer::new(modules, job.debug_dirs, job.search);
    symbolizer.find_each(&job.unnamed, |module, names| {
        let line = serde_json::to_string(&(module, names))?;
        writeln!(output, "{line}").and_then(|()| output.flush()).context("failed to write names")
    })
}

/// Best effort: the names are wanted even where a limit cannot be set.
fn confine() {
    let _ = std::fs::write("/proc/self/oom_score_adj", "1000");
    let _ = rustix::process::nice(10);
    for (resource, most) in [(Resource::Data, MAX_PRIVATE_BYTES), (Resource::Cpu, MAX_CPU_S), (Resource::Core, 0)] {
        let before = getrlimit(resource);
        let most = before.maximum.map_or(most, |maximum| maximum.min(most));
        let _ = setrlimit(resource, Rlimit { current: Some(most), maximum: Some(most) });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::symbolize::frame_names::FunctionName;

    fn unnamed(modules: &[&str]) -> UnnamedFrames {
        UnnamedFrames(modules.iter().map(|module| (((*module).to_owned(), None), [16].into())).collect())
    }

    /// A child that reports the first module unless that is `/bad`, and then ends as `end` says.
    fn child(end: &str) -> Command {
        let script = format!(
            r#"read -r job; case "$job" in *'"unnamed":[[["/bad"'*) {end};; esac
            module=${{job#*'"unnamed":[[["'}}; module=${{module%%'"'*}}
            echo "[[\"$module\",null],[[16,[{{\"symbol\":\"main\",\"file\":null,\"line\":7}}]]]]"; {end}"#
        );
        let mut command = Command::new("/bin/sh");
        command.args(["-c", &script]);
        command
    }

    #[test]
    fn one_bad_module_costs_its_own_names() {
        let unnamed = unnamed(&["/a", "/bad", "/b"]);
        let answers = find_by(&Symbolizer::default(), &unnamed, MAX_TIME, || child("kill -BUS $$"));
        let name = || vec![(16, vec![FunctionName { symbol: "main".to_owned(), file: None, line: Some(7) }])];
        let named: Vec<&str> = answers.0.iter().map(|((module, _), _)| module.as_str()).collect();
        // The child that reported `/a` ended at `/bad`; the next one began with `/b`.
        assert_eq!(named, ["/a", "/b"]);
        assert!(answers.0.iter().all(|(_, names)| *names == name()));
    }

    #[test]
    fn a_child_that_does_not_end_is_not_waited_for() {
        let unnamed = unnamed(&["/bad", "/b"]);
        let answers = find_by(&Symbolizer::default(), &unnamed, Duration::from_millis(50), || child("exec sleep 600"));
        assert_eq!(answers, FrameNames::default());
        let nothing = find_by(&Symbolizer::default(), &unnamed, MAX_TIME, || Command::new("/none"));
        assert_eq!(nothing, FrameNames::default());
    }
}
