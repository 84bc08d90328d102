//! How fast each sender of SIGKILL gets entries of the ledger. Anybody can kill their own children
//! as fast as they like, and nobody's flood may cost others their entries: each user and cgroup has
//! a rate of its own, and the last quarter of what all have together is only for those who have
//! sent few.
//!
//! What is left out is not forgotten: the last one of a sender is kept, and gets its entry as soon
//! as there is room, with how many were left out before it.

use std::collections::BTreeMap;

use memtrace_incident::{SigkillCause, SigkillEntry};

/// Senders with a rate of their own; further ones share one.
const SENDERS_CAP: usize = 256;
/// Entries of all senders at once.
const BURST: u64 = 1000;
/// One more entry of all senders in this time.
const PERIOD_NS: u64 = 10_000_000;
/// Entries of one sender at once.
pub(super) const OWN_BURST: u64 = 250;
/// Entries of one sender at once from the last quarter of all.
const FEW: u64 = 4;
/// One more entry of a sender in this time.
const OWN_PERIOD_NS: u64 = 40_000_000;

/// User and cgroup of the sender. For what the kernel sends by itself, the cgroup of the target.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Sender {
    By(Option<u32>, Option<u64>),
    Kernel(Option<u64>),
    Others,
}

impl Sender {
    fn of(entry: &SigkillEntry) -> Self {
        match entry.cause {
            SigkillCause::Oom | SigkillCause::Kernel => Self::Kernel(entry.cgroup_id),
            _ => Self::By(entry.sender_uid, entry.sender_cgroup_id),
        }
    }
}

/// Entries that were left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct LeftOut {
    pub(super) count: u64,
    /// When the first and the last were sent, boot clock.
    pub(super) from_ns: u64,
    pub(super) until_ns: u64,
    /// Whether they are all of one user and cgroup.
    pub(super) same_sender: bool,
}

/// A rate limit: entries at once, and one more in each period.
#[derive(Clone, Copy, Debug, Default)]
struct Rate {
    /// When the whole burst is available again, boot clock.
    spent_until_ns: u64,
}

impl Rate {
    /// Entries of the burst that are used up.
    fn spent(self, now: u64, period_ns: u64) -> u64 {
        self.spent_until_ns.saturating_sub(now).div_ceil(period_ns)
    }

    fn take(&mut self, now: u64, period_ns: u64) {
        self.spent_until_ns = self.spent_until_ns.max(now).saturating_add(period_ns);
    }
}

#[derive(Clone, Debug, Default)]
struct OneSender {
    rate: Rate,
    /// The last entry that was left out, and those before it.
    last: Option<(SigkillEntry, Option<LeftOut>)>,
}

/// The rates of all senders.
#[derive(Clone, Debug, Default)]
pub(super) struct SenderRates {
    all: Rate,
    /// Cap: [`SENDERS_CAP`], and [`Sender::Others`].
    senders: BTreeMap<Sender, OneSender>,
}

impl SenderRates {
    /// The entry, with those left out before it, if its sender may have it now. With `all`, it may.
    pub(super) fn take(&mut self, entry: SigkillEntry, now: u64, all: bool) -> Option<(SigkillEntry, Option<LeftOut>)> {
        let sender = self.known(Sender::of(&entry), now);
        let allowed = all || self.allowed(sender, now);
        let own = self.senders.entry(sender).or_default();
        // One that is left out already stays the last only if nothing comes after it.
        let before = own.last.take().map(|(last, left_out)| LeftOut {
            count: left_out.map_or(0, |left_out| left_out.count).saturating_add(1),
            from_ns: left_out.map_or(last.boot_ns, |left_out| left_out.from_ns.min(last.boot_ns)),
            until_ns: left_out.map_or(last.boot_ns, |left_out| left_out.until_ns.max(last.boot_ns)),
            same_sender: sender != Sender::Others,
        });
        if !allowed {
            own.last = Some((entry, before));
            return None;
        }
        own.rate.take(now, OWN_PERIOD_NS);
        self.all.take(now, PERIOD_NS);
        Some((entry, before))
    }

    /// The last entries that were left out of senders who may have one again; with `all`, of all.
    pub(super) fn overdue(&mut self, now: u64, all: bool) -> Vec<(SigkillEntry, Option<LeftOut>)> {
        let waiting: Vec<Sender> =
            self.senders.iter().filter(|(_, own)| own.last.is_some()).map(|(sender, _)| *sender).collect();
        let mut found = Vec::new();
        for sender in waiting {
            // Not before half of the burst is there again: the flood may go on.
            let calm = self.spent(sender, now) <= OWN_BURST / 2;
            if !(all || (calm && self.allowed(sender, now))) {
                continue;
            }
            let Some(own) = self.senders.get_mut(&sender) else { continue };
            if let Some(last) = own.last.take() {
                own.rate.take(now, OWN_PERIOD_NS);
                self.all.take(now, PERIOD_NS);
                found.push(last);
            }
        }
        found
    }

