//! The daemon: a session whose outputs go to disk, to the log and to HTTP.
//!
//! One loop on one thread, the recorder, runs the session, writes the ledgers, and answers requests in between. What
//! may take long is beside it: the HTTP server and the saving of incidents on threads of their own, and the naming of
//! functions in a blocking thread. The recorder's thread goes before others, or whoever keeps the CPUs busy makes it
//! late and its rings run over.

use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use rustix::fs::Mode;
use rustix::mm::{MlockAllFlags, mlockall, munlockall};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit, umask};
use rustix::thread::CapabilitySet;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tracing::{info, warn};
use tracing_appender::non_blocking::{ErrorCounter, NonBlockingBuilder, WorkerGuard};

use crate::own_process::rights::{LOG, NAMING, RECORDER};
use crate::serve::{
    self, AppState, HostNames, LoopRequest, MAX_CGROUP_SERIES, MetricsSnapshot, ServerLimits, StackCostTotals,
};
use crate::session::{Session, SessionConfig};
use crate::{clock, host, own_process};
use memtrace_incident::{Moment, UnwatchedEntry};

mod doors;
mod incident_reader;
mod keeper;
mod recovery;
mod room;
mod sinks;
mod storer;
mod symbolize_queue;
mod unix_socket;
mod unwatched;
mod watch_state;

use doors::Doors;
use incident_reader::IncidentReader;
use keeper::{Keeper, KeeperConfig};
use sinks::Sinks;
use symbolize_queue::SymbolizeQueue;
pub use unix_socket::DEFAULT_SOCKET;
use unix_socket::SocketFile;
use unwatched::LastRun;
use watch_state::WatchState;

/// Most requests waiting for the loop.
const MAX_REQUESTS: usize = 64;
/// Lines of the log that wait to be written.
const MAX_LOG_LINES: usize = 4096;
/// Time for what is left of them when the agent stops.
const LOG_FLUSH_LIMIT: Duration = Duration::from_secs(2);
/// How memory is locked.
const LOCK: MlockAllFlags = MlockAllFlags::CURRENT.union(MlockAllFlags::FUTURE).union(MlockAllFlags::ONFAULT);
/// How often free memory is given back: after a storm.
const GIVE_BACK_EVERY: Duration = Duration::from_secs(30);
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
    /// Unix socket to serve HTTP at; `None` for none.
    pub socket: Option<PathBuf>,
    /// The group that may use the socket, by name or number; `None` for the default.
    pub socket_group: Option<String>,
    /// File with the token that HTTP over TCP asks for; `None` for no token.
    pub token_file: Option<PathBuf>,
    /// Names that HTTP requests may use for this machine, besides its own.
    pub allow_hosts: Vec<String>,
    /// Keep at most this much in incident files, bytes.
    pub retain_bytes: u64,
    /// Delete incident files that are older.
    pub retain_age: Duration,
}

/// Runs until SIGTERM or SIGINT.
pub fn run(config: AgentConfig) -> anyhow::Result<()> {
    own_process::give_each_thread_a_heap();
    let (lost_log_lines, guard) = log_to_stderr();
    let outcome = run_logged(config, lost_log_lines);
    flush_log(guard);
    outcome
}

/// Writes what is left in the log, as far as it is read: the thread may hang in a write that nobody ends, and the guard
/// then says so on a standard output that nobody may read either.
fn flush_log(guard: WorkerGuard) {
    let (flushing, flushed) = std::sync::mpsc::channel::<()>();
    std::thread::spawn(move || {
        drop(guard);
        drop(flushing);
    });
    let _ = flushed.recv_timeout(LOG_FLUSH_LIMIT);
}

fn run_logged(config: AgentConfig, lost_log_lines: ErrorCounter) -> anyhow::Result<()> {
    room::check()?;
    // Each file and directory is made with the mode that it is to have, whoever starts the agent: with a mask of theirs,
    // it could not write into its own, since it gives up the right to all the same.
    umask(Mode::WGRP | Mode::WOTH);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        // For the naming of functions; each thread costs memory.
        .max_blocking_threads(1)
        .thread_name(NAMING.thread)
        .on_thread_start(|| NAMING.keep_capabilities())
        .build()
        .context("failed to start the runtime")?;
    let outcome = runtime.block_on(serve_and_trace(config, lost_log_lines));
    // A thread that still looks up names is not waited for.
    runtime.shutdown_background();
    outcome
}

