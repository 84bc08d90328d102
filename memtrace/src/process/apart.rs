//! Naming frames in a process of its own.
//!
//! Debug information is large, comes from whoever runs on this machine, and blazesym maps it: a file cut off meanwhile
//! is a SIGBUS, a file made for it takes all memory or all time. None of that may happen to the agent. The child is the
//! first that the OOM killer takes, has bounded memory and time, and tells each module's names as soon as it has them,
//! so that one bad file costs its own names only.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::Context;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde::{Deserialize, Serialize};
use tracing::debug;

use super::elf::Headers;
use super::modules::OpenModule;
use super::symbolize::{Answers, ModuleName, Named, Questions, Symbolizer};

/// The verb that runs [`child`].
const VERB: &str = "name-frames";
/// How long all children of one call may take together.
const MAX_TIME: Duration = Duration::from_secs(60);
/// Processor time of a child, in seconds.
const MAX_CPU_S: u64 = 40;
/// Private memory of a child; mapped files are not in it.
const MAX_PRIVATE_BYTES: u64 = 512 << 20;
/// Children that may fail before the rest stays without names.
const MAX_FAILURES: usize = 8;
/// Bytes of what a child is told and tells.
const MAX_MESSAGE_BYTES: u64 = 128 << 20;

/// What a child is told.
#[derive(Debug, Serialize, Deserialize)]
struct Job {
    questions: Questions,
    /// Path and build id of each module that is held, and what opens it.
    modules: Vec<(ModuleName, PathBuf)>,
    debug_dirs: Vec<PathBuf>,
    search: bool,
}

/// Answers questions in processes of their own: this program again, told by its arguments to run [`child`]. Takes up to
/// a minute.
pub fn answer(symbolizer: &Symbolizer, questions: &Questions) -> Answers {
    let child = || {
        let mut command = Command::new("/proc/self/exe");
        command.arg0("memtrace").arg(VERB);
        command
    };
    answer_by(symbolizer, questions, MAX_TIME, child)
}

fn answer_by(
    symbolizer: &Symbolizer,
    questions: &Questions,
    time: Duration,
    mut command: impl FnMut() -> Command,
) -> Answers {
    let deadline = Instant::now().checked_add(time);
    let mut answers = Answers::default();
    let mut left = questions.clone();
    for _ in 0..MAX_FAILURES {
        if left.0.is_empty() {
            break;
        }
        let told = match run(&mut command(), symbolizer, &left, deadline, &mut answers) {
            Ok(told) => told,
            Err(error) => {
                debug!("failed to name frames: {error:#}");
                break;
            }
        };
        // A child tells of every module. The first it did not tell of is the one it ended at.
        let bad = told.min(left.0.len());
        left.0.drain(..bad.saturating_add(1).min(left.0.len()));
    }
    answers.0.retain(|(_, names)| !names.is_empty());
    answers
}