    /// The sender itself, or all that share a rate.
    fn known(&mut self, sender: Sender, now: u64) -> Sender {
        if self.senders.contains_key(&sender) {
            return sender;
        }
        if self.senders.len() >= SENDERS_CAP {
            self.senders.retain(|_, own| own.last.is_some() || own.rate.spent_until_ns > now);
        }
        if self.senders.len() < SENDERS_CAP { sender } else { Sender::Others }
    }

    fn spent(&self, sender: Sender, now: u64) -> u64 {
        self.senders.get(&sender).map_or(0, |own| own.rate.spent(now, OWN_PERIOD_NS))
    }

    fn allowed(&self, sender: Sender, now: u64) -> bool {
        let (own, all) = (self.spent(sender, now), self.all.spent(now, PERIOD_NS));
        own < OWN_BURST && all < BURST && (all < BURST / 4 * 3 || own < FEW)
    }

    pub(super) fn memory_estimate(&self) -> usize {
        self.senders.len() * (size_of::<Sender>() + size_of::<OneSender>() + 64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const T: u64 = 1_000_000_000_000;

    fn entry(uid: u32, cgroup: u64, boot_ns: u64) -> SigkillEntry {
        SigkillEntry {
            boot_ns,
            wall: String::new(),
            pid: 1,
            start_boot_ns: 1,
            comm: String::new(),
            cgroup_id: None,
            cgroup_path: None,
            cause: SigkillCause::Process,
            sender_pid: 2,
            sender_start_boot_ns: 2,
            sender_comm: String::new(),
            sender_uid: Some(uid),
            sender_cgroup_id: Some(cgroup),
            sender_cgroup_path: None,
            incident: None,
            more: None,
        }
    }

    #[test]
    fn a_flood_of_one_costs_others_nothing_and_is_counted_to_the_last() {
        let mut rates = SenderRates::default();
        let taken = (0..100_000u64).filter(|at| rates.take(entry(1000, 1, T + at), T, false).is_some()).count();
        assert_eq!(taken as u64, OWN_BURST);
        // The same user elsewhere, and another in the same cgroup.
        assert!(rates.take(entry(1000, 2, T), T, false).is_some_and(|(_, before)| before.is_none()));
        assert!(rates.take(entry(0, 1, T), T, false).is_some());
        // The flood goes on: the next that is allowed says how many are missing.
        let later = T + OWN_PERIOD_NS;
        let (next, before) = rates.take(entry(1000, 1, later), later, false).unwrap();
        let count = 100_000 - OWN_BURST;
        let left_out = LeftOut { count, from_ns: T + OWN_BURST, until_ns: T + 99_999, same_sender: true };
        assert_eq!((next.boot_ns, before), (later, Some(left_out)));
        // It ends: the last one that was left out gets its entry.
        assert!(rates.take(entry(1000, 1, later + 1), later, false).is_none());
        assert!(rates.take(entry(1000, 1, later + 2), later, false).is_none());
        assert!(rates.overdue(later, false).is_empty());
        let overdue = rates.overdue(later + OWN_BURST * OWN_PERIOD_NS, false);
        assert_eq!((overdue.len(), overdue[0].0.boot_ns), (1, later + 2));
        assert_eq!(overdue[0].1.map(|left_out| left_out.count), Some(1));
    }

    #[test]
    fn many_that_flood_leave_room_for_who_sends_few_and_take_no_memory() {
        let mut rates = SenderRates::default();
        for user in 0..20_000u32 {
            for at in 0..5 {
                rates.take(entry(user + 1, 1, T + at), T, false);
            }
        }
        assert!(rates.senders.len() <= SENDERS_CAP + 1);
        let mut rates = SenderRates::default();
        let mut taken = 0;
        for user in 1..20u32 {
            taken += (0..300).filter(|at| rates.take(entry(user, 1, T + at), T, false).is_some()).count() as u64;
        }
        assert!(rates.take(entry(0, 1, T), T, false).is_some(), "the last quarter is for those who send few");
        let left_out: u64 =
            rates.overdue(T, true).iter().map(|(_, before)| before.map_or(0, |before| before.count) + 1).sum();
        assert_eq!(left_out + taken, 19 * 300, "each is taken or counted");
    }
}
