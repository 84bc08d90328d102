//! Kills while no agent runs: the next one says for how long nobody watched, and finds each kill
//! once, in the kernel log or as a count of its cgroup.

#![allow(clippy::indexing_slicing, reason = "a panic is how a test fails")]

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, ensure};
use memtrace_tests::actor::Actor;
use memtrace_tests::agent::{Agent, AgentOptions, json_of, successful};
use memtrace_tests::cage::Cage;
use memtrace_tests::claims::MIB;
use memtrace_tests::deadline::Deadline;
use memtrace_tests::figures::{not_run_here, say};
use memtrace_tests::programs;
use serde_json::Value;

/// How long an agent may take to find out what happened before it.
const WAIT_LIMIT: Duration = Duration::from_secs(90);
/// Kills in one cgroup in quick succession: the kernel logs the cgroup of ten in five seconds.
const MANY: usize = 14;

/// Kills one process in a cgroup; its process id.
fn kill_in(cage: &Cage) -> anyhow::Result<u64> {
    let ended = Actor::start(Some(cage), &["burst", "--mib", "32", "--threads", "1"])?.finish()?;
    ended.was_killed()?;
    Ok(u64::from(ended.pid))
}

/// Every line of the kill ledger, oldest first.
fn ledger(options: &AgentOptions) -> anyhow::Result<Vec<Value>> {
    let text = std::fs::read_to_string(options.state_dir.join("kills.jsonl")).context("failed to read the ledger")?;
    let lines = text.lines().map(|line| serde_json::from_str(line).context("a line of the ledger is not JSON"));
    lines.collect()
}

fn of_source<'a>(lines: &'a [Value], source: &'a str) -> impl Iterator<Item = &'a Value> {
    lines.iter().filter(move |line| line["source"] == source)
}

/// Lines from hooks, lines from the log and counts about a cgroup: how many kills each stands for.
fn about(lines: &[Value], cage: &Cage) -> [u64; 3] {
    let ours = |line: &&Value| line["cgroup_path"] == cage.path();
    let hooked = lines.iter().filter(|line| line["source"].is_null() && line["killed"] == true);
    let counted = of_source(lines, "counter").filter(ours).filter_map(|line| line["kills"].as_u64());
    [hooked.filter(ours).count() as u64, of_source(lines, "kernel_log").filter(ours).count() as u64, counted.sum()]
}

/// How many lines have a process id.
fn lines_of(lines: &[Value], pid: u64) -> usize {
    lines.iter().filter(|line| line["pid"] == pid).count()
}

