//! Damaged files, made-up registers and stacks: nothing panics, nothing hangs. And the CFI of
//! arm64, on any machine.

use std::io::Cursor;
use std::sync::{Arc, LazyLock};

use proptest::prelude::*;

use crate::cfi::{Cfi, CfiScratch, RegisterColumns};
use crate::elf::{ElfHeaders, ElfSection, UnwindSections};
use crate::modules::UnwindData;
use crate::proc_dir::ProcDir;
use crate::process_cache::{ProcessCache, SampleMoment};
use crate::rule::{MissingWord, Registers, Rule, StackCopy, UnwindStep};

const EXCEPTIONS: &str = r#"
    #include <stdexcept>
    #include <string>
    int f(int n) {
        try {
            if (n > 3) throw std::runtime_error(std::string(n, 'x'));
            return f(n + 1);
        } catch (std::exception &e) {
            return e.what()[0];
        }
    }
"#;
/// A small library with the unwind information of C++.
static LIBRARY: LazyLock<Vec<u8>> = LazyLock::new(|| shared_object("g++", "lib.cc", EXCEPTIONS, &[]));

fn shared_object(compiler: &str, file: &str, source: &str, flags: &[&str]) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let (source_path, out) = (dir.path().join(file), dir.path().join("lib.so"));
    std::fs::write(&source_path, source).unwrap();
    let mut command = std::process::Command::new(compiler);
    command.args(["-O2", "-fomit-frame-pointer", "-w", "-shared", "-fPIC"]).args(flags);
    let output = command.arg(&source_path).arg("-o").arg(&out).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    std::fs::read(out).unwrap()
}

/// A library of assembly: nothing but `source` in its text section.
fn assembled(source: &str) -> Vec<u8> {
    shared_object("gcc", "lib.c", &format!("__asm__({source:?});"), &["-nostdlib"])
}

/// Looks up the rule at many addresses of a module and applies it.
fn walk_everything(bytes: &[u8], registers: Registers, stack: &[u8]) {
    let Ok(headers) = ElfHeaders::read(Cursor::new(bytes)) else { return };
    let segments = headers.segments.clone();
    let Some(data) = UnwindData::read(Arc::new(headers), Cursor::new(bytes), 1 << 20) else { return };
    let (mut scratch, slice) = (CfiScratch::default(), StackCopy::new(registers.sp, stack));
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
        let headers = ElfHeaders::read(Cursor::new(&bytes)).unwrap();
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
        let maps = crate::maps::Maps::parse(&std::fs::read("/proc/self/maps").unwrap());
        let code = |at: &proptest::sample::Index| {
            let mapping = &maps.all()[at.index(maps.all().len())];
            mapping.start + at.index((mapping.end - mapping.start) as usize) as u64
        };
        // Return addresses into real code among words that are none.
        let stack_copy: Vec<u8> = words.iter().flat_map(|(is_code, at, word)| if *is_code { code(at) } else { *word }.to_le_bytes()).collect();
        let mut processes = ProcessCache::default();
        let registers = Registers { ip: code(&inside), ..registers };
        let stack = processes.unwind(SampleMoment::now((pid, start)), registers, &stack_copy, &chain).unwrap();
        prop_assert!((1..=crate::unwind::MAX_FRAMES).contains(&stack.frames.len()));
        let modules = stack.frames.iter().filter_map(|frame| frame.module);
        prop_assert!(modules.into_iter().all(|id| processes.module(id).is_some()));
    }
}

#[test]
fn an_expression_that_jumps_backwards_ends() {
    // DW_CFA_def_cfa_expression, 3 bytes: DW_OP_skip -3.
    let bytes = assembled(
        ".text\n.globl loop\nloop:\n.cfi_startproc\n.cfi_escape 0x0f,3,0x2f,0xfd,0xff\nnop\nnop\nret\n.cfi_endproc\n",
    );
    let headers = ElfHeaders::read(Cursor::new(&bytes)).unwrap();
    let start = headers.segments.iter().find(|segment| segment.executable).unwrap().address;
    let data = UnwindData::read(Arc::new(headers), Cursor::new(&bytes), 1 << 20).unwrap();
    let (mut scratch, mut work) = (CfiScratch::default(), 1 << 20);
    let rule = data.cfi().rule(start, &mut scratch, &mut work);
    assert_eq!(rule, Rule::Complex);
    let registers = Registers { ip: start, sp: 0x1000, fp: 0, lr: None };
    let step = data.cfi().step(start, &registers, &StackCopy::new(0x1000, &[0; 64]), &mut scratch, &mut work);
    assert_eq!(step, UnwindStep::Broken);
}

