//! The engine under test. Nothing else in this crate names its crate: what the engine's doors are called is said here.

use memtrace_engine::input::{CgroupFound, Input, KernelLogEvent, KernelLogLine, ModuleFound, PathFound, PathFrame};
use memtrace_engine::input::{ProcessFound, Settings, StackFound};
use memtrace_engine::output::{Finding, Output, Request};
use memtrace_engine::{Engine, Out as Effects};
use memtrace_incident::{Host, Loss, SigkillCause};

pub(crate) use memtrace_engine::input::Fact;
pub(crate) use memtrace_engine::{Counts, Snapshot};
pub(crate) use memtrace_incident::{Cause, Incident, Kind, Victim};

use memtrace_common::event::NO_LIMIT;

use crate::model::{Cgroup, Held, Key, LogNote, StackNote};
use crate::story::Shape;
use crate::wire::Blind;

/// One input, with its bytes.
#[derive(Clone, Debug)]
pub(crate) enum Step {
    Record(Vec<u8>),
    Fact(Fact),
}

/// What the engine says and asks.
#[derive(Clone, Debug)]
pub(crate) enum Out {
    Kill {
        incident: String,
        key: Key,
        killed: bool,
    },
    Sigkill {
        key: Key,
        oom: bool,
        incident: Option<String>,
    },
    Save(Box<Incident>),
    /// The kernel log names a kill that no hook saw.
    OnlyInLog(u32),
    LookUp(u64),
    Watch(u64),
    Threshold(u64, u64),
    /// Anything else, as text: only replays compare it.
    Other {
        text: String,
    },
}

impl From<Output> for Out {
    fn from(output: Output) -> Self {
        match output {
            Output::Kill(k) => Self::Kill { incident: k.incident, key: (k.pid, k.start_boot_ns), killed: k.killed },
            Output::Sigkill(s) => {
                Self::Sigkill { key: (s.pid, s.start_boot_ns), oom: s.cause == SigkillCause::Oom, incident: s.incident }
            }
            Output::Save(incident) => Self::Save(incident),
            Output::Alert(Finding::Disagreement { pid, only_in }) if only_in == "kernel_log" => Self::OnlyInLog(pid),
            Output::Alert(finding) => Self::Other { text: format!("{finding:?}") },
        }
    }
}

impl From<Request> for Out {
    fn from(request: Request) -> Self {
        match request {
            Request::LookUpCgroup { id, .. } => Self::LookUp(id),
            Request::WatchOomControl { cgroup_id } => Self::Watch(cgroup_id),
            Request::SetRssThreshold { cgroup_id, threshold_bytes } => Self::Threshold(cgroup_id, threshold_bytes),
        }
    }
}

/// Whether an incident says that something is missing from it.
fn lacks(incident: &Incident, loss: Loss) -> bool {
    incident.losses.iter().any(|note| note.what == loss.label())
}

/// It was closed before its time.
pub(crate) fn early(incident: &Incident) -> bool {
    lacks(incident, Loss::WindowCutShort)
}

/// More were killed than it lists.
pub(crate) fn left_out(incident: &Incident) -> bool {
    lacks(incident, Loss::VictimsNotListed)
}

impl Out {
    /// The same output as text, byte for byte.
    pub(crate) fn text(&self) -> String {
        match self {
            Self::Save(incident) => serde_json::to_string(incident).unwrap_or_else(|error| error.to_string()),
            Self::Other { text } => text.clone(),
            other => format!("{other:?}"),
        }
    }
}

/// A fault put between engine and checks, to prove that the checks can fail.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(not(test), expect(dead_code, reason = "only tests put a fault in"))]
pub(crate) enum Fault {
    #[default]
    None,
    /// Every n-th mark of a victim never reaches the engine, and nothing says so.
    SwallowMark(u64),
    /// Every n-th reading of resident memory, likewise.
    SwallowReading(u64),
    /// Every n-th incident is saved twice.
    SaveTwice(u64),
    /// Every n-th incident is not saved.
    NotSaved(u64),
}

/// The engine, with a fault or without.
#[derive(Clone, Debug, Default)]
pub(crate) struct Subject {
    engine: Engine,
    fault: Fault,
    seen: u64,
    effects: Effects,
}

impl Subject {
    pub(crate) fn new(fault: Fault) -> Self {
        Self { engine: Engine::new(), fault, ..Self::default() }
    }

    /// Gives the engine one input.
    pub(crate) fn apply(&mut self, step: &Step) -> Vec<Out> {
        if self.swallows(step) {
            return Vec::new();
        }
        match step {
            Step::Record(bytes) => self.engine.apply(&Input::Record(bytes), &mut self.effects),
            Step::Fact(fact) => self.engine.apply(&Input::Fact(fact.clone()), &mut self.effects),
        }
        let outputs = self.effects.outputs.drain(..).map(Out::from);
        let outs: Vec<Out> = outputs.chain(self.effects.requests.drain(..).map(Out::from)).collect();
        self.spoil(outs)
    }

    fn nth(&mut self, n: u64) -> bool {
        self.seen += 1;
        self.seen.is_multiple_of(n)
    }

    fn swallows(&mut self, step: &Step) -> bool {
        use memtrace_common::event::{KIND_OOM_VICTIM, KIND_RSS};
        let Step::Record(bytes) = step else { return false };
        let is = |kind: u16| bytes.starts_with(&kind.to_ne_bytes());
        match self.fault {
            Fault::SwallowMark(n) => is(KIND_OOM_VICTIM) && self.nth(n),
            Fault::SwallowReading(n) => is(KIND_RSS) && self.nth(n),
            _ => false,
        }
    }

