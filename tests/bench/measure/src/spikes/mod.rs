//! Benchmark `spikes`: spikes of known size and time beside a build, as memtrace records them and
//! as pollers see them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::time::Duration;

use crate::chapter::{Cell, Chapter, ChapterTable, Figure, Goal};
use anyhow::{Context, ensure};
use memtrace_tests::json;
use memtrace_tests::random::SeededRandom;
use serde_json::Value;

use self::matching::{PolledSpike, SeenSpike, SpikeLevel, TrueSpike, find, polled};
use self::pollers::{PERIODS, Pollers};
use crate::BenchPlan;
use crate::neighbour::Neighbour;
use crate::recorder::{CgroupReading, RecordedCurve, Recorder};

mod matching;
mod pollers;

const SIZES_MIB: [u64; 5] = [1, 4, 16, 64, 300];
const HOLDS_MS: [u64; 5] = [1, 5, 20, 100, 500];
/// Pause before the first spike of a recording and after the last.
const QUIET: Duration = Duration::from_millis(100);

/// The agent's tick is 100 ms; an error above that is more than waiting for the tick.
const LATE_NS: i64 = 150_000_000;

/// Settings to record with, in turn.
struct Setting {
    name: &'static str,
    quantum_bytes: u64,
    options: &'static [&'static str],
}

impl Setting {
    /// RSS threshold of a process that holds this much: 1/256 of it, between the requested
    /// threshold and four times that.
    fn in_force(&self, resident_bytes: u64) -> u64 {
        (resident_bytes >> 8).clamp(self.quantum_bytes, self.quantum_bytes * 4)
    }
}

const SETTINGS: [Setting; 2] = [
    Setting { name: "record, 64 KiB", quantum_bytes: 64 << 10, options: &[] },
    Setting {
        name: "as the agent, 256 KiB",
        quantum_bytes: 256 << 10,
        options: &["--quantum", "256K", "--sample", "512K", "--stack-budget", "1%"],
    },
];

/// The columns of a curve that are checked, in the order of [`Judged::seen`].
const COLUMNS: [&str; 2] = ["usage", "resident"];

/// A spike and what each side shows of it.
struct Judged {
    spike: TrueSpike,
    /// Index of the setting it was recorded with.
    setting: usize,
    /// In the column of usage, and in that of resident memory.
    seen: [Option<SeenSpike>; 2],
    /// In the order of [`PERIODS`].
    polled: Vec<PolledSpike>,
}

impl Judged {
    /// What the column with this index in [`COLUMNS`] shows.
    fn by(&self, column: usize) -> Option<SeenSpike> {
        *self.seen.get(column)?
    }
}

/// Results of one run.
#[derive(Default)]
struct Run {
    judged: Vec<Judged>,
    readings: u64,
    thinned: u64,
    /// Losses by reason.
    losses: BTreeMap<String, u64>,
    /// What the recordings lacked: hooks that were off.
    lacking: BTreeSet<String>,
}

/// Runs the benchmark.
pub(crate) fn run(plan: &BenchPlan) -> anyhow::Result<Chapter> {
    let mut random = SeededRandom::new(plan.seed);
    let rounds = if plan.quick { 2 } else { 6 };
    let neighbour = Neighbour::start()?;
    let mut run = Run::default();
    for round in 0..rounds {
        run.record(round % SETTINGS.len(), plan.quick, &mut random)?;
    }
    let builds = neighbour.finish()?;
    Ok(chapter(&run, plan.seed, builds))
}

impl Run {
    /// One recording: every size with every time once; in a quick run, most of them.
    fn record(&mut self, index: usize, quick: bool, random: &mut SeededRandom) -> anyhow::Result<()> {
        let setting = SETTINGS.get(index).context("no such setting")?;
        let mut spikes: Vec<(u64, u64)> =
            SIZES_MIB.iter().flat_map(|mib| HOLDS_MS.map(|hold_ms| (*mib, hold_ms))).collect();
        random.shuffle(&mut spikes);
        spikes.truncate(if quick { 14 } else { spikes.len() });
        let longest_pause_ms = if quick { 700 } else { 1550 };
        let words: Vec<String> = spikes
            .iter()
            .map(|(mib, hold_ms)| format!("{mib}:{hold_ms}:{}", random.between(50, longest_pause_ms)))
            .collect();
        let workload = memtrace_tests::programs::path("workload")?;
        let mut command = vec![workload.to_str().context("a path that is not text")?, "spikes"];
        command.extend(words.iter().map(String::as_str));

        let dir = tempfile::tempdir().context("failed to make a directory for the recording")?;
        let mut recorder = Recorder::start(dir.path(), setting.options, &command)?;
        let file = PathBuf::from(json::text(recorder.command()?.until("ready")?, "/usage_file")?);
        let pollers = Pollers::start(&file, random);
        std::thread::sleep(QUIET);
        recorder.command()?.tell()?;
        for _ in 0..spikes.len() {
            recorder.command()?.until("spike")?;
        }
        let polls = pollers.finish()?;
        std::thread::sleep(QUIET);
        let (ended, recording) = recorder.finish()?;
        ensure!(ended.status.success(), "the spikes ended with {}", ended.status);
        let curve = RecordedCurve::of(&recording)?;
        self.readings += curve.resident.len() as u64;
        self.thinned += json::number(&recording, "/timeline/thinned")?;
        for lost in json::list(&recording, "/losses")? {
            let what = json::text(lost, "/what")?;
            match json::at(lost, "/count")?.as_u64() {
                Some(count) => *self.losses.entry(what.to_owned()).or_default() += count,
                // the name of a hook, and what is not seen without it
                None => drop(self.lacking.insert(what.split(':').next().unwrap_or(what).to_owned())),
            }
        }
        for told in ended.all("spike") {
            self.judged.push(judge(spike(told)?, index, setting, &curve, &polls));
        }
        Ok(())
    }
}

