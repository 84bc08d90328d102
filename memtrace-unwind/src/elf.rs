//! What unwinding and naming need of an ELF file: build id, segments, unwind sections.
//!
//! The file is read in bounded pieces and never mapped: if it is truncated while it is read, that
//! is a read error here, where access to a mapping would raise SIGBUS.
//!
//! Three kinds of position occur. An *offset* counts bytes in the file. A *stated address* is what
//! the file's headers say; call frame information uses these. The *address* in a process is the
//! stated address plus the load bias of the mapping.

use std::cell::Cell;
use std::io::{Read, Seek, SeekFrom};
use std::ops::Range;
use std::sync::Arc;

use object::elf::{
    FileHeader64, PF_X, PT_GNU_EH_FRAME, PT_LOAD, PT_NOTE, ProgramHeader64, SHF_ALLOC, SHF_COMPRESSED, SHT_NOBITS,
    SHT_NOTE,
};
use object::read::elf::{FileHeader, ProgramHeader, SectionHeader};
use object::read::{ReadCache, ReadCacheOps, ReadRef};
use object::{LittleEndian, elf};

/// Bytes of headers, names and notes that are read of one file.
const MAX_HEADER_BYTES: u64 = 2 << 20;
/// Program headers that are read of one file.
pub const MAX_SEGMENTS: usize = 128;
/// Section headers that are read of one file.
const MAX_SECTIONS: usize = 16_384;
/// Bytes of `.gnu_debuglink` that are read: a file name, at most three zeros, and a checksum.
const MAX_LINK_BYTES: u64 = 264;
/// Bytes kept of a build id; a SHA-1 has 20.
const MAX_BUILD_ID: usize = 64;
/// Above every user address: x86_64 has 47 bits (56 with 5-level tables), arm64 at most 52.
const MAX_ADDRESS: u64 = 1 << 56;

#[cfg(target_arch = "aarch64")]
const NATIVE_MACHINE: u16 = elf::EM_AARCH64;
#[cfg(not(target_arch = "aarch64"))]
const NATIVE_MACHINE: u16 = elf::EM_X86_64;

/// Why a file cannot be used as a module.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ElfError {
    /// It does not begin with the ELF magic, or it could not be read.
    #[error("not an ELF file")]
    NotElf,
    /// A 32-bit or big-endian file, or one for another architecture.
    #[error("an ELF file for another architecture")]
    Foreign,
    /// Its program headers cannot be read.
    #[error("broken ELF file")]
    Broken,
}

/// A `PT_LOAD` segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ElfSegment {
    /// Where it begins in the file, bytes.
    pub offset: u64,
    /// Its size in the file, bytes.
    pub file_bytes: u64,
    /// Its stated address.
    pub address: u64,
    /// Its size in memory, bytes.
    pub memory_bytes: u64,
    /// Alignment: address and offset are equal modulo this.
    pub align: u64,
    /// Whether it is mapped executable.
    pub executable: bool,
}

/// Where a section is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ElfSection {
    /// Offsets in the file, bytes.
    pub file: Range<u64>,
    /// Its stated address.
    pub address: u64,
}

/// The headers of a module, as far as they are used here.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ElfHeaders {
    /// Content of the note `NT_GNU_BUILD_ID`, lower-case hex.
    pub build_id: Option<String>,
    /// `PT_LOAD` segments. Cap: [`MAX_SEGMENTS`].
    pub segments: Vec<ElfSegment>,
    /// `.eh_frame`; without section headers, what follows `.eh_frame_hdr` in its segment.
    pub eh_frame: Option<ElfSection>,
    /// `.eh_frame_hdr`; without section headers, the segment `PT_GNU_EH_FRAME`.
    pub eh_frame_hdr: Option<ElfSection>,
    /// `.debug_frame`, unless it is compressed.
    pub debug_frame: Option<ElfSection>,
    /// Name of the file with the module's debug information, from `.gnu_debuglink`: one component
    /// of a path, never `.` or `..`.
    pub debug_link: Option<String>,
    /// Stated address of `.text`, which some pointers in `.eh_frame` are relative to.
    pub text_address: Option<u64>,
    /// Stated address of `.got`, likewise.
    pub got_address: Option<u64>,
}

/// Content of the unwind sections; all processes that map the module share it.
#[derive(Clone, Debug, Default)]
pub struct UnwindSections {
    /// Content of `.eh_frame`.
    pub eh_frame: Option<Arc<[u8]>>,
    /// Content of `.eh_frame_hdr`, the sorted table of the entries in `.eh_frame`.
    pub eh_frame_hdr: Option<Arc<[u8]>>,
    /// Content of `.debug_frame`; only read if there is no `.eh_frame`.
    pub debug_frame: Option<Arc<[u8]>>,
}