/// How many modules the child told of.
fn run(
    command: &mut Command,
    symbolizer: &Symbolizer,
    questions: &Questions,
    deadline: Option<Instant>,
    answers: &mut Answers,
) -> anyhow::Result<usize> {
    let job = Job {
        questions: questions.clone(),
        modules: symbolizer.held(),
        debug_dirs: symbolizer.debug_dirs().to_vec(),
        search: symbolizer.searches(),
    };
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
    let told = (|| {
        let mut input = child.stdin.take().context("no standard input")?;
        // One that ended before it has read it all is seen by what it tells.
        let _ = input.write_all(&serde_json::to_vec(&job)?);
        drop(input);
        receive(child.stdout.take().context("no standard output")?, deadline, answers)
    })();
    let _ = child.kill();
    // Not waited for when it cannot die: a file system that does not answer.
    for _ in 0..50 {
        if !matches!(child.try_wait(), Ok(None)) {
            break;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    told
}

fn receive(output: ChildStdout, deadline: Option<Instant>, answers: &mut Answers) -> anyhow::Result<usize> {
    let (sender, lines) = channel();
    std::thread::Builder::new().name("names".to_owned()).spawn(move || {
        for line in BufReader::new(output.take(MAX_MESSAGE_BYTES)).split(b'\n') {
            if line.is_err() || sender.send(line).is_err() {
                break;
            }
        }
    })?;
    let mut told: usize = 0;
    loop {
        let time = deadline.map_or(MAX_TIME, |deadline| deadline.saturating_duration_since(Instant::now()));
        match lines.recv_timeout(time) {
            Ok(line) => {
                answers.0.push(serde_json::from_slice::<(ModuleName, Vec<Named>)>(&line?)?);
                told = told.saturating_add(1);
            }
            Err(RecvTimeoutError::Disconnected) => return Ok(told),
            Err(RecvTimeoutError::Timeout) => anyhow::bail!("no answer in time"),
        }
    }
}

/// What the child does: reads a job, writes a line for each module.
pub fn child(input: impl Read, mut output: impl Write) -> anyhow::Result<()> {
    confine();
    let job: Job = serde_json::from_reader(input.take(MAX_MESSAGE_BYTES)).context("failed to read what to name")?;
    let open = |((path, build_id), open): &(ModuleName, PathBuf)| {
        let file = std::fs::File::open(open).ok()?;
        let headers = Headers::read(&file).ok()?;
        Some(OpenModule {
            path: Arc::from(path.as_str()),
            build_id: build_id.as_deref().map(Arc::from),
            headers: Arc::new(headers),
            file: Arc::new(file),
        })
    };
    let modules = job.modules.iter().filter_map(open).collect();
    let symbolizer = Symbolizer::new(modules, job.debug_dirs, job.search);
    symbolizer.answer_each(&job.questions, |module, names| {
        let line = serde_json::to_string(&(module, names))?;
        writeln!(output, "{line}").and_then(|()| output.flush()).context("failed to write names")
    })
}

/// Limits that do not hold are no reason not to go on.
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
    use crate::process::symbolize::Name;

    fn questions(modules: &[&str]) -> Questions {
        Questions(modules.iter().map(|module| (((*module).to_owned(), None), [16].into())).collect())
    }

    /// A child that tells of the first module unless that is `/bad`, and then ends as told.
    fn child(end: &str) -> Command {
        let script = format!(
            r#"read -r job; case "$job" in *'"questions":[[["/bad"'*) {end};; esac
            module=${{job#*'"questions":[[["'}}; module=${{module%%'"'*}}
            echo "[[\"$module\",null],[[16,[{{\"symbol\":\"main\",\"file\":null,\"line\":7}}]]]]"; {end}"#
        );
        let mut command = Command::new("/bin/sh");
        command.args(["-c", &script]);
        command
    }

    #[test]
    fn one_bad_module_costs_its_own_names() {
        let asked = questions(&["/a", "/bad", "/b"]);
        let answers = answer_by(&Symbolizer::default(), &asked, MAX_TIME, || child("kill -BUS $$"));
        let name = || vec![(16, vec![Name { symbol: "main".to_owned(), file: None, line: Some(7) }])];
        let named: Vec<&str> = answers.0.iter().map(|((module, _), _)| module.as_str()).collect();
        // The child that told of `/a` ended at `/bad`; the next one began with `/b`.
        assert_eq!(named, ["/a", "/b"]);
        assert!(answers.0.iter().all(|(_, names)| *names == name()));
    }

    #[test]
    fn a_child_that_does_not_end_is_not_waited_for() {
        let asked = questions(&["/bad", "/b"]);
        let answers = answer_by(&Symbolizer::default(), &asked, Duration::from_millis(50), || child("exec sleep 600"));
        assert_eq!(answers, Answers::default());
        let nothing = answer_by(&Symbolizer::default(), &asked, MAX_TIME, || Command::new("/none"));
        assert_eq!(nothing, Answers::default());
    }
}
