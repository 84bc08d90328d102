//! `memtrace incidents`: lists incidents, or the processes that got SIGKILL.

use std::io::{self, Write};
use std::path::Path;

use anyhow::anyhow;
use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use jiff::{SpanRelativeTo, Timestamp};

use super::config::{Config, Flags, READ};
use super::{VerbResult, listing, terminal};
use crate::store::incidents::{self, IncidentStore};
use crate::store::ledger;
use memtrace_incident::SigkillEntry;
use memtrace_incident::units;
use memtrace_incident::{Incident, Kind};
use memtrace_report::json;

/// Arguments of `memtrace incidents`.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  memtrace incidents                         every incident, newest first
  memtrace incidents --since 2h              of the last two hours (also 90m, 7d, 2026-03-01T03:00:00Z)
  memtrace incidents --kind oom-kill --json | jq '.[].oom.victims[].comm'
  memtrace incidents --sigkills --since 1h   who sent SIGKILL to which process
  memtrace report latest                     the report of the newest one")]
pub struct Args {
    #[command(flatten)]
    settings: Flags<READ>,
    /// Print a JSON array: incident files without `timeline`, `allocation_paths` and `allocations`, or lines of
    /// the SIGKILL ledger
    #[arg(long)]
    pub json: bool,
    /// Only what happened since: a time span back from now (1h, 2d) or a time (RFC 3339)
    #[arg(long, value_name = "WHEN", value_parser = since)]
    pub since: Option<Timestamp>,
    /// Only incidents of this kind
    #[arg(long, value_name = "KIND", value_parser = kind())]
    pub kind: Option<Kind>,
    /// List processes that got SIGKILL, and who sent it, instead of incidents
    #[arg(long, conflicts_with = "kind")]
    pub sigkills: bool,
}

/// Takes a kind of incident in the command line's form or the file's; `oom` is short for `oom-kill`.
fn kind() -> impl TypedValueParser<Value = Kind> {
    let value = |kind: Kind| {
        let value = PossibleValue::new(kind.flag_value()).help(kind.sentence()).alias(kind.name());
        if kind == Kind::OomKill { value.alias("oom") } else { value }
    };
    PossibleValuesParser::new(Kind::ALL.map(value)).try_map(|name| Kind::named(&name).ok_or("not a kind of incident"))
}

/// Runs the verb.
pub fn run(args: &Args) -> VerbResult {
    let state_dir = Config::load(None, &args.settings)?.parse()?.state_dir;
    if args.sigkills {
        return sigkills(args, &state_dir);
    }
    let store = IncidentStore::at(&state_dir);
    let entries = match store.list() {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            note(&format!(
                "{} does not exist: if the agent uses another directory, name it with --state-dir",
                state_dir.display()
            ));
            Vec::new()
        }
        Err(error) => return Err(unreadable(error, &state_dir)),
    };
    let mut found = Vec::new();
    for entry in entries {
        // The id has the time to the millisecond: old files need not be opened.
        if let (Some(since), Some(at)) = (args.since, memtrace_incident::codec::happened(&entry.id))
            && Timestamp::try_from(at).is_ok_and(|at| at.as_millisecond() < since.as_millisecond())
        {
            break;
        }
        match incidents::read(&entry.path) {
            Ok(incident) => found.extend(Some(incident).filter(|incident| wanted(args, incident))),
            Err(error) => note(&error.to_string()),
        }
    }
    if args.json {
        terminal::write(&json::list(&found)?, None)?;
    } else if found.is_empty() {
        terminal::write(&format!("no incidents in {}\n", state_dir.display()), None)?;
    } else {
        terminal::write(&listing::table(&found), None)?;
    }
    Ok(0)
}

fn sigkills(args: &Args, state_dir: &Path) -> VerbResult {
    let ledger = ledger::read::<SigkillEntry>(state_dir).map_err(|error| unreadable(error, state_dir))?;
    if ledger.bad_lines > 0 {
        note(&format!("{} of the SIGKILL ledger cannot be read", units::count(ledger.bad_lines, "line", "lines")));
    }
    let mut found = ledger.entries;
    let recent = |at: &str| args.since.is_none_or(|since| at.parse::<Timestamp>().is_ok_and(|at| at >= since));
    found.retain(|entry| recent(&entry.wall));
    // UTC with all its digits sorts as text; the sort keeps the order of what happened at once.
    found.reverse();
    found.sort_by(|a, b| b.wall.cmp(&a.wall));
    if args.json {
        terminal::write(&json::sigkills(&found)?, None)?;
    } else if found.is_empty() {
        terminal::write(&format!("no SIGKILLs in {}\n", state_dir.display()), None)?;
    } else {
        terminal::write(&listing::sigkills(&found), None)?;
    }
    Ok(0)
}

/// The error for a state directory that cannot be read, with what to do about it.
pub(super) fn unreadable(error: io::Error, dir: &Path) -> anyhow::Error {
    let hint = if error.kind() == io::ErrorKind::PermissionDenied { " (try sudo)" } else { "" };
    anyhow!("failed to list incidents in {}: {error}{hint}", dir.display())
}

/// Prints a note to standard error, beside the output.
pub(super) fn note(text: &str) {
    let _ = writeln!(io::stderr(), "memtrace: {text}");
}

fn wanted(args: &Args, incident: &Incident) -> bool {
    let recent = match (args.since, listing::wall(incident)) {
        (Some(since), Some(at)) => at >= since,
        _ => true,
    };
    recent && args.kind.is_none_or(|kind| kind == incident.kind)
}

fn since(text: &str) -> Result<Timestamp, String> {
    since_before(text, Timestamp::now())
}

fn since_before(text: &str, now: Timestamp) -> Result<Timestamp, String> {
    if let Ok(time) = text.parse() {
        return Ok(time);
    }
    let help = || format!("{text:?} is neither a time span (1h, 2d) nor a time (2026-03-01T03:00:00Z)");
    let span: jiff::Span = text.parse().map_err(|_| help())?;
    let back = span.abs().to_duration(SpanRelativeTo::days_are_24_hours()).map_err(|_| help())?;
    now.checked_sub(back).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn since_is_a_span_or_a_time() {
        let now: Timestamp = "2026-03-03T12:00:00Z".parse().unwrap();
        for (text, time) in [
            ("1h", "2026-03-03T11:00:00Z"),
            ("2d", "2026-03-01T12:00:00Z"),
            ("1h30m", "2026-03-03T10:30:00Z"),
            ("90s", "2026-03-03T11:58:30Z"),
            ("1w", "2026-02-24T12:00:00Z"),
            ("2026-03-01T03:12:45.5Z", "2026-03-01T03:12:45.5Z"),
            ("2026-03-01T03:00:00+01:00", "2026-03-01T02:00:00Z"),
        ] {
            assert_eq!(since_before(text, now).unwrap(), time.parse().unwrap(), "{text}");
        }
        for text in ["", "yesterday", "5", "99999999999d"] {
            assert!(since_before(text, now).is_err(), "{text}");
        }
    }
}
