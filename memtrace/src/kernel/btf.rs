//! A reader of the kernel's own type information (BTF): names to offsets. Pure and total.
//!
//! BTF (Documentation/bpf/btf.rst) lists every type of the kernel. `Member("mm_struct", "owner")`
//! is found by the name of the struct and then that of the member, through anonymous structs and
//! unions, as a C compiler would. The reader holds the file's bytes, one offset a type and an index
//! of names, and is dropped once the layout is filled. It trusts nothing in the file: every read is
//! checked, every chain and search is bounded.

use memtrace_common::layout::{FieldSource, KernelLayout};

/// Most types a file may hold; a distribution kernel has about 150 000.
pub const MAX_TYPES: usize = 4 << 20;
/// Longest string section, bytes; a distribution kernel has about 3 MiB.
pub const MAX_STRINGS: usize = 64 << 20;
/// Longest name, bytes; a longer one is never found.
const MAX_NAME: usize = 1024;
/// Longest chain of typedefs and qualifiers followed.
const MAX_CHAIN: u32 = 32;
/// Deepest nesting of anonymous structs and unions searched.
const MAX_NESTING: u32 = 16;
/// Most members looked at for one path.
const MAX_MEMBERS: u32 = 1 << 16;

/// Size of `struct btf_header` as of its first version.
const HEADER: usize = 24;
/// Size of `struct btf_type` without what follows it.
const TYPE: usize = 12;

/// Why a file is not BTF that can be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BtfError {
    /// Shorter than a header.
    #[error("too short to be BTF ({0} bytes)")]
    TooShort(usize),
    /// The file starts with something else.
    #[error("not BTF: it starts with {0:#06x} instead of 0xeb9f")]
    NotBtf(u16),
    /// An ELF file, which has BTF in a section.
    #[error("an ELF file, not raw BTF: take its .BTF section out with `objcopy -O binary --only-section=.BTF`")]
    Elf,
    /// The BTF is of a big-endian kernel.
    #[error("BTF of a big-endian kernel; memtrace runs on little-endian kernels")]
    BigEndian,
    /// The version of the format is not 1.
    #[error("BTF version {0}; memtrace reads version 1")]
    Version(u8),
    /// The header points outside of the file.
    #[error("the {section} section lies outside of the file")]
    Section {
        /// `type` or `string`.
        section: &'static str,
    },
    /// More than [`MAX_TYPES`] types.
    #[error("more than {MAX_TYPES} types")]
    TooManyTypes,
    /// More than [`MAX_STRINGS`] bytes of strings.
    #[error("more than {MAX_STRINGS} bytes of strings")]
    TooManyStrings,
    /// A type of a kind newer than this reader, whose size is not known.
    #[error("type {id} is of kind {kind}; memtrace knows kinds 1 to 19")]
    UnknownKind {
        /// The type's number.
        id: u32,
        /// Its kind.
        kind: u32,
    },
    /// A type runs over the end of its section.
    #[error("type {id} is cut off")]
    CutOff {
        /// The type's number.
        id: u32,
    },
}

/// Kinds of types (include/uapi/linux/btf.h).
mod kind {
    pub(super) const INT: u32 = 1;
    pub(super) const PTR: u32 = 2;
    pub(super) const ARRAY: u32 = 3;
    pub(super) const STRUCT: u32 = 4;
    pub(super) const UNION: u32 = 5;
    pub(super) const ENUM: u32 = 6;
    pub(super) const FWD: u32 = 7;
    pub(super) const TYPEDEF: u32 = 8;
    pub(super) const VOLATILE: u32 = 9;
    pub(super) const CONST: u32 = 10;
    pub(super) const RESTRICT: u32 = 11;
    pub(super) const FUNC: u32 = 12;
    pub(super) const FUNC_PROTO: u32 = 13;
    pub(super) const VAR: u32 = 14;
    pub(super) const DATASEC: u32 = 15;
    pub(super) const FLOAT: u32 = 16;
    pub(super) const DECL_TAG: u32 = 17;
    pub(super) const TYPE_TAG: u32 = 18;
    pub(super) const ENUM64: u32 = 19;

