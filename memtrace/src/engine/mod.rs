//! The pure core: records and facts in, incidents out. No file, socket, clock, thread or environment.
//!
//! [`Engine::apply`] is the only way in and its effects are the only way out. The shell sends a
//! [`Fact::Tick`] with the time up to which it has read every source; windows close on ticks alone.

use std::collections::BTreeMap;

use serde::Serialize;

pub mod decode;
pub mod input;
pub mod snapshot;

mod attribution;
mod book;
mod builder;
mod cases;
mod census;
mod cgroups;
mod clock;
mod detect;
mod identity;
mod kernlog;
mod kills;
mod losses;
mod pressure;
mod processes;
mod recording;
#[cfg(test)]
mod sample;
mod scope;
mod sigkills;
mod spaces;
mod stack;
mod stuck;
#[cfg(test)]
mod tests;
mod timeline;
mod verdict;

use decode::{Reading, Record, known};
use input::{CgroupFound, Effect, Fact, Finding, Input, ProcessFound, Settings};
use memtrace_common::event as wire;
use memtrace_incident::{Host, Loss};
use recording::{Ending, Subject};

pub use snapshot::{CgroupView, ProcessView, Snapshot};

/// How many totals of losses a window is divided into.
const LOSS_MOMENTS: u64 = 100;
/// The smallest quantum a small limit leads to.
const QUANTUM_MIN: u64 = 16 * 1024;
/// A limit is passed in at least this many quanta.
const QUANTA_PER_LIMIT: u64 = 512;

/// The engine. Same inputs, same effects, byte for byte.
#[derive(Clone, Debug, Default)]
pub struct Engine {
    settings: Settings,
    host: Host,
    started: bool,
    /// The run has ended: the next start begins afresh.
    stopped: bool,
    clock: clock::Clock,
    /// The last tick.
    now: u64,
    records: BTreeMap<&'static str, u64>,
    bad_records: u64,
    unknown_kinds: u64,
    losses: losses::Losses,
    /// Evictions already counted as losses: processes, cgroups, curves, detectors.
    told: [u64; 5],
    book: book::Book,
    ledger: kills::Ledger,
    sigkills: sigkills::Sigkills,
    log: kernlog::KernelLog,
    attribution: attribution::Attribution,
    detectors: detect::Detectors,
    /// At most [`cases::OPEN_CAP`].
    open: Vec<cases::Open>,
    /// At most [`stuck::STUCK_CAP`].
    stuck: Vec<stuck::Stuck>,
    recording: Option<recording::State>,
}

/// Numbers about the engine itself.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Counts {
    /// Records decoded, by kind.
    pub records: BTreeMap<&'static str, u64>,
    /// Records of a known kind and a wrong size, or shorter than a header.
    pub bad_records: u64,
    /// Records of a kind this build does not know.
    pub unknown_kinds: u64,
    /// Incidents that still gather.
    pub open_incidents: u64,
    /// Cgroups that wait for memory with their OOM killer off.
    pub stuck_cgroups: u64,
    /// Cgroups known, removed ones that are remembered included.
    pub cgroups: u64,
    /// Processes known, dead ones that are remembered included.
    pub processes: u64,
    /// Processes, cgroups, curves and detectors given up for want of room.
    pub evictions: u64,
    /// Roughly what all this takes.
    pub memory_estimate_bytes: u64,
}

impl Engine {
    /// An engine that knows nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes one input in and adds what follows from it to `effects`.
    pub fn apply(&mut self, input: &Input<'_>, effects: &mut Vec<Effect>) {
        match input {
            Input::Record(bytes) => self.apply_decoded(&decode::decode(bytes), effects),
            Input::Fact(fact) => {
                self.fact(fact, effects);
                self.deliver(effects);
            }
        }
    }

    fn deliver(&mut self, effects: &mut Vec<Effect>) {
        self.deliver_points();
        effects.extend(self.book.cgroups.asks.drain(..).map(|id| Effect::LookUpCgroup { id }));
    }

