//! The engine: takes each input, gives it to the rooms that need it, and collects their outputs.
//!
//! A record changes the world first, so that the rooms after it see the new state. What an input
//! changed is delivered to open incidents and recordings once, at its end
//! ([`Engine::finish_input`]).

use std::collections::BTreeMap;

use memtrace_common::event as wire;
use memtrace_incident::{Host, Loss};
use serde::Serialize;

use crate::build::recording::{RecordingEnd, RecordingState, RecordingSubject};
use crate::build::{BuildContext, recording};
use crate::clock::Anchor;
use crate::decode::{self, DecodeError, Reading, Record, known};
use crate::growth::Attribution;
use crate::input::{CgroupFound, Fact, Input, Settings};
use crate::limits::Limits;
use crate::oom::OomKills;
use crate::output::{Out, Output, Request};
use crate::run::Run;
use crate::world::{MAX_BEFORE_NS, World};

/// How many times within a window loss totals are remembered. More would state losses of a window
/// more exactly and take more memory.
const LOSS_MOMENTS: u64 = 100;

/// How often the memory of what came and went is given back, nanoseconds.
const TIDY_NS: u64 = 10_000_000_000;

/// What incidents are built from. This is a macro because a method would borrow the whole engine,
/// and callers need its other fields mutably.
macro_rules! context {
    ($engine:expr) => {
        BuildContext { run: &$engine.run, world: &$engine.world, growth: &$engine.growth }
    };
}

/// The engine. The same inputs give the same outputs, byte for byte.
#[derive(Clone, Debug, Default)]
pub struct Engine {
    pub(crate) run: Run,
    pub(crate) started: bool,
    /// The run has ended, so the next start begins with an empty engine.
    pub(crate) stopped: bool,
    records: BTreeMap<&'static str, u64>,
    bad_records: u64,
    unknown_kinds: u64,
    /// Evictions that are counted as losses already, in the order of [`Engine::evictions`].
    evictions_counted: [u64; 6],
    pub(crate) world: World,
    growth: Attribution,
    pub(crate) oom: OomKills,
    pub(crate) limits: Limits,
    pub(crate) recording: Option<RecordingState>,
    /// When memory was given back last, boot clock.
    tidied_ns: u64,
    /// How many outputs of [`Out`] the recording has seen.
    outputs_seen: usize,
    /// The recording's cgroup that is among the pinned ones.
    pinned_recording: Option<u64>,
}

/// Figures about the engine itself, for metrics.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Counts {
    /// Records decoded, by kind.
    pub records: BTreeMap<&'static str, u64>,
    /// Records that are shorter than a header or have the wrong size for their kind.
    pub bad_records: u64,
    /// Records of a kind this build does not know.
    pub unknown_kinds: u64,
    /// OOM incidents whose window is not over.
    pub open_incidents: u64,
    /// Kills that the kernel log has without their cgroup: the kernel limits the rate of that line.
    pub kernel_log_limited: u64,
    /// Cgroups that are stuck at their limit with their OOM killer off.
    pub stuck_cgroups: u64,
    /// Cgroups in the table, with removed ones.
    pub cgroups: u64,
    /// Processes in the table that have not exited.
    pub processes: u64,
    /// Processes in the table that have exited. They are kept for incidents that list them.
    pub dead_processes: u64,
    /// Processes, cgroups, curves, detectors, samples and readings that were dropped or refused at
    /// a cap.
    pub evictions: u64,
    /// Losses since the start of the run by label, of the kernel side, the session and the engine.
    pub losses: BTreeMap<String, u64>,
    /// Estimated memory of the engine.
    pub memory_estimate_bytes: u64,
}

impl Engine {
    /// An empty engine.
    pub fn new() -> Self {
        Self::default()
    }

    /// Applies one input and appends what follows from it to `out`. Bytes that are no record are
    /// counted as a loss.
    pub fn apply(&mut self, input: &Input<'_>, out: &mut Out) {
        match input {
            Input::Record(bytes) => match decode::decode(bytes) {
                Ok(record) => self.apply_record(&record, out),
                Err(error) => self.count_undecoded(error),
            },
            Input::Fact(fact) => {
                self.outputs_seen = out.outputs.len();
                self.fact(fact, out);
                self.finish_input(out);
            }
        }
    }

    /// Like [`Engine::apply`], for a record that is decoded already.
    pub fn apply_record(&mut self, record: &Record, out: &mut Out) {
        self.outputs_seen = out.outputs.len();
        let count = self.records.entry(record.name()).or_default();
        *count = count.saturating_add(1);
        self.record(record, out);
        self.finish_input(out);
    }

