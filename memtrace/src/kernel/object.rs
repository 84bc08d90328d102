//! The eBPF object that this binary carries.

/// The object that `cargo xtask build` embeds, aligned as an ELF reader needs it. `None` in a
/// binary that was built without it (`cargo build`), which can read incidents but trace nothing.
pub fn ebpf_object() -> Option<&'static [u8]> {
    let object: &'static [u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/memtrace.bpf.o"));
    Some(object).filter(|object| !object.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_object_is_aligned_elf_or_absent() {
        if let Some(object) = ebpf_object() {
            assert!(object.starts_with(b"\x7fELF"));
            assert_eq!(object.as_ptr() as usize % 8, 0);
        }
    }
}
