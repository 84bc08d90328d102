//! Runs loops in every configuration of the agent, for the machines of `cargo xtask bench
//! instructions`. Prints figures, not a chapter, because the chapter combines all machines.

use std::io::Read;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use memtrace_tests::agent::{Agent, AgentOptions, json_of};
use memtrace_tests::cage::Cage;
use memtrace_tests::{json, process, programs};
use serde_json::{Map, Value, json};
use tempfile::TempDir;

/// Loops of `workload rounds`, and the number of rounds of each.
const LOOPS: [(&str, usize); 6] =
    [("fault", 80), ("map", 200), ("syscall", 200), ("fork", 200), ("exec", 100), ("read", 200)];
/// Kills in each configuration.
const KILLS: usize = 15;
/// Limit of the cgroup of a process that is to be killed, bytes.
const CAGE: u64 = 8 << 20;

/// Other tracers of page faults that may be installed.
const PEERS: [(&str, &[&str]); 3] = [
    ("bpftrace-tracepoint", &["bpftrace", "-e", "tracepoint:exceptions:page_fault_user { @[comm] = count(); }"]),
    ("bpftrace-software", &["bpftrace", "-e", "software:page-faults:1 { @[comm] = count(); }"]),
    ("perf-record", &["perf", "record", "-e", "page-faults", "-c", "1", "-g", "-a", "-o", "-"]),
];
/// Time after which a peer that still runs is assumed to have attached: one of them compiles its
/// program first.
const ATTACHED: Duration = Duration::from_secs(20);

/// Time for work that the kernel or a tracer put off until after boot or start. In a machine that
/// counts instructions, waiting costs nothing.
const SETTLE: Duration = Duration::from_secs(5);

/// Arguments of an agent that takes no stacks.
const NO_STACKS: [&str; 2] = ["--stack-budget", "0"];

/// Who traces.
struct Configuration {
    name: String,
    who: Who,
}

#[derive(Debug, PartialEq)]
enum Who {
    Nobody,
    /// The agent, with these arguments.
    Agent(Vec<String>),
    /// A program and its arguments.
    Peer(&'static [&'static str]),
}

/// A running tracer; ended when dropped.
enum Tracer {
    Agent { agent: Agent, _dir: TempDir },
    Peer(Child),
}

/// Runs all loops in all configurations; if quick, without those that leave out a single hook.
pub(crate) fn run(quick: bool) -> anyhow::Result<Value> {
    let mut doctor = programs::memtrace_command()?;
    doctor.args(["doctor", "--json"]);
    let doctor = json_of(doctor)?;
    let mut found = Map::new();
    for Configuration { name, who } in configurations(&doctor, quick)? {
        let tracer = match Tracer::start(&who) {
            Ok(tracer) => tracer,
            Err(error) if matches!(who, Who::Peer(_)) => {
                found.insert(name, json!({ "unknown": format!("{error:#}") }));
                continue;
            }
            Err(error) => return Err(error),
        };
        std::thread::sleep(SETTLE);
        let loops = measured().with_context(|| format!("with {name}"))?;
        tracer.map_or(Ok(()), Tracer::end).with_context(|| format!("after {name}"))?;
        found.insert(name, loops);
    }
    Ok(json!({ "hooks": doctor.get("hooks"), "configurations": found }))
}

impl Tracer {
    fn start(who: &Who) -> anyhow::Result<Option<Self>> {
        Ok(match who {
            Who::Nobody => None,
            Who::Agent(arguments) => {
                let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
                let dir = tempfile::tempdir().context("failed to make a directory for the agent")?;
                let mut options = AgentOptions::below(dir.path()).with(&arguments);
                // in memory, as by default
                options.journal_dir = "/run/memtrace".into();
                Some(Self::Agent { agent: options.start()?, _dir: dir })
            }
            Who::Peer(words) => {
                let (program, arguments) = words.split_first().context("no program")?;
                let mut command = Command::new(program);
                command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
                let mut peer = Self::Peer(command.spawn().with_context(|| format!("failed to start {program}"))?);
                std::thread::sleep(ATTACHED);
                if let Self::Peer(child) = &mut peer
                    && let Some(status) = child.try_wait().context("failed to look at a peer")?
                {
                    let mut said = String::new();
                    child.stderr.take().map(|mut stderr| stderr.read_to_string(&mut said)).transpose()?;
                    bail!("{program} ended with {status}: {}", said.trim());
                }
                Some(peer)
            }
        })
    }

