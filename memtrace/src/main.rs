//! Parse, dispatch, exit code.

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    let cli = memtrace::cli::Cli::parse();
    memtrace::cli::run(cli)
}
