//! Where charges can be hooked, they can replace the rss hook as the source of memory readings, at
//! a fraction of its cost.

#![allow(clippy::indexing_slicing, reason = "a panic is how a test fails")]

use std::time::Duration;

use anyhow::{Context, ensure};
use memtrace_tests::actor::Actor;
use memtrace_tests::agent::{AgentOptions, json_of};
use memtrace_tests::cage::Cage;
use memtrace_tests::claims::{self, MIB};
use memtrace_tests::deadline::Deadline;
use memtrace_tests::figures::{not_run_here, say};
use memtrace_tests::process::ProcRss;
use memtrace_tests::trial::Trial;
use memtrace_tests::{json, programs};

/// How far charges may lag: a batch of 64 pages on each of a few CPUs, and the RSS threshold.
const BEHIND: u64 = 2 * MIB;

/// Whether charges can be hooked here. If not, an agent told to do without the rss hook must say so
/// and exit.
fn charges_can_be_hooked() -> anyhow::Result<bool> {
    programs::require_root()?;
    let mut doctor = programs::memtrace_command()?;
    doctor.args(["doctor", "--json"]);
    let report = json_of(doctor)?;
    let charge = json::list(&report, "/hooks")?.iter().find(|hook| hook["hook"] == "charge").context("no charge")?;
    if charge["state"] == "attached" {
        return Ok(true);
    }
    let dir = tempfile::tempdir()?;
    let refused = AgentOptions::below(dir.path()).with(&["--without", "rss"]).start();
    let said = refused.err().context("an agent without the rss hook and without charges runs")?.to_string();
    ensure!(said.contains("--without rss") && said.contains("charge"), "it said:\n{said}");
    not_run_here("charges in place of the rss hook", "this kernel lets nobody hook page_counter_try_charge");
    Ok(false)
}

#[test]
fn a_kill_has_its_curve_and_its_code_by_charges_alone() -> anyhow::Result<()> {
    if !charges_can_be_hooked()? {
        return Ok(());
    }
    let trial = Trial::begin(&["--without", "rss", "--sample", "256K", "--stack-budget", "100%"])?;
    let cage = Cage::new("charged", 64 * MIB)?;
    let actor = Actor::start(Some(&cage), &["burst", "--mib", "256", "--threads", "1"])?;
    let pid = actor.pid();
    actor.finish()?.was_killed()?;
    let incident = trial.incident(&cage)?;
    claims::ran_out_itself(&incident, &cage)?;
    claims::only_victim(&incident, pid, "workload")?;
    let anon = claims::highest(&incident, "anon_bytes")?;
    ensure!(anon + 2 * BEHIND >= cage.limit(), "the curve of anon ends at {anon}");
    let growth = json::number(&incident, "/allocations/growth_bytes")?;
    let attributed = json::number(&incident, "/allocations/attributed_bytes")?;
    say(format_args!("anon up to {} MiB, {} of {} MiB attributed", anon / MIB, attributed / MIB, growth / MIB));
    ensure!(growth + 2 * BEHIND >= cage.limit(), "{growth} bytes of growth in a cgroup of {}", cage.limit());
    ensure!(attributed * 100 >= growth * 85, "{attributed} of {growth} bytes have a stack");
    cage.remove()?;
    trial.end()
}

#[test]
fn what_is_held_and_what_is_given_back_is_known_by_charges_alone() -> anyhow::Result<()> {
    if !charges_can_be_hooked()? {
        return Ok(());
    }
    let trial = Trial::begin(&["--without", "rss"])?;
    let cage = Cage::new("held", 256 * MIB)?;
    let hold = ["hold", "--anon-mib", "40", "--file-mib", "0", "--shmem-mib", "8", "--threads", "2"];
    let mut actor = Actor::start(Some(&cage), &hold)?;
    actor.until("ready")?;
    let truth = ProcRss::read(actor.pid())?;
    let deadline = Deadline::after(Duration::from_secs(60));
    loop {
        let answer = trial.agent.get_json(&format!("/api/processes?pid={}", actor.pid()))?;
        let known = json::list(&answer, "")?.first().cloned().unwrap_or_default();
        let anon = known["anon_bytes"].as_u64().unwrap_or_default();
        if anon.abs_diff(truth.anon) <= BEHIND {
            say(format_args!("anon {anon}, /proc {}", truth.anon));
            break;
        }
        ensure!(!deadline.has_passed(), "anon is {} in /proc; told was {known}", truth.anon);
        std::thread::sleep(Duration::from_millis(100));
    }
    actor.finish()?;
    cage.remove()?;
    trial.end()
}
