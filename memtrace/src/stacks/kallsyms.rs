//! Names of kernel functions, from /proc/kallsyms.
//!
//! The file has some 10 MiB and takes the kernel about a tenth of a second to print, so it is read
//! once, at start, and kept as addresses and names of functions only. Without CAP_SYSLOG the
//! kernel prints every address as 0 (`kptr_restrict`), and nothing has a name.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::time::{Duration, Instant};

use tracing::debug;

/// Longest line that is read, bytes.
const MAX_LINE: u64 = 4096;
/// Functions kept; a kernel with all its modules has about a hundred thousand.
const MAX_FUNCTIONS: usize = 1 << 20;
/// Bytes of names kept.
const MAX_NAME_BYTES: usize = 32 << 20;
/// An address farther than this from the start of a function is in a gap, not in the function.
const MAX_FUNCTION_BYTES: u64 = 1 << 20;
/// An address without a name may be in a kernel module that was loaded since. Pause between two
/// readings because of that.
const REREAD: Duration = Duration::from_secs(60);

/// The kernel's functions by address.
#[derive(Debug, Default)]
pub struct KernelSymbols {
    /// Start address, and where the name begins in `names`; sorted. Cap: [`MAX_FUNCTIONS`].
    functions: Vec<(u64, u32)>,
    /// Names, concatenated, each ended by a NUL. Cap: [`MAX_NAME_BYTES`].
    names: Vec<u8>,
    read: Option<Instant>,
}

impl KernelSymbols {
    /// Reads the symbols of the running kernel; if that fails, there are none.
    pub fn read() -> Self {
        let mut symbols = Self::default();
        symbols.read_again();
        symbols
    }

    fn read_again(&mut self) {
        match File::open("/proc/kallsyms") {
            Ok(file) => *self = Self::parse(BufReader::with_capacity(1 << 16, file)),
            Err(error) => debug!("no names for kernel addresses: {error}"),
        }
        self.read = Some(Instant::now());
    }

    /// Parses lines of `ADDRESS TYPE NAME`. Total: other lines are skipped.
    fn parse(mut lines: impl BufRead) -> Self {
        let mut symbols = Self::default();
        let mut line = Vec::new();
        loop {
            line.clear();
            match lines.by_ref().take(MAX_LINE).read_until(b'\n', &mut line) {
                Ok(0) | Err(_) => break,
                Ok(_) => symbols.line(&line),
            }
            if symbols.functions.len() >= MAX_FUNCTIONS || symbols.names.len() >= MAX_NAME_BYTES {
                break;
            }
        }
        // Stable: of several names of one address the first one is kept.
        symbols.functions.sort_by_key(|(start, _)| *start);
        symbols.functions.dedup_by_key(|(start, _)| *start);
        symbols.functions.shrink_to_fit();
        symbols.names.shrink_to_fit();
        symbols
    }

    fn line(&mut self, line: &[u8]) {
        let mut words = line.split(u8::is_ascii_whitespace).filter(|word| !word.is_empty());
        let (Some(address), Some(kind), Some(name)) = (words.next(), words.next(), words.next()) else { return };
        if !matches!(kind, b"t" | b"T" | b"w" | b"W") || name.contains(&0) {
            return;
        }
        let address = std::str::from_utf8(address).ok().and_then(|hex| u64::from_str_radix(hex, 16).ok());
        let (Some(address), Ok(begin)) = (address.filter(|address| *address != 0), u32::try_from(self.names.len()))
        else {
            return;
        };
        self.functions.push((address, begin));
        self.names.extend_from_slice(name);
        self.names.push(0);
    }

    /// Name of the function that holds `address`. If there is none, the symbols are read again, at
    /// most once a minute.
    pub fn name(&mut self, address: u64) -> Option<String> {
        let found = self.find(address);
        if found.is_none() && self.read.is_some_and(|read| read.elapsed() >= REREAD) {
            self.read_again();
            return self.find(address);
        }
        found
    }

    fn find(&self, address: u64) -> Option<String> {
        let after = self.functions.partition_point(|(start, _)| *start <= address);
        let (start, begin) = self.functions.get(after.checked_sub(1)?)?;
        if address.saturating_sub(*start) >= MAX_FUNCTION_BYTES {
            return None;
        }
        let name = self.names.get(*begin as usize..)?.split(|byte| *byte == 0).next()?;
        Some(String::from_utf8_lossy(name).into_owned())
    }

    /// Heap size in bytes.
    pub fn memory_estimate(&self) -> usize {
        self.functions.capacity() * size_of::<(u64, u32)>() + self.names.capacity()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_function_that_holds_an_address() {
        let lines = b"ffffffff81000100 T first\nffffffff81000300 t second\t[module]\nffffffff81000100 T alias\n\
                      ffffffff81000200 d data\nnonsense\n\nzz T no\n";
        let mut symbols = KernelSymbols::parse(&lines[..]);
        assert_eq!(symbols.name(0xffff_ffff_8100_0310).as_deref(), Some("second"));
        assert_eq!(symbols.name(0xffff_ffff_8100_01ff).as_deref(), Some("first"));
        assert_eq!(symbols.name(0x10), None);
        assert_eq!(symbols.name(u64::MAX), None, "too far behind the last one");
    }

    #[test]
    fn hidden_addresses_give_no_names() {
        let mut symbols = KernelSymbols::parse(&b"0000000000000000 T first\n"[..]);
        assert_eq!(symbols.name(0xffff_ffff_8100_0310), None);
    }

    #[test]
    fn the_running_kernels_are_kept_small() {
        let symbols = KernelSymbols::read();
        assert!(symbols.memory_estimate() < 16 << 20, "{}", symbols.memory_estimate());
    }
}
