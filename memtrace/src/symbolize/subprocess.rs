//! Naming frames in a process of its own.
//!
//! Debug information is large, comes with the traced programs, and blazesym maps it into memory: a
//! file that is truncated while it is read raises SIGBUS, and a crafted one can take any amount of
//! memory or time. None of that must happen to the agent, nor to who asks for a report. So memtrace
//! starts itself again with the hidden verb `name-frames`. That child opens the files that may have
//! the names, gives up its privileges and the ability to open any file ([`super::confine`]), and
//! only then reads them. It has limits on memory and CPU time and is the OOM killer's first choice.
//! It writes a line for each module as soon as it has the names, so a bad file costs its own names
//! only: the parent starts another child with the modules after it.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::process::CommandExt;
use std::process::{ChildStdout, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::Context;
use tracing::debug;

use super::frame_names::{FrameNames, ModuleName, OffsetNames, UnnamedFrames};
use super::job::{NameSources, NamingJob};
use super::{confine, debug_files, symbolizer};

/// The verb that runs [`child`].
const VERB: &str = "name-frames";
/// Time that all children of one call may take together.
const MAX_TIME: Duration = Duration::from_secs(60);
/// The part of that time which a child may take for one module, and to open all files before the
/// first: so that one which does not answer leaves time for others.
const QUIET_PART: u32 = 3;
/// Most modules of one child: it holds a few descriptors for each, of the 1024 that a process has.
pub const MODULES_PER_CHILD: usize = 64;
/// Most children of one call that fail, each at some module.
const MAX_FAILURES: usize = 8;
/// Largest job, in bytes.
const MAX_JOB_BYTES: u64 = 128 << 20;
/// Bytes of all answers of one call; names that come after it are left out.
const MAX_ANSWER_BYTES: u64 = 64 << 20;

/// Finds names in a child: this program again, with arguments that run [`child`]. Blocks for up to
/// a minute. What has no name, or gets none in time, is left out.
pub fn find(sources: &NameSources, unnamed: &UnnamedFrames) -> FrameNames {
    let child = || {
        let mut command = Command::new("/proc/self/exe");
        // Nor does it need what the environment says, which may be a secret.
        command.arg0("memtrace").arg(VERB).env_clear();
        command
    };
    find_by(sources, unnamed, MAX_TIME, child)
}

fn find_by(
    sources: &NameSources,
    unnamed: &UnnamedFrames,
    time: Duration,
    mut command: impl FnMut() -> Command,
) -> FrameNames {
    let Some(until) = Instant::now().checked_add(time) else { return FrameNames::default() };
    let deadline = Deadline { until, quiet: time.checked_div(QUIET_PART).unwrap_or(time) };
    let mut answers = FrameNames::default();
    let mut left = unnamed.clone();
    let (mut failures, mut bytes_left, mut batch): (usize, u64, usize) = (0, MAX_ANSWER_BYTES, MODULES_PER_CHILD);
    // Ends: each turn but one takes a module from those that are left.
    while !left.0.is_empty() && failures < MAX_FAILURES && bytes_left > 0 && Instant::now() < until {
        let job = sources.job(&left, batch);
        let (reported, end) = match run(&mut command(), &job, deadline, &mut bytes_left, &mut answers) {
            Ok(ended) => ended,
            Err(error) => {
                debug!("failed to name frames: {error:#}");
                break;
            }
        };
        if end == AnswerEnd::Quiet && reported == 0 && batch > 1 {
            // Some file cannot be opened in time, and all are opened first: find out which.
            batch = 1;
            continue;
        }
        // A child reports every module: it ended at the first one that it did not report.
        let failed = usize::from(end != AnswerEnd::Whole);
        failures = failures.saturating_add(failed);
        left.0.drain(..reported.saturating_add(failed).min(left.0.len()));
    }
    answers.0.retain(|(_, names)| !names.is_empty());
    answers
}

/// How long a child is waited for.
#[derive(Clone, Copy, Debug)]
struct Deadline {
    /// The end of the call.
    until: Instant,
    /// Time for one line.
    quiet: Duration,
}

/// Why no more lines were taken from a child.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum AnswerEnd {
    /// It has reported every module.
    Whole,
    /// It ended, or said something that makes no sense.
    Failed,
    /// It said nothing for too long.
    Quiet,
}

