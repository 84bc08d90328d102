//! Where the outputs of the session go: ledgers, incident files, log and counters.

use std::fs::{File, Metadata, OpenOptions, Permissions};
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, bail};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use tracing::{error, info, warn};

use super::AgentConfig;
use super::storer::Storer;
use crate::serve::Counters;
use crate::store::incidents::IncidentStore;
use crate::store::ledger::{Ledger, LedgerEntry};
use crate::store::own_dir;
use crate::store::retention::{self, Retention};
use memtrace_engine::output::{Finding, Output};
use memtrace_incident::{KillLine, SigkillEntry, UnwatchedEntry};
use memtrace_incident::{PressureLimit, units};

/// Time for what waits for the disk when the agent stops.
const STOP_LIMIT: Duration = Duration::from_secs(10);

/// Mode of a lock.
const LOCK_MODE: u32 = 0o600;

/// Takes the outputs of the session.
pub(super) struct Sinks {
    pub(super) incidents: IncidentStore,
    /// Saves incidents, beside the loop.
    pub(super) storer: Storer,
    pub(super) kills: Ledger<KillLine>,
    pub(super) sigkills: Ledger<SigkillEntry>,
    pub(super) counters: Counters,
    /// Held while the agent runs: two agents with one state directory would each write every incident, and two with
    /// one journal would move its segments away from each other.
    _locks: (Lock, Option<Lock>),
}

impl Sinks {
    pub(super) fn open(config: &AgentConfig) -> anyhow::Result<Self> {
        let dir = &config.state_dir;
        let incidents = IncidentStore::create(dir)
            .with_context(|| format!("failed to use the state directory {}", dir.display()))?;
        let in_use = format!("runs on {}; stop it or choose another --state-dir", dir.display());
        let state = Lock::take_or_fail(dir, &in_use)?;
        let journal =
            config.session.journal.as_ref().map(|journal| lock_journal(&journal.dir, &state)).transpose()?.flatten();
        let (kills, sigkills) = (open_ledger(dir)?, open_ledger(dir)?);
        let retained = retention::with_room_to_write(config.retain_bytes);
        let retention = Retention::of(&incidents, retained, config.retain_age)
            .with_context(|| format!("failed to list the incidents in {}", dir.display()))?;
        let storer = Storer::start(incidents.clone(), retention)?;
        Ok(Self { incidents, storer, kills, sigkills, counters: Counters::default(), _locks: (state, journal) })
    }

    /// Writes kills and SIGKILLs to their ledgers at once and hands the incidents over to be saved.
    pub(super) fn take(&mut self, outputs: Vec<Output>) {
        let (mut sigkills, mut incidents) = (Vec::new(), Vec::new());
        for output in outputs {
            match output {
                // A kill is written before anything that takes longer.
                Output::Kill(kill) => {
                    self.counters.kills = self.counters.kills.saturating_add(1);
                    let pid = kill.pid;
                    if let Err(error) = self.kills.append(&[KillLine::Kill(kill)]) {
                        self.counters.write_failures = self.counters.write_failures.saturating_add(1);
                        error!("failed to write the kill of {pid} to the ledger: {error}");
                    }
                }
                Output::Sigkill(sigkill) => sigkills.push(sigkill),
                Output::Alert(finding) => self.report(&finding),
                Output::Save(incident) => incidents.push(incident),
            }
        }
        self.append_sigkills(&sigkills);
        // First, so that a kill is durable before the incident that it belongs to.
        self.sync_kills();
        incidents.into_iter().for_each(|incident| self.storer.save(incident));
    }

    /// Has the ledger of kills synced if it was written to.
    fn sync_kills(&mut self) {
        let unsynced = self.kills.take_unsynced();
        if !unsynced.is_empty() {
            self.storer.sync(unsynced);
        }
    }

    /// Writes what is known of a time in which no agent watched to the ledger of kills, counts and logs it.
    pub(super) fn take_unwatched(&mut self, entries: Vec<UnwatchedEntry>) {
        for entry in &entries {
            self.report_unwatched(entry);
        }
        let lines: Vec<KillLine> = entries.into_iter().map(KillLine::Unwatched).collect();
        if let Err(error) = self.kills.append(&lines) {
            self.counters.write_failures = self.counters.write_failures.saturating_add(lines.len() as u64);
            error!("failed to write {} lines about unwatched time to the ledger of kills: {error}", lines.len());
        }
        self.sync_kills();
    }

