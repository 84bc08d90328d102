//! Generic code, and a function that is inlined and known to the debug information alone; with a dynamic call and a
//! closure between them and `main`. Nothing is given back.

use std::hint::black_box;

use memtrace_truth::{MIB, Uneven, dirty, scaled, tell};

type Held = Vec<Vec<u8>>;

/// One function a type, of one name.
#[inline(never)]
fn generic_touch<T: Default>(held: &mut Held, bytes: usize) -> usize {
    held.push(dirty(bytes, memtrace_truth::pace()));
    black_box(T::default());
    bytes
}

/// Has no symbol of its own.
#[inline(always)]
fn inlined_touch(held: &mut Held, bytes: usize) -> usize {
    held.push(dirty(bytes, memtrace_truth::pace()));
    bytes
}

#[inline(never)]
fn for_numbers(held: &mut Held, bytes: usize) -> usize {
    black_box(generic_touch::<u8>(held, bytes))
}

#[inline(never)]
fn for_texts(held: &mut Held, bytes: usize) -> usize {
    black_box(generic_touch::<String>(held, bytes))
}

trait Work {
    fn work(&self, held: &mut Held, bytes: usize) -> usize;
}

struct Inlining;

impl Work for Inlining {
    #[inline(never)]
    fn work(&self, held: &mut Held, bytes: usize) -> usize {
        let taken = inlined_touch(held, bytes);
        black_box(held);
        taken
    }
}

#[inline(never)]
fn through(depth: usize, work: &mut dyn FnMut() -> usize) -> usize {
    if depth == 0 { work() } else { black_box(through(depth - 1, work)) }
}

fn main() {
    let shares = [96 * MIB, 144 * MIB, 192 * MIB].map(scaled);
    let mut done = [0; 3];
    let mut held = Vec::with_capacity(16 << 10);
    let mut uneven = Uneven(29);
    let inlining: Box<dyn Work> = black_box(Box::new(Inlining));
    while (0..3).any(|i| done[i] < shares[i]) {
        if done[0] < shares[0] {
            done[0] += through(3, &mut || for_numbers(&mut held, uneven.next(33)));
        }
        if done[1] < shares[1] {
            done[1] += through(5, &mut || for_texts(&mut held, uneven.next(33)));
        }
        if done[2] < shares[2] {
            done[2] += through(2, &mut || inlining.work(&mut held, uneven.next(33)));
        }
    }
    let touch = [("for_numbers", done[0]), ("for_texts", done[1]), ("inlined_touch", done[2])];
    tell("generic", &touch, &[("generic_touch", done[0] + done[1])]);
    black_box(held);
}
