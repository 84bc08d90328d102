//! The gate that every reading of another program's files goes through.
//!
//! Those files are the one thing here that is neither bounded nor trusted: a file system may never
//! answer, and a program may make its files as large and as many as it likes. So each reading is
//! refused, or announced and paid for. [`Refused`] has the processes, devices and users that a
//! reader of this process hung on before, and for a while after that nothing is read from file
//! systems that the host has not mounted: everybody can make those, as many as they like. A reading
//! that is late is given up (`readers`). What is announced to the [`ReadObserver`] lets whoever
//! waits for this process tell what it waits for. What a reading costs in CPU time is taken off three
//! accounts, that of its process, that of its user and that of all; while one is in debt nothing more
//! is read for that process. What a user had not is put off for the account of all (`Shared`): the
//! others have a quarter of the rate at any time.
//!
//! What the calling thread does between readings costs as well: walks over unwind information,
//! parsing, making room in caches. `Gate::settle` takes it off the same accounts, beyond what an
//! ordinary stack takes (`FREE_NS`).

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

use crate::accounts::{Account, Accounts, Rate, Shared};
use crate::host_mounts::HostMounts;
use crate::readers::Readers;
use crate::unwind::{MAX_WORK, ORDINARY_WORK};

#[cfg(test)]
mod tests;

/// Waiting for file systems that the host has not mounted: they may be slow without an end, each
/// time a little less than what is late. A second at first, then a fiftieth of the time.
const STRANGERS: Rate = Rate { ppm: 20_000, full_ns: 1_000_000_000 };
/// How long a reading may wait in /proc: for the lock of an address space.
const PROC_LIMIT: Duration = Duration::from_millis(250);
/// How long a reading may wait for a file.
const FILE_LIMIT: Duration = Duration::from_secs(1);
/// A reading that goes on for this long is announced again: whoever listens times what waits, not a
/// row of readings that is long.
const ANNOUNCED_FOR: Duration = Duration::from_millis(250);
/// CPU time of the calling thread for one stack, or one look at a process, that nobody pays for,
/// nanoseconds. An ordinary stack takes 7,000, and how many there are the sampling budget decides: were
/// they paid for as well, many stacks of honest programs would leave nothing for reading.
const FREE_NS: i64 = 50_000;
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
    /// Where it is.
    pub place: Place,
}

/// Where something is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// In /proc.
    Proc,
    /// A mapped file, on the device with this number.
    Device((u32, u32)),
    /// A file that is found by its path inside the root of the process: on the way there may be any
    /// file system.
    Path,
}

impl Place {
    /// Device number of the file, if it is known.
    pub fn device(self) -> Option<(u32, u32)> {
        match self {
            Self::Device(device) => Some(device),
            Self::Proc | Self::Path => None,
        }
    }

    /// How long a reading may wait there.
    fn limit(self) -> Duration {
        match self {
            Self::Proc => PROC_LIMIT,
            Self::Device(_) | Self::Path => FILE_LIMIT,
        }
    }
}

/// Is told before something is read, and when that has ended. Readings of one process and device in
/// a row are told once in a while: whoever listens is woken each time.
pub trait ReadObserver: std::fmt::Debug {
    /// Readings begin, and may never end.
    fn begin(&mut self, reading: &Reading);
    /// They have ended.
    fn end(&mut self);
    /// This one was given up; so many that were have not ended.
    fn late(&mut self, reading: &Reading, late: usize);
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
    /// File systems that the host has not mounted, and whatever is found by its path.
    pub strangers: bool,
}

