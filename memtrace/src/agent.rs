//! The daemon: a session whose outputs go to disk, to the log and to whoever asks over HTTP.

use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use rustix::mm::{MlockAllFlags, mlockall};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tracing::{info, warn};

use crate::serve::{self, Ask, Counters, Readings, StackCost};
use crate::session::{self, Session};

mod naming;
mod recovery;
mod shelf;
mod sinks;

use naming::Naming;
use shelf::Shelf;
use sinks::Sinks;

/// Requests waiting for the loop.
const MAX_ASKS: usize = 64;
/// How often old incidents are dropped.
const RETENTION_EVERY: Duration = Duration::from_secs(600);

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
        // File reads for HTTP answers, for which two are enough, and the naming of an incident; each thread costs memory.
        .max_blocking_threads(3)
        .build()
        .context("failed to start the runtime")?;
    let outcome = runtime.block_on(serve_and_trace(options));
    // Names that are still looked for are not waited for.
    runtime.shutdown_background();
    outcome
}

async fn serve_and_trace(options: Options) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("failed to listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("failed to listen for SIGINT")?;
    protect_from_oom();
    let mut sinks = Sinks::open(&options)?;
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
        recovery::recover(dir, &mut sinks)?;
    }
    let mut session = Session::start(&options.session)?;
    for line in session.status().degraded() {
        warn!("degraded: {line}");
    }
    for fallback in session.status().fallbacks() {
        warn!("{fallback}");
    }
    // Readiness is what the listener answers, so it only starts to answer when there is something to say.
    let address = listener.as_ref().and_then(|listener| listener.local_addr().ok());
    if let Some(listener) = listener {
        tokio::spawn(serve::run(listener, asks.clone(), Arc::new(Shelf::at(&options.state_dir))));
    }
    info!(
        version = env!("CARGO_PKG_VERSION"),
        state_dir = %options.state_dir.display(),
        listen = %address.map_or_else(|| "off".to_owned(), |address| address.to_string()),
        "ready"
    );
    // Not under systemd is no error.
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);

    let mut naming = Naming::default();
    let mut retention = tokio::time::interval(RETENTION_EVERY);
    loop {
        let outputs = tokio::select! {
            outputs = session.step() => outputs,
            Some(ask) = asked.recv() => {
                answer(ask, &session, &sinks.counters, &naming);
                continue;
            }
            ended = naming.ended() => {
                naming.note(ended);
                continue;
            }
            _ = retention.tick() => {
                sinks.retain(&options);
                continue;
            }
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
        };
        sinks.take(outputs);
        // One at a time, and the rings and questions in between: a save waits for the disk, they must not wait for it.
        while sinks.save_one(&mut naming) {
            sinks.take(session.pump(false));
            tokio::task::yield_now().await;
            while let Ok(ask) = asked.try_recv() {
                answer(ask, &session, &sinks.counters, &naming);
            }
        }
        if naming.wants_modules() {
            naming.start(session.open_modules());
        }
    }
    info!("stopping");
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
    let modules = session.open_modules();
    sinks.take(session.stop());
    while sinks.save_one(&mut naming) {}
    naming.stop(modules).await;
    Ok(())
}

/// Answers a question between two turns; the asker may have gone.
fn answer(ask: Ask, session: &Session, counters: &Counters, naming: &Naming) {
    match ask {
        Ask::Ping(reply) => {
            let _ = reply.send(());
        }
        Ask::Snapshot(reply) => {
            let _ = reply.send(session.engine().snapshot());
        }
        Ask::Readings(reply) => {
            let (stacks, cost) = session.stack_cost();
            let readings = Readings {
                stacks,
                incidents_named: naming.named,
                incidents_not_named: naming.failed,
                stack_cost: StackCost { kernel_ns: cost.kernel_ns, user_ns: cost.user_ns, thinned: cost.thinned },
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

/// The OOM killer must not take the recorder first, and a machine without memory must not page it out: it has to run
/// just then. Lowering the score needs CAP_SYS_RESOURCE, locking CAP_IPC_LOCK. Pages are locked as they are touched, so
/// that what is mapped and never used stays unused.
fn protect_from_oom() {
    let lock = MlockAllFlags::CURRENT | MlockAllFlags::FUTURE | MlockAllFlags::ONFAULT;
    if let Err(error) = mlockall(lock) {
        warn!("memory is not locked ({error}): in a global shortage the agent may be paged out; give CAP_IPC_LOCK");
    }
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
