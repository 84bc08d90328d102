//! `cargo xtask sim`: runs the seeded simulator of the engine.

use anyhow::{Context, Result};
use memtrace_harness::checkout::Checkout;
use memtrace_harness::run::{cargo, run as run_command};

/// Arguments of `cargo xtask sim`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// What the simulator takes (`cargo xtask sim -- --help`): `--seed N` repeats a run, `--seconds S` runs new seeds
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<String>,
}

/// Runs the verb.
pub(crate) fn run(checkout: &Checkout, args: &Args) -> Result<()> {
    let mut simulator = cargo(checkout);
    simulator.args(["run", "--quiet", "--package", "memtrace-sim", "--"]).args(&args.arguments);
    run_command(&mut simulator).context("the simulator found something")
}