    fn report_unwatched(&mut self, entry: &UnwatchedEntry) {
        match entry {
            UnwatchedEntry::NotWatched(gap) => {
                let duration_ns = gap.duration_ns;
                self.counters.unwatched_ns = self.counters.unwatched_ns.saturating_add(duration_ns.unwrap_or(0));
                let duration = duration_ns.map_or_else(|| "an unknown time".to_owned(), units::duration);
                let (from, to) = (&gap.from.wall, &gap.to.wall);
                if gap.stopped == Some(true) && !gap.rebooted {
                    info!(from, to, "not watched for {duration}: the agent was stopped");
                } else {
                    warn!(from, to, rebooted = gap.rebooted, "not watched for {duration}");
                }
            }
            UnwatchedEntry::UnwatchedKills(found) if found.kills == 0 => match found.kernel_log_lines_lost {
                Some(lost) => {
                    warn!("no OOM kill was found in the unwatched time, but {lost} lines of the kernel log are lost")
                }
                None => warn!("no OOM kill was found in the unwatched time; what the kernel log lacks is not known"),
            },
            UnwatchedEntry::UnwatchedKills(found) => {
                self.counters.unwatched_kills = self.counters.unwatched_kills.saturating_add(found.kills);
                warn!(
                    with_cgroup = found.with_cgroup,
                    without_cgroup = found.without_cgroup,
                    counted = found.counted,
                    kernel_log_lines_lost = found.kernel_log_lines_lost,
                    "{} that no agent saw: in the kernel log, or counted for their cgroup (memtrace incidents --kills)",
                    units::count(found.kills, "OOM kill", "OOM kills")
                );
            }
            UnwatchedEntry::KernelLog(_) | UnwatchedEntry::Counter(_) => {}
        }
    }

    fn append_sigkills(&mut self, sigkills: &[SigkillEntry]) {
        if sigkills.is_empty() {
            return;
        }
        for sigkill in sigkills {
            let count = self.counters.sigkills.entry(sigkill.cause).or_default();
            *count = count.saturating_add(1);
        }
        if let Err(error) = self.sigkills.append(sigkills) {
            self.counters.write_failures = self.counters.write_failures.saturating_add(sigkills.len() as u64);
            error!("failed to write {} SIGKILLs to their ledger: {error}", sigkills.len());
        }
    }

    /// Counters, also those of the thread that saves.
    pub(super) fn counters(&self) -> Counters {
        let (mut counters, stored) = (self.counters.clone(), self.storer.counts());
        for (kind, saved) in stored.saved {
            let count = counters.saved.entry(kind).or_default();
            *count = count.saturating_add(saved);
        }
        counters.write_failures = counters.write_failures.saturating_add(stored.write_failures);
        (counters.given_up, counters.dropped) = (stored.given_up, stored.dropped);
        counters
    }

    /// Saves what it can before the agent stops. Returns whether that was everything.
    pub(super) fn save_all(&mut self) -> bool {
        self.write_ledgers();
        let left = self.storer.finish(STOP_LIMIT);
        for id in &left {
            error!(%id, "an incident could not be saved before the agent stopped");
        }
        let entries = self.kills.unwritten().saturating_add(self.sigkills.unwritten());
        if entries > 0 {
            error!("{entries} entries of ledgers could not be written before the agent stopped");
        }
        left.is_empty() && entries == 0
    }

    /// Deletes old incident files before the agent stops.
    pub(super) fn end(&self) {
        self.storer.review();
        self.storer.finish(STOP_LIMIT);
    }

    /// Tries again to write what could not be written to the ledgers.
    pub(super) fn write_ledgers(&mut self) {
        for written in [self.kills.write_unwritten(), self.sigkills.write_unwritten()] {
            if let Err(error) = written {
                error!("failed to write to a ledger: {error}");
            }
        }
        self.sync_kills();
    }

    /// Counts and logs a finding.
    fn report(&mut self, finding: &Finding) {
        let path = |path: &Option<String>| path.clone().unwrap_or_else(|| "an unknown cgroup".to_owned());
        match finding {
            Finding::OomKill { incident, pid, comm, cgroup_path, .. } => {
                warn!(%incident, pid, comm, cgroup = path(cgroup_path), "OOM kill");
            }
            Finding::Spike { incident, cgroup_path, peak_bytes, limit_bytes } => {
                self.counters.spikes = self.counters.spikes.saturating_add(1);
                warn!(%incident, cgroup = path(cgroup_path), peak_bytes, limit_bytes, "memory spike");
            }
            Finding::NearMiss { incident, cgroup_path, limit, hits, stalled_ns, .. } => {
                self.counters.near_misses = self.counters.near_misses.saturating_add(1);
                let limit = match limit {
                    PressureLimit::Max => "max",
                    PressureLimit::High => "high",
                };
                warn!(%incident, cgroup = path(cgroup_path), limit, hits, stalled_ns, "a limit was hit, nobody was killed");
            }
            Finding::Stuck { incident, cgroup_path, usage_bytes, limit_bytes, tasks } => {
                self.counters.stuck = self.counters.stuck.saturating_add(1);
                warn!(
                    %incident,
                    cgroup = path(cgroup_path),
                    usage_bytes,
                    limit_bytes,
                    tasks,
                    "stuck at its limit: its OOM killer is off, tasks wait for memory"
                );
            }
            Finding::Unstuck { incident, cgroup_path, under_oom_ns } => {
                info!(%incident, cgroup = path(cgroup_path), under_oom_ns, "no longer stuck at its limit");
            }
            Finding::Disagreement { pid, only_in } => {
                self.counters.disagreements = self.counters.disagreements.saturating_add(1);
                warn!(pid, only_in, "kernel log and hooks disagree about a kill");
            }
        }
    }
}

