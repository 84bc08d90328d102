//! Decodes the bytes of a ring into typed records. This is the only decoder of the wire format in
//! userspace, and any bytes give a record or a typed error.
//!
//! It also turns wire values into what the engine works with: `known` makes `UNKNOWN` a `None`,
//! `Reading` does so for all counters of a cgroup, and `printable` makes text safe for a
//! terminal.

use memtrace_common::event as wire;
use thiserror::Error;
use zerocopy::{FromBytes, Immutable, KnownLayout};

/// One wire record, copied out of the ring.
#[derive(Clone, Debug, PartialEq)]
pub enum Record {
    /// Resident memory of an address space moved by the RSS threshold.
    Rss(wire::RssChange),
    /// A process called mmap, munmap, mremap, brk or madvise.
    Mapping(wire::Mapping),
    /// Reclaim on behalf of a cgroup began or ended.
    Reclaim(wire::Reclaim),
    /// A cgroup was charged: its counters.
    Charge(wire::Charge),
    /// SIGKILL was sent.
    Kill(wire::Kill),
    /// The OOM killer marked a victim.
    OomVictim(Box<wire::OomVictim>),
    /// A process was created.
    Fork(wire::Fork),
    /// A process replaced its program.
    Exec(wire::Exec),
    /// A process exited.
    Exit(wire::Exit),
    /// An address space was torn down.
    MmGone(wire::MmGone),
    /// A cgroup was made or removed.
    Cgroup(Box<wire::CgroupChange>),
    /// A process moved into a cgroup.
    Attach(wire::CgroupAttach),
    /// The OOM killer chose a victim.
    OomDecision(wire::OomDecision),
    /// Kernel stack of a trigger, as addresses. The engine gets the names as a fact.
    KernelStack(Box<wire::KernelStack>),
}

/// Why bytes are not a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum DecodeError {
    /// The bytes are shorter than a record header.
    #[error("{len} bytes are shorter than a record header")]
    Short {
        /// Number of bytes.
        len: usize,
    },
    /// This build does not know the kind.
    #[error("unknown record kind {kind}")]
    UnknownKind {
        /// The kind in the header.
        kind: u16,
    },
    /// The number of bytes, or the size in the header, is not the size of the kind.
    #[error("record of kind {kind} has {actual} bytes (header says {stated}), expected {expected}")]
    WrongSize {
        /// The kind in the header.
        kind: u16,
        /// Size of the kind.
        expected: usize,
        /// Size in the header.
        stated: usize,
        /// Number of bytes.
        actual: usize,
    },
}

/// Decodes one record, header and all. The bytes have to be exactly one record.
pub fn decode(bytes: &[u8]) -> Result<Record, DecodeError> {
    let Ok((header, _)) = wire::Header::read_from_prefix(bytes) else {
        return Err(DecodeError::Short { len: bytes.len() });
    };
    let kind = header.kind;
    let Some(&(_, expected, _)) = wire::KINDS.iter().find(|(known, ..)| *known == kind) else {
        return Err(DecodeError::UnknownKind { kind });
    };
    let stated = usize::from(header.size);
    if kind == wire::KIND_KILL && stated == wire::KILL_SIZE_BEFORE && bytes.len() == stated {
        return kill_before(bytes).ok_or(DecodeError::UnknownKind { kind });
    }
    let wrong = DecodeError::WrongSize { kind, expected, stated, actual: bytes.len() };
    if stated != expected || bytes.len() != expected {
        return Err(wrong);
    }
    match kind {
        wire::KIND_RSS => read(bytes).map(Record::Rss),
        wire::KIND_MAPPING => read(bytes).map(Record::Mapping),
        wire::KIND_RECLAIM => read(bytes).map(Record::Reclaim),
        wire::KIND_CHARGE => read(bytes).map(Record::Charge),
        wire::KIND_KILL => read(bytes).map(Record::Kill),
        wire::KIND_OOM_VICTIM => read(bytes).map(|r| Record::OomVictim(Box::new(r))),
        wire::KIND_FORK => read(bytes).map(Record::Fork),
        wire::KIND_EXEC => read(bytes).map(Record::Exec),
        wire::KIND_EXIT => read(bytes).map(Record::Exit),
        wire::KIND_MM_GONE => read(bytes).map(Record::MmGone),
        wire::KIND_CGROUP => read(bytes).map(|r| Record::Cgroup(Box::new(r))),
        wire::KIND_ATTACH => read(bytes).map(Record::Attach),
        wire::KIND_OOM_DECISION => read(bytes).map(Record::OomDecision),
        wire::KIND_KERNEL_STACK => read(bytes).map(|r| Record::KernelStack(Box::new(r))),
        _ => return Err(DecodeError::UnknownKind { kind }),
    }
    .ok_or(wrong)
}

