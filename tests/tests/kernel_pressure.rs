//! Shortage without a kill: reclaim at the limit, throttling at memory.high, and tasks stuck with
//! the OOM killer off.

#![allow(clippy::indexing_slicing, reason = "a panic is how a test fails")]

use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use memtrace_tests::actor::Actor;
use memtrace_tests::cage::{Cage, Version};
use memtrace_tests::claims::{self, MIB};
use memtrace_tests::deadline::Deadline;
use memtrace_tests::figures::{not_run_here, say};
use memtrace_tests::trial::Trial;
use memtrace_tests::{disk, json};

const WAIT_LIMIT: Duration = Duration::from_secs(60);

/// Waits until something holds.
fn until(what: &str, holds: impl Fn() -> anyhow::Result<bool>) -> anyhow::Result<()> {
    let deadline = Deadline::after(WAIT_LIMIT);
    while !holds()? {
        ensure!(!deadline.has_passed(), "{what}: not within {:?}", deadline.limit());
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

#[test]
fn a_limit_that_reclaim_can_hold_is_a_near_miss() -> anyhow::Result<()> {
    let trial = Trial::begin(&[])?;
    let cage = Cage::new("near", 24 * MIB)?;
    let source = disk::readable(48)?;
    let file = source.path().to_str().context("a path that is not text")?;
    let reader = Actor::start(Some(&cage), &["cache", "--file", file, "--mib", "48", "--rounds", "3"])?.finish()?;
    ensure!(reader.status.success(), "the reader ended with {}", reader.status);
    // the rise may be a spike, too
    let incident = trial.incidents_of("near_miss", &[&cage], 1)?.pop().context("no near miss")?;
    claims::says(&incident, "/cgroup/path", cage.path())?;
    claims::says(&incident, "/pressure/limit", "max")?;
    let hits = json::number(&incident, "/pressure/hits")?;
    ensure!(hits >= 1 && incident["oom"].is_null(), "{hits} hits, and {}", incident["oom"]);
    // a large folio is charged at once, so the first hit may be a huge page below it
    let huge_page = incident["host"]["huge_page_bytes"].as_u64().unwrap_or(0).min(2 * MIB);
    claims::ends_within(&incident, cage.limit(), MIB + huge_page)?;
    let stalled = json::number(&incident, "/pressure/stalled_ns")?;
    say(format_args!("near miss: {hits} hits, held up for {} us", stalled / 1000));
    ensure!(trial.agent.metric("memtrace_oom_kills_total")? == Some(0.0), "a kill is made up");
    cage.remove()?;
    trial.end()
}

/// Large folios are charged at once, so a limit is hit up to a huge page below it. How far below
/// depends on where the limit is, modulo the folio.
#[test]
fn a_limit_that_large_folios_hit_from_below_is_a_near_miss() -> anyhow::Result<()> {
    let trial = Trial::begin(&[])?;
    let mut cages = Vec::new();
    for step in 0..4 {
        let cage = Cage::new("folios", 24 * MIB + step * (MIB / 2))?;
        let source = disk::readable(48)?;
        let file = source.path().to_str().context("a path that is not text")?;
        let reader = Actor::start(Some(&cage), &["cache", "--file", file, "--mib", "48", "--rounds", "2"])?.finish()?;
        ensure!(reader.status.success(), "the reader ended with {}", reader.status);
        cages.push(cage);
    }
    for cage in cages {
        let incident = trial.incidents_of("near_miss", &[&cage], 1)?.pop().context("no near miss")?;
        claims::says(&incident, "/pressure/limit", "max")?;
        let hits = json::number(&incident, "/pressure/hits")?;
        say(format_args!("limit of {} KiB: {hits} hits", cage.limit() / 1024));
        cage.remove()?;
    }
    trial.end()
}

#[test]
fn memory_high_throttles_and_kills_nobody() -> anyhow::Result<()> {
    let cage = Cage::new("high", 96 * MIB)?;
    if cage.version() == Version::V1 {
        not_run_here("memory.high", "it is a file of cgroup v2");
        return cage.remove();
    }
    let trial = Trial::begin(&[])?;
    cage.set("memory.high", 24 * MIB)?;
    // each fault above it is delayed longer, so a little above is enough
    let throttled = Actor::start(Some(&cage), &["burst", "--mib", "26", "--threads", "1", "--touch"])?.finish()?;
    ensure!(throttled.status.success(), "the throttled program ended with {}", throttled.status);
    let incident = trial.incident(&cage)?;
    claims::says(&incident, "/kind", "near_miss")?;
    claims::says(&incident, "/pressure/limit", "high")?;
    claims::counts(&incident, "/cgroup/high_bytes", 24 * MIB)?;
    let hits = json::number(&incident, "/pressure/hits")?;
    let stalled = json::number(&incident, "/pressure/stalled_ns")?;
    let events = cage.keyed("memory.events", "high")?;
    say(format_args!("memory.high: {hits} hits ({events} events), held up for {} us", stalled / 1000));
    ensure!(hits >= 1 && stalled > 0, "{hits} hits, held up for {stalled} ns");
    ensure!(trial.agent.metric("memtrace_oom_kills_total")? == Some(0.0), "a kill is made up");
    cage.remove()?;
    trial.end()
}

#[test]
fn tasks_stuck_under_oom_are_reported_until_it_clears() -> anyhow::Result<()> {
    let cage = Cage::new("stuck", 32 * MIB)?;
    if cage.version() == Version::V2 {
        not_run_here("tasks stuck under OOM", "memory.oom_control is a file of cgroup v1");
        return cage.remove();
    }
    let trial = Trial::begin(&[])?;
    cage.set("memory.oom_control", 1)?;
    let waiting = Actor::start(Some(&cage), &["burst", "--mib", "48", "--threads", "1", "--touch"])?;
    until("the kernel says under_oom", || Ok(cage.keyed("memory.oom_control", "under_oom")? == 1))?;
    until("the agent says so too", || Ok(trial.agent.metric("memtrace_cgroups_stuck")? == Some(1.0)))?;
    let begin = Instant::now();
    std::thread::sleep(Duration::from_millis(1500));
    ensure!(trial.agent.comes_to_say("stuck"), "the log does not tell:\n{}", trial.agent.stderr());
    // more room: the stuck task continues
    let stuck_ns = u64::try_from(begin.elapsed().as_nanos())?;
    if cage.has("memory.memsw.limit_in_bytes") {
        cage.set("memory.memsw.limit_in_bytes", 96 * MIB)?;
    }
    cage.set("memory.limit_in_bytes", 96 * MIB)?;
    let ended = waiting.finish()?;
    ensure!(ended.status.success(), "what was stuck ended with {}", ended.status);
    let incident = trial.incident(&cage)?;
    claims::says(&incident, "/kind", "stuck")?;
    claims::says(&incident, "/cgroup/path", cage.path())?;
    ensure!(incident["pressure"]["oom_kill_disabled"] == true, "{}", incident["pressure"]);
    let told = json::number(&incident, "/pressure/under_oom_ns")?;
    say(format_args!("stuck under OOM for {} ms, told {} ms", stuck_ns / 1_000_000, told / 1_000_000));
    ensure!(told >= stuck_ns, "stuck for at least {stuck_ns} ns, told {told}");
    until("it clears", || Ok(trial.agent.metric("memtrace_cgroups_stuck")? == Some(0.0)))?;
    ensure!(trial.agent.metric("memtrace_oom_kills_total")? == Some(0.0), "a kill is made up");
    cage.remove()?;
    trial.end()
}