fn judge(
    spike: TrueSpike,
    index: usize,
    setting: &Setting,
    curve: &RecordedCurve,
    polls: &[Vec<CgroupReading>],
) -> Judged {
    Judged {
        spike,
        setting: index,
        seen: [
            find(&spike, &spike.usage, &curve.usage, setting.quantum_bytes),
            find(&spike, &spike.resident, &curve.resident, setting.quantum_bytes),
        ],
        polled: polls.iter().map(|readings| polled(&spike, readings)).collect(),
    }
}

fn spike(told: &Value) -> anyhow::Result<TrueSpike> {
    let number = |name: &str| json::number(told, name);
    let (mib, base_resident) = (number("/mib")?, number("/base_resident_bytes")?);
    Ok(TrueSpike {
        mib,
        hold_ms: number("/hold_ms")?,
        start_ns: number("/start_ns")?,
        top_ns: number("/top_ns")?,
        fall_ns: number("/fall_ns")?,
        end_ns: number("/end_ns")?,
        usage: SpikeLevel { base_bytes: number("/base_bytes")?, top_bytes: number("/top_bytes")? },
        resident: SpikeLevel { base_bytes: base_resident, top_bytes: base_resident + (mib << 20) },
    })
}

fn chapter(run: &Run, seed: u64, builds: u64) -> Chapter {
    let thinned = format!(
        "A recording keeps at most 8192 readings of its curve, of several in one interval of at least a millisecond the \
         highest and the last: of {} readings {} were left out so.",
        run.readings + run.thinned,
        run.thinned
    );
    // reported above
    let losses: Vec<String> = run
        .losses
        .iter()
        .filter(|(what, _)| *what != "timeline/thinned")
        .map(|(what, count)| format!("{count} {what}"))
        .collect();
    let losses = if losses.is_empty() { "nothing".to_owned() } else { losses.join(", ") };
    let lacking: Vec<&str> = run.lacking.iter().map(String::as_str).collect();
    let losses = format!("Lost, as the recordings state it: {losses}; without: {}.", lacking.join(", "));
    let ends = run.judged.iter().filter_map(|judged| judged.by(0)?.end_error_ns);
    let late = ends.clone().filter(|error_ns| *error_ns > LATE_NS).count();
    let late = format!(
        "Of {} spikes found by usage, {late} end there more than {} ms late. The kernel counts pages out of resident memory \
         before it uncharges them, so a fall is read again when the call that gave memory back returns.",
        ends.count(),
        LATE_NS / 1_000_000
    );
    Chapter {
        title: "Spikes: found, how high, from when to when".to_owned(),
        text: vec![
            format!(
                "A workload in a memory cgroup of its own takes 1 to 300 MiB over a base of 32 MiB, holds them for 1 to \
                 500 ms and gives them back, at random times (seed {seed}), and notes when and how high by the kernel's \
                 own usage. The quantum in force is the one asked for, and of a process that holds more than 256 of them a \
                 256th of what it holds, at most four times the one asked for. A build runs beside it in another cgroup ({builds} builds were finished). Recorded by \
                 `memtrace record`, in turn at its own defaults (a reading whenever 64 KiB moved) and at the agent's \
                 (256 KiB); a spike is found when a column of the curve, usage or resident memory, rises by half of its \
                 height within its time, ±5 ms. On the same run threads read the cgroup's usage file each 100 ms, 1 s, 5 s \
                 and 10 s, each beginning at a random moment; a spike is seen when a reading within its time has half of its \
                 height."
            ),
            format!(
                "The agent itself keeps such a curve of every cgroup for 30 s, in full for 2 s, and writes it down with a \
                 kill, a near miss, or a spike that reaches four fifths of a limit: here recordings show the curve. \
                 {thinned} {losses}"
            ),
            late,
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

/// Number of spikes found, in rows by one key.
fn found(title: &str, all: &[Judged], key: fn(&TrueSpike) -> u64, keys: &[u64], unit: &str) -> ChapterTable {
    let mut columns = vec!["spike".to_owned()];
    for setting in &SETTINGS {
        columns.extend(COLUMNS.map(|column| format!("{}: {column}", setting.name)));
    }
    columns.extend(PERIODS.iter().map(|(_, name)| (*name).to_owned()));
    let row = |name: String, of: Vec<&Judged>| {
        let mut cells = vec![Cell::from(name)];
        for index in 0..SETTINGS.len() {
            let recorded = || of.iter().copied().filter(move |judged| judged.setting == index);
            cells.push(share(recorded(), |judged| judged.by(0).is_some()).into());
            cells.push(share(recorded(), |judged| judged.by(1).is_some()).into());
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
    ChapterTable { title: title.to_owned(), columns, rows }
}

fn kib(bytes: u64) -> f64 {
    bytes as f64 / 1024.0
}

fn ms(ns: i64) -> f64 {
    ns as f64 / 1e6
}

/// Errors of what memtrace found, by size, setting and column.
fn errors(all: &[Judged]) -> ChapterTable {
    let mut rows = Vec::new();
    for mib in SIZES_MIB {
        for (index, setting) in SETTINGS.iter().enumerate() {
            for (at, column) in COLUMNS.iter().enumerate() {
                let of = all.iter().filter(|judged| judged.spike.mib == mib && judged.setting == index);
                let seen: Vec<SeenSpike> = of.filter_map(|judged| judged.by(at)).collect();
                let figure = |value: &dyn Fn(&SeenSpike) -> Option<f64>, unit| {
                    Cell::from(Figure::of(&seen.iter().filter_map(value).collect::<Vec<f64>>(), unit))
                };
                rows.push(vec![
                    format!("{mib} MiB").into(),
                    format!("{} KiB", setting.quantum_bytes >> 10).into(),
                    (*column).into(),
                    figure(&|seen| Some(kib(seen.peak_error_bytes)), "KiB"),
                    figure(&|seen| Some(ms(seen.start_error_ns)), "ms"),
                    figure(&|seen| seen.end_error_ns.map(ms), "ms"),
                    seen.iter().filter(|seen| seen.end_error_ns.is_none()).count().to_string().into(),
                ]);
            }
        }
    }
    ChapterTable {
        title: "Spikes memtrace found: how far off (median, smallest and largest). The start is where the column is a \
                quantum above the base, the end where it is near it again, within an eighth of the height or 512 KiB; below \
                zero is too early"
            .to_owned(),
        columns: texts(&["spike", "quantum", "column", "peak off by", "start off by", "end off by", "end never told"]),
        rows,
    }
}

/// Errors of the pollers by size. A poller without a reading in a spike is off by its whole height.
fn polled_errors(all: &[Judged]) -> ChapterTable {
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
    ChapterTable {
        title: "Pollers: what their highest reading within a spike lacks to its top".to_owned(),
        columns,
        rows: SIZES_MIB.iter().map(row).collect(),
    }
}

fn goals(all: &[Judged]) -> Vec<Goal> {
    let mut goals = Vec::new();
    for (index, setting) in SETTINGS.iter().enumerate() {
        for (at, column) in COLUMNS.iter().enumerate() {
            let of = || all.iter().filter(move |judged| judged.setting == index);
            let error = |judged: &Judged| {
                let error = judged.by(at)?.peak_error_bytes;
                Some((error, error <= setting.in_force(judged.spike.resident.top_bytes)))
            };
            let errors: Vec<(u64, bool)> = of().filter_map(error).collect();
            let worst = errors.iter().map(|(error, _)| *error).max();
            let close = errors.iter().filter(|(_, within)| *within).count();
            let name = format!("{} ({column})", setting.name);
            goals.push(Goal {
                what: format!("{name}: every spike of at least 1 MiB and 1 ms is found"),
                found: share(of(), |judged| judged.by(at).is_some()),
                met: of().next().map(|_| of().all(|judged| judged.by(at).is_some())),
            });
            goals.push(Goal {
                what: format!("{name}: the peak of a spike within the quantum in force"),
                found: worst.map_or("none found".to_owned(), |worst| {
                    format!("{close} of {} found, worst {:.0} KiB off", errors.len(), kib(worst))
                }),
                met: worst.map(|_| close == errors.len()),
            });
        }
    }
    goals
}