impl UnwindSections {
    /// Heap size in bytes.
    pub fn bytes(&self) -> usize {
        [&self.eh_frame, &self.eh_frame_hdr, &self.debug_frame].into_iter().flatten().map(|part| part.len()).sum()
    }
}

impl ElfHeaders {
    /// Reads the headers of a 64-bit little-endian file for this architecture.
    pub fn read(file: impl Read + Seek) -> Result<Self, ElfError> {
        let cache = ReadCache::new(file);
        let bytes_left = Cell::new(MAX_HEADER_BYTES);
        let data = Bounded { cache: &cache, bytes_left: &bytes_left };
        if data.read_bytes_at(0, 4).map_err(|()| ElfError::NotElf)? != elf::ELFMAG {
            return Err(ElfError::NotElf);
        }
        let header = FileHeader64::<LittleEndian>::parse(data).map_err(|_| ElfError::Foreign)?;
        let endian = header.endian().map_err(|_| ElfError::Foreign)?;
        if header.e_machine(endian) != NATIVE_MACHINE {
            return Err(ElfError::Foreign);
        }
        let programs = header.program_headers(endian, data).map_err(|_| ElfError::Broken)?;
        let mut found = Self::default();
        let mut by_program = None;
        for program in programs.iter().take(MAX_SEGMENTS) {
            let file = program.file_range(endian);
            let section = file_range(file.0, file.1).map(|file| ElfSection { file, address: program.p_vaddr(endian) });
            match program.p_type(endian) {
                PT_LOAD => found.segments.extend(segment(program, endian)),
                PT_GNU_EH_FRAME => by_program = section.filter(is_plausible),
                PT_NOTE if found.build_id.is_none() => {
                    if let Ok(Some(mut notes)) = program.notes(endian, data) {
                        found.build_id = build_id(endian, &mut notes);
                    }
                }
                _ => {}
            }
        }
        // Without section headers, or with broken ones, the program headers are all there is.
        let sections = found.read_sections(header, endian, data).unwrap_or(0);
        if sections == 0 {
            found.eh_frame_hdr = by_program;
            found.eh_frame = found.eh_frame_hdr.as_ref().and_then(|hdr| found.rest_of_segment(hdr));
        }
        Ok(found)
    }

    fn read_sections<'a, R: ReadRef<'a>>(
        &mut self,
        header: &FileHeader64<LittleEndian>,
        endian: LittleEndian,
        data: R,
    ) -> object::Result<usize> {
        let sections = header.sections(endian, data)?;
        for section in sections.iter().take(MAX_SECTIONS) {
            let (kind, flags) = (section.sh_type(endian), u32::try_from(section.sh_flags(endian)).unwrap_or(u32::MAX));
            if kind == SHT_NOTE && self.build_id.is_none() {
                if let Ok(Some(mut notes)) = section.notes(endian, data) {
                    self.build_id = build_id(endian, &mut notes);
                }
                continue;
            }
            let address = section.sh_addr(endian);
            let whole = file_range(section.sh_offset(endian), section.sh_size(endian))
                .map(|file| ElfSection { file, address })
                .filter(|section| kind != SHT_NOBITS && flags & SHF_COMPRESSED == 0 && is_plausible(section));
            match sections.section_name(endian, section).unwrap_or_default() {
                b".eh_frame" if flags & SHF_ALLOC != 0 => self.eh_frame = whole,
                b".eh_frame_hdr" if flags & SHF_ALLOC != 0 => self.eh_frame_hdr = whole,
                b".debug_frame" => self.debug_frame = whole,
                b".gnu_debuglink" if section.sh_size(endian) <= MAX_LINK_BYTES => {
                    self.debug_link = section.data(endian, data).ok().and_then(debug_link);
                }
                b".text" if address < MAX_ADDRESS => self.text_address = Some(address),
                b".got" if address < MAX_ADDRESS => self.got_address = Some(address),
                _ => {}
            }
        }
        Ok(sections.len())
    }