impl Refused {
    /// Whether this must not be read.
    pub fn holds(&self, reading: &Reading) -> bool {
        self.processes.contains(&reading.process)
            || reading.place.device().is_some_and(|device| self.devices.contains(&device))
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
    /// Readings that were given up and have not ended: of now.
    pub late: u64,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Gate {
    observer: Option<Box<dyn ReadObserver>>,
    refused: Refused,
    /// CPU time that readings may take, in parts per million of one CPU; `None`: any.
    rate_ppm: Option<u64>,
    all: Shared,
    /// Time that was waited for strangers.
    strangers: Account,
    processes: Accounts<ProcessKey>,
    users: Accounts<u32>,
    current: Option<Current>,
    /// What the observer was told last, and not that it has ended, and when.
    announced: Option<(Reading, Instant)>,
    /// Asked for each device that is read from: other ones are strangers.
    host: HostMounts,
    readers: Readers,
    counts: GateCounts,
}

/// The process for which something is read.
#[derive(Clone, Copy, Debug)]
struct Current {
    process: ProcessKey,
    user: Option<u32>,
    /// What was spent while its user was not known, nanoseconds.
    unpaid_ns: i64,
    /// CPU time of the calling thread up to which it has paid, nanoseconds.
    settled_ns: i64,
    /// What is left of [`FREE_NS`].
    free_ns: i64,
}

impl Gate {
    /// Tells `observer`, refuses `refused`, and holds readings to `rate_ppm` parts per million of a
    /// CPU in all, to three quarters of that for one user and to half of it for one process.
    pub fn new(observer: Box<dyn ReadObserver>, refused: Refused, rate_ppm: u64) -> Self {
        Self { observer: Some(observer), refused, rate_ppm: Some(rate_ppm), ..Self::default() }
    }

    pub(crate) fn refuse(&mut self, refused: Refused) {
        self.refused = refused;
    }

    /// The process for which readings come next; its user is not known yet.
    pub(crate) fn set_process(&mut self, process: ProcessKey) {
        self.current = Some(Current { process, user: None, unpaid_ns: 0, settled_ns: cpu_ns(), free_ns: FREE_NS });
    }

    /// User of the process for which readings come; `None`: not known.
    pub(crate) fn user(&self) -> Option<u32> {
        self.current.and_then(|current| current.user)
    }

    /// The user of that process, once it is known.
    pub(crate) fn set_user(&mut self, user: Option<u32>) {
        let Some(current) = &mut self.current else { return };
        current.user = user;
        if let (Some(user), Some(rate_ppm)) = (user, self.rate_ppm) {
            let unpaid_ns = std::mem::take(&mut current.unpaid_ns);
            if unpaid_ns > 0 {
                let now = Instant::now();
                let beyond_ns = self.users.charge(user, now, Rate::of_user(rate_ppm), unpaid_ns);
                // that of all has paid it already
                self.all.charge(now, rate_ppm, 0, beyond_ns);
            }
        }
    }

    /// Whether a reading would be paid for now.
    pub(crate) fn affords(&mut self) -> bool {
        !self.process_owes()
            && !self.user_owes()
            && self.rate_ppm.is_none_or(|rate_ppm| self.all.balance(Instant::now(), rate_ppm) > 0)
    }

    /// Whether the process is in debt: not because of others.
    pub(crate) fn process_owes(&mut self) -> bool {
        let (Some(rate_ppm), Some(current)) = (self.rate_ppm, self.current) else { return false };
        self.processes.balance(current.process, Instant::now(), Rate::of_process(rate_ppm)) <= 0
    }

    /// Whether its user is, which may be because of other containers: most have the user 0.
    pub(crate) fn user_owes(&mut self) -> bool {
        let (Some(rate_ppm), Some(user)) = (self.rate_ppm, self.user()) else { return false };
        self.users.balance(user, Instant::now(), Rate::of_user(rate_ppm)) <= 0
    }

    /// The work of a walk ([`MAX_WORK`]) that is paid for: of a process in debt none, which leaves rules
    /// that are cached and frame pointers, and of one whose user is what ordinary code needs.
    pub(crate) fn work(&mut self) -> usize {
        if self.process_owes() {
            0
        } else if self.user_owes() {
            ORDINARY_WORK
        } else {
            MAX_WORK
        }
    }

    /// Reads, unless that is refused or not paid for. `None` also if it is late.
    pub(crate) fn pass<T: Send + 'static>(
        &mut self,
        place: Place,
        read: impl FnOnce() -> T + Send + 'static,
    ) -> Option<T> {
        let Some(Current { process, user, .. }) = self.current else { return Some(read()) };
        let reading = Reading { process, user, place };
        let is_strange = match place {
            Place::Proc => false,
            Place::Device(device) => !self.host.have(device),
            Place::Path => true,
        };
        let strangers = self.refused.strangers || self.strangers.balance(Instant::now(), STRANGERS) <= 0;
        if (is_strange && strangers) || self.refused.holds(&reading) {
            self.counts.refused = self.counts.refused.saturating_add(1);
            return None;
        }
        if !self.affords() {
            self.counts.over_budget = self.counts.over_budget.saturating_add(1);
            return None;
        }
        let is_announced = |(announced, at): (Reading, Instant)| announced == reading && at.elapsed() < ANNOUNCED_FOR;
        if let Some(observer) = self.observer.as_mut().filter(|_| !self.announced.is_some_and(is_announced)) {
            observer.begin(&reading);
            self.announced = Some((reading, Instant::now()));
        }
        let timed = move || {
            let begin = cpu_ns();
            let found = read();
            (found, cpu_ns().saturating_sub(begin))
        };
        let begin = Instant::now();
        let read = self.readers.run(place.limit(), timed);
        let spent_ns = read.as_ref().map_or(0, |(_, spent_ns)| *spent_ns);
        if is_strange {
            let elapsed_ns = i64::try_from(begin.elapsed().as_nanos()).unwrap_or(i64::MAX);
            self.strangers.charge(Instant::now(), STRANGERS, elapsed_ns.saturating_sub(spent_ns));
        }
        self.charge(process, spent_ns);
        if read.is_none() {
            self.give_up(&reading);
        }
        read.map(|(found, _)| found)
    }

    /// Refuses what else would be late, until somebody else says for how long.
    fn give_up(&mut self, reading: &Reading) {
        self.counts.refused = self.counts.refused.saturating_add(1);
        if self.refused.processes.len() >= MAX_REFUSED {
            self.refused.processes.clear();
        }
        self.refused.processes.insert(reading.process);
        self.refused.strangers |= reading.place != Place::Proc;
        let late = self.readers.late();
        self.observer.iter_mut().for_each(|observer| observer.late(reading, late));
    }

    /// The process pays for what the calling thread has done for it since it was set, or since it paid
    /// last.
    pub(crate) fn settle(&mut self) {
        let spent_ns = self.take_spent_ns();
        let Some(current) = &mut self.current else { return };
        let free_ns = spent_ns.min(current.free_ns);
        current.free_ns = current.free_ns.saturating_sub(free_ns);
        let process = current.process;
        if spent_ns > free_ns {
            self.charge(process, spent_ns.saturating_sub(free_ns));
        }
    }

    /// Another process pays for what the calling thread has done since the last settlement.
    pub(crate) fn settle_as(&mut self, process: ProcessKey, user: Option<u32>) {
        let spent_ns = self.take_spent_ns();
        self.charge_to(process, user, spent_ns);
    }

    /// CPU time of the calling thread since the last settlement; 0 while no process is set.
    fn take_spent_ns(&mut self) -> i64 {
        let Some(current) = &mut self.current else { return 0 };
        let now_ns = cpu_ns();
        now_ns.saturating_sub(std::mem::replace(&mut current.settled_ns, now_ns))
    }

    /// Nothing is read for now.
    pub(crate) fn rest(&mut self) {
        self.settle();
        if self.announced.take().is_some()
            && let Some(observer) = &mut self.observer
        {
            observer.end();
        }
    }

    /// As if nobody had waited for files of others.
    #[cfg(test)]
    pub(crate) fn forget_waiting(&mut self) {
        self.strangers = Gate::default().strangers;
    }

    /// What an account holds; `None`: it is not kept.
    #[cfg(test)]
    pub(crate) fn balances_ns(&mut self, process: ProcessKey, user: u32) -> Option<(i64, i64)> {
        let (rate_ppm, now) = (self.rate_ppm?, Instant::now());
        let of_process = self.processes.balance(process, now, Rate::of_process(rate_ppm));
        Some((of_process, self.users.balance(user, now, Rate::of_user(rate_ppm))))
    }

    pub(crate) fn charge(&mut self, process: ProcessKey, spent_ns: i64) {
        if self.rate_ppm.is_none() {
            return;
        }
        let user = self.user();
        if let Some(current) = self.current.as_mut().filter(|_| user.is_none()) {
            current.unpaid_ns = current.unpaid_ns.saturating_add(spent_ns);
        }
        self.charge_to(process, user, spent_ns);
    }

    pub(crate) fn charge_to(&mut self, process: ProcessKey, user: Option<u32>, spent_ns: i64) {
        let Some(rate_ppm) = self.rate_ppm else { return };
        let now = Instant::now();
        self.processes.charge(process, now, Rate::of_process(rate_ppm), spent_ns);
        let beyond_ns = user.map_or(0, |user| self.users.charge(user, now, Rate::of_user(rate_ppm), spent_ns));
        self.all.charge(now, rate_ppm, spent_ns, beyond_ns);
    }

    /// What was not read, since the start.
    pub(crate) fn counts(&self) -> GateCounts {
        GateCounts { late: u64::try_from(self.readers.late()).unwrap_or(u64::MAX), ..self.counts }
    }
}

/// CPU time of this thread, nanoseconds.
pub(crate) fn cpu_ns() -> i64 {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    time.tv_sec.saturating_mul(1_000_000_000).saturating_add(time.tv_nsec)
}
