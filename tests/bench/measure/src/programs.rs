//! Benchmark `programs`: cost of a call of each eBPF program compared with an empty one on the same
//! hook, and what work pays for it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use crate::chapter::{Cell, Chapter, ChapterTable, Figure, Goal};
use anyhow::Context;
use memtrace_tests::agent::{Agent, AgentOptions};
use memtrace_tests::process::boot_ns;

use crate::bpf::{self, Empty};
use crate::fdinfo::{self, Runs};
use crate::loops;
use crate::rounds::{Shuffle, median};

/// Loops: (name, `workload loop` kind, main tracepoints they go through).
const WORKS: [(&str, &str, &[&str]); 7] = [
    ("first touch of a page, 16 MiB at a time", "fresh", &["rss_stat", "page_fault_user"]),
    ("first touch of a page, 64 KiB at a time", "small", &["rss_stat", "page_fault_user"]),
    ("mmap and munmap of 64 KiB", "map", &["sys_exit"]),
    ("getpid", "getpid", &["sys_exit"]),
    ("read of one byte", "read", &["sys_exit"]),
    ("fork, exit, wait", "fork", &[]),
    ("start of /bin/true", "exec", &[]),
];
/// Loops below the RSS threshold emit nothing but stacks and mappings, and with these arguments not
/// even those.
const NO_STACKS: [&str; 4] = ["--stack-budget", "0", "--without", "map"];
/// Calls for at most one record: the definition of "does not emit" in the goal. The start of a loop
/// emits some.
const CALLS_PER_EMISSION: f64 = 500.0;
/// A program that runs less often a unit of work than this is left out of that work's row.
const RARE: f64 = 0.05;
const RSS: &str = "rss_stat";

/// Duration and number of rounds.
struct Extent {
    rounds: usize,
    ms: u64,
}

/// Runs the benchmark.
pub(crate) fn run(quick: bool) -> anyhow::Result<Chapter> {
    let extent = if quick { Extent { rounds: 2, ms: 60 } } else { Extent { rounds: 8, ms: 200 } };
    let dir = tempfile::tempdir().context("failed to make a directory for the agent")?;
    let inside = inside(dir.path(), &extent)?;
    let outside = outside(dir.path(), &extent, &inside.tracepoints)?;
    let mut chapter = Chapter {
        title: "Nanoseconds a call of each eBPF program".to_owned(),
        text: vec![
            "The agent and, on each of its tracepoints, an empty program (`r0 = 0; exit`) run at the same time, \
             clocked by the kernel itself (BPF_ENABLE_STATS) while a loop does one thing. Of each program the calls \
             and the nanoseconds that came on during the loop are taken. The kernel's clock is in both figures, \
             which is why an empty program costs anything at all: the ratio is smaller than that of the programs \
             alone, the difference is not."
                .to_owned(),
            "Seen from outside, with that clock off: the same loops with nothing attached, with empty programs \
             (which is what the tracepoints themselves cost, once somebody listens), with the agent and only the \
             hooks it cannot do without, and with the whole agent, in a new order each round. What is told is the \
             CPU time of the loop and its children, which is what the work itself pays; the agent's own CPU is not \
             in it. What is added is held against the loop with nothing of the same round. Programs on functions \
             (fentry, kprobe) have no empty twin here."
                .to_owned(),
        ],
        ..Chapter::default()
    };
    chapter.goals.push(inside.goal());
    chapter.tables = vec![inside.emitting(), inside.table(), outside.table()];
    Ok(chapter)
}

/// Rounds of one program in one work.
#[derive(Default)]
struct Rounds {
    calls_per_unit: Vec<f64>,
    ours_ns: Vec<f64>,
    empty_ns: Vec<f64>,
    ratio: Vec<f64>,
    readings_per_call: Vec<f64>,
    stacks_per_call: Vec<f64>,
}

/// Run statistics from the kernel.
struct Inside {
    tracepoints: BTreeSet<String>,
    /// By work and hook, with the agent at defaults.
    default: BTreeMap<(usize, String), Rounds>,
    /// The same without stacks.
    no_stacks: BTreeMap<(usize, String), Rounds>,
}

