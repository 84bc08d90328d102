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
use memtrace_tests::trial::Trial;
use serde_json::Value;

const CGROUPS: usize = 50;
const KILLS_EACH: usize = 4;

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

#[test]
fn two_hundred_kills_across_fifty_cgroups_are_two_hundred_incidents() -> anyhow::Result<()> {
    let trial = Trial::begin(&[])?;
    let begin = Instant::now();
    let cages = (0..CGROUPS).map(|_| Cage::new("storm", 8 * MIB)).collect::<Result<Vec<_>, _>>()?;
    let mut killed: BTreeMap<u32, u64> = BTreeMap::new();
    for _ in 0..KILLS_EACH {
        // a whole round at once: limits run out in many cgroups at the same time
        let arguments = ["burst", "--mib", "32", "--threads", "1"];
        let actors = cages.iter().map(|cage| Actor::start(Some(cage), &arguments)).collect::<Result<Vec<_>, _>>()?;
        for (actor, cage) in actors.into_iter().zip(&cages) {
            let ended = actor.finish()?;
            ended.was_killed()?;
            killed.insert(ended.pid, cage.id());
        }
    }
    let took = begin.elapsed();
    let counted = cages.iter().map(Cage::oom_kills).sum::<anyhow::Result<u64>>()?;
    ensure!(counted == (CGROUPS * KILLS_EACH) as u64, "the kernel counted {counted} kills");
    ensure!(killed.len() == CGROUPS * KILLS_EACH, "a pid was used again: {} victims", killed.len());
    let all: Vec<&Cage> = cages.iter().collect();
    let incidents = trial.incidents(&all, CGROUPS * KILLS_EACH)?;
    let mut witnessed = 0;
    for incident in &incidents {
        let victims = claims::killed(incident)?;
        let [(pid, _)] = victims.as_slice() else { anyhow::bail!("an incident of {} kills", victims.len()) };
        let cgroup = killed.remove(pid);
        ensure!(cgroup == incident["cgroup"]["id"].as_u64(), "{pid} died in {cgroup:?}, not {}", incident["cgroup"]);
        claims::says(incident, "/oom/scope", "cgroup")?;
        witnessed += usize::from(!incident["oom"]["kernel_log"]["constraint"].is_null());
    }
    ensure!(killed.is_empty(), "in no incident are {killed:?}");
    // the kernel log names the cgroup at most ten times in five seconds
    say(format_args!(
        "{counted} kills in {:.1} s, all found; the kernel log tells the constraint of {witnessed}",
        took.as_secs_f64()
    ));
    cages.into_iter().try_for_each(Cage::remove)?;
    trial.end()
}
