//! Benchmark `kills`: storms of OOM kills, and who reports each of them exactly once and correctly.

use std::time::{Duration, Instant};

use crate::chapter::{Cell, Chapter, ChapterTable, Goal};
use anyhow::Context;
use memtrace_tests::actor::Actor;
use memtrace_tests::agent::{Agent, AgentOptions};
use memtrace_tests::cage::Cage;
use memtrace_tests::claims::MIB;
use memtrace_tests::printk::KernelLogTail;
use memtrace_tests::{json, process};
use serde_json::Value;

use self::oomkill::{PEERS, Peers};
use self::score::{Kill, KillScore, ReportedKill, of_kernel_log, of_oomkill, score};
use crate::BenchPlan;

mod oomkill;
mod score;

/// Kills at the same time, storm by storm; repeated until there are enough.
const STORMS: [usize; 7] = [1, 2, 5, 10, 20, 50, 100];
const LIMIT: u64 = 8 * MIB;
/// How long incidents may take to be saved, and how long a gap means that no more will come.
const WAIT_LIMIT: Duration = Duration::from_secs(120);
const STILL: Duration = Duration::from_secs(20);
const LOOK: Duration = Duration::from_millis(500);

/// What happened.
struct Storms {
    truth: Vec<Kill>,
    /// Kills by the `oom_kill` counters of the cgroups.
    counted: u64,
    count: usize,
    took: Duration,
}

/// Runs the benchmark.
pub(crate) fn run(plan: &BenchPlan) -> anyhow::Result<Chapter> {
    let wanted = if plan.quick { 100 } else { 1000 };
    let dir = tempfile::tempdir().context("failed to make a directory for the agent")?;
    let mut agent = AgentOptions::below(dir.path()).start()?;
    let peers = Peers::start();
    let mut log = KernelLogTail::open_at_end()?;
    let from = log.next_seq()?;
    let storms = all_storms(wanted, &mut log)?;
    let followed = of_kernel_log(log.drain()?);
    let mut afterwards = KernelLogTail::open_at_start()?;
    let kept: Vec<_> = afterwards.drain()?.iter().filter(|line| line.seq >= from).cloned().collect();
    let kept = of_kernel_log(&kept);
    let printed = peers.finish();

    wait_for_incidents(&agent, storms.truth.len())?;
    let incidents = of_incidents(&agent.options().incidents()?)?;
    let ledger = of_ledger(&agent.options().state_dir)?;
    agent.stop()?;

    let of = |reports: &[ReportedKill]| score(&storms.truth, reports);
    let mut rows = vec![
        ("memtrace, incidents".to_owned(), Ok(of(&incidents))),
        ("memtrace, kill ledger".to_owned(), Ok(of(&ledger))),
        ("kernel log, read as it goes".to_owned(), Ok(of(&followed))),
        ("kernel log, read afterwards".to_owned(), Ok(of(&kept))),
    ];
    for ((program, package), printed) in PEERS.iter().zip(printed) {
        rows.push((format!("{program} ({package})"), printed.map(|printed| of(&of_oomkill(&printed)))));
    }
    Ok(chapter(&storms, log.overruns(), &rows))
}

fn all_storms(wanted: usize, log: &mut KernelLogTail) -> anyhow::Result<Storms> {
    let begin = Instant::now();
    let mut storms = Storms { truth: Vec::new(), counted: 0, count: 0, took: Duration::ZERO };
    for size in STORMS.iter().cycle() {
        let left = wanted - storms.truth.len();
        if left == 0 {
            break;
        }
        storms.break_out((*size).min(left))?;
        log.drain()?;
    }
    storms.took = begin.elapsed();
    Ok(storms)
}

impl Storms {
    /// Kills at the same time, each in a cgroup of its own.
    fn break_out(&mut self, size: usize) -> anyhow::Result<()> {
        let cages = (0..size).map(|_| Cage::new("kill", LIMIT)).collect::<Result<Vec<_>, _>>()?;
        let arguments = ["burst", "--mib", "32", "--threads", "1", "--gate"];
        let mut actors =
            cages.iter().map(|cage| Actor::start(Some(cage), &arguments)).collect::<Result<Vec<_>, _>>()?;
        let mut starts = Vec::new();
        for actor in &mut actors {
            starts.push(json::number(actor.until("gated")?, "/start_ticks")?);
        }
        actors.iter_mut().try_for_each(Actor::tell)?;
        for ((actor, cage), start_ticks) in actors.into_iter().zip(&cages).zip(starts) {
            let ended = actor.finish()?;
            ended.was_killed()?;
            self.truth.push(Kill { pid: ended.pid, start_ticks, path: cage.path().to_owned() });
            self.counted += cage.oom_kills()?;
        }
        self.count += 1;
        cages.into_iter().try_for_each(Cage::remove)
    }
}

