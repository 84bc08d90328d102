//! /proc/PID/maps, of which only executable mappings are kept: which file's code is where.
//!
//! A line is `START-END PERMS OFFSET MAJOR:MINOR INODE   PATH`, for example
//! `7f3c1000-7f3c9000 r-xp 00022000 103:02 131 /usr/lib/libc.so.6` (fs/proc/task_mmu.c,
//! `show_map_vma`). A program may map what it likes and give files any name, so lines, mappings
//! and paths are bounded, and a line that does not parse is counted.

use std::sync::Arc;

/// Bytes of /proc/PID/maps that are read; the rest is ignored.
pub const MAX_BYTES: usize = 8 << 20;
/// Lines that are read; the rest is ignored.
pub const MAX_LINES: usize = 65_536;
/// Executable mappings kept for one process; those at higher addresses are counted as left out.
pub const MAX_MAPPINGS: usize = 8192;
/// Bytes kept of a path.
const MAX_PATH: usize = 4096;

/// An executable mapping.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// First address.
    pub start: u64,
    /// First address after it.
    pub end: u64,
    /// Offset of `start` in the file, bytes; 0 without a file.
    pub offset: u64,
    /// Major and minor number of the device as this file has them. They may differ from those of
    /// stat(2): btrfs gives each subvolume a number of its own there.
    pub device: (u32, u32),
    /// Inode; 0 without a file.
    pub inode: u64,
    /// The path as the process had it, without ` (deleted)`; `[vdso]`; empty for anonymous memory.
    pub path: Arc<str>,
}

impl Mapping {
    /// Whether a file is mapped here.
    pub fn has_file(&self) -> bool {
        self.inode != 0 && self.path.starts_with('/')
    }

    /// Whether this is the vdso, the shared object that the kernel maps into each process.
    pub fn is_vdso(&self) -> bool {
        self.inode == 0 && &*self.path == "[vdso]"
    }
}

/// The executable mappings of a process, by address.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Maps {
    /// Sorted by address, without overlaps. Cap: [`MAX_MAPPINGS`].
    mappings: Vec<Mapping>,
    /// Executable mappings beyond [`MAX_MAPPINGS`], and lines that do not parse.
    left_out: usize,
}

impl Maps {
    /// Parses the content of /proc/PID/maps. Total: any bytes give a result.
    pub fn parse(bytes: &[u8]) -> Self {
        let mut maps = Self::default();
        let text = bytes.get(..MAX_BYTES).unwrap_or(bytes);
        for line in text.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()).take(MAX_LINES) {
            match parse_line(line, maps.mappings.last().map(|mapping| &mapping.path)) {
                MapsLine::Code(mapping) if maps.mappings.len() < MAX_MAPPINGS => maps.mappings.push(mapping),
                MapsLine::Data => {}
                MapsLine::Code(_) | MapsLine::Nonsense => maps.left_out = maps.left_out.saturating_add(1),
            }
        }
        // The kernel prints them in order; bytes from elsewhere need not be.
        maps.mappings.sort_by_key(|mapping| mapping.start);
        let mut end = 0;
        maps.mappings.retain(|mapping| {
            let disjoint = mapping.start >= end;
            end = end.max(mapping.end);
            disjoint
        });
        maps
    }

    /// The mapping that holds `address`, and its index in [`Maps::all`].
    pub fn find(&self, address: u64) -> Option<(usize, &Mapping)> {
        let index = self.mappings.partition_point(|mapping| mapping.start <= address).checked_sub(1)?;
        let mapping = self.mappings.get(index)?;
        (address < mapping.end).then_some((index, mapping))
    }

    /// All executable mappings, by address.
    pub fn all(&self) -> &[Mapping] {
        &self.mappings
    }

    /// Executable mappings beyond [`MAX_MAPPINGS`], and lines that do not parse.
    pub fn left_out(&self) -> usize {
        self.left_out
    }

    /// Approximate heap size in bytes.
    pub fn memory_estimate(&self) -> usize {
        let paths: usize = self.mappings.iter().map(|mapping| mapping.path.len()).sum();
        self.mappings.capacity().saturating_mul(size_of::<Mapping>()).saturating_add(paths)
    }
}

enum MapsLine {
    Code(Mapping),
    Data,
    Nonsense,
}

