//! Takes in the eBPF object that `cargo xtask build` made, or an empty one when there is none.
//!
//! It never builds the object itself: `cargo check`, clippy, docs and the unit tests of userspace
//! must work on a machine without an eBPF toolchain.

use std::error::Error;
use std::path::PathBuf;

const VARIABLE: &str = "MEMTRACE_EBPF_OBJECT";

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-env-changed={VARIABLE}");
    let out = PathBuf::from(std::env::var_os("OUT_DIR").ok_or("cargo did not set OUT_DIR")?).join("memtrace.bpf.o");
    let Some(object) = std::env::var_os(VARIABLE).map(PathBuf::from) else {
        return std::fs::write(&out, []).map_err(|e| format!("failed to write {}: {e}", out.display()).into());
    };
    println!("cargo::rerun-if-changed={}", object.display());
    if !object.is_absolute() {
        return Err(format!("{VARIABLE}={} is not an absolute path", object.display()).into());
    }
    let bytes = std::fs::read(&object).map_err(|e| format!("failed to read {VARIABLE}={}: {e}", object.display()))?;
    std::fs::write(&out, bytes).map_err(|e| format!("failed to write {}: {e}", out.display()))?;
    Ok(())
}
