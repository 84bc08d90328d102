//! Stacks under a storm: their cost stays within the budget, and what was left out is reported.

#![allow(clippy::indexing_slicing, reason = "a panic is how a test fails")]

use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use memtrace_tests::actor::Actor;
use memtrace_tests::cage::Cage;
use memtrace_tests::claims::MIB;
use memtrace_tests::deadline::Deadline;
use memtrace_tests::figures::{not_run_here, say};
use memtrace_tests::trial::Trial;
use memtrace_tests::{growth, json, programs};

const PROCESSES: usize = 8;
const STORM: Duration = Duration::from_secs(5);
/// Share of one CPU allowed for stacks.
const BUDGET: f64 = 0.01;
/// Tolerance: on a loaded machine, the last stack within the budget takes longer than it should.
const GENEROUS: f64 = 2.0;
/// Programs that replace their perf maps.
const REPLACERS: usize = 32;
/// How long they do.
const REPLACING: Duration = Duration::from_secs(8);
/// Somebody without rights.
const SOMEBODY: u32 = 12_345;
/// CPU time of the stack worker beyond three times the budget: what accounts hold at the start, and the readings that
/// bring them into debt.
const DEBTS: Duration = Duration::from_millis(50);

/// CPU time of the agent so far, seconds.
#[derive(Clone, Copy)]
struct Used {
    /// CPU time of the whole process.
    process: f64,
    stacks_in_kernel: f64,
    stacks_in_agent: f64,
    taken: f64,
    thinned: f64,
}

impl Used {
    fn read(trial: &Trial) -> anyhow::Result<Self> {
        let metric = |name: &str| trial.agent.metric(name)?.with_context(|| format!("no metric {name}"));
        Ok(Self {
            process: cpu_seconds(trial.agent.pid())?,
            stacks_in_kernel: metric("memtrace_stack_kernel_seconds_total")?,
            stacks_in_agent: metric("memtrace_stack_user_seconds_total")?,
            taken: metric("memtrace_stacks_total")?,
            thinned: metric("memtrace_stacks_thinned_total")?,
        })
    }
}

/// User and system time of a process: fields 14 and 15 of its stat.
fn cpu_seconds(pid: u32) -> anyhow::Result<f64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).context("failed to read the agent's stat")?;
    let (_, after) = text.rsplit_once(')').context("no name in stat")?;
    let ticks = after.split_ascii_whitespace().skip(11).take(2).map(str::parse::<u64>);
    let ticks: u64 = ticks.sum::<Result<u64, _>>().context("no times in stat")?;
    Ok(ticks as f64 / rustix::param::clock_ticks_per_second() as f64)
}

/// Eight processes that map, touch and unmap as fast as they can. Returns the bytes they touched.
fn storm(cage: &Cage) -> anyhow::Result<u64> {
    let ms = STORM.as_millis().to_string();
    let start = |_| Actor::start(Some(cage), &["churn", "--ms", &ms]);
    let actors = (0..PROCESSES).map(start).collect::<Result<Vec<_>, _>>()?;
    let mut bytes = 0;
    for actor in actors {
        let ended = actor.finish()?;
        ensure!(ended.status.success(), "a workload ended with {}", ended.status);
        bytes += json::number(ended.one("churned")?, "/bytes")?;
    }
    Ok(bytes)
}

