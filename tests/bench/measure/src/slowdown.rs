//! Benchmark `slowdown`: throughput lost to tracing, with memtrace and other tracers, each between
//! two untraced runs.

mod contenders;
mod recorders;
mod works;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::chapter::{Cell, Chapter, ChapterTable, Figure, Goal};
use anyhow::Context;
use memtrace_tests::process::boot_ns;

use self::contenders::{Contender, Usage};
use self::works::{PreparedWork, WORKS, WorkResult};
use crate::rounds::{Shuffle, share};

/// Goal: throughput that fault-heavy work keeps, percent of the untraced.
const FAULT_HEAVY: f64 = 97.0;
/// Goal: throughput that ordinary work keeps, percent.
const ORDINARY: f64 = 99.5;
/// Time limit: a slow or busy machine does fewer rounds.
const BUDGET: Duration = Duration::from_secs(270);

/// Runs the benchmark.
pub(crate) fn run(quick: bool) -> anyhow::Result<Chapter> {
    let (most, budget) = if quick { (1, Duration::ZERO) } else { (5, BUDGET) };
    let begin = Instant::now();
    let dir = tempfile::tempdir().context("failed to make a directory for what tracers print")?;
    let bench = PreparedWork::prepare(quick)?;
    let mut all = contenders::all(quick);
    for contender in &mut all {
        contender.probe(dir.path())?;
    }
    let mut found = Found::default();
    let mut order = Shuffle::new(boot_ns());
    let mut rounds = 0u32;
    while rounds < most {
        // no round that would end after the limit, judging by the ones before
        if rounds > 0 && begin.elapsed() * (rounds + 1) / rounds > budget {
            break;
        }
        rounds += 1;
        let mut turns: Vec<usize> = all.iter().enumerate().flat_map(|(index, c)| vec![index; c.turns(quick)]).collect();
        order.shuffle(&mut turns);
        let mut before = found.untraced(&bench)?;
        for index in turns {
            let Some(contender) = all.get_mut(index) else { continue };
            let mut running = contender.start(dir.path())?;
            let traced = bench.run_all()?;
            let used = running.usage();
            let ended = running.stop();
            let after = found.untraced(&bench)?;
            match ended {
                Ok(()) => found.add(index, &traced, &before, &after, used?),
                Err(error) => contender.refuse(format!("{error:#}")),
            }
            before = after;
        }
    }
    let recorders = recorders::measure(dir.path(), quick)?;
    Ok(Chapter {
        title: "Work while it is traced".to_owned(),
        text: vec![
            format!(
                "{rounds} rounds, each with every tracer once, memtrace and a tracer that is none twice, in a new \
                 order. A tracer is started and given time to attach, all work is done under it, it is stopped, and \
                 all work is done without one. A figure is the throughput under the tracer as a share of the mean of \
                 the untraced runs before and after it; for the server's latencies likewise, and there more is \
                 worse. \"Nothing\" is that share where nothing was started: what differs from 100 % there is noise, \
                 and so is as much elsewhere."
            ),
            format!("The work: {}.", works::described()),
            "Tracers run on all CPUs and processes, and print to a file or nowhere. Debian's libbpf-tools have no \
             memleak, so it is bcc's, from bpfcc-tools. Two CPUs: a tracer that reads much takes them from the work, \
             which is part of what it costs."
                .to_owned(),
        ],
        tables: vec![found.throughput(&all), found.usage(&all), found.plain(), recorders],
        goals: found.goals(&all),
    })
}

/// Results of all rounds.
#[derive(Default)]
struct Found {
    /// By contender and column.
    shares: BTreeMap<(usize, usize), Vec<f64>>,
    /// Untraced results by column.
    untraced: Vec<Vec<WorkResult>>,
    used: BTreeMap<usize, Vec<Usage>>,
}

impl Found {
    fn untraced(&mut self, bench: &PreparedWork) -> anyhow::Result<Vec<WorkResult>> {
        let scores = bench.run_all()?;
        self.untraced.push(scores.clone());
        Ok(scores)
    }

