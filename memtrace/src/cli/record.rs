//! `memtrace record`: traces one command, process or cgroup and reports where its memory went.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::io::{IsTerminal, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::Duration;

use anyhow::{Context, bail};
use memtrace_engine::input::Fact;
use memtrace_engine::output::Output;
use memtrace_incident::{Incident, Kind};
use memtrace_report::text;
use memtrace_unwind::modules::OpenModule;
use rustix::fs::Access;
use tokio::process::{Child, Command};
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::Instant;

use super::config::{Config, Flags, RECORD};
use super::invoker::Invoker;
use super::values::{Size, Span};
use super::{VerbResult, exec_in, terminal};
use crate::cgroup::hierarchy::{Hierarchy, shown};
use crate::cgroup::transient::TransientCgroup;
use crate::clock;
use crate::error::CommandError;
use crate::proc::proc_scan;
use crate::session::{Session, SessionConfig};
use crate::store::incidents;
use crate::symbolize::frame_names::{ModuleName, UnnamedFrames};
use crate::symbolize::job::NameSources;
use crate::symbolize::subprocess;

/// How long records of a process may arrive after it has ended, and how long a kill's incident records.
const LATE: Duration = Duration::from_millis(300);
/// How often the command's cgroup is emptied, at most, before it is removed: processes in it may fork meanwhile.
const FREE_ROUNDS: u32 = 8;

/// Arguments of `memtrace record`.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  sudo memtrace record -- ./target/release/server --port 8080
  sudo memtrace record --limit 256M -o run.memtrace -- python3 job.py
  sudo memtrace record --pid 4242 --for 30s
  sudo memtrace record --cgroup /system.slice/nginx.service

The command runs as the user who called sudo, in a memory cgroup of its own; its input and output
are left alone. The recording is written with the rights of that user, and a report is printed to
standard error at the end. The exit code is the command's, or 128 + signal when it was killed.
The recording is an incident file: `memtrace report FILE` shows it again, on any machine.")]
pub struct Args {
    /// Limit the memory of the command; it is OOM-killed when it needs more
    #[arg(long, value_name = "SIZE", requires = "command")]
    limit: Option<Size>,
    /// Write the recording to FILE [default: COMMAND-ID.memtrace in the current directory]
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Record a running process and its children instead of a command
    #[arg(long, value_name = "PID", conflicts_with_all = ["cgroup", "command"])]
    pid: Option<u32>,
    /// Record a memory cgroup and all below it instead of a command
    #[arg(long, value_name = "PATH", conflicts_with = "command")]
    cgroup: Option<PathBuf>,
    /// Stop a --pid or --cgroup recording after this time; otherwise Ctrl-C stops it
    #[arg(long = "for", value_name = "SPAN", conflicts_with = "command")]
    duration: Option<Span>,
    #[command(flatten)]
    settings: Flags<RECORD>,
    /// Print no report at the end
    #[arg(short, long)]
    quiet: bool,
    /// Command to run, and its arguments
    #[arg(last = true, value_name = "CMD")]
    command: Vec<OsString>,
}

/// Runs the verb.
pub fn run(args: &Args) -> VerbResult {
    if args.command.is_empty() && args.pid.is_none() && args.cgroup.is_none() {
        let what = "nothing to record: give a command after `--`, or --pid, or --cgroup".to_owned();
        return Err(CommandError::Usage(what).into());
    }
    // Before anything starts: when it is not clear who called sudo, nothing runs as root.
    let invoker = Invoker::find()?;
    if let Some(invoker) = &invoker {
        // So that a long run is not recorded for nothing. What counts is the write itself, with the same rights.
        let path = args.output.as_deref().unwrap_or(Path::new("."));
        invoker.run_as_user(|| writable(path))?.with_context(|| {
            format!("user {} cannot write to {}; choose another file with -o", invoker.uid(), path.display())
        })?;
    }
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().context("failed to start the runtime")?;
    let (files, code) = runtime.block_on(record(args))?;
    // The tracer and the command's cgroup are gone, and with the runtime whatever else might run.
    drop(runtime);
    write_and_report(args, invoker.as_ref(), &files)?;
    Ok(code)
}

