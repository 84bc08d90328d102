//! One run of tracing. The agent and `memtrace record` each have one.
//!
//! [`Session::step`] is the loop: wait for a ring or for the tick of 100 ms, then drain the rings
//! in batches, in order of time. Each record goes to the journal, to the engine, and is shown to
//! the stacks. Then the session carries out the engine's requests (look up a cgroup, watch a limit,
//! set a threshold) and returns its outputs, which are for disk and log, to the caller. What the
//! session itself finds out becomes a [`Fact`], and goes the same way: journal, then engine.

use std::time::Duration;

use anyhow::Context;
use memtrace_engine::decode::decode;
use memtrace_engine::input::{Fact, Input, KernelLogEvent, KernelLogLine, Settings};
use memtrace_engine::output::{Output, Request};
use memtrace_engine::{Engine, Out};
use memtrace_incident::Loss;
use tracing::{debug, info, warn};

use crate::cgroup::hierarchy::{Hierarchy, Membership};
use crate::cgroup::queries::CgroupQueries;
use crate::clock::{self, Ticker};
use crate::host;
use crate::kernel::hooks::Hook;
use crate::kernel::log;
use crate::kernel::probe::Probe;
use crate::kernel::status::Status;
use crate::proc::proc_scan;
use crate::stacks::sampling_rate::StackCost;
use crate::store::journal;

mod capabilities;
mod config;
mod followed;
mod stack_pipeline;
mod stack_worker;

pub use capabilities::{Capabilities, attach, detect};
pub use config::{JournalConfig, SessionConfig};
use stack_pipeline::StackPipeline;
pub use stack_worker::{ModuleFile, WorkerHealth};

/// How often time passes for the engine, and rings are drained that did not wake the session.
const TICK: Duration = Duration::from_millis(100);
/// Ticks between two readings of the loss counters.
const TICKS_PER_LOSSES: u32 = 10;
/// Ticks between two anchors of the wall clock.
const TICKS_PER_ANCHOR: u32 = 100;
/// Batches drained in one turn.
const BATCHES_PER_TURN: usize = 8;
/// Cgroups read before the start is over, which takes some tens of milliseconds. If there are more,
/// the rest is read beside the loop: cgroups with processes come first that way.
const CGROUPS_AT_START: usize = 1024;
/// Processes read at start between two drains of the rings.
const DRAIN_EVERY: usize = 256;
/// Segments that the journal's size is divided into.
const JOURNAL_SEGMENTS: u64 = 8;

/// A running tracer.
pub struct Session {
    probe: Probe,
    engine: Engine,
    hierarchy: Hierarchy,
    status: Status,
    journal: Option<journal::JournalWriter>,
    journal_failures: u64,
    kernel_log: Option<log::KmsgReader>,
    queries: CgroupQueries,
    stacks: StackPipeline,
    /// Somebody will ask for the functions of saved incidents.
    wait_for_names: bool,
    ticker: Ticker,
    ticks: u32,
    /// When the hooks were attached, and until when every source was read, boot clock.
    watching_since_ns: u64,
    watched_until_ns: u64,
    /// A tick was put off for a kill.
    tick_owed: bool,
    losses: Vec<(String, u64)>,
    out: Out,
}

impl Session {
    /// Detects what the kernel allows, attaches, and reports what already runs to the engine.
    ///
    /// Must run inside a tokio runtime. [`crate::error::CommandError::Unsupported`]: this kernel or
    /// these privileges cannot do it.
    pub fn start(config: &SessionConfig) -> anyhow::Result<Self> {
        let (hierarchy, probe, status) = attach(detect(config.btf.as_deref()), config)?;
        let watching_since_ns = clock::boot_ns();
        let stacks = StackPipeline::new(&probe, config.sample_interval_bytes, config.stack_budget_ppm)?;
        let kernel_log = match config.kernel_log.then(log::KmsgReader::open) {
            None => None,
            Some(Ok(reader)) => Some(reader),
            Some(Err(error)) => {
                warn!("kernel log: {error:#}; kills are not cross-checked");
                None
            }
        };
        let journal = match &config.journal {
            None => None,
            Some(JournalConfig { dir, bytes }) => Some(
                journal::JournalWriter::open(dir, (bytes / JOURNAL_SEGMENTS).max(1 << 18), *bytes)
                    .with_context(|| format!("failed to open the journal in {}", dir.display()))?,
            ),
        };
        let mut session = Self {
            probe,
            engine: Engine::new(),
            hierarchy,
            status,
            journal,
            journal_failures: 0,
            kernel_log,
            queries: CgroupQueries::default(),
            stacks,
            wait_for_names: false,
            ticker: Ticker::every(TICK).context("failed to make a timer")?,
            ticks: 0,
            watching_since_ns,
            watched_until_ns: watching_since_ns,
            tick_owed: false,
            losses: Vec::new(),
            out: Out::default(),
        };
        session.begin(config);
        Ok(session)
    }