async fn serve_and_trace(config: AgentConfig, lost_log_lines: ErrorCounter) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("failed to listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("failed to listen for SIGINT")?;
    leave_to_the_last();
    raise_file_limit();
    let mut sinks = Sinks::open(&config)?;
    let (sender, mut requests) = mpsc::channel(MAX_REQUESTS);
    let doors = Doors::open(&config)?;
    let last_run = match &config.session.journal {
        Some(journal) => recovery::recover(&journal.dir, &mut sinks)?,
        None => None,
    };
    let mut session = Session::start(&config.session)?;
    // The kernel's types took much, and locked pages cannot be given back.
    own_process::trim_memory();
    let locks = lock_memory();
    // Those that wait for the disk and for readers of the log have given up theirs; all others start after this, and
    // begin with what this thread keeps.
    RECORDER.enter();
    let mut keeper = keep_account(&config, &session, last_run.as_ref(), &mut sinks)?;
    warn_of_missing_hooks(&session);
    // Served only from here on: an answer means that the programs are attached.
    let _socket_file = serve_at(doors, &config, sender.clone())?;
    // Fails when systemd did not start this, which is fine.
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);

    let mut symbolize = SymbolizeQueue::default();
    let mut retention = tokio::time::interval(RETENTION_EVERY);
    let mut give_back = tokio::time::interval(GIVE_BACK_EVERY);
    let saved = sinks.storer.saved();
    loop {
        let outputs = tokio::select! {
            outputs = session.step() => outputs,
            Some(request) = requests.recv() => {
                answer(request, &session, &sinks, &symbolize, &lost_log_lines);
                continue;
            }
            ended = symbolize.ended() => {
                if let Some(path) = symbolize.finish(ended) {
                    sinks.storer.rewritten(&path);
                }
                continue;
            }
            () = saved.notified() => {
                take_saved(&mut sinks, &mut symbolize);
                continue;
            }
            _ = retention.tick() => {
                sinks.storer.review();
                continue;
            }
            _ = give_back.tick() => {
                session.give_memory_back();
                give_memory_back(locks);
                continue;
            }
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
        };
        sinks.take(outputs);
        exchange(&mut keeper, &session, &mut sinks);
        name_next(&mut session, &sinks, &mut symbolize);
    }
    info!("stopping");
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
    let journal = config.session.journal.as_ref().map(|journal| journal.dir.as_path());
    journal.map(recovery::leave_mark);
    sinks.take(session.stop());
    exchange(&mut keeper, &session, &mut sinks);
    match (sinks.save_all(), journal) {
        (true, Some(dir)) => recovery::remove_mark(dir),
        (false, Some(dir)) => warn!("the next start saves the rest from the journal in {}", dir.display()),
        (_, None) => {}
    }
    keeper.stop();
    take_saved(&mut sinks, &mut symbolize);
    symbolize.stop(|wanted| session.modules(wanted)).await;
    sinks.end();
    Ok(())
}

/// Has the functions of incidents named that are on disk now.
fn take_saved(sinks: &mut Sinks, symbolize: &mut SymbolizeQueue) {
    for incident in sinks.storer.take_saved() {
        symbolize.push(incident);
    }
    // There is room again.
    sinks.write_ledgers();
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
    session.wait_for_names(symbolize.is_busy() || sinks.storer.waiting() > 0);
    if let Some(wanted) = symbolize.wanted_modules() {
        session.ask_for_modules(wanted);
    }
    if symbolize.waits_for_modules()
        && let Some(modules) = session.take_modules()
    {
        symbolize.start(modules);
    }
}