/// A record of the STACKS ring, decoded in place: a stack copy has up to 60 KiB.
#[derive(Clone, Copy, Debug)]
pub enum StackRecord<'a> {
    /// A process or a cgroup grew; with the bytes of its user stack, from the stack pointer up.
    Sample(&'a wire::StackSample, &'a [u8]),
    /// Kernel stack of the thread whose failed charge led to a kill.
    KernelStack(&'a wire::KernelStack),
}

/// Decodes one record of the STACKS ring. Any bytes give a record or a typed error.
pub fn decode_stack(bytes: &[u8]) -> Result<StackRecord<'_>, DecodeError> {
    let Ok((header, _)) = wire::Header::read_from_prefix(bytes) else {
        return Err(DecodeError::Short { len: bytes.len() });
    };
    let (kind, stated, actual) = (header.kind, usize::from(header.size), bytes.len());
    let wrong = |expected| DecodeError::WrongSize { kind, expected, stated, actual };
    match kind {
        wire::KIND_STACK_SAMPLE => {
            let expected = size_of::<wire::StackSample>();
            let (sample, rest) = wire::StackSample::ref_from_prefix(bytes).map_err(|_| wrong(expected))?;
            let length = sample.stack_copy_bytes as usize;
            let copy = rest.get(..length).ok_or_else(|| wrong(expected.saturating_add(length)))?;
            Ok(StackRecord::Sample(sample, copy))
        }
        wire::KIND_KERNEL_STACK => match wire::KernelStack::ref_from_prefix(bytes) {
            Ok((stack, _)) => Ok(StackRecord::KernelStack(stack)),
            Err(_) => Err(wrong(size_of::<wire::KernelStack>())),
        },
        kind => Err(DecodeError::UnknownKind { kind }),
    }
}

/// A kill as earlier versions wrote it, without the sender's user id.
fn kill_before(bytes: &[u8]) -> Option<Record> {
    let mut whole = [0; size_of::<wire::Kill>()];
    whole.get_mut(..bytes.len())?.copy_from_slice(bytes);
    let kill: wire::Kill = read(&whole)?;
    Some(Record::Kill(wire::Kill { sender_uid: wire::UNKNOWN_U32, ..kill }))
}

fn read<T: FromBytes + KnownLayout + Immutable>(bytes: &[u8]) -> Option<T> {
    T::read_from_bytes(bytes).ok()
}

impl Record {
    /// Name of the kind, for counters: `oom_victim`.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Rss(_) => "rss",
            Self::Mapping(_) => "mapping",
            Self::Reclaim(_) => "reclaim",
            Self::Charge(_) => "charge",
            Self::Kill(_) => "kill",
            Self::OomVictim(_) => "oom_victim",
            Self::Fork(_) => "fork",
            Self::Exec(_) => "exec",
            Self::Exit(_) => "exit",
            Self::MmGone(_) => "mm_gone",
            Self::Cgroup(_) => "cgroup",
            Self::Attach(_) => "attach",
            Self::OomDecision(_) => "oom_decision",
            Self::KernelStack(_) => "kernel_stack",
        }
    }
}

/// A wire value; `None` when the kernel side could not read it.
pub(crate) fn known(value: u64) -> Option<u64> {
    (value != wire::UNKNOWN).then_some(value)
}

/// A kernfs id; `None` when it is unknown or 0.
pub(crate) fn cgroup_id(value: u64) -> Option<u64> {
    known(value).filter(|id| *id != 0)
}

/// A limit, as on the wire.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Limit {
    /// It could not be read.
    #[default]
    Unknown,
    /// The cgroup has no limit.
    Unlimited,
    /// The limit in bytes.
    Bytes(u64),
}

impl Limit {
    pub(crate) fn from_wire(value: u64) -> Self {
        match value {
            wire::UNKNOWN => Self::Unknown,
            wire::NO_LIMIT => Self::Unlimited,
            bytes => Self::Bytes(bytes),
        }
    }