fn inside(dir: &Path, extent: &Extent) -> anyhow::Result<Inside> {
    let mut found = Inside { tracepoints: BTreeSet::new(), default: BTreeMap::new(), no_stacks: BTreeMap::new() };
    let _clock = bpf::clock_programs()?;
    for _ in 0..extent.rounds {
        for plain in [true, false] {
            let options = AgentOptions::below(dir).with(if plain { &[] } else { &NO_STACKS });
            let mut agent = options.start()?;
            let tracepoints = fdinfo::of_process(agent.pid())?.tracepoints;
            let empty = empties(&tracepoints)?;
            found.tracepoints.extend(tracepoints);
            let into = if plain { &mut found.default } else { &mut found.no_stacks };
            for (work, (_, what, _)) in WORKS.iter().enumerate() {
                if plain || ["fresh", "small"].contains(what) {
                    clock(&agent, &empty, work, what, extent.ms, into)?;
                }
            }
            drop(empty);
            agent.stop()?;
        }
    }
    Ok(found)
}

fn empties(tracepoints: &BTreeSet<String>) -> anyhow::Result<BTreeMap<String, Empty>> {
    tracepoints.iter().map(|name| Ok((name.clone(), Empty::on(name)?))).collect()
}

/// One loop, and what every program did in it.
fn clock(
    agent: &Agent,
    empty: &BTreeMap<String, Empty>,
    work: usize,
    what: &str,
    ms: u64,
    into: &mut BTreeMap<(usize, String), Rounds>,
) -> anyhow::Result<()> {
    let of_empty = || -> anyhow::Result<BTreeMap<&String, Runs>> {
        empty.iter().map(|(name, empty)| Ok((name, fdinfo::own_program(empty.descriptor())?))).collect()
    };
    let sent = |ring: &str| -> anyhow::Result<f64> {
        Ok(agent.metric(&format!("memtrace_records_total{{ring=\"{ring}\"}}"))?.unwrap_or(0.0))
    };
    let (readings, stacks) = (sent("samples")?, sent("stacks")?);
    let (ours, theirs) = (fdinfo::of_process(agent.pid())?.runs, of_empty()?);
    let looped = loops::run(&[what], ms)?;
    let (ours_after, theirs_after) = (fdinfo::of_process(agent.pid())?.runs, of_empty()?);
    let (readings, stacks) = (sent("samples")? - readings, sent("stacks")? - stacks);
    for (hook, after) in ours_after {
        let runs = after.since(ours.get(&hook).copied().unwrap_or_default());
        let Some(ns) = runs.ns_per_call() else { continue };
        let twin = theirs_after.get(&hook).zip(theirs.get(&hook)).map(|(after, before)| after.since(*before));
        let rounds = into.entry((work, hook)).or_default();
        rounds.calls_per_unit.push(runs.count as f64 / looped.units.max(1) as f64);
        rounds.ours_ns.push(ns);
        rounds.readings_per_call.push(readings / runs.count as f64);
        rounds.stacks_per_call.push(stacks / runs.count as f64);
        if let Some(empty_ns) = twin.and_then(Runs::ns_per_call) {
            rounds.empty_ns.push(empty_ns);
            rounds.ratio.push(ns / empty_ns);
        }
    }
    Ok(())
}

impl Inside {
    /// The RSS program, when it emits and when it does not.
    fn emitting(&self) -> ChapterTable {
        let mut rows = Vec::new();
        for (settings, found) in [("defaults", &self.default), ("--stack-budget 0 --without map", &self.no_stacks)] {
            for (work, (name, what, _)) in WORKS.iter().enumerate() {
                let Some(rounds) = found.get(&(work, RSS.to_owned())) else { continue };
                if !["fresh", "small"].contains(what) {
                    continue;
                }
                rows.push(vec![
                    settings.into(),
                    (*name).into(),
                    Figure::of(&rounds.ours_ns, "ns").into(),
                    twin(&rounds.empty_ns, "ns"),
                    twin(&rounds.ratio, "x"),
                    per_thousand(&rounds.readings_per_call),
                    per_thousand(&rounds.stacks_per_call),
                ]);
            }
        }
        let columns =
            ["agent", "work", "a call", "of an empty one", "ratio", "records in 1,000 calls", "stacks in 1,000 calls"];
        ChapterTable {
            title: format!("The program on {RSS}, whether it has something to emit or not"),
            columns: columns.map(str::to_owned).into(),
            rows,
        }
    }

