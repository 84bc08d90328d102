//! Any bytes as an ELF file: headers, stated addresses of offsets, unwind sections, their index.
#![no_main]

use std::io::Cursor;
use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use memtrace_unwind::elf::ElfHeaders;
use memtrace_unwind::modules::UnwindData;

fuzz_target!(|bytes: &[u8]| {
    let Ok(headers) = ElfHeaders::read(Cursor::new(bytes)) else { return };
    for segment in &headers.segments {
        let found = headers.stated_address(segment.offset);
        assert!(segment.file_bytes == 0 || found.is_some());
        headers.stated_address_of_mapping(segment.offset & !0xfff, 4096);
    }
    headers.stated_address(u64::MAX);
    UnwindData::read(Arc::new(headers), Cursor::new(bytes), 1 << 20);
});