    /// Ends it. Fails if it did not live until now.
    fn end(mut self) -> anyhow::Result<()> {
        match &mut self {
            Self::Agent { agent, .. } => {
                ensure!(agent.is_running()?, "the agent did not live to the end; it said:\n{}", agent.stderr());
                agent.stop()?;
            }
            Self::Peer(child) => {
                ensure!(child.try_wait().context("failed to look at a peer")?.is_none(), "it did not live to the end");
            }
        }
        Ok(())
    }
}

impl Drop for Tracer {
    fn drop(&mut self) {
        if let Self::Peer(child) = self {
            // an error means that it has ended already
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Configurations: no agent; the agent at defaults; without stacks (they are sampled at random and
/// blur the result); that also without each optional hook; with the required hooks only; the peers;
/// and no agent once more, to see how far the machine has drifted.
fn configurations(doctor: &Value, quick: bool) -> anyhow::Result<Vec<Configuration>> {
    let configuration = |name: &str, who| Configuration { name: name.to_owned(), who };
    let agent = |name: &str, arguments: &[&str]| {
        configuration(name, Who::Agent(arguments.iter().map(|argument| (*argument).to_owned()).collect()))
    };
    let nobody = |name: &str| configuration(name, Who::Nobody);
    let is_spare = |hook: &&Value| {
        let has = |key: &str, value: &str| hook.get(key).and_then(Value::as_str) == Some(value);
        has("state", "attached") && has("need", "optional")
    };
    let spare = json::list(doctor, "/hooks")?.iter().filter(is_spare).map(|hook| json::text(hook, "/hook"));
    let spare = spare.collect::<anyhow::Result<Vec<&str>>>()?;
    let mut all = vec![nobody("none"), agent("full", &[]), agent("no-stacks", &NO_STACKS)];
    let one_by_one = if quick { &[] } else { spare.as_slice() };
    all.extend(
        one_by_one
            .iter()
            .map(|hook| agent(&format!("without-{hook}"), &[NO_STACKS.as_slice(), &["--without", hook]].concat())),
    );
    all.push(agent("required", &[NO_STACKS.as_slice(), &["--without", &spare.join(",")]].concat()));
    if spare.contains(&"charge") {
        all.push(agent("charges", &[NO_STACKS.as_slice(), &["--without", "rss"]].concat()));
    }
    if !quick {
        all.extend(PEERS.map(|(name, words)| configuration(name, Who::Peer(words))));
    }
    all.push(nobody("none-again"));
    Ok(all)
}

fn measured() -> anyhow::Result<Value> {
    let mut loops = Map::new();
    for (name, rounds) in LOOPS {
        loops.insert(name.to_owned(), summed_up(&rounds_of(name, rounds)?, name)?);
    }
    let kills: Vec<f64> = (0..KILLS).map(|_| kill()).collect::<anyhow::Result<_>>()?;
    loops.insert("kill".to_owned(), summed_up(&kills, "kill")?);
    Ok(Value::Object(loops))
}

/// Parts that the rounds are divided into: the spread of their means gives the error of the mean.
const PARTS: usize = 5;

/// Mean and standard error.
fn summed_up(rounds: &[f64], name: &str) -> anyhow::Result<Value> {
    let mean = middle(rounds).with_context(|| format!("no rounds of {name}"))?;
    let parts: Vec<f64> = rounds.chunks(rounds.len().div_ceil(PARTS)).filter_map(middle).collect();
    // A long turn of the agent spoils one part, so the spread is estimated from the median
    // deviation, which is that of a normal distribution over 1.48.
    let median = |mut values: Vec<f64>| {
        values.sort_by(f64::total_cmp);
        values.get(values.len() / 2).copied().unwrap_or_default()
    };
    let center = median(parts.clone());
    let error = 1.48 * median(parts.iter().map(|part| (part - center).abs()).collect()) / (parts.len() as f64).sqrt();
    Ok(json!({ "mean": mean, "error": error, "rounds": rounds.len() }))
}

/// Mean of the middle half of the rounds: the agent's turns fall into few rounds, which become the
/// longest.
fn middle(rounds: &[f64]) -> Option<f64> {
    let mut sorted = rounds.to_vec();
    sorted.sort_by(f64::total_cmp);
    let quarter = sorted.len() / 4;
    let middle = sorted.get(quarter..sorted.len() - quarter).filter(|middle| !middle.is_empty())?;
    Some(middle.iter().sum::<f64>() / middle.len() as f64)
}

fn rounds_of(operation: &str, rounds: usize) -> anyhow::Result<Vec<f64>> {
    // The root cgroup is not charged: without a cgroup of its own, charges would seem to cost
    // nothing.
    let cage = Cage::unlimited("loop")?;
    let mut command = cage.command(programs::path("workload")?)?;
    command.args(["rounds", operation, "--rounds"]).arg(rounds.to_string());
    let output = command.stdin(Stdio::null()).stderr(Stdio::inherit()).output().context("failed to run a loop")?;
    ensure!(output.status.success(), "the loop {operation} ended with {}", output.status);
    let said = String::from_utf8_lossy(&output.stdout);
    let last: Value = serde_json::from_str(said.lines().last().context("the loop said nothing")?)?;
    cage.remove()?;
    json::list(&last, "/ns")?.iter().map(|ns| ns.as_f64().context("a round is no number")).collect()
}

/// Nanoseconds from the last page of a killed process to when its parent knows of its end.
fn kill() -> anyhow::Result<f64> {
    let stamp = tempfile::Builder::new().prefix("memtrace-stamp").tempfile_in("/dev/shm").context("no stamp file")?;
    // its page exists beforehand and is not charged to the victim
    std::fs::write(stamp.path(), [0; 8]).context("failed to write the stamp file")?;
    let cage = Cage::new("loops", CAGE)?;
    let mut command = cage.command(programs::path("workload")?)?;
    command.arg("until-killed").arg("--stamp").arg(stamp.path()).stdin(Stdio::null()).stdout(Stdio::null());
    let ended = command.status().context("failed to run a process to be killed")?;
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    ensure!(process::shell_code(ended) == 137, "nobody killed the process, it ended with {ended}");
    let bytes = std::fs::read(stamp.path()).context("failed to read the stamp file")?;
    let last = bytes.first_chunk::<8>().map(|bytes| u64::from_ne_bytes(*bytes)).context("no stamp")?;
    let now = u64::try_from(now.tv_sec)? * 1_000_000_000 + u64::try_from(now.tv_nsec)?;
    Ok(now.saturating_sub(last) as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_with_a_turn_of_the_agent_in_them_do_not_count() {
        assert_eq!(middle(&[11.0, 10.0, 12.0, 900.0, 13.0, 9.0, 12.0, 10.0]), Some(11.25));
        assert_eq!(middle(&[]), None);
    }

    #[test]
    fn rounds_that_drift_are_less_sure() {
        let error = |rounds: &[f64]| summed_up(rounds, "x").unwrap().pointer("/error").and_then(Value::as_f64).unwrap();
        assert_eq!(error(&[3.0; 20]), 0.0);
        let drifting: Vec<f64> = (0..20).map(f64::from).collect();
        let steady: Vec<f64> = (0..20).map(|round| f64::from(round % 4)).collect();
        assert_eq!(error(&steady), 0.0);
        assert!(error(&drifting) > 2.0);
        assert!(summed_up(&[], "x").is_err());
    }

    #[test]
    fn every_spare_hook_is_left_out_once() {
        let hook = |name: &str, need: &str, state: &str| json!({ "hook": name, "need": need, "state": state });
        let hooks = [
            hook("rss", "required", "attached"),
            hook("fault", "optional", "attached"),
            hook("map", "optional", "attached"),
        ];
        let hooks = [hooks.as_slice(), &[hook("charge", "optional", "failed")]].concat();
        let doctor = json!({ "hooks": hooks });
        let all = configurations(&doctor, false).unwrap();
        let names: Vec<&str> = all.iter().map(|configuration| configuration.name.as_str()).collect();
        let without = ["without-fault", "without-map"];
        assert!(names.starts_with(&[["none", "full", "no-stacks"].as_slice(), &without, &["required"]].concat()));
        assert_eq!(names.last(), Some(&"none-again"));
        assert_eq!(configurations(&doctor, true).unwrap().len(), names.len() - without.len() - PEERS.len());
        assert_eq!(
            all[5].who,
            Who::Agent(["--stack-budget", "0", "--without", "fault,map"].map(str::to_owned).to_vec())
        );
    }
}
