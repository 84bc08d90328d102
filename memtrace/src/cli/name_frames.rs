//! `memtrace name-frames` (hidden): names the frames that standard input lists,
//! see [`crate::symbolize::subprocess`].

use super::Outcome;
use crate::symbolize::subprocess;

/// Arguments of `memtrace name-frames`.
#[derive(clap::Args, Debug)]
pub struct Args {}

/// Runs the verb.
pub fn run(_: &Args) -> Outcome {
    subprocess::child(std::io::stdin().lock(), std::io::stdout().lock())?;
    Ok(0)
}