    /// Counts bytes that could not be decoded as a record.
    pub fn count_undecoded(&mut self, error: DecodeError) {
        if matches!(error, DecodeError::UnknownKind { .. }) {
            self.unknown_kinds += 1;
            self.run.losses.count(Loss::UnknownRecordKinds, 1);
        } else {
            self.bad_records += 1;
            self.run.losses.count(Loss::BadRecords, 1);
        }
    }

    /// Ends an input. Delivers what it changed to the recording and to open incidents, pins the
    /// cgroups that those refer to, and emits requests for unknown cgroups. All this is derived
    /// here, so no handler has to remember it.
    fn finish_input(&mut self, out: &mut Out) {
        self.follow(out);
        self.oom.input_over();
        self.limits.input_over();
        let pins_changed = self.oom.take_changed() | self.limits.take_changed();
        let recorded = self.recording.as_ref().and_then(RecordingState::cgroup);
        if pins_changed || recorded != self.pinned_recording {
            self.pinned_recording = recorded;
            let ids: Vec<u64> = self.oom.cgroups().chain(self.limits.cgroups()).chain(recorded).collect();
            self.world.cgroups.pinned = ids.into_iter().flat_map(|id| self.world.cgroups.chain(id)).collect();
        }
        self.world.changes.clear();
        out.requests
            .extend(self.world.cgroups.lookups.drain(..).map(|(id, urgent)| Request::LookUpCgroup { id, urgent }));
    }

    fn follow(&mut self, out: &Out) {
        let new_outputs = out.outputs.get(self.outputs_seen..).unwrap_or_default();
        self.outputs_seen = out.outputs.len();
        if let Some(recording) = &mut self.recording {
            recording.follow(&self.world, new_outputs);
        }
        self.oom.follow(&self.world);
        self.limits.follow(&self.world);
    }

    fn record(&mut self, record: &Record, out: &mut Out) {
        match record {
            Record::Rss(r) => {
                self.world.rss(r);
                self.growth.rss(r);
                self.check_limits(r.header.boot_ns, &Reading::from(&r.memcg), out);
            }
            Record::Charge(r) => self.reading(r.header.boot_ns, &Reading::from(&r.memcg), out),
            Record::Reclaim(r) => {
                self.reading(r.header.boot_ns, &Reading::from(&r.memcg), out);
                self.limits.reclaim(r, &mut self.world, &self.run, out);
            }
            Record::Mapping(r) => self.world.mapping(r),
            Record::Kill(r) => {
                self.oom.kill(r, &self.world, &mut self.run);
                self.oom.report(false, &self.world, &self.run, out);
            }
            Record::OomVictim(m) => self.mark(m, out),
            Record::OomDecision(r) => self.oom.decision(r, &self.world, &self.run),
            Record::Fork(r) => self.world.fork(r),
            Record::Exec(r) => self.world.exec(r),
            Record::Exit(r) => {
                self.world.exit(r);
                self.oom.victim_exited((r.task.tgid, r.task.start_boot_ns), r.header.boot_ns);
                if known(r.memcg.usage_bytes).is_some() {
                    self.reading(r.header.boot_ns, &Reading::from(&r.memcg), out);
                }
            }
            Record::MmGone(r) => {
                self.world.mm_gone(r);
                self.growth.mm_gone(r);
            }
            Record::Attach(r) => self.world.attach(r),
            Record::Cgroup(r) => {
                self.world.cgroup_change(r);
                if r.change == wire::CGROUP_REMOVED {
                    self.limits.unstuck(r.memcg.cgroup_id, r.header.boot_ns);
                }
                self.check_limits(r.header.boot_ns, &Reading::from(&r.memcg), out);
            }
            // The addresses are of no use here; the names come as a fact.
            Record::KernelStack(_) => {}
        }
    }