    /// Gives the engine its settings, and the cgroups and processes that are there already. The
    /// hooks are attached, so nothing is missed in between.
    fn begin(&mut self, config: &SessionConfig) {
        let settings = Settings {
            before_ns: config.before_ns,
            after_ns: config.after_ns,
            rss_threshold_bytes: config.rss_threshold_bytes,
            cgroup_version: self.hierarchy.version,
            ticks_per_second: rustix::param::clock_ticks_per_second(),
            kernel_log: self.kernel_log.is_some(),
            kills_seen: self.status.on(Hook::Kill),
            stalls_seen: self.status.on(Hook::ReclaimEnd),
            degraded: self.status.degraded(),
            spikes: config.spikes,
            near_misses: config.near_misses,
            sample_bytes: if config.stack_budget_ppm == 0 { 0 } else { config.sample_interval_bytes },
        };
        self.feed(Fact::Start { host: host::describe(), settings });
        self.feed(clock::anchor());
        let walk = self.hierarchy.walk(clock::boot_ns(), CGROUPS_AT_START);
        if walk.truncated {
            self.queries.list();
        }
        for cgroup in walk.found {
            self.feed(Fact::Cgroup(cgroup));
        }
        self.scan_processes();
        self.flush_journal();
    }

    fn scan_processes(&mut self) {
        let (pids, left_out) = proc_scan::pids().unwrap_or_else(|error| {
            warn!("{error:#}; processes are followed from their next change on");
            Default::default()
        });
        if left_out > 0 {
            warn!(left_out, "more processes than are followed");
        }
        for (number, pid) in pids.into_iter().enumerate() {
            // The rings fill while this reads: a long list must not let them overflow.
            if number % DRAIN_EVERY == 0 {
                while self.drain_batch() {}
            }
            let cgroup_id = match self.hierarchy.membership(pid) {
                Membership::Path(path) => self.hierarchy.id_of(path),
                // The next record of the process says in which one it is.
                Membership::TooLong => Some(0),
                Membership::None => None,
            };
            let Some(cgroup_id) = cgroup_id else { continue };
            if let Some(found) = proc_scan::read_process(pid, cgroup_id, clock::boot_ns()) {
                self.feed(Fact::Process(found));
            }
        }
    }

    /// Gives the engine one fact, after the journal has it.
    pub fn feed(&mut self, fact: Fact) {
        let input = Input::Fact(fact);
        self.append_to_journal(&input);
        self.engine.apply(&input, &mut self.out);
    }

    /// Waits for something to happen, and returns what the caller has to do about it.
    pub async fn step(&mut self) -> Vec<Output> {
        if self.tick_owed {
            return self.pump(true);
        }
        if self.stacks.has_backlog() {
            // Signals and HTTP requests get their turn in between.
            tokio::task::yield_now().await;
            return self.pump(false);
        }
        let mut tick = false;
        tokio::select! {
            () = self.probe.ready() => {}
            () = self.stacks.ready() => {}
            () = self.ticker.tick() => tick = true,
        }
        self.pump(tick)
    }

    /// One turn of the loop: drains the rings, lets time pass if this is a `tick`, and returns what
    /// the caller has to do.
    ///
    /// A kill is returned before anything that takes longer: the tick that it came with is made up
    /// for in the next turn.
    pub fn pump(&mut self, tick: bool) -> Vec<Output> {
        // Read before the rings: a tick tells the engine that it has seen everything up to here.
        let now = clock::boot_ns();
        // The journal is flushed batch by batch: what it has survives kill -9. A storm that outruns
        // this loop goes on in the next turn: signals and HTTP requests get theirs.
        for _ in 0..BATCHES_PER_TURN {
            let more = self.drain_batch();
            self.flush_journal();
            if !more {
                break;
            }
        }
        let killed = self.out.outputs.iter().any(|output| matches!(output, Output::Kill(_)));
        if tick && killed && !self.tick_owed {
            self.tick_owed = true;
        } else if tick {
            self.tick_owed = false;
            self.tick(now);
        }
        if !killed {
            self.report_stacks();
        }
        self.carry_out_requests();
        self.flush_journal();
        std::mem::take(&mut self.out.outputs)
    }

