//! Recovery from a run that did not stop properly: its journal is replayed before the new run begins.

use std::collections::BTreeSet;
use std::fs::OpenOptions;
use std::path::Path;

use anyhow::Context;
use tracing::{error, info, warn};

use super::sinks::Sinks;
use super::unwatched::LastRun;
use crate::store::journal::{self, JournalReader, OpenError};
use crate::store::ledger::{self, Ledger, LedgerEntry};
use crate::store::own_dir;
use memtrace_engine::input::{Fact, Input};
use memtrace_engine::output::Output;
use memtrace_engine::{Engine, Out};
use memtrace_incident::{KillLine, Moment};

/// File in the journal's directory: the run stopped, and could not save everything.
const UNSAVED: &str = "unsaved";

/// Makes the next start recover from this run's journal, as if it had not stopped properly. Left before the agent
/// stops, since whoever stops it may not wait.
pub(super) fn leave_mark(dir: &Path) {
    if let Err(error) = own_dir::open(&dir.join(UNSAVED), 0o600, OpenOptions::new().write(true)) {
        error!("what cannot be saved now will be lost: {error}");
    }
}

/// Everything is saved.
pub(super) fn remove_mark(dir: &Path) {
    match std::fs::remove_file(dir.join(UNSAVED)) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            warn!("failed to remove {}: {error}", dir.join(UNSAVED).display());
        }
        _ => {}
    }
}

