//! One run of the tracer: kernel, kernel log and stock in, outputs out. The agent and `record` both are one.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use memtrace_common::control::{Control, MAX_CPUS};
use memtrace_common::layout::{ABSENT, KernelLayout};
use tracing::{debug, info, warn};

use crate::cgroup::hierarchy::{CgroupError, Hierarchy};
use crate::cgroup::queries::CgroupQueries;
use crate::clock::{self, Ticker};
use crate::error::CommandError;
use crate::host;
use crate::kernel::hooks::Hook;
use crate::kernel::probe::{self, Probe};
use crate::kernel::status::Status;
use crate::kernel::support::{KernelFacts, MemoryController, plan};
use crate::kernel::{facts, log, object};
use crate::process::budget::{Cost, Steps};
use crate::process::known::Processes;
use crate::process::modules::OpenModule;
use crate::process::stacks::Stacks;
use crate::process::stock;
use crate::store::journal;
use memtrace_engine::Engine;
use memtrace_engine::Out;
use memtrace_engine::input::{Fact, Input, Settings};
use memtrace_engine::output::{Output, Request};

/// How often time passes for the engine and the rings that do not wake are drained.
const TICK: Duration = Duration::from_millis(100);
/// Ticks between two readings of the loss counters.
const TICKS_PER_LOSSES: u32 = 10;
/// Ticks between two anchors of the wall clock.
const TICKS_PER_ANCHOR: u32 = 100;
/// Batches out of the rings in one turn.
const BATCHES_PER_TURN: usize = 8;
/// Processes taken stock of between two looks at the rings.
const DRAIN_EVERY: usize = 256;
/// Bytes of user stack copied at first, where it is that deep: enough for most; userspace asks for more where it is not.
const STACK_COPY_BYTES: u32 = 32 << 10;
/// The step of cgroups that stacks are not taken of: more than any process grows.
const NEVER_BYTES: u64 = 1 << 50;
/// THREAD_SIZE of x86_64 and aarch64 with 4 KiB pages. A kernel with another one (KASAN) that has no bpf_task_pt_regs
/// either is told by what it finds there.
const THREAD_BYTES: u32 = 16 << 10;
/// Segments the journal's size is cut into.
const JOURNAL_SEGMENTS: u64 = 8;

mod options;
mod sampling;

pub use options::Options;

/// A running tracer.
pub struct Session {
    probe: Probe,
    engine: Engine,
    hierarchy: Hierarchy,
    status: Status,
    journal: Option<journal::Writer>,
    kernel_log: Option<log::KmsgReader>,
    ticker: Ticker,
    ticks: u32,
    /// A tick that made way for a kill.
    owed: bool,
    queries: CgroupQueries,
    losses: Vec<(String, u64)>,
    stacks: Stacks,
    /// The stacks ring holds more than was taken in the last turn.
    stacks_owed: bool,
    steps: Steps,
    /// Stacks whose cost the kernel side has been told.
    unwound: u64,
    /// Cgroups whose stacks are taken, where not all are; with what is made in them.
    sampled: BTreeSet<u64>,
    /// Cgroups made in those, to be sampled too.
    made: Vec<u64>,
    /// When the steps were looked at last, boot clock.
    steps_ns: u64,
    /// The segment of the journal that has what stacks are made of.
    stated_segment: u64,
    journal_failures: u64,
    out: Out,
}

impl Session {
    /// Finds out what the kernel allows, loads and attaches, takes stock of what already runs.
    ///
    /// Must run inside a tokio runtime. What this kernel or these privileges cannot do is a
    /// [`CommandError::Unsupported`].
    pub fn start(options: &Options) -> anyhow::Result<Self> {
        let (hierarchy, probe, status) = attach(survey(options.btf.as_deref()), options)?;
        let kernel_log = match options.kernel_log.then(log::KmsgReader::open) {
            None => None,
            Some(Ok(reader)) => Some(reader),
            Some(Err(error)) => {
                warn!("kernel log: {error:#}; kills are not cross-checked");
                None
            }
        };
        let journal = match &options.journal {
            None => None,
            Some((dir, bytes)) => Some(
                journal::Writer::open(dir, (bytes / JOURNAL_SEGMENTS).max(1 << 18), *bytes)
                    .with_context(|| format!("failed to open the journal in {}", dir.display()))?,
            ),
        };
        let ticker = Ticker::every(TICK).context("failed to make a timer")?;
        let mut session = Self {
            probe,
            engine: Engine::new(),
            hierarchy,
            status,
            journal,
            kernel_log,
            ticker,
            ticks: 0,
            owed: false,
            queries: CgroupQueries::default(),
            losses: Vec::new(),
            stacks: Stacks::new(Processes::default()),
            stacks_owed: false,
            steps: Steps::new(options.sample_bytes, options.stack_budget_ppm),
            unwound: 0,
            sampled: BTreeSet::new(),
            made: Vec::new(),
            steps_ns: clock::boot_ns(),
            stated_segment: 0,
            journal_failures: 0,
            out: Out::default(),
        };
        session.take_stock(options);
        Ok(session)
    }

