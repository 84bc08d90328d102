//! The eBPF object built into this binary.

/// The object, or `None` in a build without a BPF toolchain (`cargo xtask build` makes a complete one).
pub fn ebpf_object() -> Option<&'static [u8]> {
    let object = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/memtrace.bpf.o"));
    (!object.is_empty()).then_some(object)
}
