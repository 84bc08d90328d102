//! Benchmark `reconcile`: what memtrace reports as used by a cgroup and by its processes, against
//! the kernel's own files, over a long mixed run.

use std::time::{Duration, Instant};

use crate::chapter::{Cell, Chapter, ChapterTable, Figure, Goal};
use anyhow::{Context, ensure};
use memtrace_tests::actor::Actor;
use memtrace_tests::agent::{Agent, AgentOptions};
use memtrace_tests::cage::{Cage, Version};
use memtrace_tests::json;
use memtrace_tests::process::ProcRss;
use serde_json::Value;

use self::drift::fit;
use crate::BenchPlan;

mod drift;

/// Time between two samples, including the workload's step.
const PERIOD: Duration = Duration::from_secs(1);
const QUICK_PERIOD: Duration = Duration::from_millis(500);
/// The agent reads events at least every 100 ms.
const TAKEN_IN: Duration = Duration::from_millis(250);
const QUANTUM: f64 = 262_144.0;

/// Memory by one side at a moment, bytes.
#[derive(Clone, Copy, Debug)]
struct Side {
    usage: f64,
    peak: Option<f64>,
    anon: f64,
    /// Anonymous, file and shared memory of all processes.
    attributed: f64,
}

/// Both sides at a moment when nothing changes.
#[derive(Clone, Copy, Debug)]
struct Sample {
    /// Time since the first sample.
    seconds: f64,
    /// Whether the last change was growth of a process' resident memory.
    grown: bool,
    memtrace: Side,
    kernel: Side,
    /// Sum over the processes that memtrace lists.
    listed: f64,
    /// Page cache by memory.stat.
    cache: f64,
    processes: usize,
}

/// Runs the benchmark.
pub(crate) fn run(plan: &BenchPlan) -> anyhow::Result<Chapter> {
    let (length, period) = match plan.minutes {
        Some(minutes) => (Duration::from_secs(60 * u64::from(minutes)), PERIOD),
        None if plan.quick => (Duration::from_secs(20), QUICK_PERIOD),
        None => (Duration::from_secs(180), PERIOD),
    };
    let dir = tempfile::tempdir().context("failed to make a directory for the agent")?;
    let files = tempfile::tempdir_in("/var/tmp").context("failed to make a directory for files")?;
    let tmpfs = tempfile::tempdir_in("/dev/shm").context("failed to make a directory on tmpfs")?;
    let mut agent = AgentOptions::below(dir.path()).start()?;
    let cage = Cage::unlimited("mix")?;
    let text = |path: &std::path::Path| path.to_str().map(str::to_owned).context("a path that is not text");
    let (seed, on_disk, on_tmpfs) = (plan.seed.to_string(), text(files.path())?, text(tmpfs.path())?);
    let arguments = ["mix", "--seed", &seed, "--dir", &on_disk, "--tmpfs", &on_tmpfs];
    let mut mix = Actor::start(Some(&cage), &arguments)?;
    mix.until("ready")?;

    let begin = Instant::now();
    let mut samples = Vec::new();
    let mut next = begin;
    while begin.elapsed() < length {
        mix.tell()?;
        let grown = mix.until("quiet")?.get("grown") == Some(&Value::Bool(true));
        std::thread::sleep(TAKEN_IN);
        samples.push(sample(begin.elapsed().as_secs_f64(), grown, &agent, &cage)?);
        next += period;
        std::thread::sleep(next.saturating_duration_since(Instant::now()));
    }
    let ended = mix.finish()?;
    ensure!(ended.status.success(), "the mixed work ended with {}", ended.status);
    agent.stop()?;
    cage.remove()?;
    Ok(chapter(plan.seed, &samples))
}

