//! Files, registers and stacks that nobody compiled: nothing panics, nothing hangs, and what arm64 says is understood.

use std::io::Cursor;
use std::sync::{Arc, LazyLock};

use proptest::prelude::*;

use super::cfi::{Cfi, Machine, Scratch};
use super::elf::Headers;
use super::known::Processes;
use super::modules::UnwindData;
use super::proc_dir::ProcDir;
use super::rule::{Missing, Registers, Rule, Slice, Step};
use super::tests::compile;

/// A small library with the unwind information of C++.
static LIBRARY: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let dir = tempfile::tempdir().unwrap();
    let source = "#include <stdexcept>\n#include <string>\nint f(int n) { try { if (n > 3) throw std::runtime_error(std::string(n, 'x')); return f(n + 1); } catch (std::exception &e) { return e.what()[0]; } }";
    let path = dir.path().join("lib.so");
    compile("g++", &path, source, &["-shared", "-fPIC"]);
    std::fs::read(path).unwrap()
});

/// Asks for the rule of each of a module's addresses and follows it.
fn walk_everything(bytes: &[u8], registers: Registers, stack: &[u8]) {
    let Ok(headers) = Headers::read(Cursor::new(bytes)) else { return };
    let segments = headers.segments.clone();
    let Some(data) = UnwindData::read(Arc::new(headers), Cursor::new(bytes), 1 << 20) else { return };
    let (mut scratch, slice) = (Scratch::default(), Slice::new(registers.sp, stack));
    for segment in segments.iter().filter(|segment| segment.executable).take(4) {
        for at in (0..segment.file_bytes.min(0x4000)).step_by(7) {
            let (address, mut work) = (segment.address + at, 1 << 20);
            match data.cfi().rule(address, &mut scratch, &mut work) {
                Rule::Complex => data.cfi().step(address, &registers, &slice, &mut scratch, &mut work),
                rule => rule.apply(&registers, &slice),
            };
        }
    }
}

fn registers() -> impl Strategy<Value = Registers> {
    let extreme =
        prop_oneof![any::<u64>(), Just(0), Just(u64::MAX), Just(u64::MAX - 7), Just(1 << 63), 0x7000_u64..0x8000];
    (extreme.clone(), extreme.clone(), extreme.clone(), proptest::option::of(extreme))
        .prop_map(|(ip, sp, fp, lr)| Registers { ip, sp, fp, lr })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn flipped_bytes_of_unwind_information(
        flips in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 1..40),
        registers in registers(),
        stack in proptest::collection::vec(any::<u8>(), 0..512),
    ) {
        let mut bytes = LIBRARY.clone();
        let headers = Headers::read(Cursor::new(&bytes)).unwrap();
        let (hdr, frame) = (headers.eh_frame_hdr.unwrap().file, headers.eh_frame.unwrap().file);
        let places: Vec<usize> = hdr.chain(frame).map(|at| at as usize).collect();
        for (at, byte) in flips {
            bytes[places[at.index(places.len())]] = byte;
        }
        walk_everything(&bytes, registers, &stack);
    }

    #[test]
    fn flipped_bytes_of_headers(
        flips in proptest::collection::vec((0..0x400_usize, any::<u8>()), 1..20),
        cut in any::<proptest::sample::Index>(),
        registers in registers(),
    ) {
        let mut bytes = LIBRARY.clone();
        for (at, byte) in flips {
            bytes[at] = byte;
        }
        walk_everything(&bytes, registers, &[]);
        bytes.truncate(cut.index(bytes.len()));
        walk_everything(&bytes, registers, &[]);
    }

    #[test]
    fn any_registers_and_stack_of_this_process(
        registers in registers(),
        inside in any::<proptest::sample::Index>(),
        words in proptest::collection::vec((any::<bool>(), any::<proptest::sample::Index>(), any::<u64>()), 0..600),
        chain in proptest::collection::vec(any::<u64>(), 0..127),
    ) {
        let pid = std::process::id();
        let start = ProcDir::of(pid).unwrap().start_ticks().unwrap() * 10_000_000;
        let maps = super::maps::Maps::parse(&std::fs::read("/proc/self/maps").unwrap());
        let code = |at: &proptest::sample::Index| {
            let mapping = &maps.all()[at.index(maps.all().len())];
            mapping.start + at.index((mapping.end - mapping.start) as usize) as u64
        };
        // Return addresses into real code among words that are none.
        let slice: Vec<u8> = words.iter().flat_map(|(is_code, at, word)| if *is_code { code(at) } else { *word }.to_le_bytes()).collect();
        let mut processes = Processes::default();
        let registers = Registers { ip: code(&inside), ..registers };
        let stack = processes.unwind(pid, start, registers, &slice, &chain);
        prop_assert!((1..=super::unwind::MAX_FRAMES).contains(&stack.frames.len()));
        prop_assert_eq!(processes.frames(&stack).len(), stack.frames.len());
    }
}

