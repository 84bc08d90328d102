//! The daemon: a session whose effects go to disk, to the log and to whoever asks over HTTP.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::{Context, bail};
use rustix::fs::{FlockOperation, flock};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tracing::{error, info, warn};

use crate::engine::Engine;
use crate::engine::incident::Incident;
use crate::engine::input::{Effect, Fact, Finding, Input};
use crate::report::json;
use crate::serve::{self, Ask, Counters, Library, Readings};
use crate::session::{self, Session};
use crate::store::incidents::{self, Incidents};
use crate::store::journal;
use crate::store::kills::Kills;

/// Requests waiting for the loop.
const MAX_ASKS: usize = 64;
/// How often old incidents are dropped.
const RETENTION_EVERY: Duration = Duration::from_secs(600);
/// Incidents in one answer of /api/incidents, newest first.
const MAX_LISTED: usize = 1000;
/// Where the journal of the run before is kept, below the journal's directory.
const PREVIOUS: &str = "previous";

/// What the daemon is told.
#[derive(Clone, Debug)]
pub struct Options {
    /// How to trace.
    pub session: session::Options,
    /// Where incidents and the kill ledger are kept.
    pub state_dir: PathBuf,
    /// Where to answer HTTP; none for not at all.
    pub listen: Option<SocketAddr>,
    /// Keep at most this much in incidents.
    pub retain_bytes: u64,
    /// Keep incidents at most this long.
    pub retain_age: Duration,
}

/// Runs until SIGTERM or SIGINT.
pub fn run(options: Options) -> anyhow::Result<()> {
    log_to_stderr();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        // File reads for HTTP answers; two are enough, and each thread costs memory.
        .max_blocking_threads(2)
        .build()
        .context("failed to start the runtime")?;
    runtime.block_on(serve_and_trace(options))
}

async fn serve_and_trace(options: Options) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("failed to listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("failed to listen for SIGINT")?;
    protect_from_oom();
    let mut store = Store::open(&options)?;
    let (asks, mut asked) = mpsc::channel(MAX_ASKS);
    let listener = match options.listen {
        None => None,
        Some(address) => Some(
            TcpListener::bind(address)
                .await
                .with_context(|| format!("failed to listen on {address}; choose another address with --listen"))?,
        ),
    };
    if let Some((dir, _)) = &options.session.journal {
        recover(dir, &mut store)?;
    }
    let mut session = Session::start(&options.session)?;
    for line in session.status().degraded() {
        warn!("degraded: {line}");
    }
    // Readiness is what the listener answers, so it only starts to answer when there is something to say.
    let address = listener.as_ref().and_then(|listener| listener.local_addr().ok());
    if let Some(listener) = listener {
        tokio::spawn(serve::run(listener, asks.clone(), Arc::new(Shelf(Incidents::at(&options.state_dir)))));
    }
    info!(
        version = env!("CARGO_PKG_VERSION"),
        state_dir = %options.state_dir.display(),
        listen = %address.map_or_else(|| "off".to_owned(), |address| address.to_string()),
        "ready"
    );
    // Not under systemd is no error.
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);

    let mut retention = tokio::time::interval(RETENTION_EVERY);
    loop {
        let effects = tokio::select! {
            biased;
            effects = session.step() => effects,
            Some(ask) = asked.recv() => {
                answer(ask, &session, &store.counters);
                continue;
            }
            _ = retention.tick() => {
                store.retain(&options);
                continue;
            }
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
        };
        store.take(effects);
        // One at a time, and the rings in between: a save waits for the disk, kills must not wait for it.
        while store.save_one() {
            store.take(session.pump(false));
        }
    }
    info!("stopping");
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
    store.take(session.stop());
    while store.save_one() {}
    Ok(())
}

/// Answers a question between two turns; the asker may have gone.
fn answer(ask: Ask, session: &Session, counters: &Counters) {
    match ask {
        Ask::Snapshot(reply) => {
            let _ = reply.send(session.engine().snapshot());
        }
        Ask::Readings(reply) => {
            let readings = Readings {
                counters: counters.clone(),
                counts: session.engine().counts(),
                snapshot: session.engine().snapshot(),
                sent: session.probe().sent(),
                losses: session.losses().to_vec(),
                journal_failures: session.journal_failures(),
                hooks: session.status().hooks.iter().map(|status| (status.hook.name(), status.on())).collect(),
                resident_bytes: resident_bytes(),
                map_bytes: session.probe().map_bytes(),
            };
            let _ = reply.send(Box::new(readings));
        }
    }
}