    fn spoil(&mut self, outs: Vec<Out>) -> Vec<Out> {
        let (n, copies) = match self.fault {
            Fault::SaveTwice(n) => (n, 2),
            Fault::NotSaved(n) => (n, 0),
            _ => return outs,
        };
        let mut spoilt = Vec::new();
        for out in outs {
            let hit = matches!(out, Out::Save(_)) && self.nth(n);
            spoilt.extend(std::iter::repeat_n(out, if hit { copies } else { 1 }));
        }
        spoilt
    }

    pub(crate) fn counts(&self) -> Counts {
        self.engine.counts()
    }

    pub(crate) fn snapshot(&self) -> Snapshot {
        self.engine.snapshot()
    }

    pub(crate) fn preamble(&self, boot_ns: u64) -> Vec<Fact> {
        self.engine.preamble(boot_ns)
    }
}

/// Most processes the engine may know.
pub(crate) const PROCESSES_CAP: u64 = 32_768;
/// Most incidents it may have open.
pub(crate) const OPEN_CAP: u64 = 32;
/// Most cgroups it may know.
pub(crate) const CGROUPS_CAP: u64 = 4096;

/// A cgroup as its files show it.
pub(crate) fn cgroup_found(id: u64, c: &Cgroup, boot_ns: u64, blind: Blind) -> Fact {
    Fact::Cgroup(CgroupFound {
        id,
        parent_id: c.parent,
        path: c.path.clone(),
        boot_ns,
        usage_bytes: (c.parent.is_some() && !blind.to(Blind::USAGE)).then_some(c.usage),
        limit_bytes: (c.max != NO_LIMIT).then_some(c.max),
        peak_bytes: (!blind.to(Blind::WATERMARK)).then_some(c.watermark),
    })
}

/// A process that /proc shows.
pub(crate) fn process_found(key: Key, parent_pid: u32, comm: &str, cgroup_id: u64, boot_ns: u64, held: &Held) -> Fact {
    Fact::Process(ProcessFound {
        pid: key.0,
        parent_pid,
        start_ticks: key.1 / 10_000_000,
        comm: comm.to_owned(),
        cgroup_id,
        boot_ns,
        anon_bytes: held.anon,
        file_bytes: held.file,
        shmem_bytes: held.shmem,
        swap_bytes: held.swap,
        peak_bytes: held.resident(),
    })
}

/// The machine and the settings of a run.
pub(crate) fn start(shape: &Shape) -> Fact {
    let host = Host {
        hostname: "model".to_owned(),
        boot_id: "boot-1".to_owned(),
        cpus: 8,
        memory_bytes: 8 << 30,
        page_bytes: 4096,
        charge_batch_bytes: 64 * 4096,
        huge_page_bytes: None,
        ..Host::default()
    };
    let settings = Settings {
        cgroup_version: if shape.switches.v1 { 1 } else { 2 },
        kernel_log: shape.kernel_log,
        sample_bytes: shape.switches.sample_bytes,
        ..Settings::default()
    };
    Fact::Start { host, settings }
}

/// As the journal keeps it: records as they are, facts through JSON.
pub(crate) fn journalled(step: &Step) -> Option<Step> {
    match step {
        Step::Record(bytes) => Some(Step::Record(bytes.clone())),
        Step::Fact(fact) => {
            let text = serde_json::to_vec(fact).ok()?;
            serde_json::from_slice(&text).ok().map(Step::Fact)
        }
    }
}

pub(crate) fn log_line(note: &LogNote, read_boot_ns: u64) -> Fact {
    let line = match &note.oom {
        None => KernelLogEvent::Killed { pid: note.pid, comm: note.comm.clone() },
        Some((constraint, oom_memcg, task_memcg)) => KernelLogEvent::OomKill {
            constraint: (*constraint).to_owned(),
            oom_memcg: oom_memcg.clone(),
            task_memcg: Some(task_memcg.clone()),
            comm: note.comm.clone(),
            pid: note.pid,
        },
    };
    Fact::KernelLog(KernelLogLine { printk_ns: note.ns / 1000 * 1000, read_boot_ns, line })
}

pub(crate) fn log_gap(lines: u64, read_boot_ns: u64) -> Fact {
    Fact::KernelLog(KernelLogLine { printk_ns: read_boot_ns, read_boot_ns, line: KernelLogEvent::Gap { lines } })
}

pub(crate) fn module(id: u32) -> Fact {
    Fact::Module(ModuleFound { id, path: format!("/usr/lib/lib{id}.so"), build_id: Some(format!("{id:040x}")) })
}

pub(crate) fn path(id: u32, modules: u32) -> Fact {
    let frame = |n: u32| {
        let module = Some((id + n) % modules.max(1));
        PathFrame { module, offset: Some(u64::from(id * 16 + n)), ..PathFrame::default() }
    };
    let kernel = PathFrame { name: Some("handle_mm_fault".into()), kernel: true, ..PathFrame::default() };
    let frames = std::iter::once(kernel).chain((0..id % 7).map(frame)).collect();
    Fact::Path(PathFound { id, frames, cut: None })
}

pub(crate) fn stack(note: &StackNote, path: u32) -> Fact {
    Fact::Stack(StackFound {
        boot_ns: note.ns,
        pid: note.task.tgid,
        tid: note.task.tid,
        start_boot_ns: note.task.start_boot_ns,
        comm: "sampled".to_owned(),
        mm_id: note.mm_id,
        cgroup_id: note.cgroup,
        cause: Cause::Touch,
        weight_bytes: note.weight,
        grown_bytes: note.grown,
        address: None,
        size_bytes: 0,
        path,
    })
}
