//! A hundred OOM kills of five kinds in sequence: each becomes exactly one incident with the right
//! facts.

#![allow(clippy::indexing_slicing, reason = "a panic is how a test fails")]

use std::collections::BTreeMap;
use std::io::{BufRead, Cursor};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, ensure};
use memtrace_tests::agent::AgentOptions;
use memtrace_tests::cage::Cage;
use memtrace_tests::figures::say;
use memtrace_tests::json;
use memtrace_tests::printk::{self, KernelLogTail, KillLines, PrintkAnchor};
use memtrace_tests::process;
use memtrace_tests::programs::{self, require_root};
use serde_json::Value;

/// Runs of each kind unless `MEMTRACE_TESTS_ROUNDS` is set: emulated machines do fewer.
const RUNS_EACH: usize = 20;
const MIB: u64 = 1 << 20;
/// Largest difference between curve and limit.
const QUANTUM: u64 = 256 << 10;
const ONE_MS: u64 = 1_000_000;
/// Largest distance from a SIGKILL to its line in the log. Usually microseconds, unless the trigger
/// is preempted in between; the real distance is printed, and this only tells kills apart.
const PREEMPTED_NS: u64 = 500 * ONE_MS;

/// One way to run out of memory.
struct Kind {
    name: &'static str,
    limit: u64,
    arguments: &'static [&'static str],
    /// Name of the process that the kernel must pick.
    victim_comm: &'static str,
    /// Whether one run causes several kills.
    several: bool,
}

const KINDS: [Kind; 5] = [
    Kind {
        name: "slow",
        limit: 32 * MIB,
        arguments: &["slow", "--mib", "64", "--mib-per-s", "150"],
        victim_comm: "workload",
        several: false,
    },
    Kind {
        name: "burst",
        limit: 200_000_000 / 4096 * 4096,
        arguments: &["burst", "--mib", "320"],
        victim_comm: "workload",
        several: false,
    },
    Kind {
        name: "many",
        limit: 32 * MIB,
        arguments: &["many", "--processes", "8", "--mib-each", "8"],
        victim_comm: "many-child",
        several: true,
    },
    Kind {
        name: "tmpfs",
        limit: 32 * MIB,
        arguments: &["tmpfs", "--mib", "64"],
        victim_comm: "workload",
        several: false,
    },
    Kind {
        name: "fork-child",
        limit: 32 * MIB,
        arguments: &["fork-child", "--mib", "64"],
        victim_comm: "grow-child",
        several: false,
    },
];

/// A process that the kernel killed, as the test saw it.
struct Victim {
    pid: u32,
    /// From its own `start` line; `None` if it was killed before it printed one.
    start_ticks: Option<u64>,
    lines: KillLines,
}

/// One run of one kind.
struct Run {
    kind: usize,
    cage_id: u64,
    cage_path: String,
    limit: u64,
    peak: Option<u64>,
    oom_kills: u64,
    victims: Vec<Victim>,
}

/// Differences measured in the incidents of one kind.
#[derive(Default)]
struct Measured {
    runs: usize,
    kills: u64,
    incidents: usize,
    lag_ns: Vec<u64>,
    off_limit: u64,
    off_peak: u64,
}

