//! The daemon: a session whose outputs go to disk, to the log and to HTTP.
//!
//! One loop on one thread runs the session, writes what comes of it, and answers requests in between. What may take
//! long is beside it: the HTTP server on a thread of its own, and the naming of functions in a blocking thread.

use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use rustix::mm::{MlockAllFlags, mlockall, munlockall};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tracing::{info, warn};

use crate::serve::{self, AppState, HostNames, LoopRequest, MetricsSnapshot, ServerLimits, StackCostTotals};
use crate::session::{Session, SessionConfig};
use crate::{clock, host, own_process};
use memtrace_incident::{Moment, UnwatchedEntry};

mod incident_reader;
mod keeper;
mod recovery;
mod room;
mod sinks;
mod symbolize_queue;
mod unwatched;
mod watch_state;

use incident_reader::IncidentReader;
use keeper::{Keeper, KeeperConfig};
use sinks::Sinks;
use symbolize_queue::SymbolizeQueue;
use unwatched::LastRun;
use watch_state::WatchState;

/// Most requests waiting for the loop.
const MAX_REQUESTS: usize = 64;
/// How memory is locked.
const LOCK: MlockAllFlags = MlockAllFlags::CURRENT.union(MlockAllFlags::FUTURE).union(MlockAllFlags::ONFAULT);
/// How often free memory is given back: after a storm.
const GIVE_BACK_EVERY: Duration = Duration::from_mins(1);
/// How often old incident files are deleted.
const RETENTION_EVERY: Duration = Duration::from_secs(600);

/// How the agent runs.
#[derive(Clone, Debug)]
pub struct AgentConfig {
    /// How to trace.
    pub session: SessionConfig,
    /// Directory of incidents and ledgers.
    pub state_dir: PathBuf,
    /// Address to serve HTTP at; `None` for no HTTP.
    pub listen: Option<SocketAddr>,
    /// Names that HTTP requests may use for this machine, besides its own.
    pub allow_hosts: Vec<String>,
    /// Keep at most this much in incident files, bytes.
    pub retain_bytes: u64,
    /// Delete incident files that are older.
    pub retain_age: Duration,
}

/// Runs until SIGTERM or SIGINT.
pub fn run(config: AgentConfig) -> anyhow::Result<()> {
    log_to_stderr();
    room::check()?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        // For the naming of functions; each thread costs memory.
        .max_blocking_threads(1)
        .build()
        .context("failed to start the runtime")?;
    let outcome = runtime.block_on(serve_and_trace(config));
    // A thread that still looks up names is not waited for.
    runtime.shutdown_background();
    outcome
}