    fn record(&mut self, record: &Record, effects: &mut Vec<Effect>) {
        match record {
            Record::Rss(r) => {
                let key = self.book.rss(r);
                self.attribution.grew(r);
                self.learnt(key);
                if let (Some(recording), Some(key)) = (&mut self.recording, key) {
                    recording.moved(&self.book, key, r.header.boot_ns);
                }
                self.watch(r.header.boot_ns, &Reading::from(&r.memcg), effects);
            }
            Record::Charge(r) => self.reading(r.header.boot_ns, &Reading::from(&r.memcg), effects),
            Record::Reclaim(r) => self.reclaim(r, effects),
            Record::Mapping(r) => {
                let note = self.book.mapping(r);
                if let (Some(recording), Some((cgroup, note))) = (&mut self.recording, note) {
                    recording.mapped(&self.book, cgroup, &note);
                }
            }
            Record::Kill(r) => {
                self.on_kill(r);
                self.settle(false, effects);
            }
            Record::OomVictim(m) => self.on_mark(m, effects),
            Record::OomDecision(r) => self.on_decision(r),
            Record::Fork(r) => {
                let key = self.book.fork(r);
                self.learnt(Some(key));
            }
            Record::Exec(r) => {
                let key = self.book.exec(r);
                self.learnt(Some(key));
                if let Some(recording) = &mut self.recording {
                    recording.exec(key, r.header.boot_ns);
                }
            }
            Record::Exit(r) => {
                let key = self.book.exit(r);
                self.victim_exited((r.task.tgid, r.task.start_boot_ns), r.header.boot_ns);
                self.learnt(key);
                if known(r.memcg.usage_bytes).is_some() {
                    self.reading(r.header.boot_ns, &Reading::from(&r.memcg), effects);
                }
            }
            Record::MmGone(r) => {
                let key = self.book.mm_gone(r);
                self.attribution.gone(r);
                self.learnt(key);
            }
            Record::Attach(r) => {
                let key = self.book.attach(r);
                self.learnt(key);
            }
            Record::Cgroup(r) => {
                self.book.cgroup_change(r);
                self.tree_changed();
                if r.change == wire::CGROUP_REMOVED {
                    self.unstuck(r.memcg.cgroup_id, r.header.boot_ns);
                }
                self.watch(r.header.boot_ns, &Reading::from(&r.memcg), effects);
            }
            // Addresses mean nothing here; the names come as a fact.
            Record::KernelStack(_) => {}
        }
    }

    fn fact(&mut self, fact: &Fact, effects: &mut Vec<Effect>) {
        match fact {
            Fact::Start { host, settings } => self.start(host, settings, effects),
            Fact::Anchor { boot_ns, wall_ns, uncertainty_ns } => {
                let anchor = clock::Anchor { boot_ns: *boot_ns, wall_ns: *wall_ns, uncertainty_ns: *uncertainty_ns };
                self.clock.anchor = Some(anchor);
            }
            Fact::Cgroup(found) => self.cgroup_found(found, effects),
            Fact::Process(found) => {
                let key = self.book.process_found(found);
                self.learnt(key);
            }
            Fact::KernelLog(line) => {
                self.log.line(line);
                self.refine();
            }
            Fact::KernelStack { victim_pid, victim_start_boot_ns, functions } => {
                self.on_stack((*victim_pid, *victim_start_boot_ns), kills::functions(functions));
            }
            Fact::Module(found) => self.attribution.module(found),
            Fact::Path(found) => self.attribution.path(found),
            Fact::Stack(found) => self.attribution.stack(found),
            // Before the first tick they are what an earlier segment has counted already.
            Fact::Losses { totals } => self.losses.state(totals, self.now == 0),
            Fact::OomControl { cgroup_id, boot_ns, kill_disabled, under_oom } => {
                self.on_oom_control(*cgroup_id, *boot_ns, *kill_disabled, *under_oom, effects);
            }
            Fact::Tick { boot_ns } => self.tick(*boot_ns, effects),
            Fact::RecordingBegin { cgroup_id, pid, command, boot_ns } => {
                let subject = Subject { cgroup_id: *cgroup_id, pid: *pid, command: command.clone(), boot_ns: *boot_ns };
                self.begin_recording(subject, effects);
            }
            Fact::RecordingEnd { boot_ns, exit_code, signal, cgroup_peak_bytes } => {
                let ending = Ending {
                    boot_ns: *boot_ns,
                    exit_code: *exit_code,
                    signal: *signal,
                    cgroup_peak_bytes: *cgroup_peak_bytes,
                };
                self.end_recording(&ending, effects);
            }
            Fact::Stop { boot_ns } => self.stop(*boot_ns, effects),
        }
    }