#[test]
fn a_hundred_kills_are_a_hundred_true_incidents() -> anyhow::Result<()> {
    require_root()?;
    let dir = tempfile::tempdir()?;
    let fill = tempfile::tempdir_in("/dev/shm")?;
    let options = AgentOptions::below(dir.path());
    let mut agent = options.start()?;
    let burst_us = fastest_burst_us()?;

    let mut log = KernelLogTail::open_at_end()?;
    let mut anchors = vec![log.anchor(20)?];
    let mut runs = Vec::new();
    let rounds = std::env::var("MEMTRACE_TESTS_ROUNDS").map_or(Ok(RUNS_EACH), |rounds| rounds.parse())?;
    for _ in 0..rounds {
        for kind in 0..KINDS.len() {
            runs.push(run_once(kind, fill.path(), &mut log)?);
            anchors.push(log.anchor(3)?);
        }
    }
    ensure!(log.overruns() == 0, "the kernel log was overwritten {} times before it was read", log.overruns());

    let ids: Vec<u64> = runs.iter().map(|run| run.cage_id).collect();
    let ours = |listed: &[Value]| -> Vec<Value> {
        let id = |incident: &Value| incident.pointer("/cgroup/id").and_then(Value::as_u64);
        listed.iter().filter(|incident| id(incident).is_some_and(|id| ids.contains(&id))).cloned().collect()
    };
    let kills: u64 = runs.iter().map(|run| run.oom_kills).sum();
    let expected = usize::try_from(kills)?;
    options.incidents_when(Duration::from_secs(60), |listed| ours(listed).len() >= expected)?;
    // time for a duplicate to appear
    std::thread::sleep(Duration::from_secs(2));
    let listed = ours(&options.incidents()?);

    let mut problems = Vec::new();
    let mut measured: Vec<Measured> = KINDS.iter().map(|_| Measured::default()).collect();
    let mut by_cage: BTreeMap<u64, Vec<Value>> = BTreeMap::new();
    for incident in listed {
        by_cage.entry(json::number(&incident, "/cgroup/id")?).or_default().push(incident);
    }
    for (number, run) in runs.iter().enumerate() {
        let incidents = by_cage.remove(&run.cage_id).unwrap_or_default();
        let m = &mut measured[run.kind];
        m.runs += 1;
        m.kills += run.oom_kills;
        m.incidents += incidents.len();
        for problem in check_run(run, &incidents, &anchors, &options, m)? {
            problems.push(format!("run {number} ({}): {problem}", KINDS[run.kind].name));
        }
    }
    print_table(&mut measured, &anchors, burst_us)?;
    let status = agent.stop()?;
    if status.code() != Some(0) {
        problems.push(format!("the agent ended with {status}"));
    }
    let shown = problems.iter().take(40).cloned().collect::<Vec<_>>().join("\n");
    ensure!(problems.is_empty(), "{} problems:\n{shown}\nthe agent said:\n{}", problems.len(), agent.stderr());
    Ok(())
}

/// How fast this machine takes 200 MB without a limit, best of five.
fn fastest_burst_us() -> anyhow::Result<u64> {
    let mut best = u64::MAX;
    for _ in 0..5 {
        let output = Command::new(programs::path("workload")?).args(["burst", "--mib", "191"]).output()?;
        let done = events(&output.stdout)?.into_iter().find(|event| event["event"] == "done").context("no end")?;
        best = best.min(json::number(&done, "/elapsed_us")?);
    }
    Ok(best)
}

fn events(stdout: &[u8]) -> anyhow::Result<Vec<Value>> {
    Cursor::new(stdout)
        .lines()
        .map(|line| serde_json::from_str(&line?).context("the workload printed something else than JSON lines"))
        .collect()
}

fn run_once(kind: usize, fill: &Path, log: &mut KernelLogTail) -> anyhow::Result<Run> {
    let Kind { name, limit, arguments, .. } = KINDS[kind];
    let from = log.next_seq()?;
    let cage = Cage::new(name, limit)?;
    let mut command = cage.command(programs::path("workload")?)?;
    command.args(arguments).stdin(Stdio::null());
    if name == "tmpfs" {
        command.arg("--dir").arg(fill);
    }
    let output = command.output().context("failed to run the workload")?;
    let peak = cage.peak()?;
    let oom_kills = cage.oom_kills()?;
    log.drain()?;

    let said = events(&output.stdout)?;
    let mut started = BTreeMap::new();
    for event in &said {
        let pid = u32::try_from(json::number(event, "/pid")?)?;
        started.insert(pid, Some(json::number(event, "/start_ticks")?));
    }
    for ended in said.iter().filter(|event| event["event"] == "child_exit") {
        started.entry(u32::try_from(json::number(ended, "/child")?)?).or_insert(None);
    }
    let mut victims = Vec::new();
    // others may be killed on this machine meanwhile: only processes that ran here count
    for pid in log.killed_pids(from).into_iter().filter(|pid| started.contains_key(pid)) {
        let lines = log.kill_of(pid, from).context("a kill without a line")?;
        victims.push(Victim { pid, start_ticks: started[&pid], lines });
    }
    ensure!(oom_kills >= 1, "{name}: nobody was killed; {} {}", output.status, String::from_utf8_lossy(&output.stderr));
    ensure!(
        usize::try_from(oom_kills)? == victims.len(),
        "{name}: the cgroup counted {oom_kills} kills, the kernel log has {}",
        victims.len()
    );
    let (cage_id, cage_path) = (cage.id(), cage.path().to_owned());
    if name == "tmpfs" {
        // memory of a killed filler is charged to its cgroup until it is freed
        for left in std::fs::read_dir(fill)? {
            std::fs::remove_file(left?.path())?;
        }
    }
    cage.remove()?;
    Ok(Run { kind, cage_id, cage_path, limit, peak, oom_kills, victims })
}