    fn add(
        &mut self,
        contender: usize,
        traced: &[WorkResult],
        before: &[WorkResult],
        after: &[WorkResult],
        used: Option<Usage>,
    ) {
        for (column, ((traced, before), after)) in traced.iter().zip(before).zip(after).enumerate() {
            if let Some(share) = share(traced.value, before.value, after.value) {
                self.shares.entry((contender, column)).or_default().push(share * 100.0);
            }
        }
        self.used.entry(contender).or_default().extend(used);
    }

    fn throughput(&self, all: &[Contender]) -> ChapterTable {
        let columns = works::columns();
        let rows = all.iter().enumerate().map(|(index, contender)| {
            let cells = (0..columns.len()).map(|column| match contender.refusal() {
                Some(why) if column == 0 => Cell::Unknown(why.to_owned()),
                Some(_) => "–".into(),
                None => self.figure(index, column).into(),
            });
            [Cell::from(contender.name())].into_iter().chain(cells).collect()
        });
        ChapterTable {
            title: "Throughput under each tracer, and latency, in percent of untraced".to_owned(),
            rows: rows.collect(),
            columns: ["tracer".to_owned()].into_iter().chain(columns.iter().map(|c| (*c).to_owned())).collect(),
        }
    }

    fn figure(&self, contender: usize, column: usize) -> Option<Figure> {
        Figure::of(self.shares.get(&(contender, column))?, "%")
    }

    fn usage(&self, all: &[Contender]) -> ChapterTable {
        let rows = all.iter().enumerate().filter_map(|(index, contender)| {
            let used = self.used.get(&index).filter(|used| !used.is_empty())?;
            let figure =
                |of: fn(&Usage) -> f64, unit| Figure::of(&used.iter().map(of).collect::<Vec<_>>(), unit).into();
            let cpu = figure(|used| used.cpu_s, "s");
            let share = figure(|used| used.cpu_s / used.running_s * 100.0, "%");
            Some(vec![contender.name().into(), cpu, share, figure(|used| used.peak_bytes as f64, "bytes")])
        });
        let columns = ["tracer", "CPU from its start to the end of the work", "of one CPU", "peak resident memory"];
        ChapterTable {
            title: "What the tracers take themselves".to_owned(),
            rows: rows.collect(),
            columns: columns.map(str::to_owned).into(),
        }
    }

    fn plain(&self) -> ChapterTable {
        let columns = works::columns();
        let rows = columns.iter().enumerate().map(|(column, name)| {
            let scores: Vec<WorkResult> = self.untraced.iter().filter_map(|round| round.get(column)).copied().collect();
            let values: Vec<f64> = scores.iter().map(|score| score.value).collect();
            let unit = scores.first().map_or("", |score| score.unit);
            vec![(*name).into(), Figure::of(&values, unit).into()]
        });
        ChapterTable {
            title: "Untraced, for the scale and the noise".to_owned(),
            rows: rows.collect(),
            columns: vec!["work".to_owned(), "untraced".to_owned()],
        }
    }

    fn goals(&self, all: &[Contender]) -> Vec<Goal> {
        let Some(ours) = all.iter().position(Contender::is_memtrace) else { return Vec::new() };
        let kept = |heavy: bool, least: f64| {
            let columns = works::columns();
            let wanted: Vec<(usize, &str)> = WORKS.iter().flat_map(|work| work.columns(heavy)).collect();
            let found: Vec<(&str, Option<Figure>)> = wanted
                .iter()
                .filter_map(|(column, _)| Some((*columns.get(*column)?, self.figure(ours, *column))))
                .collect();
            let told: Vec<String> = found
                .iter()
                .map(|(name, figure)| {
                    figure.map_or(format!("{name}: not measured"), |f| format!("{name}: {:.1} %", f.median))
                })
                .collect();
            let medians: Option<Vec<f64>> = found.iter().map(|(_, figure)| figure.map(|f| f.median)).collect();
            (told.join(", "), medians.map(|medians| medians.iter().all(|median| *median >= least)))
        };
        [(true, FAULT_HEAVY, "fault-heavy"), (false, ORDINARY, "ordinary")]
            .into_iter()
            .map(|(heavy, least, kind)| {
                let (found, met) = kept(heavy, least);
                Goal { what: format!("{kind} work keeps at least {least} % of its untraced throughput"), found, met }
            })
            .collect()
    }
}
