//! Names for kernel addresses, from /proc/kallsyms: read as a stream, nothing kept but the answers.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};

/// Most addresses resolved at once.
pub const MAX_ADDRESSES: usize = 128;
/// Longest line that is looked at.
const MAX_LINE: u64 = 4096;
/// A function larger than this is a gap between symbols, not a function.
const MAX_FUNCTION_BYTES: u64 = 1 << 20;

/// Names the functions that hold the first [`MAX_ADDRESSES`] of `addresses`, in their order; `None` for an address
/// nobody owns. Without CAP_SYSLOG the kernel shows zeros and nothing has a name.
pub fn names(addresses: &[u64]) -> std::io::Result<Vec<Option<String>>> {
    Ok(resolve(BufReader::new(File::open("/proc/kallsyms")?), addresses))
}

/// The same from any stream of `ADDRESS TYPE NAME` lines.
fn resolve(mut symbols: impl BufRead, addresses: &[u64]) -> Vec<Option<String>> {
    let mut best: Vec<(u64, u64, Option<String>)> =
        addresses.iter().take(MAX_ADDRESSES).map(|address| (*address, 0, None)).collect();
    let mut line = Vec::new();
    loop {
        line.clear();
        match symbols.by_ref().take(MAX_LINE).read_until(b'\n', &mut line) {
            Ok(0) | Err(_) => break,
            Ok(_) => {}
        }
        let Ok(text) = std::str::from_utf8(&line) else { continue };
        let mut words = text.split_ascii_whitespace();
        let (Some(address), Some(kind), Some(name)) = (words.next(), words.next(), words.next()) else { continue };
        let Ok(address) = u64::from_str_radix(address, 16) else { continue };
        if address == 0 || !matches!(kind, "t" | "T" | "w" | "W") {
            continue;
        }
        for (wanted, start, found) in &mut best {
            if address <= *wanted && address > *start {
                *start = address;
                *found = Some(name.to_owned());
            }
        }
    }
    best.into_iter()
        .map(|(wanted, start, name)| name.filter(|_| wanted.saturating_sub(start) < MAX_FUNCTION_BYTES))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_function_that_holds_an_address() {
        let symbols = b"ffffffff81000100 T first\nffffffff81000300 t second\nffffffff81000200 d data\nnonsense\n";
        let found = resolve(&symbols[..], &[0xffff_ffff_8100_0310, 0xffff_ffff_8100_01ff, 0x10, u64::MAX]);
        assert_eq!(found, [Some("second".to_owned()), Some("first".to_owned()), None, None]);
    }

    #[test]
    fn hidden_addresses_give_no_names() {
        assert_eq!(resolve(&b"0000000000000000 T first\n"[..], &[0xffff_ffff_8100_0310]), [None]);
    }
}