fn check_run(
    run: &Run,
    incidents: &[Value],
    anchors: &[PrintkAnchor],
    options: &AgentOptions,
    m: &mut Measured,
) -> anyhow::Result<Vec<String>> {
    let kind = &KINDS[run.kind];
    let mut problems = Vec::new();
    let of_kills: Vec<&Value> = incidents.iter().filter(|incident| incident["kind"] == "oom_kill").collect();
    if of_kills.len() != run.victims.len() || (!kind.several && incidents.len() != 1) {
        let found: Vec<String> = incidents.iter().map(|i| format!("{} {}", i["kind"], i["id"])).collect();
        problems.push(format!("{} kills but incidents {found:?}", run.victims.len()));
    }
    for victim in &run.victims {
        let has_victim = |incident: &Value| {
            let victims = incident.pointer("/oom/victims").and_then(Value::as_array);
            victims.is_some_and(|victims| victims.iter().any(|v| v["pid"] == victim.pid && v["killed"] == true))
        };
        let mut matching = of_kills.iter().filter(|incident| has_victim(incident));
        let (Some(listed), None) = (matching.next(), matching.next()) else {
            problems.push(format!("victim {} is not in exactly one incident", victim.pid));
            continue;
        };
        if listed.get("timeline").is_some() || listed.get("allocation_paths").is_some() {
            problems.push("the list has timeline or allocation_paths".to_owned());
        }
        let id = json::text(listed, "/id")?;
        let whole = options.report(id)?;
        let found = check_incident(run, victim, &whole, anchors, m).with_context(|| format!("incident {id}"))?;
        problems.extend(found.into_iter().map(|problem| format!("{id}: {problem}")));
    }
    Ok(problems)
}

fn check_incident(
    run: &Run,
    victim: &Victim,
    incident: &Value,
    anchors: &[PrintkAnchor],
    m: &mut Measured,
) -> anyhow::Result<Vec<String>> {
    let mut problems = Vec::new();
    let mut expect = |holds: bool, problem: String| {
        if !holds {
            problems.push(problem);
        }
    };

    // who
    let victims = json::list(incident, "/oom/victims")?;
    let killed: Vec<&Value> = victims.iter().filter(|v| v["killed"] == true).collect();
    expect(killed.len() == 1, format!("{} killed victims in one incident", killed.len()));
    let said = killed.iter().find(|v| v["pid"] == victim.pid).context("the victim is gone from the full report")?;
    let comm = json::text(said, "/comm")?;
    expect(comm == KINDS[run.kind].victim_comm, format!("victim is called {comm}"));
    if let Some(ticks) = victim.start_ticks {
        let start = process::ticks_of_ns(json::number(said, "/start_boot_ns")?);
        expect(start == ticks, format!("victim started at tick {start}, /proc said {ticks}"));
    }

    // where
    let path = json::text(incident, "/cgroup/path")?;
    expect(path == run.cage_path, format!("cgroup {path}, not {}", run.cage_path));
    let limit = json::number(incident, "/cgroup/limit_bytes")?;
    expect(limit == run.limit, format!("limit {limit}, not {}", run.limit));
    let scope = json::text(incident, "/oom/scope")?;
    expect(scope == "cgroup", format!("scope {scope}"));

    // when
    let at = json::number(incident, "/at/boot_ns")?;
    let anchor = printk::nearest(anchors, at)?;
    let line = anchor.boot_ns(victim.lines.killed_line_ns)?;
    // emulated CPUs disagree about the clock that stamps log lines
    let unsure = anchor.uncertainty_ns + if std::env::var_os("MEMTRACE_TESTS_VM").is_some() { 50 * ONE_MS } else { 0 };
    m.lag_ns.push(line.abs_diff(at));
    let near = at <= line + unsure && at + PREEMPTED_NS + unsure >= line;
    let between = match victim.lines.oom_line_ns {
        Some(oom_line) => anchor.boot_ns(oom_line)? <= at + unsure && at <= line + unsure,
        None => false,
    };
    expect(near || between, format!("killed at {at}, the log line says {line} (±{unsure})"));

    // the peak
    if let Some(peak) = run.peak {
        let recorded = json::number(incident, "/cgroup/peak_bytes")?;
        m.off_peak = m.off_peak.max(recorded.abs_diff(peak));
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        let batch = u64::try_from(64 * rustix::param::page_size() * cpus)?;
        expect(recorded.abs_diff(peak) <= batch, format!("peak {recorded}, the kernel says {peak}"));
    }
    problems.extend(check_curve(incident, at, run.limit, m)?);
    Ok(problems)
}

