//! SIGKILLs that are no OOM kills do not become incidents, and their senders are known.

#![allow(clippy::indexing_slicing, reason = "a panic is how a test fails")]

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, ensure};
use memtrace_tests::actor::{Actor, EndedWorkload};
use memtrace_tests::cage::Cage;
use memtrace_tests::claims::MIB;
use memtrace_tests::deadline::Deadline;
use memtrace_tests::figures::not_run_here;
use memtrace_tests::process;
use memtrace_tests::trial::Trial;
use rustix::process::Signal;
use serde_json::Value;

const WAIT_LIMIT: Duration = Duration::from_secs(60);

/// The entry about a process in the list of SIGKILLs.
fn line_about(trial: &Trial, pid: u32) -> anyhow::Result<Value> {
    let deadline = Deadline::after(WAIT_LIMIT);
    loop {
        let lines = trial.sigkills()?;
        let mut about = lines.iter().filter(|line| line["pid"] == pid);
        if let Some(line) = about.next() {
            ensure!(about.next().is_none(), "{pid} is told of twice in {lines:?}");
            return Ok(line.clone());
        }
        ensure!(!deadline.has_passed(), "nobody tells who killed {pid}: {lines:?}");
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// Checks that there is no incident of a kill, and that the counter agrees.
fn nobody_ran_out(trial: &Trial) -> anyhow::Result<()> {
    std::thread::sleep(Duration::from_millis(1500));
    let listed = trial.options().incidents()?;
    ensure!(listed.iter().all(|incident| incident["kind"] != "oom_kill"), "an OOM kill is made up: {listed:?}");
    let counted = trial.agent.metric("memtrace_oom_kills_total")?;
    ensure!(counted == Some(0.0), "{counted:?} OOM kills are counted");
    Ok(())
}

fn held(cage: &Cage, comm: &str) -> anyhow::Result<Actor> {
    let mut actor = Actor::start(Some(cage), &["member", "--comm", comm, "--mib", "8", "--wait"])?;
    actor.until("ready")?;
    Ok(actor)
}

#[test]
fn a_kill_by_a_process_is_that_process_doing() -> anyhow::Result<()> {
    let trial = Trial::begin(&[])?;
    let cage = Cage::new("kill9", 64 * MIB)?;
    let actor = held(&cage, "kill9-target")?;
    let pid = actor.pid();
    process::signal(pid, Signal::KILL)?;
    actor.finish()?.was_killed()?;
    let line = line_about(&trial, pid)?;
    ensure!(line["cause"] == "process" && line["sender_pid"] == std::process::id(), "{line}");
    ensure!(
        line["comm"] == "kill9-target" && line["cgroup_path"] == cage.path() && line["incident"].is_null(),
        "{line}"
    );
    let suicide = Actor::start(Some(&cage), &["kill-self"])?.finish()?;
    suicide.was_killed()?;
    let line = line_about(&trial, suicide.pid)?;
    ensure!(line["cause"] == "process" && line["sender_pid"] == suicide.pid, "{line}");
    nobody_ran_out(&trial)?;
    cage.remove()?;
    trial.end()
}

/// A cgroup v2 directory that has cgroup.kill: the cage itself on v2, a new one beside v1.
fn killable(cage: &Cage) -> anyhow::Result<Option<(PathBuf, bool)>> {
    if cage.has("cgroup.kill") {
        return Ok(Some((cage.dir().to_owned(), false)));
    }
    let unified = Path::new("/sys/fs/cgroup/unified");
    if !unified.join("cgroup.procs").exists() {
        return Ok(None);
    }
    let dir = unified.join(format!("memtrace-tests-{}-kill", std::process::id()));
    std::fs::create_dir(&dir).with_context(|| format!("failed to make cgroup {}", dir.display()))?;
    if dir.join("cgroup.kill").exists() {
        return Ok(Some((dir, true)));
    }
    std::fs::remove_dir(&dir).with_context(|| format!("failed to remove cgroup {}", dir.display()))?;
    Ok(None)
}

#[test]
fn cgroup_kill_is_told_from_the_oom_killer() -> anyhow::Result<()> {
    let cage = Cage::new("cgroupkill", 64 * MIB)?;
    let Some((dir, own)) = killable(&cage)? else {
        not_run_here("cgroup.kill", "this kernel has no such file (5.14 and newer have)");
        return cage.remove();
    };
    let trial = Trial::begin(&[])?;
    let (one, two) = (held(&cage, "kill-one")?, held(&cage, "kill-two")?);
    let pids = [one.pid(), two.pid()];
    if own {
        for pid in pids {
            std::fs::write(dir.join("cgroup.procs"), pid.to_string()).context("failed to move a process")?;
        }
    }
    std::fs::write(dir.join("cgroup.kill"), "1").context("failed to write cgroup.kill")?;
    for actor in [one, two] {
        actor.finish()?.was_killed()?;
    }
    for pid in pids {
        let line = line_about(&trial, pid)?;
        ensure!(line["cause"] == "cgroup_kill" && line["sender_pid"] == std::process::id(), "{line}");
    }
    nobody_ran_out(&trial)?;
    if own {
        std::fs::remove_dir(&dir).with_context(|| format!("failed to remove cgroup {}", dir.display()))?;
    }
    cage.remove()?;
    trial.end()
}

#[test]
fn other_ends_are_no_oom_kills() -> anyhow::Result<()> {
    let trial = Trial::begin(&[])?;
    let cage = Cage::new("ends", 64 * MIB)?;
    let run = |arguments: &[&str]| -> anyhow::Result<EndedWorkload> { Actor::start(Some(&cage), arguments)?.finish() };
    let limited = run(&["limit-as", "--mib", "256"])?;
    ensure!(limited.status.code() == Some(125), "RLIMIT_AS: {}", limited.status);
    ensure!(limited.one("limited")?["refused"] == true, "RLIMIT_AS did not hold");
    let looks_like = run(&["exit-after", "--ms", "1", "--mib", "4", "--code", "137"])?;
    ensure!(looks_like.status.code() == Some(137), "exit 137: {}", looks_like.status);
    let wild = run(&["segv"])?;
    ensure!(process::shell_code(wild.status) == 139, "SIGSEGV: {}", wild.status);
    nobody_ran_out(&trial)?;
    let lines = trial.sigkills()?;
    for ended in [limited, looks_like, wild] {
        ensure!(lines.iter().all(|line| line["pid"] != ended.pid), "nobody sent {} a SIGKILL: {lines:?}", ended.pid);
    }
    cage.remove()?;
    trial.end()
}

#[test]
fn an_oom_kill_names_its_incident() -> anyhow::Result<()> {
    let trial = Trial::begin(&[])?;
    let cage = Cage::new("named", 16 * MIB)?;
    let ended = Actor::start(Some(&cage), &["burst", "--mib", "64", "--touch"])?.finish()?;
    ended.was_killed()?;
    let incident = trial.incident(&cage)?;
    let line = line_about(&trial, ended.pid)?;
    ensure!(line["cause"] == "oom" && line["incident"] == incident["id"], "{line}");
    cage.remove()?;
    trial.end()
}
