//! The benchmarks that run on this machine, one a call: prints its chapter as JSON. `cargo xtask bench` calls it.
//! What is for emulated machines prints figures, of which `cargo xtask bench` makes a chapter.

mod loops;
mod spread;

use std::io::Write;

use clap::Parser;
use memtrace_tests::programs;

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
    Loops,
    /// In a machine of many processors: what the agent knows of threads on all of them
    Spread,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    programs::require_root()?;
    let found = match args.name {
        Name::Loops => loops::run(args.quick)?,
        Name::Spread => spread::run()?,
    };
    writeln!(std::io::stdout(), "{found:#}")?;
    Ok(())
}
