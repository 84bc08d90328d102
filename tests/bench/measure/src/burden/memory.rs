//! Memory of the agent with its rings and maps, by number of cgroups and processes.

use std::path::Path;
use std::time::Duration;

use crate::chapter::{ChapterTable, Figure, Goal};
use anyhow::Context;
use memtrace_tests::actor::Actor;
use memtrace_tests::agent::{Agent, AgentOptions};
use memtrace_tests::cage::Cage;
use memtrace_tests::json;

use crate::{fdinfo, usage};

/// Paragraph for the chapter.
pub(super) const ABOUT: &str = "Memory is the resident memory of the agent without its mappings of rings (which \
     /proc counts twice, as they are mapped twice), and what the kernel says its programs and maps take (`memlock` \
     in /proc/PID/fdinfo), rings included, each once. Every cgroup has a process that maps, touches and gives back 1 \
     MiB a second; the processes more are forked at once and then do nothing.";

/// Goal: total at a thousand cgroups, bytes.
const GOAL_BYTES: u64 = 64 << 20;
const GOAL_CGROUPS: usize = 1000;
const PID_MAX: &str = "/proc/sys/kernel/pid_max";

/// Everything that belongs to the agent, bytes.
#[derive(Clone, Copy)]
struct Memory {
    own: u64,
    maps: u64,
    programs: u64,
    locked: u64,
    peak: u64,
}

impl Memory {
    fn of(agent: &Agent) -> anyhow::Result<Self> {
        let pid = agent.pid();
        let held = fdinfo::of_process(pid)?;
        let rings = usage::mapped_bytes(pid, "bpf")?;
        Ok(Self {
            own: usage::status_bytes(pid, "VmRSS")?.saturating_sub(rings),
            maps: held.map_bytes,
            programs: held.program_bytes,
            locked: usage::status_bytes(pid, "VmLck")?,
            peak: usage::status_bytes(pid, "VmHWM")?.saturating_sub(rings),
        })
    }

    fn total(self) -> u64 {
        self.own + self.maps + self.programs
    }
}

/// Its table, and the goal at a thousand cgroups.
pub(super) fn measure(dir: &Path, quick: bool) -> anyhow::Result<(ChapterTable, Vec<Goal>)> {
    let (stages, crowd, dwell) =
        if quick { ([10, 100, GOAL_CGROUPS], 2000, 2) } else { ([10, 100, GOAL_CGROUPS], 20_000, 8) };
    let mut agent = AgentOptions::below(dir).start()?;
    let mut rows = vec![row(&agent, "as it starts")?.0];
    let mut goal = None;
    let mut cages = Vec::new();
    let mut members = Vec::new();
    for count in stages {
        let new = count - cages.len();
        members.push(people(&mut cages, new)?);
        std::thread::sleep(Duration::from_secs(dwell));
        let (cells, memory) = row(&agent, &format!("{count} cgroups"))?;
        rows.push(cells);
        if count == GOAL_CGROUPS {
            goal = Some(memory.total());
        }
    }
    let room = Room::make()?;
    let mut many = Actor::start(None, &["crowd", "--processes", &crowd.to_string()])?;
    many.until("ready")?;
    std::thread::sleep(Duration::from_secs(dwell / 2));
    rows.push(row(&agent, &format!("{GOAL_CGROUPS} cgroups and {crowd} processes more"))?.0);
    many.finish()?;
    drop(room);
    std::thread::sleep(Duration::from_secs(dwell / 2));
    rows.push(row(&agent, "when those have ended")?.0);
    for member in members {
        member.finish()?;
    }
    for cage in cages {
        cage.remove()?;
    }
    agent.stop()?;
    let columns = [
        "with",
        "cgroups followed",
        "address spaces followed",
        "everything",
        "agent",
        "its peak",
        "maps and rings",
        "programs",
        "VmLck",
    ];
    let table = ChapterTable {
        title: "Memory of the agent, at its defaults".to_owned(),
        columns: columns.map(str::to_owned).into(),
        rows,
    };
    let found = goal.map_or("not measured".to_owned(), |bytes| format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20)));
    let what = format!("everything (heap, rings, maps, programs) stays under 64 MiB with {GOAL_CGROUPS} cgroups");
    Ok((table, vec![Goal { what, found, met: goal.map(|bytes| bytes < GOAL_BYTES) }]))
}

fn row(agent: &Agent, with: &str) -> anyhow::Result<(Vec<crate::chapter::Cell>, Memory)> {
    let memory = Memory::of(agent)?;
    let bytes = |bytes: u64| Figure::exactly(bytes as f64, "bytes").into();
    let Memory { own, maps, programs, locked, peak } = memory;
    let mut cells = vec![with.into()];
    for followed in ["memtrace_cgroups", "memtrace_processes"] {
        cells.push(agent.metric(followed)?.map(|count| Figure::exactly(count, "")).into());
    }
    cells.extend([memory.total(), own, peak, maps, programs, locked].map(bytes));
    Ok((cells, memory))
}

/// Makes this many more cgroups with one process in each.
fn people(cages: &mut Vec<Cage>, count: usize) -> anyhow::Result<Actor> {
    let mut actor = Actor::start(None, &["crowd", "--swing", "--processes", &count.to_string()])?;
    let ready = actor.until("ready")?;
    let children: Vec<u64> = json::list(ready, "/children")?.iter().filter_map(serde_json::Value::as_u64).collect();
    for child in children {
        let cage = Cage::unlimited("many")?;
        cage.set("cgroup.procs", child)?;
        cages.push(cage);
    }
    Ok(actor)
}

/// Raises `pid_max` while it is held.
struct Room(Option<String>);

impl Room {
    fn make() -> anyhow::Result<Self> {
        let before = std::fs::read_to_string(PID_MAX).with_context(|| format!("failed to read {PID_MAX}"))?;
        let before = before.trim().to_owned();
        if before.parse::<u64>().is_ok_and(|most| most >= 1 << 16) {
            return Ok(Self(None));
        }
        std::fs::write(PID_MAX, (1u32 << 17).to_string()).with_context(|| format!("failed to write {PID_MAX}"))?;
        Ok(Self(Some(before)))
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        if let Some(before) = &self.0 {
            // no way to report it; a larger value hurts nobody
            let _ = std::fs::write(PID_MAX, before);
        }
    }
}
