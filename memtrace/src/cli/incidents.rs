//! `memtrace incidents`: lists incidents, or the ledgers: OOM kills, and processes that got SIGKILL.

use std::io::{self, Write};
use std::path::Path;

use anyhow::Context;
use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use jiff::{SpanRelativeTo, Timestamp};

use super::agent_client::{AgentClient, Sources};
use super::config::{Flags, READ};
use super::{VerbResult, kills_listing, listing, terminal};
use crate::store::incidents::{self, IncidentStore};
use crate::store::ledger::{self, LedgerEntry};
use memtrace_incident::units;
use memtrace_incident::{Incident, Kind};
use memtrace_incident::{KillLine, SigkillEntry};
use memtrace_report::json;

/// Arguments of `memtrace incidents`.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  memtrace incidents                         every incident, newest first
  memtrace incidents --since 2h              of the last two hours (also 90m, 7d, 2026-03-01T03:00:00Z)
  memtrace incidents --kind oom-kill --json | jq '.[].oom.victims[].comm'
  memtrace incidents --sigkills --since 1h   who sent SIGKILL to which process
  memtrace incidents --kills                 every OOM kill, also of times in which no agent watched
  memtrace report latest                     the report of the newest one

Who may not read the state directory, and may use the agent's socket, gets incidents and ledgers from the agent.")]
pub struct Args {
    #[command(flatten)]
    settings: Flags<READ>,
    /// Print a JSON array: incident files without `timeline`, `allocation_paths` and `allocations`, or lines of
    /// a ledger
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
    /// List the kill ledger instead of incidents: OOM kills, and times in which no agent watched
    #[arg(long, conflicts_with_all = ["kind", "sigkills"])]
    pub kills: bool,
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
    let sources = Sources::of(&args.settings)?;
    if args.sigkills {
        let (found, place) = ledger::<SigkillEntry>(args, &sources, "the SIGKILL ledger", |entry| &entry.wall)?;
        return print_ledger(args, &found, listing::sigkills, &format!("no SIGKILLs in {place}"));
    }
    if args.kills {
        let (found, place) = ledger::<KillLine>(args, &sources, "the kill ledger", KillLine::wall)?;
        return print_ledger(args, &found, kills_listing::table, &format!("no OOM kills in {place}"));
    }
    let in_files = |dir: &Path| Ok((in_files(args, dir)?, dir.display().to_string()));
    let (found, place) = sources.read(in_files, |agent| Ok((of_agent(args, agent)?, agent.place())))?;
    if args.json {
        terminal::write(&json::list(&found)?, None)?;
    } else if found.is_empty() {
        terminal::write(&format!("no incidents in {place}\n"), None)?;
    } else {
        terminal::write(&listing::table(&found), None)?;
    }
    Ok(0)
}

/// The wanted incidents of a state directory, newest first.
fn in_files(args: &Args, state_dir: &Path) -> anyhow::Result<Vec<Incident>> {
    let entries = match IncidentStore::at(state_dir).list() {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            note(&format!(
                "{} does not exist: if the agent uses another directory, name it with --state-dir",
                state_dir.display()
            ));
            Vec::new()
        }
        Err(error) => return Err(unreadable(error, state_dir)),
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
            Err(error) if error.is_denied() => return Err(error.into()),
            Err(error) => note(&error.to_string()),
        }
    }
    Ok(found)
}

/// The wanted incidents of an agent, newest first.
fn of_agent(args: &Args, agent: &AgentClient) -> anyhow::Result<Vec<Incident>> {
    let (mut found, more) = agent.list()?;
    if more {
        note(&format!("the agent gives its newest {} incidents; root can list older ones", found.len()));
    }
    found.retain(|incident| wanted(args, incident));
    Ok(found)
}

/// The entries of a ledger that are wanted, newest first, and where they are from. `wall` is when one happened.
fn ledger<E: LedgerEntry>(
    args: &Args,
    sources: &Sources,
    name: &str,
    wall: impl Fn(&E) -> &str,
) -> anyhow::Result<(Vec<E>, String)> {
    let in_files = |dir: &Path| {
        let failed = || format!("failed to read {name} in {}", dir.display());
        Ok((ledger::read::<E>(dir).with_context(failed)?, dir.display().to_string()))
    };
    let of_agent = |agent: &AgentClient| {
        let (ledger, more) =
            agent.ledger::<E>().with_context(|| format!("failed to read {name} of {}", agent.place()))?;
        if more {
            note(&format!(
                "the agent gives the newest {} lines of {name}; root can list older ones",
                ledger.entries.len()
            ));
        }
        Ok((ledger, agent.place()))
    };
    let (ledger, place) = sources.read(in_files, of_agent)?;
    if ledger.bad_lines > 0 {
        note(&format!("{} of {name} cannot be read", units::count(ledger.bad_lines, "line", "lines")));
    }
    let mut found = ledger.entries;
    let recent = |at: &str| args.since.is_none_or(|since| at.parse::<Timestamp>().is_ok_and(|at| at >= since));
    found.retain(|entry| recent(wall(entry)));
    // UTC with all its digits sorts as text; the sort keeps the order of what happened at once.
    found.reverse();
    found.sort_by(|a, b| wall(b).cmp(wall(a)));
    Ok((found, place))
}

fn print_ledger<E: LedgerEntry>(args: &Args, found: &[E], table: fn(&[E]) -> String, none: &str) -> VerbResult {
    if args.json {
        terminal::write(&json::ledger(found)?, None)?;
    } else if found.is_empty() {
        terminal::write(&format!("{none}\n"), None)?;
    } else {
        terminal::write(&table(found), None)?;
    }
    Ok(0)
}

/// The error for a state directory that cannot be read.
pub(super) fn unreadable(error: io::Error, dir: &Path) -> anyhow::Error {
    anyhow::Error::new(error).context(format!("failed to list incidents in {}", dir.display()))
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
