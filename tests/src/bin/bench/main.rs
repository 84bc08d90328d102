//! The benchmarks that run on this machine, one a call: prints its chapter as JSON. `cargo xtask bench` calls it.
//! What is for emulated machines prints figures, of which `cargo xtask bench` makes a chapter.

use std::io::Write;

use clap::Parser;
use memtrace_tests::programs;
use serde_json::Value;

mod counted;
mod spread;

/// One benchmark.
#[derive(Parser)]
struct Args {
    /// Which
    name: Name,
    /// Fewer rounds: says less, and sooner
    #[arg(long)]
    quick: bool,
}

/// The benchmarks.
#[derive(Clone, Copy, clap::ValueEnum)]
enum Name {
    /// In a machine whose clock counts instructions: what the agent adds to each of some operations
    Counted,
    /// In a machine of many processors: what the agent knows of threads on all of them
    Spread,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    programs::require_root()?;
    match args.name {
        Name::Counted => print(&counted::run(args.quick)?),
        Name::Spread => print(&spread::run()?),
    }
}

fn print(found: &Value) -> anyhow::Result<()> {
    Ok(writeln!(std::io::stdout(), "{found:#}")?)
}