fn open_ledger<E: LedgerEntry>(dir: &Path) -> anyhow::Result<Ledger<E>> {
    let ledger =
        Ledger::open(dir).with_context(|| format!("failed to open the ledger {}", dir.join(E::FILE).display()))?;
    if ledger.torn_bytes() > 0 {
        warn!("{}: dropped a torn tail of {} bytes", E::FILE, ledger.torn_bytes());
    }
    Ok(ledger)
}

/// The lock of a directory or a socket, released when it is dropped.
#[derive(Debug)]
pub(super) struct Lock(File);

/// What came of taking a lock.
pub(super) enum Taken {
    /// It is ours.
    Held(Lock),
    /// By another process, which has left its id in it.
    ByAnother(Option<u32>),
}

impl Lock {
    /// Locks the directory `dir`.
    fn take(dir: &Path) -> anyhow::Result<Taken> {
        Self::take_file(&dir.join("lock"))
    }

    /// Locks this file. Only its owner can open it, or anybody could hold the lock.
    pub(super) fn take_file(path: &Path) -> anyhow::Result<Taken> {
        let mut file = own_dir::open(path, LOCK_MODE, OpenOptions::new().read(true).write(true))?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => {
                let mut holder = String::new();
                let read = Read::by_ref(&mut file).take(16).read_to_string(&mut holder);
                return Ok(Taken::ByAnother(read.ok().and_then(|_| holder.trim().parse().ok())));
            }
            Err(error) => return Err(error).with_context(|| format!("failed to lock {}", path.display())),
        }
        let failed = || format!("failed to write to {}", path.display());
        // One that an earlier version made was open to everybody.
        file.set_permissions(Permissions::from_mode(LOCK_MODE)).with_context(failed)?;
        // For messages: a full disk does not keep the agent from running.
        let _ = file.set_len(0).and_then(|()| writeln!(file, "{}", std::process::id()));
        Ok(Taken::Held(Self(file)))
    }

    /// As [`Lock::take`]; fails when another process holds it.
    fn take_or_fail(dir: &Path, in_use: &str) -> anyhow::Result<Self> {
        match Self::take(dir)? {
            Taken::Held(lock) => Ok(lock),
            Taken::ByAnother(None) => bail!("another memtrace agent {in_use}"),
            Taken::ByAnother(Some(pid)) => bail!("another memtrace agent (pid {pid}) {in_use}"),
        }
    }

    /// Whether this is the lock of `dir`.
    fn is_of(&self, dir: &Path) -> bool {
        let place = |found: std::io::Result<Metadata>| found.ok().map(|found| (found.dev(), found.ino()));
        place(self.0.metadata()).is_some_and(|ours| place(dir.join("lock").metadata()) == Some(ours))
    }
}

/// Locks the journal's directory; `None` when it is the state directory, which is locked already.
fn lock_journal(dir: &Path, state: &Lock) -> anyhow::Result<Option<Lock>> {
    own_dir::create(dir, 0o700).with_context(|| format!("failed to use the journal directory {}", dir.display()))?;
    if state.is_of(dir) {
        return Ok(None);
    }
    let in_use = format!("uses the journal in {}; stop it or choose another --journal-dir", dir.display());
    Lock::take_or_fail(dir, &in_use).map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_is_locked_once() {
        let dir = tempfile::tempdir().unwrap();
        let (state, journal) = (dir.path().join("state"), dir.path().join("run/journal"));
        std::fs::create_dir(&state).unwrap();
        // As an earlier version left it, with whatever in it.
        std::fs::write(state.join("lock"), "1234567").unwrap();
        let held = Lock::take_or_fail(&state, "runs").unwrap();
        assert_eq!(held.0.metadata().unwrap().mode() & 0o777, LOCK_MODE);
        let own = std::process::id();
        assert!(matches!(Lock::take(&state).unwrap(), Taken::ByAnother(Some(pid)) if pid == own));
        assert!(lock_journal(&state, &held).unwrap().is_none(), "one directory for both is one lock");
        let first = lock_journal(&journal, &held).unwrap();
        assert!(first.is_some());
        let error = lock_journal(&journal, &held).err().unwrap().to_string();
        assert!(error.contains(&format!("agent (pid {own}) uses the journal in")), "{error}");
        assert!(error.contains("run/journal"), "{error}");
        drop(first);
        assert!(lock_journal(&journal, &held).unwrap().is_some());
        std::fs::write(dir.path().join("file"), "").unwrap();
        let error = format!("{:#}", lock_journal(&dir.path().join("file"), &held).err().unwrap());
        assert!(error.contains("journal directory"), "{error}");
    }
}
