//! `cargo xtask VERB`: the entry point to set-up, build, demo, tests and checks of memtrace.
//! Dispatch only: each verb has its home in a crate below tests/, apart from `demo`, `fuzz`,
//! `sim` and `soak`, which are short and here.

mod demo;
mod fuzz;
mod sim;
mod soak;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use memtrace_checks::{ci, tidy};
use memtrace_harness::checkout::Checkout;
use memtrace_harness::{build, run, setup};
use {memtrace_bench as bench, memtrace_runner as test, memtrace_truth_harness as truth, memtrace_vm as vm};

/// Set-up, build, demo and tests of memtrace.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Xtask {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Find or install what building the eBPF programs needs
    Setup(setup::Args),
    /// Build the eBPF programs, then the agent with them inside
    Build(build::Args),
    /// A real OOM kill, recorded and explained (root); a fresh checkout builds for some minutes first
    Demo(demo::Args),
    /// Every layer of tests that this machine can run, and a plain word about the others
    Test(test::Args),
    /// What a reviewer should not have to check: format, lints, house rules, licences, docs
    Ci(ci::Args),
    /// The house rules alone (file size, names, purity, imports)
    Tidy(tidy::Args),
    /// The tests that need a kernel, on many kernels in emulated machines
    Vm(vm::Args),
    /// Programs that know which function touched how much: recorded, and what was attributed (root)
    Truth(truth::Args),
    /// Is it true, and what does it cost: beside what people use today (root)
    Bench(bench::Args),
    /// Fuzz one target, or each in turn
    Fuzz(fuzz::Args),
    /// Kernel stories through the engine, held against invariants: one seed, or new ones for a while
    Sim(sim::Args),
    /// An hour of everything that hurts an agent at once, beside a kill a second (root)
    Soak(soak::Args),
}

fn main() -> ExitCode {
    let xtask = Xtask::parse();
    let outcome = Checkout::find().and_then(|checkout| match xtask.verb {
        Verb::Setup(args) => setup::run(&checkout, &args),
        Verb::Build(args) => build::run(&checkout, &args),
        Verb::Demo(args) => demo::run(&checkout, &args),
        Verb::Test(args) => test::run(&checkout, &args),
        Verb::Ci(args) => ci::run(&checkout, &args),
        Verb::Tidy(args) => tidy::run(&checkout, &args),
        Verb::Vm(args) => vm::run(&checkout, &args),
        Verb::Truth(args) => truth::run(&checkout, &args),
        Verb::Bench(args) => bench::run(&checkout, &args),
        Verb::Fuzz(args) => fuzz::run(&checkout, &args),
        Verb::Sim(args) => sim::run(&checkout, &args),
        Verb::Soak(args) => soak::run(&checkout, &args),
    });
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            run::say(format_args!("failed: {error:#}"));
            ExitCode::FAILURE
        }
    }
}