#[test]
fn a_storm_of_growth_costs_no_more_stacks_than_allowed() -> anyhow::Result<()> {
    let trial = Trial::begin(&["--stack-budget", "1%"])?;
    let cage = Cage::new("storm", 512 * MIB)?;
    let (begin, before) = (Instant::now(), Used::read(&trial)?);
    let bytes = storm(&cage)?;
    let (elapsed, after) = (begin.elapsed().as_secs_f64(), Used::read(&trial)?);
    let stacks = after.stacks_in_kernel - before.stacks_in_kernel + after.stacks_in_agent - before.stacks_in_agent;
    let (taken, thinned) = (after.taken - before.taken, after.thinned - before.thinned);
    say(format_args!(
        "{:.2} GB/s touched by {PROCESSES} processes for {elapsed:.1} s: stacks {:.1} ms in the kernel and {:.1} ms in the \
         agent, {:.2} % of a CPU; {taken} taken, {thinned} left out; the agent as a whole {:.2} % of a CPU",
        bytes as f64 / elapsed / 1e9,
        (after.stacks_in_kernel - before.stacks_in_kernel) * 1e3,
        (after.stacks_in_agent - before.stacks_in_agent) * 1e3,
        stacks * 100.0 / elapsed,
        (after.process - before.process) * 100.0 / elapsed
    ));
    ensure!(taken > 0.0, "no stack was taken");
    ensure!(thinned > 0.0, "nothing was left out of {bytes} bytes: the storm is none");
    let most = BUDGET * GENEROUS * elapsed;
    ensure!(stacks <= most, "stacks took {stacks:.3} s in {elapsed:.1} s, {most:.3} s are twice what was allowed");
    cage.remove()?;
    trial.end()
}

#[test]
fn an_incident_says_how_many_stacks_were_left_out() -> anyhow::Result<()> {
    let trial = Trial::begin(&["--stack-budget", "0.1%", "--sample", "16K", "--before", "60s"])?;
    let cage = Cage::new("thinned", 512 * MIB)?;
    storm(&cage)?;
    // and one more kill, so that there is an incident about this cgroup
    Actor::start(Some(&cage), &["burst", "--mib", "1024", "--touch"])?.finish()?.was_killed()?;
    let incident = trial.incident(&cage)?;
    let thinned = json::number(&incident, "/allocations/thinned")?;
    let growth = growth::adds_up(&incident)?;
    say(format_args!("{} MiB of growth in the incident's window, {thinned} stacks left out", growth / MIB));
    ensure!(thinned > 0, "the incident does not say that stacks were left out");
    cage.remove()?;
    trial.end()
}

/// A program of somebody without rights that replaces its perf map with each step.
fn replacer(workload: &Path) -> anyhow::Result<Actor> {
    let mut command = Command::new(workload);
    command.uid(SOMEBODY).gid(SOMEBODY);
    let ms = REPLACING.as_millis().to_string();
    Actor::from_command(command, &["perf-map", "--map-mib", "1", "--ms", &ms, "--replace"])
}

/// Each new file is a megabyte to read and 170,000 lines to parse.
#[test]
fn perf_maps_that_are_replaced_cost_no_more_than_the_budget_and_no_stacks_of_others() -> anyhow::Result<()> {
    if !cfg!(target_arch = "x86_64") {
        not_run_here("perf maps that are replaced", "their program has code for x86-64 only");
        return Ok(());
    }
    let trial = Trial::begin(&["--stack-budget", "1%"])?;
    let worker = trial.stack_worker()?.context("no stack worker runs")?;
    // A program that somebody may run.
    let dir = tempfile::tempdir()?;
    std::fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o755))?;
    let workload = dir.path().join("workload");
    std::fs::copy(programs::path("workload")?, &workload)?;
    let (begin, before) = (Instant::now(), cpu_seconds(worker)?);
    let replacers = (0..REPLACERS).map(|_| replacer(&workload)).collect::<Result<Vec<_>, _>>()?;
    if Deadline::after(DEBTS).limit() > 2 * DEBTS {
        not_run_here("a kill beside them", "a machine this slow pays for one such file for many seconds");
    } else {
        trial.kills_have_stacks()?;
    }
    for replacer in replacers {
        let ended = replacer.finish()?;
        ensure!(ended.status.success(), "a workload ended with {}", ended.status);
    }
    ensure!(trial.stack_worker()? == Some(worker), "the worker was replaced:\n{}", trial.agent.stderr());
    let (elapsed, spent) = (begin.elapsed().as_secs_f64(), cpu_seconds(worker)? - before);
    let most = 3.0 * BUDGET * elapsed + Deadline::after(DEBTS).limit().as_secs_f64();
    say(format_args!(
        "{REPLACERS} programs that replace their perf maps: {spent:.2} s of the worker in {elapsed:.1} s, {most:.2} allowed"
    ));
    ensure!(spent <= most, "the worker took {spent:.2} s of CPU time in {elapsed:.1} s, {most:.2} s are allowed");
    trial.end()
}
