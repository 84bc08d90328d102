//! Accounts of time: what may be spent is earned as time passes, and saved up to a bound.

use std::collections::HashMap;
use std::hash::Hash;
use std::time::{Duration, Instant};

/// Accounts of one kind.
const MAX_ACCOUNTS: usize = 1024;
/// What an account holds at most, as time in which its rate earns it.
const BURST: Duration = Duration::from_secs(2);
/// What the account of a process holds at least when it is full: a program that starts is read at
/// once. That of all holds twice as much.
pub(crate) const LEAST_BURST_NS: i64 = 20_000_000;
/// What is put off at most: what a user earns in this time, or more where that is little, so that it
/// is enough for the dearest readings.
const PUT_OFF: Duration = Duration::from_secs(30);
const LEAST_PUT_OFF_NS: i64 = 1_000_000_000;

/// What an account earns.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rate {
    /// Parts per million of the time that passes.
    pub(crate) ppm: u64,
    /// The most that it holds, nanoseconds.
    pub(crate) full_ns: i64,
}

impl Rate {
    /// That of all readings, of so many parts per million of a CPU.
    pub(crate) fn of_cpu(ppm: u64) -> Self {
        Self { ppm, full_ns: earned_ns(BURST, ppm).max(2 * LEAST_BURST_NS) }
    }

    /// That of one user: a quarter is for the others.
    pub(crate) fn of_user(ppm: u64) -> Self {
        Self::of_cpu(ppm).quarters(3)
    }

    /// That of one process: half is for the others.
    pub(crate) fn of_process(ppm: u64) -> Self {
        Self::of_cpu(ppm).quarters(2)
    }

    fn quarters(self, quarters: u8) -> Self {
        Self { ppm: self.ppm / 4 * u64::from(quarters), full_ns: self.full_ns / 4 * i64::from(quarters) }
    }
}

/// Time that is earned as time passes, and spent.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Account {
    /// When it was filled last, and what it held then, nanoseconds; `None`: full.
    filled: Option<(Instant, i64)>,
}

impl Account {
    /// What it holds, nanoseconds; less than 0 is a debt.
    pub(crate) fn balance(&mut self, now: Instant, rate: Rate) -> i64 {
        let balance = self.filled.map_or(rate.full_ns, |(at, held)| {
            held.saturating_add(earned_ns(now.saturating_duration_since(at), rate.ppm)).min(rate.full_ns)
        });
        self.filled = Some((now, balance));
        balance
    }

    /// Takes off what was spent. Returns how much of it the account did not hold.
    pub(crate) fn charge(&mut self, now: Instant, rate: Rate, spent_ns: i64) -> i64 {
        let held = self.balance(now, rate);
        self.filled = Some((now, held.saturating_sub(spent_ns)));
        spent_ns.saturating_sub(held.max(0)).max(0)
    }
}

/// The account of all. One reading can cost more than all earn in seconds. What it costs beyond what
/// its user's account held is put off: taken off this one no faster than a user earns, so that a
/// quarter of what is earned is there for the others at any time. Beyond a cap it is taken off at once:
/// somebody with many users could otherwise owe without end.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Shared {
    account: Account,
    /// What is put off, nanoseconds, of this time. Cap: [`PUT_OFF`].
    put_off: Option<(Instant, i64)>,
}

impl Shared {
    /// What it holds, nanoseconds, at so many parts per million of a CPU.
    pub(crate) fn balance(&mut self, now: Instant, ppm: u64) -> i64 {
        if let Some((at, owed)) = self.put_off {
            let due = earned_ns(now.saturating_duration_since(at), Rate::of_user(ppm).ppm).min(owed);
            self.put_off = (due < owed).then_some((now, owed.saturating_sub(due)));
            // while it is paid: what it earned in this time may not be cut off at full before
            self.account.filled.iter_mut().for_each(|(_, held)| *held = held.saturating_sub(due));
        }
        self.account.balance(now, Rate::of_cpu(ppm))
    }