    fn table(&self) -> ChapterTable {
        let mut rows = Vec::new();
        for (work, (name, ..)) in WORKS.iter().enumerate() {
            for ((_, hook), rounds) in self.default.iter().filter(|((of, _), _)| *of == work) {
                if median(&rounds.calls_per_unit).is_none_or(|calls| calls < RARE) {
                    continue;
                }
                rows.push(vec![
                    (*name).into(),
                    hook.as_str().into(),
                    Figure::of(&rounds.calls_per_unit, "").into(),
                    Figure::of(&rounds.ours_ns, "ns").into(),
                    twin(&rounds.empty_ns, "ns"),
                    twin(&rounds.ratio, "x"),
                ]);
            }
        }
        let columns = ["work", "tracepoint", "calls a unit of work", "a call", "of an empty one", "ratio"];
        let title = format!("Every program that runs at least {RARE} times a unit of work, agent at its defaults");
        ChapterTable { title, columns: columns.map(str::to_owned).into(), rows }
    }

    fn goal(&self) -> Goal {
        let quiet = WORKS.iter().position(|(_, what, _)| *what == "small").unwrap_or(0);
        let rounds = self.no_stacks.get(&(quiet, RSS.to_owned()));
        let emits = rounds.and_then(|r| Some(median(&r.readings_per_call)? + median(&r.stacks_per_call)?));
        let ratio = rounds.and_then(|rounds| Figure::of(&rounds.ratio, "x"));
        let what = "the program on rss_stat costs at most twice the empty program when it does not emit".to_owned();
        let (Some(ratio), Some(emits)) = (ratio, emits) else {
            return Goal { what, found: "not measured".to_owned(), met: None };
        };
        let (Figure { median, least, most, .. }, emitted) = (ratio, emits * 1000.0);
        let found = format!("{median:.2} times ({least:.2} to {most:.2}), {emitted:.1} records in 1,000 calls");
        // other processes may have made it emit in that time, so a miss proves nothing then
        let quiet = emits * CALLS_PER_EMISSION <= 1.0;
        Goal { what, found, met: (quiet || median <= 2.0).then_some(median <= 2.0) }
    }
}

fn twin(rounds: &[f64], unit: &'static str) -> Cell {
    Figure::of(rounds, unit).map_or_else(|| Cell::Unknown("not on a tracepoint".to_owned()), Cell::Figure)
}

fn per_thousand(per_call: &[f64]) -> Cell {
    Figure::of(&per_call.iter().map(|share| share * 1000.0).collect::<Vec<_>>(), "").into()
}

/// Programs attached while a loop runs.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Load {
    Nothing,
    /// An empty program on the loop's main tracepoint.
    EmptyOn(String),
    /// Empty programs on every tracepoint that the agent uses.
    EmptyOnAll,
    /// The agent without its optional hooks.
    Required,
    Agent,
}

impl Load {
    fn name(&self) -> String {
        match self {
            Self::Nothing => "nothing".to_owned(),
            Self::EmptyOn(tracepoint) => format!("an empty program on {tracepoint}"),
            Self::EmptyOnAll => "an empty program on each tracepoint".to_owned(),
            Self::Required => "memtrace, required hooks only".to_owned(),
            Self::Agent => "memtrace".to_owned(),
        }
    }

    fn concerns(&self, tracepoints: &[&str]) -> bool {
        !matches!(self, Self::EmptyOn(on) if !tracepoints.contains(&on.as_str()))
    }
}

