//! `memtrace name-frames` (hidden): names the frames that standard input asks for, see `process::apart`.

use super::Outcome;
use crate::process::apart;

/// Arguments of `memtrace name-frames`.
#[derive(clap::Args, Debug)]
pub struct Args {}

/// Runs the verb.
pub fn run(_: &Args) -> Outcome {
    apart::child(std::io::stdin().lock(), std::io::stdout().lock())?;
    Ok(0)
}
