//! A seeded simulator of the engine, after TigerBeetle's: a model kernel lives through a story, its hooks' records are
//! delayed, reordered and lost on their way, and whatever the engine says is held against what the model did.
//!
//! ```text
//!   story ─▶ kernel, oom, tree ─▶ records ─▶ rings ─▶ engine ─▶ outputs
//!              │ (model: the truth)        (distort)  (adapter)    │
//!              └──────────────────────────────▶ invariants ◀───────┘
//! ```
//!
//! A run is determined by one seed. One that fails prints how to repeat it, with the shortest story that fails.

use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use clap::Parser;

mod adapter;
mod distort;
mod invariants;
mod kernel;
mod model;
mod oom;
mod replay;
mod rng;
mod run;
mod story;
#[cfg(test)]
mod tests;
mod tree;
mod wire;

use adapter::Fault;
use run::{Plan, Report, run};

/// Inputs of a run, unless said otherwise.
const EVENTS: u64 = 4000;
/// Inputs shown of a run that fails, unless said otherwise.
const TAIL: usize = 16;

/// Runs kernel stories through the engine and checks what it makes of them
#[derive(Debug, Parser)]
struct Options {
    /// Run this seed only (with --seconds: begin with it)
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Run new seeds until this time is over
    #[arg(long, value_name = "S")]
    seconds: Option<u64>,
    /// Inputs of each run
    #[arg(long, value_name = "N", default_value_t = EVENTS)]
    events: u64,
    /// Inputs shown of a run that fails
    #[arg(long, value_name = "N", default_value_t = TAIL)]
    tail: usize,
    /// Go on after a failure, with the next seed
    #[arg(long)]
    keep_going: bool,
    /// Say what each run is about
    #[arg(long, short)]
    verbose: bool,
}

fn main() -> ExitCode {
    let options = Options::parse();
    let begun = Instant::now();
    let time = options.seconds.map(Duration::from_secs);
    let mut seed = options.seed.unwrap_or_else(from_clock);
    let (mut runs, mut events, mut failed) = (0u64, 0u64, 0u64);
    let (mut incidents, mut victims) = (0u64, 0u64);
    loop {
        let plan = Plan { seed, events: options.events, fault: Fault::None, tail: options.tail };
        let report = run(&plan);
        runs += 1;
        events += report.events;
        incidents += report.incidents;
        victims += report.victims;
        if options.verbose {
            let Report { events, incidents, victims, shape, .. } = &report;
            println!("seed {seed}: {events} events, {incidents} incidents, {victims} victims; {shape}");
        }
        if report.violation.is_some() {
            failed += 1;
            print!("{}", explain(&plan, &report));
        }
        let more = time.is_some_and(|time| begun.elapsed() < time);
        if !more || (failed > 0 && !options.keep_going) {
            break;
        }
        seed = seed.wrapping_add(1);
    }
    println!("{runs} seeds, {events} events, {incidents} incidents, {victims} victims: {failed} failed");
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn from_clock() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    // Few digits, to be typed again.
    u64::from(now.subsec_nanos()).wrapping_add(now.as_secs().wrapping_mul(1000)) % 1_000_000_000
}

/// What failed, when, and how to see it again.
fn explain(plan: &Plan, report: &Report) -> String {
    let (events, shortest) = shorten(plan, report);
    let report = shortest.as_ref().unwrap_or(report);
    let Some(violation) = &report.violation else { return String::new() };
    let mut text = format!("seed {} fails: {}\n  {}\n", plan.seed, violation.invariant, violation.detail);
    text.push_str(&format!("  after event {}, in a story of {events}:\n", report.events));
    for line in &report.tail {
        text.push_str(&format!("    {line}\n"));
    }
    text.push_str(&format!("  {}\n", report.shape));
    text.push_str(&format!("  to repeat: cargo xtask sim --seed {} --events {events}\n", plan.seed));
    text
}

/// The shortest story of this seed that fails in the same way, as far as bisection finds it.
fn shorten(plan: &Plan, report: &Report) -> (u64, Option<Report>) {
    let invariant = report.violation.as_ref().map(|v| v.invariant);
    let (mut low, mut high, mut best) = (0, plan.events.min(report.events), None);
    while low < high {
        let events = low + (high - low) / 2;
        let shorter = run(&Plan { events, ..*plan });
        if shorter.violation.as_ref().map(|v| v.invariant) == invariant {
            high = events;
            best = Some(shorter);
        } else {
            low = events + 1;
        }
    }
    (if best.is_some() { high } else { plan.events }, best)
}