    /// A new run. After a stop or on another boot everything before is over; else what is known stays (a preamble
    /// repeats the start of its own run).
    fn start(&mut self, host: &Host, settings: &Settings, effects: &mut Vec<Effect>) {
        if self.started && (self.stopped || self.host.boot_id != host.boot_id) {
            self.stop(self.now, effects);
            let (records, bad, unknown) = (std::mem::take(&mut self.records), self.bad_records, self.unknown_kinds);
            *self = Self { records, bad_records: bad, unknown_kinds: unknown, ..Self::default() };
        }
        self.started = true;
        self.host = host.clone();
        self.settings = settings.clone();
        self.settings.before_ns = settings.before_ns.min(timeline::MAX_BEFORE_NS);
        self.book.configure(settings);
    }

    fn stop(&mut self, boot_ns: u64, effects: &mut Vec<Effect>) {
        self.tick(boot_ns, effects);
        self.close_due(true, effects);
        self.close_stuck(true, effects);
        self.tell_sigkills(true, effects);
        self.end_recording(&Ending { boot_ns: self.now, ..Ending::default() }, effects);
        self.stopped = true;
    }

    fn tick(&mut self, boot_ns: u64, effects: &mut Vec<Effect>) {
        self.now = self.now.max(boot_ns);
        self.book.tick(self.now);
        let recorded = self.recording.as_ref().map(|recording| recording.subject.boot_ns);
        self.attribution.tick(self.now, self.settings.before_ns, recorded);
        self.count_evictions();
        self.losses.remember(self.now, self.settings.before_ns / LOSS_MOMENTS);
        self.close_due(false, effects);
        self.close_stuck(false, effects);
        self.tell_sigkills(false, effects);
        self.ledger.tick(self.now);
        for pid in self.log.unseen(self.now) {
            if self.settings.kernel_log {
                effects.push(Effect::Alert(Finding::Disagreement { pid, only_in: "kernel_log".to_owned() }));
            }
        }
        self.tell_found(effects);
    }

    fn count_evictions(&mut self) {
        let now = self.evictions();
        let losses = [
            Loss::ProcessesEvicted,
            Loss::CgroupsEvicted,
            Loss::CurvesDropped,
            Loss::DetectorsRefused,
            Loss::GrowthDropped,
        ];
        for ((loss, total), told) in losses.into_iter().zip(now).zip(self.told) {
            self.losses.count(loss, total.saturating_sub(told));
        }
        self.told = now;
    }

    fn evictions(&self) -> [u64; 5] {
        let cgroups = &self.book.cgroups;
        [
            self.book.processes.evicted,
            cgroups.evicted,
            cgroups.curves_dropped,
            self.detectors.refused,
            self.attribution.dropped,
        ]
    }

    /// A reading that does not come with resident memory: onto the curve, then as [`Engine::watch`].
    fn reading(&mut self, boot_ns: u64, reading: &Reading, effects: &mut Vec<Effect>) {
        self.book.read(boot_ns, reading);
        self.watch(boot_ns, reading, effects);
    }

