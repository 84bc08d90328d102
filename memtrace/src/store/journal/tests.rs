//! Tests of the journal: the same frames whatever the pieces, a prefix whatever the damage.

use std::fs;
use std::path::Path;

use proptest::prelude::*;

use super::*;

mod full;

#[derive(Clone, Debug, PartialEq)]
enum Owned {
    Record(Vec<u8>),
    Fact(Fact),
    Preamble(Fact),
}

fn owned(frame: JournalFrame<'_>) -> Owned {
    match frame {
        JournalFrame::Input(Input::Record(bytes)) => Owned::Record(bytes.to_vec()),
        JournalFrame::Input(Input::Fact(fact)) => Owned::Fact(fact),
        JournalFrame::Preamble(fact) => Owned::Preamble(fact),
    }
}

fn segment(frames: &[Owned]) -> Vec<u8> {
    let mut out = MAGIC.to_vec();
    out.extend_from_slice(&VERSION.to_le_bytes());
    for frame in frames {
        assert!(match frame {
            Owned::Record(bytes) => encode(KIND_RECORD, bytes, &mut out),
            Owned::Fact(fact) => encode(KIND_FACT, &serde_json::to_vec(fact).unwrap(), &mut out),
            Owned::Preamble(fact) => encode(KIND_PREAMBLE, &serde_json::to_vec(fact).unwrap(), &mut out),
        });
    }
    out
}

fn decode(bytes: &[u8], chunk: usize) -> (Vec<Owned>, SegmentDecoder) {
    let mut decoder = SegmentDecoder::new();
    let mut frames = Vec::new();
    for piece in bytes.chunks(chunk.max(1)) {
        decoder.push(piece);
        while let Some(frame) = decoder.next_frame() {
            frames.push(owned(frame));
        }
    }
    decoder.finish();
    (frames, decoder)
}

fn tick(boot_ns: u64) -> Fact {
    Fact::Tick { boot_ns }
}

fn frames() -> impl Strategy<Value = Vec<Owned>> {
    prop::collection::vec(
        prop_oneof![
            prop::collection::vec(any::<u8>(), 0..300).prop_map(Owned::Record),
            any::<u64>().prop_map(|at| Owned::Fact(tick(at))),
            any::<u64>().prop_map(|at| Owned::Preamble(Fact::Stop { boot_ns: at })),
        ],
        0..20,
    )
}

proptest! {
    #[test]
    fn the_pieces_do_not_matter(frames in frames(), chunk in 1usize..700) {
        let (decoded, decoder) = decode(&segment(&frames), chunk);
        prop_assert_eq!(decoder.torn_bytes(), 0);
        prop_assert_eq!(decoder.stopped(), None);
        prop_assert_eq!(decoded, frames);
    }

    #[test]
    fn a_cut_leaves_a_prefix(frames in frames(), cut in any::<prop::sample::Index>(), chunk in 1usize..700) {
        let whole = segment(&frames);
        let cut = cut.index(whole.len() + 1);
        let (decoded, decoder) = decode(&whole[..cut], chunk);
        prop_assert!(frames.starts_with(&decoded));
        let kept = if cut < HEADER_BYTES { 0 } else { segment(&decoded).len() };
        prop_assert_eq!(decoder.torn_bytes() as usize, cut - kept);
    }

    #[test]
    fn a_flipped_bit_leaves_a_prefix(frames in frames(), at in any::<prop::sample::Index>(), bit in 0u8..8) {
        let mut damaged = segment(&frames);
        let at = at.index(damaged.len());
        damaged[at] ^= 1 << bit;
        let (decoded, decoder) = decode(&damaged, 64);
        if at >= HEADER_BYTES {
            prop_assert!(frames.starts_with(&decoded));
            prop_assert!(decoded.len() < frames.len());
            prop_assert_eq!(decoder.stopped(), Some(SegmentEnd::Torn));
        }
    }

    #[test]
    fn any_bytes_are_survived(bytes in prop::collection::vec(any::<u8>(), 0..2000), chunk in 1usize..100) {
        let (_, decoder) = decode(&bytes, chunk);
        prop_assert!(decoder.torn_bytes() <= bytes.len() as u64);
        let mut headed = segment(&[]);
        headed.extend_from_slice(&bytes);
        decode(&headed, chunk);
    }
}

#[test]
fn an_absurd_length_stops_the_segment_without_memory_for_it() {
    let mut bytes = segment(&[Owned::Fact(tick(1))]);
    bytes.extend_from_slice(&u32::MAX.to_le_bytes());
    bytes.extend_from_slice(&[0; 100]);
    let (frames, decoder) = decode(&bytes, 7);
    assert_eq!((frames.len(), decoder.torn_bytes()), (1, 104));
    assert_eq!(decoder.pending.capacity(), 0);
}