async fn serve_and_trace(config: AgentConfig) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("failed to listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("failed to listen for SIGINT")?;
    leave_to_the_last();
    raise_file_limit();
    let mut sinks = Sinks::open(&config)?;
    let (sender, mut requests) = mpsc::channel(MAX_REQUESTS);
    let listener = match config.listen {
        None => None,
        Some(address) => Some(listen(address).await?),
    };
    let last_run = match &config.session.journal {
        Some(journal) => recovery::recover(&journal.dir, &mut sinks)?,
        None => None,
    };
    let mut session = Session::start(&config.session)?;
    // The kernel's types took much, and locked pages cannot be given back.
    own_process::trim_memory();
    let locks = lock_memory();
    let mut keeper = keep_account(&config, &session, last_run.as_ref(), &mut sinks)?;
    warn_of_missing_hooks(&session);
    // Served only from here on: an answer means that the programs are attached.
    let address = listener.as_ref().and_then(|listener| listener.local_addr().ok());
    if let Some(listener) = listener {
        let incidents = Arc::new(IncidentReader::at(&config.state_dir));
        let names = HostNames::with_own(&config.allow_hosts);
        serve::start(listener, AppState::new(sender.clone(), incidents, names, ServerLimits::default()))?;
    }
    info!(
        version = env!("CARGO_PKG_VERSION"),
        state_dir = %config.state_dir.display(),
        listen = %address.map_or_else(|| "off".to_owned(), |address| address.to_string()),
        "ready"
    );
    // Fails when systemd did not start this, which is fine.
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);

    let mut symbolize = SymbolizeQueue::default();
    let mut retention = tokio::time::interval(RETENTION_EVERY);
    let mut give_back = tokio::time::interval(GIVE_BACK_EVERY);
    loop {
        let outputs = tokio::select! {
            outputs = session.step() => outputs,
            Some(request) = requests.recv() => {
                answer(request, &session, &sinks, &symbolize);
                continue;
            }
            ended = symbolize.ended() => {
                if let Some(path) = symbolize.finish(ended) {
                    sinks.rewritten(&path);
                }
                continue;
            }
            _ = retention.tick() => {
                sinks.retain();
                continue;
            }
            _ = give_back.tick() => {
                give_memory_back(locks);
                continue;
            }
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
        };
        sinks.take(outputs);
        exchange(&mut keeper, &session, &mut sinks);
        // One at a time, with rings and requests in between: a save waits for the disk, and they must not.
        while sinks.save_one(false, &mut symbolize) {
            sinks.take(session.pump(false));
            tokio::task::yield_now().await;
            while let Ok(request) = requests.try_recv() {
                answer(request, &session, &sinks, &symbolize);
            }
        }
        name_next(&mut session, &sinks, &mut symbolize);
    }
    info!("stopping");
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
    sinks.take(session.stop());
    exchange(&mut keeper, &session, &mut sinks);
    if !sinks.save_all(&mut symbolize)
        && let Some(journal) = &config.session.journal
    {
        recovery::leave_mark(&journal.dir);
    }
    keeper.stop();
    symbolize.stop(|wanted| session.modules(wanted)).await;
    sinks.retain();
    Ok(())
}

/// Writes the time without an agent to the ledger, and starts the thread that finds the kills in it.
fn keep_account(
    config: &AgentConfig,
    session: &Session,
    last_run: Option<&LastRun>,
    sinks: &mut Sinks,
) -> anyhow::Result<Keeper> {
    let state = WatchState::read(&config.state_dir).unwrap_or_else(|error| {
        warn!("{error:#}; until when the run before watched is known from its journal alone");
        None
    });
    let boot_ns = session.watching_since_ns();
    let watching_since = Moment { boot_id: host::boot_id(), boot_ns, wall: clock::wall_at(boot_ns) };
    let gap = unwatched::not_watched(state.as_ref(), last_run, &watching_since);
    let baseline = gap.as_ref().map(|gap| unwatched::baseline(state, gap));
    if let Some(gap) = gap {
        sinks.take_unwatched(vec![UnwatchedEntry::NotWatched(gap)]);
    }
    Keeper::start(KeeperConfig {
        state_dir: config.state_dir.clone(),
        hierarchy: session.hierarchy().clone(),
        kernel_log: config.session.kernel_log,
        watching_since,
        baseline,
    })
}

/// Writes what the keeper has found, and tells it how far the ledger goes.
fn exchange(keeper: &mut Keeper, session: &Session, sinks: &mut Sinks) {
    if let Some(entries) = keeper.take_found() {
        sinks.take_unwatched(entries);
    }
    // While the ledger cannot be written, what it lacks is not unwatched.
    if sinks.kills.unwritten() == 0 {
        keeper.advance(session.watched_until_ns(), session.kernel_log_seq());
    }
}

/// Starts naming the functions of the next incident, once the files of its modules are there.
fn name_next(session: &mut Session, sinks: &Sinks, symbolize: &mut SymbolizeQueue) {
    // An incident that waits to be saved needs the files of its modules too.
    session.wait_for_names(symbolize.is_busy() || sinks.waiting() > 0);
    if let Some(wanted) = symbolize.wanted_modules() {
        session.ask_for_modules(wanted);
    }
    if symbolize.waits_for_modules()
        && let Some(modules) = session.take_modules()
    {
        symbolize.start(modules);
    }
}