/// The CIE of an entry says with a string of megabytes what it has, or something unknown.
#[test]
fn entries_that_are_broken_take_of_the_work_of_a_stack() {
    let (hdr_at, frame_at, code_at) = (0x1000_u64, 0x2000_u64, 0x80_0000_u64);
    for augmentation_bytes in [3, 4 << 20] {
        let mut frame = Vec::new();
        // Length, id, version, augmentation.
        frame.extend((4 + 1 + augmentation_bytes as u32 + 4).to_le_bytes());
        frame.extend(0_u32.to_le_bytes());
        frame.push(1);
        frame.extend(vec![b'!'; augmentation_bytes]);
        frame.extend([0; 4]);
        let entry = frame.len() as u32;
        frame.extend(24_u32.to_le_bytes());
        frame.extend((entry + 4).to_le_bytes());
        [code_at, 16].iter().for_each(|long| frame.extend(long.to_le_bytes()));
        frame.extend([0; 8]);
        let mut hdr = vec![1, 0x1b, 3, 0x3b, 0, 0, 0, 0, 1, 0, 0, 0];
        hdr.extend(((code_at - hdr_at) as i32).to_le_bytes());
        hdr.extend(((frame_at - hdr_at) as i32 + entry as i32).to_le_bytes());
        let section = |address| Some(ElfSection { file: 0..1, address });
        let headers =
            ElfHeaders { eh_frame: section(frame_at), eh_frame_hdr: section(hdr_at), ..ElfHeaders::default() };
        let unwind = UnwindSections {
            eh_frame: Some(frame.into()),
            eh_frame_hdr: Some(hdr.into()),
            ..UnwindSections::default()
        };
        let cfi = Cfi::new(&headers, &unwind, None, RegisterColumns::NATIVE);
        let (mut scratch, mut work) = (CfiScratch::default(), 1 << 20);
        let mut lookups = 0;
        while work > 0 && lookups < 1 << 20 {
            assert_eq!(cfi.rule(code_at, &mut scratch, &mut work), Rule::Broken);
            lookups += 1;
        }
        assert!(work == 0 && lookups <= 1 << 15, "{lookups} lookups leave {work}");
    }
}

/// Numbered columns: an assembler for any architecture writes those of arm64.
#[test]
fn arm64_returns_through_its_link_register() {
    let bytes = assembled(
        ".text\n.cfi_startproc\n.cfi_return_column 30\n.cfi_def_cfa 31, 0\nnop\n\
         .cfi_def_cfa_offset 32\n.cfi_offset 29, -32\n.cfi_offset 30, -24\nnop\n\
         .cfi_def_cfa 29, 32\nnop\n.cfi_undefined 30\nnop\n.cfi_endproc\n",
    );
    let headers = ElfHeaders::read(Cursor::new(&bytes)).unwrap();
    let unwind = headers.read_unwind(Cursor::new(&bytes), 1 << 20).unwrap();
    let start = headers.segments.iter().find(|segment| segment.executable).unwrap().address;
    let cfi = Cfi::new(&headers, &unwind, None, RegisterColumns::AARCH64);
    let (mut scratch, mut work) = (CfiScratch::default(), 1 << 20);
    let mut rule = |at: u64| cfi.rule(start + at, &mut scratch, &mut work);
    let words: Vec<u8> = [0x7100_u64, 0xaaaa, 3, 4].iter().flat_map(|word| word.to_le_bytes()).collect();
    let stack = StackCopy::new(0x7000, &words);
    let leaf = Registers { ip: 0x10, sp: 0x7000, fp: 0x7050, lr: Some(0xbbbb) };
    let caller = |ip, sp, fp| UnwindStep::Caller(Registers { ip, sp, fp, lr: None }, false);
    assert_eq!(rule(0).apply(&leaf, &stack), caller(0xbbbb, 0x7000, 0x7050));
    assert_eq!(rule(0).apply(&Registers { lr: None, ..leaf }, &stack), UnwindStep::Missing(MissingWord::Elsewhere));
    assert_eq!(rule(1).apply(&leaf, &stack), caller(0xaaaa, 0x7020, 0x7100));
    assert_eq!(rule(2).apply(&Registers { fp: 0x7000, ..leaf }, &stack), caller(0xaaaa, 0x7020, 0x7100));
    assert_eq!(rule(3), Rule::Outermost);
}

/// A program that its user may run and not read has no functions for him, also while its file is open
/// for another process.
#[test]
fn a_file_that_is_open_for_one_process_is_checked_for_the_next() {
    use crate::maps::{MAX_BYTES, Maps};
    use crate::modules::{Modules, Reader};
    use crate::proc_dir::Credentials;
    use crate::unwind::MappedModule;
    use std::os::unix::fs::PermissionsExt;

    let dir = tempfile::tempdir().unwrap();
    let program = dir.path().join("program");
    std::fs::copy("/bin/sleep", &program).unwrap();
    std::fs::set_permissions(&program, PermissionsExt::from_mode(0o711)).unwrap();
    let mut child = std::process::Command::new(&program).arg("60").spawn().unwrap();
    let of_child = Arc::new(ProcDir::of(child.id()).unwrap());
    let own = of_child.credentials().unwrap();
    let other = Credentials { users: vec![u32::MAX - 7; 4], groups: Vec::new(), ..own.clone() };
    // A program that begins is mapped piece by piece.
    let find = || {
        let maps = Maps::parse(&of_child.read("maps", MAX_BYTES)?);
        maps.all().iter().find(|mapping| mapping.path.ends_with("/program")).cloned()
    };
    let mapping = std::iter::repeat_with(find).flatten().next().unwrap();
    let mut modules = Modules::default();
    let mut open = |credentials: &Credentials| {
        let reader = Reader { dir: of_child.clone(), credentials: Arc::new(credentials.clone()) };
        let found = modules.lookup_or_insert(&reader, &mapping);
        let MappedModule::Read(id, _) = found else { panic!("{found:?}") };
        let module = modules.get(id).unwrap();
        (id, module.file().is_some(), module.headers().is_some())
    };
    let (first, second, third) = (open(&own), open(&other), open(&own));
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!((first.1, first.2), (true, true), "its own user may read it");
    assert_eq!((second.1, second.2), (false, false), "another may not");
    assert_eq!(first, third);
}