/// How the recording ended.
#[derive(Default)]
struct CommandEnd {
    status: Option<ExitStatus>,
    /// When the command or the watch ended, boot clock.
    boot_ns: u64,
    cgroup_peak_bytes: Option<u64>,
}

/// Traces until the end: the incidents of the run and the exit code.
async fn record(args: &Args) -> anyhow::Result<(Vec<Incident>, u8)> {
    let config = SessionConfig {
        // One program may grow by gigabytes a second, and the ring lives no longer than the recording.
        stacks_ring_bytes: 32 << 20,
        sample_all: false,
        after_ns: Span(LATE).nanoseconds(),
        spikes: false,
        near_misses: false,
        journal: None,
        ..Config::load(None, &args.settings)?.parse()?.session
    };
    let mut session = Session::start(&config)?;
    session.keep_files();
    let mut files = Vec::new();
    let ending = if args.command.is_empty() {
        follow(args, &mut session, &mut files).await?
    } else {
        launch(args, &mut session, &mut files).await?
    };
    session.catch_up();
    session.feed(Fact::RecordingEnd {
        boot_ns: ending.boot_ns,
        exit_code: ending.status.and_then(|status| status.code()),
        signal: ending.status.and_then(|status| status.signal()),
        cgroup_peak_bytes: ending.cgroup_peak_bytes,
    });
    collect(session.stop(), &mut files);
    let wanted: BTreeSet<ModuleName> =
        files.iter().flat_map(|incident| UnnamedFrames::of(incident).0).map(|(module, _)| module).collect();
    let modules = session.modules(wanted.into_iter().collect());
    drop(session);
    if std::io::stderr().is_terminal() && !args.quiet {
        eprintln!("memtrace: finding the names of functions");
    }
    // As root: the files of what was recorded need not be readable to the user. Debug information is untrusted, so a
    // subprocess reads it.
    let modules = modules.into_iter().map(OpenModule::from).collect();
    let sources = NameSources::with_modules(modules, &[]);
    for incident in &mut files {
        subprocess::find(&sources, &UnnamedFrames::of(incident)).apply(incident);
    }
    Ok((files, ending.status.map_or(0, exit_code)))
}

/// Runs the command in a cgroup of its own until it ends.
async fn launch(args: &Args, session: &mut Session, files: &mut Vec<Incident>) -> anyhow::Result<CommandEnd> {
    let name = format!("memtrace-record-{}", std::process::id());
    let cage = session
        .hierarchy()
        .create_transient(&name, args.limit.map(|size| size.0))
        .context("failed to make a memory cgroup for the command")?;
    let found = cage.read(clock::boot_ns()).context("failed to read the command's memory cgroup")?;
    let id = found.id;
    session.sample(id);
    session.feed(Fact::Cgroup(found));
    session.feed(Fact::RecordingBegin {
        cgroup_id: Some(id),
        pid: None,
        command: args.command.iter().map(|word| word.to_string_lossy().into_owned()).collect(),
        boot_ns: clock::boot_ns(),
    });
    // The terminal sends Ctrl-C to the command too: whether to end is up to the command.
    let mut interrupt = signal(SignalKind::interrupt()).context("failed to listen for SIGINT")?;
    let mut terminate = signal(SignalKind::terminate()).context("failed to listen for SIGTERM")?;
    let mut child =
        Command::from(exec_in::command(cage.dir(), &args.command)?).spawn().context("failed to start the command")?;
    let status = loop {
        tokio::select! {
            outputs = session.step() => collect(outputs, files),
            status = child.wait() => break status.context("failed to wait for the command")?,
            _ = interrupt.recv() => {}
            _ = terminate.recv() => forward_terminate(&child),
        }
    };
    let boot_ns = clock::boot_ns();
    drain_late(session, files, LATE).await;
    let peak = cage.read(clock::boot_ns()).and_then(|found| found.peak_bytes);
    free(cage, session.hierarchy());
    Ok(CommandEnd { status: Some(status), boot_ns, cgroup_peak_bytes: peak })
}