    fn fact(&mut self, fact: &Fact, out: &mut Out) {
        match fact {
            Fact::Start { host, settings } => self.start(host, settings, out),
            Fact::Anchor { boot_ns, wall_ns, uncertainty_ns } => {
                let anchor = Anchor { boot_ns: *boot_ns, wall_ns: *wall_ns, uncertainty_ns: *uncertainty_ns };
                self.run.clock.anchor = Some(anchor);
            }
            Fact::Cgroup(found) => self.cgroup_found(found, out),
            Fact::Process(found) => self.world.process_found(found),
            Fact::KernelLog(line) => self.oom.kernel_log_line(line, &self.world, &self.run),
            Fact::KernelStack { victim_pid, victim_start_boot_ns, functions } => {
                self.oom.kernel_stack((*victim_pid, *victim_start_boot_ns), functions);
            }
            Fact::Module(found) => self.growth.module(found),
            Fact::Path(found) => self.growth.path(found),
            Fact::Stack(found) => self.growth.stack(found),
            // Totals before the first tick come from a preamble: earlier segments have counted
            // them.
            Fact::Losses { totals } => self.run.losses.record_totals(totals, self.run.now == 0),
            Fact::OomControl { cgroup_id, boot_ns, kill_disabled, under_oom } => {
                let state = (*kill_disabled, *under_oom);
                if self.limits.oom_control(*cgroup_id, *boot_ns, state, &mut self.world, &mut self.run) {
                    self.limits.open_stuck(*cgroup_id, *boot_ns, &context!(self), out);
                }
            }
            Fact::Tick { boot_ns } => {
                self.oom.kernel_log_was_read(self.run.now.max(*boot_ns));
                self.tick(*boot_ns, out);
            }
            Fact::RecordingBegin { cgroup_id, pid, command, boot_ns } => {
                let subject =
                    RecordingSubject { cgroup_id: *cgroup_id, pid: *pid, command: command.clone(), boot_ns: *boot_ns };
                self.begin_recording(subject, out);
            }
            Fact::RecordingEnd { boot_ns, exit_code, signal, cgroup_peak_bytes } => {
                let end = RecordingEnd {
                    boot_ns: *boot_ns,
                    exit_code: *exit_code,
                    signal: *signal,
                    cgroup_peak_bytes: *cgroup_peak_bytes,
                };
                self.end_recording(&end, out);
            }
            Fact::Stop { boot_ns } => self.stop(*boot_ns, out),
        }
    }

    /// Starts a run. After a stop or on another boot the engine is emptied first. Otherwise it
    /// keeps its state, because a preamble repeats the start of its own run.
    fn start(&mut self, host: &Host, settings: &Settings, out: &mut Out) {
        if self.started && (self.stopped || self.run.host.boot_id != host.boot_id) {
            self.stop(self.run.now, out);
            let (records, bad, unknown) = (std::mem::take(&mut self.records), self.bad_records, self.unknown_kinds);
            *self = Self { records, bad_records: bad, unknown_kinds: unknown, ..Self::default() };
        }
        self.started = true;
        self.run.host = host.clone();
        self.run.settings = settings.clone();
        self.run.settings.before_ns = settings.before_ns.min(MAX_BEFORE_NS);
        self.world.configure(settings);
    }

    fn stop(&mut self, boot_ns: u64, out: &mut Out) {
        self.tick(boot_ns, out);
        self.close_incidents(true, out);
        self.oom.report_sigkills(true, &self.world, &mut self.run, out);
        self.end_recording(&RecordingEnd { boot_ns: self.run.now, ..RecordingEnd::default() }, out);
        self.stopped = true;
    }

    fn tick(&mut self, boot_ns: u64, out: &mut Out) {
        let now = self.run.now.max(boot_ns);
        self.run.now = now;
        self.world.tick(now);
        let recorded = self.recording.as_ref().map(|recording| recording.subject.boot_ns);
        self.growth.tick(now, self.run.settings.before_ns, recorded);
        self.count_evictions();
        self.run.losses.remember(now, self.run.settings.before_ns / LOSS_MOMENTS);
        self.close_incidents(false, out);
        self.oom.report_sigkills(false, &self.world, &mut self.run, out);
        self.oom.tick(&self.run, out);
        let context = context!(self);
        self.limits.report_found(&context, out);
        if now.saturating_sub(self.tidied_ns) >= TIDY_NS {
            self.tidied_ns = now;
            self.growth.tidy();
            self.world.tidy(now);
        }
    }

    /// Closes incidents whose window is over; with `all`, every incident.
    fn close_incidents(&mut self, all: bool, out: &mut Out) {
        self.oom.add_sharers(all, &mut self.world, &self.run);
        let context = context!(self);
        self.oom.close_due(all, &context, out);
        self.limits.close_stuck(all, &context, out);
    }

    fn count_evictions(&mut self) {
        let now = self.evictions();
        let losses = [
            Loss::ProcessesEvicted,
            Loss::CgroupsEvicted,
            Loss::CgroupsOverCap,
            Loss::CurvesDropped,
            Loss::DetectorsRefused,
            Loss::GrowthDropped,
        ];
        for ((loss, total), counted) in losses.into_iter().zip(now).zip(self.evictions_counted) {
            self.run.losses.count(loss, total.saturating_sub(counted));
        }
        self.evictions_counted = now;
    }

