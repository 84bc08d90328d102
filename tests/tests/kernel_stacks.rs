//! Which code grew the memory, on this kernel: page faults, faults inside system calls, mappings
//! and charges.

#![allow(clippy::indexing_slicing, reason = "a panic is how a test fails")]

use std::time::Duration;

use anyhow::{Context, ensure};
use memtrace_tests::actor::Actor;
use memtrace_tests::cage::Cage;
use memtrace_tests::claims::MIB;
use memtrace_tests::deadline::Deadline;
use memtrace_tests::figures::{not_run_here, say};
use memtrace_tests::json;
use memtrace_tests::trial::Trial;
use serde_json::Value;

/// No budget, and sample intervals at which the growth in these tests cannot fill the ring, however
/// late the agent gets a CPU: the tests are about correctness, not cost.
const FINE: [&str; 4] = ["--sample", "256K", "--stack-budget", "100%"];
/// Losses are reported once a second.
const TELLING: Duration = Duration::from_secs(10);
/// Time until names are in the incident.
const NAMING: Duration = Duration::from_secs(120);

#[test]
fn a_kill_names_the_code_that_touched_the_memory_and_the_code_that_mapped_it() -> anyhow::Result<()> {
    let trial = Trial::begin(&FINE)?;
    let cage = Cage::new("touch", 64 * MIB)?;
    let ended = trial.start_known(&cage, &["burst", "--mib", "256", "--touch", "--threads", "2"])?.finish()?;
    ended.was_killed()?;
    let incident = named(&trial, &cage)?;
    adds_up(&incident)?;
    let told = Told::of(&incident)?;
    told.say("touch");
    ensure!(told.growth >= 48 * MIB, "{} MiB of growth in a cgroup of 64 MiB", told.growth / MIB);
    ensure!(told.attributed * 100 >= told.growth * 90, "{} of {} bytes have a stack", told.attributed, told.growth);
    let touched = weight(&incident, "touch", |path| names(path, "memory::take_share"))?;
    ensure!(touched * 100 >= told.attributed * 90, "memory::take_share has {touched} of {} bytes", told.attributed);
    let whole = weight(&incident, "touch", |path| names(path, "memory::take_share") && path["cut"].is_null())?;
    ensure!(whole * 100 >= touched * 99, "{whole} of {touched} bytes reach the outermost frame");
    say_cuts(&incident)?;
    let mapped = weight(&incident, "touch", |path| {
        let by = path["mapped_by"].as_u64().and_then(|by| incident["allocation_paths"].get(by as usize));
        by.is_some_and(|by| names(by, "memory::take_share") && names(by, "mmap"))
    })?;
    // A mapping call may have no stack: if a thread is preempted inside a hook, the kernel skips
    // that hook for other threads on the CPU, and of two threads that map at once one stack may
    // stand for both. The agent reports either.
    if mapped * 100 < touched * 90 {
        let lost = mapping_stacks_lost(&trial)?;
        say(format_args!("{mapped} of {touched} bytes are joined with their mapping call, {lost} calls have no stack"));
        ensure!(lost > 0.0, "{mapped} of {touched} bytes are joined with the call that mapped them, and none is lost");
    }
    cage.remove()?;
    trial.end()
}

