//! `cargo xtask ci`: what a reviewer should not have to check. Needs no eBPF toolchain and no root.

use std::process::Command;

use anyhow::{Result, bail};

use crate::built::USERSPACE;
use crate::place::Place;
use crate::run::{cargo, run as run_command, say};
use crate::{setup, tidy};

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
    check("format", format(place));
    check("house rules", tidy::check(place));
    check("licences, bans and sources of dependencies", deny(place));
    check("lints", lints(place));
    check("docs", docs(place));
    if !failed.is_empty() {
        bail!("{}", failed.join(", "));
    }
    Ok(())
}

/// The checks that take seconds, up to the first that fails.
pub(crate) fn quick(place: &Place) -> Result<()> {
    format(place)?;
    tidy::check(place)?;
    deny(place)
}

fn format(place: &Place) -> Result<()> {
    run_command(cargo(place).args(["fmt", "--all", "--check"]))
}

/// Lints, as errors.
pub(crate) fn lints(place: &Place) -> Result<()> {
    let mut clippy = cargo(place);
    clippy.arg("clippy").args(USERSPACE).args(["--all-targets", "--locked", "--", "-D", "warnings"]);
    run_command(&mut clippy)
}

/// With private items: this is a program, and its docs are for who works on it.
pub(crate) fn docs(place: &Place) -> Result<()> {
    let mut doc = cargo(place);
    doc.arg("doc")
        .args(USERSPACE)
        .args(["--no-deps", "--document-private-items", "--locked"])
        .env("RUSTDOCFLAGS", "-D warnings");
    run_command(&mut doc)
}

/// Advisories are left out: they need a database from the network, and the same tree must give the
/// same answer tomorrow. `cargo deny check advisories` is for a scheduled job.
fn deny(place: &Place) -> Result<()> {
    setup::cargo_deny(place)?;
    let mut deny = Command::new(place.tool("cargo-deny"));
    deny.current_dir(&place.root).args(["--locked", "check", "bans", "licenses", "sources"]);
    run_command(&mut deny)
}
