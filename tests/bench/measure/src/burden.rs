//! Benchmark `agent`: CPU that the agent takes, idle and by record rate; its memory by number of
//! cgroups and processes; and the records it loses.

mod losses;
mod memory;

use std::path::Path;
use std::time::{Duration, Instant};

use crate::chapter::{Cell, Chapter, ChapterTable, Figure, Goal};
use anyhow::Context;
use memtrace_tests::agent::{Agent, AgentOptions};

use crate::rounds::median;
use crate::{loops, usage};

/// Time after which everything sent has been read: a tick, and the second in which losses are read.
const SETTLE: Duration = Duration::from_millis(1200);
/// Goal: CPU of an idle agent, percent of one CPU.
const IDLE: f64 = 0.1;
/// Goal: CPU at ten thousand records a second, percent of one CPU.
const BUSY: f64 = 1.0;
const PER: f64 = 10_000.0;
const AT_GOAL: &str = "about 10,000 records a second of growing and shrinking";
/// Processes that make records at the same time.
const MAKERS: usize = 4;

/// Runs the benchmark.
pub(crate) fn run(quick: bool) -> anyhow::Result<Chapter> {
    let dir = tempfile::tempdir_in("/dev/shm").context("failed to make a directory for the agent")?;
    let mut chapter = Chapter {
        title: "What the agent takes itself".to_owned(),
        text: vec![
            "CPU is that of the agent's threads (/proc/PID/task/*/schedstat) over some seconds, records are those \
             its own metrics say the kernel side sent (memtrace_records_total, all rings). Records are made by \
             processes that map, touch and give back 1 MiB at a rate, and by processes that fork children as fast as \
             they can; the last column is CPU divided by records, times ten thousand."
                .to_owned(),
            "What the eBPF programs cost is not in here: whoever runs them pays for it (see the chapters on programs \
             and on work while it is traced)."
                .to_owned(),
            "Its journal is on tmpfs, as it is by default (/run/memtrace).".to_owned(),
            memory::ABOUT.to_owned(),
            losses::ABOUT.to_owned(),
        ],
        ..Chapter::default()
    };
    // if one of them fails, the others still count
    let parts = [
        ("CPU of the agent", cpu(dir.path(), quick)),
        ("Memory of the agent", memory::measure(dir.path(), quick)),
        ("Throughput of the rings", losses::throughput(dir.path(), quick)),
        ("The agent stopped amid a storm", losses::exactness(dir.path(), quick)),
    ];
    for (name, part) in parts {
        match part {
            Ok((table, goals)) => {
                chapter.tables.push(table);
                chapter.goals.extend(goals);
            }
            Err(error) => {
                let rows = vec![vec![unanswered(&error)]];
                chapter.tables.push(ChapterTable {
                    title: name.to_owned(),
                    columns: vec!["not measured".to_owned()],
                    rows,
                });
            }
        }
    }
    Ok(chapter)
}

/// Cell for a measurement that failed.
fn unanswered(error: &anyhow::Error) -> Cell {
    Cell::Unknown(format!("{error:#}").chars().take(160).collect())
}

/// CPU of the agent, idle and under load.
fn cpu(dir: &Path, quick: bool) -> anyhow::Result<(ChapterTable, Vec<Goal>)> {
    let idle = idle(dir, if quick { 4 } else { 20 })?;
    let (busy, at_rate) = busy(dir, quick)?;
    let what = format!("the agent takes less than {IDLE} % of a CPU when nothing happens");
    let found = format!("{:.3} %, at {:.0} records a second", idle.percent, idle.per_second);
    // on a machine that is not idle, only a good result for an idle agent counts
    let quiet = idle.per_second < 100.0;
    let idle_goal = Goal { what, found, met: (quiet || idle.percent < IDLE).then_some(idle.percent < IDLE) };
    let idle_row = vec![
        "nothing, but what else goes on here".into(),
        Figure::exactly(idle.per_second, "/s").into(),
        Figure::exactly(idle.percent, "%").into(),
        "".into(),
    ];
    let columns = ["what goes on", "records", "CPU of the agent, of one", "CPU at 10,000 records a second"];
    let rows = [vec![idle_row], busy].concat();
    let title = "CPU of the agent, at its defaults but where said".to_owned();
    Ok((ChapterTable { title, columns: columns.map(str::to_owned).into(), rows }, vec![idle_goal, at_rate]))
}

/// CPU and records in a stretch of time.
#[derive(Clone, Copy)]
struct Rate {
    percent: f64,
    per_second: f64,
}

