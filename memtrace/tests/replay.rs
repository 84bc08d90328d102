//! A journal replays to the same incidents, byte for byte, whatever the pieces it is read in.

use memtrace_engine::input::{Fact, Input};
use memtrace_engine::output::Output;
use memtrace_engine::{Engine, Out};

use memtrace::store::journal::{JournalFrame, SegmentDecoder};
use proptest::prelude::*;

/// A real journal of a kill (tests/golden/README.md).
const CAPTURE: &[u8] = include_bytes!("../../tests/golden/burst.mtj");

/// Feeds the capture in pieces that end at `cuts`; the incident files it gives.
fn replay(cuts: &[usize]) -> Vec<Vec<u8>> {
    let (mut decoder, mut engine, mut out) = (SegmentDecoder::new(), Engine::new(), Out::default());
    let mut cuts: Vec<usize> = cuts.iter().copied().chain([CAPTURE.len()]).collect();
    cuts.sort_unstable();
    let (mut last, mut rest, mut done) = (0, CAPTURE, 0);
    for cut in cuts {
        let (piece, after) = rest.split_at_checked(cut - done).unwrap_or((rest, &[]));
        (rest, done) = (after, cut);
        decoder.push(piece);
        while let Some(frame) = decoder.next_frame() {
            let input = match frame {
                JournalFrame::Input(input) => input,
                JournalFrame::Preamble(fact) => Input::Fact(fact),
            };
            last = input.boot_ns().unwrap_or(0).max(last);
            engine.apply(&input, &mut out);
        }
    }
    decoder.finish();
    assert_eq!((decoder.stopped(), decoder.torn_bytes()), (None, 0));
    engine.apply(&Input::Fact(Fact::Stop { boot_ns: last }), &mut out);
    let file = |output: &Output| match output {
        Output::Save(incident) => memtrace_incident::codec::encode(incident).ok(),
        _ => None,
    };
    out.outputs.iter().filter_map(file).collect()
}

#[test]
fn the_capture_holds_a_kill() {
    assert_eq!(replay(&[]).len(), 1);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn the_pieces_do_not_matter(cuts in prop::collection::vec(0..CAPTURE.len(), 0..200)) {
        prop_assert_eq!(replay(&cuts), replay(&[]));
    }

    #[test]
    fn single_bytes_around_anywhere_do_not_matter(at in 0..CAPTURE.len()) {
        let cuts: Vec<usize> = (at..(at + 64).min(CAPTURE.len())).collect();
        prop_assert_eq!(replay(&cuts), replay(&[]));
    }
}
