//! Lost records: the rate at which losses begin, and whether the counters equal what is missing.

use std::collections::BTreeSet;
use std::path::Path;

use crate::chapter::{ChapterTable, Figure, Goal};
use anyhow::{Context, ensure};
use memtrace_tests::agent::{Agent, AgentOptions};
use memtrace_tests::process::{self, boot_ns};
use rustix::process::Signal;

use super::{Rate, SETTLE};
use crate::loops;

/// Paragraph for the chapter.
pub(super) const ABOUT: &str = "Losses: with the finest quantum (16 KiB) two processes make readings faster and \
     faster. Then the agent is stopped (SIGSTOP) during a storm of forks and one of growth, so that its rings \
     overflow, and goes on. Its journal, with room for everything, has every record that it received; the kernel \
     side's counter of sent records is read while the journal's boot clock goes by, so both must agree but for what \
     was sent during the reading. And the storm knows how many children it had: each is told of by three records \
     (fork, exit, end of the address space), and those missing from the journal must be among what is counted as \
     lost.";

/// Loss counters of records that found no room in their ring.
const LOST: [&str; 2] = ["ledger/ring_full", "samples/ring_full"];
/// Journal frame header: length, checksum, kind; see ARCHITECTURE.md.
const FRAME_BYTES: usize = 9;
const HEADER_BYTES: usize = 8;
const KIND_RECORD: u8 = 1;
/// Kinds of records about a child: fork, exit, end of its address space
/// (memtrace-common/src/event.rs).
const OF_CHILDREN: [u16; 3] = [FORK, 20, 21];
const FORK: u16 = 18;
/// Storms: processes that fork, children of each, and the time for it.
const STORM: usize = 2;
const CHILDREN: &str = "4000";
const STORM_MS: u64 = 20_000;

/// Raises the rate until the first loss, if there is one.
pub(super) fn throughput(dir: &Path, quick: bool) -> anyhow::Result<(ChapterTable, Vec<Goal>)> {
    let ms = if quick { 700 } else { 2000 };
    let mut agent = AgentOptions::below(dir).with(&["--quantum", "16K"]).start()?;
    let mut rows = Vec::new();
    for per_s in [Some(100), Some(300), Some(1000), Some(3000), None] {
        let rate = per_s.map(|per_s: u32| per_s.to_string());
        let mut words = vec!["swing"];
        words.extend(rate.iter().flat_map(|rate| ["--per-s", rate.as_str()]));
        let before = lost(&agent)?;
        let found = Rate::of(&agent, || loops::run_many(2, &words, ms).map(drop))?;
        std::thread::sleep(SETTLE);
        rows.push(vec![
            rate.map_or("as fast as they go".to_owned(), |rate| format!("{rate} swings of 1 MiB a second each")).into(),
            Figure::exactly(found.per_second, "/s").into(),
            Figure::exactly(found.percent, "%").into(),
            Figure::exactly(lost(&agent)?.iter().sum::<f64>() - before.iter().sum::<f64>(), "").into(),
        ]);
    }
    agent.stop()?;
    let columns = ["two processes", "records sent", "CPU of the agent, of one", "records lost for want of room"];
    let title = "Throughput of the rings, with --quantum 16K".to_owned();
    Ok((ChapterTable { title, columns: columns.map(str::to_owned).into(), rows }, Vec::new()))
}

/// Checks how exact the counters are.
pub(super) fn exactness(dir: &Path, quick: bool) -> anyhow::Result<(ChapterTable, Vec<Goal>)> {
    let storm = Storm::make(dir, if quick { 700 } else { 1500 })?;
    Ok((storm.table(), vec![storm.goal()]))
}

/// Records that found no room so far, by ring.
fn lost(agent: &Agent) -> anyhow::Result<[f64; 2]> {
    let [ledger, samples] = LOST.map(|what| agent.metric(&format!("memtrace_lost_total{{what=\"{what}\"}}")));
    Ok([ledger?.unwrap_or(0.0), samples?.unwrap_or(0.0)])
}