/// Mapping calls that have no stack, as the agent reports shortly after.
fn mapping_stacks_lost(trial: &Trial) -> anyhow::Result<f64> {
    let deadline = Deadline::after(TELLING);
    loop {
        let mut lost = 0.0;
        for what in ["map/not_run", "stacks/merged", "stacks/rate_limited", "stacks/ring_full"] {
            lost += trial.agent.metric(&format!("memtrace_lost_total{{what=\"{what}\"}}"))?.unwrap_or(0.0);
        }
        if lost > 0.0 || deadline.has_passed() {
            return Ok(lost);
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

#[test]
fn memory_touched_inside_a_system_call_has_the_stack_of_its_caller() -> anyhow::Result<()> {
    let trial = Trial::begin(&FINE)?;
    let cage = Cage::new("populate", 64 * MIB)?;
    let ended = trial.start_known(&cage, &["burst", "--mib", "256", "--threads", "1"])?.finish()?;
    ended.was_killed()?;
    let incident = named(&trial, &cage)?;
    adds_up(&incident)?;
    let told = Told::of(&incident)?;
    told.say("populate");
    ensure!(told.growth >= 48 * MIB, "{} MiB of growth in a cgroup of 64 MiB", told.growth / MIB);
    let burst = weight(&incident, "touch", |path| names(path, "memory::take_share") && path["cut"].is_null())?;
    ensure!(burst * 100 >= told.growth * 90, "memory::take_share has {burst} of {} bytes", told.growth);
    cage.remove()?;
    trial.end()
}

#[test]
fn what_no_process_holds_has_the_stack_of_who_charged_it() -> anyhow::Result<()> {
    let trial = Trial::begin(&FINE)?;
    if attached(&trial, "charge")? == 0 {
        not_run_here("charges", "this kernel lets nobody hook page_counter_try_charge");
        return trial.end();
    }
    let cage = Cage::new("charge", 32 * MIB)?;
    let ended = Actor::start(Some(&cage), &["sockets", "--mib", "128"])?.finish()?;
    ended.was_killed()?;
    let incident = named(&trial, &cage)?;
    adds_up(&incident)?;
    let charged = weight(&incident, "charge", |path| names(path, "kernel_side::"))?;
    say(format_args!("charge: {} MiB by the workload's own code", charged / MIB));
    ensure!(charged >= 16 * MIB, "the workload's own code charged {charged} bytes");
    cage.remove()?;
    trial.end()
}

#[test]
fn without_a_budget_there_are_no_stacks_and_nothing_else_is_missing() -> anyhow::Result<()> {
    let trial = Trial::begin(&["--stack-budget", "0"])?;
    let cage = Cage::new("none", 48 * MIB)?;
    let ended = Actor::start(Some(&cage), &["burst", "--mib", "96", "--touch"])?.finish()?;
    ended.was_killed()?;
    let incident = trial.incident(&cage)?;
    ensure!(json::list(&incident, "/allocation_paths")?.is_empty());
    ensure!(incident.get("allocations").is_none_or(Value::is_null), "{}", incident["allocations"]);
    cage.remove()?;
    trial.end()
}

/// The incident of this cgroup, once its frames were named. A frame may stay without a name: an
/// object without symbols has none for any of its code.
fn named(trial: &Trial, cage: &Cage) -> anyhow::Result<Value> {
    let incident = trial.incident(cage)?;
    let id = json::text(&incident, "/id")?;
    let deadline = Deadline::after(NAMING);
    while trial.agent.heard(&["named functions", id]).is_none() {
        let failed = trial.agent.heard(&["no names for an incident", id]);
        ensure!(
            failed.is_none() && !deadline.has_passed(),
            "{id} has no names; the agent said:\n{}",
            trial.agent.stderr()
        );
        std::thread::sleep(Duration::from_millis(100));
    }
    trial.options().report(id)
}

/// Checks that attributed and unattributed bytes are the growth, and so are the samples.
fn adds_up(incident: &Value) -> anyhow::Result<()> {
    let growth = json::number(incident, "/allocations/growth_bytes")?;
    let attributed = json::number(incident, "/allocations/attributed_bytes")?;
    let reasons = json::list(incident, "/allocations/unattributed")?;
    let unattributed: u64 = reasons.iter().filter_map(|part| part["bytes"].as_u64()).sum();
    ensure!(attributed + unattributed == growth, "{attributed} + {unattributed} is not {growth}");
    let paths = json::list(incident, "/allocation_paths")?;
    let path = json::list(incident, "/allocations/samples/path")?;
    let weight = json::list(incident, "/allocations/samples/weight_bytes")?;
    let of_growth = |path: &Value| match path.as_u64() {
        None => true,
        Some(index) => paths.get(index as usize).is_some_and(|path| path["cause"] == "touch"),
    };
    let rows = path.iter().zip(weight).filter(|(path, _)| of_growth(path));
    let sum: u64 = rows.filter_map(|(_, weight)| weight.as_u64()).sum();
    ensure!(sum == growth, "the samples add up to {sum}, not {growth}");
    Ok(())
}

/// What an incident says about growth.
struct Told {
    growth: u64,
    attributed: u64,
}

impl Told {
    fn of(incident: &Value) -> anyhow::Result<Self> {
        let growth = json::number(incident, "/allocations/growth_bytes")?;
        Ok(Self { growth, attributed: json::number(incident, "/allocations/attributed_bytes")? })
    }

    fn say(&self, what: &str) {
        let share = self.attributed * 1000 / self.growth.max(1);
        say(format_args!("{what}: {} MiB of growth, {}.{} % with a stack", self.growth / MIB, share / 10, share % 10));
    }
}

/// Prints where stacks were cut.
fn say_cuts(incident: &Value) -> anyhow::Result<()> {
    for path in json::list(incident, "/allocation_paths")?.iter().filter(|path| !path["cut"].is_null()).take(6) {
        let name = |frame: &Value| {
            let module = frame["module"].as_str().unwrap_or("?").rsplit('/').next().unwrap_or_default().to_owned();
            frame["symbol"].as_str().map_or(format!("{module}+{}", frame["offset"]), str::to_owned)
        };
        let frames: Vec<String> = path["frames"].as_array().into_iter().flatten().map(name).collect();
        say(format_args!(
            "cut ({}): {} {} bytes: {}",
            path["cut"],
            path["cause"],
            path["weight_bytes"],
            frames.join(" < ")
        ));
    }
    Ok(())
}

/// Bytes of the paths with this cause that satisfy the condition.
fn weight(incident: &Value, cause: &str, which: impl Fn(&Value) -> bool) -> anyhow::Result<u64> {
    let paths = json::list(incident, "/allocation_paths")?;
    let such = paths.iter().filter(|path| path["cause"] == cause && which(path));
    such.map(|path| path["weight_bytes"].as_u64().context("a path without a weight")).sum()
}

/// Whether a frame's function name contains `name`.
fn names(path: &Value, function: &str) -> bool {
    let frames = path["frames"].as_array();
    frames.is_some_and(|frames| frames.iter().any(|f| f["symbol"].as_str().is_some_and(|s| s.contains(function))))
}

/// Whether a hook is attached.
fn attached(trial: &Trial, hook: &str) -> anyhow::Result<u64> {
    let series = format!("memtrace_hook_attached{{hook=\"{hook}\"}}");
    let (_, text) = trial.agent.get("/metrics")?;
    let line = text.lines().find_map(|line| line.strip_prefix(series.as_str()));
    line.and_then(|value| value.trim().parse().ok()).with_context(|| format!("no {series} in the metrics"))
}
