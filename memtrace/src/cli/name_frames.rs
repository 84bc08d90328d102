//! `memtrace name-frames` (hidden): names the frames that standard input lists,
//! see [`crate::symbolize::subprocess`].

use super::VerbResult;
use crate::symbolize::subprocess;

/// Arguments of `memtrace name-frames`.
#[derive(clap::Args, Debug)]
pub struct Args {}

/// Runs the verb.
pub fn run(_: &Args) -> VerbResult {
    subprocess::child(std::io::stdin().lock(), std::io::stdout().lock())?;
    Ok(0)
}