fn sample(seconds: f64, grown: bool, agent: &Agent, cage: &Cage) -> anyhow::Result<Sample> {
    let cgroups = agent.get_json("/api/cgroups")?;
    let processes = agent.get_json("/api/processes")?;
    let peak = cage.peak()?;
    let kernel_usage = cage.usage()?;
    let (anon_key, cache_key) = match cage.version() {
        Version::V1 => ("rss", "cache"),
        Version::V2 => ("anon", "file"),
    };
    let (anon, cache) = (cage.keyed("memory.stat", anon_key)?, cage.keyed("memory.stat", cache_key)?);
    let members = std::fs::read_to_string(cage.dir().join("cgroup.procs")).context("failed to read cgroup.procs")?;
    let mut by_process = Vec::new();
    for pid in members.lines() {
        by_process.push(ProcRss::read(pid.trim().parse().context("not a process id")?)?.total());
    }
    let of_cage = |row: &&Value, key: &str| row.get(key).and_then(Value::as_u64) == Some(cage.id());
    let ours = cgroups.as_array().into_iter().flatten().find(|row| of_cage(row, "id"));
    let ours = ours.context("the agent does not list the cgroup")?;
    let resident = |row: &Value| -> anyhow::Result<u64> {
        Ok(json::number(row, "/anon_bytes")? + json::number(row, "/file_bytes")? + json::number(row, "/shmem_bytes")?)
    };
    let listed = processes.as_array().into_iter().flatten().filter(|row| of_cage(row, "cgroup_id"));
    let listed = listed.map(resident).sum::<anyhow::Result<u64>>()?;
    Ok(Sample {
        seconds,
        grown,
        memtrace: Side {
            usage: json::number(ours, "/usage_bytes")? as f64,
            peak: ours.get("peak_bytes").and_then(Value::as_f64),
            anon: json::number(ours, "/anon_bytes")? as f64,
            attributed: resident(ours)? as f64,
        },
        kernel: Side {
            usage: kernel_usage as f64,
            peak: peak.map(|peak| peak as f64),
            anon: anon as f64,
            attributed: by_process.iter().sum::<u64>() as f64,
        },
        listed: listed as f64,
        cache: cache as f64,
        processes: by_process.len(),
    })
}

/// A comparison of the two sides.
struct Difference {
    what: &'static str,
    against: &'static str,
    /// Whether each process may be off by the RSS threshold, or only the sum.
    by_process: bool,
    of: fn(&Sample) -> Option<f64>,
}

const DIFFERENCES: [Difference; 7] = [
    Difference {
        what: "usage",
        against: "usage file",
        by_process: false,
        of: |s| Some(s.memtrace.usage - s.kernel.usage),
    },
    Difference {
        what: "usage, after growth",
        against: "usage file",
        by_process: false,
        of: |s| s.grown.then_some(s.memtrace.usage - s.kernel.usage),
    },
    Difference {
        what: "peak",
        against: "watermark file",
        by_process: false,
        of: |s| Some(s.memtrace.peak? - s.kernel.peak?),
    },
    Difference {
        what: "attributed RSS",
        against: "sum of /proc/PID/status",
        by_process: true,
        of: |s| Some(s.memtrace.attributed - s.kernel.attributed),
    },
    Difference {
        what: "attributed RSS",
        against: "sum of the processes it lists",
        by_process: true,
        of: |s| Some(s.memtrace.attributed - s.listed),
    },
    Difference {
        what: "anonymous memory",
        against: "memory.stat",
        by_process: true,
        of: |s| Some(s.memtrace.anon - s.kernel.anon),
    },
    Difference {
        what: "rest, after growth",
        against: "usage file less /proc",
        by_process: true,
        of: |s| s.grown.then(|| s.memtrace.rest() - s.kernel.rest()),
    },
];

impl Difference {
    /// What one threshold for each process allows at this moment, in thresholds.
    fn allowed(&self, sample: &Sample) -> f64 {
        if self.by_process { sample.processes.max(1) as f64 } else { 1.0 }
    }
}

impl Side {
    /// Usage that is no process' resident memory.
    fn rest(&self) -> f64 {
        self.usage - self.attributed
    }
}

