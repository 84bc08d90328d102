//! Names for code that a process wrote at run time, from its perf map: /tmp/perf-PID.map.
//!
//! Runtimes with a JIT compiler (Node.js with `--perf-basic-prof`, the JVM with an agent, .NET)
//! append a line for each function they compile: `START SIZE NAME`, both numbers in hex. A later
//! line may reuse the addresses of a function that was freed. A map only grows, so each reading goes
//! on where the one before has ended ([`Position::read_on`]).
//!
//! What is read here comes out for others to see, so the file must be the process' own: see
//! [`crate::proc_dir::Credentials::owns`].

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::Arc;

use crate::proc_dir::{Credentials, ProcDir};

/// Bytes of a perf map that are read in all.
pub const MAX_BYTES: u64 = 8 << 20;
/// Bytes of a perf map that are read at once.
const MAX_READ_BYTES: u64 = 1 << 20;
/// Functions kept for one process.
pub const MAX_FUNCTIONS: usize = 65_536;
/// Bytes of names kept for one process.
pub const MAX_NAME_BYTES: usize = 2 << 20;
/// Bytes kept of one name.
const MAX_NAME: usize = 1024;
/// Functions tried below an address: later ones may lie inside earlier ones that were freed.
const MAX_LOOK_BACK: usize = 8;

/// The functions of one process, by address.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PerfMap {
    /// Sorted by start. Cap: [`MAX_FUNCTIONS`].
    functions: Vec<Function>,
    /// All names, concatenated. Cap: [`MAX_NAME_BYTES`].
    names: String,
    position: Position,
}

/// How far a map was read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Position {
    /// The file: device and inode.
    file: (u64, u64),
    /// Bytes of it that were read, up to the end of a line.
    read_bytes: u64,
}

/// Lines of a map that were not read before.
#[derive(Debug)]
pub struct NewLines {
    /// The map begins anew: it is another file, or shorter.
    anew: bool,
    /// Whether there are any.
    any: bool,
    /// Parsed by whoever reads them, so that the process pays for that too. Its position is behind them.
    map: PerfMap,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Function {
    start: u64,
    end: u64,
    name_start: u32,
    name_end: u32,
}

impl Position {
    /// Reads what is new in the perf map of a process, at most 1 MiB. `None` if nothing is, or if the
    /// process has no perf map that is its own. The map of another file than before begins anew.
    pub fn read_on(self, process: &ProcDir, credentials: &Credentials) -> Option<NewLines> {
        let file = process.open_in_root(&format!("/tmp/perf-{}.map", credentials.inner_pid))?;
        let data = file.metadata().ok().filter(|_| credentials.owns(&file))?;
        let identity = (data.dev(), data.ino());
        let anew = identity != self.file || data.size() < self.read_bytes;
        let begin = if anew { 0 } else { self.read_bytes };
        let end = data.size().min(MAX_BYTES).min(begin.saturating_add(MAX_READ_BYTES));
        let mut lines = read_range(&file, begin, end)?;
        // The last line may be half written. One that fills all that is read at once is no line.
        let whole = lines.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at.saturating_add(1));
        let whole = if whole == 0 && lines.len() as u64 == MAX_READ_BYTES { lines.len() } else { whole };
        lines.truncate(whole);
        let position = Self { file: identity, read_bytes: begin.saturating_add(whole as u64) };
        let parse = || NewLines { anew, any: whole > 0, map: PerfMap { position, ..PerfMap::parse(&lines) } };
        (anew || whole > 0).then(parse)
    }
}

impl PerfMap {
    /// How far it was read.
    pub fn position(&self) -> Position {
        self.position
    }

    /// Takes what [`Position::read_on`] has read. False if that is no line.
    pub fn take(&mut self, new: NewLines) -> bool {
        let NewLines { anew, any, map } = new;
        if anew {
            *self = map;
        } else {
            self.position = map.position;
            self.merge(&map);
        }
        any
    }

    /// Parses the content of a perf map. Total: lines that do not parse are skipped.
    pub fn parse(bytes: &[u8]) -> Self {
        let mut map = Self::default();
        map.append(bytes);
        map
    }

    /// Adds the functions of a map that was read later.
    fn merge(&mut self, later: &Self) {
        for function in &later.functions {
            let name = later.names.get(function.name_start as usize..function.name_end as usize).unwrap_or_default();
            if !self.add(function.start, function.end, name) {
                break;
            }
        }
        self.sort();
    }

    /// False if there is no room for it.
    fn add(&mut self, start: u64, end: u64, name: &str) -> bool {
        if self.functions.len() >= MAX_FUNCTIONS || self.names.len().saturating_add(name.len()) > MAX_NAME_BYTES {
            return false;
        }
        let Ok(name_start) = u32::try_from(self.names.len()) else { return false };
        self.names.push_str(name);
        let Ok(name_end) = u32::try_from(self.names.len()) else { return false };
        self.functions.push(Function { start, end, name_start, name_end });
        true
    }

    fn append(&mut self, bytes: &[u8]) {
        for line in bytes.split(|byte| *byte == b'\n') {
            let text = String::from_utf8_lossy(line);
            let mut words = text.splitn(3, ' ');
            let (Some(start), Some(size), Some(name)) = (words.next(), words.next(), words.next()) else { continue };
            let (Some(start), Some(size)) = (hex(start), hex(size)) else { continue };
            let name = head(name.trim(), MAX_NAME);
            let Some(end) = start.checked_add(size).filter(|_| size > 0 && !name.is_empty()) else { continue };
            if !self.add(start, end, name) {
                break;
            }
        }
        self.sort();
    }

    fn sort(&mut self) {
        // Stable: of two functions with one start the later one comes last, and is found first.
        self.functions.sort_by_key(|function| function.start);
    }

