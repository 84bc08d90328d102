//! Processes that change while they grow: growth is attributed to the right process and cgroup
//! nevertheless.

#![allow(clippy::indexing_slicing, reason = "a panic is how a test fails")]

use std::path::Path;

use anyhow::{Context, ensure};
use memtrace_tests::actor::Actor;
use memtrace_tests::cage::Cage;
use memtrace_tests::claims::{self, MIB};
use memtrace_tests::figures::{not_run_here, say};
use memtrace_tests::trial::Trial;
use memtrace_tests::{json, process};
use serde_json::Value;

/// Growth that the incident attributes to a process.
fn grown(incident: &Value, pid: u32) -> anyhow::Result<u64> {
    let rows = json::list(incident, "/growth")?;
    let row = rows.iter().find(|row| row["pid"] == pid).with_context(|| format!("{pid} is not in {rows:?}"))?;
    json::number(row, "/last_10s_bytes")
}

/// Checks that `bytes` are `mib` plus what a small program takes.
fn about(bytes: u64, mib: u64) -> anyhow::Result<()> {
    ensure!((mib * MIB..(mib + 6) * MIB).contains(&bytes), "{bytes} bytes are not about {mib} MiB");
    Ok(())
}

#[test]
fn a_new_program_starts_from_nothing() -> anyhow::Result<()> {
    let trial = Trial::begin(&[])?;
    let cage = Cage::new("exec", 48 * MIB)?;
    let ended = Actor::start(Some(&cage), &["exec-grow", "--first-mib", "30", "--mib", "96"])?.finish()?;
    ended.was_killed()?;
    let incident = trial.incident(&cage)?;
    claims::ran_out_itself(&incident, &cage)?;
    // the same process under its new name, without the memory of the program before it
    claims::only_victim(&incident, ended.pid, "exec-after")?;
    ensure!(claims::highest(&incident, "anon_bytes")? >= 40 * MIB, "the curve does not reach the limit");
    let grown = grown(&incident, ended.pid)?;
    ensure!(grown <= 54 * MIB, "{grown} bytes of growth: memory of the program before counts too");
    let starts = ended.all("start").map(|said| json::number(said, "/start_ticks")).collect::<Result<Vec<_>, _>>()?;
    let said = process::ticks_of_ns(json::number(&incident, "/oom/victims/0/start_boot_ns")?);
    ensure!(starts.iter().all(|start| *start == said), "started at tick {said}, not {starts:?}");
    cage.remove()?;
    trial.end()
}

#[test]
fn a_child_that_never_execs_grows_on_its_own_account() -> anyhow::Result<()> {
    let trial = Trial::begin(&[])?;
    let cage = Cage::new("fork", 32 * MIB)?;
    let ended = Actor::start(Some(&cage), &["fork-only", "--mib", "64"])?.finish()?;
    ensure!(ended.status.success(), "the parent ended with {}", ended.status);
    let child = ended.child("child_exit")?;
    let incident = trial.incident(&cage)?;
    claims::ran_out_itself(&incident, &cage)?;
    claims::only_victim(&incident, child, "fork-only-child")?;
    ensure!(grown(&incident, child)? >= 28 * MIB, "the child is said to have grown {}", grown(&incident, child)?);
    let parent = json::list(&incident, "/oom/tasks")?.iter().find(|task| task["pid"] == ended.pid);
    let parent = parent.context("the parent is not in the task table")?;
    ensure!(json::number(parent, "/anon_bytes")? < 4 * MIB, "the parent holds its child's memory: {parent}");
    cage.remove()?;
    trial.end()
}

#[test]
fn who_moves_in_mid_growth_runs_out_where_it_moved_to() -> anyhow::Result<()> {
    let trial = Trial::begin(&[])?;
    let (from, to) = (Cage::new("from", 128 * MIB)?, Cage::new("to", 32 * MIB)?);
    let dir = to.dir().to_str().context("a path that is not text")?;
    let ended = Actor::start(Some(&from), &["move-grow", "--first-mib", "20", "--to", dir, "--mib", "96"])?.finish()?;
    ended.was_killed()?;
    // a cgroup namespace has another root; the path must be the host's
    let incident = trial.incident(&to)?;
    claims::ran_out_itself(&incident, &to)?;
    claims::only_victim(&incident, ended.pid, "workload")?;
    let peak = json::number(&incident, "/cgroup/peak_bytes")?;
    ensure!(peak.abs_diff(to.limit()) <= MIB, "peak {peak} of the cgroup it moved to");
    trial.incidents(&[&from], 0)?;
    from.remove()?;
    to.remove()?;
    trial.end()
}

#[test]
fn a_pid_that_is_used_again_is_another_process() -> anyhow::Result<()> {
    let last_pid = Path::new("/proc/sys/kernel/ns_last_pid");
    if !last_pid.exists() {
        not_run_here("pid reuse", "this kernel does not let a pid be chosen (CONFIG_CHECKPOINT_RESTORE)");
        return Ok(());
    }
    let trial = Trial::begin(&[])?;
    let (first, second) = (Cage::new("first", 64 * MIB)?, Cage::new("second", 32 * MIB)?);
    let mut old = Actor::start(Some(&first), &["member", "--comm", "old", "--mib", "24", "--wait"])?;
    let old_ticks = json::number(old.until("start")?, "/start_ticks")?;
    old.until("ready")?;
    let pid = old.pid();
    ensure!(old.finish()?.status.success(), "the first process");
    // the test cannot tell two starts within one clock tick apart
    std::thread::sleep(std::time::Duration::from_millis(50));
    let mut tries = 0;
    let ended = loop {
        tries += 1;
        std::fs::write(last_pid, (pid - 1).to_string()).context("failed to choose the next pid")?;
        let new = Actor::start(Some(&second), &["member", "--comm", "new", "--mib", "96"])?;
        if new.pid() == pid {
            break new.finish()?;
        }
        ensure!(tries < 200, "somebody else takes {pid} every time");
    };
    ended.was_killed()?;
    say(format_args!("pid {pid} used again after {tries} tries"));
    let found = trial.incidents(&[&second], 1);
    // a try that got another pid was killed by the limit too, or by the test before this one
    let incidents = if tries == 1 { found? } else { trial.options().incidents()? };
    let incident =
        incidents.iter().find(|i| i["oom"]["victims"][0]["pid"] == pid).context("no incident of that pid")?;
    let incident = trial.options().report(json::text(incident, "/id")?)?;
    claims::only_victim(&incident, pid, "new")?;
    claims::says(&incident, "/cgroup/path", second.path())?;
    let start = process::ticks_of_ns(json::number(&incident, "/oom/victims/0/start_boot_ns")?);
    let new_ticks = json::number(ended.one("start")?, "/start_ticks")?;
    ensure!(
        start == new_ticks && start != old_ticks,
        "started at {start}; the new one {new_ticks}, the old {old_ticks}"
    );
    about(grown(&incident, pid)?, 32)?;
    ensure!(!incident["oom"]["tasks"].to_string().contains("\"old\""), "the process before is in the task table");
    first.remove()?;
    second.remove()?;
    trial.end()
}