    /// Bytes that follow a type of this kind; `None` for a kind that is not known.
    pub(super) const fn tail(kind: u32, vlen: usize) -> Option<usize> {
        Some(match kind {
            INT | VAR | DECL_TAG => 4,
            PTR | FWD | TYPEDEF | VOLATILE | CONST | RESTRICT | FUNC | FLOAT | TYPE_TAG => 0,
            ARRAY => 12,
            STRUCT | UNION | DATASEC | ENUM64 => vlen * 12,
            ENUM | FUNC_PROTO => vlen * 8,
            _ => return None,
        })
    }
}

/// A field of the layout that this kernel's BTF does not have.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct MissingField {
    /// Field of [`KernelLayout`].
    pub field: &'static str,
    /// How it was looked for.
    pub source: String,
}

/// Start and end of a section in the file.
type Section = (usize, usize);

/// The type information of one kernel.
pub struct Btf {
    bytes: Vec<u8>,
    strings: Section,
    /// Where each type starts in `bytes`; type 1 is the first. Cap: [`MAX_TYPES`].
    types: Vec<u32>,
    /// (hash of the name, type) of structs, unions, typedefs and functions, sorted. Cap:
    /// [`MAX_TYPES`].
    names: Vec<(u32, u32)>,
}

/// The fixed part of a type.
#[derive(Clone, Copy)]
struct Type {
    at: usize,
    name: u32,
    kind: u32,
    vlen: usize,
    flag: bool,
    /// Size or type, by kind.
    size_or_type: u32,
}

/// A member that was found: its byte offset and its type.
#[derive(Clone, Copy)]
struct FoundMember {
    offset: u32,
    id: u32,
}

impl std::fmt::Debug for Btf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Btf").field("bytes", &self.bytes.len()).field("types", &self.types.len()).finish()
    }
}

impl Btf {
    /// Reads raw BTF such as /sys/kernel/btf/vmlinux.
    pub fn parse(bytes: &[u8]) -> Result<Self, BtfError> {
        Self::from_vec(bytes.to_vec())
    }

    /// As [`Btf::parse`], without a second copy of the file.
    pub fn from_vec(bytes: Vec<u8>) -> Result<Self, BtfError> {
        let (types, strings) = sections(&bytes)?;
        let mut btf = Self { bytes, strings, types: Vec::new(), names: Vec::new() };
        btf.index(types)?;
        Ok(btf)
    }

    fn index(&mut self, (mut at, end): Section) -> Result<(), BtfError> {
        while at < end {
            let id = self.types.len() as u32 + 1;
            if self.types.len() >= MAX_TYPES {
                return Err(BtfError::TooManyTypes);
            }
            let cut = BtfError::CutOff { id };
            let Some(t) = self.type_at(at).filter(|_| at + TYPE <= end) else { return Err(cut) };
            let Some(tail) = kind::tail(t.kind, t.vlen) else {
                return Err(BtfError::UnknownKind { id, kind: t.kind });
            };
            let next = at + TYPE + tail;
            if next > end {
                return Err(cut);
            }
            if matches!(t.kind, kind::STRUCT | kind::UNION | kind::TYPEDEF | kind::FUNC)
                && let Some(name) = self.string(t.name).filter(|name| !name.is_empty())
            {
                let hash = hash(name);
                self.names.push((hash, id));
            }
            self.types.push(at as u32);
            at = next;
        }
        self.names.sort_unstable();
        self.names.shrink_to_fit();
        self.types.shrink_to_fit();
        Ok(())
    }

    /// Number of types.
    pub fn len(&self) -> usize {
        self.types.len()
    }

    /// Whether there is not a single type.
    pub fn is_empty(&self) -> bool {
        self.types.is_empty()
    }