    /// Drains one batch, merged from the rings by time; true if more is waiting. A record is
    /// decoded once, for the stacks and the engine; the journal has its bytes.
    fn drain_batch(&mut self) -> bool {
        let Self { probe, engine, journal, journal_failures, stacks, out, .. } = self;
        let (records, more) = probe.drain();
        for (_, bytes) in records {
            append(journal, journal_failures, engine, &Input::Record(bytes));
            match decode(bytes) {
                Ok(record) => {
                    stacks.observe(&record);
                    engine.apply_record(&record, out);
                }
                Err(error) => engine.count_undecoded(error),
            }
        }
        stacks.follow_new_cgroups(probe, engine);
        more
    }

    /// Lets time pass: reports what the other sources have, and then the time.
    fn tick(&mut self, now: u64) {
        self.ticks = self.ticks.wrapping_add(1);
        self.read_kernel_log();
        if self.ticks.is_multiple_of(TICKS_PER_ANCHOR) {
            self.feed(clock::anchor());
        }
        if self.ticks.is_multiple_of(TICKS_PER_LOSSES) {
            self.read_losses();
            self.stacks.wait_for_names(self.wait_for_names || self.engine.counts().open_incidents > 0);
            self.stacks.maintain(&mut self.probe, now);
        }
        self.stacks.check();
        for fact in self.queries.answer(&self.hierarchy, clock::boot_ns()) {
            self.feed(fact);
        }
        self.feed(Fact::Tick { boot_ns: now });
        self.watched_until_ns = now;
    }

    fn read_kernel_log(&mut self) {
        let lines = match self.kernel_log.as_mut().map(|reader| reader.read_available(clock::boot_ns)) {
            Some(Ok(lines)) => lines,
            Some(Err(error)) => {
                warn!("kernel log: {error:#}; kills are not cross-checked from here on");
                self.kernel_log = None;
                let line = KernelLogEvent::Unreadable;
                vec![KernelLogLine { printk_ns: 0, read_boot_ns: clock::boot_ns(), line }]
            }
            None => Vec::new(),
        };
        for line in lines {
            self.feed(Fact::KernelLog(line));
        }
    }

    fn read_losses(&mut self) {
        self.probe.pass_messages();
        let mut totals = self.probe.losses();
        let journal_lost = self.journal.as_ref().map_or(0, journal::JournalWriter::lost);
        if journal_lost > 0 {
            totals.push((Loss::JournalNotWritten.label().to_owned(), journal_lost));
        }
        let refused = self.queries.not_watched();
        if refused > 0 {
            totals.push((Loss::CgroupNotWatched.label().to_owned(), refused));
        }
        totals.extend(self.stacks.losses(&self.probe));
        if totals != self.losses {
            self.losses.clone_from(&totals);
            self.feed(Fact::Losses { totals });
        }
    }

    fn report_stacks(&mut self) {
        let segment = self.journal.as_ref().map_or(0, journal::JournalWriter::next_segment);
        let begin = clock::cpu_time();
        for fact in self.stacks.take_facts(&mut self.probe, segment) {
            self.feed(fact);
        }
        self.stacks.add_cost(clock::cpu_time().saturating_sub(begin));
    }

    /// Carries out what the engine requests: thresholds at once, look-ups on another thread, watches with the next tick.
    fn carry_out_requests(&mut self) {
        for request in self.out.requests.drain(..) {
            match request {
                Request::LookUpCgroup { id, urgent } => self.queries.look_up(id, urgent),
                Request::WatchOomControl { cgroup_id } => self.queries.watch(cgroup_id, clock::boot_ns()),
                Request::SetRssThreshold { cgroup_id, threshold_bytes } => {
                    if let Err(error) = self.probe.set_rss_threshold(cgroup_id, threshold_bytes) {
                        debug!("RSS threshold of cgroup {cgroup_id}: {error}");
                    }
                }
            }
        }
        self.queries.pass_lookups(&self.hierarchy);
    }

    fn append_to_journal(&mut self, input: &Input<'_>) {
        append(&mut self.journal, &mut self.journal_failures, &self.engine, input);
    }

    fn flush_journal(&mut self) {
        if let Some(journal) = &mut self.journal
            && let Err(error) = journal.flush()
        {
            self.journal_failures = self.journal_failures.saturating_add(1);
            debug!("journal: {error}");
        }
    }