/// A listener that the server's thread takes over.
async fn listen(address: SocketAddr) -> anyhow::Result<std::net::TcpListener> {
    let failed = || format!("failed to listen on {address}; choose another address with --listen");
    TcpListener::bind(address).await.and_then(TcpListener::into_std).with_context(failed)
}

/// Logs what is lost on this kernel, and which programs stand in for better ones.
fn warn_of_missing_hooks(session: &Session) {
    for line in session.status().degraded() {
        warn!("degraded: {line}");
    }
    for fallback in session.status().fallbacks() {
        warn!("{fallback}");
    }
}

/// Answers a request between two turns of the loop, unless its client has gone.
fn answer(request: LoopRequest, session: &Session, sinks: &Sinks, symbolize: &SymbolizeQueue) {
    match request {
        LoopRequest::Ping(reply) => {
            let _ = reply.send(());
        }
        LoopRequest::Snapshot(reply) if reply.is_closed() => {}
        LoopRequest::Metrics(reply) if reply.is_closed() => {}
        LoopRequest::Snapshot(reply) => {
            let _ = reply.send(session.engine().snapshot());
        }
        LoopRequest::Metrics(reply) => {
            let (stacks, cost) = session.stack_cost();
            let (health, worker_bytes) = session.worker_health();
            let snapshot = MetricsSnapshot {
                stacks,
                incidents_named: symbolize.named,
                incidents_not_named: symbolize.failed,
                stack_cost: StackCostTotals { kernel_ns: cost.kernel_ns, user_ns: cost.user_ns, thinned: cost.thinned },
                counters: sinks.counters.clone(),
                incidents_waiting: sinks.waiting(),
                counts: session.engine().counts(),
                snapshot: session.engine().snapshot(),
                sent: session.probe().sent(),
                stack_workers: vec![("running", u64::from(health.running)), ("stuck", health.stuck)],
                stack_readings_late: health.readings_late,
                stack_worker_bytes: health.running.then_some(worker_bytes),
                journal_failures: session.journal_failures(),
                hooks: session.status().hooks.iter().map(|status| (status.hook.name(), status.on())).collect(),
                resident_bytes: own_process::resident_bytes(),
                map_bytes: session.probe().map_bytes(),
                // The server's own.
                connections: Vec::new(),
            };
            let _ = reply.send(Box::new(snapshot));
        }
    }
}

/// Keeps the agent from being paged out when memory runs out, which is when it is needed (CAP_IPC_LOCK). `ONFAULT` locks
/// pages as they are touched; without it everything that is mapped would become resident. Whether it does.
fn lock_memory() -> bool {
    let locked = mlockall(LOCK);
    if let Err(error) = locked {
        warn!("memory is not locked ({error}): in a global shortage the agent may be paged out; give CAP_IPC_LOCK");
    }
    locked.is_ok()
}

/// Gives free memory back to the system. Pages that are locked cannot be.
fn give_memory_back(locks: bool) {
    let _ = locks.then(munlockall);
    own_process::trim_memory();
    if locks {
        lock_memory();
    }
}

/// The OOM killer takes the agent last (CAP_SYS_RESOURCE).
fn leave_to_the_last() {
    if let Err(error) = fs::write("/proc/self/oom_score_adj", "-999") {
        warn!("oom_score_adj stays as it is ({error}): in a global OOM the agent may be killed; give CAP_SYS_RESOURCE");
    }
}

/// Allows as many descriptors as this process may have, so that files of others and connections leave some for saving.
fn raise_file_limit() {
    let limit = getrlimit(Resource::Nofile);
    if limit.current != limit.maximum
        && let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit })
    {
        warn!("the limit of open files stays at {:?}: {error}", limit.current);
    }
}

/// Logs to stderr; `RUST_LOG` chooses what, colours only on a terminal.
fn log_to_stderr() {
    use std::io::IsTerminal;
    use tracing_subscriber::EnvFilter;
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let colour = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    // Fails when a logger is already set, which is fine.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(colour)
        .with_target(false)
        .try_init();
}
