//! `memtrace replay`: runs a journal through the engine again and lists the incidents it makes.

use std::path::PathBuf;

use anyhow::Context;

use super::incidents::note;
use super::{VerbResult, listing, terminal};
use crate::store::incidents::IncidentStore;
use crate::store::journal::{JournalReader, JournalStats, OpenError};
use memtrace_engine::Engine;
use memtrace_engine::Out;
use memtrace_engine::input::{Fact, Input};
use memtrace_engine::output::Output;
use memtrace_incident::Incident;
use memtrace_incident::units;
use memtrace_report::json;

/// Most incidents of one journal. The agent's journal, which is 16 MiB, holds fewer.
const MAX_INCIDENTS: usize = 4096;

/// Arguments of `memtrace replay`.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  memtrace replay /run/memtrace                      the agent's journal, as a table of incidents
  memtrace replay /run/memtrace/previous             the journal of the previous run
  memtrace replay ./journal -o ./incidents           write the incidents as files
  memtrace report ./incidents/ID.memtrace            show one of them
  memtrace replay journal-00000000000000000042.mtj --json | jq '.[].verdict'

A journal replays to the same incidents on any machine, without root.")]
pub struct Args {
    /// Journal: the directory of its segments, or one segment file
    #[arg(value_name = "CAPTURE")]
    pub capture: PathBuf,
    /// Print a JSON array of whole incident files
    #[arg(long)]
    pub json: bool,
    /// Write each incident as a file into DIR
    #[arg(short, long, value_name = "DIR")]
    pub output: Option<PathBuf>,
}

/// Runs the verb.
pub fn run(args: &Args) -> VerbResult {
    let mut reader = JournalReader::open(&args.capture)?;
    let mut engine = Engine::new();
    let (incidents, left_out) = replay(&mut reader, |input, out| engine.apply(input, out))?;
    if left_out > 0 {
        let saved = units::count(left_out, "incident", "incidents");
        note(&format!("{saved} after the first {MAX_INCIDENTS} left out: replay the segments one by one for the rest"));
    }
    let gaps = gaps(reader.stats());
    if !gaps.is_empty() {
        note(&format!("parts of the journal are missing: {gaps}"));
    }
    if let Some(dir) = &args.output {
        let failed = || format!("failed to write incidents into {}", dir.display());
        let store = IncidentStore::create(dir).with_context(failed)?;
        for incident in &incidents {
            store.save(incident).with_context(failed)?;
        }
    }
    let text = if args.json {
        json::incidents(&incidents)?
    } else if incidents.is_empty() {
        format!("no incidents in {}\n", units::count(reader.stats().frames, "frame", "frames"))
    } else {
        listing::table(&incidents)
    };
    terminal::write(&text, None)?;
    Ok(0)
}

/// Feeds a journal to an engine. Returns the incidents it saves, each in its last version, in the order of their first,
/// and how many times one was left out because there were [`MAX_INCIDENTS`].
fn replay(
    reader: &mut JournalReader,
    mut apply: impl FnMut(&Input<'_>, &mut Out),
) -> Result<(Vec<Incident>, u64), OpenError> {
    let mut left_out = 0u64;
    let mut out = Out::default();
    let mut incidents: Vec<Incident> = Vec::new();
    let mut collect = |out: &mut Out| {
        out.requests.clear();
        for output in out.outputs.drain(..) {
            if let Output::Save(incident) = output {
                let full = incidents.len() >= MAX_INCIDENTS;
                match incidents.iter_mut().find(|known| known.id == incident.id) {
                    Some(known) => *known = *incident,
                    None if full => left_out = left_out.saturating_add(1),
                    None => incidents.push(*incident),
                }
            }
        }
    };
    // Whether the recorded run was stopped, and its last moment: a run that was killed is ended there.
    let (mut stopped, mut last_ns) = (false, 0);
    while let Some(input) = reader.next_input()? {
        match &input {
            Input::Fact(Fact::Stop { .. }) => stopped = true,
            _ => stopped = false,
        }
        last_ns = input.boot_ns().map_or(last_ns, |boot_ns| last_ns.max(boot_ns));
        apply(&input, &mut out);
        collect(&mut out);
    }
    if !stopped {
        apply(&Input::Fact(Fact::Stop { boot_ns: last_ns }), &mut out);
        collect(&mut out);
    }
    Ok((incidents, left_out))
}

/// What is missing from the journal, in words; empty when nothing is.
fn gaps(stats: JournalStats) -> String {
    let mut gaps = Vec::new();
    if stats.torn_segments > 0 {
        let segments = units::count(stats.torn_segments, "segment is", "segments are");
        gaps.push(format!("{segments} torn ({} given up)", units::bytes(stats.torn_bytes)));
    }
    if stats.missing_segments > 0 {
        gaps.push(format!("{} missing", units::count(stats.missing_segments, "segment is", "segments are")));
    }
    if stats.unknown_frames > 0 {
        let frames = units::count(stats.unknown_frames, "frame is", "frames are");
        gaps.push(format!("{frames} of a kind this memtrace does not know"));
    }
    gaps.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::journal::JournalWriter;
    use memtrace_incident::fixtures;

    fn replayed(inputs: &[Input<'_>], save_at: usize) -> (Vec<Incident>, Vec<String>) {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = JournalWriter::open(dir.path(), 1 << 20, 1 << 22).unwrap();
        writer.begin_segment(&[]).unwrap();
        for input in inputs {
            writer.append(input).unwrap();
        }
        drop(writer);
        let mut seen = Vec::new();
        let incidents = replay(&mut JournalReader::open(dir.path()).unwrap(), |input, out| {
            seen.push(format!("{input:?}"));
            if seen.len() >= save_at {
                out.outputs.push(Output::Save(Box::new(fixtures::burst())));
            }
        });
        (incidents.unwrap().0, seen)
    }

    #[test]
    fn a_capture_without_an_end_is_ended_at_its_last_moment() {
        let mut record = [0; 24];
        record[8..16].copy_from_slice(&77u64.to_le_bytes());
        let tick = Input::Fact(Fact::Tick { boot_ns: 50 });
        let (incidents, seen) = replayed(&[Input::Record(&record), tick.clone()], 3);
        assert_eq!(incidents, [fixtures::burst()]);
        assert_eq!(seen.last().unwrap(), "Fact(Stop { boot_ns: 77 })");
        let stop = Input::Fact(Fact::Stop { boot_ns: 60 });
        let (incidents, seen) = replayed(&[tick.clone(), stop.clone()], 1);
        assert_eq!((incidents.len(), seen.len()), (1, 2), "one incident, saved twice; no second stop");
        assert_eq!(replayed(&[stop, tick, Input::Record(b"short")], 9).1.len(), 4, "a later run was not stopped");
    }

    #[test]
    fn what_is_missing_is_said() {
        assert_eq!(gaps(JournalStats { frames: 3, segments: 1, ..JournalStats::default() }), "");
        let stats = JournalStats {
            torn_segments: 1,
            torn_bytes: 14,
            missing_segments: 2,
            unknown_frames: 1,
            ..JournalStats::default()
        };
        assert_eq!(
            gaps(stats),
            "1 segment is torn (14 B given up), 2 segments are missing, 1 frame is of a kind this memtrace does not know"
        );
    }
}