    /// Tells the engine where it is and what already runs. The hooks are on: nothing falls between.
    fn take_stock(&mut self, options: &Options) {
        let settings = Settings {
            before_ns: options.before_ns,
            after_ns: options.after_ns,
            rss_threshold_bytes: options.quantum_bytes,
            cgroup_version: self.hierarchy.version,
            ticks_per_second: rustix::param::clock_ticks_per_second(),
            kernel_log: self.kernel_log.is_some(),
            kills_seen: self.status.on(Hook::Kill),
            stalls_seen: self.status.on(Hook::ReclaimEnd),
            degraded: self.status.degraded(),
            spikes: options.spikes,
            near_misses: options.near_misses,
            sample_bytes: if options.stack_budget_ppm == 0 { 0 } else { options.sample_bytes },
        };
        self.feed(Fact::Start { host: host::describe(), settings });
        self.feed(clock::anchor());
        let walk = self.hierarchy.walk(clock::boot_ns());
        if walk.truncated {
            warn!("more memory cgroups than are listed at start; the rest is looked up when it moves");
        }
        for cgroup in walk.found {
            self.feed(Fact::Cgroup(cgroup));
        }
        let (pids, left_out) = stock::pids().unwrap_or_else(|error| {
            warn!("{error:#}; processes are followed from their next change on");
            Default::default()
        });
        if left_out > 0 {
            warn!(left_out, "more processes than are followed");
        }
        for (number, pid) in pids.into_iter().enumerate() {
            // The hooks are on: a long list must not let the rings run full.
            if number % DRAIN_EVERY == 0 {
                while self.drain() {}
            }
            let Some(cgroup_id) = self.hierarchy.id_of_process(pid) else { continue };
            if let Some(found) = stock::one(pid, cgroup_id, clock::boot_ns()) {
                self.feed(Fact::Process(found));
            }
        }
        self.flush_journal();
    }

    /// Gives the engine one fact, journalled before.
    pub fn feed(&mut self, fact: Fact) {
        let input = Input::Fact(fact);
        record(&mut self.journal, &mut self.journal_failures, &self.engine, &input);
        self.engine.apply(&input, &mut self.out);
    }

    /// Waits for something to happen and gives back what is to be done about it.
    pub async fn step(&mut self) -> Vec<Output> {
        if self.owed {
            return self.pump(true);
        }
        if self.stacks_owed {
            // Signals and queries get their turn in between.
            tokio::task::yield_now().await;
            return self.pump(false);
        }
        let mut tick = false;
        tokio::select! {
            () = self.probe.ready() => {}
            () = self.ticker.tick() => tick = true,
        }
        self.pump(tick)
    }

    /// Drains everything there is, lets time pass, gives back what is to be done about it.
    ///
    /// A kill is given back before anything that takes longer: a tick it came with is made up for at the next turn.
    pub fn pump(&mut self, tick: bool) -> Vec<Output> {
        // Before the rings are read: the engine takes a tick for "everything up to here has been seen".
        let now = clock::boot_ns();
        // Batch by batch into the journal: what is there survives a kill -9.
        // A storm that outruns us goes on in the next turn: signals and queries get theirs.
        for _ in 0..BATCHES_PER_TURN {
            let more = self.drain();
            self.flush_journal();
            if !more {
                break;
            }
        }
        self.drain_stacks();
        let killed = self.out.outputs.iter().any(|output| matches!(output, Output::Kill(_)));
        if tick && killed && !self.owed {
            self.owed = true;
        } else if tick {
            self.owed = false;
            self.tick(now);
        }
        self.carry_out_requests();
        self.flush_journal();
        std::mem::take(&mut self.out.outputs)
    }

    /// One batch out of the rings; whether more is waiting.
    fn drain(&mut self) -> bool {
        let (records, more) = self.probe.drain();
        for (_, bytes) in records {
            if let Some((parent, made)) = self.stacks.heed(bytes)
                && self.sampled.contains(&parent)
            {
                self.made.push(made);
            }
            let input = Input::Record(bytes);
            record(&mut self.journal, &mut self.journal_failures, &self.engine, &input);
            self.engine.apply(&input, &mut self.out);
        }
        for id in std::mem::take(&mut self.made) {
            self.sample(id);
        }
        more
    }