    /// The layout memtrace needs, with the required fields this kernel does not have.
    pub fn layout(&self) -> (KernelLayout, Vec<MissingField>) {
        let mut missing = Vec::new();
        let layout = KernelLayout::fill(
            |source| self.resolve(source),
            |field, source| missing.push(MissingField { field, source: format!("{source:?}") }),
        );
        (layout, missing)
    }

    /// The value of one layout field; `None` when this kernel does not have it.
    pub fn resolve(&self, source: &FieldSource) -> Option<u32> {
        match *source {
            FieldSource::Member(of, paths) => self.member(of, paths).map(|found| found.offset),
            FieldSource::Size(of) => self.aggregates(of).next().map(|t| t.size_or_type),
            FieldSource::Enumerator(name) => self.enumerator(name),
            FieldSource::IsArrayOf(of, paths, element) => {
                let found = self.member(of, paths)?;
                let (_, t) = self.plain(found.id)?;
                Some(u32::from(self.is_array_of(&t, element)))
            }
            FieldSource::TracepointArgs(name) => self.tracepoint(name)?.vlen.checked_sub(1).map(|args| args as u32),
            FieldSource::TracepointArgIsPointer(name, index) => {
                let proto = self.tracepoint(name)?;
                let index = (index as usize).checked_add(1)?;
                if index >= proto.vlen {
                    return None;
                }
                let (_, t) = self.plain(self.word(proto.at + TYPE + index * 8 + 4)?)?;
                match t.kind {
                    kind::PTR => Some(1),
                    kind::INT | kind::ENUM | kind::ENUM64 | kind::FLOAT => Some(0),
                    _ => None,
                }
            }
        }
    }

    /// Whether the kernel has this function (not inlined everywhere).
    pub fn has_func(&self, name: &str) -> bool {
        self.named(name).any(|t| t.kind == kind::FUNC)
    }

    /// How many parameters a function has; `None` when the kernel does not have it.
    pub fn func_args(&self, name: &str) -> Option<u32> {
        self.named(name)
            .filter(|t| t.kind == kind::FUNC)
            .filter_map(|t| self.get(t.size_or_type))
            .find(|t| t.kind == kind::FUNC_PROTO)
            .map(|t| t.vlen as u32)
    }

    /// Whether the kernel has this tracepoint.
    pub fn has_tracepoint(&self, name: &str) -> bool {
        self.named(&format!("btf_trace_{name}")).any(|t| t.kind == kind::TYPEDEF)
    }

    /// Whether the file names tracepoints at all: a file cut down to some types does not.
    pub fn names_tracepoints(&self) -> bool {
        (1..=self.types.len() as u32)
            .filter_map(|id| self.get(id))
            .filter(|t| t.kind == kind::TYPEDEF)
            .any(|t| self.string(t.name).is_some_and(|name| name.starts_with(b"btf_trace_")))
    }

    /// The value of an enumerator, of whatever enum; `None` when it is negative or larger than 32
    /// bits.
    pub fn enumerator(&self, name: &str) -> Option<u32> {
        let name = name.as_bytes();
        for id in 1..=self.types.len() as u32 {
            let Some(t) = self.get(id) else { continue };
            let size = match t.kind {
                kind::ENUM => 8,
                kind::ENUM64 => 12,
                _ => continue,
            };
            for i in 0..t.vlen {
                let at = t.at + TYPE + i * size;
                if self.word(at).and_then(|off| self.string(off)) != Some(name) {
                    continue;
                }
                let low = self.word(at + 4)?;
                let high = if t.kind == kind::ENUM64 { self.word(at + 8)? } else { 0 };
                let negative = t.flag && t.kind == kind::ENUM && low > i32::MAX as u32;
                return (high == 0 && !negative).then_some(low);
            }
        }
        None
    }

