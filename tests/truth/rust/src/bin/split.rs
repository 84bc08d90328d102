//! Shipped without symbols, with the debug information in a file of its own.

use std::hint::black_box;

use memtrace_truth::{MIB, Uneven, dirty, scaled, tell};

#[inline(never)]
fn split_left(held: &mut Vec<Vec<u8>>, bytes: usize) -> usize {
    held.push(dirty(bytes, memtrace_truth::pace()));
    black_box(held);
    bytes
}

#[inline(never)]
fn split_right(held: &mut Vec<Vec<u8>>, bytes: usize) -> usize {
    let memory = dirty(bytes, memtrace_truth::pace());
    held.push(memory);
    black_box(bytes)
}

fn main() {
    let shares = [128 * MIB, 192 * MIB].map(scaled);
    let (mut left, mut right) = (0, 0);
    let mut held = Vec::with_capacity(16 << 10);
    let mut uneven = Uneven(31);
    while left < shares[0] || right < shares[1] {
        if left < shares[0] {
            left += split_left(&mut held, uneven.next(33));
        }
        if right < shares[1] {
            right += split_right(&mut held, uneven.next(33));
        }
    }
    tell("split", &[("split_left", left), ("split_right", right)], &[]);
    black_box(held);
}
