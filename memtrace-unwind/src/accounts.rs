//! Accounts of time: what may be spent is earned as time passes, and saved up to a bound.

use std::collections::HashMap;
use std::hash::Hash;
use std::time::{Duration, Instant};

/// Accounts of one kind.
const MAX_ACCOUNTS: usize = 1024;
/// What an account holds at most, as time in which its rate earns it.
const BURST: Duration = Duration::from_secs(2);
/// What an account holds at least when it is full: a program that starts is read at once.
pub(crate) const LEAST_BURST_NS: i64 = 20_000_000;

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
        Self { ppm, full_ns: earned_ns(BURST, ppm).max(LEAST_BURST_NS) }
    }

    /// That of one user: a quarter is for the others.
    pub(crate) fn of_user(ppm: u64) -> Self {
        Self::of_cpu(ppm / 4 * 3)
    }

    /// That of one process: half is for the others.
    pub(crate) fn of_process(ppm: u64) -> Self {
        Self::of_cpu(ppm / 2)
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

    /// Takes off what was spent.
    pub(crate) fn charge(&mut self, now: Instant, rate: Rate, spent_ns: i64) {
        let left = self.balance(now, rate).saturating_sub(spent_ns);
        self.filled = Some((now, left));
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

    /// Takes off what was spent.
    pub(crate) fn charge(&mut self, of: K, now: Instant, rate: Rate, spent_ns: i64) {
        if self.0.len() >= MAX_ACCOUNTS && !self.0.contains_key(&of) {
            let richest = self.0.iter_mut().map(|(of, account)| (account.balance(now, rate), *of));
            richest.max_by_key(|(held, _)| *held).map(|(_, of)| self.0.remove(&of));
        }
        self.0.entry(of).or_default().charge(now, rate, spent_ns);
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