    /// Without section headers nothing says where `.eh_frame` is; linkers place it right after
    /// `.eh_frame_hdr`.
    fn rest_of_segment(&self, hdr: &ElfSection) -> Option<ElfSection> {
        let segment = self.segments.iter().find(|segment| {
            hdr.file.start >= segment.offset && hdr.file.end <= segment.offset.saturating_add(segment.file_bytes)
        })?;
        let end = segment.offset.checked_add(segment.file_bytes)?;
        let address = segment.address.checked_add(hdr.file.end.checked_sub(segment.offset)?)?;
        Some(ElfSection { file: hdr.file.end..end, address })
    }

    /// The stated address of the byte at `offset`; where segments share bytes of the file, that of
    /// the executable one.
    pub fn stated_address(&self, offset: u64) -> Option<u64> {
        let holds =
            |segment: &&ElfSegment| offset.checked_sub(segment.offset).is_some_and(|at| at < segment.file_bytes);
        let code = self.segments.iter().filter(|segment| segment.executable).find(holds);
        let segment = code.or_else(|| self.segments.iter().find(holds))?;
        segment.address.checked_add(offset.checked_sub(segment.offset)?)
    }

    /// The stated address of the start of an executable mapping at `offset`. The mapping begins at
    /// the page that holds the segment's first byte, and that page of the file may hold the end of
    /// another segment too: lld packs segments like that.
    pub fn stated_address_of_mapping(&self, offset: u64, page_bytes: u64) -> Option<u64> {
        let holds = |segment: &&ElfSegment| {
            let first = segment.offset.checked_sub(segment.offset.checked_rem(page_bytes).unwrap_or(0));
            let end = segment.offset.saturating_add(segment.file_bytes);
            first.is_some_and(|first| (first..end).contains(&offset))
        };
        let Some(segment) = self.segments.iter().filter(|segment| segment.executable).find(holds) else {
            return self.stated_address(offset);
        };
        match offset.checked_sub(segment.offset) {
            Some(inside) => segment.address.checked_add(inside),
            None => segment.address.checked_sub(segment.offset.checked_sub(offset)?),
        }
    }

    /// Size of the sections that [`ElfHeaders::read_unwind`] would read, bytes.
    pub fn unwind_bytes(&self) -> u64 {
        let size =
            |section: &Option<ElfSection>| section.as_ref().map_or(0, |s| s.file.end.saturating_sub(s.file.start));
        match &self.eh_frame {
            Some(_) => size(&self.eh_frame).saturating_add(size(&self.eh_frame_hdr)),
            None => size(&self.debug_frame),
        }
    }

    /// Reads the unwind sections; `None` if there are none, if they are larger than `most_bytes`,
    /// or if the file is too short for them.
    pub fn read_unwind(&self, mut file: impl Read + Seek, most_bytes: u64) -> Option<UnwindSections> {
        let bytes = self.unwind_bytes();
        let length = file.seek(SeekFrom::End(0)).ok()?;
        let within = |section: &ElfSection| section.file.end <= length;
        if bytes == 0 || bytes > most_bytes {
            return None;
        }
        let mut content = |section: &ElfSection| -> Option<Arc<[u8]>> {
            let size = usize::try_from(section.file.end.checked_sub(section.file.start)?).ok()?;
            file.seek(SeekFrom::Start(section.file.start)).ok()?;
            let mut bytes = vec![0; size];
            file.read_exact(&mut bytes).ok()?;
            Some(bytes.into())
        };
        let mut unwind = UnwindSections::default();
        match &self.eh_frame {
            Some(section) => {
                unwind.eh_frame = Some(content(section).filter(|_| within(section))?);
                unwind.eh_frame_hdr = self.eh_frame_hdr.as_ref().filter(|hdr| within(hdr)).and_then(&mut content);
            }
            None => unwind.debug_frame = self.debug_frame.as_ref().filter(|s| within(s)).and_then(&mut content),
        }
        Some(unwind)
    }
}

fn segment(program: &ProgramHeader64<LittleEndian>, endian: LittleEndian) -> Option<ElfSegment> {
    let (offset, file_bytes) = program.file_range(endian);
    let (address, memory_bytes) = (program.p_vaddr(endian), program.p_memsz(endian));
    let whole = ElfSection { file: file_range(offset, file_bytes)?, address };
    let end = address.checked_add(memory_bytes)?;
    let executable = program.p_flags(endian) & PF_X != 0;
    let align = program.p_align(endian);
    (is_plausible(&whole) && end < MAX_ADDRESS).then_some(ElfSegment {
        offset,
        file_bytes,
        address,
        memory_bytes,
        align,
        executable,
    })
}

fn file_range(offset: u64, size: u64) -> Option<Range<u64>> {
    Some(offset..offset.checked_add(size)?)
}

