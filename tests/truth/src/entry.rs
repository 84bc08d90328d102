//! Finds the entry point of a module: the offset in its file at which an ELF is entered. Total: a
//! file that is not ELF has none.

/// File offset of the entry point of an ELF with these bytes.
pub(crate) fn offset(elf: &[u8]) -> Option<u64> {
    const LOAD: u32 = 1;
    // 64 bit, little endian: the only format this runs on
    if elf.get(..6)? != b"\x7fELF\x02\x01" {
        return None;
    }
    let entry = u64_at(elf, 24)?;
    let table = usize::try_from(u64_at(elf, 32)?).ok()?;
    let (size, count) = (usize::from(u16_at(elf, 54)?), usize::from(u16_at(elf, 56)?));
    (0..count).find_map(|index| {
        let at = table.checked_add(index.checked_mul(size)?)?;
        let kind = u32::from_le_bytes(elf.get(at..at.checked_add(4)?)?.try_into().ok()?);
        let (offset, address, length) = (u64_at(elf, at + 8)?, u64_at(elf, at + 16)?, u64_at(elf, at + 32)?);
        let inside = entry.checked_sub(address)?;
        (kind == LOAD && inside < length).then(|| offset.checked_add(inside))?
    })
}

fn u64_at(elf: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(elf.get(at..at.checked_add(8)?)?.try_into().ok()?))
}

fn u16_at(elf: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(elf.get(at..at.checked_add(2)?)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_program_is_entered_inside_its_file() {
        let elf = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        let entry = offset(&elf).unwrap();
        assert!(entry > 64 && entry < elf.len() as u64);
    }

    #[test]
    fn nonsense_has_no_entry() {
        assert_eq!(offset(b""), None);
        assert_eq!(offset(b"\x7fELF\x02\x01"), None);
        let elf = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        assert_eq!(offset(&elf[..70]), None);
    }
}
