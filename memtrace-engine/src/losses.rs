//! What was lost, over time: totals from outside and our own counters, so that a window can state its share.

use std::collections::{BTreeMap, VecDeque};

use memtrace_incident::{Loss, LossNote};

/// Counters kept by name; further names share one.
pub(crate) const NAMES_CAP: usize = 256;
/// Moments at which totals are remembered.
const MOMENTS_CAP: usize = 128;

type Totals = BTreeMap<String, u64>;

/// Running totals and their history.
#[derive(Clone, Debug, Default)]
pub(crate) struct Losses {
    now: Totals,
    /// Totals as the kernel side last stated them, to find increments (a restart begins at 0 again).
    stated: Totals,
    moments: VecDeque<(u64, Totals)>,
    changed: bool,
}

impl Losses {
    /// Counts a loss of the engine's own.
    pub(crate) fn count(&mut self, loss: Loss, count: u64) {
        self.add(loss.label(), count);
    }

    fn add(&mut self, what: &str, count: u64) {
        if count == 0 {
            return;
        }
        self.changed = true;
        let full = self.now.len() >= NAMES_CAP;
        match self.now.get_mut(what) {
            Some(total) => *total = total.saturating_add(count),
            None => {
                let total = self.now.entry(if full { Loss::Other.label() } else { what }.to_owned()).or_default();
                *total = total.saturating_add(count);
            }
        }
    }

    /// Totals as the kernel side states them, since its start; as a baseline they are no losses of ours.
    pub(crate) fn state(&mut self, totals: &[(String, u64)], baseline: bool) {
        for (what, total) in totals.iter().take(NAMES_CAP) {
            let what = &Loss::canonical(what);
            let before = self.stated.get(what).copied().unwrap_or(0);
            let new = if *total >= before { total - before } else { *total };
            if self.stated.len() < NAMES_CAP || self.stated.contains_key(what) {
                self.stated.insert(what.clone(), *total);
                self.add(what, if baseline { 0 } else { new });
            }
        }
    }

    /// As the kernel side stated them, for a journal's preamble.
    pub(crate) fn stated(&self) -> Vec<(String, u64)> {
        self.stated.iter().map(|(k, v)| (k.clone(), *v)).collect()
    }

    /// Remembers the totals at a moment, at most once per `spacing_ns`.
    pub(crate) fn remember(&mut self, boot_ns: u64, spacing_ns: u64) {
        let soon = self.moments.back().is_some_and(|(last, _)| boot_ns < last.saturating_add(spacing_ns));
        if !self.changed || soon {
            return;
        }
        self.changed = false;
        if self.moments.len() >= MOMENTS_CAP {
            self.moments.pop_front();
        }
        self.moments.push_back((boot_ns, self.now.clone()));
    }

    /// Totals now.
    pub(crate) fn current(&self) -> Totals {
        self.now.clone()
    }

    /// Totals at or before a moment.
    pub(crate) fn at(&self, boot_ns: u64) -> Totals {
        self.moments.iter().rev().find(|(ns, _)| *ns <= boot_ns).map(|(_, totals)| totals.clone()).unwrap_or_default()
    }

    /// What was lost since then.
    pub(crate) fn since(&self, base: &Totals) -> Vec<LossNote> {
        self.now
            .iter()
            .filter_map(|(what, total)| {
                let count = total.saturating_sub(base.get(what).copied().unwrap_or(0));
                (count > 0).then(|| LossNote { what: what.clone(), count: Some(count) })
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_window_states_only_its_share_and_a_restart_is_no_loss() {
        let mut l = Losses::default();
        l.state(&[("samples/full".into(), 10)], false);
        l.remember(100, 1);
        l.count(Loss::BadRecords, 2);
        l.state(&[("samples/full".into(), 15)], false);
        assert_eq!(
            l.since(&l.at(150)),
            [
                LossNote { what: "engine/bad_records".into(), count: Some(2) },
                LossNote { what: "samples/full".into(), count: Some(5) }
            ]
        );
        l.remember(200, 1);
        l.state(&[("samples/full".into(), 3)], false);
        assert_eq!(l.since(&l.at(200)), [LossNote { what: "samples/full".into(), count: Some(3) }]);
        assert_eq!(l.since(&l.at(50)).len(), 2);
    }

    #[test]
    fn names_and_moments_are_bounded() {
        let mut l = Losses::default();
        for i in 0..1000u64 {
            l.add(&format!("n{i}"), 1);
            l.remember(i, 0);
        }
        assert!(l.now.len() <= NAMES_CAP + 1 && l.moments.len() <= MOMENTS_CAP);
    }
}
