//! Whose files the stack worker leaves alone, because one hung on them, and for how long.
//!
//! Not for ever: a disk that stalls under load is no attack, and what is on it may be what the next
//! incident is about. The first refusal lasts [`FIRST`], each further one of the same twice as
//! long, until it was quiet for as long again.
//!
//! Processes, users and device numbers can be had in any number, so after a file system hung that
//! is no disk, those that the host has not mounted are left alone altogether for a while.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use memtrace_unwind::gate::{MAX_REFUSED, Place, ProcessKey, Reading, Refused};
use tracing::warn;

/// How long the first refusal lasts.
const FIRST: Duration = Duration::from_mins(5);
/// The same of a process that kept its address space locked: one that is at its memory limit does
/// that for moments.
const FIRST_LOCKED: Duration = Duration::from_secs(5);
/// Doublings of that at most: somewhat more than a day.
const MAX_DOUBLINGS: u32 = 9;

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Refusals {
    processes: Expiring<ProcessKey>,
    devices: Expiring<(u32, u32)>,
    users: Expiring<u32>,
    strangers: Expiring<()>,
}

/// What is refused, or was. Cap: [`MAX_REFUSED`].
#[derive(Debug)]
struct Expiring<T>(BTreeMap<T, Refusal>);

#[derive(Clone, Copy, Debug)]
struct Refusal {
    /// How often.
    times: u32,
    /// `None`: not now.
    until: Option<Instant>,
    /// When it is as if it had never been.
    forgotten: Instant,
}

impl<T> Default for Expiring<T> {
    fn default() -> Self {
        Self(BTreeMap::new())
    }
}

impl<T: Ord + Copy> Expiring<T> {
    fn entry(&mut self, value: T, now: Instant) -> &mut Refusal {
        if self.0.len() >= MAX_REFUSED && !self.0.contains_key(&value) {
            // What is refused no more, or else what is refused the shortest.
            let shortest = self.0.iter().min_by_key(|(_, refusal)| refusal.until).map(|(value, _)| *value);
            shortest.map(|value| self.0.remove(&value));
        }
        self.0.entry(value).or_insert(Refusal { times: 0, until: None, forgotten: now })
    }

    /// Counts another time; with more than `free` of them it is refused, for `first` the first
    /// time.
    fn add(&mut self, value: T, free: u32, first: Duration, now: Instant) {
        let refusal = self.entry(value, now);
        refusal.times = refusal.times.saturating_add(1);
        let doublings = refusal.times.saturating_sub(free).saturating_sub(1).min(MAX_DOUBLINGS);
        let time = first.saturating_mul(1 << doublings);
        if refusal.times > free {
            refusal.until = now.checked_add(time).max(refusal.until);
        }
        refusal.forgotten = now.checked_add(time.saturating_mul(2)).unwrap_or(now);
    }

    /// Refuses it for [`FIRST`] from now on at least, without counting.
    fn hold(&mut self, value: T, now: Instant) {
        let refusal = self.entry(value, now);
        refusal.until = now.checked_add(FIRST).max(refusal.until);
        refusal.forgotten = refusal.until.map_or(refusal.forgotten, |until| until.max(refusal.forgotten));
    }

    fn expire(&mut self, now: Instant) {
        self.0.retain(|_, refusal| {
            refusal.until = refusal.until.filter(|until| *until > now);
            refusal.until.is_some() || refusal.forgotten > now
        });
    }

    fn refused(&self) -> impl Iterator<Item = T> {
        self.0.iter().filter(|(_, refusal)| refusal.until.is_some()).map(|(value, _)| *value)
    }
}

impl Refusals {
    /// A worker hung or ended over this.
    pub(super) fn add(&mut self, reading: &Reading, now: Instant) {
        let (pid, _) = reading.process;
        let device = reading.place.device();
        let device = device.map(|(major, minor)| format!(" on device {major}:{minor}")).unwrap_or_default();
        warn!("a file{device} of process {pid} does not answer: files of this process are left alone for now");
        let first = if reading.place == Place::Proc { FIRST_LOCKED } else { FIRST };
        self.processes.add(reading.process, 0, first, now);
        match reading.place {
            // A disk is what everybody has their files on; that it is slow for once is no reason.
            Place::Device(device @ (1.., _)) => self.devices.add(device, 1, FIRST, now),
            Place::Device(device) => {
                self.devices.add(device, 0, FIRST, now);
                self.strangers.hold((), now);
            }
            Place::Path => self.strangers.hold((), now),
            Place::Proc => {}
        }
        // Root owns what everybody uses; others have what they do themselves.
        if let Some(user) = reading.user.filter(|user| *user != 0) {
            self.users.add(user, 1, first, now);
            if self.users.refused().any(|refused| refused == user) {
                warn!("it is not the first one of user {user}: files of its processes are left alone too");
            }
        }
    }

