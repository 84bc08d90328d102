//! How often each cgroup is sampled, so that stacks stay within their CPU budget. Pure.
//!
//! A process is sampled each time it has grown by the sample interval, 512 KiB by default. The
//! eBPF programs stop taking stacks when the budget of the moment is used up. That holds the budget,
//! but then chance decides which stacks are taken, and a busy cgroup takes the time of all others.
//! So once a second [`SamplingRate::adjust`] doubles the interval of cgroups that took more than an
//! equal share of the stacks, if the budget was exceeded, and halves it again when less than a
//! quarter of the budget is used.

use std::collections::BTreeMap;

/// Most cgroups with an interval of their own.
const MAX_CGROUPS: usize = 1024;
/// Largest interval, as a multiple of the default one.
const MAX_FACTOR: u64 = 256;

/// What stacks have cost since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StackCost {
    /// CPU time in the kernel, nanoseconds.
    pub kernel_ns: u64,
    /// CPU time in this process, nanoseconds.
    pub user_ns: u64,
    /// Stacks that the eBPF programs left out because the budget was used up.
    pub thinned: u64,
}

/// Sample intervals by cgroup, and how many stacks each took since the last adjustment.
#[derive(Debug)]
pub struct SamplingRate {
    default_bytes: u64,
    budget_ppm: u64,
    last: StackCost,
    /// Stacks by cgroup since the last adjustment. Cap: [`MAX_CGROUPS`].
    taken: BTreeMap<u64, u64>,
    /// Intervals longer than the default one, bytes by cgroup. Cap: [`MAX_CGROUPS`].
    intervals: BTreeMap<u64, u64>,
}

impl SamplingRate {
    /// All cgroups at the default interval, in bytes of growth. `budget_ppm` is in parts per
    /// million of one CPU.
    pub fn new(default_bytes: u64, budget_ppm: u64) -> Self {
        Self {
            default_bytes,
            budget_ppm,
            last: StackCost::default(),
            taken: BTreeMap::new(),
            intervals: BTreeMap::new(),
        }
    }

    /// The interval of a cgroup without one of its own, bytes.
    pub fn default_bytes(&self) -> u64 {
        self.default_bytes
    }

    /// Counts a stack of this cgroup.
    pub fn note_sample(&mut self, cgroup_id: u64) {
        if self.taken.len() < MAX_CGROUPS || self.taken.contains_key(&cgroup_id) {
            let count = self.taken.entry(cgroup_id).or_default();
            *count = count.saturating_add(1);
        }
    }

    /// Compares what the last `elapsed_ns` cost with the budget. `total` is the cost since the
    /// start. Returns the intervals that changed: cgroup id and bytes.
    pub fn adjust(&mut self, total: StackCost, elapsed_ns: u64) -> Vec<(u64, u64)> {
        let taken = std::mem::take(&mut self.taken);
        let spent = (total.kernel_ns.saturating_sub(self.last.kernel_ns))
            .saturating_add(total.user_ns.saturating_sub(self.last.user_ns));
        let thinned = total.thinned > self.last.thinned;
        self.last = total;
        let budget = u64::try_from(u128::from(elapsed_ns) * u128::from(self.budget_ppm) / 1_000_000);
        let budget = budget.unwrap_or(u64::MAX);
        let before = self.intervals.clone();
        let default = self.default_bytes;
        if thinned || spent > budget {
            let all: u64 = taken.values().sum();
            let share = all / (taken.len() as u64).max(1);
            for (cgroup, _) in taken.iter().filter(|(_, count)| **count >= share.max(1)) {
                if self.intervals.len() < MAX_CGROUPS || self.intervals.contains_key(cgroup) {
                    let interval = self.intervals.entry(*cgroup).or_insert(default);
                    *interval = interval.saturating_mul(2).min(default.saturating_mul(MAX_FACTOR));
                }
            }
        } else if spent < budget / 4 {
            // Twice as many stacks would still fit.
            self.intervals.values_mut().for_each(|interval| *interval /= 2);
        }
        let changed = self.intervals.iter().filter(|(cgroup, interval)| before.get(cgroup) != Some(interval));
        let changed = changed.map(|(cgroup, interval)| (*cgroup, (*interval).max(default))).collect();
        self.intervals.retain(|_, interval| *interval > default);
        changed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;
    const DEFAULT: u64 = 512 << 10;

    fn sample(rate: &mut SamplingRate, stacks: &[(u64, u64)]) {
        for (cgroup, count) in stacks {
            (0..*count).for_each(|_| rate.note_sample(*cgroup));
        }
    }

    #[test]
    fn a_cgroup_that_takes_more_than_its_share_is_sampled_less_until_there_is_time() {
        let mut rate = SamplingRate::new(DEFAULT, 10_000);
        sample(&mut rate, &[(7, 900), (8, 3)]);
        let over = StackCost { kernel_ns: 5_000_000, user_ns: 9_000_000, thinned: 40 };
        assert_eq!(rate.adjust(over, SECOND), [(7, 2 * DEFAULT)], "the quiet one keeps its interval");
        sample(&mut rate, &[(7, 400)]);
        let fits = StackCost { kernel_ns: 8_000_000, user_ns: 14_000_000, ..over };
        assert_eq!(rate.adjust(fits, SECOND), [], "within the budget, and not far below it");
        assert_eq!(rate.adjust(fits, SECOND), [(7, DEFAULT)], "idle: back to the default");
        assert_eq!(rate.adjust(fits, SECOND), [], "reported once");
    }

    #[test]
    fn an_interval_is_bounded() {
        let mut rate = SamplingRate::new(DEFAULT, 10_000);
        for second in 1..40 {
            sample(&mut rate, &[(7, 10)]);
            rate.adjust(StackCost { thinned: second, ..StackCost::default() }, SECOND);
        }
        assert_eq!(rate.intervals.get(&7), Some(&(MAX_FACTOR * DEFAULT)));
        for cgroup in 0..5000 {
            sample(&mut rate, &[(cgroup, 1)]);
        }
        assert!(rate.taken.len() <= MAX_CGROUPS);
    }
}
