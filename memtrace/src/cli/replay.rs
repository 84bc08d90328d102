//! `memtrace replay`.

use std::path::PathBuf;

use anyhow::Context;

use super::incidents::note;
use super::{Outcome, listing, terminal};
use crate::store::incidents::Incidents;
use crate::store::journal::{OpenError, Reader, Stats};
use memtrace_engine::Engine;
use memtrace_engine::Out;
use memtrace_engine::input::{Fact, Input};
use memtrace_engine::output::Output;
use memtrace_incident::Incident;
use memtrace_incident::units;
use memtrace_report::json;

/// Arguments of `memtrace replay`.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  memtrace replay /run/memtrace                      what the agent's journal says, as a table
  memtrace replay /run/memtrace/previous             the journal of the run before
  memtrace replay ./journal -o ./incidents           write the incident files again
  memtrace report ./incidents/ID.memtrace            and read one
  memtrace replay journal-00000000000000000042.mtj --json | jq '.[].verdict'

A journal replays to the same incidents on any machine, without root.")]
pub struct Args {
    /// A journal: the directory of its segments, or one segment file
    #[arg(value_name = "CAPTURE")]
    pub capture: PathBuf,
    /// Print a JSON array of whole incident files
    #[arg(long)]
    pub json: bool,
    /// Write an incident file for each into DIR
    #[arg(short, long, value_name = "DIR")]
    pub output: Option<PathBuf>,
}

/// Runs the verb.
pub fn run(args: &Args) -> Outcome {
    let mut reader = Reader::open(&args.capture)?;
    let mut engine = Engine::new();
    let incidents = replay(&mut reader, |input, out| engine.apply(input, out))?;
    let gaps = gaps(reader.stats());
    if !gaps.is_empty() {
        note(&format!("the journal is not whole: {gaps}"));
    }
    if let Some(dir) = &args.output {
        let failed = || format!("failed to write incidents into {}", dir.display());
        let store = Incidents::create(dir).with_context(failed)?;
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

/// Feeds a journal to an engine; the incidents it saves, each in its last version, in the order they were opened.
fn replay(reader: &mut Reader, mut apply: impl FnMut(&Input<'_>, &mut Out)) -> Result<Vec<Incident>, OpenError> {
    let mut out = Out::default();
    let mut incidents: Vec<Incident> = Vec::new();
    let mut keep = |out: &mut Out| {
        out.requests.clear();
        for output in out.outputs.drain(..) {
            if let Output::Save(incident) = output {
                match incidents.iter_mut().find(|known| known.id == incident.id) {
                    Some(known) => *known = *incident,
                    None => incidents.push(*incident),
                }
            }
        }
    };
    // Whether the run that is being replayed was stopped, and its last moment if not.
    let (mut stopped, mut last_ns) = (false, 0);
    while let Some(input) = reader.next_input()? {
        match &input {
            Input::Fact(Fact::Stop { .. }) => stopped = true,
            _ => stopped = false,
        }
        last_ns = input.boot_ns().map_or(last_ns, |boot_ns| last_ns.max(boot_ns));
        apply(&input, &mut out);
        keep(&mut out);
    }
    if !stopped {
        apply(&Input::Fact(Fact::Stop { boot_ns: last_ns }), &mut out);
        keep(&mut out);
    }
    Ok(incidents)
}

/// What a replay could not see; empty when it saw everything.
fn gaps(stats: Stats) -> String {
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
    use crate::store::journal::Writer;
    use memtrace_incident::fixtures;

    fn replayed(inputs: &[Input<'_>], save_at: usize) -> (Vec<Incident>, Vec<String>) {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = Writer::open(dir.path(), 1 << 20, 1 << 22).unwrap();
        writer.begin_segment(&[]).unwrap();
        for input in inputs {
            writer.append(input).unwrap();
        }
        drop(writer);
        let mut seen = Vec::new();
        let incidents = replay(&mut Reader::open(dir.path()).unwrap(), |input, out| {
            seen.push(format!("{input:?}"));
            if seen.len() >= save_at {
                out.outputs.push(Output::Save(Box::new(fixtures::burst())));
            }
        });
        (incidents.unwrap(), seen)
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
        assert_eq!(gaps(Stats { frames: 3, segments: 1, ..Stats::default() }), "");
        let stats =
            Stats { torn_segments: 1, torn_bytes: 14, missing_segments: 2, unknown_frames: 1, ..Stats::default() };
        assert_eq!(
            gaps(stats),
            "1 segment is torn (14 B given up), 2 segments are missing, 1 frame is of a kind this memtrace does not know"
        );
    }
}