/// Watches a running process or cgroup until it ends, the time is up or the user interrupts.
async fn follow(args: &Args, session: &mut Session, files: &mut Vec<Incident>) -> anyhow::Result<CommandEnd> {
    let (cgroup_id, pid) = match (&args.cgroup, args.pid) {
        (Some(path), _) => {
            let id = session.hierarchy().id_of(path);
            let id = id.with_context(|| {
                format!("--cgroup: there is no memory cgroup {}; /proc/PID/cgroup has the paths", shown(path))
            })?;
            (Some(id), None)
        }
        (None, Some(pid)) => {
            if start_ticks(session.hierarchy(), pid).is_none() {
                bail!("--pid: there is no process {pid}");
            }
            (None, Some(pid))
        }
        (None, None) => bail!("nothing to record"),
    };
    let start = pid.and_then(|pid| start_ticks(session.hierarchy(), pid));
    // Stacks are taken by cgroup: those of the process, and of its children, while they are in this one.
    let of_process = pid.and_then(|pid| session.hierarchy().id_of_process(pid));
    cgroup_id.into_iter().chain(of_process).for_each(|id| session.sample(id));
    session.feed(Fact::RecordingBegin { cgroup_id, pid, command: Vec::new(), boot_ns: clock::boot_ns() });
    let mut interrupt = signal(SignalKind::interrupt()).context("failed to listen for SIGINT")?;
    let mut terminate = signal(SignalKind::terminate()).context("failed to listen for SIGTERM")?;
    let end = args.duration.map(|span| Instant::now() + span.0);
    loop {
        tokio::select! {
            outputs = session.step() => collect(outputs, files),
            _ = interrupt.recv() => break,
            _ = terminate.recv() => break,
        }
        let gone = pid.is_some_and(|pid| start_ticks(session.hierarchy(), pid) != start);
        if gone || end.is_some_and(|end| Instant::now() >= end) {
            break;
        }
    }
    let boot_ns = clock::boot_ns();
    drain_late(session, files, LATE / 3).await;
    let peak = args.cgroup.as_ref().and_then(|path| session.hierarchy().read(path, clock::boot_ns())?.peak_bytes);
    Ok(CommandEnd { status: None, boot_ns, cgroup_peak_bytes: peak })
}

fn start_ticks(hierarchy: &Hierarchy, pid: u32) -> Option<u64> {
    let cgroup = hierarchy.id_of_process(pid).unwrap_or(0);
    proc_scan::read_process(pid, cgroup, clock::boot_ns()).map(|found| found.start_ticks)
}

/// Goes on for the records that arrive late; after a kill until its incident is closed.
async fn drain_late(session: &mut Session, files: &mut Vec<Incident>, time: Duration) {
    let end = Instant::now() + time / 3;
    let patience = Instant::now() + time + time;
    while Instant::now() < end || (session.engine().counts().open_incidents > 0 && Instant::now() < patience) {
        collect(session.step().await, files);
    }
}

fn collect(outputs: Vec<Output>, files: &mut Vec<Incident>) {
    files.extend(outputs.into_iter().filter_map(|output| match output {
        Output::Save(incident) => Some(*incident),
        _ => None,
    }));
}

fn forward_terminate(child: &Child) {
    let pid = child.id().and_then(|pid| i32::try_from(pid).ok()).and_then(rustix::process::Pid::from_raw);
    if let Some(pid) = pid {
        // It may have ended meanwhile.
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
    }
}

/// Removes the command's cgroup; processes that still run in it are moved to ours. A failure is printed and leaves
/// the cgroup behind.
fn free(cage: TransientCgroup, hierarchy: &Hierarchy) {
    // Our own cgroup, not the parent: on version 2 a cgroup with controllers in subtree_control takes no processes.
    let own = hierarchy.own_path().and_then(|path| hierarchy.dir_of(&path)).map(|dir| dir.join("cgroup.procs"));
    let mut said = false;
    // Processes forked meanwhile are found in the next round.
    for _ in 0..FREE_ROUNDS {
        let left = cage.processes();
        if left.is_empty() {
            break;
        }
        if !said {
            eprintln!("memtrace: {} process(es) of the command still run; they are no longer recorded", left.len());
            said = true;
        }
        for pid in left {
            if let Some(own) = &own {
                // The process may have ended; any other failure shows in the removal below.
                let _ = std::fs::write(own, pid.to_string());
            }
        }
    }
    if let Err(error) = cage.remove() {
        eprintln!("memtrace: the command's memory cgroup stays: {error:#}");
    }
}