/// Resident memory of this process.
fn resident_bytes() -> Option<u64> {
    let statm = fs::read_to_string("/proc/self/statm").ok()?;
    let pages: u64 = statm.split_ascii_whitespace().nth(1)?.parse().ok()?;
    pages.checked_mul(rustix::param::page_size() as u64)
}

/// The incidents on disk, for whoever asks over HTTP.
struct Shelf(Incidents);

impl Library for Shelf {
    fn list(&self) -> Result<String, String> {
        json::list(&self.newest(MAX_LISTED)?).map_err(|error| error.to_string())
    }

    fn incident(&self, id: &str) -> Result<Option<String>, String> {
        match self.0.find(id) {
            Ok(entry) => {
                let incident = incidents::read(&entry.path).map_err(|error| error.to_string())?;
                json::incident(&incident).map(Some).map_err(|error| error.to_string())
            }
            Err(_) => Ok(None),
        }
    }

    fn newest(&self, most: usize) -> Result<Vec<Incident>, String> {
        let entries = self.0.list().map_err(|error| error.to_string())?;
        // One that cannot be read does not hide the others; `memtrace report` tells what is wrong with it.
        Ok(entries.iter().take(most).filter_map(|entry| incidents::read(&entry.path).ok()).collect())
    }
}

/// Where effects end up.
struct Store {
    incidents: Incidents,
    kills: Kills,
    counters: Counters,
    /// Closed incidents that are not written yet. The engine closes at most as many at once as it keeps open.
    saves: VecDeque<Box<Incident>>,
    /// Held as long as the agent runs: two agents on one directory would write each incident twice.
    _lock: File,
}

impl Store {
    fn open(options: &Options) -> anyhow::Result<Self> {
        let dir = &options.state_dir;
        let incidents =
            Incidents::create(dir).with_context(|| format!("failed to use the state directory {}", dir.display()))?;
        let lock_path = dir.join("lock");
        let lock = File::create(&lock_path).with_context(|| format!("failed to write to {}", lock_path.display()))?;
        if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
            bail!("another memtrace agent runs on {}; stop it or choose another --state-dir", dir.display());
        }
        let kills = Kills::open(dir).with_context(|| format!("failed to open the kill ledger in {}", dir.display()))?;
        if kills.torn_bytes() > 0 {
            warn!("kill ledger: dropped a torn tail of {} bytes", kills.torn_bytes());
        }
        Ok(Self { incidents, kills, counters: Counters::default(), saves: VecDeque::new(), _lock: lock })
    }

    /// Does at once what must not wait, and remembers what has to be saved.
    fn take(&mut self, effects: Vec<Effect>) {
        for effect in effects {
            match effect {
                // The ledger: a kill is durable before anything that takes longer.
                Effect::Kill(kill) => {
                    self.counters.kills = self.counters.kills.saturating_add(1);
                    if let Err(error) = self.kills.append(&kill) {
                        self.counters.write_failures = self.counters.write_failures.saturating_add(1);
                        error!("failed to write the kill of {} to the ledger: {error}", kill.pid);
                    }
                }
                Effect::Alert(finding) => self.tell(&finding),
                Effect::Save(incident) => self.saves.push_back(incident),
                // The session answers these itself.
                Effect::LookUpCgroup { .. } | Effect::SetQuantum { .. } => {}
            }
        }
    }

    /// Writes the oldest closed incident; whether there was one.
    fn save_one(&mut self) -> bool {
        let Some(incident) = self.saves.pop_front() else { return false };
        match self.incidents.save(&incident) {
            Ok(path) => {
                self.counters.saved(incident.kind);
                info!(id = %incident.id, file = %path.display(), "saved an incident");
            }
            Err(error) => {
                self.counters.write_failures = self.counters.write_failures.saturating_add(1);
                error!(id = %incident.id, "failed to save an incident: {error}");
            }
        }
        true
    }

    fn tell(&mut self, finding: &Finding) {
        let path = |path: &Option<String>| path.clone().unwrap_or_else(|| "an unknown cgroup".to_owned());
        match finding {
            Finding::OomKill { incident, pid, comm, cgroup_path } => {
                warn!(%incident, pid, comm, cgroup = path(cgroup_path), "OOM kill");
            }
            Finding::Spike { incident, cgroup_path, peak_bytes, limit_bytes } => {
                self.counters.spikes = self.counters.spikes.saturating_add(1);
                warn!(%incident, cgroup = path(cgroup_path), peak_bytes, limit_bytes, "memory spike");
            }
            Finding::NearMiss { cgroup_path, hits, stalled_ns, .. } => {
                self.counters.near_misses = self.counters.near_misses.saturating_add(1);
                warn!(cgroup = path(cgroup_path), hits, stalled_ns, "the limit was hit, nobody was killed");
            }
            Finding::Disagreement { pid, only_in } => {
                self.counters.disagreements = self.counters.disagreements.saturating_add(1);
                warn!(pid, only_in, "kernel log and hooks disagree about a kill");
            }
        }
    }

    fn retain(&mut self, options: &Options) {
        match self.incidents.retain(options.retain_bytes, Some(options.retain_age), SystemTime::now()) {
            Ok(dropped) if dropped.files > 0 => {
                self.counters.dropped = self.counters.dropped.saturating_add(dropped.files);
                info!(files = dropped.files, bytes = dropped.bytes, "dropped old incidents");
            }
            Ok(_) => {}
            Err(error) => error!("failed to look for old incidents: {error}"),
        }
    }
}

