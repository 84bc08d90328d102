//! Spike recall: spikes of known size and time beside a build, as memtrace records them and as pollers read them.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, ensure};
use memtrace_tests::chapter::{Cell, Chapter, Figure, Goal, Table};
use memtrace_tests::dice::Dice;
use memtrace_tests::json;
use serde_json::Value;

use self::matching::{Polled, Seen, Spike, find, polled};
use self::pollers::{PERIODS, Pollers};
use crate::Plan;
use crate::neighbour::Neighbour;
use crate::recorder::{Reading, Recorder, usage_curve};

mod matching;
mod pollers;

const SIZES_MIB: [u64; 5] = [1, 4, 16, 64, 300];
const HOLDS_MS: [u64; 5] = [1, 5, 20, 100, 500];
/// Quiet before the first spike of a recording and after the last.
const QUIET: Duration = Duration::from_millis(100);

/// The settings that are recorded with, in turn.
struct Setting {
    name: &'static str,
    quantum_bytes: u64,
    options: &'static [&'static str],
}

const SETTINGS: [Setting; 2] = [
    Setting { name: "memtrace record", quantum_bytes: 64 << 10, options: &[] },
    Setting {
        name: "at the agent's settings",
        quantum_bytes: 256 << 10,
        options: &["--quantum", "256K", "--sample", "512K", "--stack-budget", "1%"],
    },
];

/// One spike and what everybody says of it.
struct Judged {
    spike: Spike,
    /// Index of the setting it was recorded with.
    setting: usize,
    seen: Option<Seen>,
    /// In the order of [`PERIODS`].
    polled: Vec<Polled>,
}

/// Everything of one run.
#[derive(Default)]
struct Run {
    judged: Vec<Judged>,
    readings: u64,
    thinned: u64,
    losses: Vec<String>,
}

/// Runs the benchmark.
pub(crate) fn run(plan: &Plan) -> anyhow::Result<Chapter> {
    let mut dice = Dice::new(plan.seed);
    let rounds = if plan.quick { 2 } else { 8 };
    let neighbour = Neighbour::start()?;
    let mut run = Run::default();
    for round in 0..rounds {
        run.record(round % SETTINGS.len(), plan.quick, &mut dice)?;
    }
    let builds = neighbour.finish()?;
    Ok(chapter(&run, plan.seed, builds))
}

impl Run {
    /// One recording: every size for every time, once; in a quick run most of them.
    fn record(&mut self, index: usize, quick: bool, dice: &mut Dice) -> anyhow::Result<()> {
        let setting = SETTINGS.get(index).context("no such setting")?;
        let mut spikes: Vec<(u64, u64)> =
            SIZES_MIB.iter().flat_map(|mib| HOLDS_MS.map(|hold_ms| (*mib, hold_ms))).collect();
        dice.shuffle(&mut spikes);
        spikes.truncate(if quick { 20 } else { spikes.len() });
        let longest_pause_ms = if quick { 700 } else { 1550 };
        let words: Vec<String> = spikes
            .iter()
            .map(|(mib, hold_ms)| format!("{mib}:{hold_ms}:{}", dice.between(50, longest_pause_ms)))
            .collect();
        let workload = memtrace_tests::programs::path("workload")?;
        let mut command = vec![workload.to_str().context("a path that is not text")?, "spikes"];
        command.extend(words.iter().map(String::as_str));

        let dir = tempfile::tempdir().context("failed to make a directory for the recording")?;
        let mut recorder = Recorder::start(dir.path(), setting.options, &command)?;
        let file = PathBuf::from(json::text(recorder.command()?.until("ready")?, "/usage_file")?);
        let pollers = Pollers::start(&file, dice);
        std::thread::sleep(QUIET);
        recorder.command()?.tell()?;
        for _ in 0..spikes.len() {
            recorder.command()?.until("spike")?;
        }
        let polls = pollers.finish()?;
        std::thread::sleep(QUIET);
        let (ended, recording) = recorder.finish()?;
        ensure!(ended.status.success(), "the spikes ended with {}", ended.status);
        let curve = usage_curve(&recording)?;
        self.readings += curve.len() as u64;
        self.thinned += json::number(&recording, "/timeline/thinned")?;
        for lost in json::list(&recording, "/losses")? {
            self.losses.push(format!("{} {}", json::text(lost, "/what")?, json::at(lost, "/count")?));
        }
        for told in ended.all("spike") {
            self.judged.push(judge(spike(told)?, index, setting, &curve, &polls));
        }
        Ok(())
    }
}