    fn evictions(&self) -> [u64; 6] {
        let cgroups = &self.world.cgroups;
        [
            self.world.processes.evicted,
            cgroups.evicted,
            cgroups.over_cap,
            cgroups.curves_dropped,
            self.limits.refused(),
            self.growth.dropped,
        ]
    }

    /// Adds a reading to the curve of its cgroup and checks it against the limits.
    fn reading(&mut self, boot_ns: u64, reading: &Reading, out: &mut Out) {
        self.world.read(boot_ns, reading);
        self.check_limits(boot_ns, reading, out);
    }

    /// Checks a reading that is on the curve against the limits.
    fn check_limits(&mut self, boot_ns: u64, reading: &Reading, out: &mut Out) {
        self.limits.reading(boot_ns, reading, &mut self.world, &self.run, out);
    }

    /// The OOM killer marked a victim. The record has readings of up to three cgroups.
    fn mark(&mut self, m: &wire::OomVictim, out: &mut Out) {
        let readings = [&m.victim_memcg, &m.trigger_memcg, &m.oom].map(Reading::from);
        self.world.keep(readings.iter().filter_map(|reading| reading.cgroup_id), m.header.boot_ns);
        self.world.mark(m);
        self.oom.mark(m, &context!(self), out);
        let mut read = Vec::with_capacity(3);
        for reading in readings {
            if !read.contains(&reading.cgroup_id) {
                read.push(reading.cgroup_id);
                self.reading(m.header.boot_ns, &reading, out);
            }
        }
        self.limits.explained_by(m, &self.world);
        self.oom.report(false, &self.world, &self.run, out);
    }

    fn cgroup_found(&mut self, found: &CgroupFound, out: &mut Out) {
        let before = self.world.cgroups.limit(found.id);
        self.world.cgroup_found(found);
        self.limits.cgroup_found(found, before, &mut self.world, &self.run, out);
    }

    fn begin_recording(&mut self, subject: RecordingSubject, out: &mut Out) {
        if self.recording.as_ref().is_some_and(|r| r.subject == subject) {
            return;
        }
        self.end_recording(&RecordingEnd { boot_ns: subject.boot_ns, ..RecordingEnd::default() }, out);
        if let Some(id) = subject.cgroup_id
            && self.world.cgroups.get(id).is_none()
        {
            self.world.keep([id], subject.boot_ns);
            self.world.read(subject.boot_ns, &Reading { cgroup_id: Some(id), ..Reading::default() });
        }
        let base = self.run.losses.current();
        self.recording = Some(RecordingState::begin(subject, &self.world, base));
    }

    fn end_recording(&mut self, end: &RecordingEnd, out: &mut Out) {
        if self.recording.is_none() {
            return;
        }
        // The recording includes what this input changed, and kills that still wait for a late
        // record.
        self.oom.add_sharers(true, &mut self.world, &self.run);
        self.oom.report(true, &self.world, &self.run, out);
        self.follow(out);
        let Some(recording) = self.recording.take() else { return };
        let context = context!(self);
        let oom = self.oom.latest_of(recording.oom_ids(), &context);
        out.outputs.push(Output::Save(Box::new(recording::finish(recording, end, oom, &context))));
    }

    /// kernfs ids of the known children of a cgroup, without removed ones.
    pub fn children(&self, cgroup_id: u64) -> impl Iterator<Item = u64> + '_ {
        let below = self.world.cgroups.iter().filter(move |(_, row)| row.parent == Some(cgroup_id) && !row.removed);
        below.map(|(id, _)| id)
    }

    /// Figures about the engine itself. Walks all tables for the memory estimate.
    pub fn counts(&self) -> Counts {
        let recording = self.recording.as_ref().map_or(0, RecordingState::memory_estimate);
        let rooms = [
            self.world.memory_estimate(),
            self.growth.memory_estimate(),
            self.oom.memory_estimate(),
            self.limits.memory_estimate(),
        ];
        Counts {
            records: self.records.clone(),
            bad_records: self.bad_records,
            unknown_kinds: self.unknown_kinds,
            open_incidents: self.oom.open_incidents() as u64,
            kernel_log_limited: self.oom.log_limited(),
            stuck_cgroups: self.limits.stuck_cgroups() as u64,
            cgroups: self.world.cgroups.len() as u64,
            processes: self.world.processes.live() as u64,
            dead_processes: self.world.processes.dead() as u64,
            evictions: self.evictions().iter().sum(),
            losses: self.run.losses.current(),
            memory_estimate_bytes: (rooms.iter().sum::<usize>() + recording) as u64,
        }
    }
}
