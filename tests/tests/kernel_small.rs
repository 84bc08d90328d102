//! The agent in a small memory cgroup of its own, and after much has come and gone.

use std::time::Duration;

use anyhow::ensure;
use memtrace_tests::actor::Actor;
use memtrace_tests::agent::AgentOptions;
use memtrace_tests::cage::Cage;
use memtrace_tests::claims::MIB;
use memtrace_tests::deadline::{Deadline, SLOWNESS};
use memtrace_tests::figures::{not_run_here, say};
use memtrace_tests::process::ProcRss;
use memtrace_tests::trial::Trial;

/// What the agent says that it needs.
const NEEDED: u64 = 96 * MIB;
const CGROUPS: usize = 20;
const KILLS_EACH: usize = 3;
/// Short processes.
const PASSING: &str = "20000";
/// What they may leave behind in the recorder, bytes.
const LEFT_BEHIND: u64 = 5 * MIB;
/// They are remembered for two minutes, because incidents look back at them; the rest is for a
/// machine that is busy with other things, which both agents follow.
const REMEMBERED: Duration = Duration::from_secs(600);

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
    trial.kills(&all, CGROUPS * KILLS_EACH)?;
    say(format_args!("peak of the agent's cgroup: {:?}, kills in it: {}", own.peak()?, own.oom_kills()?));
    trial.end()?;
    cages.into_iter().try_for_each(Cage::remove)?;
    own.remove()
}

/// What an agent holds depends on what else the machine does, and did some minutes ago. So it is
/// compared with an agent that has seen the same but the short processes.
#[test]
fn short_processes_that_are_gone_leave_little_behind() -> anyhow::Result<()> {
    if std::env::var_os(SLOWNESS).is_some() {
        not_run_here("what short processes leave behind", "userspace's own, and thousands take long under emulation");
        return Ok(());
    }
    let (trial, cage) = (Trial::begin(&[])?, Cage::new("passing", 256 * MIB)?);
    let held = |trial: &Trial| Ok::<_, anyhow::Error>(ProcRss::read(trial.agent.pid())?.anon);
    let before = held(&trial)?;
    Actor::start(Some(&cage), &["passing", "--kib-each", "512", "--processes", PASSING])?.finish()?;
    let high = held(&trial)?;
    let other = Trial::begin(&[])?;
    let deadline = Deadline::after(REMEMBERED);
    let (mut after, mut others) = (high, held(&other)?);
    while after > others.max(before) + LEFT_BEHIND && !deadline.has_passed() {
        std::thread::sleep(Duration::from_millis(500));
        (after, others) = (held(&trial)?, held(&other)?);
    }
    let kib = [before, high, after, others].map(|bytes| bytes >> 10);
    say(format_args!("private memory of the recorder before, then, in the end, and of another, KiB: {kib:?}"));
    ensure!(after <= others.max(before) + LEFT_BEHIND, "KiB before, then, in the end, and of another: {kib:?}");
    other.end()?;
    trial.end()?;
    cage.remove()
}
