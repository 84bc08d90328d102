//! Any bytes as a module, registers and stack: the rule of addresses in it, and where they lead.
#![no_main]

use std::io::Cursor;
use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use memtrace::process::{
    cfi::{Cfi, Machine, Scratch},
    elf::Headers,
    modules::UnwindData,
    rule::{Registers, Rule, Slice, Step},
};

/// Registers, an address, then stack and file.
const HEAD: usize = 5 * 8;

fuzz_target!(|bytes: &[u8]| {
    let Some((head, rest)) = bytes.split_at_checked(HEAD) else { return };
    let word = |at: usize| head.get(at * 8..).and_then(|rest| rest.first_chunk()).map_or(0, |word| u64::from_le_bytes(*word));
    let registers = Registers { ip: word(0), sp: word(1), fp: word(2), lr: (word(3) != 0).then_some(word(3)) };
    let (stack, file) = rest.split_at(rest.len().min(128));
    let Ok(headers) = Headers::read(Cursor::new(file)) else { return };
    let segments = headers.segments.clone();
    let headers = Arc::new(headers);
    let Some(data) = UnwindData::read(headers.clone(), Cursor::new(file), 1 << 20) else { return };
    let Some(unwind) = headers.read_unwind(Cursor::new(file), 1 << 20) else { return };
    let index = Cfi::new(&headers, &unwind, None, Machine::AARCH64).build_index();
    let (mut scratch, slice) = (Scratch::default(), Slice::new(registers.sp, stack));
    let stated = segments.iter().flat_map(|segment| (0..32).map(|step| segment.address + step * (segment.file_bytes / 32).max(1)));
    for address in stated.chain([word(4), registers.ip]).take(256) {
        for cfi in [data.cfi(), Cfi::new(&headers, &unwind, Some(&index), Machine::AARCH64)] {
            let mut work = 1 << 20;
            let step = match cfi.rule(address, &mut scratch, &mut work) {
                Rule::Complex => cfi.step(address, &registers, &slice, &mut scratch, &mut work),
                rule => rule.apply(&registers, &slice),
            };
            assert!(!matches!(step, Step::Caller(Registers { ip: 0, .. }, _)));
        }
    }
});
