//! Any bytes as a story for the engine: records of the ring, sound in size or not, and facts. It neither panics nor
//! gives an incident that cannot be written, read back and reported.
#![no_main]

use libfuzzer_sys::fuzz_target;
use memtrace_engine::{Engine, Out};
use memtrace_incident::Incident;
use memtrace_engine::input::{Fact, Input};
use memtrace_engine::output::Output;
use memtrace_report::{Style, text};
use memtrace_common::event::KINDS;

/// What a step begins with: four other kinds of steps, the rest are records.
const RAW: u8 = 0;
const FACT: u8 = 1;
const TICK: u8 = 2;
const STOP: u8 = 3;

/// Takes numbers and pieces off the front.
struct Story<'a>(&'a [u8]);

impl<'a> Story<'a> {
    fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let (piece, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(piece)
    }

    fn byte(&mut self) -> Option<u8> {
        self.take(1).map(|bytes| bytes[0])
    }

    fn short(&mut self) -> Option<usize> {
        self.take(2).map(|bytes| usize::from(u16::from_le_bytes([bytes[0], bytes[1]])))
    }

    fn long(&mut self) -> Option<u64> {
        self.take(8).map(|bytes| u64::from_le_bytes(bytes.try_into().unwrap_or_default()))
    }
}

/// One step: `{u8 what, ...}`; a record is `{u8 4 + index of its kind, u64 boot_ns, the bytes after its header}`.
fn step(story: &mut Story<'_>, engine: &mut Engine, out: &mut Out) -> Option<()> {
    match story.byte()? {
        RAW => {
            let len = usize::from(story.byte()?);
            engine.apply(&Input::Record(story.take(len)?), out);
        }
        FACT => {
            let len = story.short()?;
            if let Ok(fact) = serde_json::from_slice::<Fact>(story.take(len)?) {
                engine.apply(&Input::Fact(fact), out);
            }
        }
        TICK => engine.apply(&Input::Fact(Fact::Tick { boot_ns: story.long()? }), out),
        STOP => engine.apply(&Input::Fact(Fact::Stop { boot_ns: story.long()? }), out),
        other => {
            let (kind, size, _) = KINDS[usize::from(other - 4) % KINDS.len()];
            let boot_ns = story.long()?;
            let mut record = Vec::with_capacity(size);
            record.extend_from_slice(&kind.to_le_bytes());
            record.extend_from_slice(&u16::try_from(size).unwrap_or_default().to_le_bytes());
            record.extend_from_slice(&0u32.to_le_bytes());
            record.extend_from_slice(&boot_ns.to_le_bytes());
            record.extend_from_slice(story.take(size - record.len())?);
            engine.apply(&Input::Record(&record), out);
        }
    }
    Some(())
}

/// What holds of every incident.
fn check(incident: &Incident) {
    // The content of its file; packing it would take most of the time.
    let written = serde_json::to_string(incident).expect("an incident cannot be written");
    let again: Incident = serde_json::from_str(&written).expect("an incident cannot be read back");
    assert_eq!(Some(written), serde_json::to_string(&again).ok());
    assert!(memtrace_incident::codec::is_id(&incident.id), "not a name for a file: {}", incident.id);
    assert!(text::report(incident, &Style::PLAIN).ends_with('\n'));
    let columns = &incident.timeline.columns;
    assert!(columns.boot_ns.windows(2).all(|pair| pair[0] <= pair[1]), "time goes back");
    let length = columns.boot_ns.len();
    let resident = [&columns.anon_bytes, &columns.file_bytes, &columns.shmem_bytes, &columns.swap_bytes];
    assert!(resident.iter().all(|column| column.len() == length), "columns of unequal length");
    let swap = [&columns.swap_usage_bytes, &columns.swap_limit_bytes];
    assert!(swap.iter().all(|column| column.len() == length), "columns of unequal length");
    let counters = [&columns.usage_bytes, &columns.limit_bytes, &columns.watermark_bytes];
    assert!(counters.iter().all(|column| column.len() == length), "columns of unequal length");
}

fuzz_target!(|bytes: &[u8]| {
    let mut story = Story(bytes);
    let (mut engine, mut out) = (Engine::new(), Out::default());
    while step(&mut story, &mut engine, &mut out).is_some() {}
    engine.apply(&Input::Fact(Fact::Stop { boot_ns: 1 << 60 }), &mut out);
    assert_eq!(engine.counts().open_incidents, 0, "an incident stays open after the end");
    // The last few: each costs more than the story that led to it.
    let saved = out.outputs.iter().filter_map(|output| if let Output::Save(saved) = output { Some(saved) } else { None });
    saved.rev().take(4).for_each(|incident| check(incident));
});
