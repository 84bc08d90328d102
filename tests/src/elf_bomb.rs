//! An ELF file whose debug information grows without end when it is read.

/// A 64-bit ELF file of this architecture with a build id, code, and debug information that has
/// `bytes` bytes of zeros once it is decompressed. Returns where in the file the code is, too.
pub fn file(build_id: [u8; 20], bytes: u64, code: &[u8]) -> anyhow::Result<(Vec<u8>, usize)> {
    let mut encoder = zstd::Encoder::new(Vec::new(), 3)?;
    std::io::copy(&mut std::io::Read::take(std::io::repeat(0), bytes), &mut encoder)?;
    let mut packed = encoder.finish()?;
    // Headers are aligned; what follows the one frame is not looked at.
    packed.resize(packed.len().next_multiple_of(8), 0);
    let note = [&b"\x04\0\0\0\x14\0\0\0\x03\0\0\0GNU\0"[..], &build_id, &[0; 4]].concat();
    let strings = b"\0.debug_info\0.debug_abbrev\0.shstrtab\0\0\0\0";
    // ELFCOMPRESS_ZSTD, reserved, size, alignment
    let debug = [&2_u64.to_le_bytes()[..], &bytes.to_le_bytes(), &1_u64.to_le_bytes(), &packed].concat();
    let mut code = code.to_vec();
    code.resize(code.len().next_multiple_of(8), 0);
    let note_at = 64 + 2 * 56_usize;
    let code_at = note_at + note.len();
    let debug_at = code_at + code.len();
    let strings_at = debug_at + debug.len();
    let headers_at = strings_at + strings.len();
    let words = |words: &[u64]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<u8>>();
    let halves = |first: u32, second: u32| u64::from(first) | u64::from(second) << 32;
    let machine: u16 = if cfg!(target_arch = "aarch64") { 183 } else { 62 };
    let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x03\0".to_vec();
    file.extend(machine.to_le_bytes());
    file.extend(1_u32.to_le_bytes());
    file.extend(words(&[0, 64, headers_at as u64]));
    file.extend([0_u16, 0, 64, 56, 2, 64, 4, 3].iter().flat_map(|half| half.to_le_bytes()));
    file.extend(words(&[halves(1, 5), 0, 0, 0, 0x10000, 0x10000, 0x1000]));
    file.extend(words(&[halves(4, 4), note_at as u64, 0, 0, note.len() as u64, note.len() as u64, 4]));
    file.extend([note, code, debug, strings.to_vec()].concat());
    file.extend([0; 64]);
    for (name, kind, flags, at, size) in [
        (1, 1, 0x800, debug_at, strings_at - debug_at),
        (13, 1, 0x800, debug_at, strings_at - debug_at),
        (27, 3, 0, strings_at, strings.len()),
    ] {
        file.extend(words(&[halves(name, kind), flags, 0, at as u64, size as u64, 0, 1, 0]));
    }
    Ok((file, code_at))
}
