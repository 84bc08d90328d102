//! Tests of the BTF reader: hand-built files, the running kernel, arbitrary bytes.

use memtrace_common::layout::{ABSENT, KernelLayout};
use proptest::prelude::*;

use super::*;
use crate::kernel::facts::KERNEL_BTF;
use crate::of_machine;

/// Builds BTF by hand; `add` answers with the new type's number.
struct Builder {
    types: Vec<u8>,
    strings: Vec<u8>,
    count: u32,
}

impl Builder {
    fn new() -> Self {
        Self { types: Vec::new(), strings: vec![0], count: 0 }
    }

    fn name(&mut self, name: &str) -> u32 {
        if name.is_empty() {
            return 0;
        }
        let at = self.strings.len() as u32;
        self.strings.extend_from_slice(name.as_bytes());
        self.strings.push(0);
        at
    }

    fn add(&mut self, name: &str, kind: u32, flag: bool, vlen: u32, size_or_type: u32, tail: &[u32]) -> u32 {
        let name = self.name(name);
        let info = kind << 24 | u32::from(flag) << 31 | vlen;
        for value in [name, info, size_or_type].iter().chain(tail) {
            self.types.extend_from_slice(&value.to_le_bytes());
        }
        self.count += 1;
        self.count
    }

    fn int(&mut self, size: u32) -> u32 {
        self.add("int", kind::INT, false, 0, size, &[size * 8])
    }

    fn ptr(&mut self, to: u32) -> u32 {
        self.add("", kind::PTR, false, 0, to, &[])
    }

    /// Members are (name, type, bit offset word).
    fn aggregate(&mut self, name: &str, kind: u32, flag: bool, size: u32, members: &[(&str, u32, u32)]) -> u32 {
        let tail: Vec<u32> = members.iter().flat_map(|(name, id, place)| [self.name(name), *id, *place]).collect();
        self.add(name, kind, flag, members.len() as u32, size, &tail)
    }

    fn proto(&mut self, params: &[u32]) -> u32 {
        let tail: Vec<u32> = params.iter().flat_map(|id| [0, *id]).collect();
        self.add("", kind::FUNC_PROTO, false, params.len() as u32, 0, &tail)
    }

    fn build(&self) -> Vec<u8> {
        let mut out = vec![0x9f, 0xeb, 1, 0];
        let header = [24, 0, self.types.len() as u32, self.types.len() as u32, self.strings.len() as u32];
        for value in header {
            out.extend_from_slice(&value.to_le_bytes());
        }
        out.extend_from_slice(&self.types);
        out.extend_from_slice(&self.strings);
        out
    }

    fn parse(&self) -> Btf {
        Btf::parse(&self.build()).unwrap()
    }
}

/// A small kernel: nested anonymous members, bitfields, arrays, tracepoints, enums.
fn sample() -> Builder {
    let mut b = Builder::new();
    let int = b.int(4);
    let long = b.int(8);
    let element = b.aggregate("percpu_counter", kind::STRUCT, false, 40, &[("lock", int, 0), ("count", long, 64)]);
    let array = b.add("", kind::ARRAY, false, 0, 0, &[element, int, 4]);
    let array_alias = b.add("counters_t", kind::TYPEDEF, false, 0, array, &[]);
    let inner = b.aggregate("", kind::UNION, false, 8, &[("deep", long, 0), ("__parent", long, 0)]);
    let anonymous = b.aggregate("", kind::STRUCT, false, 16, &[("first", long, 0), ("", inner, 64)]);
    let qualified = b.add("", kind::CONST, false, 0, anonymous, &[]);
    let counter = b.aggregate("page_counter", kind::STRUCT, false, 16, &[("usage", long, 0), ("max", long, 64)]);
    let counter_alias = b.add("page_counter_t", kind::TYPEDEF, false, 0, counter, &[]);
    let volatile = b.add("", kind::VOLATILE, false, 0, counter_alias, &[]);
    b.aggregate(
        "mm",
        kind::STRUCT,
        true,
        160,
        &[
            ("flags", int, 3 << 24),
            ("owner", long, 64),
            ("", qualified, 128),
            ("rss", array_alias, 256),
            ("memory", volatile, 512),
        ],
    );
    let narrow = b.add("narrow", kind::INT, false, 0, 4, &[3]);
    b.aggregate("old", kind::STRUCT, false, 8, &[("odd", int, 3), ("bits", narrow, 0), ("whole", int, 32)]);
    let (low, high) = (b.name("LOW"), b.name("HIGH"));
    b.add("e", kind::ENUM, false, 2, 4, &[low, 3, high, 9]);
    let (big, small) = (b.name("BIG"), b.name("SMALL"));
    b.add("e64", kind::ENUM64, false, 2, 8, &[big, 1, 1, small, 7, 0]);
    let negative = b.name("NEGATIVE");
    b.add("s", kind::ENUM, true, 1, 4, &[negative, u32::MAX]);
    let void = b.ptr(0);
    let proto = b.proto(&[void, void, int]);
    let to_proto = b.ptr(proto);
    b.add("btf_trace_mark_victim", kind::TYPEDEF, false, 0, to_proto, &[]);
    b.add("oom_kill_process", kind::FUNC, false, 0, proto, &[]);
    b.add("float", kind::FLOAT, false, 0, 4, &[]);
    b.add("tag", kind::DECL_TAG, false, 0, int, &[0]);
    b.add("tag", kind::TYPE_TAG, false, 0, int, &[]);
    b.add("forward", kind::FWD, false, 0, 0, &[]);
    b.add("variable", kind::VAR, false, 0, int, &[1]);
    b.add(".data", kind::DATASEC, false, 1, 4, &[1, 0, 4]);
    b
}

