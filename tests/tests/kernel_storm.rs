//! Many kills, in cgroups that are gone before anyone can look: none is missed, duplicated or
//! without a name.

#![allow(clippy::indexing_slicing, reason = "a panic is how a test fails")]

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::ensure;
use memtrace_tests::actor::Actor;
use memtrace_tests::cage::Cage;
use memtrace_tests::claims::{self, MIB};
use memtrace_tests::figures::say;
use memtrace_tests::json;
use memtrace_tests::process;
use memtrace_tests::trial::Trial;
use rustix::process::Signal;
use serde_json::Value;

const CGROUPS: usize = 50;
const KILLS_EACH: usize = 4;
/// How long the agent stands still after the last kill.
const STILL: Duration = Duration::from_secs(8);

#[test]
fn a_cgroup_that_lives_for_a_moment_is_reported_in_full() -> anyhow::Result<()> {
    let trial = Trial::begin(&[])?;
    let begin = Instant::now();
    let cage = Cage::new("moment", 16 * MIB)?;
    let (id, path) = (cage.id(), cage.path().to_owned());
    let ended = Actor::start(Some(&cage), &["burst", "--mib", "64", "--threads", "1"])?.finish()?;
    cage.remove()?;
    say(format_args!("a cgroup lived for {} ms", begin.elapsed().as_millis()));
    ended.was_killed()?;
    let about = |listed: &[Value]| listed.iter().filter(|i| i["cgroup"]["id"] == id).count();
    trial.wait_for(Duration::from_secs(60), |listed| about(listed) > 0)?;
    let listed = trial.options().incidents()?;
    ensure!(about(&listed) == 1, "{} incidents", about(&listed));
    let incident = listed.iter().find(|i| i["cgroup"]["id"] == id).map(|i| json::text(i, "/id"));
    let incident = trial.options().report(incident.unwrap_or(Ok("none"))?)?;
    claims::says(&incident, "/cgroup/path", &path)?;
    claims::says(&incident, "/oom/scope", "cgroup")?;
    claims::counts(&incident, "/cgroup/limit_bytes", 16 * MIB)?;
    claims::only_victim(&incident, ended.pid, "workload")?;
    claims::says(&incident, "/oom/victims/0/cgroup_path", &path)?;
    claims::ends_near_the_limit(&incident, 16 * MIB)?;
    trial.end()
}

/// Rounds of kills, one in each cage at the same time: pids of the victims and ids of their cgroups.
fn storm(cages: &[Cage], rounds: usize) -> anyhow::Result<BTreeMap<u32, u64>> {
    let mut killed = BTreeMap::new();
    for _ in 0..rounds {
        // a whole round at once: limits run out in many cgroups at the same time
        let arguments = ["burst", "--mib", "32", "--threads", "1"];
        let actors = cages.iter().map(|cage| Actor::start(Some(cage), &arguments)).collect::<Result<Vec<_>, _>>()?;
        for (actor, cage) in actors.into_iter().zip(cages) {
            let ended = actor.finish()?;
            ended.was_killed()?;
            killed.insert(ended.pid, cage.id());
        }
    }
    let counted = cages.iter().map(Cage::oom_kills).sum::<anyhow::Result<u64>>()?;
    ensure!(counted == (cages.len() * rounds) as u64, "the kernel counted {counted} kills");
    ensure!(killed.len() == cages.len() * rounds, "a pid was used again: {} victims", killed.len());
    Ok(killed)
}

/// Each kill has an incident of its own. Returns those.
fn each_has_an_incident(trial: &Trial, cages: &[Cage], mut killed: BTreeMap<u32, u64>) -> anyhow::Result<Vec<Value>> {
    let all: Vec<&Cage> = cages.iter().collect();
    let incidents = trial.kills(&all, killed.len())?;
    for incident in &incidents {
        let victims = claims::killed(incident)?;
        let [(pid, _)] = victims.as_slice() else { anyhow::bail!("an incident of {} kills", victims.len()) };
        let cgroup = killed.remove(pid);
        ensure!(cgroup == incident["cgroup"]["id"].as_u64(), "{pid} died in {cgroup:?}, not {}", incident["cgroup"]);
        claims::says(incident, "/oom/scope", "cgroup")?;
    }
    ensure!(killed.is_empty(), "in no incident are {killed:?}");
    Ok(incidents)
}

#[test]
fn two_hundred_kills_across_fifty_cgroups_are_two_hundred_incidents() -> anyhow::Result<()> {
    let trial = Trial::begin(&[])?;
    let begin = Instant::now();
    let cages = (0..CGROUPS).map(|_| Cage::new("storm", 8 * MIB)).collect::<Result<Vec<_>, _>>()?;
    let killed = storm(&cages, KILLS_EACH)?;
    let took = begin.elapsed();
    let incidents = each_has_an_incident(&trial, &cages, killed)?;
    let witnessed = incidents.iter().filter(|one| !one["oom"]["kernel_log"]["constraint"].is_null()).count();
    // the kernel log names the cgroup at most ten times in five seconds
    say(format_args!(
        "{} kills in {:.1} s, all found; the kernel log tells the constraint of {witnessed}",
        incidents.len(),
        took.as_secs_f64()
    ));
    cages.into_iter().try_for_each(Cage::remove)?;
    trial.end()
}

/// Whatever holds the agent up (a debugger, a freezer, a machine without CPUs to spare), the rings keep the kills.
#[test]
fn an_agent_that_stands_still_loses_no_kill() -> anyhow::Result<()> {
    let trial = Trial::begin(&[])?;
    let cages = (0..CGROUPS).map(|_| Cage::new("still", 8 * MIB)).collect::<Result<Vec<_>, _>>()?;
    let worker = trial.running_worker()?;
    process::signal(trial.agent.pid(), Signal::STOP)?;
    let killed = storm(&cages, 2);
    std::thread::sleep(STILL);
    process::signal(trial.agent.pid(), Signal::CONT)?;
    let killed = killed?;
    let pids: Vec<u32> = killed.keys().copied().collect();
    each_has_an_incident(&trial, &cages, killed)?;
    let ledger = std::fs::read_to_string(trial.options().state_dir.join("kills.jsonl"))?;
    let lines: Vec<Value> = ledger.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    for pid in pids {
        let count = lines.iter().filter(|line| line["pid"] == pid && line["source"].is_null()).count();
        ensure!(count == 1, "{pid} is in the ledger {count} times");
    }
    // Nobody else is blamed for it.
    ensure!(trial.running_worker()? == worker, "the stack worker was replaced");
    let late = trial.agent.metric("memtrace_stack_readings_late")?;
    ensure!(late == Some(0.0), "{late:?} readings are late");
    cages.into_iter().try_for_each(Cage::remove)?;
    trial.end()
}