fn sent(agent: &Agent) -> anyhow::Result<[f64; 2]> {
    let [ledger, samples] =
        ["ledger", "samples"].map(|ring| agent.metric(&format!("memtrace_records_total{{ring=\"{ring}\"}}")));
    Ok([ledger?.unwrap_or(0.0), samples?.unwrap_or(0.0)])
}

/// Compares counters and journal after a storm too large for the rings.
struct Storm {
    /// Losses by ring, as the kernel side counts.
    sent: [f64; 2],
    lost: [f64; 2],
    /// Records in the journal before the counters were read, and after.
    received: (u64, u64),
    /// Records of the storm's children: made, and found in the journal.
    children: (u64, u64),
}

impl Storm {
    fn make(dir: &Path, ms: u64) -> anyhow::Result<Self> {
        let dir = tempfile::tempdir_in(dir).context("failed to make a directory for the agent")?;
        let options = AgentOptions::below(dir.path()).with(&["--journal-size", "1G"]);
        let mut agent = options.start()?;
        let comm = format!("storm-{}", std::process::id());
        let stop = Stopped::now(agent.pid())?;
        let words = ["fork", "--comm", &comm, "--most", CHILDREN];
        let forked: u64 = loops::run_many(STORM, &words, STORM_MS)?.iter().map(|looped| looped.units).sum();
        loops::run_many(STORM, &["swing"], ms)?;
        drop(stop);
        std::thread::sleep(SETTLE * 2);
        let begin = boot_ns();
        let (sent, lost) = (sent(&agent)?, lost(&agent)?);
        let end = boot_ns();
        agent.stop()?;
        let journal = Journal::read(&options.journal_dir, &comm, begin, end)?;
        Ok(Self {
            sent,
            lost,
            received: (journal.before, journal.until),
            children: (forked * OF_CHILDREN.len() as u64, journal.of_children),
        })
    }

    fn missing(&self) -> u64 {
        self.children.0.saturating_sub(self.children.1)
    }

    fn table(&self) -> ChapterTable {
        let count = |value: f64| Figure::exactly(value, "").into();
        let row = |what: &str, value| vec![what.into(), count(value)];
        let [ledger, samples] = self.lost;
        let rows = vec![
            row("records in the rings, as the kernel side counts them", self.sent.iter().sum()),
            row("records in the journal before that was read", self.received.0 as f64),
            row("records in the journal after that was read", self.received.1 as f64),
            row("records of the storm's children", self.children.0 as f64),
            row("of those, missing from the journal", self.missing() as f64),
            row("counted as lost in their ring (ledger)", ledger),
            row("counted as lost in the ring of readings (samples)", samples),
        ];
        let columns = ["", "count"];
        let title = "The agent stopped amid a storm: sent, received, lost".to_owned();
        ChapterTable { title, columns: columns.map(str::to_owned).into(), rows }
    }

    fn goal(&self) -> Goal {
        let what = "loss counters are exact: what was sent was received, what is missing is counted".to_owned();
        let sent: f64 = self.sent.iter().sum();
        let [ledger, samples] = self.lost;
        let received = (self.received.0 as f64..=self.received.1 as f64).contains(&sent);
        let missing = self.missing() as f64;
        let found = format!(
            "{sent:.0} sent, {} to {} received; {missing:.0} records of children missing, {ledger:.0} counted as \
             lost, the {:.0} more being of other processes",
            self.received.0,
            self.received.1,
            ledger - missing
        );
        // a storm that fits into the rings shows nothing
        let met = (ledger + samples > 0.0).then_some(received && missing <= ledger);
        Goal { what, found, met }
    }
}

/// A process stopped by SIGSTOP until this is dropped.
struct Stopped(u32);

impl Stopped {
    fn now(pid: u32) -> anyhow::Result<Self> {
        process::stop(pid)?;
        Ok(Self(pid))
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        // an error means that it is gone with its agent
        let _ = process::signal(self.0, Signal::CONT);
    }
}

/// Counts in a journal.
#[derive(Debug, Default, PartialEq, Eq)]
struct Journal {
    /// Records made before a time.
    before: u64,
    /// Records made after that and before a second one.
    until: u64,
    /// Records of the children of processes of a name.
    of_children: u64,
    /// Those processes themselves, whose own records are not counted.
    parents: BTreeSet<u32>,
}

