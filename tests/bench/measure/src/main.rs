//! Runs one benchmark on this machine and prints its chapter as JSON, for `cargo xtask bench`.
//! Benchmarks for emulated machines print figures, of which `cargo xtask bench` makes the chapter.

use std::io::Write;

use clap::Parser;
use memtrace_tests::{process, programs as paths};
use serde_json::Value;

mod bpf;
mod burden;
mod chapter;
mod counted;
mod durable;
mod fdinfo;
mod kills;
mod loops;
mod neighbour;
mod peaks;
mod programs;
mod reconcile;
mod recorder;
mod rounds;
mod slowdown;
mod spikes;
mod spread;
mod usage;

/// One benchmark.
#[derive(Parser)]
struct Args {
    /// Which
    name: Name,
    /// Fewer rounds: says less, and sooner
    #[arg(long)]
    quick: bool,
    /// Of the random numbers [default: another one each time]
    #[arg(long)]
    seed: Option<u64>,
    /// Length of `reconcile` [default: 3, 20 s when quick]
    #[arg(long)]
    minutes: Option<u32>,
}

/// The benchmarks.
#[derive(Clone, Copy, clap::ValueEnum)]
enum Name {
    Spikes,
    Peaks,
    Kills,
    Reconcile,
    Programs,
    Slowdown,
    Agent,
    Durable,
    /// In a machine whose clock counts instructions: what the agent adds to each of some operations
    Counted,
    /// In a machine of many processors: what the agent knows of threads on all of them
    Spread,
}

/// How to run a benchmark.
#[derive(Clone, Copy, Debug)]
struct BenchPlan {
    /// Fewer rounds.
    quick: bool,
    /// Seed of the random numbers.
    seed: u64,
    /// Duration of `reconcile`, minutes.
    minutes: Option<u32>,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    paths::require_root()?;
    let plan = BenchPlan {
        quick: args.quick,
        seed: args.seed.unwrap_or_else(|| process::boot_ns() / 1000),
        minutes: args.minutes,
    };
    let chapter = match args.name {
        Name::Spikes => spikes::run(&plan)?,
        Name::Peaks => peaks::run(&plan)?,
        Name::Kills => kills::run(&plan)?,
        Name::Reconcile => reconcile::run(&plan)?,
        Name::Programs => programs::run(args.quick)?,
        Name::Slowdown => slowdown::run(args.quick)?,
        Name::Agent => burden::run(args.quick)?,
        Name::Durable => durable::run(args.quick)?,
        Name::Counted => return print(&counted::run(args.quick)?),
        Name::Spread => return print(&spread::run()?),
    };
    print(&chapter.to_json())
}

fn print(found: &Value) -> anyhow::Result<()> {
    Ok(writeln!(std::io::stdout(), "{found:#}")?)
}
