//! `memtrace stack-worker` (hidden): unwinds stacks, see [`crate::stacks::worker`].

use super::VerbResult;
use crate::own_process;
use crate::stacks::worker;

/// Arguments of `memtrace stack-worker`.
#[derive(clap::Args, Debug)]
pub struct Args {}

/// Runs the verb.
pub fn run(_: &Args) -> VerbResult {
    // The recorder started it, and goes first.
    own_process::lower_priority();
    worker::run()?;
    Ok(0)
}
