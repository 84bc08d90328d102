//! The benchmarks that run on this machine, one a call: prints its chapter as JSON. `cargo xtask bench` calls it.

use std::io::Write;

use clap::Parser;
use memtrace_tests::chapter::Chapter;
use memtrace_tests::programs as paths;

mod bpf;
mod burden;
mod durable;
mod fdinfo;
mod loops;
mod programs;
mod rounds;
mod slowdown;
mod usage;

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
    Programs,
    Slowdown,
    Agent,
    Durable,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    paths::require_root()?;
    let chapter: Chapter = match args.name {
        Name::Programs => programs::run(args.quick)?,
        Name::Slowdown => slowdown::run(args.quick)?,
        Name::Agent => burden::run(args.quick)?,
        Name::Durable => durable::run(args.quick)?,
    };
    writeln!(std::io::stdout(), "{:#}", chapter.to_json())?;
    Ok(())
}
