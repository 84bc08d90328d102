//! Names for code that a process wrote at run time, from its perf map: /tmp/perf-PID.map.
//!
//! Runtimes with a JIT compiler (Node.js with `--perf-basic-prof`, the JVM with an agent, .NET)
//! append a line for each function they compile: `START SIZE NAME`, both numbers in hex. A later
//! line may reuse the addresses of a function that was freed.

use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use crate::proc_dir::ProcDir;

/// Bytes of a perf map that are read.
pub const MAX_BYTES: u64 = 32 << 20;
/// Functions kept for one process.
pub const MAX_FUNCTIONS: usize = 262_144;
/// Bytes of names kept for one process.
pub const MAX_NAME_BYTES: usize = 16 << 20;
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
    /// Size of the file when it was read, bytes.
    file_bytes: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Function {
    start: u64,
    end: u64,
    name_start: u32,
    name_end: u32,
}

impl PerfMap {
    /// Reads the perf map of a process, if it has one and it is larger than `known_bytes`. As perf
    /// does, trusts it only if the process' user or root owns it.
    pub fn read(process: &ProcDir, known_bytes: u64) -> Option<Self> {
        let (pid, users) = process.status()?;
        let file = process.open_in_root(&format!("/tmp/perf-{pid}.map"))?;
        let data = file.metadata().ok()?;
        if (data.uid() != 0 && !users.contains(&data.uid())) || data.size() <= known_bytes {
            return None;
        }
        let mut bytes = Vec::new();
        file.take(MAX_BYTES).read_to_end(&mut bytes).ok()?;
        Some(Self { file_bytes: data.size(), ..Self::parse(&bytes) })
    }

    /// Parses the content of a perf map. Total: lines that do not parse are skipped.
    pub fn parse(bytes: &[u8]) -> Self {
        let mut map = Self::default();
        for line in bytes.split(|byte| *byte == b'\n') {
            let text = String::from_utf8_lossy(line);
            let mut words = text.splitn(3, ' ');
            let (Some(start), Some(size), Some(name)) = (words.next(), words.next(), words.next()) else { continue };
            let (Some(start), Some(size)) = (hex(start), hex(size)) else { continue };
            let name = head(name.trim(), MAX_NAME);
            let Some(end) = start.checked_add(size).filter(|_| size > 0 && !name.is_empty()) else { continue };
            if map.functions.len() >= MAX_FUNCTIONS || map.names.len().saturating_add(name.len()) > MAX_NAME_BYTES {
                break;
            }
            let Ok(name_start) = u32::try_from(map.names.len()) else { break };
            map.names.push_str(name);
            let Ok(name_end) = u32::try_from(map.names.len()) else { break };
            map.functions.push(Function { start, end, name_start, name_end });
        }
        // Stable: of two functions with one start the later one comes last, and is found first.
        map.functions.sort_by_key(|function| function.start);
        map.functions.shrink_to_fit();
        map.names.shrink_to_fit();
        map
    }

    /// Name of the function that holds `address`.
    pub fn find(&self, address: u64) -> Option<Arc<str>> {
        let behind = self.functions.partition_point(|function| function.start <= address);
        let before = self.functions.get(..behind)?.iter().rev().take(MAX_LOOK_BACK);
        let function = before.into_iter().find(|function| address < function.end)?;
        self.names.get(function.name_start as usize..function.name_end as usize).map(Arc::from)
    }

    /// Size of the file when it was read, in bytes.
    pub fn file_bytes(&self) -> u64 {
        self.file_bytes
    }

    /// Heap size in bytes.
    pub fn memory_estimate(&self) -> usize {
        self.functions.capacity().saturating_mul(size_of::<Function>()).saturating_add(self.names.capacity())
    }
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
        writeln!(file, "abc000 10 jitted").unwrap();
        let process = ProcDir::of(std::process::id()).unwrap();
        let map = PerfMap::read(&process, 0).unwrap();
        let unchanged = PerfMap::read(&process, map.file_bytes());
        // Owned by another user, and then not a regular file.
        std::os::unix::fs::chown(&path, Some(12345), None).unwrap();
        let foreign = PerfMap::read(&process, 0);
        std::fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink("/proc/self/maps", &path).unwrap();
        let link = PerfMap::read(&process, 0);
        std::fs::remove_file(&path).unwrap();
        assert_eq!(map.find(0xabc008).as_deref(), Some("jitted"));
        assert_eq!((unchanged, foreign, link), (None, None, None));
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