    fn tick(&mut self, now: u64) {
        self.ticks = self.ticks.wrapping_add(1);
        let lines = match self.kernel_log.as_mut().map(|reader| reader.read_available(now)) {
            Some(Ok(lines)) => lines,
            Some(Err(error)) => {
                warn!("kernel log: {error:#}; kills are not cross-checked from here on");
                self.kernel_log = None;
                Vec::new()
            }
            None => Vec::new(),
        };
        for line in lines {
            self.feed(Fact::KernelLog(line));
        }
        if self.ticks.is_multiple_of(TICKS_PER_ANCHOR) {
            self.feed(clock::anchor());
        }
        if self.ticks.is_multiple_of(TICKS_PER_LOSSES) {
            self.read_losses();
            self.adjust_steps(now);
            self.stacks.processes.tick();
        }
        self.tell_stacks();
        for fact in self.queries.answer(&self.hierarchy, clock::boot_ns()) {
            self.feed(fact);
        }
        self.feed(Fact::Tick { boot_ns: now });
    }

    fn read_losses(&mut self) {
        self.probe.pass_messages();
        let mut totals = self.probe.losses();
        let journal_lost = self.journal.as_ref().map_or(0, journal::Writer::lost);
        if journal_lost > 0 {
            totals.push(("journal/not_written".to_owned(), journal_lost));
        }
        let refused = self.queries.not_watched();
        if refused > 0 {
            totals.push(("cgroup/not_watched".to_owned(), refused));
        }
        totals.extend(self.stacks.losses());
        let (_, Cost { thinned, .. }) = self.stack_cost();
        if thinned > 0 {
            totals.push((memtrace_incident::Loss::StacksOverBudget.label().to_owned(), thinned));
        }
        if totals != self.losses {
            self.losses.clone_from(&totals);
            self.feed(Fact::Losses { totals });
        }
    }

    /// Carries out what the engine requests: thresholds at once, queries with the next tick.
    fn carry_out_requests(&mut self) {
        for request in self.out.requests.drain(..) {
            match request {
                Request::LookUpCgroup { id } => self.queries.look_up(id),
                Request::WatchOomControl { cgroup_id, path } => {
                    self.queries.watch(cgroup_id, path, clock::boot_ns());
                }
                Request::SetRssThreshold { cgroup_id, threshold_bytes } => {
                    if let Err(error) = self.probe.set_rss_threshold(cgroup_id, threshold_bytes) {
                        debug!("RSS threshold of cgroup {cgroup_id}: {error}");
                    }
                }
            }
        }
    }

    fn flush_journal(&mut self) {
        if let Some(journal) = &mut self.journal
            && let Err(error) = journal.flush()
        {
            self.journal_failures = self.journal_failures.saturating_add(1);
            debug!("journal: {error}");
        }
    }

    /// Tells the engine everything that has happened up to now: before something ends that must be told of in full.
    pub fn catch_up(&mut self) {
        let now = clock::boot_ns();
        while self.drain() {}
        self.drain_stacks();
        while self.stacks_owed {
            self.drain_stacks();
        }
        self.tell_stacks();
        self.read_losses();
        self.feed(Fact::Tick { boot_ns: now });
    }