    /// The prototype behind a tracepoint's `btf_trace_*` typedef.
    fn tracepoint(&self, name: &str) -> Option<Type> {
        self.named(&format!("btf_trace_{name}"))
            .filter(|t| t.kind == kind::TYPEDEF)
            .filter_map(|t| self.plain(t.size_or_type))
            .filter(|(_, t)| t.kind == kind::PTR)
            .filter_map(|(_, t)| self.plain(t.size_or_type))
            .map(|(_, t)| t)
            .find(|t| t.kind == kind::FUNC_PROTO)
    }

    /// The first of the paths (separated by `|`) that a struct or union of this name has.
    fn member(&self, of: &str, paths: &str) -> Option<FoundMember> {
        paths.split('|').find_map(|path| self.aggregates(of).find_map(|t| self.follow(t, path)))
    }

    fn follow(&self, mut t: Type, path: &str) -> Option<FoundMember> {
        let mut offset = 0u32;
        let mut budget = MAX_MEMBERS;
        let mut names = path.split('.').peekable();
        while let Some(name) = names.next() {
            let found = self.find_member(&t, name.as_bytes(), MAX_NESTING, &mut budget)?;
            offset = offset.checked_add(found.offset)?;
            if names.peek().is_none() {
                return Some(FoundMember { offset, id: found.id });
            }
            t = self.plain(found.id)?.1;
        }
        None
    }

    fn find_member(&self, t: &Type, name: &[u8], nesting: u32, budget: &mut u32) -> Option<FoundMember> {
        if !matches!(t.kind, kind::STRUCT | kind::UNION) || name.is_empty() {
            return None;
        }
        for i in 0..t.vlen {
            *budget = budget.checked_sub(1)?;
            let at = t.at + TYPE + i * 12;
            let (name_off, id, place) = (self.word(at)?, self.word(at + 4)?, self.word(at + 8)?);
            let Some(found) = self.string(name_off) else { continue };
            if found == name {
                return Some(FoundMember { offset: self.place(t, place, id)?, id });
            }
            if !found.is_empty() || nesting == 0 {
                continue;
            }
            let Some((_, inner)) = self.plain(id) else { continue };
            if let Some(inside) = self.find_member(&inner, name, nesting - 1, budget) {
                let offset = self.place(t, place, id)?.checked_add(inside.offset)?;
                return Some(FoundMember { offset, id: inside.id });
            }
        }
        None
    }

    /// Byte offset of a member; `None` for a bitfield.
    fn place(&self, of: &Type, place: u32, id: u32) -> Option<u32> {
        let bits = if of.flag {
            if place >> 24 != 0 {
                return None;
            }
            place & 0x00ff_ffff
        } else {
            let (_, t) = self.plain(id)?;
            if t.kind == kind::INT {
                let encoding = self.word(t.at + TYPE)?;
                let (shift, width) = ((encoding >> 16) & 0xff, encoding & 0xff);
                if shift != 0 || u64::from(width) != u64::from(t.size_or_type) * 8 {
                    return None;
                }
            }
            place
        };
        (bits % 8 == 0).then_some(bits / 8)
    }

    fn is_array_of(&self, t: &Type, element: &str) -> bool {
        t.kind == kind::ARRAY
            && self
                .word(t.at + TYPE)
                .and_then(|id| self.plain(id))
                .is_some_and(|(_, t)| t.kind == kind::STRUCT && self.string(t.name) == Some(element.as_bytes()))
    }

    /// Structs and unions of this name; a kernel may hold several.
    fn aggregates<'a>(&'a self, name: &'a str) -> impl Iterator<Item = Type> + 'a {
        self.named(name).filter(|t| matches!(t.kind, kind::STRUCT | kind::UNION))
    }