    /// A worker that was killed still hangs on this: it goes on being refused, with what else its
    /// user has.
    pub(super) fn hold(&mut self, reading: &Reading, now: Instant) {
        self.processes.hold(reading.process, now);
        let device = reading.place.device().filter(|(major, _)| *major == 0);
        device.iter().for_each(|device| self.devices.hold(*device, now));
        let user = reading.user.filter(|user| *user != 0);
        user.iter().for_each(|user| self.users.hold(*user, now));
    }

    /// Time has passed.
    pub(super) fn expire(&mut self, now: Instant) {
        self.processes.expire(now);
        self.devices.expire(now);
        self.users.expire(now);
        self.strangers.expire(now);
    }

    /// What is refused now.
    pub(super) fn list(&self) -> Refused {
        Refused {
            processes: self.processes.refused().collect(),
            devices: self.devices.refused().collect(),
            users: self.users.refused().collect(),
            strangers: self.strangers.refused().next().is_some(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reading(pid: u32, user: u32) -> Reading {
        Reading { process: (pid, 1), user: Some(user), place: Place::Device((0, pid)) }
    }

    #[test]
    fn a_refusal_ends_and_the_next_one_lasts_longer() {
        let (mut refusals, now) = (Refusals::default(), Instant::now());
        let expired = |refusals: &mut Refusals, after: Duration| {
            refusals.expire(now + after);
            refusals.list() == Refused::default()
        };
        refusals.add(&reading(7, 0), now);
        let refused = refusals.list();
        assert!(refused.processes.contains(&(7, 1)) && refused.devices.contains(&(0, 7)) && refused.strangers);
        assert!(!expired(&mut refusals, Duration::ZERO) && expired(&mut refusals, FIRST));
        refusals.add(&reading(7, 0), now);
        assert!(!expired(&mut refusals, FIRST) && !refusals.list().strangers, "that one does not grow");
        assert!(expired(&mut refusals, FIRST * 2));
        // It was quiet for long enough.
        assert!(expired(&mut refusals, FIRST * 4) && refusals.processes.0.is_empty());
    }

    #[test]
    fn a_process_that_is_locked_for_a_moment_is_refused_for_a_moment() {
        let (mut refusals, now) = (Refusals::default(), Instant::now());
        let locked = Reading { process: (1, 1), user: Some(1000), place: Place::Proc };
        refusals.add(&locked, now);
        assert_eq!(refusals.list(), Refused { processes: [(1, 1)].into(), ..Refused::default() });
        refusals.expire(now + FIRST_LOCKED);
        assert_eq!(refusals.list(), Refused::default());
        refusals.add(&locked, now + FIRST_LOCKED);
        refusals.expire(now + FIRST_LOCKED * 2);
        assert!(refusals.list().processes.contains(&(1, 1)), "twice as long");
    }

    #[test]
    fn a_disk_is_refused_the_second_time() {
        let (mut refusals, now) = (Refusals::default(), Instant::now());
        let on_disk = |pid| Reading { process: (pid, 1), user: Some(0), place: Place::Device((8, 1)) };
        refusals.add(&on_disk(1), now);
        assert!(refusals.list().devices.is_empty() && !refusals.list().strangers);
        refusals.add(&on_disk(2), now);
        assert_eq!(refusals.list().devices, [(8, 1)].into());
    }

    #[test]
    fn what_a_worker_still_hangs_on_is_refused_without_an_end() {
        let (mut refusals, now) = (Refusals::default(), Instant::now());
        refusals.add(&reading(7, 1000), now);
        let later = now + FIRST;
        refusals.hold(&reading(7, 1000), later);
        refusals.expire(later);
        let refused = refusals.list();
        assert!(refused.processes.contains(&(7, 1)) && refused.devices.contains(&(0, 7)));
        assert_eq!(refused.users, [1000].into(), "its user at once");
    }

    #[test]
    fn a_user_is_refused_the_second_time_and_root_never() {
        let (mut refusals, now) = (Refusals::default(), Instant::now());
        for pid in 1..4 {
            refusals.add(&reading(pid, 0), now);
        }
        refusals.add(&reading(4, 1000), now);
        assert!(refusals.list().users.is_empty());
        refusals.add(&reading(5, 1000), now);
        assert_eq!(refusals.list().users, [1000].into());
    }

    #[test]
    fn refusals_are_bounded() {
        let (mut refusals, now) = (Refusals::default(), Instant::now());
        for pid in 0..2 * MAX_REFUSED as u32 {
            refusals.add(&reading(pid, pid), now + Duration::from_secs(u64::from(pid)));
        }
        assert_eq!(refusals.list().processes.len(), MAX_REFUSED);
        assert!(refusals.list().processes.contains(&(2 * MAX_REFUSED as u32 - 1, 1)), "the newest are kept");
        assert!(refusals.users.0.len() <= MAX_REFUSED);
    }
}