    /// Ends the run: drains what is left, closes every incident; what it lost is in the log.
    pub fn stop(mut self) -> Vec<Output> {
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

    /// The engine, for its counts and its snapshot.
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// What is attached and what is not.
    pub fn status(&self) -> &Status {
        &self.status
    }

    /// Modules of processes met that can still be read: names are in them.
    pub fn open_modules(&self) -> Vec<OpenModule> {
        self.stacks.processes.open_modules()
    }

    /// The memory hierarchy.
    pub fn hierarchy(&self) -> &Hierarchy {
        &self.hierarchy
    }

    /// The loaded programs, for their counters.
    pub fn probe(&self) -> &Probe {
        &self.probe
    }

    /// Loss counters as last read.
    pub fn losses(&self) -> &[(String, u64)] {
        &self.losses
    }

    /// Journal frames that could not be written.
    pub fn journal_failures(&self) -> u64 {
        self.journal_failures
    }
}

/// Whether RSS counters have per-CPU slots on this kernel, all of which can be found.
fn sums_slots(layout: &KernelLayout) -> bool {
    let found = [layout.bpf_array_pptrs, layout.percpu_counter_counters, layout.percpu_counter_size];
    layout.rss_is_percpu == 1 && found.iter().all(|field| *field != ABSENT) && host::possible_cpus() <= MAX_CPUS
}

/// Journals an input before the engine sees it; a failure is counted, never fatal.
fn record(journal: &mut Option<journal::Writer>, failures: &mut u64, engine: &Engine, input: &Input<'_>) {
    let Some(journal) = journal else { return };
    let begun =
        if journal.rotate_needed() { journal.begin_segment(&engine.preamble(clock::boot_ns())) } else { Ok(()) };
    if begun.and_then(|()| journal.append(input)).is_err() {
        *failures = failures.saturating_add(1);
    }
}

/// Fails with everything that keeps memtrace from running, and what to do about it.
fn refuse(status: &Status) -> Result<(), CommandError> {
    if status.can_run() {
        return Ok(());
    }
    let problems: Vec<String> = status.fatal.iter().map(ToString::to_string).collect();
    Err(CommandError::Unsupported(format!("this machine cannot be traced: {}", problems.join("; "))))
}

/// What this machine offers a tracer.
pub struct Ground {
    /// Where the memory controller is.
    pub hierarchy: Result<Hierarchy, CgroupError>,
    /// Everything a plan is made of.
    pub facts: KernelFacts,
}

/// Looks at the machine; `btf` is a file of kernel types to read instead of the running kernel's own.
pub fn survey(btf: Option<&Path>) -> Ground {
    let hierarchy = Hierarchy::find();
    let controller = hierarchy.as_ref().map_err(ToString::to_string).map(|hierarchy| MemoryController {
        version: hierarchy.version,
        hierarchy_id: hierarchy.hierarchy_id,
        mount: hierarchy.mount.display().to_string(),
    });
    Ground { facts: facts::gather(btf, controller), hierarchy }
}

/// Loads and attaches what the ground allows. The tracer runs as long as the probe lives.
///
/// Must run inside a tokio runtime. What this kernel or these privileges cannot do is a [`CommandError::Unsupported`].
pub fn attach(ground: Ground, options: &Options) -> anyhow::Result<(Hierarchy, Probe, Status)> {
    let Ground { hierarchy, facts } = ground;
    let plan = plan(&facts, &options.without);
    refuse(&Status::new(&plan, &[]))?;
    let unsupported = |what: &str| CommandError::Unsupported(what.to_owned());
    // The plan of a kernel without either is fatal.
    let hierarchy = hierarchy.map_err(|error| unsupported(&error.to_string()))?;
    let layout = facts.layout.ok_or_else(|| unsupported("the kernel's types are not known"))?;
    let object = object::ebpf_object().ok_or_else(|| {
        unsupported("this binary was built without its eBPF programs; build it with `cargo xtask build`")
    })?;
    // Until everything is loaded; a command that is started later has the limit it had.
    let _memlock = host::raise_memlock();
    let settings = probe::ProbeSettings {
        control: Control {
            rss_threshold_bytes: options.quantum_bytes,
            mapping_bytes: options.quantum_bytes.saturating_mul(4),
            mm_salt: host::salt(),
            memory_hierarchy_id: hierarchy.hierarchy_id,
            cpus: host::possible_cpus().min(MAX_CPUS),
            page_shift: rustix::param::page_size().trailing_zeros(),
            percpu_lookup: u32::from(facts.percpu_lookup && sums_slots(&layout)),
            exit_mmap: u32::from(plan.steps.iter().any(|step| step.hook == Hook::ExitMmap)),
            task_pt_regs: u32::from(facts.task_pt_regs),
            reclaim_interval_ns: 5_000_000,
            sample_interval_bytes: match (options.stack_budget_ppm, options.sample_all) {
                (0, _) => 0,
                (_, true) => options.sample_bytes,
                (_, false) => NEVER_BYTES,
            },
            stack_budget_ppm: options.stack_budget_ppm,
            stack_copy_bytes: STACK_COPY_BYTES,
            thread_bytes: THREAD_BYTES,
            rss_from_charges: u32::from(plan.left_out.contains(&Hook::Rss)),
            reserved: 0,
        },
        ledger_bytes: 1 << 20,
        samples_bytes: u32::try_from(options.samples_ring_bytes).unwrap_or(4 << 20),
        stacks_bytes: options.stacks_ring_bytes,
        max_processes: options.max_processes,
    };
    let (probe, results) = Probe::load(object, &layout, &settings, &plan, options.btf.as_deref())
        .map_err(|error| CommandError::Unsupported(error.to_string()))?;
    let status = Status::new(&plan, &results);
    refuse(&status)?;
    Ok((hierarchy, probe, status))
}
