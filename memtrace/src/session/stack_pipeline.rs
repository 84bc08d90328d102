//! The session's part in stacks: drain their ring, report them to the engine, keep their budget.
//!
//! The loop calls it at five places: [`StackPipeline::observe`] for each record of the other rings,
//! [`StackPipeline::follow_new_cgroups`] after each batch of them, [`StackPipeline::drain`] once a
//! turn, [`StackPipeline::take_facts`] with each tick, [`StackPipeline::maintain`] once a second.

use std::collections::BTreeSet;
use std::time::Duration;

use memtrace_common::event::CGROUP_MADE;
use memtrace_engine::Engine;
use memtrace_engine::decode::Record;
use memtrace_engine::input::Fact;
use memtrace_incident::Loss;
use memtrace_unwind::modules::OpenModule;
use tracing::{debug, warn};

use crate::clock;
use crate::kernel::probe::Probe;
use crate::stacks::sampling_rate::{SamplingRate, StackCost};
use crate::stacks::stack_samples::StackSamples;

/// Stacks unwound between two readings of the CPU clock.
const STACKS_PER_BATCH: usize = 16;
/// CPU time for stacks in one turn: the first stack of a process costs up to a millisecond, and
/// kills and readings of memory get their turn in between.
const TURN: Duration = Duration::from_millis(5);
/// Cgroups whose stacks are taken, where not all are.
const MAX_SAMPLED: usize = 1024;

/// Everything about stacks that a session keeps.
pub(super) struct StackPipeline {
    samples: StackSamples,
    rate: SamplingRate,
    /// When the rate was adjusted last, boot clock.
    adjusted_ns: u64,
    /// The ring holds more than the last turn took.
    backlog: bool,
    /// Stacks whose cost the eBPF programs have been given.
    reported: u64,
    /// Cgroups whose stacks are taken, where not all are. Cap: [`MAX_SAMPLED`].
    sampled: BTreeSet<u64>,
    /// Cgroups made in these since the last batch. Cap: the records of one batch.
    made: Vec<u64>,
    /// The journal segment that has what stacks refer to.
    stated_segment: u64,
}

impl StackPipeline {
    /// `sample_bytes` is the default sample interval; `budget_ppm` is in parts per million of one
    /// CPU.
    pub(super) fn new(sample_bytes: u64, budget_ppm: u64) -> Self {
        Self {
            samples: StackSamples::new(),
            rate: SamplingRate::new(sample_bytes, budget_ppm),
            adjusted_ns: clock::boot_ns(),
            backlog: false,
            reported: 0,
            sampled: BTreeSet::new(),
            made: Vec::new(),
            stated_segment: 0,
        }
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
            record => self.samples.observe(record),
        }
    }

    /// Samples the cgroups that were made in sampled ones. Call it once the engine has all records
    /// of the batch: it knows what is below them.
    pub(super) fn follow_new_cgroups(&mut self, probe: &mut Probe, engine: &Engine) {
        for id in std::mem::take(&mut self.made) {
            self.sample(id, probe, engine);
        }
    }

    /// Unwinds what the STACKS ring holds, for one turn.
    pub(super) fn drain(&mut self, probe: &mut Probe) {
        let (samples, rate) = (&mut self.samples, &mut self.rate);
        // The clock is a system call, and most turns have no stack.
        let mut begin = None;
        let since = |begin: Option<Duration>| begin.map_or(Duration::ZERO, |b| clock::cpu_time().saturating_sub(b));
        let mut backlog = true;
        while backlog && since(begin) < TURN {
            backlog = probe.drain_stacks(STACKS_PER_BATCH, |record| {
                begin.get_or_insert_with(clock::cpu_time);
                if let Some(cgroup) = samples.push(record) {
                    rate.note_sample(cgroup);
                }
            });
        }
        self.backlog = backlog;
        for (pid, bytes) in self.samples.take_copy_requests() {
            if let Err(error) = probe.set_stack_copy(pid, bytes) {
                debug!("size of stack copies of process {pid}: {error}");
            }
        }
        self.samples.add_cost(since(begin));
        let (unwound, spent) = self.samples.cost();
        if unwound > self.reported {
            self.reported = unwound;
            if let Err(error) = probe.set_user_spent(nanoseconds(spent)) {
                debug!("cost of stacks: {error}");
            }
        }
    }

    /// Whether the ring held more than the last turn took.
    pub(super) fn has_backlog(&self) -> bool {
        self.backlog
    }

    /// The stacks that were unwound, as facts. `segment` is the journal segment that they will be
    /// written to: each states once what its stacks refer to.
    pub(super) fn take_facts(&mut self, segment: u64) -> Vec<Fact> {
        if segment != self.stated_segment {
            self.stated_segment = segment;
            self.samples.restate();
        }
        self.samples.take()
    }

    /// Adds CPU time that was spent on stacks.
    pub(super) fn add_cost(&mut self, time: Duration) {
        self.samples.add_cost(time);
    }

    /// Adjusts the sample intervals to the budget, and drops what is known of dead processes. Call
    /// it about once a second.
    pub(super) fn maintain(&mut self, probe: &mut Probe, now: u64) {
        let (_, cost) = self.cost(probe);
        for (cgroup, bytes) in self.rate.adjust(cost, now.saturating_sub(self.adjusted_ns)) {
            if let Err(error) = probe.set_sample_interval(cgroup, bytes) {
                debug!("sample interval of cgroup {cgroup}: {error}");
            }
        }
        self.adjusted_ns = now;
        self.samples.tick();
    }

    /// Stacks unwound, and what stacks have cost since the start.
    pub(super) fn cost(&self, probe: &Probe) -> (u64, StackCost) {
        let budget = probe.stack_budget().unwrap_or_default();
        let (unwound, here) = self.samples.cost();
        let cost = StackCost { kernel_ns: budget.spent_ns, user_ns: nanoseconds(here), thinned: budget.thinned };
        (unwound, cost)
    }

    /// What was lost of stacks, as totals since the start.
    pub(super) fn losses(&self, probe: &Probe) -> Vec<(String, u64)> {
        let mut totals = self.samples.losses();
        let (_, StackCost { thinned, .. }) = self.cost(probe);
        if thinned > 0 {
            totals.push((Loss::StacksOverBudget.label().to_owned(), thinned));
        }
        totals
    }

    /// Modules of sampled processes whose content can be read now: functions are named from it.
    pub(super) fn open_modules(&self) -> Vec<OpenModule> {
        self.samples.open_modules()
    }
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}
