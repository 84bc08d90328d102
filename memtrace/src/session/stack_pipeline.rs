//! The session's part in stacks: what their worker unwinds goes to the engine, within their budget.
//!
//! The loop calls it at five places: [`StackPipeline::observe`] for each record of the other rings,
//! [`StackPipeline::follow_new_cgroups`] after each batch of them, [`StackPipeline::take_facts`] once
//! a turn, [`StackPipeline::check`] with each tick, [`StackPipeline::maintain`] once a second.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::Context;
use memtrace_common::event::{CGROUP_MADE, RECLAIM_BEGIN};
use memtrace_engine::Engine;
use memtrace_engine::decode::Record;
use memtrace_engine::input::{Fact, StackFound};
use memtrace_incident::Loss;
use tracing::{debug, warn};

use super::followed::Followed;
use super::stack_worker::{ModuleFile, StackWorker, WorkerHealth};
use crate::clock;
use crate::kernel::probe::Probe;
use crate::stacks::messages::{ModuleLabel, StackCounts, ToWorker};
use crate::stacks::path_numbers::FORGET_SECONDS;
use crate::stacks::renumbering::Renumbering;
use crate::stacks::sampling_rate::{SamplingRate, StackCost};

/// Cgroups whose stacks are taken, where not all are.
const MAX_SAMPLED: usize = 1024;
/// Time for the worker to bring what the ring holds, when something ends.
const CATCH_UP_LIMIT: Duration = Duration::from_secs(3);
/// Time for the worker to bring files, when something ends.
const MODULES_LIMIT: Duration = Duration::from_secs(3);
/// How long files stay open that no process maps, when nobody waits for names.
const KEEP_FILES: Duration = Duration::from_secs(1);
/// The same while an incident is open or its functions are not named.
const KEEP_FILES_FOR_NAMES: Duration = Duration::from_secs(10);

/// Everything about stacks that a session keeps.
pub(super) struct StackPipeline {
    worker: StackWorker,
    numbers: Renumbering,
    /// Calls of [`StackPipeline::maintain`].
    seconds: u32,
    rate: SamplingRate,
    /// When the rate was adjusted last, boot clock.
    adjusted_ns: u64,
    /// CPU time that this process has spent on stacks.
    spent: Duration,
    /// Stacks whose cost the eBPF programs have been given.
    reported: u64,
    /// Cgroups whose stacks are taken, where not all are. Cap: [`MAX_SAMPLED`].
    sampled: BTreeSet<u64>,
    /// Cgroups made in these since the last batch. Cap: the records of one batch.
    made: Vec<u64>,
    /// What the worker is not told of them it finds out by itself, only later.
    followed: Followed,
    /// The worker that the last batch was of.
    worker_number: u64,
    /// The journal segment that has what stacks refer to.
    stated_segment: u64,
    /// How long files stay open that no process maps; [`Duration::MAX`] for the whole run.
    keep_files: Duration,
}

impl StackPipeline {
    /// `sample_bytes` is the default sample interval; `budget_ppm` is in parts per million of one
    /// CPU. Must run inside a tokio runtime.
    pub(super) fn new(probe: &Probe, sample_bytes: u64, budget_ppm: u64) -> anyhow::Result<Self> {
        let ring = probe.stacks_fd().context("there is no ring of stacks")?;
        Ok(Self {
            worker: StackWorker::start(ring, budget_ppm)?,
            numbers: Renumbering::default(),
            seconds: 0,
            rate: SamplingRate::new(sample_bytes, budget_ppm),
            adjusted_ns: clock::boot_ns(),
            spent: Duration::ZERO,
            reported: 0,
            sampled: BTreeSet::new(),
            made: Vec::new(),
            followed: Followed::default(),
            worker_number: 0,
            stated_segment: 0,
            keep_files: KEEP_FILES,
        })
    }

    /// Takes stacks of the processes in this cgroup and in all below it, present and future: for a
    /// run that does not take stacks of all processes.
    pub(super) fn sample(&mut self, cgroup_id: u64, probe: &mut Probe, engine: &Engine) {
        if self.sampled.len() >= MAX_SAMPLED || !self.sampled.insert(cgroup_id) {
            return;
        }
        if let Err(error) = probe.set_sample_interval(cgroup_id, self.rate.default_bytes()) {
            warn!("no stacks of cgroup {cgroup_id} are taken: {error}");
        }
        engine.children(cgroup_id).for_each(|id| self.sample(id, probe, engine));
    }

