//! Benchmark `peaks`: the peak usage that memtrace reports for a cgroup against the kernel's
//! watermark, over many cgroup lifetimes.

use std::fs::File;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use crate::chapter::{Cell, Chapter, ChapterTable, Figure, Goal};
use anyhow::{Context, ensure};
use memtrace_tests::agent::{Agent, AgentOptions};
use memtrace_tests::cage::Cage;
use memtrace_tests::random::SeededRandom;
use memtrace_tests::{json, programs};
use serde_json::Value;
use tempfile::TempDir;

use crate::BenchPlan;
use crate::recorder::{RecordedCurve, Recorder};

/// Cgroups kept alive until the agent is asked about all of them and they are removed.
const BATCH: usize = 25;
/// The agent reads events at least every 100 ms.
const TAKEN_IN: Duration = Duration::from_millis(300);
const AGENT_QUANTUM: u64 = 256 << 10;
const RECORD_QUANTUM: u64 = 64 << 10;
/// Size of the file that is read, MiB.
const FILE_MIB: u64 = 48;

/// What runs in a cgroup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Shape {
    Moment,
    Burst,
    Forked,
    FileCache,
    Tmpfs,
    Buffer,
    Sockets,
}

const SHAPES: [(Shape, &str); 7] = [
    (Shape::Moment, "anonymous, for a moment"),
    (Shape::Burst, "anonymous, at once"),
    (Shape::Forked, "a child that grows"),
    (Shape::FileCache, "file read through the page cache"),
    (Shape::Tmpfs, "file on tmpfs"),
    (Shape::Buffer, "file read into a buffer"),
    (Shape::Sockets, "socket buffers"),
];

/// Files that lifetimes read and write.
struct Files {
    dir: TempDir,
    tmpfs: TempDir,
}

/// Lifetime of one cgroup and the peaks reported for it.
#[derive(Clone, Copy, Debug)]
struct Life {
    shape: Shape,
    lived: Duration,
    truth_bytes: u64,
    /// `None` if nothing was reported.
    said_bytes: Option<u64>,
}

/// Lifetimes of one shape, or of all, compared with the truth.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Tally {
    lives: usize,
    exact: usize,
    /// Within one RSS threshold, exact ones included.
    within_quantum: usize,
    unsaid: usize,
    worst_bytes: u64,
}

/// Runs the benchmark.
pub(crate) fn run(plan: &BenchPlan) -> anyhow::Result<Chapter> {
    let (lifetimes, recordings) = if plan.quick { (150, 14) } else { (1000, 84) };
    let files = Files::new()?;
    let mut random = SeededRandom::new(plan.seed);
    let (by_agent, still_listed) = agent_lives(lifetimes, &files, &mut random)?;
    let recorded: Vec<(Life, Life)> = (0..recordings)
        .map(|at| record(SHAPES.iter().cycle().nth(at).context("no shapes")?.0, &files, &mut random))
        .collect::<anyhow::Result<_>>()?;
    Ok(chapter(plan.seed, &by_agent, still_listed, &recorded))
}

impl Files {
    fn new() -> anyhow::Result<Self> {
        let dir = tempfile::tempdir_in("/var/tmp").context("failed to make a directory for a file")?;
        let tmpfs = tempfile::tempdir_in("/dev/shm").context("failed to make a directory on tmpfs")?;
        let files = Self { dir, tmpfs };
        std::fs::write(files.on_disk(), vec![1u8; usize::try_from(FILE_MIB << 20)?])
            .context("failed to write a file")?;
        Ok(files)
    }

    fn on_disk(&self) -> std::path::PathBuf {
        self.dir.path().join("read")
    }

    /// Drops the file's pages, so that the next reader is charged for them.
    fn evict(&self) -> anyhow::Result<()> {
        let file = File::options().write(true).open(self.on_disk()).context("failed to open a file")?;
        file.sync_all().context("failed to sync a file")?;
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).context("failed to let a file's pages go")
    }

    /// Program and arguments of a shape, with a random size.
    fn command(&self, shape: Shape, random: &mut SeededRandom) -> anyhow::Result<Vec<String>> {
        let text = |path: &Path| path.to_str().map(str::to_owned).context("a path that is not text");
        let file = text(&self.on_disk())?;
        let mib = match shape {
            Shape::Moment => random.between(1, 8),
            Shape::Burst => random.between(8, 96),
            Shape::Sockets => random.between(1, 8),
            Shape::Forked | Shape::FileCache | Shape::Tmpfs | Shape::Buffer => random.between(4, FILE_MIB),
        };
        let words = match shape {
            Shape::Moment => format!("exit-after --ms 1 --mib {mib}"),
            Shape::Burst => format!("burst --mib {mib}"),
            Shape::Forked => format!("fork-child --mib {mib}"),
            Shape::FileCache => format!("cache --mib {mib} --file {file}"),
            Shape::Tmpfs => format!("tmpfs --mib {mib} --dir {}", text(self.tmpfs.path())?),
            Shape::Sockets => format!("sockets --mib {mib}"),
            Shape::Buffer => format!("dd if={file} of=/dev/null bs={mib}M count=1 status=none"),
        };
        let workload = text(&programs::path("workload")?)?;
        let program = (shape != Shape::Buffer).then_some(workload);
        Ok(program.into_iter().chain(words.split(' ').map(str::to_owned)).collect())
    }
}