    /// Takes off what was spent now, and puts off so much of that and of what was spent before.
    pub(crate) fn charge(&mut self, now: Instant, ppm: u64, spent_ns: i64, put_off_ns: i64) {
        self.balance(now, ppm);
        let owed = self.put_off.map_or(0, |(_, owed)| owed);
        let most = earned_ns(PUT_OFF, Rate::of_user(ppm).ppm).max(LEAST_PUT_OFF_NS);
        let room = most.saturating_sub(owed).max(0);
        let put_off_ns = put_off_ns.min(room);
        self.account.charge(now, Rate::of_cpu(ppm), spent_ns.saturating_sub(put_off_ns));
        let owed = owed.saturating_add(put_off_ns);
        self.put_off = (owed > 0).then_some((now, owed));
    }
}

/// Accounts by who they are of. One that is not there is full.
#[derive(Debug)]
pub(crate) struct Accounts<K>(
    /// Cap: [`MAX_ACCOUNTS`]; beyond it the one is closed that holds most, or owes least.
    HashMap<K, Account>,
);

impl<K> Default for Accounts<K> {
    fn default() -> Self {
        Self(HashMap::new())
    }
}

impl<K: Copy + Eq + Hash> Accounts<K> {
    /// What an account holds.
    pub(crate) fn balance(&mut self, of: K, now: Instant, rate: Rate) -> i64 {
        self.0.get_mut(&of).map_or(rate.full_ns, |account| account.balance(now, rate))
    }

    /// Takes off what was spent. Returns how much of it the account did not hold.
    pub(crate) fn charge(&mut self, of: K, now: Instant, rate: Rate, spent_ns: i64) -> i64 {
        if self.0.len() >= MAX_ACCOUNTS && !self.0.contains_key(&of) {
            let richest = self.0.iter_mut().map(|(of, account)| (account.balance(now, rate), *of));
            richest.max_by_key(|(held, _)| *held).map(|(_, of)| self.0.remove(&of));
        }
        self.0.entry(of).or_default().charge(now, rate, spent_ns)
    }
}

fn earned_ns(time: Duration, rate_ppm: u64) -> i64 {
    let earned = time.as_nanos().saturating_mul(u128::from(rate_ppm)) / 1_000_000;
    i64::try_from(earned).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_overdraft_of_one_leaves_a_quarter_for_others() {
        let (mut all, at, ppm) = (Shared::default(), Instant::now(), 10_000);
        let full = Rate::of_cpu(ppm).full_ns;
        let after = |ms| at + Duration::from_millis(ms);
        let (second, most) = (10_000_000, LEAST_PUT_OFF_NS);
        // It spends what its account holds, and 150 ms beyond: 20 seconds of what a user earns.
        let held = Rate::of_user(ppm).full_ns;
        all.charge(at, ppm, held + 150_000_000, 150_000_000);
        assert_eq!(all.balance(at, ppm), full / 4);
        assert_eq!(all.balance(after(1000), ppm), full / 4 + second / 4);
        // What others spend beyond that waits for a quarter of the rate, not for all that is owed.
        all.charge(after(1000), ppm, full / 4 + second / 2, 0);
        assert_eq!(all.balance(after(1000), ppm), -second / 4);
        assert_eq!(all.balance(after(2000), ppm), 0);
        assert_eq!(all.balance(after(10_000), ppm), 8 * second / 4);
        assert_eq!((all.balance(after(20_000), ppm), all.put_off), (full, None), "all is paid");
        // No more is put off than a user earns in a while.
        let mut all = Shared::default();
        (0..10).for_each(|_| all.charge(at, ppm, most / 2, most / 2));
        assert_eq!(all.balance(at, ppm), full - 4 * most);
    }

    #[test]
    fn accounts_are_bounded_and_debts_are_not_forgotten_for_others() {
        let (mut accounts, now, rate) = (Accounts::default(), Instant::now(), Rate::of_cpu(10_000));
        accounts.charge(0, now, rate, 1_000_000_000);
        for of in 1..3 * MAX_ACCOUNTS as u32 {
            accounts.charge(of, now, rate, 1_000_000);
            assert!(accounts.0.len() <= MAX_ACCOUNTS);
        }
        assert!(accounts.balance(0, now, rate) < 0, "the one in debt stays");
        assert_eq!(accounts.balance(u32::MAX, now, rate), rate.full_ns);
    }
}
