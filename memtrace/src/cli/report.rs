//! `memtrace report`: shows one incident in a format for people or for another tool.

use std::ffi::OsString;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};

use anyhow::Context;
use memtrace_incident::{Cause, Incident, codec};
use memtrace_report::paths::GrowthWindow;
use memtrace_report::{firefox, folded, html, json, pprof, text};

use super::VerbResult;
use super::agent_client::Sources;
use super::config::{Flags, READ};
use super::incidents::unreadable;
use super::terminal::{self, Colour};
use super::values::Span;
use crate::error::CommandError;
use crate::store::incidents::{self, FindError, IncidentStore};
use crate::symbolize::frame_names::UnnamedFrames;
use crate::symbolize::job::NameSources;
use crate::symbolize::subprocess;

/// Arguments of `memtrace report`.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  memtrace report latest                     the newest incident of this machine
  memtrace report 01KJHQ                     by the beginning of its id
  memtrace report ./01KJHQ3V4D.memtrace      a file, from whatever machine
  memtrace report latest --format json | jq .verdict
  memtrace report latest --format folded --window 1s | flamegraph.pl --countname bytes > 1s.svg
  memtrace report latest --format pprof -o kill.pb.gz && go tool pprof -http : kill.pb.gz
  memtrace report latest --format pprof --cause map -o mapped.pb.gz
  memtrace report latest --format firefox -o kill.json     open it at profiler.firefox.com
  ssh node-7 sudo cat /var/lib/memtrace/ID.memtrace | memtrace report -

Causes, each with the bytes that a stack took. They measure different things and must not be added up:
  touch   first touch of a page, when memory becomes resident; this is what a limit counts
  map     mmap and mremap: address space, touched or not
  brk     address space of the heap, touched or not
  charge  charged to the cgroup in system calls: page cache, sockets, kernel memory
Memory that was given back is not subtracted.")]
pub struct Args {
    /// Id of an incident or the beginning of one, `latest`, an incident file, or `-` for standard input
    #[arg(value_name = "ID|FILE")]
    pub incident: OsString,
    /// Output format
    #[arg(long, value_enum, default_value_t)]
    pub format: ReportFormat,
    /// Write to FILE instead of standard output
    #[arg(short, long, value_name = "FILE")]
    pub output: Option<PathBuf>,
    /// Which stacks to weigh: folded has only these, pprof shows them first
    #[arg(long, value_name = "touch|map|brk|charge", default_value = "touch", value_parser = cause)]
    pub cause: Cause,
    /// Only the last SPAN before the event, or `all`; for folded and pprof. The event of a recording is its
    /// highest usage
    #[arg(long, value_name = "SPAN|all", default_value = "all", value_parser = window)]
    pub window: ReportWindow,
    #[command(flatten)]
    settings: Flags<READ>,
    /// Name frames that have no name with debug files and binaries found in DIR by build id; repeatable
    #[arg(long, value_name = "DIR")]
    pub debug_dir: Vec<PathBuf>,
    /// When to use colours
    #[arg(long, value_enum, value_name = "WHEN", default_value_t)]
    pub color: Colour,
}

/// What `memtrace report` prints.
#[derive(clap::ValueEnum, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ReportFormat {
    /// One screen of text
    #[default]
    Text,
    /// The whole incident file
    Json,
    /// Stacks with their bytes, one a line, for flame graph tools
    Folded,
    /// A gzipped profile for pprof
    Pprof,
    /// A profile for profiler.firefox.com, first touches over time
    Firefox,
    /// One page for a browser, complete in itself
    Html,
}

/// How much of the time before the event counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReportWindow {
    /// All of it.
    All,
    /// This much of its end.
    Last(Span),
}

fn window(text: &str) -> Result<ReportWindow, String> {
    if text == "all" { Ok(ReportWindow::All) } else { text.parse().map(ReportWindow::Last) }
}

fn cause(text: &str) -> Result<Cause, String> {
    let named = Cause::ALL.into_iter().find(|cause| cause.name() == text);
    named.ok_or_else(|| format!("`{text}` is not a cause: write {}", Cause::ALL.map(Cause::name).join(", ")))
}

/// Runs the verb.
pub fn run(args: &Args) -> VerbResult {
    let mut incident = load(&args.incident, &Sources::of(&args.settings)?)?;
    if !args.debug_dir.is_empty() {
        // The files are untrusted, and so is the incident that asks for them.
        let sources = NameSources::with_files(&args.debug_dir);
        subprocess::find(&sources, &UnnamedFrames::of(&incident)).apply(&mut incident);
    }
    let window = match args.window {
        ReportWindow::All => GrowthWindow::WHOLE,
        ReportWindow::Last(span) => GrowthWindow::before(&incident, span.nanoseconds()),
    };
    let rendered = match args.format {
        ReportFormat::Text => text::report(&incident, &terminal::style(args.color, args.output.is_some())).into_bytes(),
        ReportFormat::Json => json::incident(&incident)?.into_bytes(),
        ReportFormat::Folded => folded::stacks(&incident, &window, args.cause).into_bytes(),
        ReportFormat::Pprof if args.output.is_none() && std::io::stdout().is_terminal() => {
            return Err(
                CommandError::Usage("a pprof profile is binary: write it to a file with -o FILE".to_owned()).into()
            );
        }
        ReportFormat::Pprof => pprof::profile(&incident, &window, args.cause)?,
        ReportFormat::Firefox => firefox::profile(&incident)?.into_bytes(),
        ReportFormat::Html => html::page(&incident).into_bytes(),
    };
    terminal::write(&rendered, args.output.as_deref())?;
    Ok(0)
}