/// Starts the server and says so. The socket is there until what this returns is dropped.
fn serve_at(
    doors: Doors,
    config: &AgentConfig,
    requests: mpsc::Sender<LoopRequest>,
) -> anyhow::Result<Option<SocketFile>> {
    let Doors { listeners, token, socket_file, address, socket } = doors;
    if listeners.tcp.is_some() || listeners.socket.is_some() {
        let incidents = Arc::new(IncidentReader::at(&config.state_dir));
        let names = HostNames::with_own(&config.allow_hosts);
        serve::start(listeners, AppState::new(requests, incidents, names, token, ServerLimits::default())?)?;
    }
    info!(
        version = env!("CARGO_PKG_VERSION"),
        state_dir = %config.state_dir.display(),
        listen = %address,
        socket = %socket,
        "ready"
    );
    Ok(socket_file)
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
fn answer(
    request: LoopRequest,
    session: &Session,
    sinks: &Sinks,
    symbolize: &SymbolizeQueue,
    lost_log_lines: &ErrorCounter,
) {
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
            let health = session.worker_health();
            let snapshot = MetricsSnapshot {
                stacks,
                incidents_named: symbolize.named,
                incidents_not_named: symbolize.failed.saturating_add(sinks.storer.counts().not_named),
                stack_cost: StackCostTotals { kernel_ns: cost.kernel_ns, user_ns: cost.user_ns, thinned: cost.thinned },
                counters: sinks.counters(),
                incidents_waiting: sinks.storer.waiting(),
                counts: session.engine().counts(),
                cgroups: session.engine().foremost_cgroups(MAX_CGROUP_SERIES),
                sent: session.probe().sent(),
                stack_workers: vec![("running", u64::from(health.running)), ("stuck", health.stuck)],
                stack_readings_late: health.readings_late,
                stack_worker_bytes: health.resident_bytes,
                stack_worker_cpu_ns: health.cpu_ns,
                journal_failures: session.journal_failures(),
                log_lines_lost: lost_log_lines.dropped_lines() as u64,
                hooks: session.status().hooks.iter().map(|status| (status.hook.name(), status.on())).collect(),
                resident_bytes: own_process::resident_bytes(),
                map_bytes: session.probe().map_bytes(),
                // The server's own.
                connections: Vec::new(),
                refused: Vec::new(),
            };
            let _ = reply.send(Box::new(snapshot));
        }
    }
}

/// Keeps the agent from being paged out when memory runs out, which is when it is needed. `ONFAULT` locks pages as they
/// are touched; without it everything that is mapped would become resident. Whether it does. With a limit of locked
/// memory and without CAP_IPC_LOCK nothing is locked: what is taken later would be refused at the limit.
fn lock_memory() -> bool {
    let held = rustix::thread::capabilities(None).is_ok_and(|held| held.effective.contains(CapabilitySet::IPC_LOCK));
    let may_lock = held || getrlimit(Resource::Memlock).current.is_none();
    let locked = if may_lock { mlockall(LOCK) } else { Err(rustix::io::Errno::PERM) };
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

/// Logs to stderr; `RUST_LOG` chooses what, colours only on a terminal. A thread writes: nobody who leaves the log
/// unread makes the recorder wait, and lines beyond [`MAX_LOG_LINES`] are lost, and counted.
fn log_to_stderr() -> (ErrorCounter, WorkerGuard) {
    use std::io::IsTerminal;
    use tracing_subscriber::EnvFilter;
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let colour = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    let start = || {
        let thread = NonBlockingBuilder::default().lossy(true).buffered_lines_limit(MAX_LOG_LINES);
        thread.thread_name(LOG.thread).finish(std::io::stderr())
    };
    // A thread begins with the rights of the one that starts it.
    let started = std::thread::scope(|scope| {
        scope
            .spawn(|| {
                LOG.enter();
                start()
            })
            .join()
    });
    let (writer, guard) = started.unwrap_or_else(|_| start());
    let lost = writer.error_counter();
    // Fails when a logger is already set, which is fine.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(writer)
        .with_ansi(colour)
        .with_target(false)
        .try_init();
    (lost, guard)
}
