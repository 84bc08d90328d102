//! Benchmark `durable`: how soon after a kill the ledger line, the incident, and the incident with
//! names are on disk.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::chapter::{Cell, Chapter, ChapterTable, Figure, Goal};
use anyhow::{Context, ensure};
use memtrace_tests::actor::Actor;
use memtrace_tests::agent::{Agent, AgentOptions};
use memtrace_tests::cage::Cage;
use memtrace_tests::{disk, json};
use serde_json::Value;

/// A directory that is usually on a disk.
const ON_DISK: &str = "/var/tmp";
const LIMIT_BYTES: u64 = 24 << 20;
/// Time after which everything about a kill must be on disk.
const WAIT_LIMIT: Duration = Duration::from_secs(20);
/// Goal for the durable ledger line, nanoseconds.
const RAW_NS: f64 = 10e6;
/// Goal for the full incident, nanoseconds.
const FULL_NS: f64 = 1e9;
/// No window after the kill, and stacks for every kill although kills follow closely.
const AT_ONCE: [&str; 4] = ["--after", "0s", "--stack-budget", "10"];
/// As long as a line of the ledger.
const LINE: [u8; 320] = [b'x'; 320];

/// Runs the benchmark.
pub(crate) fn run(quick: bool) -> anyhow::Result<Chapter> {
    let dir = tempfile::tempdir_in(ON_DISK).context("failed to make a directory for the agent")?;
    let on_disk = disk::is_on_disk(dir.path());
    let (many, few) = if quick { (30, 5) } else { (200, 20) };
    let default = Kills::make(dir.path(), few, &[])?;
    let at_once = Kills::make(dir.path(), many, &AT_ONCE)?;
    let disk_ns = disk_alone(dir.path(), many)?;
    let mut text = vec![
        format!(
            "Processes outgrow a cgroup of {} MiB one after the other, each in its own, the next when everything \
             about the one before is on disk. Time is counted from the kernel's kill (`boot_ns` in the ledger) to \
             the moment a reader of the agent's log hears of it, each line being written after what it tells of is \
             synced: `OOM kill` after the ledger's line (append, fdatasync), `saved an incident` after the incident \
             with its curve and its stacks as modules and offsets (write, fsync, rename, fsync of the directory), \
             `named functions` after the same with the names of functions. So each figure is an upper bound.",
            LIMIT_BYTES >> 20
        ),
        "The journal has the raw record before the ledger has its line, in the same turn of the agent, but is on \
         tmpfs and is not synced: it outlives the agent, not the machine. The first row of each table is what the \
         disk takes for such a line alone."
            .to_owned(),
        "An incident is written when its window has closed, `--after` the kill: half a second by default, none in the \
         second table. The budget for stacks is ten times the default there, as kills one after the other use it up."
            .to_owned(),
    ];
    if !on_disk {
        text.push(format!("{ON_DISK} is in memory here: nothing was written to a disk."));
    }
    Ok(Chapter {
        title: "From a kill to what is on disk".to_owned(),
        text,
        tables: vec![
            default.table("At the defaults (the window closes 500 ms after the kill)", &disk_ns),
            at_once.table("With --after 0s --stack-budget 10", &disk_ns),
        ],
        goals: goals(&default, &at_once, on_disk),
    })
}

fn goals(default: &Kills, at_once: &Kills, on_disk: bool) -> Vec<Goal> {
    let raw = [at_once.raw_ns.as_slice(), &default.raw_ns].concat();
    let goal = |what: &str, found: String, met: Option<bool>| Goal {
        what: what.to_owned(),
        found,
        met: met.filter(|_| on_disk),
    };
    let told = |ns: &[f64], settings: &str| {
        Figure::of(ns, "ms").map_or_else(
            || format!("not measured {settings}"),
            |figure| format!("median {:.1} ms, worst {:.1} ms {settings}", figure.median / 1e6, figure.most / 1e6),
        )
    };
    let below = |ns: &[f64], most: f64| Figure::of(ns, "").map(|figure| figure.most < most);
    let full =
        format!("{}; {}", told(&default.named_ns, "at the defaults"), told(&at_once.named_ns, "with --after 0s"));
    vec![
        goal(
            "a kill is durable in the ledger within 10 ms",
            told(&raw, &format!("of {}", raw.len())),
            below(&raw, RAW_NS),
        ),
        goal(
            "the full incident, with stacks and names, within 1 s of the kill",
            full,
            below(&default.named_ns, FULL_NS),
        ),
    ]
}

/// Times since the kill, nanoseconds.
#[derive(Default)]
struct Kills {
    raw_ns: Vec<f64>,
    saved_ns: Vec<f64>,
    named_ns: Vec<f64>,
    /// Incidents without a stack.
    stackless: usize,
    /// Incidents that had stacks and got no names.
    nameless: usize,
}

impl Kills {
    fn make(dir: &Path, count: usize, arguments: &[&str]) -> anyhow::Result<Self> {
        let dir = tempfile::tempdir_in(dir).context("failed to make a directory for the agent")?;
        let mut agent = AgentOptions::below(dir.path()).with(arguments).start()?;
        let mut found = Self::default();
        for _ in 0..count {
            found.add(&agent)?;
        }
        agent.stop()?;
        Ok(found)
    }