    /// Structs, unions, typedefs and functions of this name.
    fn named<'a>(&'a self, name: &str) -> impl Iterator<Item = Type> + use<'a> {
        let wanted = hash(name.as_bytes());
        let name = name.as_bytes().to_vec();
        let from = self.names.partition_point(|(hash, _)| *hash < wanted);
        self.names
            .get(from..)
            .unwrap_or_default()
            .iter()
            .take_while(move |(hash, _)| *hash == wanted)
            .filter_map(|(_, id)| self.get(*id))
            .filter(move |t| self.string(t.name) == Some(name.as_slice()))
    }

    /// The type behind typedefs, qualifiers and type tags.
    fn plain(&self, mut id: u32) -> Option<(u32, Type)> {
        for _ in 0..MAX_CHAIN {
            let t = self.get(id)?;
            match t.kind {
                kind::TYPEDEF | kind::VOLATILE | kind::CONST | kind::RESTRICT | kind::TYPE_TAG => id = t.size_or_type,
                _ => return Some((id, t)),
            }
        }
        None
    }

    /// A type by its number; `None` for void (0) and for numbers the file does not have.
    fn get(&self, id: u32) -> Option<Type> {
        let at = *self.types.get((id as usize).checked_sub(1)?)?;
        self.type_at(at as usize)
    }

    fn type_at(&self, at: usize) -> Option<Type> {
        let (name, info, size_or_type) = (self.word(at)?, self.word(at + 4)?, self.word(at + 8)?);
        // Old files leave bits 16-23 and 29-30 zero; newer ones lengthen vlen and kind into them.
        let (kind, vlen) = ((info >> 24) & 0x7f, (info & 0x00ff_ffff) as usize);
        Some(Type { at, name, kind, vlen, flag: info >> 31 == 1, size_or_type })
    }

    fn word(&self, at: usize) -> Option<u32> {
        word(&self.bytes, at)
    }

    fn string(&self, offset: u32) -> Option<&[u8]> {
        let section = self.bytes.get(self.strings.0..self.strings.1)?;
        let tail = section.get(offset as usize..)?;
        let tail = tail.get(..MAX_NAME).unwrap_or(tail);
        tail.iter().position(|byte| *byte == 0).and_then(|end| tail.get(..end))
    }
}

/// Bounds of the type and the string section.
fn sections(bytes: &[u8]) -> Result<(Section, Section), BtfError> {
    let short = BtfError::TooShort(bytes.len());
    match bytes {
        [0x9f, 0xeb, ..] => {}
        [0xeb, 0x9f, ..] => return Err(BtfError::BigEndian),
        [0x7f, b'E', b'L', b'F', ..] => return Err(BtfError::Elf),
        [low, high, ..] => return Err(BtfError::NotBtf(u16::from_le_bytes([*low, *high]))),
        _ => return Err(short),
    }
    if let Some(version) = bytes.get(2).filter(|version| **version != 1) {
        return Err(BtfError::Version(*version));
    }
    if bytes.len() < HEADER {
        return Err(short);
    }
    let field = |at| word(bytes, at).map(|value| value as usize).ok_or(short.clone());
    let header = field(4)?;
    let section = |section, offset: usize, len: usize| {
        let outside = BtfError::Section { section };
        let from = header.checked_add(offset).ok_or(outside.clone())?;
        let to = from.checked_add(len).ok_or(outside.clone())?;
        if header < HEADER || to > bytes.len() || to > u32::MAX as usize { Err(outside) } else { Ok((from, to)) }
    };
    let types = section("type", field(8)?, field(12)?)?;
    let strings = section("string", field(16)?, field(20)?)?;
    if strings.1 - strings.0 > MAX_STRINGS {
        return Err(BtfError::TooManyStrings);
    }
    Ok((types, strings))
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    let four = bytes.get(at..at.checked_add(4)?)?;
    four.try_into().ok().map(u32::from_le_bytes)
}

/// FNV-1a.
fn hash(name: &[u8]) -> u32 {
    name.iter().fold(0x811c_9dc5, |hash, byte| (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193))
}

#[cfg(test)]
#[path = "btf_tests.rs"]
mod tests;
