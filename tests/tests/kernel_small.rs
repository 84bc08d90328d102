//! The agent in a small memory cgroup of its own, and after much has come and gone.

use anyhow::ensure;
use memtrace_tests::actor::Actor;
use memtrace_tests::agent::AgentOptions;
use memtrace_tests::cage::Cage;
use memtrace_tests::claims::MIB;
use memtrace_tests::figures::say;
use memtrace_tests::trial::Trial;

/// What the agent says that it needs.
const NEEDED: u64 = 96 * MIB;
const CGROUPS: usize = 20;
const KILLS_EACH: usize = 3;

#[test]
fn with_too_little_memory_it_says_how_much_it_needs() -> anyhow::Result<()> {
    let (cage, dir) = (Cage::new("small", NEEDED - MIB)?, tempfile::tempdir()?);
    let output = AgentOptions::below(dir.path()).inside(&cage).command(1)?.output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.code() == Some(3), "it ended with {}:\n{said}", output.status);
    ensure!(said.contains(cage.path()) && said.contains("needs 96 MiB"), "it says:\n{said}");
    cage.remove()
}

/// The names of functions are a luxury: the process that finds them is the first to be killed.
#[test]
fn with_what_it_needs_it_runs_through_a_storm_of_kills() -> anyhow::Result<()> {
    let own = Cage::new("agent", NEEDED)?;
    let trial = Trial::begin_inside(&own, &[])?;
    let cages = (0..CGROUPS).map(|_| Cage::new("storm", 8 * MIB)).collect::<Result<Vec<_>, _>>()?;
    for _ in 0..KILLS_EACH {
        let arguments = ["burst", "--mib", "32", "--threads", "1"];
        let actors = cages.iter().map(|cage| Actor::start(Some(cage), &arguments)).collect::<Result<Vec<_>, _>>()?;
        actors.into_iter().try_for_each(|actor| actor.finish()?.was_killed())?;
    }
    let all: Vec<&Cage> = cages.iter().collect();
    trial.incidents(&all, CGROUPS * KILLS_EACH)?;
    say(format_args!("peak of the agent's cgroup: {:?}, kills in it: {}", own.peak()?, own.oom_kills()?));
    trial.end()?;
    cages.into_iter().try_for_each(Cage::remove)?;
    own.remove()
}