/// Writes the recording and the kills beside it, and prints the report.
fn write_and_report(args: &Args, invoker: Option<&Invoker>, files: &[Incident]) -> anyhow::Result<()> {
    // The path is the user's, and may lead through links that the command made. With the rights of the user the files
    // go nowhere the user could not write, and belong to the user. This process does not become root again.
    if let Some(invoker) = invoker {
        invoker.become_user()?;
    }
    let Some(recording) = files.iter().find(|incident| incident.kind == Kind::Recording) else {
        bail!("the engine gave no recording; please report this with the command you ran");
    };
    let ours = recording.recording.as_ref().map(|recording| recording.oom_incidents.as_slice()).unwrap_or_default();
    let kills: Vec<&Incident> =
        files.iter().filter(|incident| incident.kind == Kind::OomKill && ours.contains(&incident.id)).collect();
    let path = args.output.clone().unwrap_or_else(|| default_name(args, &recording.id));
    let written = write(&path, recording, &kills);
    if args.quiet {
        return written.map(|_| ());
    }
    let mut err = std::io::stderr().lock();
    let style = terminal::stderr_style();
    for incident in kills.iter().copied().chain([recording]) {
        writeln!(err, "{}", text::report(incident, &style))?;
    }
    // After the report, so that it is shown even if the file could not be written.
    for file in written? {
        writeln!(err, "wrote {} (show again: memtrace report {})", file.display(), file.display())?;
    }
    Ok(())
}

/// Whether a file at `path` can be written or replaced, or made in it if it is a directory.
fn writable(path: &Path) -> std::io::Result<()> {
    let access = |path: &Path, mode| rustix::fs::access(path, mode).map_err(Into::into);
    let inside = Access::WRITE_OK | Access::EXEC_OK;
    match std::fs::metadata(path) {
        Ok(found) if found.is_dir() => access(path, inside),
        Ok(found) if !found.is_file() => access(path, Access::WRITE_OK),
        // A file is replaced, so its directory must be writable: that of the target, if it is a link.
        found => {
            let target = if found.is_ok() { std::fs::canonicalize(path)? } else { path.to_owned() };
            let dir = target.parent().filter(|dir| !dir.as_os_str().is_empty());
            access(dir.unwrap_or(Path::new(".")), inside)
        }
    }
}

/// Writes the recording to `path` and the kills beside it; the paths written.
fn write(path: &Path, recording: &Incident, kills: &[&Incident]) -> anyhow::Result<Vec<PathBuf>> {
    incidents::write(path, recording).with_context(|| format!("failed to write the recording {}", path.display()))?;
    let mut written = vec![path.to_owned()];
    for kill in kills {
        let beside = path.with_file_name(format!("{}.memtrace", kill.id));
        incidents::write(&beside, kill).with_context(|| format!("failed to write {}", beside.display()))?;
        written.push(beside);
    }
    Ok(written)
}

fn default_name(args: &Args, id: &str) -> PathBuf {
    let program = args.command.first().map(Path::new).and_then(Path::file_name);
    let name = program.map_or_else(|| "recording".to_owned(), |name| name.to_string_lossy().into_owned());
    PathBuf::from(format!("{name}-{id}.memtrace"))
}

/// The exit code of a status as a shell has it: 128 + signal for a process that was killed.
fn exit_code(status: ExitStatus) -> u8 {
    let code = status.code().or_else(|| status.signal().map(|signal| signal.saturating_add(128)));
    code.and_then(|code| u8::try_from(code).ok()).unwrap_or(1)
}