/// All numbers but the inode are hexadecimal.
fn parse_line(line: &[u8], last_path: Option<&Arc<str>>) -> MapsLine {
    let mut rest = line;
    let mut word = || {
        let start = rest.iter().position(|byte| *byte != b' ').unwrap_or(rest.len());
        let from = rest.get(start..).unwrap_or_default();
        let length = from.iter().position(|byte| *byte == b' ').unwrap_or(from.len());
        let (word, left) = from.split_at_checked(length).unwrap_or_default();
        rest = left;
        word
    };
    let (range, permissions, offset, device, inode) = (word(), word(), word(), word(), word());
    let parse = || {
        let (start, end) = split_at_byte(range, b'-')?;
        let (start, end) = (hex(start)?, hex(end)?);
        let (major, minor) = split_at_byte(device, b':')?;
        let device = (u32::try_from(hex(major)?).ok()?, u32::try_from(hex(minor)?).ok()?);
        let inode = std::str::from_utf8(inode).ok()?.parse().ok()?;
        (start < end && permissions.len() == 4).then_some((start, end, hex(offset)?, device, inode))
    };
    let Some((start, end, offset, device, inode)) = parse() else { return MapsLine::Nonsense };
    if permissions.get(2) != Some(&b'x') {
        return MapsLine::Data;
    }
    let padding = rest.iter().position(|byte| *byte != b' ').unwrap_or(rest.len());
    let path = path(rest.get(padding..).unwrap_or_default());
    let path = match last_path {
        Some(last) if **last == *path => last.clone(),
        _ => path.into(),
    };
    MapsLine::Code(Mapping { start, end, offset, device, inode, path })
}

/// The kernel escapes a newline in a path as `\012`, and nothing else.
fn path(bytes: &[u8]) -> String {
    let bytes = bytes.strip_suffix(b" (deleted)").unwrap_or(bytes);
    let bytes = bytes.get(..MAX_PATH).unwrap_or(bytes);
    String::from_utf8_lossy(bytes).replace("\\012", "\n")
}

fn split_at_byte(bytes: &[u8], byte: u8) -> Option<(&[u8], &[u8])> {
    let at = bytes.iter().position(|found| *found == byte)?;
    Some((bytes.get(..at)?, bytes.get(at.saturating_add(1)..)?))
}

fn hex(digits: &[u8]) -> Option<u64> {
    let digits = std::str::from_utf8(digits).ok().filter(|digits| !digits.starts_with('+'))?;
    u64::from_str_radix(digits, 16).ok()
}

#[cfg(test)]
mod tests {
    use std::fmt::Write;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn reads_this_process() {
        let maps = Maps::parse(&std::fs::read("/proc/self/maps").unwrap());
        let here = reads_this_process as *const () as u64;
        let (_, mapping) = maps.find(here).unwrap();
        assert!(mapping.has_file() && mapping.path.contains("memtrace"), "{mapping:?}");
        assert!(maps.all().iter().any(Mapping::is_vdso));
        assert_eq!(maps.left_out(), 0);
    }

    #[test]
    fn only_code_is_kept_and_paths_may_hold_anything() {
        let maps = Maps::parse(
            b"1000-2000 r-xp 00000000 08:01 42                         /a\\012b (deleted) x (deleted)\n\
              2000-3000 rw-p 00000000 08:01 42                         /data\n\
              nonsense\n\
              3000-4000 rwxp 00000000 00:00 0 \n\
              4000-5000 r-xs 00001000 103:2 7                          /sp ace\n\
              5000-6000 r-xp 00000000 00:00 0                          [vdso]\n",
        );
        let paths: Vec<&str> = maps.all().iter().map(|mapping| &*mapping.path).collect();
        assert_eq!(paths, ["/a\nb (deleted) x", "", "/sp ace", "[vdso]"]);
        assert_eq!(maps.left_out(), 1);
        assert_eq!(maps.find(0x1fff).unwrap().0, 0);
        assert_eq!((maps.find(0x2000), maps.find(0xfff), maps.find(u64::MAX)), (None, None, None));
        let (index, mapping) = maps.find(0x4fff).unwrap();
        assert_eq!((index, mapping.offset, mapping.device, mapping.inode), (2, 0x1000, (0x103, 2), 7));
        assert!(!maps.all()[1].has_file() && maps.all()[3].is_vdso());
    }

    #[test]
    fn ten_thousand_mappings() {
        let mut text = String::new();
        for n in 0..10_000_u64 {
            let (start, execute) = (0x10000 + n * 0x2000, if n % 2 == 0 { 'x' } else { '-' });
            writeln!(text, "{start:x}-{:x} r-{execute}p 00000000 08:01 {n} /lib/{n}.so", start + 0x1000).unwrap();
        }
        let maps = Maps::parse(text.as_bytes());
        assert_eq!((maps.all().len(), maps.left_out()), (5000, 0));
        assert_eq!(&*maps.find(0x10000 + 9998 * 0x2000).unwrap().1.path, "/lib/9998.so");
    }

    proptest! {
        #[test]
        fn any_bytes_give_mappings_in_order(bytes in proptest::collection::vec(any::<u8>(), 0..2000)) {
            in_order(&Maps::parse(&bytes));
        }

        #[test]
        fn any_lines_give_mappings_in_order(lines in proptest::collection::vec("[0-9a-f]{1,4}-[0-9a-f]{1,17} r-xp 0 1:1 [0-9]{1,3} [a-z ]{0,3}", 0..50)) {
            in_order(&Maps::parse(lines.join("\n").as_bytes()));
        }
    }

    fn in_order(maps: &Maps) {
        for pair in maps.all().windows(2) {
            assert!(pair[0].end <= pair[1].start && pair[0].start < pair[0].end);
        }
    }
}
