//! What the run before left open: its journal replayed, before this one begins.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::Context;
use tracing::{error, info, warn};

use super::sinks::Sinks;
use crate::engine::Engine;
use crate::engine::input::{Effect, Fact, Input, KillEntry};
use crate::store::{journal, kills};

/// Where the journal of the run before is kept, below the journal's directory.
const PREVIOUS: &str = "previous";

/// Closes what a run that did not stop properly left open: replays its journal, adds the kills the ledger lacks and
/// saves what is not saved yet.
///
/// Incident ids come from the event itself, so an incident that was saved is met again under its own id. The old
/// journal is moved aside and stays readable until the next recovery.
pub(super) fn recover(dir: &Path, sinks: &mut Sinks) -> anyhow::Result<()> {
    let mut reader = match journal::Reader::open(dir) {
        Ok(reader) => reader,
        Err(journal::OpenError::Empty { .. }) => return Ok(()),
        Err(journal::OpenError::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => {
            warn!("journal of the last run: {error}; nothing is recovered from it");
            return Ok(());
        }
    };
    let mut engine = Engine::new();
    let mut effects = Vec::new();
    let (mut stopped, mut last_ns) = (false, 0);
    loop {
        match reader.next_input() {
            Ok(Some(input)) => {
                stopped = matches!(input, Input::Fact(Fact::Stop { .. }));
                last_ns = input.boot_ns().unwrap_or(0).max(last_ns);
                engine.apply(&input, &mut effects);
            }
            Ok(None) => break,
            Err(error) => warn!("journal of the last run: {error}"),
        }
        // Only kills and saves are of interest, and a long journal must not pile up the rest.
        effects.retain(|effect| matches!(effect, Effect::Save(_) | Effect::Kill(_)));
    }
    let stats = reader.stats();
    if stats.torn_bytes > 0 {
        warn!("journal of the last run: dropped a torn tail of {} bytes", stats.torn_bytes);
    }
    if !stopped {
        engine.apply(&Input::Fact(Fact::Stop { boot_ns: last_ns }), &mut effects);
        let kills = add_kills(&effects, sinks);
        let incidents = save_incidents(effects, sinks);
        info!(
            frames = stats.frames,
            recovered = incidents,
            kills,
            "the last run did not stop properly; replayed its journal"
        );
    }
    journal::set_aside(dir, PREVIOUS)
        .with_context(|| format!("failed to set the old journal in {} aside", dir.display()))
}

/// Adds the kills that the ledger does not have; how many. The ledger first, as in a run.
fn add_kills(effects: &[Effect], sinks: &mut Sinks) -> u64 {
    let mut replayed = effects.iter().filter_map(|effect| match effect {
        Effect::Kill(kill) => Some(kill),
        _ => None,
    });
    let Some(first) = replayed.next() else { return 0 };
    let mut known: BTreeSet<(u64, u32, u64)> = match kills::read(sinks.kills.dir()) {
        Ok(ledger) => ledger.kills.iter().map(key).collect(),
        Err(error) => {
            error!("failed to read the kill ledger, nothing is added to it: {error}");
            return 0;
        }
    };
    let mut added = 0u64;
    for kill in std::iter::once(first).chain(replayed) {
        if !known.insert(key(kill)) {
            continue;
        }
        match sinks.kills.append(kill) {
            Ok(()) => added = added.saturating_add(1),
            Err(error) => {
                sinks.counters.write_failures = sinks.counters.write_failures.saturating_add(1);
                error!("failed to write the kill of {} to the ledger: {error}", kill.pid);
            }
        }
    }
    added
}

/// What tells one kill from another.
fn key(kill: &KillEntry) -> (u64, u32, u64) {
    (kill.boot_ns, kill.pid, kill.start_boot_ns)
}

/// Saves the incidents that are not on disk; how many.
fn save_incidents(effects: Vec<Effect>, sinks: &mut Sinks) -> u64 {
    let known: BTreeSet<String> =
        sinks.incidents.list().unwrap_or_default().into_iter().map(|entry| entry.id).collect();
    let mut saved = 0u64;
    for effect in effects {
        let Effect::Save(incident) = effect else { continue };
        if known.contains(&incident.id) {
            continue;
        }
        match sinks.incidents.save(&incident) {
            Ok(_) => saved = saved.saturating_add(1),
            Err(error) => {
                sinks.counters.write_failures = sinks.counters.write_failures.saturating_add(1);
                error!(id = %incident.id, "failed to save a recovered incident: {error}");
            }
        }
    }
    saved
}