    pub(crate) fn bytes(self) -> Option<u64> {
        match self {
            Self::Bytes(bytes) => Some(bytes),
            Self::Unknown | Self::Unlimited => None,
        }
    }

    pub(crate) fn or(self, older: Self) -> Self {
        if self == Self::Unknown { older } else { self }
    }
}

/// One reading of a cgroup's counters, in bytes. `None` and [`Limit::Unknown`] were not read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Reading {
    pub(crate) cgroup_id: Option<u64>,
    pub(crate) usage: Option<u64>,
    pub(crate) limit: Limit,
    pub(crate) watermark: Option<u64>,
    pub(crate) failcnt: Option<u64>,
    pub(crate) swap_usage: Option<u64>,
    pub(crate) swap_limit: Limit,
    pub(crate) high: Limit,
}

impl From<&wire::Memcg> for Reading {
    fn from(m: &wire::Memcg) -> Self {
        Self {
            cgroup_id: cgroup_id(m.cgroup_id),
            usage: known(m.usage_bytes),
            limit: Limit::from_wire(m.limit_bytes),
            watermark: known(m.watermark_bytes),
            failcnt: known(m.failcnt),
            swap_usage: known(m.swap_usage_bytes),
            swap_limit: Limit::from_wire(m.swap_limit_bytes),
            high: Limit::from_wire(m.high_bytes),
        }
    }
}

impl Reading {
    /// This reading, with missing values from an older one. The watermark never falls.
    pub(crate) fn or(self, older: &Self) -> Self {
        Self {
            cgroup_id: self.cgroup_id.or(older.cgroup_id),
            usage: self.usage.or(older.usage),
            limit: self.limit.or(older.limit),
            watermark: self.watermark.max(older.watermark),
            failcnt: self.failcnt.or(older.failcnt),
            swap_usage: self.swap_usage.or(older.swap_usage),
            swap_limit: self.swap_limit.or(older.swap_limit),
            high: self.high.or(older.high),
        }
    }
}

/// Text of a NUL-padded field, up to the first NUL, as [`printable`] text.
pub(crate) fn field_text(bytes: &[u8]) -> String {
    printable(bytes.split(|b| *b == 0).next().unwrap_or_default())
}

/// Bytes as text that is safe for a terminal: control characters, invisible format characters and
/// bytes that are not UTF-8 become `\xNN`. A backslash stays as it is, because systemd paths
/// contain `\x2d`, so applying this twice changes nothing.
pub fn printable(bytes: &[u8]) -> String {
    let mut out = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        for c in chunk.valid().chars() {
            if hidden(c) {
                let mut buffer = [0u8; 4];
                c.encode_utf8(&mut buffer).bytes().for_each(|b| escape(&mut out, b));
            } else {
                out.push(c);
            }
        }
        chunk.invalid().iter().for_each(|b| escape(&mut out, *b));
    }
    out
}

fn hidden(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}')
}

