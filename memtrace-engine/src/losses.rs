//! Loss counters over time. Totals are remembered at intervals, so that an incident can state what
//! was lost within its window and not since the start of the run.

use std::collections::{BTreeMap, VecDeque};

use memtrace_incident::{Loss, LossNote};

/// Labels that have a counter of their own. Further labels share [`Loss::Other`].
pub(crate) const NAMES_CAP: usize = 256;
/// Moments with remembered totals; the oldest is dropped. More than a window is divided into.
const MOMENTS_CAP: usize = 128;

type Totals = BTreeMap<String, u64>;

/// Totals and their history.
#[derive(Clone, Debug, Default)]
pub(crate) struct Losses {
    now: Totals,
    /// Totals of the last [`crate::input::Fact::Losses`], to find increments. After a restart they
    /// begin at 0 again. Cap: [`NAMES_CAP`].
    last_totals: Totals,
    /// Time and totals, oldest first. Cap: [`MOMENTS_CAP`].
    moments: VecDeque<(u64, Totals)>,
    changed: bool,
}

impl Losses {
    /// Counts a loss of the engine itself.
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

    /// Takes totals since the start of their source and counts what they grew by. With `baseline`
    /// only remembers them, because the losses happened before this engine began.
    pub(crate) fn record_totals(&mut self, totals: &[(String, u64)], baseline: bool) {
        for (what, total) in totals.iter().take(NAMES_CAP) {
            let what = &Loss::canonical(what);
            let before = self.last_totals.get(what).copied().unwrap_or(0);
            let new = if *total >= before { total - before } else { *total };
            if self.last_totals.len() < NAMES_CAP || self.last_totals.contains_key(what) {
                self.last_totals.insert(what.clone(), *total);
                self.add(what, if baseline { 0 } else { new });
            }
        }
    }

    /// The totals last taken by [`Losses::record_totals`], for a journal's preamble.
    pub(crate) fn last_totals(&self) -> Vec<(String, u64)> {
        self.last_totals.iter().map(|(k, v)| (k.clone(), *v)).collect()
    }

    /// Remembers the totals at a moment, at most once in `spacing_ns`.
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

    /// The totals now.
    pub(crate) fn current(&self) -> Totals {
        self.now.clone()
    }

    /// The totals as remembered last at or before a moment.
    pub(crate) fn at(&self, boot_ns: u64) -> Totals {
        self.moments.iter().rev().find(|(ns, _)| *ns <= boot_ns).map(|(_, totals)| totals.clone()).unwrap_or_default()
    }

    /// What was lost since `base`, by label.
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
        let mut losses = Losses::default();
        losses.record_totals(&[("samples/full".into(), 10)], false);
        losses.remember(100, 1);
        losses.count(Loss::BadRecords, 2);
        losses.record_totals(&[("samples/full".into(), 15)], false);
        assert_eq!(
            losses.since(&losses.at(150)),
            [
                LossNote { what: "engine/bad_records".into(), count: Some(2) },
                LossNote { what: "samples/full".into(), count: Some(5) }
            ]
        );
        losses.remember(200, 1);
        losses.record_totals(&[("samples/full".into(), 3)], false);
        assert_eq!(losses.since(&losses.at(200)), [LossNote { what: "samples/full".into(), count: Some(3) }]);
        assert_eq!(losses.since(&losses.at(50)).len(), 2);
    }

    #[test]
    fn names_and_moments_are_bounded() {
        let mut losses = Losses::default();
        for i in 0..1000u64 {
            losses.add(&format!("n{i}"), 1);
            losses.remember(i, 0);
        }
        assert!(losses.now.len() <= NAMES_CAP + 1 && losses.moments.len() <= MOMENTS_CAP);
    }
}
