//! `cargo xtask ci`: what a reviewer should not have to check. Needs no eBPF toolchain and no root.

use std::process::Command;

use anyhow::{Result, bail};

use crate::place::Place;
use crate::run::{cargo, run as run_command, say};
use crate::{setup, tidy};

/// The version of cargo-deny that `ci` installs.
const CARGO_DENY_VERSION: &str = "0.20.2";

/// Every member but the eBPF programs, which only compile for the BPF target.
const USERSPACE: [&str; 3] = ["--workspace", "--exclude", "memtrace-ebpf"];

/// Arguments of `cargo xtask ci`.
#[derive(clap::Args)]
pub(crate) struct Args {}

/// Runs every check, then fails if any did: one run shows all there is to mend.
pub(crate) fn run(place: &Place, _args: &Args) -> Result<()> {
    let mut failed = Vec::new();
    let mut check = |name: &'static str, outcome: Result<()>| match outcome {
        Ok(()) => say(format_args!("ci: {name}: ok")),
        Err(error) => {
            say(format_args!("ci: {name}: FAILED: {error:#}"));
            failed.push(name);
        }
    };
    check("format", run_command(cargo(place).args(["fmt", "--all", "--check"])));
    check("house rules", tidy::check(place));
    check("lints", lints(place));
    check("licences, bans and sources of dependencies", deny(place));
    check("docs", docs(place));
    if !failed.is_empty() {
        bail!("{}", failed.join(", "));
    }
    Ok(())
}

fn lints(place: &Place) -> Result<()> {
    let mut clippy = cargo(place);
    clippy.arg("clippy").args(USERSPACE).args(["--all-targets", "--locked", "--", "-D", "warnings"]);
    run_command(&mut clippy)
}

fn docs(place: &Place) -> Result<()> {
    let mut doc = cargo(place);
    doc.arg("doc").args(USERSPACE).args(["--no-deps", "--locked"]).env("RUSTDOCFLAGS", "-D warnings");
    run_command(&mut doc)
}

/// Advisories are left out: they need a database from the network, and the same tree must give the
/// same answer tomorrow. `cargo deny check advisories` is for a scheduled job.
fn deny(place: &Place) -> Result<()> {
    setup::cargo_tool(place, "cargo-deny", CARGO_DENY_VERSION)?;
    let mut deny = Command::new(place.tool("cargo-deny"));
    deny.current_dir(&place.root).args(["--locked", "check", "bans", "licenses", "sources"]);
    run_command(&mut deny)
}