fn escape(out: &mut String, byte: u8) {
    const HEX: [char; 16] = ['0', '1', '2', '3', '4', '5', '6', '7', '8', '9', 'a', 'b', 'c', 'd', 'e', 'f'];
    out.push_str("\\x");
    out.extend(HEX.get(usize::from(byte >> 4)));
    out.extend(HEX.get(usize::from(byte & 15)));
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use zerocopy::{FromZeros, IntoBytes};

    use super::*;
    use crate::test_support;

    #[test]
    fn every_kind_decodes_from_a_zeroed_record() {
        for (kind, size, name) in wire::KINDS {
            let mut bytes = vec![0u8; *size];
            bytes[..2].copy_from_slice(&kind.to_ne_bytes());
            bytes[2..4].copy_from_slice(&u16::try_from(*size).unwrap().to_ne_bytes());
            assert!(decode(&bytes).is_ok(), "{name}");
            bytes.pop();
            assert!(matches!(decode(&bytes), Err(DecodeError::WrongSize { .. })), "{name}");
        }
    }

    #[test]
    fn a_kill_of_an_earlier_version_has_an_unknown_sender() {
        let kill = wire::Kill { sender_uid: 7, ..test_support::kill(5, 1, 2, 3) };
        let mut bytes = kill.as_bytes().to_vec();
        assert_eq!(decode(&bytes), Ok(Record::Kill(kill)));
        bytes.truncate(wire::KILL_SIZE_BEFORE);
        assert!(matches!(decode(&bytes), Err(DecodeError::WrongSize { .. })));
        bytes[2..4].copy_from_slice(&(wire::KILL_SIZE_BEFORE as u16).to_ne_bytes());
        let Ok(Record::Kill(read)) = decode(&bytes) else { panic!("not read") };
        assert_eq!((read.sender_uid, read.result, read.target), (wire::UNKNOWN_U32, kill.result, kill.target));
    }

    #[test]
    fn a_stack_sample_has_all_of_its_stack_or_is_none() {
        let mut sample = wire::StackSample::new_zeroed();
        sample.header.kind = wire::KIND_STACK_SAMPLE;
        sample.stack_copy_bytes = 8;
        // Words, since the ring gives aligned memory.
        let mut words: Vec<u64> =
            sample.as_bytes().chunks(8).map(|c| u64::from_ne_bytes(c.try_into().unwrap())).collect();
        assert!(matches!(decode_stack(words.as_bytes()), Err(DecodeError::WrongSize { expected: 1560, .. })));
        words.push(u64::from_ne_bytes([7; 8]));
        let Ok(StackRecord::Sample(decoded, copy)) = decode_stack(words.as_bytes()) else { panic!("a sample") };
        assert_eq!((decoded.stack_copy_bytes, copy), (8, &[7; 8][..]));
        assert_eq!(decode_stack(&[1]).unwrap_err(), DecodeError::Short { len: 1 });
        assert_eq!(decode_stack(&[0xff; 64]).unwrap_err(), DecodeError::UnknownKind { kind: 0xffff });
    }

    #[test]
    fn short_unknown_and_wrong_sized_records_have_their_own_errors() {
        assert_eq!(decode(&[1, 0, 3]), Err(DecodeError::Short { len: 3 }));
        assert_eq!(decode(&[0xff; 64]), Err(DecodeError::UnknownKind { kind: 0xffff }));
        let mut exec = test_support::exec(1, 2, 3, "sh", 4, 5);
        exec.header.size = 8;
        assert!(matches!(decode(exec.as_bytes()), Err(DecodeError::WrongSize { stated: 8, .. })));
    }

    #[test]
    fn no_terminal_escape_survives() {
        assert_eq!(field_text(b"sh\0garbage"), "sh");
        assert_eq!(field_text(b"\x1b[31mred"), "\\x1b[31mred");
        assert_eq!(field_text(b"a\xffb\n"), "a\\xffb\\x0a");
        assert_eq!(field_text("\u{9b}1m\u{202e}x".as_bytes()), "\\xc2\\x9b1m\\xe2\\x80\\xaex");
        assert_eq!(field_text("größe".as_bytes()), "größe");
        assert_eq!(printable(br"a\x2db"), r"a\x2db");
    }

    #[test]
    fn unknown_and_unlimited_are_not_numbers() {
        let reading = Reading::from(&wire::Memcg {
            cgroup_id: 7,
            usage_bytes: wire::UNKNOWN,
            limit_bytes: wire::NO_LIMIT,
            watermark_bytes: 3,
            failcnt: 0,
            swap_usage_bytes: wire::UNKNOWN,
            swap_limit_bytes: wire::UNKNOWN,
            high_bytes: 9,
        });
        assert_eq!((reading.usage, reading.limit.bytes(), reading.watermark), (None, None, Some(3)));
        assert_eq!((reading.limit, reading.swap_limit), (Limit::Unlimited, Limit::Unknown));
        assert_eq!(reading.swap_limit.or(Limit::Bytes(5)), Limit::Bytes(5));
        assert_eq!(reading.limit.or(Limit::Bytes(5)), Limit::Unlimited);
    }

    proptest! {
        #[test]
        fn decoding_is_total(bytes in prop::collection::vec(any::<u8>(), 0..700), kind in 0usize..14, patch in any::<bool>()) {
            let mut bytes = bytes;
            if patch {
                let (kind, size, _) = wire::KINDS[kind];
                bytes.resize(size, 0xa5);
                bytes[..2].copy_from_slice(&kind.to_ne_bytes());
                bytes[2..4].copy_from_slice(&(size as u16).to_ne_bytes());
                prop_assert!(decode(&bytes).is_ok());
            }
            let _ = decode(&bytes);
        }

        #[test]
        fn printable_text_is_harmless_and_stable(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            let once = printable(&bytes);
            prop_assert!(once.chars().all(|c| !c.is_control()));
            prop_assert_eq!(printable(once.as_bytes()), once);
        }
    }
}