/// Runs one child and appends its answers. Returns the number of modules it reported, and why it
/// reported no more.
fn run(
    command: &mut Command,
    job: &NamingJob,
    deadline: Deadline,
    bytes_left: &mut u64,
    answers: &mut FrameNames,
) -> anyhow::Result<(usize, AnswerEnd)> {
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
    let reported = (|| {
        let mut input = child.stdin.take().context("no standard input")?;
        // A child that ends before it has read everything shows in what it reports.
        let _ = input.write_all(&serde_json::to_vec(job)?);
        drop(input);
        let lines = read_lines(child.stdout.take().context("no standard output")?, *bytes_left)?;
        Ok(receive(&lines, job, deadline, bytes_left, answers))
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

/// The lines of an answer, read by a thread that ends with the child. Cap: `most_bytes`.
fn read_lines(output: ChildStdout, most_bytes: u64) -> anyhow::Result<Receiver<Vec<u8>>> {
    let (sender, lines) = channel();
    std::thread::Builder::new().name("names".to_owned()).spawn(move || {
        for line in BufReader::new(output.take(most_bytes)).split(b'\n') {
            if line.map_or(true, |line| sender.send(line).is_err()) {
                break;
            }
        }
    })?;
    Ok(lines)
}

/// Takes a line for each module of a job, in its order. Returns how many there were: a line that is
/// anything else is where the child failed. It has read hostile files, so nothing it says is
/// trusted.
fn receive(
    lines: &Receiver<Vec<u8>>,
    job: &NamingJob,
    deadline: Deadline,
    bytes_left: &mut u64,
    answers: &mut FrameNames,
) -> (usize, AnswerEnd) {
    for (reported, (module, _)) in job.unnamed.0.iter().enumerate() {
        let time = deadline.until.saturating_duration_since(Instant::now()).min(deadline.quiet);
        let line = match lines.recv_timeout(time) {
            Ok(line) => line,
            Err(RecvTimeoutError::Disconnected) => return (reported, AnswerEnd::Failed),
            Err(RecvTimeoutError::Timeout) => return (reported, AnswerEnd::Quiet),
        };
        *bytes_left = bytes_left.saturating_sub(u64::try_from(line.len()).unwrap_or(u64::MAX).saturating_add(1));
        match serde_json::from_slice::<(ModuleName, Vec<OffsetNames>)>(&line) {
            Ok((name, names)) if name == *module && names.iter().all(symbolizer::is_plausible) => {
                answers.0.push((name, names));
            }
            _ => return (reported, AnswerEnd::Failed),
        }
    }
    (job.unnamed.0.len(), AnswerEnd::Whole)
}

/// The child: reads a job and writes a line of JSON for each module. Fails if either stream does,
/// or if it cannot give up its privileges.
pub fn child(input: impl Read, mut output: impl Write) -> anyhow::Result<()> {
    confine::limit();
    let job: NamingJob = serde_json::from_reader(input.take(MAX_JOB_BYTES)).context("failed to read what to name")?;
    if job.search {
        confine::only_read();
    }
    let modules = debug_files::open_all(job);
    // A panic in a parser is caught, and costs a name; its backtrace would be asked for by path.
    std::panic::set_hook(Box::new(|_| {}));
    confine::enter()?;
    symbolizer::find_each(modules, |module, names| {
        let line = serde_json::to_string(&(module, names))?;
        writeln!(output, "{line}").and_then(|()| output.flush()).context("failed to write names")
    })
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
        let answers = find_by(&NameSources::default(), &unnamed, MAX_TIME, || child("kill -BUS $$"));
        let name = || vec![(16, vec![FunctionName { symbol: "main".to_owned(), file: None, line: Some(7) }])];
        let named: Vec<&str> = answers.0.iter().map(|((module, _), _)| module.as_str()).collect();
        // The child that reported `/a` ended at `/bad`; the next one began with `/b`.
        assert_eq!(named, ["/a", "/b"]);
        assert!(answers.0.iter().all(|(_, names)| *names == name()));
    }

    #[test]
    fn a_file_that_cannot_be_opened_in_time_costs_its_own_names() {
        let unnamed = unnamed(&["/a", "/b", "/hangs", "/z"]);
        let script = r#"read -r job; case "$job" in *'"/hangs"'*) exec sleep 600;; esac
            module=${job#*'"unnamed":[[["'}; module=${module%%'"'*}
            echo "[[\"$module\",null],[[16,[{\"symbol\":\"main\",\"file\":null,\"line\":7}]]]]""#;
        let command = || {
            let mut command = Command::new("/bin/sh");
            command.args(["-c", script]);
            command
        };
        let answers = find_by(&NameSources::default(), &unnamed, Duration::from_secs(9), command);
        let named: Vec<&str> = answers.0.iter().map(|((module, _), _)| module.as_str()).collect();
        assert_eq!(named, ["/a", "/b", "/z"]);
    }

    #[test]
    fn an_answer_that_was_not_asked_for_is_not_taken() {
        let long = "x".repeat(5000);
        for line in [
            "nonsense".to_owned(),
            r#"[["/other",null],[[16,[{"symbol":"main","file":null,"line":7}]]]]"#.to_owned(),
            format!(r#"[["/a",null],[[16,[{{"symbol":"{long}","file":null,"line":7}}]]]]"#),
        ] {
            let command = || {
                let mut command = Command::new("/bin/sh");
                command.args(["-c", "read -r job; echo \"$0\"; exec sleep 600", &line]);
                command
            };
            let answers = find_by(&NameSources::default(), &unnamed(&["/a"]), MAX_TIME, command);
            assert_eq!(answers, FrameNames::default(), "{line}");
        }
    }

    #[test]
    fn a_child_that_does_not_end_is_not_waited_for() {
        let unnamed = unnamed(&["/bad"]);
        let answers = find_by(&NameSources::default(), &unnamed, Duration::from_millis(50), || child("exec sleep 600"));
        assert_eq!(answers, FrameNames::default());
        let nothing = find_by(&NameSources::default(), &unnamed, MAX_TIME, || Command::new("/none"));
        assert_eq!(nothing, FrameNames::default());
    }
}