/// Lifetimes under an agent at defaults, and how many of the removed cgroups it still lists at the
/// end.
fn agent_lives(count: usize, files: &Files, random: &mut SeededRandom) -> anyhow::Result<(Vec<Life>, usize)> {
    let dir = tempfile::tempdir().context("failed to make a directory for the agent")?;
    let mut agent = AgentOptions::below(dir.path()).start()?;
    let (mut lives, mut ids) = (Vec::new(), Vec::new());
    while lives.len() < count {
        let mut ended = Vec::new();
        for _ in 0..BATCH.min(count - lives.len()) {
            let at = usize::try_from(random.between(0, SHAPES.len() as u64 - 1))?;
            let (shape, _) = *SHAPES.get(at).context("no such shape")?;
            files.evict()?;
            let words = files.command(shape, random)?;
            let (program, arguments) = words.split_first().context("no program")?;
            let cage = Cage::unlimited("peak")?;
            let mut command = cage.command(program)?;
            command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
            let begin = Instant::now();
            let status = command.status().context("failed to start a workload")?;
            let lived = begin.elapsed();
            ensure!(status.success(), "{words:?} ended with {status}");
            ended.push((cage, shape, lived));
        }
        std::thread::sleep(TAKEN_IN);
        let said = peaks_said(&agent)?;
        for (cage, shape, lived) in ended {
            let truth_bytes = cage.peak()?.context("this kernel shows no watermark of a cgroup (before 5.19)")?;
            let said_bytes = said.iter().find(|(id, _)| *id == cage.id()).and_then(|(_, peak)| *peak);
            lives.push(Life { shape, lived, truth_bytes, said_bytes });
            ids.push(cage.id());
            cage.remove()?;
        }
    }
    std::thread::sleep(TAKEN_IN);
    let still = peaks_said(&agent)?.iter().filter(|(id, _)| ids.contains(id)).count();
    agent.stop()?;
    Ok((lives, still))
}

/// Peak of every cgroup that the agent lists.
fn peaks_said(agent: &Agent) -> anyhow::Result<Vec<(u64, Option<u64>)>> {
    let listed = agent.get_json("/api/cgroups")?;
    let rows = listed.as_array().context("/api/cgroups is not an array")?;
    rows.iter().map(|row| Ok((json::number(row, "/id")?, row.get("peak_bytes").and_then(Value::as_u64)))).collect()
}

/// One lifetime as a recording: the peak in the file, and the highest reading of its curve.
fn record(shape: Shape, files: &Files, random: &mut SeededRandom) -> anyhow::Result<(Life, Life)> {
    files.evict()?;
    let words = files.command(shape, random)?;
    let workload = programs::path("workload")?;
    // the watermark is read from inside, because the cgroup is gone with the recording
    let script = r#"workload=$1; shift; "$@" >/dev/null </dev/null && exec "$workload" own-peak"#;
    let mut command = vec!["sh", "-c", script, "sh", workload.to_str().context("a path that is not text")?];
    command.extend(words.iter().map(String::as_str));
    let dir = tempfile::tempdir().context("failed to make a directory for the recording")?;
    let begin = Instant::now();
    let mut recorder = Recorder::start(dir.path(), &[], &command)?;
    let truth = recorder.command()?.until("own_peak")?;
    let lived = begin.elapsed();
    let truth_bytes = json::number(truth, "/peak_bytes")?;
    let (_, recording) = recorder.finish()?;
    let said_bytes = recording.pointer("/cgroup/peak_bytes").and_then(Value::as_u64);
    let highest = RecordedCurve::of(&recording)?.usage.iter().map(|reading| reading.bytes).max();
    let life = |said_bytes| Life { shape, lived, truth_bytes, said_bytes };
    Ok((life(said_bytes), life(highest)))
}

fn tally<'a>(lives: impl Iterator<Item = &'a Life>, quantum_bytes: u64) -> Tally {
    let mut tally = Tally::default();
    for life in lives {
        tally.lives += 1;
        let Some(said) = life.said_bytes else {
            tally.unsaid += 1;
            continue;
        };
        let error = said.abs_diff(life.truth_bytes);
        tally.exact += usize::from(error == 0);
        tally.within_quantum += usize::from(error <= quantum_bytes);
        tally.worst_bytes = tally.worst_bytes.max(error);
    }
    tally
}