impl Rate {
    /// Measures the agent during `work`.
    fn of(agent: &Agent, what: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<Self> {
        let (begin, cpu, before) = (Instant::now(), usage::cpu_ns(agent.pid())?, records(agent)?);
        what()?;
        let (cpu, seconds) = (usage::cpu_ns(agent.pid())?.saturating_sub(cpu), begin.elapsed().as_secs_f64());
        Ok(Self { percent: cpu as f64 / 1e9 / seconds * 100.0, per_second: (records(agent)? - before) / seconds })
    }

    fn at_ten_thousand(self) -> f64 {
        self.percent / self.per_second * PER
    }
}

fn records(agent: &Agent) -> anyhow::Result<f64> {
    agent.metric("memtrace_records_total")?.context("the agent counts no records")
}

fn idle(dir: &Path, seconds: u64) -> anyhow::Result<Rate> {
    let mut agent = AgentOptions::below(dir).start()?;
    std::thread::sleep(SETTLE * 2);
    let found = Rate::of(&agent, || {
        std::thread::sleep(Duration::from_secs(seconds));
        Ok(())
    })?;
    agent.stop()?;
    Ok(found)
}

type Rows = Vec<Vec<Cell>>;

/// Rows of the table, and the goal at ten thousand records a second.
fn busy(dir: &Path, quick: bool) -> anyhow::Result<(Rows, Goal)> {
    let (rounds, ms) = if quick { (1, 1000) } else { (3, 3000) };
    let settings: [(&str, &[&str]); 2] = [("", &[]), (", no stacks", &["--stack-budget", "0"])];
    let mut rows = Vec::new();
    let mut goal = (None, None);
    for (name, extra) in settings {
        let mut agent = AgentOptions::below(dir).with(extra).start()?;
        let each = records_a_swing(&agent)?;
        let rate = |target: f64| (target / each / MAKERS as f64).round().max(1.0).to_string();
        let (slow, fast) = (rate(PER / 10.0), rate(PER));
        let loads: [(&str, usize, &[&str]); 3] = [
            ("about 1,000 records a second of growing and shrinking", MAKERS, &["swing", "--per-s", &slow]),
            (AT_GOAL, MAKERS, &["swing", "--per-s", &fast]),
            ("two processes that fork as fast as they can", 2, &["fork"]),
        ];
        let mut answers = true;
        for (load, makers, words) in loads {
            let each_round = || Rate::of(&agent, || loops::run_many(makers, words, ms).map(drop));
            let found: anyhow::Result<Vec<Rate>> = (0..rounds).map(|_| each_round()).collect();
            answers &= found.is_ok();
            rows.push(row(&format!("{load}{name}"), &found));
            if let Ok(found) = &found
                && extra.is_empty()
                && load == AT_GOAL
            {
                let of = |what: fn(&Rate) -> f64| median(&found.iter().map(what).collect::<Vec<_>>());
                goal = (of(|rate| rate.percent), of(|rate| rate.per_second));
            }
        }
        // an agent that does not answer will not stop either: it is killed when dropped
        if answers {
            agent.stop()?;
        }
    }
    let what = format!("the agent takes less than {BUSY} % of a CPU at 10,000 records a second");
    let goal = match goal {
        (Some(percent), Some(per_second)) => Goal {
            what,
            found: format!("{percent:.2} % at {per_second:.0} records a second"),
            met: Some(percent / per_second * PER < BUSY),
        },
        _ => Goal { what, found: "not measured".to_owned(), met: None },
    };
    Ok((rows, goal))
}

/// Records that one swing makes on this machine.
fn records_a_swing(agent: &Agent) -> anyhow::Result<f64> {
    let before = records(agent)?;
    let looped = loops::run(&["swing"], 200)?;
    Ok(((records(agent)? - before) / looped.units.max(1) as f64).max(1.0))
}

fn row(what: &str, found: &anyhow::Result<Vec<Rate>>) -> Vec<Cell> {
    let found = match found {
        Ok(found) => found,
        Err(error) => return vec![what.into(), unanswered(error), "".into(), "".into()],
    };
    let figure = |of: fn(&Rate) -> f64, unit| Figure::of(&found.iter().map(of).collect::<Vec<_>>(), unit).into();
    vec![
        what.into(),
        figure(|rate| rate.per_second, "/s"),
        figure(|rate| rate.percent, "%"),
        figure(|rate| rate.at_ten_thousand(), "%"),
    ]
}