/// Rows of the table of differences, and the goals.
fn differences(samples: &[Sample], seconds: f64) -> (Vec<Vec<Cell>>, Vec<Goal>) {
    let mut rows = Vec::new();
    let mut goals = Vec::new();
    for difference in &DIFFERENCES {
        let Difference { what, against, of, .. } = difference;
        let found: Vec<(&Sample, f64)> = samples.iter().filter_map(|s| Some((s, of(s)?))).collect();
        let quanta = |(s, value): &(&Sample, f64)| value / QUANTUM / difference.allowed(s);
        let points: Vec<(f64, f64)> = found.iter().map(|at| (at.0.seconds, quanta(at))).collect();
        let values: Vec<f64> = found.iter().map(|(_, value)| value / 1024.0).collect();
        let within = points.iter().filter(|(_, quanta)| quanta.abs() <= 1.0).count();
        let line = fit(&points);
        let slope = line.map(|line| format!("{:+.2} ± {:.2}", line.per_s * 3600.0, line.error_per_s * 3600.0));
        let stays = line.and_then(|line| line.stays(seconds, 1.0));
        rows.push(vec![
            (*what).into(),
            (*against).into(),
            Figure::of(&values, "KiB").into(),
            format!("{within} of {}", values.len()).into(),
            slope.clone().map_or_else(|| Cell::Unknown("too few samples".to_owned()), Cell::from),
        ]);
        goals.push(Goal {
            what: format!("{what} against {against}: the difference does not grow"),
            found: slope.map_or("too few samples".to_owned(), |slope| {
                let open = if stays.is_none() { ": too far apart to tell" } else { "" };
                format!("{slope} quanta an hour, over {seconds:.0} s{open}")
            }),
            met: stays,
        });
    }
    (rows, goals)
}

fn chapter(seed: u64, samples: &[Sample]) -> Chapter {
    let seconds = samples.last().map_or(0.0, |last| last.seconds);
    let (rows, goals) = differences(samples, seconds);
    let figure =
        |of: fn(&Sample) -> f64, unit| Cell::from(Figure::of(&samples.iter().map(of).collect::<Vec<f64>>(), unit));
    let part = |name: &str, memtrace: fn(&Sample) -> f64, kernel: fn(&Sample) -> f64| {
        vec![Cell::from(name), figure(memtrace, "bytes"), figure(kernel, "bytes")]
    };
    let shares = vec![
        part("usage", |s| s.memtrace.usage, |s| s.kernel.usage),
        part("attributed RSS", |s| s.memtrace.attributed, |s| s.kernel.attributed),
        part("unattributed rest", |s| s.memtrace.rest(), |s| s.kernel.rest()),
        vec!["page cache, by memory.stat".into(), "".into(), figure(|s| s.cache, "bytes")],
        vec!["processes".into(), "".into(), figure(|s| s.processes as f64, "")],
    ];
    let titles = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect();
    Chapter {
        title: "Reconciliation: usage, attributed, and the rest".to_owned(),
        text: vec![
            format!(
                "In one cgroup files are written and read, files on tmpfs and full sockets come and go, anonymous memory \
                 grows and shrinks, children come, hold memory and go: three such things a step, at random (seed {seed}), \
                 for {:.0} s. After each step nothing moves; 250 ms later the agent, at its defaults, is asked over \
                 HTTP (/api/cgroups, /api/processes), and the kernel's own files are read: {} samples.",
                seconds,
                samples.len()
            ),
            "A difference is memtrace's figure less the kernel's. Usage and peak may be off by a quantum (256 KiB), RSS and \
             rest by one a process; drift is counted likewise. Usage and peak are those of the agent's last reading of the \
             cgroup, which it takes where resident memory moves, and where the kernel has the hook `charge` also where \
             anything is charged; so every second step ends with growth of 4 MiB, and those are told apart."
                .to_owned(),
            "Drift is the slope of a line through the differences (least squares, ± its standard error), in quanta an hour. A \
             difference stays when that line, with two standard errors added, moves by less than a quantum over the run; it \
             grows when the line moves by more with two of them taken away; else this run cannot tell, and a longer one can \
             (`cargo xtask bench reconcile --minutes 60`; docs/reconciliation.md is what one wrote)."
                .to_owned(),
        ],
        tables: vec![
            ChapterTable {
                title: "Differences".to_owned(),
                columns: titles(&["memtrace says", "against", "difference", "within a quantum", "drift, quanta an hour"]),
                rows,
            },
            ChapterTable {
                title: "What there was".to_owned(),
                columns: titles(&["", "memtrace", "kernel"]),
                rows: shares,
            },
        ],
        goals,
    }
}