#[test]
fn unknown_kinds_are_skipped_and_counted() {
    let mut bytes = segment(&[]);
    assert!(encode(9, b"later", &mut bytes));
    assert!(encode(KIND_FACT, br#"{"fact":"of_tomorrow"}"#, &mut bytes));
    assert!(encode(KIND_RECORD, b"x", &mut bytes));
    let (frames, decoder) = decode(&bytes, 5);
    assert_eq!((frames, decoder.unknown()), (vec![Owned::Record(b"x".to_vec())], 2));
    assert!(!encode(KIND_RECORD, &vec![0; MAX_PAYLOAD + 1], &mut bytes));
}

fn fill(writer: &mut JournalWriter, records: std::ops::Range<u64>) {
    for number in records {
        if writer.rotate_needed() {
            writer.begin_segment(&[tick(number)]).unwrap();
        }
        writer.append(&Input::Record(&number.to_le_bytes())).unwrap();
    }
}

fn read(path: &Path) -> (Vec<u64>, Vec<u64>, JournalStats) {
    let mut reader = JournalReader::open(path).unwrap();
    let (mut records, mut facts) = (Vec::new(), Vec::new());
    while let Some(input) = reader.next_input().unwrap() {
        match input {
            Input::Record(bytes) => records.push(u64::from_le_bytes(bytes.try_into().unwrap())),
            Input::Fact(Fact::Tick { boot_ns }) => facts.push(boot_ns),
            Input::Fact(_) => {}
        }
    }
    (records, facts, reader.stats())
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn the_ring_keeps_the_newest_within_its_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let mut writer = JournalWriter::open(dir.path(), 1000, 4000).unwrap();
    fill(&mut writer, 0..1000);
    writer.flush().unwrap();
    assert!(writer.bytes() <= 4100, "{}", writer.bytes());
    let on_disk: u64 = names(dir.path()).iter().map(|name| fs::metadata(dir.path().join(name)).unwrap().len()).sum();
    assert_eq!(on_disk, writer.bytes());
    let (records, facts, stats) = read(dir.path());
    assert_eq!(*records.last().unwrap(), 999);
    assert!(records.windows(2).all(|pair| pair[1] == pair[0] + 1), "no record is missing in between");
    assert_eq!(facts, [records[0]], "only the first segment's preamble is an input");
    assert_eq!((stats.torn_bytes, stats.missing_segments), (0, 0));
    assert_eq!(writer.lost(), 0);
}

#[test]
fn a_new_writer_continues_and_a_crash_costs_the_tail() {
    let dir = tempfile::tempdir().unwrap();
    fill(&mut JournalWriter::open(dir.path(), 1000, 1 << 20).unwrap(), 0..100);
    let last = dir.path().join(names(dir.path()).pop().unwrap());
    let whole = fs::read(&last).unwrap();
    fs::write(&last, &whole[..whole.len() - 3]).unwrap();
    fill(&mut JournalWriter::open(dir.path(), 1000, 1 << 20).unwrap(), 100..200);
    let (records, _, stats) = read(dir.path());
    let expected: Vec<u64> = (0..200).filter(|number| *number != 99).collect();
    assert_eq!(records, expected);
    assert_eq!((stats.torn_segments, stats.torn_bytes), (1, 14));
}

#[test]
fn a_missing_segment_is_counted_and_one_segment_reads_alone() {
    let dir = tempfile::tempdir().unwrap();
    fill(&mut JournalWriter::open(dir.path(), 1000, 1 << 20).unwrap(), 0..300);
    let names = names(dir.path());
    assert!(names.len() > 4);
    fs::remove_file(dir.path().join(&names[2])).unwrap();
    assert_eq!(read(dir.path()).2.missing_segments, 1);
    let (records, facts, _) = read(&dir.path().join(&names[3]));
    assert_eq!(facts, [records[0]], "a replay from here has this segment's preamble");
}

#[test]
fn errors_are_told_apart() {
    let dir = tempfile::tempdir().unwrap();
    assert!(matches!(JournalReader::open(dir.path()), Err(OpenError::Empty { .. })));
    let file = dir.path().join("x");
    fs::write(&file, b"not a journal at all").unwrap();
    assert!(matches!(JournalReader::open(&file).unwrap().next_input(), Err(OpenError::NotAJournal { .. })));
    fs::write(&file, b"MTJR\x07\0\0\0").unwrap();
    let error = JournalReader::open(&file).unwrap().next_input().unwrap_err().to_string();
    assert!(error.ends_with("version 7 is newer than this memtrace reads (1); update memtrace"), "{error}");
}

#[test]
fn a_failed_writer_rests_until_the_flush_and_recovers() {
    let dir = tempfile::tempdir().unwrap();
    let sub = dir.path().join("journal");
    let mut writer = JournalWriter::open(&sub, 1000, 1 << 20).unwrap();
    fill(&mut writer, 0..3);
    writer.flush().unwrap();
    // /dev/full is a disk without room.
    let full = fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    writer.break_with(full);
    writer.append(&Input::Record(b"lost")).unwrap();
    assert!(writer.flush().is_err());
    assert_eq!(writer.lost(), 1);
    assert!(!writer.rotate_needed());
    assert!(writer.append(&Input::Record(b"lost")).is_err());
    assert_eq!(writer.lost(), 2);
    writer.flush().unwrap();
    fill(&mut writer, 3..6);
    writer.flush().unwrap();
    assert_eq!(read(&sub).0, [0, 1, 2, 3, 4, 5]);
}

#[test]
fn a_large_preamble_does_not_make_a_segment_of_every_input() {
    let dir = tempfile::tempdir().unwrap();
    let mut writer = JournalWriter::open(dir.path(), 100, 1 << 20).unwrap();
    let preamble: Vec<Fact> = (0..100).map(tick).collect();
    for number in 0..10u64 {
        if writer.rotate_needed() {
            writer.begin_segment(&preamble).unwrap();
        }
        writer.append(&Input::Record(&number.to_le_bytes())).unwrap();
    }
    assert_eq!(names(dir.path()).len(), 1);
}
