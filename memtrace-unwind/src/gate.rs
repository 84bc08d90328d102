//! The gate that every reading of another program's files goes through.
//!
//! Those files are the one thing here that is neither bounded nor trusted: a file system may never
//! answer, and a program may make its files as large and as many as it likes. So each reading is
//! refused, or announced and paid for. [`Refused`] has the
//! processes, devices and users that a reader of this process hung on before. What is announced to
//! the [`ReadObserver`] lets whoever waits for this reader tell what it waits for. What a reading
//! costs in CPU time is taken off two accounts, that of its process and that of all; while either is
//! in debt nothing more is read for that process.

use std::collections::{BTreeSet, HashMap};
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

/// Processes with an account of their own; beyond it all begin anew.
const MAX_ACCOUNTS: usize = 1024;
/// What an account holds at most, as time in which its rate earns it.
const BURST: Duration = Duration::from_secs(2);
/// What an account holds at least when it is full: a program that starts is read at once.
const LEAST_BURST_NS: i64 = 20_000_000;
/// Refused processes, devices and users, each; the first ones are forgotten.
pub const MAX_REFUSED: usize = 256;

/// Process id and start time (boot clock, nanoseconds): unique, however ids are reused.
pub type ProcessKey = (u32, u64);

/// What is about to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reading {
    /// The process whose file it is.
    pub process: ProcessKey,
    /// Its user; `None` when it could not be read.
    pub user: Option<u32>,
    /// Device number of the file; `None` for files of /proc and files that are found by a path.
    pub device: Option<(u32, u32)>,
}

/// Is told before something is read, and when that has ended. Readings of one process and device in a
/// row are told once: whoever listens is woken each time.
pub trait ReadObserver: std::fmt::Debug {
    /// Readings begin, and may never end.
    fn begin(&mut self, reading: &Reading);
    /// They have ended.
    fn end(&mut self);
}

/// Whose files are not touched any more. Cap of each: [`MAX_REFUSED`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Refused {
    /// Processes.
    pub processes: BTreeSet<ProcessKey>,
    /// Device numbers, major and minor.
    pub devices: BTreeSet<(u32, u32)>,
    /// Users.
    pub users: BTreeSet<u32>,
}

impl Refused {
    /// Whether this must not be read.
    pub fn holds(&self, reading: &Reading) -> bool {
        self.processes.contains(&reading.process)
            || reading.device.is_some_and(|device| self.devices.contains(&device))
            || reading.user.is_some_and(|user| self.users.contains(&user))
    }
}

/// What was not read, since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GateCounts {
    /// Readings refused because a reader hung there before.
    pub refused: u64,
    /// Readings put off because an account was in debt.
    pub over_budget: u64,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Gate {
    observer: Option<Box<dyn ReadObserver>>,
    refused: Refused,
    /// CPU time that readings may take, in parts per million of one CPU; `None`: any.
    rate_ppm: Option<u64>,
    all: Account,
    /// Cap: [`MAX_ACCOUNTS`].
    accounts: HashMap<ProcessKey, Account>,
    current: Option<(ProcessKey, Option<u32>)>,
    /// What the observer was told last, and not that it has ended.
    announced: Option<Reading>,
    counts: GateCounts,
}

impl Gate {
    /// Tells `observer`, refuses `refused`, and holds readings to `rate_ppm` parts per million of a
    /// CPU in all and to half of that for one process.
    pub fn new(observer: Box<dyn ReadObserver>, refused: Refused, rate_ppm: u64) -> Self {
        Self { observer: Some(observer), refused, rate_ppm: Some(rate_ppm), ..Self::default() }
    }

    pub(crate) fn refuse(&mut self, refused: Refused) {
        self.refused = refused;
    }

    /// The process for which readings come next; its user is not known yet.
    pub(crate) fn set_process(&mut self, key: ProcessKey) {
        self.current = Some((key, None));
    }

    /// The user of that process, if it is known.
    pub(crate) fn set_user(&mut self, user: Option<u32>) {
        if let Some((_, of)) = &mut self.current {
            *of = user;
        }
    }

    /// Whether a reading would be paid for now.
    pub(crate) fn affords(&mut self) -> bool {
        let (Some(rate_ppm), Some((key, _))) = (self.rate_ppm, self.current) else { return true };
        let now = Instant::now();
        let mine = self.accounts.get_mut(&key).is_none_or(|account| account.balance(now, rate_ppm / 2) > 0);
        mine && self.all.balance(now, rate_ppm) > 0
    }

    /// Reads, unless that is refused or not paid for.
    pub(crate) fn pass<T>(&mut self, device: Option<(u32, u32)>, read: impl FnOnce() -> T) -> Option<T> {
        let Some((process, user)) = self.current else { return Some(read()) };
        let reading = Reading { process, user, device };
        if self.refused.holds(&reading) {
            self.counts.refused = self.counts.refused.saturating_add(1);
            return None;
        }
        if !self.affords() {
            self.counts.over_budget = self.counts.over_budget.saturating_add(1);
            return None;
        }
        if self.announced != Some(reading)
            && let Some(observer) = &mut self.observer
        {
            observer.begin(&reading);
            self.announced = Some(reading);
        }
        let begin = cpu_ns();
        let found = read();
        self.charge(process, cpu_ns().saturating_sub(begin));
        Some(found)
    }