#[test]
fn members_are_found_through_anonymous_structs_typedefs_and_qualifiers() {
    let btf = sample().parse();
    let member = |paths| btf.resolve(&FieldSource::Member("mm", paths));
    assert_eq!(member("owner"), Some(8));
    assert_eq!(member("first"), Some(16));
    assert_eq!(member("deep"), Some(24));
    assert_eq!(member("parent|__parent"), Some(24));
    assert_eq!(member("absent.deep|owner"), Some(8), "alternatives are whole paths");
    assert_eq!(member("rss"), Some(32));
    assert_eq!(member("memory.max"), Some(72));
    assert_eq!(member("rss.count"), None, "an array is not descended into");
    assert_eq!(member("flags"), None, "a bitfield has no byte offset");
    assert_eq!(member("owner.x"), None);
    assert_eq!(member(""), None);
    assert_eq!(member("."), None);
    assert_eq!(btf.resolve(&FieldSource::Member("nothing", "owner")), None);
    assert_eq!(btf.resolve(&FieldSource::Size("percpu_counter")), Some(40));
    assert_eq!(btf.resolve(&FieldSource::Size("forward")), None);
}

#[test]
fn bitfields_of_the_old_encoding_are_refused() {
    let btf = sample().parse();
    let member = |path| btf.resolve(&FieldSource::Member("old", path));
    assert_eq!((member("odd"), member("bits"), member("whole")), (None, None, Some(4)));
}

#[test]
fn arrays_enumerators_tracepoints_and_functions() {
    let btf = sample().parse();
    assert_eq!(btf.resolve(&FieldSource::IsArrayOf("mm", "rss", "percpu_counter")), Some(1));
    assert_eq!(btf.resolve(&FieldSource::IsArrayOf("mm", "rss", "other")), Some(0));
    assert_eq!(btf.resolve(&FieldSource::IsArrayOf("mm", "owner", "percpu_counter")), Some(0));
    assert_eq!(btf.resolve(&FieldSource::IsArrayOf("mm", "none", "percpu_counter")), None);
    let value = |name| btf.resolve(&FieldSource::Enumerator(name));
    assert_eq!((value("LOW"), value("HIGH"), value("SMALL")), (Some(3), Some(9), Some(7)));
    assert_eq!((value("BIG"), value("NEGATIVE"), value("NONE")), (None, None, None));
    assert_eq!(btf.resolve(&FieldSource::TracepointArgs("mark_victim")), Some(2));
    assert_eq!(btf.resolve(&FieldSource::TracepointArgIsPointer("mark_victim", 0)), Some(1));
    assert_eq!(btf.resolve(&FieldSource::TracepointArgIsPointer("mark_victim", 1)), Some(0));
    assert_eq!(btf.resolve(&FieldSource::TracepointArgIsPointer("mark_victim", 2)), None);
    assert_eq!(btf.resolve(&FieldSource::TracepointArgIsPointer("mark_victim", u32::MAX)), None);
    assert!(btf.has_tracepoint("mark_victim") && !btf.has_tracepoint("other") && btf.names_tracepoints());
    assert!(btf.has_func("oom_kill_process") && !btf.has_func("mm"));
    assert_eq!((btf.func_args("oom_kill_process"), btf.func_args("mm")), (Some(3), None));
}

