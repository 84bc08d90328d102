//! How finely each cgroup is sampled, so that stacks cost no more than they may: pure.
//!
//! The kernel side stops taking stacks when their time is used up. That holds the budget whatever happens, but then it is
//! luck who gets one, and a busy cgroup takes the time of all. So whoever takes more than a fair share is sampled in
//! larger steps, until there is time to spare.

use std::collections::BTreeMap;

/// Cgroups that may have a step of their own.
const MAX_CGROUPS: usize = 1024;
/// A step grows to at most this many times the usual one.
const MOST: u64 = 256;

/// What stacks have cost since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cost {
    /// In the kernel, nanoseconds.
    pub kernel_ns: u64,
    /// Here, nanoseconds.
    pub user_ns: u64,
    /// Stacks the kernel side had no time for.
    pub thinned: u64,
}

/// The steps, and who took stacks since they were last looked at.
#[derive(Debug)]
pub struct Steps {
    usual_bytes: u64,
    budget_ppm: u64,
    last: Cost,
    /// Stacks by cgroup since the last look. Cap: [`MAX_CGROUPS`].
    taken: BTreeMap<u64, u64>,
    /// Steps that are not the usual one, bytes. Cap: [`MAX_CGROUPS`].
    steps: BTreeMap<u64, u64>,
}

impl Steps {
    /// All cgroups at the usual step; `budget_ppm` is in parts per million of one CPU.
    pub fn new(usual_bytes: u64, budget_ppm: u64) -> Self {
        Self { usual_bytes, budget_ppm, last: Cost::default(), taken: BTreeMap::new(), steps: BTreeMap::new() }
    }

    /// The step of a cgroup that has none of its own, bytes.
    pub fn usual_bytes(&self) -> u64 {
        self.usual_bytes
    }

    /// A stack of this cgroup was taken.
    pub fn taken(&mut self, cgroup_id: u64) {
        if self.taken.len() < MAX_CGROUPS || self.taken.contains_key(&cgroup_id) {
            let count = self.taken.entry(cgroup_id).or_default();
            *count = count.saturating_add(1);
        }
    }

    /// Looks at what `elapsed_ns` have cost; the steps to set, in bytes by cgroup.
    pub fn look(&mut self, now: Cost, elapsed_ns: u64) -> Vec<(u64, u64)> {
        let taken = std::mem::take(&mut self.taken);
        let spent = (now.kernel_ns.saturating_sub(self.last.kernel_ns))
            .saturating_add(now.user_ns.saturating_sub(self.last.user_ns));
        let thinned = now.thinned > self.last.thinned;
        self.last = now;
        let may = u64::try_from(u128::from(elapsed_ns) * u128::from(self.budget_ppm) / 1_000_000).unwrap_or(u64::MAX);
        let before = self.steps.clone();
        if thinned || spent > may {
            let all: u64 = taken.values().sum();
            let share = all / (taken.len() as u64).max(1);
            for (cgroup, _) in taken.iter().filter(|(_, count)| **count >= share.max(1)) {
                if self.steps.len() < MAX_CGROUPS || self.steps.contains_key(cgroup) {
                    let step = self.steps.entry(*cgroup).or_insert(self.usual_bytes);
                    *step = step.saturating_mul(2).min(self.usual_bytes.saturating_mul(MOST));
                }
            }
        } else if spent < may / 4 {
            // Twice as many stacks would still fit.
            self.steps.values_mut().for_each(|step| *step /= 2);
        }
        let usual = self.usual_bytes;
        let changed = self.steps.iter().filter(|(cgroup, step)| before.get(cgroup) != Some(step));
        let changed = changed.map(|(cgroup, step)| (*cgroup, (*step).max(usual))).collect();
        self.steps.retain(|_, step| *step > usual);
        changed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;
    const STEP: u64 = 512 << 10;

    fn busy(steps: &mut Steps, stacks: &[(u64, u64)]) {
        for (cgroup, count) in stacks {
            (0..*count).for_each(|_| steps.taken(*cgroup));
        }
    }

    #[test]
    fn who_takes_more_than_a_share_is_sampled_coarser_until_there_is_time() {
        let mut steps = Steps::new(STEP, 10_000);
        busy(&mut steps, &[(7, 900), (8, 3)]);
        let over = Cost { kernel_ns: 5_000_000, user_ns: 9_000_000, thinned: 40 };
        assert_eq!(steps.look(over, SECOND), [(7, 2 * STEP)], "the quiet one keeps its step");
        busy(&mut steps, &[(7, 400)]);
        let fits = Cost { kernel_ns: 8_000_000, user_ns: 14_000_000, ..over };
        assert_eq!(steps.look(fits, SECOND), [], "within the budget, and not far below it");
        assert_eq!(steps.look(fits, SECOND), [(7, STEP)], "idle: as before");
        assert_eq!(steps.look(fits, SECOND), [], "said once");
    }

    #[test]
    fn a_step_is_bounded() {
        let mut steps = Steps::new(STEP, 10_000);
        for second in 1..40 {
            busy(&mut steps, &[(7, 10)]);
            steps.look(Cost { thinned: second, ..Cost::default() }, SECOND);
        }
        assert_eq!(steps.steps.get(&7), Some(&(MOST * STEP)));
        for cgroup in 0..5000 {
            busy(&mut steps, &[(cgroup, 1)]);
        }
        assert!(steps.taken.len() <= MAX_CGROUPS);
    }
}