    /// Kills a process and waits for everything that is written about it.
    fn add(&mut self, agent: &Agent) -> anyhow::Result<()> {
        let cage = Cage::new("durable", LIMIT_BYTES)?;
        let ended = Actor::start(Some(&cage), &["burst", "--mib", "64", "--threads", "1", "--touch"])?.finish()?;
        ended.was_killed()?;
        let ledger = agent.options().state_dir.join("kills.jsonl");
        let entry = patient(|| entry(&ledger, ended.pid)).context("the ledger never had the kill")?;
        let (id, killed_ns) = (json::text(&entry, "/incident")?, json::number(&entry, "/boot_ns")?);
        let since = |heard_ns: u64| heard_ns.saturating_sub(killed_ns) as f64;
        let raw = patient(|| agent.heard(&["OOM kill", id])).context("the log never had the kill")?;
        let saved = patient(|| agent.heard(&["saved an incident", id])).context("the incident was never saved")?;
        self.raw_ns.push(since(raw));
        self.saved_ns.push(since(saved));
        if has_offsets(&agent.options().report(id)?) {
            let named = patient(|| {
                let named = agent.heard(&["named functions", id]).map(Some);
                named.or_else(|| agent.heard(&["no names for an incident", id]).map(|_| None))
            });
            match named.flatten() {
                Some(named) => self.named_ns.push(since(named)),
                None => self.nameless += 1,
            }
        } else {
            self.stackless += 1;
        }
        cage.remove()
    }

    fn table(&self, title: &str, disk_ns: &[f64]) -> ChapterTable {
        let ms = |ns: &[f64]| Figure::of(&ns.iter().map(|ns| ns / 1e6).collect::<Vec<_>>(), "ms");
        let row = |what: &str, ns: &[f64]| {
            let figure = ms(ns);
            let worst = figure.map_or_else(|| Cell::from(None), |f| Figure::exactly(f.most, "ms").into());
            vec![what.into(), figure.into(), worst, Figure::exactly(ns.len() as f64, "").into()]
        };
        let mut rows = vec![
            row("the disk alone: a line appended and synced", disk_ns),
            row("raw record: line of the ledger, synced", &self.raw_ns),
            row("incident with curve and stacks, synced", &self.saved_ns),
            row("incident with names, synced", &self.named_ns),
        ];
        let without = [
            (self.stackless, "no stack of it was taken: its losses say why"),
            (self.nameless, "stacks that got no names"),
        ];
        for (count, why) in without.into_iter().filter(|(count, _)| *count > 0) {
            let count = Figure::exactly(count as f64, "").into();
            rows.push(vec!["incident with names".into(), Cell::Unknown(why.to_owned()), "".into(), count]);
        }
        let columns = ["from the kill to", "median (least to most)", "worst", "kills"];
        ChapterTable { title: title.to_owned(), columns: columns.map(str::to_owned).into(), rows }
    }
}

/// Whether any frame can get a name.
fn has_offsets(incident: &Value) -> bool {
    let paths = incident.get("allocation_paths").and_then(Value::as_array);
    let frames = paths.into_iter().flatten().filter_map(|path| path.get("frames")?.as_array()).flatten();
    frames.into_iter().any(|frame| frame.get("offset").is_some_and(Value::is_u64))
}

/// Polls until `look` returns something or the time is up.
fn patient<T>(look: impl Fn() -> Option<T>) -> Option<T> {
    let begin = Instant::now();
    loop {
        if let Some(found) = look() {
            return Some(found);
        }
        if begin.elapsed() > WAIT_LIMIT {
            return None;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Ledger line of a process.
fn entry(ledger: &Path, pid: u32) -> Option<Value> {
    let text = std::fs::read_to_string(ledger).ok()?;
    let entries = text.lines().rev().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    entries.into_iter().find(|entry| entry.get("pid").and_then(Value::as_u64) == Some(u64::from(pid)))
}

/// Time to append a line to a file and sync it, nanoseconds.
fn disk_alone(dir: &Path, count: usize) -> anyhow::Result<Vec<f64>> {
    let path = dir.join("line");
    let mut file = File::create(&path).with_context(|| format!("failed to create {}", path.display()))?;
    let mut found = Vec::new();
    for _ in 0..count {
        let begin = Instant::now();
        file.write_all(&LINE).and_then(|()| file.sync_data()).context("failed to write a line")?;
        found.push(begin.elapsed().as_nanos() as f64);
        std::thread::sleep(Duration::from_millis(5));
    }
    ensure!(!found.is_empty(), "nothing was written");
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_ledger_is_read_backwards() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "{\"pid\":7,\"boot_ns\":1}\n{\"pid\":7,\"boot_ns\":2}\n{\"pid\":8}\n{\"pi")
            .unwrap();
        assert_eq!(entry(file.path(), 7).unwrap()["boot_ns"], 2);
        assert_eq!(entry(file.path(), 9), None);
    }

    #[test]
    fn frames_with_offsets_can_be_named() {
        assert!(!has_offsets(&json!({})));
        assert!(has_offsets(&json!({ "allocation_paths": [{ "frames": [{ "offset": 4 }] }] })));
        assert!(!has_offsets(&json!({ "allocation_paths": [{ "frames": [{ "offset": null }] }] })));
    }
}