    /// Detectors and quantum follow a reading that is on the curve.
    fn watch(&mut self, boot_ns: u64, reading: &Reading, effects: &mut Vec<Effect>) {
        let Some(id) = reading.cgroup_id else { return };
        if let (Some(usage), Some(limit)) = (reading.usage, reading.limit.bytes()) {
            self.detectors.reading(id, boot_ns, usage, limit);
        }
        self.adjust_quantum(id, effects);
        self.ask_to_watch(id, boot_ns, reading, effects);
    }

    /// A small limit, its own or an ancestor's, asks for a fine quantum; a limit that grew gives it back.
    fn adjust_quantum(&mut self, id: u64, effects: &mut Vec<Effect>) {
        let page = if self.host.page_bytes == 0 { 4096 } else { self.host.page_bytes };
        let usual = self.settings.quantum_bytes;
        let wanted = self.book.cgroups.effective_limit(id).map(|limit| {
            let exact = limit / QUANTA_PER_LIMIT;
            (exact - exact % page).max(QUANTUM_MIN)
        });
        let wanted = wanted.filter(|quantum| *quantum < usual);
        if let Some(row) = self.book.cgroups.get_mut(id).filter(|row| row.quantum != wanted) {
            row.quantum = wanted;
            let quantum_bytes = wanted.unwrap_or(usual);
            effects.push(Effect::SetQuantum { cgroup_id: id, quantum_bytes });
        }
    }

    fn cgroup_found(&mut self, found: &CgroupFound, effects: &mut Vec<Effect>) {
        let before = self.book.cgroups.limit(found.id);
        self.book.cgroup_found(found);
        self.tree_changed();
        if self.book.cgroups.limit(found.id) != before {
            self.adjust_quantum(found.id, effects);
        }
        // One that is at its limit may wait there since before we came.
        if let Some(last) = self.book.cgroups.get(found.id).map(|row| row.last).filter(|_| found.usage_bytes.is_some())
        {
            self.ask_to_watch(found.id, found.boot_ns, &last, effects);
        }
    }

    /// Something was learnt about a process.
    fn learnt(&mut self, key: Option<processes::Key>) {
        if let (Some(recording), Some(key)) = (&mut self.recording, key) {
            recording.observe(&self.book, key);
        }
    }

    /// A parent may have been learnt: processes may turn out to be part of a recording.
    fn tree_changed(&mut self) {
        if let Some(recording) = &mut self.recording {
            recording.rescan_if_reshaped(&self.book);
        }
    }

    fn begin_recording(&mut self, subject: Subject, effects: &mut Vec<Effect>) {
        if self.recording.as_ref().is_some_and(|r| r.subject == subject) {
            return;
        }
        self.end_recording(&Ending { boot_ns: subject.boot_ns, ..Ending::default() }, effects);
        if let Some(id) = subject.cgroup_id
            && self.book.cgroups.get(id).is_none()
        {
            self.book.read(subject.boot_ns, &Reading { cgroup_id: Some(id), ..Reading::default() });
        }
        let base = self.losses.current();
        self.recording = Some(recording::State::begin(subject, &self.book, base));
        self.pin();
    }

    fn end_recording(&mut self, ending: &Ending, effects: &mut Vec<Effect>) {
        self.deliver_points();
        if self.recording.is_some() {
            self.settle(true, effects);
        }
        let Some(recording) = self.recording.take() else { return };
        let scene = self.scene();
        let mine = |id: &String| recording.oom_ids().contains(id);
        let open = self.open.iter().rev().find(|o| o.id.as_ref().is_some_and(mine));
        let oom = open.map(|o| builder::oom(o, &scene));
        let incident = recording.end(ending, oom, &scene);
        effects.push(Effect::Save(Box::new(incident)));
        self.pin();
    }

