//! Any bytes as a journal segment, as they are and as frames with sound checksums: the pieces they come in do not
//! matter, and every byte is accounted for.
#![no_main]

use libfuzzer_sys::fuzz_target;
use memtrace::store::journal::{MAGIC, SegmentDecoder, SegmentEnd, VERSION};

/// Everything a decoder says about a segment that comes in pieces of `size`.
fn decoded(segment: &[u8], size: usize) -> (Vec<String>, u64, u64, u64, Option<SegmentEnd>) {
    let (mut decoder, mut frames) = (SegmentDecoder::new(), Vec::new());
    for chunk in segment.chunks(size) {
        decoder.push(chunk);
        while let Some(frame) = decoder.next_frame() {
            frames.push(format!("{frame:?}"));
        }
    }
    decoder.finish();
    assert!(decoder.next_frame().is_none(), "a frame after the end");
    (frames, decoder.frames(), decoder.unknown(), decoder.torn_bytes(), decoder.stopped())
}

fn check(segment: &[u8], size: usize) {
    let whole = decoded(segment, segment.len().max(1));
    assert_eq!(whole, decoded(segment, size), "in pieces of {size}");
    let (frames, total, unknown, torn, stopped) = whole;
    assert_eq!(frames.len() as u64 + unknown, total);
    assert!(torn <= segment.len() as u64);
    assert!(stopped.is_some() || torn == 0, "bytes given up and not said why");
}

/// `{u8 kind, u16 len, payload}` each as a frame that checks out.
fn framed(mut bytes: &[u8]) -> Vec<u8> {
    let mut segment = [MAGIC.as_slice(), &VERSION.to_le_bytes()].concat();
    while let Some((head, rest)) = bytes.split_first_chunk::<3>() {
        let len = usize::from(u16::from_le_bytes([head[1], head[2]])).min(rest.len());
        let (payload, after) = rest.split_at(len);
        let mut hasher = crc32fast::Hasher::new();
        hasher.update(&head[..1]);
        hasher.update(payload);
        segment.extend_from_slice(&u32::try_from(len).unwrap_or_default().to_le_bytes());
        segment.extend_from_slice(&hasher.finalize().to_le_bytes());
        segment.push(head[0]);
        segment.extend_from_slice(payload);
        bytes = after;
    }
    segment
}

fuzz_target!(|bytes: &[u8]| {
    let Some((size, bytes)) = bytes.split_first() else { return };
    let size = usize::from(*size).max(1);
    check(bytes, size);
    check(&framed(bytes), size);
});