/// Waits until an agent has left its state with everything accounted for since `after_ns`.
fn accounted(agent: &Agent, after_ns: u64) -> anyhow::Result<()> {
    let deadline = Deadline::after(WAIT_LIMIT);
    loop {
        let state = std::fs::read(agent.options().state_dir.join("watched.json")).unwrap_or_default();
        let state: Value = serde_json::from_slice(&state).unwrap_or_default();
        if state["baseline"]["since_boot_ns"].as_u64().is_some_and(|since| since >= after_ns) {
            return Ok(());
        }
        ensure!(!deadline.has_passed(), "no account of the time before; it said:\n{}", agent.stderr());
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Waits until a kill is in the ledger.
fn in_ledger(agent: &Agent, pid: u64) -> anyhow::Result<()> {
    let deadline = Deadline::after(WAIT_LIMIT);
    while lines_of(&ledger(agent.options())?, pid) == 0 {
        ensure!(!deadline.has_passed(), "the kill of {pid} is not in the ledger; it said:\n{}", agent.stderr());
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

/// Cgroups, and who was killed in them while no agent ran.
struct Unwatched {
    /// With a kill that the first agent saw.
    known: Cage,
    /// Made before, without a kill by then.
    quiet: Cage,
    /// Made while no agent ran.
    fresh: Cage,
    pids: Vec<u64>,
}

/// Kills while no agent runs, in cgroups of every age.
fn kill_unwatched(known: Cage, quiet: Cage) -> anyhow::Result<Unwatched> {
    let fresh = Cage::new("fresh", 8 * MIB)?;
    let mut pids = vec![kill_in(&known)?, kill_in(&fresh)?];
    let gone = Cage::new("gone", 8 * MIB)?;
    pids.push(kill_in(&gone)?);
    gone.remove()?;
    for _ in 0..MANY {
        pids.push(kill_in(&quiet)?);
    }
    Ok(Unwatched { known, quiet, fresh, pids })
}

/// Holds the ledger against what the kernel counted and who was killed.
fn hold_against(lines: &[Value], unwatched: &Unwatched, log_is_whole: bool) -> anyhow::Result<()> {
    for cage in [&unwatched.known, &unwatched.quiet, &unwatched.fresh] {
        let (found, counted) = (about(lines, cage), cage.oom_kills()?);
        say(format_args!("{}: {counted} kills, by hook, log and count {found:?}", cage.path()));
        ensure!(found.iter().sum::<u64>() == counted, "{}: the kernel counted {counted}, {found:?}", cage.path());
    }
    for pid in &unwatched.pids {
        let found = lines_of(lines, *pid);
        ensure!(found == 1 || (found == 0 && !log_is_whole), "{found} lines of {pid}:\n{lines:?}");
    }
    Ok(())
}

#[test]
fn kills_between_two_runs_are_in_the_ledger_once_and_the_gap_is_said() -> anyhow::Result<()> {
    programs::require_root()?;
    let dir = tempfile::tempdir()?;
    let options = AgentOptions::below(dir.path()).with(&["--after", "300ms"]);
    let mut first = options.start()?;
    ensure!(of_source(&ledger(&options)?, "not_watched").count() == 0, "nobody ran before");
    let (known, quiet) = (Cage::new("known", 8 * MIB)?, Cage::new("quiet", 8 * MIB)?);
    let seen = kill_in(&known)?;
    in_ledger(&first, seen)?;
    accounted(&first, 0)?;
    let state = options.state_dir.join("watched.json");
    let before = std::fs::read(&state)?;
    first.kill_9()?;
    let unwatched = kill_unwatched(known, quiet)?;

    let mut second = options.start()?;
    let lines = ledger(&options)?;
    let gaps: Vec<_> = of_source(&lines, "not_watched").collect();
    let [gap] = gaps.as_slice() else { anyhow::bail!("{} gaps: {gaps:?}", gaps.len()) };
    let end_ns = gap["to"]["boot_ns"].as_u64().context("the gap has no end")?;
    ensure!(
        gap["rebooted"] == false && gap["stopped"] == false && gap["duration_ns"].as_u64() > Some(0),
        "{gap}\n{}",
        second.stderr()
    );
    ensure!(second.comes_to_say("not watched for "), "no word of the gap; it said:\n{}", second.stderr());
    accounted(&second, end_ns)?;
    let lines = ledger(&options)?;
    let total = of_source(&lines, "unwatched_kills").next().context("no line about what was found")?;
    let log_is_whole = total["kernel_log_lines_lost"] == 0;
    if !log_is_whole {
        not_run_here("the kernel log", format!("it lost {} lines", total["kernel_log_lines_lost"]));
    }
    hold_against(&lines, &unwatched, log_is_whole)?;
    ensure!(lines_of(&lines, seen) == 1, "the kill that was seen is there again: {lines:?}");
    shows(&options, &second, unwatched.pids.len() as f64)?;
    second.kill_9()?;

    // A third run adds its own gap, also when the second could not leave what it had found out.
    for stale in [false, true] {
        if stale {
            std::fs::write(&state, &before)?;
        }
        let mut third = options.start()?;
        let gap = ledger(&options)?.into_iter().rfind(|line| line["source"] == "not_watched").context("no gap")?;
        accounted(&third, gap["to"]["boot_ns"].as_u64().context("the gap has no end")?)?;
        let lines = ledger(&options)?;
        hold_against(&lines, &unwatched, log_is_whole)?;
        ensure!(lines_of(&lines, seen) == 1, "the kill that was seen is there again: {lines:?}");
        third.kill_9()?;
    }
    ensure!(of_source(&ledger(&options)?, "not_watched").count() == 3, "three gaps between four runs");
    Ok(())
}

/// The gap and its kills are in the listing and in the metrics.
fn shows(options: &AgentOptions, agent: &Agent, kills: f64) -> anyhow::Result<()> {
    let listing = |json: bool| -> anyhow::Result<_> {
        let mut command = programs::memtrace_command()?;
        command.args(["incidents", "--kills", "--state-dir"]).arg(&options.state_dir);
        command.args(json.then_some("--json"));
        Ok(command)
    };
    let text = String::from_utf8(successful(listing(false)?)?.stdout)?;
    ensure!(text.contains("not watched for ") && text.contains("the agent was killed"), "{text}");
    let listed = json_of(listing(true)?)?;
    let listed = listed.as_array().map(Vec::len);
    ensure!(listed == Some(ledger(options)?.len()), "{listed:?} lines are listed");
    let found = agent.metric("memtrace_unwatched_kills_total")?;
    ensure!(found >= Some(kills), "{found:?} kills in the metric, {kills} were killed");
    let seconds = agent.metric("memtrace_unwatched_seconds_total")?;
    ensure!(seconds > Some(0.0), "{seconds:?} s not watched in the metric");
    Ok(())
}

#[test]
fn a_stop_is_a_gap_too_and_a_state_of_another_boot_is_not_compared() -> anyhow::Result<()> {
    programs::require_root()?;
    let dir = tempfile::tempdir()?;
    let options = AgentOptions::below(dir.path());
    let mut agent = options.start()?;
    agent.stop()?;
    let gap_of_start = |options: &AgentOptions| -> anyhow::Result<Value> {
        let mut agent = options.start()?;
        let gap = ledger(options)?.into_iter().rfind(|line| line["source"] == "not_watched").context("no gap")?;
        agent.stop()?;
        Ok(gap)
    };
    let stopped = gap_of_start(&options)?;
    ensure!(stopped["stopped"] == true && stopped["rebooted"] == false, "{stopped}");
    ensure!(stopped["from"]["boot_ns"].as_u64() < stopped["to"]["boot_ns"].as_u64(), "{stopped}");
    // As after a boot: the journal was in memory, and the state is of the boot before.
    std::fs::remove_dir_all(&options.journal_dir)?;
    of_another_boot(&options.state_dir.join("watched.json"))?;
    let booted = gap_of_start(&options)?;
    ensure!(booted["rebooted"] == true && booted["stopped"].is_null(), "{booted}");
    ensure!(booted["from"]["boot_id"] == "another" && booted["duration_ns"].as_u64().is_some(), "{booted}");
    Ok(())
}

fn of_another_boot(state: &Path) -> anyhow::Result<()> {
    let mut value: Value = serde_json::from_slice(&std::fs::read(state)?)?;
    value["watched_until"]["boot_id"] = "another".into();
    std::fs::write(state, serde_json::to_vec(&value)?)?;
    Ok(())
}