    fn scene(&self) -> builder::Scene<'_> {
        builder::Scene {
            settings: &self.settings,
            host: &self.host,
            clock: &self.clock,
            book: &self.book,
            losses: &self.losses,
            log: &self.log,
            attribution: &self.attribution,
        }
    }

    /// Cgroups known right below this one.
    pub fn children(&self, cgroup_id: u64) -> impl Iterator<Item = u64> + '_ {
        let below = self.book.cgroups.iter().filter(move |(_, row)| row.parent == Some(cgroup_id) && !row.removed);
        below.map(|(id, _)| id)
    }

    /// Numbers about the engine itself.
    pub fn counts(&self) -> Counts {
        let views = self.open.iter().map(|o| &o.view).chain(self.stuck.iter().map(|s| &s.view));
        let open: usize = views.map(|view| view.curve.memory_estimate() + view.tasks.len() * 128).sum();
        let recording = self.recording.as_ref().map_or(0, recording::State::memory_estimate);
        let memory = self.book.memory_estimate() + self.detectors.memory_estimate() + open + recording;
        let memory = memory + self.sigkills.memory_estimate() + self.attribution.memory_estimate();
        Counts {
            records: self.records.clone(),
            bad_records: self.bad_records,
            unknown_kinds: self.unknown_kinds,
            open_incidents: self.open.len() as u64,
            stuck_cgroups: self.stuck.len() as u64,
            cgroups: self.book.cgroups.len() as u64,
            processes: self.book.processes.len() as u64,
            evictions: self.evictions().iter().sum(),
            memory_estimate_bytes: memory as u64,
        }
    }

    /// Facts that give a fresh engine what this one knows about who is who: for the head of a journal segment, so
    /// that a replay that lost the older ones still knows paths. Applied to this engine they change nothing.
    pub fn preamble(&self, boot_ns: u64) -> Vec<Fact> {
        let mut facts = Vec::new();
        if self.stopped {
            return facts;
        }
        if self.started {
            facts.push(Fact::Start { host: self.host.clone(), settings: self.settings.clone() });
        }
        if let Some(a) = self.clock.anchor {
            facts.push(Fact::Anchor { boot_ns: a.boot_ns, wall_ns: a.wall_ns, uncertainty_ns: a.uncertainty_ns });
        }
        let totals = self.losses.stated();
        if !totals.is_empty() {
            facts.push(Fact::Losses { totals });
        }
        let cgroups = self.book.cgroups.iter().filter(|(_, row)| !row.removed);
        facts.extend(cgroups.filter_map(|(id, row)| {
            Some(Fact::Cgroup(CgroupFound {
                id,
                parent_id: row.parent,
                path: row.path.clone()?,
                boot_ns,
                // No usage: who it is, not a reading.
                usage_bytes: None,
                limit_bytes: row.last.limit.bytes(),
                peak_bytes: row.last.watermark,
            }))
        }));
        let live = self.book.processes.iter().filter(|row| row.exited.is_none());
        facts.extend(live.map(|row| {
            let sums = self.book.sums_of(row).unwrap_or_default();
            Fact::Process(ProcessFound {
                pid: row.pid,
                parent_pid: row.parent_pid,
                start_ticks: row.start_ticks,
                comm: row.comm.clone(),
                cgroup_id: row.cgroup.unwrap_or(0),
                boot_ns,
                anon_bytes: sums.anon,
                file_bytes: sums.file,
                shmem_bytes: sums.shmem,
                swap_bytes: sums.swap,
                peak_bytes: row.peak.unwrap_or(0),
            })
        }));
        facts.extend(self.stuck.iter().flat_map(stuck::Stuck::facts));
        if let Some(r) = &self.recording {
            let s = &r.subject;
            let (cgroup_id, pid, command) = (s.cgroup_id, s.pid, s.command.clone());
            facts.push(Fact::RecordingBegin { cgroup_id, pid, command, boot_ns: s.boot_ns });
        }
        facts
    }
}