    /// Takes note of a record of another ring.
    pub(super) fn observe(&mut self, record: &Record) {
        match record {
            Record::Cgroup(cgroup) if cgroup.change == CGROUP_MADE && self.sampled.contains(&cgroup.parent_id) => {
                self.made.push(cgroup.memcg.cgroup_id);
            }
            Record::Exec(exec) => {
                self.worker.say_exec((exec.task.tgid, exec.task.start_boot_ns), exec.header.boot_ns);
            }
            Record::Exit(exit) => {
                let process = (exit.task.tgid, exit.task.start_boot_ns);
                if self.followed.ended(process) {
                    self.worker.say_later(&ToWorker::Exit(process));
                }
            }
            // A limit was hit: once it comes to a kill it is too late to read mappings.
            Record::Reclaim(reclaim) if reclaim.phase == RECLAIM_BEGIN => {
                let process = (reclaim.task.tgid, reclaim.task.start_boot_ns);
                if self.followed.hit_limit(process) {
                    self.worker.say(&ToWorker::Prefetch(process));
                }
            }
            _ => {}
        }
    }

    /// Samples the cgroups that were made in sampled ones. Call it once the engine has all records
    /// of the batch: it knows what is below them.
    pub(super) fn follow_new_cgroups(&mut self, probe: &mut Probe, engine: &Engine) {
        for id in std::mem::take(&mut self.made) {
            self.sample(id, probe, engine);
        }
    }

    /// Gives memory back that messages of the worker took.
    pub(super) fn give_memory_back(&mut self) {
        self.worker.give_memory_back();
    }

    /// Waits until the worker has something.
    pub(super) async fn ready(&self) {
        self.worker.ready().await;
    }

    /// Whether stacks wait to be taken.
    pub(super) fn has_backlog(&self) -> bool {
        self.worker.has_batch()
    }

    /// The stacks of one batch, as facts. `segment` is the journal segment that they will be written
    /// to: each states once what its stacks refer to.
    pub(super) fn take_facts(&mut self, probe: &mut Probe, segment: u64) -> Vec<Fact> {
        self.worker.receive();
        let Some((worker, batch)) = self.worker.next_batch() else { return Vec::new() };
        for (pid, bytes) in batch.copy_bytes {
            if let Err(error) = probe.set_stack_copy(pid, bytes) {
                debug!("size of stack copies of process {pid}: {error}");
            }
        }
        if worker != self.worker_number {
            self.worker_number = worker;
            self.numbers.next_worker();
        }
        if segment != self.stated_segment {
            self.stated_segment = segment;
            self.numbers.restate();
        }
        let stacks: Vec<StackFound> = batch.stacks.into_iter().map(StackFound::from).collect();
        for stack in &stacks {
            self.rate.note_sample(stack.cgroup_id);
            let process = (stack.pid, stack.start_boot_ns);
            if self.followed.sampled(process) {
                self.worker.say_later(&ToWorker::Exit(process));
            }
        }
        self.pay(probe);
        self.numbers.renumber(batch.facts.into_iter().chain(stacks.into_iter().map(Fact::Stack)))
    }

    /// Tells the eBPF programs what stacks have cost here and in the worker.
    fn pay(&mut self, probe: &mut Probe) {
        let counts = self.worker.counts();
        if counts.unwound > self.reported {
            self.reported = counts.unwound;
            if let Err(error) = probe.set_user_spent(self.user_ns(&counts)) {
                debug!("cost of stacks: {error}");
            }
        }
    }

    fn user_ns(&self, counts: &StackCounts) -> u64 {
        nanoseconds(self.spent).saturating_add(counts.spent_ns)
    }

    /// Adds CPU time that this process spent on stacks.
    pub(super) fn add_cost(&mut self, time: Duration) {
        self.spent = self.spent.saturating_add(time);
    }

    /// Replaces the worker if it hangs. Call it with each tick.
    pub(super) fn check(&mut self) {
        self.followed.tick();
        self.worker.check(Instant::now());
    }