/// What is wrong with an incident's curve; the kill was `at`.
fn check_curve(incident: &Value, at: u64, limit: u64, m: &mut Measured) -> anyhow::Result<Vec<String>> {
    let mut problems = Vec::new();
    let mut expect = |holds: bool, problem: String| {
        if !holds {
            problems.push(problem);
        }
    };
    let columns = json::at(incident, "/timeline/columns")?.as_object().context("timeline columns")?;
    let lengths: Vec<(&str, usize)> =
        columns.iter().map(|(name, c)| (name.as_str(), c.as_array().map_or(usize::MAX, Vec::len))).collect();
    expect(lengths.windows(2).all(|w| w[0].1 == w[1].1), format!("columns of unequal length: {lengths:?}"));
    let times: Vec<u64> = json::list(incident, "/timeline/columns/boot_ns")?.iter().filter_map(Value::as_u64).collect();
    expect(times.windows(2).all(|w| w[0] <= w[1]), "times of the curve do not ascend".to_owned());
    let usage = json::list(incident, "/timeline/columns/usage_bytes")?;
    let last = times.iter().zip(usage).filter(|(time, _)| **time <= at).filter_map(|(_, u)| u.as_u64()).next_back();
    match last {
        Some(last) => {
            let compared = incident.pointer("/cgroup/usage_bytes").and_then(Value::as_u64).unwrap_or(limit);
            m.off_limit = m.off_limit.max(last.abs_diff(limit));
            let ends_there = last.abs_diff(limit) <= QUANTUM || last.abs_diff(compared) <= QUANTUM;
            expect(ends_there, format!("curve ends at {last}, limit {}, kernel compared {compared}", limit));
        }
        None => expect(false, "the curve has no usage before the kill".to_owned()),
    }
    Ok(problems)
}

fn print_table(measured: &mut [Measured], anchors: &[PrintkAnchor], burst_us: u64) -> anyhow::Result<()> {
    let (drift, unsure) = printk::drift(anchors)?;
    let offset = anchors.first().context("no anchor")?.offset_ns;
    say(format_args!("200 MB without a limit: {burst_us} us at best"));
    say(format_args!(
        "printk to boot clock: {offset} ns, moved {drift} ns over {} anchors, each ±{unsure} ns",
        anchors.len()
    ));
    say(format_args!("kind        runs  kills  incidents  kill-to-line median/max us  curve off limit  peak off"));
    for (kind, m) in KINDS.iter().zip(measured) {
        m.lag_ns.sort_unstable();
        let median = m.lag_ns.get(m.lag_ns.len() / 2).copied().unwrap_or_default();
        let max = m.lag_ns.last().copied().unwrap_or_default();
        say(format_args!(
            "{:<10} {:>5} {:>6} {:>10} {:>15.1} / {:>9.1} {:>16} {:>9}",
            kind.name,
            m.runs,
            m.kills,
            m.incidents,
            median as f64 / 1000.0,
            max as f64 / 1000.0,
            m.off_limit,
            m.off_peak
        ));
    }
    Ok(())
}
