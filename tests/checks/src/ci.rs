//! `cargo xtask ci`: what a reviewer should not have to check. Needs no eBPF toolchain and no root.

use std::process::Command;

use anyhow::{Result, bail};

use memtrace_harness::built::USERSPACE;
use memtrace_harness::checkout::Checkout;
use memtrace_harness::run::{cargo, run as run_command, say};
use memtrace_harness::setup;

use crate::tidy;

/// Arguments of `cargo xtask ci`.
#[derive(clap::Args)]
pub struct Args {}

/// Runs every check and fails at the end if any did, so that one run shows everything there is to
/// fix.
pub fn run(checkout: &Checkout, _args: &Args) -> Result<()> {
    let mut failed = Vec::new();
    let mut check = |name: &'static str, outcome: Result<()>| match outcome {
        Ok(()) => say(format_args!("ci: {name}: ok")),
        Err(error) => {
            say(format_args!("ci: {name}: FAILED: {error:#}"));
            failed.push(name);
        }
    };
    check("format", format(checkout));
    check("house rules", tidy::check(checkout));
    check("licences, bans and sources of dependencies", deny(checkout));
    check("lints", lints(checkout));
    check("docs", docs(checkout));
    if !failed.is_empty() {
        bail!("{}", failed.join(", "));
    }
    Ok(())
}

/// Runs the checks that take seconds; stops at the first failure.
pub fn quick(checkout: &Checkout) -> Result<()> {
    format(checkout)?;
    tidy::check(checkout)?;
    deny(checkout)
}

fn format(checkout: &Checkout) -> Result<()> {
    run_command(cargo(checkout).args(["fmt", "--all", "--check"]))
}

/// Runs clippy with warnings as errors.
pub fn lints(checkout: &Checkout) -> Result<()> {
    let mut clippy = cargo(checkout);
    clippy.arg("clippy").args(USERSPACE).args(["--all-targets", "--locked", "--", "-D", "warnings"]);
    run_command(&mut clippy)
}

/// Builds the docs with warnings as errors, private items included: readers of these docs work on
/// the code.
pub fn docs(checkout: &Checkout) -> Result<()> {
    let mut doc = cargo(checkout);
    doc.arg("doc")
        .args(USERSPACE)
        .args(["--no-deps", "--document-private-items", "--locked"])
        .env("RUSTDOCFLAGS", "-D warnings");
    run_command(&mut doc)
}

/// Checks licences, bans and sources. Advisories are left out: they need a database from the
/// network, and the same tree must give the same answer tomorrow. `cargo deny check advisories` is
/// for a scheduled job.
fn deny(checkout: &Checkout) -> Result<()> {
    setup::cargo_deny(checkout)?;
    let mut deny = Command::new(checkout.tool("cargo-deny"));
    deny.current_dir(&checkout.root).args(["--locked", "check", "bans", "licenses", "sources"]);
    run_command(&mut deny)
}
