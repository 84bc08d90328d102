//! More cgroups than the agent follows: it says so and goes on, and a kill in one that it does not
//! follow is reported with its path.

#![allow(clippy::indexing_slicing, reason = "a panic is how a test fails")]

use std::time::Duration;

use anyhow::{Context, ensure};
use memtrace_tests::actor::Actor;
use memtrace_tests::agent::{Agent, AgentOptions};
use memtrace_tests::cage::Cage;
use memtrace_tests::claims::{self, MIB};
use memtrace_tests::deadline::Deadline;
use memtrace_tests::figures::say;
use memtrace_tests::programs;
use serde_json::Value;

/// Cgroups made at once: more than the 4,096 that the agent follows.
const CGROUPS: usize = 4_300;
/// Those with work in them: the agent drops the first of all to make room, up to 128 at once, so
/// these need more room than there is.
const WORKED_IN: usize = 200;
/// How often they are made. A machine that needs longer for them than the ten seconds after which a
/// cgroup is idle gives the agent room for the first ones again.
const ROUNDS: usize = 4;
/// Looks at the metrics of the agent, which are a second old at most.
const LOOKS: usize = 12;
/// Polling interval.
const LOOK: Duration = Duration::from_millis(250);
/// Time until something has happened that happens within seconds.
const LIMIT: Duration = Duration::from_secs(120);
const OVER_CAP: &str = "cgroups/over_cap";

/// Makes cgroups below `parent` and works in the first ones, until the agent says that it does not
/// follow them all.
fn make_too_many(parent: &Cage, agent: &Agent) -> anyhow::Result<Vec<Cage>> {
    let metric = format!(r#"memtrace_lost_total{{what="{OVER_CAP}"}}"#);
    let mut made = Vec::new();
    for round in 0..ROUNDS {
        for n in 0..CGROUPS {
            made.push(parent.child(&format!("c{round}-{n}"))?);
        }
        let prefix = format!("{}/c{round}-", parent.dir().display());
        let wander = ["wander", "--prefix", &prefix, "--from", "0", "--to", &WORKED_IN.to_string()];
        let ended = Actor::start(None, &wander)?.finish()?;
        ensure!(ended.status.success(), "the workload ended with {}", ended.status);
        for _ in 0..LOOKS {
            if agent.metric(&metric)?.is_some_and(|count| count > 0.0) {
                say(format_args!("{} cgroups are more than are followed", made.len()));
                return Ok(made);
            }
            std::thread::sleep(LOOK);
        }
    }
    anyhow::bail!("{} cgroups, and none is too many; the agent said:\n{}", made.len(), agent.stderr())
}

/// The line of the kill ledger about a process.
fn ledger_line(options: &AgentOptions, pid: u32) -> anyhow::Result<Value> {
    let deadline = Deadline::after(LIMIT);
    loop {
        let text = std::fs::read_to_string(options.state_dir.join("kills.jsonl")).unwrap_or_default();
        let lines: Vec<Value> = text.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
        if let Some(line) = lines.into_iter().find(|line| line["pid"] == pid) {
            return Ok(line);
        }
        ensure!(!deadline.has_passed(), "no line about {pid}");
        std::thread::sleep(LOOK);
    }
}

/// A kill in a cgroup is in the ledger and in an incident, with its path.
fn is_reported(options: &AgentOptions, cage: &Cage) -> anyhow::Result<()> {
    let ended = Actor::start(Some(cage), &["burst", "--mib", "64", "--threads", "1"])?.finish()?;
    ended.was_killed()?;
    claims::says(&ledger_line(options, ended.pid)?, "/cgroup_path", cage.path())?;
    let about = |i: &Value| i["cgroup"]["id"] == cage.id();
    let listed = options.incidents_when(LIMIT, |listed| listed.iter().any(about))?;
    let id = listed.iter().find(|i| about(i)).context("no incident")?["id"].as_str().context("no id")?.to_owned();
    let incident = options.report(&id)?;
    claims::says(&incident, "/cgroup/path", cage.path())?;
    claims::says(&incident, "/oom/scope", "cgroup")?;
    claims::only_victim(&incident, ended.pid, "workload")?;
    let lost = incident["losses"].as_array().context("no losses")?;
    ensure!(lost.iter().any(|loss| loss["what"] == OVER_CAP), "the incident says nothing of it: {lost:?}");
    Ok(())
}

#[test]
fn kills_among_more_cgroups_than_are_followed_have_their_path() -> anyhow::Result<()> {
    programs::require_root()?;
    let dir = tempfile::tempdir()?;
    let options = AgentOptions::below(dir.path()).with(&["--before", "5m"]);
    let mut agent = options.start()?;
    let parent = Cage::unlimited("many")?;
    let mut many = make_too_many(&parent, &agent)?;
    // One of the first, which was dropped; and one that is made now.
    is_reported(&options, &many.swap_remove(WORKED_IN + 20).limited(16 * MIB, 0)?)?;
    is_reported(&options, &Cage::new("own-name", 16 * MIB)?)?;
    ensure!(agent.get("/healthz")?.0 == 200, "not healthy");
    let status = agent.stop()?;
    ensure!(status.code() == Some(0), "the agent ended with {status}; it said:\n{}", agent.stderr());
    drop(many);
    parent.remove()
}
