//! The session's part in stacks: out of their ring, to the engine, within their budget.

use std::time::Duration;

use tracing::{debug, warn};

use super::Session;
use crate::clock;
use crate::process::budget::Cost;
use crate::store::journal;

/// Stacks unwound between two looks at the clock.
const STACKS_AT_ONCE: usize = 16;
/// CPU time for stacks in one turn.
const TURN: Duration = Duration::from_millis(5);

/// Cgroups that stacks are taken of, where not all are.
const MAX_SAMPLED: usize = 1024;

impl Session {
    /// Takes stacks of the processes of this cgroup and of all below it, known and to come: for a run that does not take
    /// them of all.
    pub fn sample(&mut self, cgroup_id: u64) {
        if self.sampled.len() >= MAX_SAMPLED || !self.sampled.insert(cgroup_id) {
            return;
        }
        if let Err(error) = self.probe.set_sample_interval(cgroup_id, self.steps.usual_bytes()) {
            warn!("no stacks of cgroup {cgroup_id} are taken: {error}");
        }
        let below: Vec<u64> = self.engine.children(cgroup_id).collect();
        below.into_iter().for_each(|id| self.sample(id));
    }

    /// Unwinds what the stacks ring holds; addresses stay in memory, only what they mean becomes an input.
    pub(super) fn drain_stacks(&mut self) {
        let (stacks, steps) = (&mut self.stacks, &mut self.steps);
        // The clock is a system call: most turns have no stack.
        let mut begin = None;
        let since = |begin: Option<Duration>| begin.map_or(Duration::ZERO, |b| clock::cpu_time().saturating_sub(b));
        let mut owed = true;
        // A new process costs a millisecond: kills and readings get their turn in between.
        while owed && since(begin) < TURN {
            owed = self.probe.drain_stacks(STACKS_AT_ONCE, |record| {
                begin.get_or_insert_with(clock::cpu_time);
                if let Some(cgroup) = stacks.push(record) {
                    steps.taken(cgroup);
                }
            });
        }
        self.stacks_owed = owed;
        for (pid, bytes) in self.stacks.deeper() {
            if let Err(error) = self.probe.set_stack_copy(pid, bytes) {
                debug!("stack slices of process {pid}: {error}");
            }
        }
        self.stacks.spent(since(begin));
        let (unwound, spent) = self.stacks.cost();
        if unwound > self.unwound {
            self.unwound = unwound;
            if let Err(error) = self.probe.set_user_spent(u64::try_from(spent.as_nanos()).unwrap_or(u64::MAX)) {
                debug!("cost of stacks: {error}");
            }
        }
    }

    /// Tells the engine of the stacks that were unwound.
    pub(super) fn tell_stacks(&mut self) {
        let segment = self.journal.as_ref().map_or(0, journal::Writer::next_segment);
        if segment != self.stated_segment {
            self.stated_segment = segment;
            self.stacks.restate();
        }
        let begin = clock::cpu_time();
        for fact in self.stacks.take() {
            self.feed(fact);
        }
        self.stacks.spent(clock::cpu_time().saturating_sub(begin));
    }

    /// Stacks unwound, and what stacks have cost since the start.
    pub fn stack_cost(&self) -> (u64, Cost) {
        let budget = self.probe.stack_budget().unwrap_or_default();
        let (unwound, here) = self.stacks.cost();
        let user_ns = u64::try_from(here.as_nanos()).unwrap_or(u64::MAX);
        (unwound, Cost { kernel_ns: budget.spent_ns, user_ns, thinned: budget.thinned })
    }

    /// Keeps stacks within their budget.
    pub(super) fn adjust_steps(&mut self, now: u64) {
        let (_, cost) = self.stack_cost();
        for (cgroup, bytes) in self.steps.look(cost, now.saturating_sub(self.steps_ns)) {
            if let Err(error) = self.probe.set_sample_interval(cgroup, bytes) {
                debug!("sampling step of cgroup {cgroup}: {error}");
            }
        }
        self.steps_ns = now;
    }
}