    /// Brings the engine up to date with everything that has happened: before something ends that
    /// must be reported in full.
    pub fn catch_up(&mut self) {
        let now = clock::boot_ns();
        while self.drain_batch() {}
        let deadline = self.stacks.ask_for_all();
        loop {
            let all = self.stacks.await_all(deadline);
            while self.stacks.has_backlog() {
                self.report_stacks();
            }
            if all {
                break;
            }
        }
        self.read_losses();
        self.read_kernel_log();
        self.feed(Fact::Tick { boot_ns: now });
        self.watched_until_ns = now;
    }

    /// Ends the run: drains the rings, closes every incident, and logs what was lost. Nothing but
    /// [`Session::modules`] may be called after it.
    pub fn stop(&mut self) -> Vec<Output> {
        let mut outputs = self.pump(true);
        self.catch_up();
        self.feed(Fact::Stop { boot_ns: clock::boot_ns() });
        outputs.append(&mut self.pump(false));
        if self.losses.is_empty() {
            info!("stopped; nothing was lost");
        }
        for (what, count) in &self.losses {
            warn!("stopped; lost {what}: {count}");
        }
        outputs
    }

    /// Takes stacks of the processes in this cgroup and in all below it, present and future: for a
    /// run whose [`SessionConfig::sample_all`] is false.
    pub fn sample(&mut self, cgroup_id: u64) {
        self.stacks.sample(cgroup_id, &mut self.probe, &self.engine);
    }

    /// Stacks unwound, and what stacks have cost since the start.
    pub fn stack_cost(&self) -> (u64, StackCost) {
        self.stacks.cost(&self.probe)
    }

    /// Asks for the files of these modules, as path and build id: functions are named from them.
    /// [`Session::take_modules`] has them later.
    pub fn ask_for_modules(&mut self, wanted: Vec<(String, Option<String>)>) {
        self.stacks.ask_for_modules(wanted);
    }

    /// The files that were asked for, of those that are still open; `None` while they are not there.
    pub fn take_modules(&mut self) -> Option<Vec<ModuleFile>> {
        self.stacks.take_modules()
    }

    /// The files of these modules. Waits a few seconds at most: for a run that ends.
    pub fn modules(&mut self, wanted: Vec<(String, Option<String>)>) -> Vec<ModuleFile> {
        self.stacks.modules(wanted)
    }

    /// Whether functions of saved incidents are still to be named: files of programs that have ended
    /// stay open a little longer.
    pub fn wait_for_names(&mut self, wait: bool) {
        self.wait_for_names = wait;
    }

    /// Keeps files of programs that have ended open to the end of the run: for a recording.
    pub fn keep_files(&mut self) {
        self.stacks.keep_files();
    }

    /// How the stack worker is doing.
    pub fn worker_health(&self) -> WorkerHealth {
        self.stacks.worker_health()
    }

    /// Gives memory back that a storm took and nothing uses.
    pub fn give_memory_back(&mut self) {
        self.probe.give_memory_back();
        self.stacks.give_memory_back();
        self.out.outputs.shrink_to_fit();
        self.out.requests.shrink_to_fit();
    }

    /// The engine, for its counts and its snapshot.
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// Which hooks are attached, and what is missing without the others.
    pub fn status(&self) -> &Status {
        &self.status
    }

    /// The hierarchy of the memory controller.
    pub fn hierarchy(&self) -> &Hierarchy {
        &self.hierarchy
    }

    /// The loaded programs, for their counters.
    pub fn probe(&self) -> &Probe {
        &self.probe
    }

    /// When all hooks were attached, boot clock, nanoseconds.
    pub fn watching_since_ns(&self) -> u64 {
        self.watching_since_ns
    }

    /// Until when every source was read, boot clock, nanoseconds.
    pub fn watched_until_ns(&self) -> u64 {
        self.watched_until_ns
    }

    /// Number of the kernel log's next record; `None` while none was read, and when the log is not.
    pub fn kernel_log_seq(&self) -> Option<u64> {
        self.kernel_log.as_ref().and_then(log::KmsgReader::next_seq)
    }

    /// Journal frames that could not be written, since the start.
    pub fn journal_failures(&self) -> u64 {
        self.journal_failures
    }
}

/// Appends an input to the journal before the engine sees it. A failure is counted, never fatal.
fn append(journal: &mut Option<journal::JournalWriter>, failures: &mut u64, engine: &Engine, input: &Input<'_>) {
    let Some(journal) = journal else { return };
    let begun =
        if journal.rotate_needed() { journal.begin_segment(&engine.preamble(clock::boot_ns())) } else { Ok(()) };
    if begun.and_then(|()| journal.append(input)).is_err() {
        *failures = failures.saturating_add(1);
    }
}