/// Waits until that many are saved or none has come for a while, and a moment longer for a surplus
/// one.
fn wait_for_incidents(agent: &Agent, wanted: usize) -> anyhow::Result<()> {
    let begin = Instant::now();
    let (mut seen, mut since) = (None, Instant::now());
    while begin.elapsed() < WAIT_LIMIT && since.elapsed() < STILL {
        let saved = agent.metric("memtrace_incidents_saved_total")?;
        let enough = saved.is_some_and(|saved| saved >= wanted as f64);
        if saved != seen {
            (seen, since) = (saved, Instant::now());
        } else if enough && since.elapsed() > 4 * LOOK {
            break;
        }
        std::thread::sleep(LOOK);
    }
    Ok(())
}

/// The victims of all incidents that are kills.
fn of_incidents(listed: &[Value]) -> anyhow::Result<Vec<ReportedKill>> {
    let mut reports = Vec::new();
    for incident in listed.iter().filter(|incident| incident.get("kind").is_some_and(|kind| kind == "oom_kill")) {
        for victim in json::list(incident, "/oom/victims")? {
            if victim.get("killed") == Some(&Value::Bool(true)) {
                reports.push(report(victim)?);
            }
        }
    }
    Ok(reports)
}

/// The lines of `kills.jsonl`.
fn of_ledger(state_dir: &std::path::Path) -> anyhow::Result<Vec<ReportedKill>> {
    let file = state_dir.join("kills.jsonl");
    let text = std::fs::read_to_string(&file).with_context(|| format!("failed to read {}", file.display()))?;
    let lines = text.lines().map(|line| serde_json::from_str(line).context("a line of kills.jsonl is not JSON"));
    let entries = lines.collect::<anyhow::Result<Vec<Value>>>()?;
    entries.iter().filter(|entry| entry.get("killed") == Some(&Value::Bool(true))).map(report).collect()
}

fn report(victim: &Value) -> anyhow::Result<ReportedKill> {
    Ok(ReportedKill {
        pid: u32::try_from(json::number(victim, "/pid")?).context("not a process id")?,
        start_ticks: Some(process::ticks_of_ns(json::number(victim, "/start_boot_ns")?)),
        path: victim.get("cgroup_path").and_then(Value::as_str).map(str::to_owned),
    })
}

type Row = (String, Result<KillScore, String>);

fn chapter(storms: &Storms, overruns: u64, rows: &[Row]) -> Chapter {
    let kills = storms.truth.len();
    let columns = ["who", "found once", "missed", "double", "wrong", "tells the start", "tells the cgroup"];
    let cells = |(name, found): &Row| {
        let mut cells = vec![Cell::from(name.clone())];
        match found {
            Ok(found) => {
                let of_kills = |count: usize| Cell::from(format!("{count} of {kills}"));
                cells.push(of_kills(found.found));
                cells.extend([found.missed, found.double, found.wrong].map(|count| Cell::from(count.to_string())));
                cells.extend([of_kills(found.with_start), of_kills(found.with_path)]);
            }
            Err(why) => {
                cells.push(Cell::Unknown(why.clone()));
                cells.resize(columns.len(), Cell::from(""));
            }
        }
        cells
    };
    let ours = rows.first().and_then(|(_, found)| found.as_ref().ok()).copied().unwrap_or_default();
    let perfect = (ours.found, ours.missed, ours.double, ours.wrong) == (kills, 0, 0, 0);
    Chapter {
        title: "Kills: found, missed, double, of somebody else".to_owned(),
        text: vec![
            format!(
                "{} storms of 1 to 100 OOM kills at once, {kills} kills in {:.0} s, each in a cgroup of its own that is \
                 removed after its storm. Every process waits at a gate until its whole storm is ready, then grows past \
                 the limit of {} MiB. Truth: each parent's wait status says SIGKILL, and the cgroups' own oom_kill \
                 counters add up to {}. A report counts as found when process id, start (to the clock tick) and cgroup \
                 path are right as far as it tells them; wrong is what is about one of these cgroups or processes and fits \
                 no kill.",
                storms.count,
                storms.took.as_secs_f64(),
                LIMIT / MIB,
                storms.counted
            ),
            format!(
                "The kernel log says of each kill the process id and name; the line with the cgroup is rate-limited by the \
                 kernel (ten in five seconds), and no line tells one process from a later one of the same id. Read \
                 as it goes it was overwritten {overruns} times before it was read; read afterwards it is what is left of \
                 it at the end. memtrace's agent runs at its defaults."
            ),
        ],
        tables: vec![ChapterTable {
            title: String::new(),
            columns: columns.map(str::to_owned).to_vec(),
            rows: rows.iter().map(cells).collect(),
        }],
        goals: vec![Goal {
            what: format!(
                "each of {kills} kills is in exactly one incident, none is missed, double or of somebody else"
            ),
            found: format!(
                "{} found once, {} missed, {} double, {} wrong",
                ours.found, ours.missed, ours.double, ours.wrong
            ),
            met: Some(perfect),
        }],
    }
}