fn judge(spike: Spike, index: usize, setting: &Setting, curve: &[Reading], polls: &[Vec<Reading>]) -> Judged {
    Judged {
        spike,
        setting: index,
        seen: find(&spike, curve, setting.quantum_bytes),
        polled: polls.iter().map(|readings| polled(&spike, readings)).collect(),
    }
}

fn spike(told: &Value) -> anyhow::Result<Spike> {
    let number = |name: &str| json::number(told, name);
    Ok(Spike {
        mib: number("/mib")?,
        hold_ms: number("/hold_ms")?,
        start_ns: number("/start_ns")?,
        top_ns: number("/top_ns")?,
        fall_ns: number("/fall_ns")?,
        end_ns: number("/end_ns")?,
        base_bytes: number("/base_bytes")?,
        top_bytes: number("/top_bytes")?,
    })
}

fn chapter(run: &Run, seed: u64, builds: u64) -> Chapter {
    let thinned = format!(
        "A recording keeps at most 8192 readings of its curve; of several in one interval the highest stays. Of {} \
         readings, {} were left out in favour of a higher one.",
        run.readings + run.thinned,
        run.thinned
    );
    let losses = match run.losses.as_slice() {
        [] => "The recordings state no loss.".to_owned(),
        losses => format!("Losses that the recordings state: {}.", losses.join(", ")),
    };
    Chapter {
        title: "Spikes: found, how high, from when to when".to_owned(),
        text: vec![
            format!(
                "A workload in a memory cgroup of its own takes 1 to 300 MiB over a base of 32 MiB, holds them for 1 to \
                 500 ms and gives them back, at random times (seed {seed}), and notes when and how high by the kernel's \
                 own usage. A build runs beside it in another cgroup ({builds} builds were finished). Recorded by \
                 `memtrace record`, in turn at its own defaults (a reading whenever 64 KiB moved) and at the agent's \
                 (256 KiB); a spike is found when the curve rises by half of its height within its time, ±5 ms. On the \
                 same run threads read the cgroup's usage file each 100 ms, 1 s, 5 s and 10 s, each beginning at a random \
                 moment; a spike is seen when a reading within its time has half of its height."
            ),
            format!(
                "The agent itself keeps such a curve of every cgroup for 30 s, in full for 2 s, and writes it down with a \
                 kill, a near miss, or a spike that reaches four fifths of a limit: here recordings show the curve. \
                 {thinned} {losses}"
            ),
            "A poller that reads the kernel's watermark (memory.peak, memory.max_usage_in_bytes) learns the highest of all \
             spikes since the cgroup was made, without its time; nothing of the others."
                .to_owned(),
        ],
        tables: vec![
            found("Found, by size", &run.judged, |spike| spike.mib, &SIZES_MIB, "MiB"),
            found("Found, by time at the top", &run.judged, |spike| spike.hold_ms, &HOLDS_MS, "ms"),
            errors(&run.judged),
            polled_errors(&run.judged),
        ],
        goals: goals(&run.judged),
    }
}

fn texts(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}

fn share<'a>(of: impl Iterator<Item = &'a Judged>, is: impl Fn(&Judged) -> bool) -> String {
    let (mut found, mut all) = (0u32, 0u32);
    for judged in of {
        all += 1;
        found += u32::from(is(judged));
    }
    format!("{found} of {all}")
}

/// How many were found, in rows of one key.
fn found(title: &str, all: &[Judged], key: fn(&Spike) -> u64, keys: &[u64], unit: &str) -> Table {
    let mut columns = vec!["spike".to_owned()];
    columns.extend(SETTINGS.iter().map(|setting| format!("{}, {} KiB", setting.name, setting.quantum_bytes >> 10)));
    columns.extend(PERIODS.iter().map(|(_, name)| (*name).to_owned()));
    let row = |name: String, of: Vec<&Judged>| {
        let mut cells = vec![Cell::from(name)];
        for index in 0..SETTINGS.len() {
            let recorded = of.iter().copied().filter(|judged| judged.setting == index);
            cells.push(share(recorded, |judged| judged.seen.is_some()).into());
        }
        for index in 0..PERIODS.len() {
            let seen = |judged: &Judged| judged.polled.get(index).is_some_and(|polled| polled.seen);
            cells.push(share(of.iter().copied(), seen).into());
        }
        cells
    };
    let mut rows: Vec<_> = keys
        .iter()
        .map(|value| row(format!("{value} {unit}"), all.iter().filter(|judged| key(&judged.spike) == *value).collect()))
        .collect();
    rows.push(row("all".to_owned(), all.iter().collect()));
    Table { title: title.to_owned(), columns, rows }
}