#[test]
fn what_is_not_readable_is_said() {
    let good = sample().build();
    let with = |at: usize, value: u8| {
        let mut bytes = good.clone();
        bytes[at] = value;
        Btf::parse(&bytes).unwrap_err()
    };
    assert_eq!(Btf::parse(&[]).unwrap_err(), BtfError::TooShort(0));
    assert_eq!(Btf::parse(&good[..23]).unwrap_err(), BtfError::TooShort(23));
    assert_eq!(Btf::parse(b"\xeb\x9f\0\0").unwrap_err(), BtfError::BigEndian);
    assert_eq!(Btf::parse(b"\x7fELF\x02").unwrap_err(), BtfError::Elf);
    assert_eq!(Btf::parse(b"hello, world").unwrap_err(), BtfError::NotBtf(0x6568));
    assert_eq!(with(2, 2), BtfError::Version(2));
    assert_eq!(with(4, 0), BtfError::Section { section: "type" });
    assert_eq!(with(15, 0xff), BtfError::Section { section: "type" });
    assert_eq!(with(23, 0xff), BtfError::Section { section: "string" });
    assert_eq!(with(24 + 7, 20), BtfError::UnknownKind { id: 1, kind: 20 });
    assert_eq!(with(24 + 7, 0), BtfError::UnknownKind { id: 1, kind: 0 });
    let mut cut = Builder::new();
    cut.add("s", kind::STRUCT, false, 9, 4, &[]);
    assert_eq!(Btf::parse(&cut.build()).unwrap_err(), BtfError::CutOff { id: 1 });
}

#[test]
fn cycles_end() {
    let mut b = Builder::new();
    b.add("a", kind::TYPEDEF, false, 0, 2, &[]);
    b.add("b", kind::TYPEDEF, false, 0, 1, &[]);
    // Two anonymous members of its own type: a search without a budget would take 2^16 steps and more.
    b.aggregate("s", kind::STRUCT, false, 8, &[("", 3, 0), ("", 3, 0), ("x", 1, 0)]);
    b.add("btf_trace_t", kind::TYPEDEF, false, 0, 1, &[]);
    let btf = b.parse();
    assert_eq!(btf.resolve(&FieldSource::Member("s", "y")), None);
    assert_eq!(btf.resolve(&FieldSource::Member("s", "x.y")), None);
    assert_eq!(btf.resolve(&FieldSource::TracepointArgs("t")), None);
}

#[test]
fn the_running_kernel_has_all_that_is_required() {
    let Some(bytes) = of_machine::found("types of the kernel", std::fs::read(KERNEL_BTF)) else { return };
    let btf = Btf::from_vec(bytes).unwrap();
    assert!(btf.len() > 10_000);
    let (layout, missing) = btf.layout();
    assert_eq!(missing, []);
    assert_eq!(layout.css_cgroup, 0);
    assert!(layout.memory_cgrp_id < 32);
    assert!(layout.task_mm < 65_536 && layout.task_mm % 8 == 0);
    assert_eq!(layout.task_tgid, layout.task_pid + 4);
    assert_eq!((layout.mm_filepages, layout.mm_anonpages), (0, 1));
    assert_eq!((layout.mm_swapents, layout.mm_shmempages), (2, 3));
    assert!(layout.rss_is_percpu <= 1 && layout.kernfs_parent != ABSENT);
    assert_eq!(btf.func_args("page_counter_try_charge"), Some(3));
    for name in ["rss_stat", "mark_victim", "signal_generate", "sched_process_exit", "cgroup_mkdir"] {
        assert!(btf.has_tracepoint(name), "{name}");
    }
    assert!(!btf.has_tracepoint("no_such_tracepoint") && !btf.has_func("no_such_function"));
}

fn try_everything(bytes: &[u8]) {
    if let Ok(btf) = Btf::parse(bytes) {
        let (layout, missing) = btf.layout();
        let mut absent = 0;
        layout.each(|_, value| absent += usize::from(value == ABSENT));
        assert!(absent >= missing.len() || layout != KernelLayout::NOTHING);
        btf.func_args("oom_kill_process");
        btf.names_tracepoints();
        for source in [
            FieldSource::Member("mm", "deep|memory.max"),
            FieldSource::IsArrayOf("mm", "rss", "percpu_counter"),
            FieldSource::TracepointArgIsPointer("mark_victim", 1),
            FieldSource::Enumerator("SMALL"),
        ] {
            btf.resolve(&source);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        try_everything(&bytes);
        let mut framed = vec![0x9f, 0xeb, 1, 0, 24, 0, 0, 0];
        framed.extend_from_slice(&bytes);
        try_everything(&framed);
    }

    #[test]
    fn mutated_files_never_panic(
        changes in proptest::collection::vec((0usize..2000, any::<u8>()), 1..8),
        cut in 0usize..2000,
    ) {
        let mut bytes = sample().build();
        let len = bytes.len();
        for (at, value) in changes {
            bytes[at % len] = value;
        }
        try_everything(&bytes);
        bytes.truncate(cut % len);
        try_everything(&bytes);
    }
}
