//! `memtrace report`.

use super::Outcome;

/// Arguments of `memtrace report`.
#[derive(clap::Args, Debug)]
pub struct Args {}

/// Runs the verb.
pub fn run(_args: &Args) -> Outcome {
    Ok(0)
}