/// Closes what a run that did not stop properly left open: replays its journal and saves what is not saved yet.
///
/// Incident ids come from the event itself, so an incident that was saved is met again under its own id. The old
/// journal is moved aside and stays readable until the next recovery.
fn recover(dir: &Path, store: &mut Store) -> anyhow::Result<()> {
    let mut reader = match journal::Reader::open(dir) {
        Ok(reader) => reader,
        Err(journal::OpenError::Empty { .. }) => return Ok(()),
        Err(journal::OpenError::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => {
            warn!("journal of the last run: {error}; nothing is recovered from it");
            return Ok(());
        }
    };
    let mut engine = Engine::new();
    let mut effects = Vec::new();
    let (mut stopped, mut last_ns) = (false, 0);
    loop {
        match reader.next_input() {
            Ok(Some(input)) => {
                stopped = matches!(input, Input::Fact(Fact::Stop { .. }));
                last_ns = input.boot_ns().unwrap_or(0).max(last_ns);
                engine.apply(&input, &mut effects);
            }
            Ok(None) => break,
            Err(error) => warn!("journal of the last run: {error}"),
        }
        // Only saves are of interest, and a long journal must not pile up the rest.
        effects.retain(|effect| matches!(effect, Effect::Save(_) | Effect::Kill(_)));
    }
    let stats = reader.stats();
    if stats.torn_bytes > 0 {
        warn!("journal of the last run: dropped a torn tail of {} bytes", stats.torn_bytes);
    }
    if !stopped {
        engine.apply(&Input::Fact(Fact::Stop { boot_ns: last_ns }), &mut effects);
        let known: std::collections::BTreeSet<String> =
            store.incidents.list().unwrap_or_default().into_iter().map(|entry| entry.id).collect();
        let mut recovered = 0u64;
        for effect in effects {
            let Effect::Save(incident) = effect else { continue };
            if known.contains(&incident.id) {
                continue;
            }
            match store.incidents.save(&incident) {
                Ok(_) => recovered = recovered.saturating_add(1),
                Err(error) => error!(id = %incident.id, "failed to save a recovered incident: {error}"),
            }
        }
        info!(frames = stats.frames, recovered, "the last run did not stop properly; replayed its journal");
    }
    journal::set_aside(dir, PREVIOUS)
        .with_context(|| format!("failed to set the old journal in {} aside", dir.display()))
}

/// The OOM killer must not take the recorder first. Lowering the score needs CAP_SYS_RESOURCE.
fn protect_from_oom() {
    if let Err(error) = fs::write("/proc/self/oom_score_adj", "-999") {
        warn!("oom_score_adj stays as it is ({error}): in a global OOM the agent may be killed; give CAP_SYS_RESOURCE");
    }
}

/// Logs to stderr; `RUST_LOG` chooses what, colours only on a terminal.
fn log_to_stderr() {
    use std::io::IsTerminal;
    use tracing_subscriber::EnvFilter;
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let colour = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    // A second logger in the same process is no reason to fail.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(colour)
        .with_target(false)
        .try_init();
}