impl Journal {
    fn read(dir: &Path, comm: &str, begin: u64, end: u64) -> anyhow::Result<Self> {
        let mut files: Vec<_> = std::fs::read_dir(dir)
            .with_context(|| format!("failed to read {}", dir.display()))?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|path| path.extension().is_some_and(|extension| extension == "mtj"))
            .collect();
        files.sort();
        ensure!(!files.is_empty(), "no journal in {}", dir.display());
        let mut found = Self::default();
        for file in files {
            let bytes = std::fs::read(&file).with_context(|| format!("failed to read {}", file.display()))?;
            found.add(&bytes, comm, begin, end).with_context(|| format!("{} is not whole", file.display()))?;
        }
        Ok(found)
    }

    fn add(&mut self, segment: &[u8], comm: &str, begin: u64, end: u64) -> Option<()> {
        let mut rest = segment.get(HEADER_BYTES..)?;
        while !rest.is_empty() {
            let length = usize::try_from(u32::from_le_bytes(bytes(rest, 0)?)).ok()?;
            let payload = rest.get(FRAME_BYTES..FRAME_BYTES.checked_add(length)?)?;
            if rest.get(FRAME_BYTES - 1) == Some(&KIND_RECORD) {
                // kind, size, CPU, boot clock; then, in the records that matter here, a task: pid,
                // thread, start, name
                let (kind, boot_ns) = (u16::from_ne_bytes(bytes(payload, 0)?), u64::from_ne_bytes(bytes(payload, 8)?));
                self.before += u64::from(boot_ns < begin);
                self.until += u64::from(boot_ns < end);
                let name = payload.get(32..48).unwrap_or_default();
                let ours = name.strip_prefix(comm.as_bytes()).is_some_and(|rest| rest.first().is_none_or(|b| *b == 0));
                if ours && OF_CHILDREN.contains(&kind) {
                    let pid = u32::from_ne_bytes(bytes(payload, 16)?);
                    if kind == FORK {
                        self.parents.insert(pid);
                    }
                    self.of_children += u64::from(kind == FORK || !self.parents.contains(&pid));
                }
            }
            rest = rest.get(FRAME_BYTES + length..)?;
        }
        Some(())
    }
}

fn bytes<const N: usize>(from: &[u8], at: usize) -> Option<[u8; N]> {
    from.get(at..at.checked_add(N)?)?.try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_of_a_journal_are_counted_by_time_and_name() {
        let record = |kind: u16, boot_ns: u64, pid: u32, name: &str| {
            let mut payload = kind.to_ne_bytes().to_vec();
            payload.resize(8, 0);
            payload.extend(boot_ns.to_ne_bytes());
            payload.resize(16, 0);
            payload.extend(pid.to_ne_bytes());
            payload.resize(32, 0);
            payload.extend(name.as_bytes());
            payload.resize(96, 0);
            payload
        };
        let frame = |kind: u8, payload: &[u8]| {
            let mut frame = u32::try_from(payload.len()).unwrap().to_le_bytes().to_vec();
            frame.extend([0; 4]);
            frame.push(kind);
            frame.extend(payload);
            frame
        };
        let frames = [
            frame(1, &record(FORK, 10, 7, "storm-1")),
            frame(2, b"{}"),
            frame(1, &record(20, 15, 8, "storm-1")),
            frame(1, &record(20, 15, 7, "storm-1")),
            frame(1, &record(20, 20, 9, "storm-12")),
            frame(1, &record(1, 30, 8, "storm-1")),
        ];
        let segment = [b"MTJR\x01\0\0\0".to_vec(), frames.concat()].concat();
        let mut found = Journal::default();
        assert_eq!(found.add(&segment, "storm-1", 20, 30), Some(()));
        assert_eq!(found, Journal { before: 3, until: 4, of_children: 2, parents: BTreeSet::from([7]) });
        assert_eq!(Journal::default().add(&segment[..segment.len() - 1], "x", 0, 0), None);
    }
}
