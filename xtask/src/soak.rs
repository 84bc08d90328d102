//! `cargo xtask soak`: one agent under everything that is known to hurt it, beside a kill a second.

use std::process::Command;

use anyhow::{Context, Result, bail};
use memtrace_harness::built::Built;
use memtrace_harness::checkout::{Checkout, Profile, has_btf, is_root};
use memtrace_harness::run::run as run_command;
use memtrace_harness::{build, setup};

/// Arguments of `cargo xtask soak`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// What the soak takes (`cargo xtask soak -- --help`): `--minutes N`, `--attacks NAME,..`
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<String>,
}

/// Runs the verb.
pub(crate) fn run(checkout: &Checkout, args: &Args) -> Result<()> {
    if !is_root() || !has_btf() {
        bail!("the soak runs an agent: it needs root and a kernel with BTF at /sys/kernel/btf/vmlinux");
    }
    setup::bpf(checkout)?;
    let object = build::ebpf(checkout)?;
    let built = Built::programs(checkout, Profile::Release, &object)?;
    let mut soak = Command::new(built.program("soak")?);
    soak.env("MEMTRACE_BIN", built.program("memtrace")?).args(&args.arguments);
    run_command(&mut soak).context("the agent did not come through")
}
