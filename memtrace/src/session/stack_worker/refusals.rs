//! Whose files the stack worker leaves alone, because one hung on them, and for how long.
//!
//! Not for ever: a disk that stalls under load is no attack, and what is on it may be what the next
//! incident is about. The first refusal lasts [`FIRST`], each further one of the same twice as long.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use memtrace_unwind::gate::{MAX_REFUSED, ProcessKey, Reading, Refused};
use tracing::warn;

/// How long the first refusal lasts.
const FIRST: Duration = Duration::from_mins(5);
/// Doublings of that at most: somewhat more than a day.
const MAX_DOUBLINGS: u32 = 9;

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Refusals {
    processes: Expiring<ProcessKey>,
    devices: Expiring<(u32, u32)>,
    users: Expiring<u32>,
}

/// Until when each is refused, and how often it was. `None`: not now. Cap: [`MAX_REFUSED`].
#[derive(Debug)]
struct Expiring<T>(BTreeMap<T, (Option<Instant>, u32)>);

impl<T> Default for Expiring<T> {
    fn default() -> Self {
        Self(BTreeMap::new())
    }
}

impl<T: Ord + Copy> Expiring<T> {
    /// Counts another time; with more than `free` of them it is refused.
    fn add(&mut self, value: T, free: u32, now: Instant) {
        if self.0.len() >= MAX_REFUSED && !self.0.contains_key(&value) {
            // What is refused no more, or else what is refused the shortest.
            let shortest = self.0.iter().min_by_key(|(_, (until, _))| *until).map(|(value, _)| *value);
            shortest.map(|value| self.0.remove(&value));
        }
        let (until, times) = self.0.entry(value).or_default();
        *times = times.saturating_add(1);
        if let Some(before) = times.checked_sub(free.saturating_add(1)) {
            let time = FIRST.saturating_mul(1 << before.min(MAX_DOUBLINGS));
            *until = now.checked_add(time);
        }
    }

    /// True if one is refused no more.
    fn expire(&mut self, now: Instant) -> bool {
        let mut changed = false;
        for (until, _) in self.0.values_mut() {
            if until.is_some_and(|until| until <= now) {
                *until = None;
                changed = true;
            }
        }
        changed
    }

    fn refused(&self) -> impl Iterator<Item = T> {
        self.0.iter().filter(|(_, (until, _))| until.is_some()).map(|(value, _)| *value)
    }
}

impl Refusals {
    /// A worker hung on this.
    pub(super) fn add(&mut self, reading: &Reading, now: Instant) {
        let (pid, _) = reading.process;
        let device = reading.device.map(|(major, minor)| format!(" on device {major}:{minor}")).unwrap_or_default();
        warn!(
            "a file{device} of process {pid} does not answer: files of this process and device are left alone for now"
        );
        self.processes.add(reading.process, 0, now);
        if let Some(device) = reading.device {
            self.devices.add(device, 0, now);
        }
        // Root owns what everybody uses; others have what they do themselves.
        if let Some(user) = reading.user.filter(|user| *user != 0) {
            self.users.add(user, 1, now);
            if self.users.refused().any(|refused| refused == user) {
                warn!("it is not the first one of user {user}: files of its processes are left alone too");
            }
        }
    }

    /// True if [`Refusals::list`] has become shorter.
    pub(super) fn expire(&mut self, now: Instant) -> bool {
        let (processes, devices) = (self.processes.expire(now), self.devices.expire(now));
        self.users.expire(now) || processes || devices
    }

    /// What is refused now.
    pub(super) fn list(&self) -> Refused {
        Refused {
            processes: self.processes.refused().collect(),
            devices: self.devices.refused().collect(),
            users: self.users.refused().collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reading(pid: u32, user: u32) -> Reading {
        Reading { process: (pid, 1), user: Some(user), device: Some((0, pid)) }
    }

    #[test]
    fn a_refusal_ends_and_the_next_one_lasts_longer() {
        let (mut refusals, now) = (Refusals::default(), Instant::now());
        refusals.add(&reading(7, 0), now);
        assert!(refusals.list().processes.contains(&(7, 1)) && refusals.list().devices.contains(&(0, 7)));
        assert!(!refusals.expire(now));
        assert!(refusals.expire(now + FIRST) && refusals.list() == Refused::default());
        refusals.add(&reading(7, 0), now);
        assert!(!refusals.expire(now + FIRST) && refusals.expire(now + FIRST * 2));
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
