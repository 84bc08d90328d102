//! What the Rust workloads share: pages touched in memory of the allocator, uneven sizes, the line that tells the truth.

use std::hint::black_box;

/// Bytes of a mebibyte.
pub const MIB: usize = 1 << 20;
/// Bytes of a page.
pub const PAGE: usize = 4096;

/// Bytes of a share, less with `TRUTH_SCALE` in the environment.
pub fn scaled(bytes: usize) -> usize {
    bytes / std::env::var("TRUTH_SCALE").ok().and_then(|text| text.parse().ok()).unwrap_or(1usize).max(1)
}

/// Microseconds to wait after each page, so that another tracer can follow.
pub fn pace() -> Option<std::time::Duration> {
    let micros = std::env::var("TRUTH_PACE_US").ok().and_then(|text| text.parse().ok())?;
    Some(std::time::Duration::from_micros(micros))
}

/// Fresh memory of the allocator, every page touched once in the function this is inlined into.
#[inline(always)]
pub fn dirty(bytes: usize, pace: Option<std::time::Duration>) -> Vec<u8> {
    let mut memory: Vec<u8> = Vec::with_capacity(bytes);
    for page in memory.spare_capacity_mut().chunks_mut(PAGE) {
        black_box(page)[0].write(1);
        if let Some(pace) = pace {
            std::thread::sleep(pace);
        }
    }
    memory
}

/// Sizes without a common period with any sampling quantum.
pub struct Uneven(pub u32);

impl Uneven {
    /// The next one: `least` pages and up to 190 more.
    pub fn next(&mut self, least: usize) -> usize {
        self.0 = self.0.wrapping_mul(1_103_515_245).wrapping_add(12_345);
        (least + (self.0 >> 16) as usize % 190) * PAGE
    }
}

/// Says how much each function touched: `touch` when it was the innermost of the list, `within` with what it called.
pub fn tell(workload: &str, touch: &[(&str, usize)], within: &[(&str, usize)]) {
    let list = |list: &[(&str, usize)]| {
        let parts: Vec<String> = list.iter().map(|(name, bytes)| format!("\"{name}\": {bytes}")).collect();
        parts.join(", ")
    };
    let (touch, within) = (list(touch), list(within));
    println!("{{\"workload\": \"{workload}\", \"touch\": {{{touch}}}, \"within\": {{{within}}}}}");
}

/// Two functions that take from the allocator in turn: one in large uneven pieces, one in boxes. Nothing is given back:
/// an allocator keeps what it has, and what is taken again is not fresh.
pub mod allocator {
    use super::{MIB, Uneven, dirty, tell};

    /// Large pieces, touched page by page.
    #[inline(never)]
    pub fn large_pieces(held: &mut Vec<Vec<u8>>, bytes: usize) -> usize {
        held.push(dirty(bytes, super::pace()));
        std::hint::black_box(held);
        bytes
    }

    /// Boxes of so many words, filled.
    #[inline(never)]
    pub fn many_boxes<const WORDS: usize>(held: &mut Vec<Box<[u64; WORDS]>>, bytes: usize) -> usize {
        let count = bytes.div_ceil(WORDS * 8);
        for number in 0..count {
            held.push(Box::new([number as u64; WORDS]));
        }
        std::hint::black_box(held);
        count * WORDS * 8
    }

    /// The whole workload. `WORDS`: of a box, in a size class for which what the allocator wants for itself and what it
    /// rounds up to is little, for that is memory of `many_boxes` too, and not in its truth.
    pub fn run<const WORDS: usize>(workload: &str) {
        let (mut large, mut boxed) = (0, 0);
        // room enough from the start: a list that moves would touch memory of its own
        let mut pieces = Vec::with_capacity(8192);
        let mut boxes = Vec::with_capacity(130 * MIB / WORDS / 8);
        let mut uneven = Uneven(23);
        while large < 192 * MIB || boxed < 128 * MIB {
            if large < 192 * MIB {
                large += large_pieces(&mut pieces, uneven.next(64));
            }
            if boxed < 128 * MIB {
                boxed += many_boxes::<WORDS>(&mut boxes, uneven.next(3));
            }
        }
        tell(workload, &[("large_pieces", large), ("many_boxes", boxed)], &[]);
        std::hint::black_box((pieces, boxes));
    }
}