/// CPU nanoseconds a unit, by work and load, one for each round.
struct Outside(BTreeMap<(usize, Load), Vec<f64>>);

fn outside(dir: &Path, extent: &Extent, tracepoints: &BTreeSet<String>) -> anyhow::Result<Outside> {
    let optional = optional_hooks()?;
    let known: BTreeSet<&str> = WORKS.iter().flat_map(|(_, _, through)| through.iter().copied()).collect();
    let mut loads = vec![Load::Nothing, Load::EmptyOnAll, Load::Required, Load::Agent];
    loads.extend(tracepoints.iter().filter(|t| known.contains(t.as_str())).cloned().map(Load::EmptyOn));
    let mut found = Outside(BTreeMap::new());
    let mut order = Shuffle::new(boot_ns());
    for _ in 0..extent.rounds {
        order.shuffle(&mut loads);
        for load in &loads {
            let on: BTreeSet<String> = match load {
                Load::EmptyOn(tracepoint) => BTreeSet::from([tracepoint.clone()]),
                Load::EmptyOnAll => tracepoints.clone(),
                Load::Nothing | Load::Required | Load::Agent => BTreeSet::new(),
            };
            let empty = empties(&on)?;
            let agent = match load {
                Load::Agent => Some(AgentOptions::below(dir).start()?),
                Load::Required => Some(AgentOptions::below(dir).with(&["--without", &optional]).start()?),
                _ => None,
            };
            for (work, (_, what, through)) in WORKS.iter().enumerate() {
                if load.concerns(through) {
                    let ns = loops::run(&[what], extent.ms)?.cpu_ns_per_unit();
                    found.0.entry((work, load.clone())).or_default().push(ns);
                }
            }
            drop(empty);
            agent.map(|mut agent| agent.stop()).transpose()?;
        }
    }
    Ok(found)
}

/// Optional hooks, as the argument of `--without`.
fn optional_hooks() -> anyhow::Result<String> {
    let mut doctor = memtrace_tests::programs::memtrace_command()?;
    doctor.args(["doctor", "--json"]);
    let told = memtrace_tests::agent::json_of(doctor)?;
    let hooks = memtrace_tests::json::list(&told, "/hooks")?;
    let optional = hooks.iter().filter(|hook| hook.get("need").is_some_and(|need| need == "optional"));
    Ok(optional.filter_map(|hook| hook.get("hook")?.as_str()).collect::<Vec<_>>().join(","))
}

impl Outside {
    fn table(&self) -> ChapterTable {
        let mut rows = Vec::new();
        for (work, (name, ..)) in WORKS.iter().enumerate() {
            let Some(nothing) = self.0.get(&(work, Load::Nothing)) else { continue };
            rows.push(vec![
                (*name).into(),
                Load::Nothing.name().into(),
                Figure::of(nothing, "ns").into(),
                "".into(),
                "".into(),
            ]);
            for ((_, load), ns) in self.0.iter().filter(|((of, load), _)| *of == work && *load != Load::Nothing) {
                let added: Vec<f64> = ns.iter().zip(nothing).map(|(with, without)| with - without).collect();
                let ratio: Vec<f64> = ns.iter().zip(nothing).map(|(with, without)| with / without).collect();
                rows.push(vec![
                    "".into(),
                    load.name().into(),
                    Figure::of(ns, "ns").into(),
                    Figure::of(&added, "ns").into(),
                    Figure::of(&ratio, "x").into(),
                ]);
            }
        }
        let columns = ["work", "attached", "a unit of work", "added", "ratio"];
        let title = "The same from outside: what a unit of work takes, and what is added to it".to_owned();
        ChapterTable { title, columns: columns.map(str::to_owned).into(), rows }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_program_is_tried_with_the_work_that_meets_it() {
        let on = Load::EmptyOn("sys_exit".to_owned());
        assert!(on.concerns(&["sys_exit"]));
        assert!(!on.concerns(&["rss_stat"]));
        assert!(Load::Agent.concerns(&[]));
    }
}
