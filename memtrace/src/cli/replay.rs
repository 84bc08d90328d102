//! `memtrace replay`.

use super::Outcome;

/// Arguments of `memtrace replay`.
#[derive(clap::Args, Debug)]
pub struct Args {}

/// Runs the verb.
pub fn run(_args: &Args) -> Outcome {
    Ok(0)
}