    /// Name of the function that holds `address`.
    pub fn find(&self, address: u64) -> Option<Arc<str>> {
        let behind = self.functions.partition_point(|function| function.start <= address);
        let before = self.functions.get(..behind)?.iter().rev().take(MAX_LOOK_BACK);
        let function = before.into_iter().find(|function| address < function.end)?;
        self.names.get(function.name_start as usize..function.name_end as usize).map(Arc::from)
    }

    /// Heap size in bytes.
    pub fn memory_estimate(&self) -> usize {
        self.functions.capacity().saturating_mul(size_of::<Function>()).saturating_add(self.names.capacity())
    }
}

/// The bytes `from..to` of a file, as far as it has them.
fn read_range(file: &File, from: u64, to: u64) -> Option<Vec<u8>> {
    let mut bytes = vec![0; usize::try_from(to.saturating_sub(from)).ok()?];
    let mut filled: usize = 0;
    while let Some(rest) = bytes.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        match file.read_at(rest, from.saturating_add(filled as u64)) {
            Ok(0) => break,
            Ok(more) => filled = filled.saturating_add(more),
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(_) => return None,
        }
    }
    bytes.truncate(filled);
    Some(bytes)
}

/// At most `most` bytes of a text, cut between characters.
fn head(text: &str, most: usize) -> &str {
    text.get(..text.floor_char_boundary(most)).unwrap_or_default()
}

fn hex(digits: &str) -> Option<u64> {
    let digits = digits.strip_prefix("0x").unwrap_or(digits);
    u64::from_str_radix(digits, 16).ok().filter(|_| !digits.starts_with('+'))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_latest_function_at_an_address_is_its_name() {
        let map = PerfMap::parse(
            b"1000 100 old\n0x1000 80 LazyCompile:~new /app/a b.js:1:2\nnonsense\n2000 zz no\n3000 0 empty\n10 10 first\n",
        );
        assert_eq!(map.find(0x1010).as_deref(), Some("LazyCompile:~new /app/a b.js:1:2"));
        assert_eq!(map.find(0x1090).as_deref(), Some("old"), "the new one is shorter");
        assert_eq!(map.find(0x1f).as_deref(), Some("first"));
        assert!([0, 0x20, 0x1100, 0x3000, u64::MAX].iter().all(|address| map.find(*address).is_none()));
    }

    #[test]
    fn a_process_names_its_own_code() {
        let path = format!("/tmp/perf-{}.map", std::process::id());
        let mut file = std::fs::File::create(&path).unwrap();
        write!(file, "abc000 10 jitted\nabd000 10 ha").unwrap();
        let process = ProcDir::of(std::process::id()).unwrap();
        let own = process.credentials().unwrap();
        let read_on = |map: &mut PerfMap, who| map.position().read_on(&process, who).is_some_and(|new| map.take(new));
        let mut map = PerfMap::default();
        assert!(read_on(&mut map, &own) && !read_on(&mut map, &own), "the same again");
        assert_eq!((map.find(0xabc008).as_deref(), map.find(0xabd008)), (Some("jitted"), None));
        writeln!(file, "lf").unwrap();
        assert!(read_on(&mut map, &own), "it has grown");
        assert_eq!((map.find(0xabc008).as_deref(), map.find(0xabd008).as_deref()), (Some("jitted"), Some("half")));
        // Another file begins anew; one of another user, and a link, are not read.
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, "abe000 10 other\n").unwrap();
        assert!(read_on(&mut map, &own) && map.find(0xabc008).is_none() && map.find(0xabe008).is_some());
        std::os::unix::fs::chown(&path, Some(12345), None).unwrap();
        let foreign = read_on(&mut PerfMap::default(), &own);
        let root_for_other = Credentials { users: vec![12345, 0, 0, 0], ..own.clone() };
        let two_users = read_on(&mut PerfMap::default(), &root_for_other);
        std::fs::rename(&path, format!("{path}.target")).unwrap();
        std::os::unix::fs::symlink(format!("{path}.target"), &path).unwrap();
        std::os::unix::fs::chown(format!("{path}.target"), Some(own.users[0]), None).unwrap();
        let link = read_on(&mut PerfMap::default(), &own);
        std::fs::remove_file(format!("{path}.target")).unwrap();
        std::fs::remove_file(&path).unwrap();
        assert_eq!((foreign, two_users, link), (false, false, false));
    }

    #[test]
    fn a_map_that_is_larger_than_is_read_keeps_its_beginning() {
        let dir = tempfile::tempfile().unwrap();
        assert_eq!(read_range(&dir, 0, 10), Some(Vec::new()));
        let mut map = PerfMap::default();
        let lines: String = (0..MAX_FUNCTIONS + 10).map(|at| format!("{:x} 8 f\n", at * 16)).collect();
        map.append(lines.as_bytes());
        assert_eq!(map.functions.len(), MAX_FUNCTIONS);
        map.append(b"ffffff0000 8 late\n");
        assert_eq!(map.find(0xffffff0000), None);
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_perf_map(bytes in proptest::collection::vec(any::<u8>(), 0..2000), address: u64) {
            PerfMap::parse(&bytes).find(address);
        }

        #[test]
        fn what_is_found_holds_the_address(lines in proptest::collection::vec((0..100_u64, 1..20_u64), 0..40), address in 0..130_u64) {
            let text: String = lines.iter().map(|(start, size)| format!("{start:x} {size:x} {start}+{size}\n")).collect();
            if let Some(name) = PerfMap::parse(text.as_bytes()).find(address) {
                let (start, size) = name.split_once('+').unwrap();
                let (start, size): (u64, u64) = (start.parse().unwrap(), size.parse().unwrap());
                prop_assert!((start..start + size).contains(&address));
            }
        }
    }
}