/// Whether address and offsets are small enough that adding to them cannot overflow.
fn is_plausible(section: &ElfSection) -> bool {
    let size = section.file.end.saturating_sub(section.file.start);
    section.address < MAX_ADDRESS && size < MAX_ADDRESS && section.file.end < i64::MAX as u64
}

fn build_id(
    endian: LittleEndian,
    notes: &mut object::read::elf::NoteIterator<'_, FileHeader64<LittleEndian>>,
) -> Option<String> {
    // Ends: each note takes at least 12 bytes of a bounded piece.
    while let Ok(Some(note)) = notes.next() {
        if note.name() == elf::ELF_NOTE_GNU && note.n_type(endian) == elf::NT_GNU_BUILD_ID {
            let id = note.desc().get(..note.desc().len().min(MAX_BUILD_ID))?;
            return (!id.is_empty()).then(|| id.iter().map(|byte| format!("{byte:02x}")).collect());
        }
    }
    None
}

/// The file name that the section `.gnu_debuglink` begins with (gdb's manual, "Debugging Information
/// in Separate Files"). Anything but a plain file name would lead out of the directories that it is
/// looked up in.
fn debug_link(section: &[u8]) -> Option<String> {
    let name = std::str::from_utf8(section.split(|byte| *byte == 0).next()?).ok()?;
    let plain = !matches!(name, "" | "." | "..") && !name.contains('/');
    plain.then(|| name.to_owned())
}

/// A reader with a budget: headers may state any size, and what is read is kept.
struct Bounded<'a, R: ReadCacheOps> {
    cache: &'a ReadCache<R>,
    bytes_left: &'a Cell<u64>,
}

impl<R: ReadCacheOps> Bounded<'_, R> {
    fn spend(self, bytes: u64) -> Result<(), ()> {
        self.bytes_left.set(self.bytes_left.get().checked_sub(bytes).ok_or(())?);
        Ok(())
    }
}

impl<R: ReadCacheOps> Clone for Bounded<'_, R> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<R: ReadCacheOps> Copy for Bounded<'_, R> {}

impl<'a, R: ReadCacheOps> ReadRef<'a> for Bounded<'a, R> {
    fn len(self) -> Result<u64, ()> {
        self.cache.len()
    }

    fn read_bytes_at(self, offset: u64, size: u64) -> Result<&'a [u8], ()> {
        self.spend(size)?;
        self.cache.read_bytes_at(offset, size)
    }

    fn read_bytes_at_until(self, range: Range<u64>, delimiter: u8) -> Result<&'a [u8], ()> {
        let found = self.cache.read_bytes_at_until(range, delimiter)?;
        self.spend(u64::try_from(found.len()).unwrap_or(u64::MAX))?;
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn segment(offset: u64, file_bytes: u64, address: u64, executable: bool) -> ElfSegment {
        ElfSegment { offset, file_bytes, address, memory_bytes: file_bytes, align: 4096, executable }
    }

    #[test]
    fn a_debug_link_is_a_file_name_and_nothing_else() {
        let named = |section: &[u8]| debug_link(section);
        assert_eq!(named(b"program.debug\0\0\0\x01\x02\x03\x04").as_deref(), Some("program.debug"));
        assert_eq!(named("gew\u{f6}lbe.debug".as_bytes()).as_deref(), Some("gew\u{f6}lbe.debug"));
        for bad in [&b""[..], b"\0abcd", b".", b"..\0", b"../shadow\0", b"/etc/shadow\0", b"a/b", b"\xff\xfe\0"] {
            assert_eq!(named(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn code_that_shares_a_page_of_the_file_with_data_is_found_at_its_own_address() {
        // The layout that lld gives a Rust program.
        let headers = ElfHeaders {
            segments: vec![
                segment(0, 0x073d68, 0, false),
                segment(0x073d70, 0x0ed290, 0x074d70, true),
                segment(0x161000, 0x00c808, 0x162000, false),
            ],
            ..ElfHeaders::default()
        };
        assert_eq!(headers.stated_address_of_mapping(0x73000, 4096), Some(0x74000));
        // mprotect splits mappings: one may begin anywhere in the segment.
        assert_eq!(headers.stated_address_of_mapping(0x80000, 4096), Some(0x81000));
        assert_eq!(headers.stated_address_of_mapping(0x161000, 4096), Some(0x162000), "data mapped as code");
        assert_eq!(headers.stated_address_of_mapping(0x1000, 0), Some(0x1000));
        assert_eq!(headers.stated_address_of_mapping(u64::MAX, 4096), None);
    }
}
