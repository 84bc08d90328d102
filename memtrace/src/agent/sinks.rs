//! Where the outputs of the session go: ledgers, incident files, log and counters.

use std::collections::VecDeque;
use std::fs::{File, Metadata, OpenOptions, Permissions};
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, bail};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use tracing::{error, info, warn};

use super::AgentConfig;
use super::symbolize_queue::SymbolizeQueue;
use crate::serve::Counters;
use crate::store::incidents::IncidentStore;
use crate::store::ledger::{Ledger, LedgerEntry};
use crate::store::own_dir;
use crate::store::retention::{self, DeletedFiles, Retention};
use memtrace_engine::output::{Finding, Output};
use memtrace_incident::{Incident, PressureLimit, units};
use memtrace_incident::{KillLine, SigkillEntry, UnwatchedEntry};

/// Incidents that wait to be saved; beyond it the oldest is given up. A storm of kills closes hundreds at once.
const MAX_WAITING: usize = 1024;
/// The same while saving fails.
const MAX_WAITING_FAILED: usize = 64;
/// Time from a save that failed to the next try. It doubles up to [`RETRY_MOST`].
const RETRY_FIRST: Duration = Duration::from_secs(1);
const RETRY_MOST: Duration = Duration::from_secs(60);

/// Mode of a lock.
const LOCK_MODE: u32 = 0o600;

/// When a save that failed is tried again.
#[derive(Clone, Copy, Debug)]
struct Retry {
    at: Instant,
    pause: Duration,
}

/// Takes the outputs of the session.
pub(super) struct Sinks {
    pub(super) incidents: IncidentStore,
    retention: Retention,
    pub(super) kills: Ledger<KillLine>,
    pub(super) sigkills: Ledger<SigkillEntry>,
    pub(super) counters: Counters,
    /// Closed incidents that are not written yet, oldest first. Cap: [`MAX_WAITING`], [`MAX_WAITING_FAILED`].
    saves: VecDeque<Box<Incident>>,
    /// Set while saving fails.
    retry: Option<Retry>,
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
        let (counters, saves, retry) = (Counters::default(), VecDeque::new(), None);
        Ok(Self { incidents, retention, kills, sigkills, counters, saves, retry, _locks: (state, journal) })
    }

    /// Writes kills and SIGKILLs to their ledgers at once and queues the incidents to be saved.
    pub(super) fn take(&mut self, outputs: Vec<Output>) {
        let mut sigkills = Vec::new();
        for output in outputs {
            match output {
                // A kill is durable before anything that takes longer.
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
                Output::Save(incident) => self.queue(incident),
            }
        }
        self.append_sigkills(&sigkills);
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

    /// Queues an incident to be saved.
    pub(super) fn queue(&mut self, incident: Box<Incident>) {
        let cap = if self.retry.is_some() { MAX_WAITING_FAILED } else { MAX_WAITING };
        while self.saves.len() >= cap
            && let Some(oldest) = self.saves.pop_front()
        {
            self.counters.given_up = self.counters.given_up.saturating_add(1);
            error!(id = %oldest.id, "gave up saving an incident: {cap} others wait");
        }
        self.saves.push_back(incident);
    }

    /// Writes the oldest closed incident; false when there is none, or saving has failed and it is not yet time for the
    /// next try. With `now`, it is.
    pub(super) fn save_one(&mut self, now: bool, symbolize: &mut SymbolizeQueue) -> bool {
        if !now && self.retry.is_some_and(|retry| Instant::now() < retry.at) {
            return false;
        }
        let Some(incident) = self.saves.pop_front() else { return false };
        match self.incidents.save(&incident) {
            Ok(path) => {
                self.retry = None;
                self.counters.count_saved(incident.kind);
                info!(id = %incident.id, file = %path.display(), "saved an incident");
                symbolize.push(&incident, &path);
                let deleted = self.retention.saved(&incident);
                self.report_deleted(deleted);
                // There is room again.
                self.write_ledgers();
            }
            Err(error) => {
                self.counters.write_failures = self.counters.write_failures.saturating_add(1);
                let pause = self.retry.map_or(RETRY_FIRST, |retry| (retry.pause * 2).min(RETRY_MOST));
                self.retry = Some(Retry { at: Instant::now() + pause, pause });
                error!(id = %incident.id, "failed to save an incident: {error}; next try in {pause:?}");
                // Others go first: what is wrong may be wrong with this one only.
                self.saves.push_back(incident);
            }
        }
        self.retry.is_none()
    }

    /// Incidents that wait to be written.
    pub(super) fn waiting(&self) -> u64 {
        self.saves.len() as u64
    }

    /// Saves what it can before the agent stops. Returns whether that was everything.
    pub(super) fn save_all(&mut self, symbolize: &mut SymbolizeQueue) -> bool {
        for _ in 0..self.saves.len() {
            self.save_one(true, symbolize);
        }
        self.write_ledgers();
        for incident in &self.saves {
            error!(id = %incident.id, "an incident could not be saved before the agent stopped");
        }
        let entries = self.kills.unwritten().saturating_add(self.sigkills.unwritten());
        if entries > 0 {
            error!("{entries} entries of ledgers could not be written before the agent stopped");
        }
        self.saves.is_empty() && entries == 0
    }

    /// Tries again to write what could not be written to the ledgers.
    fn write_ledgers(&mut self) {
        for written in [self.kills.write_unwritten(), self.sigkills.write_unwritten()] {
            if let Err(error) = written {
                error!("failed to write to a ledger: {error}");
            }
        }
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

    /// The symbolizer has written an incident again, with names.
    pub(super) fn rewritten(&mut self, path: &Path) {
        let Some(id) = path.file_stem().and_then(|stem| stem.to_str()) else { return };
        let deleted = self.retention.rewritten(id);
        self.report_deleted(deleted);
    }

    /// Deletes incident files that are too old, too large together, or too many.
    pub(super) fn retain(&mut self) {
        let deleted = self.retention.review(SystemTime::now());
        self.report_deleted(deleted);
    }

    /// Counts and logs what retention has deleted.
    fn report_deleted(&mut self, deleted: std::io::Result<DeletedFiles>) {
        match deleted {
            Ok(DeletedFiles { files: 0, .. }) => {}
            Ok(DeletedFiles { files, bytes, newest_of_cgroup, last }) => {
                self.counters.dropped = self.counters.dropped.saturating_add(files);
                let last = last.unwrap_or_default();
                if newest_of_cgroup > 0 {
                    warn!(files, bytes, newest_of_cgroup, last, "deleted incidents, also the newest of a cgroup");
                } else {
                    info!(files, bytes, last, "deleted old incidents");
                }
            }
            Err(error) => error!("failed to delete old incidents: {error}"),
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

/// The lock of a directory, released when it is dropped.
struct Lock(File);

/// What came of taking a lock.
enum Taken {
    Held(Lock),
    /// By another process, which has left its id in it.
    ByAnother(Option<u32>),
}

impl Lock {
    /// Locks `dir/lock`. Only its owner can open that file, or anybody could hold the lock.
    fn take(dir: &Path) -> anyhow::Result<Taken> {
        let path = dir.join("lock");
        let mut file = own_dir::open(&path, LOCK_MODE, OpenOptions::new().read(true).write(true))?;
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