fn kib(bytes: u64) -> f64 {
    bytes as f64 / 1024.0
}

fn ms(ns: i64) -> f64 {
    ns as f64 / 1e6
}

/// Errors of what memtrace found, by size and setting.
fn errors(all: &[Judged]) -> Table {
    let mut rows = Vec::new();
    for mib in SIZES_MIB {
        for (index, setting) in SETTINGS.iter().enumerate() {
            let of = all.iter().filter(|judged| judged.spike.mib == mib && judged.setting == index);
            let seen: Vec<Seen> = of.filter_map(|judged| judged.seen).collect();
            let figure = |value: &dyn Fn(&Seen) -> Option<f64>, unit| {
                Cell::from(Figure::of(&seen.iter().filter_map(value).collect::<Vec<f64>>(), unit))
            };
            rows.push(vec![
                format!("{mib} MiB").into(),
                format!("{} KiB", setting.quantum_bytes >> 10).into(),
                figure(&|seen| Some(kib(seen.peak_error_bytes)), "KiB"),
                figure(&|seen| Some(ms(seen.start_error_ns)), "ms"),
                figure(&|seen| seen.end_error_ns.map(ms), "ms"),
                seen.iter().filter(|seen| seen.end_error_ns.is_none()).count().to_string().into(),
            ]);
        }
    }
    Table {
        title: "Spikes memtrace found: how far off (median, smallest and largest). Start and end are where the curve \
                passes an eighth of the height, at least a quantum; below zero is too early"
            .to_owned(),
        columns: texts(&["spike", "quantum", "peak off by", "start off by", "end off by", "end never told"]),
        rows,
    }
}

/// Errors of the pollers, by size; who reads nothing in a spike is off by all of it.
fn polled_errors(all: &[Judged]) -> Table {
    let mut columns = vec!["spike".to_owned()];
    columns.extend(PERIODS.iter().map(|(_, name)| (*name).to_owned()));
    let row = |mib: &u64| {
        let cell = |index: usize| {
            let of = all.iter().filter(|judged| judged.spike.mib == *mib);
            let errors = of.filter_map(|judged| Some(judged.polled.get(index)?.peak_error_bytes as f64));
            Cell::from(Figure::of(&errors.collect::<Vec<f64>>(), "bytes"))
        };
        std::iter::once(format!("{mib} MiB").into()).chain((0..PERIODS.len()).map(cell)).collect()
    };
    Table {
        title: "Pollers: what their highest reading within a spike lacks to its top".to_owned(),
        columns,
        rows: SIZES_MIB.iter().map(row).collect(),
    }
}

fn goals(all: &[Judged]) -> Vec<Goal> {
    SETTINGS
        .iter()
        .enumerate()
        .flat_map(|(index, setting)| {
            let of = || all.iter().filter(move |judged| judged.setting == index);
            let name = setting.name;
            let quantum = setting.quantum_bytes;
            let worst = of().filter_map(|judged| Some(judged.seen?.peak_error_bytes)).max();
            let within = |judged: &&Judged| judged.seen.is_some_and(|seen| seen.peak_error_bytes <= quantum);
            let (close, found) = (of().filter(within).count(), of().filter(|judged| judged.seen.is_some()).count());
            let measured = of().next().is_some();
            [
                Goal {
                    what: format!("{name}: every spike of at least 1 MiB and 1 ms is found"),
                    found: share(of(), |judged| judged.seen.is_some()),
                    met: measured.then(|| of().all(|judged| judged.seen.is_some())),
                },
                Goal {
                    what: format!("{name}: the peak of a spike within one quantum ({} KiB)", quantum >> 10),
                    found: worst.map_or("none found".to_owned(), |worst| {
                        format!("{close} of {found} found, worst {:.0} KiB off", kib(worst))
                    }),
                    met: worst.map(|worst| worst <= quantum),
                },
            ]
        })
        .collect()
}