/// Reads the incident that an argument names: a file, standard input, or an id in the state
/// directory or at the agent.
fn load(named: &OsString, sources: &Sources) -> anyhow::Result<Incident> {
    if named == "-" {
        return codec::read_from(std::io::stdin().lock()).context("failed to read incident from standard input");
    }
    let path = Path::new(named);
    let text = named.to_str().unwrap_or_default();
    // Text that cannot be an id is a path, whether the file exists or not.
    let file = text.is_empty() || text.contains(['/', '.']) || path.is_file();
    if file {
        return Ok(incidents::read(path)?);
    }
    let id = text.to_ascii_uppercase();
    if text != "latest" && !codec::is_id_prefix(&id) {
        return Err(CommandError::Usage(format!("{text:?} is neither a file nor the id of an incident")).into());
    }
    let in_files = |dir: &Path| match IncidentStore::at(dir).find(text) {
        Ok(entry) => Ok(incidents::read(&entry.path)?),
        Err(FindError::Io { source, .. }) => Err(unreadable(source, dir)),
        Err(other) => Err(other.into()),
    };
    sources.read(in_files, |agent| agent.incident(if text == "latest" { text } else { &id }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use memtrace_incident::fixtures;
    use memtrace_report::Style;

    fn args(incident: impl Into<OsString>, dir: &Path, format: ReportFormat) -> Args {
        Args {
            incident: incident.into(),
            format,
            output: Some(dir.join("out")),
            cause: Cause::Touch,
            window: ReportWindow::All,
            settings: Flags::with(&[("state_dir", dir.as_os_str())]),
            debug_dir: Vec::new(),
            color: Colour::Auto,
        }
    }

    #[test]
    fn a_file_an_id_and_the_latest_give_the_same_report() {
        let dir = tempfile::tempdir().unwrap();
        let burst = fixtures::burst();
        let path = IncidentStore::create(dir.path()).unwrap().save(&burst).unwrap();
        for named in
            [path.as_os_str().to_owned(), burst.id[..8].into(), burst.id.to_lowercase().into(), "latest".into()]
        {
            assert_eq!(run(&args(&named, dir.path(), ReportFormat::Text)).unwrap(), 0);
            let written = std::fs::read_to_string(dir.path().join("out")).unwrap();
            assert_eq!(written, text::report(&burst, &Style::PLAIN));
        }
        run(&args("latest", dir.path(), ReportFormat::Json)).unwrap();
        let written = std::fs::read_to_string(dir.path().join("out")).unwrap();
        assert_eq!(serde_json::from_str::<Incident>(&written).unwrap(), burst);
    }

    #[test]
    fn stacks_are_for_a_window_and_a_cause() {
        let dir = tempfile::tempdir().unwrap();
        let path = IncidentStore::create(dir.path()).unwrap().save(&fixtures::burst()).unwrap();
        let mut written = Vec::new();
        for (named_cause, named_window) in [("touch", "all"), ("touch", "1s"), ("touch", "100ms"), ("map", "all")] {
            let args = Args {
                cause: cause(named_cause).unwrap(),
                window: window(named_window).unwrap(),
                ..args(path.as_os_str(), dir.path(), ReportFormat::Folded)
            };
            run(&args).unwrap();
            written.push(std::fs::read(dir.path().join("out")).unwrap());
        }
        let all = written.len();
        written.sort();
        written.dedup();
        assert_eq!(written.len(), all);
        assert!(window("5").is_err() && cause("malloc").is_err());
        run(&args(path.as_os_str(), dir.path(), ReportFormat::Pprof)).unwrap();
        assert!(std::fs::read(dir.path().join("out")).unwrap().starts_with(&[0x1f, 0x8b]));
    }

    #[test]
    fn what_cannot_be_found_is_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let error = |named: &str| run(&args(named, dir.path(), ReportFormat::Text)).unwrap_err();
        assert!(matches!(error("not-an-id").downcast_ref(), Some(CommandError::Usage(_))));
        assert!(error("./no.memtrace").to_string().starts_with("failed to read incident ./no.memtrace: No such file"));
        assert!(error("01KJ").to_string().starts_with("no incident 01KJ in "));
        assert!(error("latest").to_string().starts_with("no incident latest in "));
    }
}
