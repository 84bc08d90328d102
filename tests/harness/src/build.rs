//! `cargo xtask build`: the eBPF programs first, then the agent with their object inside.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::built::Built;
use crate::checkout::{Checkout, Profile};
use crate::run::{run as run_command, say};
use crate::setup;
use crate::toolchain::{self, BPF_TARGET, Compiler, Toolchain};

/// Environment variable that tells `memtrace/build.rs` which eBPF object to embed; unset, the agent
/// is built without one.
pub const OBJECT_VARIABLE: &str = "MEMTRACE_EBPF_OBJECT";

/// Arguments of `cargo xtask build`.
#[derive(clap::Args)]
pub struct Args {
    /// Optimize userspace too (the eBPF side always is)
    #[arg(long)]
    release: bool,
}

/// Runs the verb.
pub fn run(checkout: &Checkout, args: &Args) -> Result<()> {
    setup::bpf(checkout)?;
    let profile = Profile::of(args.release);
    let object = ebpf(checkout)?;
    let built = Built::programs(checkout, profile, &object)?;
    say(format_args!("built {}", built.program("memtrace")?.display()));
    Ok(())
}

/// Builds the eBPF object and returns its path.
pub fn ebpf(checkout: &Checkout) -> Result<PathBuf> {
    let toolchain = toolchain::find(checkout)?;
    say(format_args!("building the eBPF programs with {}", toolchain.shown()));
    run_command(&mut ebpf_command(checkout, &toolchain)?).context("failed to build the eBPF programs")?;
    let object = checkout.ebpf_object();
    check_object(&object)?;
    Ok(object)
}

/// The flags aya-build uses: BTF generated from debug info, and the CPU architecture whose
/// registers hooks read.
fn ebpf_command(checkout: &Checkout, toolchain: &Toolchain) -> Result<Command> {
    let root = checkout.root.to_str().context("the repository's path is not UTF-8")?;
    let linker = toolchain.linker.to_str().context("the linker's path is not UTF-8")?;
    let flags = [
        format!("--cfg=bpf_target_arch=\"{}\"", std::env::consts::ARCH),
        "-Cdebuginfo=2".to_owned(),
        "-Clink-arg=--btf".to_owned(),
        format!("-Clinker={linker}"),
        // keep the path of this checkout out of the object
        format!("--remap-path-prefix={root}=."),
    ];
    let mut build = toolchain.cargo(checkout);
    build.args(["build", "--package", "memtrace-ebpf", "--bins", "--release", "--target", BPF_TARGET]);
    build.arg("--target-dir").arg(checkout.bpf_target());
    if toolchain.builds_core() {
        build.args(["-Z", "build-std=core"]);
    }
    if matches!(toolchain.compiler, Compiler::Debian { .. }) {
        // aya-ebpf enables the feature `asm_experimental_arch`, which a stable compiler refuses
        // otherwise
        build.env("RUSTC_BOOTSTRAP", "1");
    }
    build.env("CARGO_ENCODED_RUSTFLAGS", flags.join("\u{1f}"));
    Ok(build)
}

fn check_object(object: &Path) -> Result<()> {
    let bytes = std::fs::read(object).with_context(|| format!("failed to read {}", object.display()))?;
    if !bytes.starts_with(b"\x7fELF") {
        bail!("{} is not an ELF object: is the linker a bpf-linker?", object.display());
    }
    for section in [".BTF\0", "license\0", "maps\0"] {
        if !bytes.windows(section.len()).any(|window| window == section.as_bytes()) {
            let name = section.trim_end_matches('\0');
            bail!("{} has no section {name}: the loader would refuse it", object.display());
        }
    }
    say(format_args!("eBPF object: {} ({} KiB)", object.display(), bytes.len() / 1024));
    Ok(())
}