    /// Adjusts the sample intervals to the budget, and lets the worker drop what is known of dead
    /// processes. Call it about once a second.
    pub(super) fn maintain(&mut self, probe: &mut Probe, now: u64) {
        let (_, cost) = self.cost(probe);
        for (cgroup, bytes) in self.rate.adjust(cost, now.saturating_sub(self.adjusted_ns)) {
            if let Err(error) = probe.set_sample_interval(cgroup, bytes) {
                debug!("sample interval of cgroup {cgroup}: {error}");
            }
        }
        self.adjusted_ns = now;
        self.seconds = self.seconds.wrapping_add(1);
        // The engine counts ticks for the same purpose: both stand still with the loop.
        if self.seconds.is_multiple_of(FORGET_SECONDS) {
            self.numbers.forget_unused();
        }
        self.worker.ask(self.keep_files);
    }

    /// Whether functions of programs that end now are still to be named.
    pub(super) fn wait_for_names(&mut self, wait: bool) {
        if self.keep_files != Duration::MAX {
            self.keep_files = if wait { KEEP_FILES_FOR_NAMES } else { KEEP_FILES };
        }
    }

    /// Keeps files open until the end of the run, whoever maps them.
    pub(super) fn keep_files(&mut self) {
        self.keep_files = Duration::MAX;
    }

    /// Lets the worker drain the ring: before something ends that must be reported in full. Returns
    /// the deadline for [`StackPipeline::await_all`].
    pub(super) fn ask_for_all(&mut self) -> Instant {
        self.worker.ask_for_all(self.keep_files);
        Instant::now().checked_add(CATCH_UP_LIMIT).unwrap_or_else(Instant::now)
    }

    /// Waits for what the ring held, or until there are stacks to take. True if nothing more comes.
    pub(super) fn await_all(&mut self, deadline: Instant) -> bool {
        let left = deadline.saturating_duration_since(Instant::now());
        self.worker.await_answer(left) || left.is_zero()
    }

    /// Stacks unwound, and what stacks have cost since the start.
    pub(super) fn cost(&self, probe: &Probe) -> (u64, StackCost) {
        let budget = probe.stack_budget().unwrap_or_default();
        let counts = self.worker.counts();
        let user_ns = self.user_ns(&counts);
        let cost = StackCost { kernel_ns: budget.spent_ns, user_ns, thinned: budget.thinned };
        (counts.unwound, cost)
    }

    /// What was lost of stacks, as totals since the start; only what is not 0.
    pub(super) fn losses(&self, probe: &Probe) -> Vec<(String, u64)> {
        let (counts, restarts) = (self.worker.counts(), self.worker.health().restarts);
        let (_, StackCost { thinned, .. }) = self.cost(probe);
        let named = [
            (Loss::StacksWithoutFrames, counts.without_frames.saturating_add(self.numbers.without_frames())),
            (Loss::StacksBadRecords, counts.bad_records),
            (Loss::StackProcessesForgotten, counts.processes_forgotten),
            (Loss::StackMappingsLeftOut, counts.mappings_left_out),
            (Loss::ModulesForgotten, counts.modules_forgotten),
            (Loss::ModulesClosedEarly, counts.modules_closed_early),
            (Loss::UnwindInformationTooLarge, counts.unwind_too_large),
            (Loss::StackFilesRefused, counts.refused),
            (Loss::StackFilesOverBudget, counts.over_budget),
            (Loss::StackWorkerReplaced, restarts),
            (Loss::StacksOverBudget, thinned),
        ];
        named.iter().filter(|(_, count)| *count > 0).map(|(loss, count)| (loss.label().to_owned(), *count)).collect()
    }

    /// How the worker is doing.
    pub(super) fn worker_health(&self) -> WorkerHealth {
        self.worker.health()
    }

    /// Asks for the files of modules; [`StackPipeline::take_modules`] has them later.
    pub(super) fn ask_for_modules(&mut self, wanted: Vec<ModuleLabel>) {
        self.worker.ask_for_modules(wanted);
    }

    /// The files that were asked for, once they are there.
    pub(super) fn take_modules(&mut self) -> Option<Vec<ModuleFile>> {
        self.worker.take_modules()
    }

    /// The files of these modules, as far as they come in time: when something ends.
    pub(super) fn modules(&mut self, wanted: Vec<ModuleLabel>) -> Vec<ModuleFile> {
        self.worker.modules(wanted, MODULES_LIMIT)
    }
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}