    /// Nothing is read for now.
    pub(crate) fn rest(&mut self) {
        if self.announced.take().is_some()
            && let Some(observer) = &mut self.observer
        {
            observer.end();
        }
    }

    fn charge(&mut self, process: ProcessKey, spent_ns: i64) {
        let Some(rate_ppm) = self.rate_ppm else { return };
        let now = Instant::now();
        if self.accounts.len() >= MAX_ACCOUNTS && !self.accounts.contains_key(&process) {
            self.accounts.clear();
        }
        self.accounts.entry(process).or_default().charge(now, rate_ppm / 2, spent_ns);
        self.all.charge(now, rate_ppm, spent_ns);
    }

    /// What was not read, since the start.
    pub(crate) fn counts(&self) -> GateCounts {
        self.counts
    }
}

/// CPU time that is earned as time passes, and spent.
#[derive(Clone, Copy, Debug, Default)]
struct Account {
    /// When it was filled last, and what it held then, nanoseconds; `None`: full.
    filled: Option<(Instant, i64)>,
}

impl Account {
    fn balance(&mut self, now: Instant, rate_ppm: u64) -> i64 {
        let full = earned_ns(BURST, rate_ppm).max(LEAST_BURST_NS);
        let balance = self.filled.map_or(full, |(at, held)| {
            held.saturating_add(earned_ns(now.saturating_duration_since(at), rate_ppm)).min(full)
        });
        self.filled = Some((now, balance));
        balance
    }

    fn charge(&mut self, now: Instant, rate_ppm: u64, spent_ns: i64) {
        let left = self.balance(now, rate_ppm).saturating_sub(spent_ns);
        self.filled = Some((now, left));
    }
}

fn earned_ns(time: Duration, rate_ppm: u64) -> i64 {
    let earned = time.as_nanos().saturating_mul(u128::from(rate_ppm)) / 1_000_000;
    i64::try_from(earned).unwrap_or(i64::MAX)
}

/// CPU time of this thread, nanoseconds.
fn cpu_ns() -> i64 {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    time.tv_sec.saturating_mul(1_000_000_000).saturating_add(time.tv_nsec)
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    #[derive(Debug, Default)]
    struct Heard(Arc<Mutex<Vec<Option<Reading>>>>);

    impl ReadObserver for Heard {
        fn begin(&mut self, reading: &Reading) {
            self.0.lock().unwrap().push(Some(*reading));
        }

        fn end(&mut self) {
            self.0.lock().unwrap().push(None);
        }
    }

    #[test]
    fn a_reading_is_announced_unless_it_is_refused() {
        let heard = Arc::new(Mutex::new(Vec::new()));
        let refused = Refused { processes: [(7, 1)].into(), devices: [(0, 40)].into(), users: [1000].into() };
        let mut gate = Gate::new(Box::new(Heard(heard.clone())), refused, 1_000_000);
        gate.set_process((8, 1));
        assert_eq!(gate.pass(Some((8, 1)), || 5), Some(5));
        let reading = Reading { process: (8, 1), user: None, device: Some((8, 1)) };
        assert_eq!(gate.pass(Some((8, 1)), || 6), Some(6));
        assert_eq!(*heard.lock().unwrap(), [Some(reading)], "once for both");
        gate.rest();
        gate.rest();
        assert_eq!(*heard.lock().unwrap(), [Some(reading), None]);
        assert_eq!(gate.pass(Some((0, 40)), || 5), None, "the device");
        gate.set_user(Some(1000));
        assert_eq!(gate.pass(None, || 5), None, "the user");
        gate.set_process((7, 1));
        assert_eq!(gate.pass(None, || 5), None, "the process");
        assert_eq!((gate.counts(), heard.lock().unwrap().len()), (GateCounts { refused: 3, over_budget: 0 }, 2));
    }

    #[test]
    fn who_is_in_debt_waits_and_others_go_on() {
        let (at, rate) = (Instant::now(), 10_000);
        let mut gate = Gate { rate_ppm: Some(rate), ..Gate::default() };
        gate.set_process((7, 1));
        gate.charge((7, 1), LEAST_BURST_NS / 2 + 15_000_000);
        assert!(!gate.affords());
        assert_eq!(gate.pass(None, || ()), None);
        assert_eq!(gate.counts().over_budget, 1);
        gate.set_process((8, 1));
        // All together have 20 ms, of which 25 are spent.
        assert!(!gate.affords());
        let later = |seconds| at + Duration::from_secs(seconds);
        assert!(gate.all.balance(later(1), rate) > 0, "a second at 1 % earns 10 ms");
        assert_eq!(gate.all.balance(later(100), rate), LEAST_BURST_NS, "no more than what is full");
        let mut account = Account::default();
        account.charge(at, rate, 1_000_000_000);
        assert!(account.balance(later(90), rate) < 0 && account.balance(later(100), rate) > 0);
    }
}
