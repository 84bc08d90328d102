//! `memtrace name-frames` (hidden): names the stack frames that standard input asks for, see `process::apart`.

use super::VerbResult;
use crate::process::apart;

/// Arguments of `memtrace name-frames`.
#[derive(clap::Args, Debug)]
pub struct Args {}

/// Runs the verb.
pub fn run(_: &Args) -> VerbResult {
    apart::child(std::io::stdin().lock(), std::io::stdout().lock())?;
    Ok(0)
}
