//! A journal recorded on this kernel replays to what the agent saved. The capture is kept where
//! `MEMTRACE_TESTS_OUT` says.

#![allow(clippy::indexing_slicing, reason = "a panic is how a test fails")]

use std::path::PathBuf;

use anyhow::{Context, ensure};
use memtrace_tests::actor::Actor;
use memtrace_tests::agent::json_of;
use memtrace_tests::cage::{Cage, Version};
use memtrace_tests::claims::MIB;
use memtrace_tests::figures::say;
use memtrace_tests::json;
use memtrace_tests::programs;
use memtrace_tests::trial::Trial;
use serde_json::Value;

/// Environment variable: directory in which captures are kept.
const OUT: &str = "MEMTRACE_TESTS_OUT";

#[test]
fn a_capture_of_this_kernel_replays_to_the_incidents_that_were_saved() -> anyhow::Result<()> {
    let mut trial = Trial::begin(&[])?;
    let cage = Cage::new("own", 8 * MIB)?;
    let pod = Cage::new("pod", 10 * MIB)?;
    let inner = pod.child("inner")?;
    let version = cage.version();
    for place in [&cage, &inner] {
        Actor::start(Some(place), &["burst", "--mib", "32", "--threads", "1"])?.finish()?.was_killed()?;
    }
    trial.incidents(&[&cage, &inner], 2)?;
    let status = trial.agent.stop()?;
    ensure!(status.code() == Some(0), "the agent ended with {status}");
    let saved = trial.options().incidents()?;

    let journal = &trial.options().journal_dir;
    let mut replay = programs::memtrace_command()?;
    replay.arg("replay").arg(journal).arg("--json");
    let replayed = json_of(replay)?;
    let mut replayed = replayed.as_array().cloned().context("a replay is an array")?;
    let id = |incident: &Value| incident["id"].as_str().unwrap_or_default().to_owned();
    replayed.sort_by_key(&id);
    let mut ids: Vec<String> = saved.iter().map(id).collect();
    ids.sort();
    ensure!(replayed.iter().map(id).collect::<Vec<_>>() == ids, "replayed are other incidents than were saved");
    for incident in &replayed {
        let saved = json::without_names(&trial.options().report(&id(incident))?);
        ensure!(*incident == saved, "{} replays to something else", id(incident));
    }

    let segments: Vec<PathBuf> = std::fs::read_dir(journal)?
        .filter_map(|entry| entry.ok().map(|entry| entry.path()))
        .filter(|path| path.extension().is_some_and(|extension| extension == "mtj"))
        .collect();
    let bytes: u64 = segments.iter().filter_map(|path| path.metadata().ok()).map(|meta| meta.len()).sum();
    say(format_args!("a journal of {} KiB in {} segments", bytes >> 10, segments.len()));
    if let (Some(out), [segment]) = (std::env::var_os(OUT), segments.as_slice()) {
        let release = rustix::system::uname().release().to_string_lossy().into_owned();
        let name = format!("{release}-{}.mtj", if version == Version::V1 { "v1" } else { "v2" });
        let file = PathBuf::from(out).join(name);
        std::fs::copy(segment, &file).with_context(|| format!("failed to leave {}", file.display()))?;
    }
    inner.remove()?;
    pod.remove()?;
    cage.remove()
}