/// Replays the journal in `dir` unless its run stopped properly and saved everything: closes the incidents that were
/// open, saves those that are not on disk, and adds the kills and SIGKILLs that the ledgers lack.
///
/// Incident ids come from the event itself, so an incident that was saved has the same id in the replay. The journal is
/// then moved to a subdirectory and stays readable until the next start. A journal that cannot be opened is logged and
/// left where it is. Returns until when that run watched; `None` when the journal does not say.
pub(super) fn recover(dir: &Path, sinks: &mut Sinks) -> anyhow::Result<Option<LastRun>> {
    let mut reader = match JournalReader::open(dir) {
        Ok(reader) => reader,
        Err(OpenError::Empty { .. }) => return Ok(None),
        Err(OpenError::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => {
            warn!("journal of the previous run: {error}; nothing is recovered from it");
            return Ok(None);
        }
    };
    let Replayed { stopped, out, watched_until } = replay(&mut reader);
    let stats = reader.stats();
    if stats.torn_bytes > 0 {
        warn!("journal of the previous run: dropped a torn tail of {} bytes", stats.torn_bytes);
    }
    let mark = dir.join(UNSAVED);
    if !stopped || mark.exists() {
        let (mut replayed, mut sent) = (Vec::new(), Vec::new());
        for output in &out.outputs {
            match output {
                Output::Kill(kill) => replayed.push(KillLine::Kill(kill.clone())),
                Output::Sigkill(sigkill) => sent.push(sigkill.clone()),
                _ => {}
            }
        }
        let failures = &mut sinks.counters.write_failures;
        // The ledgers first, as in a live run.
        let kills = add_missing(replayed, &mut sinks.kills, failures);
        let sigkills = add_missing(sent, &mut sinks.sigkills, failures);
        let incidents = save_incidents(out.outputs, sinks);
        info!(
            frames = stats.frames,
            recovered = incidents,
            kills,
            sigkills,
            stopped,
            "the previous run did not stop properly, or could not save everything: replayed its journal"
        );
    }
    remove_mark(dir);
    journal::set_aside(dir).with_context(|| format!("failed to set the old journal in {} aside", dir.display()))?;
    Ok(watched_until.map(|watched_until| LastRun { watched_until, stopped }))
}

/// A journal run through an engine.
struct Replayed {
    /// Whether the run stopped properly. Facts that were on their way may come after the stop.
    stopped: bool,
    /// Kills, SIGKILLs and incidents, those too that were open at the end.
    out: Out,
    /// When every source was read for the last time; `None` when the journal does not say.
    watched_until: Option<Moment>,
}

fn replay(reader: &mut JournalReader) -> Replayed {
    let mut engine = Engine::new();
    let mut out = Out::default();
    let (mut stopped, mut last_ns) = (false, 0);
    let (mut boot_id, mut anchor, mut read_until_ns) = (String::new(), None, None);
    loop {
        match reader.next_input() {
            Ok(Some(input)) => {
                stopped |= matches!(input, Input::Fact(Fact::Stop { .. }));
                last_ns = input.boot_ns().unwrap_or(0).max(last_ns);
                match &input {
                    Input::Fact(Fact::Start { host, .. }) => boot_id.clone_from(&host.boot_id),
                    Input::Fact(Fact::Anchor { boot_ns, wall_ns, .. }) => anchor = Some((*boot_ns, *wall_ns)),
                    Input::Fact(Fact::Tick { boot_ns } | Fact::Stop { boot_ns }) => read_until_ns = Some(*boot_ns),
                    _ => {}
                }
                engine.apply(&input, &mut out);
            }
            Ok(None) => break,
            Err(error) => warn!("journal of the previous run: {error}"),
        }
        // The others are not needed, and would pile up over a long journal.
        out.requests.clear();
        out.outputs.retain(|output| matches!(output, Output::Save(_) | Output::Kill(_) | Output::Sigkill(_)));
    }
    if !stopped {
        engine.apply(&Input::Fact(Fact::Stop { boot_ns: last_ns }), &mut out);
    }
    let watched_until = anchor.and_then(|(anchor_ns, wall_ns)| {
        // A run that ended before its first tick had watched from its start.
        let boot_ns = read_until_ns.unwrap_or(anchor_ns);
        let wall_ns = i128::from(wall_ns) + i128::from(boot_ns) - i128::from(anchor_ns);
        let wall = format!("{:.9}", jiff::Timestamp::from_nanosecond(wall_ns).ok()?);
        Some(Moment { boot_id, boot_ns, wall })
    });
    Replayed { stopped, out, watched_until }
}

/// Adds the entries that a ledger lacks; how many were added.
fn add_missing<E: LedgerEntry>(mut entries: Vec<E>, ledger: &mut Ledger<E>, failures: &mut u64) -> u64 {
    if entries.is_empty() {
        return 0;
    }
    let (mut known, counted): (BTreeSet<_>, Vec<E>) = match ledger::read::<E>(ledger.dir()) {
        Ok(lines) => (
            lines.entries.iter().map(E::key).collect(),
            lines.entries.into_iter().filter(E::stands_for_others).collect(),
        ),
        Err(error) => {
            error!("failed to read {}, nothing is added to it: {error}", E::FILE);
            return 0;
        }
    };
    entries.retain(|entry| !counted.iter().any(|known| known.stands_for(entry)) && known.insert(entry.key()));
    match ledger.append(&entries) {
        Ok(()) => entries.len() as u64,
        Err(error) => {
            *failures = failures.saturating_add(entries.len() as u64);
            error!("failed to add {} entries to {}: {error}", entries.len(), E::FILE);
            0
        }
    }
}

/// Saves the incidents that are not on disk; how many were saved. The others are tried again later.
fn save_incidents(outputs: Vec<Output>, sinks: &mut Sinks) -> u64 {
    let known: BTreeSet<String> =
        sinks.incidents.list().unwrap_or_default().into_iter().map(|entry| entry.id).collect();
    let mut saved = 0u64;
    for output in outputs {
        let Output::Save(incident) = output else { continue };
        if known.contains(&incident.id) {
            continue;
        }
        match sinks.incidents.save(&incident) {
            Ok(_) => {
                sinks.counters.count_saved(incident.kind);
                saved = saved.saturating_add(1);
            }
            Err(error) => {
                sinks.counters.write_failures = sinks.counters.write_failures.saturating_add(1);
                error!(id = %incident.id, "failed to save a recovered incident: {error}");
                sinks.storer.save(incident);
            }
        }
    }
    saved
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::journal::JournalWriter;
    use memtrace_engine::input::CgroupFound;

    #[test]
    fn a_run_stopped_properly_if_a_stop_is_in_its_journal_whatever_comes_after_it() {
        let found = Fact::Cgroup(CgroupFound { id: 7, boot_ns: 3, ..CgroupFound::default() });
        let stop = Fact::Stop { boot_ns: 2 };
        for (facts, stopped) in [(vec![&found], false), (vec![&found, &stop], true), (vec![&stop, &found], true)] {
            let dir = tempfile::tempdir().unwrap();
            let mut journal = JournalWriter::open(dir.path(), 1 << 20, 1 << 20).unwrap();
            journal.begin_segment(&[]).unwrap();
            for fact in facts {
                journal.append(&Input::Fact(fact.clone())).unwrap();
            }
            journal.flush().unwrap();
            let replayed = replay(&mut JournalReader::open(dir.path()).unwrap());
            assert_eq!(replayed.stopped, stopped);
            assert_eq!(replayed.watched_until, None, "no anchor, no wall time");
        }
    }

    #[test]
    fn the_journal_says_until_when_its_run_watched() {
        let host = memtrace_incident::Host { boot_id: "b".into(), ..crate::host::describe() };
        let anchor = Fact::Anchor { boot_ns: 1_000_000_000, wall_ns: 1_700_000_000_000_000_000, uncertainty_ns: 0 };
        let dir = tempfile::tempdir().unwrap();
        let mut journal = JournalWriter::open(dir.path(), 1 << 20, 1 << 20).unwrap();
        journal.begin_segment(&[]).unwrap();
        let settings = memtrace_engine::input::Settings::default();
        for fact in [Fact::Start { host, settings }, anchor, Fact::Tick { boot_ns: 3_000_000_000 }] {
            journal.append(&Input::Fact(fact)).unwrap();
        }
        journal.flush().unwrap();
        let watched_until = replay(&mut JournalReader::open(dir.path()).unwrap()).watched_until.unwrap();
        assert_eq!((watched_until.boot_id.as_str(), watched_until.boot_ns), ("b", 3_000_000_000));
        assert_eq!(watched_until.wall, "2023-11-14T22:13:22.000000000Z");
    }
}