fn table(title: &str, lives: &[Life], quantum_bytes: u64, with_time: bool) -> ChapterTable {
    let mut columns = vec!["what ran", "lifetimes"];
    columns.extend(with_time.then_some("lived"));
    columns.extend(["exact", "within one quantum", "nothing said", "worst error"]);
    let row = |name: &str, of: Vec<&Life>| {
        let found = tally(of.iter().copied(), quantum_bytes);
        let mut cells: Vec<Cell> = vec![name.into(), found.lives.to_string().into()];
        if with_time {
            let lived: Vec<f64> = of.iter().map(|life| life.lived.as_secs_f64() * 1e3).collect();
            cells.push(Figure::of(&lived, "ms").into());
        }
        cells.extend([found.exact, found.within_quantum, found.unsaid].map(|count| Cell::from(count.to_string())));
        let worst = (found.unsaid < found.lives).then(|| Figure::exactly(found.worst_bytes as f64 / 1024.0, "KiB"));
        cells.push(worst.into());
        cells
    };
    let mut rows: Vec<_> = SHAPES
        .iter()
        .map(|(shape, name)| row(name, lives.iter().filter(|life| life.shape == *shape).collect()))
        .collect();
    rows.push(row("all", lives.iter().collect()));
    ChapterTable { title: title.to_owned(), columns: columns.into_iter().map(str::to_owned).collect(), rows }
}

fn chapter(seed: u64, by_agent: &[Life], still_listed: usize, recorded: &[(Life, Life)]) -> Chapter {
    let (files, curves): (Vec<Life>, Vec<Life>) = recorded.iter().copied().unzip();
    let goal = |who: &str, lives: &[Life], quantum: u64| {
        let found = tally(lives.iter(), quantum);
        Goal {
            what: format!("{who}: the peak of every cgroup within one quantum ({} KiB)", quantum >> 10),
            found: format!(
                "{} of {} ({} exactly), worst {} KiB off",
                found.within_quantum,
                found.lives,
                found.exact,
                found.worst_bytes >> 10
            ),
            met: (found.lives > 0).then_some(found.within_quantum == found.lives),
        }
    };
    let fastest = by_agent.iter().map(|life| life.lived).min().unwrap_or_default();
    let moments = by_agent.iter().filter(|life| life.lived < Duration::from_millis(10)).count();
    Chapter {
        title: "Peaks: recorded, against the kernel's watermark".to_owned(),
        text: vec![
            format!(
                "{} cgroups, one program in each, of random kind and size (seed {seed}), from its start to its end: \
                 {moments} lived less than 10 ms, the shortest {:.1} ms. The truth is the kernel's own watermark \
                 (memory.max_usage_in_bytes, memory.peak), read when the program had ended. An agent at its defaults is \
                 asked over HTTP (/api/cgroups, `peak_bytes`) after that, before the cgroup is removed.",
                by_agent.len(),
                fastest.as_secs_f64() * 1e3
            ),
            format!(
                "What the agent says is the watermark as of its last reading of the cgroup, and it reads where resident \
                 memory moves by a quantum or reclaim runs; where the kernel has the hook `charge` (fentry or kprobe), also \
                 where anything is charged. Of the cgroups that were removed it lists {still_listed} at the end: what it says \
                 of a peak after that is in the incidents of the cgroup, if it had any."
            ),
            format!(
                "{} more lifetimes are recorded by `memtrace record`, one recording each, where the truth is asked for from \
                 inside, at the end. Its file has the kernel's watermark as the recorder read it when the command had \
                 ended, and a curve, whose highest reading is told apart from that here.",
                recorded.len()
            ),
        ],
        tables: vec![
            table("The agent at its defaults (quantum 256 KiB)", by_agent, AGENT_QUANTUM, true),
            table("memtrace record: `peak_bytes` of the file", &files, RECORD_QUANTUM, false),
            table("memtrace record: the highest reading of the curve (quantum 64 KiB)", &curves, RECORD_QUANTUM, false),
        ],
        goals: vec![goal("agent", by_agent, AGENT_QUANTUM), goal("memtrace record", &files, RECORD_QUANTUM)],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tally_tells_exact_close_far_and_unsaid() {
        let life = |said_bytes| Life { shape: Shape::Burst, lived: Duration::ZERO, truth_bytes: 1000, said_bytes };
        let lives = [life(Some(1000)), life(Some(1010)), life(Some(500)), life(None)];
        let expected = Tally { lives: 4, exact: 1, within_quantum: 2, unsaid: 1, worst_bytes: 500 };
        assert_eq!(tally(lives.iter(), 10), expected);
        assert_eq!(tally([].iter(), 10), Tally::default());
    }
}
