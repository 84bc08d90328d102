//! Any bytes as registers, a stack and an ELF file: the rules of addresses in the file are looked
//! up and applied. Both architectures.
#![no_main]

use std::io::Cursor;
use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use memtrace_unwind::cfi::{Cfi, CfiScratch, RegisterColumns};
use memtrace_unwind::elf::ElfHeaders;
use memtrace_unwind::modules::UnwindData;
use memtrace_unwind::rule::{Registers, Rule, StackCopy, UnwindStep};

/// Bytes before stack and file: four registers and an address.
const HEAD: usize = 5 * 8;

fuzz_target!(|bytes: &[u8]| {
    let Some((head, rest)) = bytes.split_at_checked(HEAD) else { return };
    let word = |at: usize| head.get(at * 8..).and_then(|rest| rest.first_chunk()).map_or(0, |word| u64::from_le_bytes(*word));
    let registers = Registers { ip: word(0), sp: word(1), fp: word(2), lr: (word(3) != 0).then_some(word(3)) };
    let (stack, file) = rest.split_at(rest.len().min(128));
    let Ok(headers) = ElfHeaders::read(Cursor::new(file)) else { return };
    let segments = headers.segments.clone();
    let headers = Arc::new(headers);
    let Some(data) = UnwindData::read(headers.clone(), Cursor::new(file), 1 << 20) else { return };
    let Some(unwind) = headers.read_unwind(Cursor::new(file), 1 << 20) else { return };
    let index = Cfi::new(&headers, &unwind, None, RegisterColumns::AARCH64).build_index();
    let (mut scratch, stack) = (CfiScratch::default(), StackCopy::new(registers.sp, stack));
    let stated = segments.iter().flat_map(|segment| (0..32).map(|step| segment.address + step * (segment.file_bytes / 32).max(1)));
    for address in stated.chain([word(4), registers.ip]).take(256) {
        for cfi in [data.cfi(), Cfi::new(&headers, &unwind, Some(&index), RegisterColumns::AARCH64)] {
            let mut work = 1 << 20;
            let step = match cfi.rule(address, &mut scratch, &mut work) {
                Rule::Complex => cfi.step(address, &registers, &stack, &mut scratch, &mut work),
                rule => rule.apply(&registers, &stack),
            };
            assert!(!matches!(step, UnwindStep::Caller(Registers { ip: 0, .. }, _)));
        }
    }
});