#[test]
fn an_expression_that_jumps_backwards_ends() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("lib.so");
    // DW_CFA_def_cfa_expression, 3 bytes: DW_OP_skip -3.
    let source = r#"__asm__(".text\n.globl loop\nloop:\n.cfi_startproc\n.cfi_escape 0x0f,3,0x2f,0xfd,0xff\nnop\nnop\nret\n.cfi_endproc\n");"#;
    compile("gcc", &path, source, &["-shared", "-fPIC", "-nostdlib"]);
    let bytes = std::fs::read(path).unwrap();
    let headers = Headers::read(Cursor::new(&bytes)).unwrap();
    let start = headers.segments.iter().find(|segment| segment.executable).unwrap().address;
    let data = UnwindData::read(Arc::new(headers), Cursor::new(&bytes), 1 << 20).unwrap();
    let (mut scratch, mut work) = (Scratch::default(), 1 << 20);
    let rule = data.cfi().rule(start, &mut scratch, &mut work);
    assert_eq!(rule, Rule::Complex);
    let registers = Registers { ip: start, sp: 0x1000, fp: 0, lr: None };
    let step = data.cfi().step(start, &registers, &Slice::new(0x1000, &[0; 64]), &mut scratch, &mut work);
    assert_eq!(step, Step::Broken);
}

/// The columns of arm64, as any assembler writes them when they are numbers.
#[test]
fn arm64_returns_through_its_link_register() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("lib.so");
    let source = r#"__asm__(".text\n.cfi_startproc\n.cfi_return_column 30\n.cfi_def_cfa 31, 0\nnop\n.cfi_def_cfa_offset 32\n.cfi_offset 29, -32\n.cfi_offset 30, -24\nnop\n.cfi_def_cfa 29, 32\nnop\n.cfi_undefined 30\nnop\n.cfi_endproc\n");"#;
    compile("gcc", &path, source, &["-shared", "-fPIC", "-nostdlib"]);
    let bytes = std::fs::read(path).unwrap();
    let headers = Headers::read(Cursor::new(&bytes)).unwrap();
    let unwind = headers.read_unwind(Cursor::new(&bytes), 1 << 20).unwrap();
    let start = headers.segments.iter().find(|segment| segment.executable).unwrap().address;
    let cfi = Cfi::new(&headers, &unwind, None, Machine::AARCH64);
    let (mut scratch, mut work) = (Scratch::default(), 1 << 20);
    let mut rule = |at: u64| cfi.rule(start + at, &mut scratch, &mut work);
    let words: Vec<u8> = [0x7100_u64, 0xaaaa, 3, 4].iter().flat_map(|word| word.to_le_bytes()).collect();
    let stack = Slice::new(0x7000, &words);
    let leaf = Registers { ip: 0x10, sp: 0x7000, fp: 0x7050, lr: Some(0xbbbb) };
    let caller = |ip, sp, fp| Step::Caller(Registers { ip, sp, fp, lr: None }, false);
    assert_eq!(rule(0).apply(&leaf, &stack), caller(0xbbbb, 0x7000, 0x7050));
    assert_eq!(rule(0).apply(&Registers { lr: None, ..leaf }, &stack), Step::Missing(Missing::Elsewhere));
    assert_eq!(rule(1).apply(&leaf, &stack), caller(0xaaaa, 0x7020, 0x7100));
    assert_eq!(rule(2).apply(&Registers { fp: 0x7000, ..leaf }, &stack), caller(0xaaaa, 0x7020, 0x7100));
    assert_eq!(rule(3), Rule::Outermost);
}
