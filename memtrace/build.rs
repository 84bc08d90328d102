//! Embeds the eBPF object that `cargo xtask build` made; without one, a stub, so that check, clippy and docs
//! need no BPF toolchain.

use std::path::PathBuf;

fn main() -> std::io::Result<()> {
    println!("cargo:rerun-if-env-changed=MEMTRACE_EBPF_OBJECT");
    let out = PathBuf::from(std::env::var_os("OUT_DIR").unwrap_or_default()).join("memtrace.bpf.o");
    match std::env::var_os("MEMTRACE_EBPF_OBJECT") {
        Some(object) => {
            println!("cargo:rerun-if-changed={}", object.display());
            std::fs::copy(&object, &out)?;
        }
        None => std::fs::write(&out, [])?,
    }
    Ok(())
}
