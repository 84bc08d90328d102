//! The server: a thread with a runtime of its own. No client holds up the recorder, and no recorder that is held up
//! holds up `/healthz`.
//!
//! Everything a client can make it keep has a cap: connections, bytes and time of a request's head, time of a whole
//! exchange. Beyond the cap of connections the one that asked longest ago is closed, so somebody who opens many of them
//! and keeps them keeps nobody out.

use std::io;
use std::net::TcpListener as StdListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context;
use axum::Router;
use hyper::server::conn::http1;
use hyper::service::{Service, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{AbortHandle, JoinSet};
use tracing::error;

use super::{AppState, router};
use crate::own_process::rights::SERVER;

/// How long to wait after a connection could not be accepted, which is when descriptors or memory ran out.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// How often connections are looked at.
const LOOK: Duration = Duration::from_secs(1);

/// What clients can make the server keep.
#[derive(Clone, Copy, Debug)]
pub struct ServerLimits {
    /// Connections at once.
    pub connections: usize,
    /// Bytes of a request's head.
    pub head_bytes: usize,
    /// Time for a request's head, and between two requests of a connection.
    pub head_time: Duration,
    /// Time for an answer of the agent's loop.
    pub loop_time: Duration,
    /// Time from a request, or from the connection, to the end of its answer.
    pub exchange_time: Duration,
}

impl Default for ServerLimits {
    fn default() -> Self {
        Self {
            connections: 64,
            head_bytes: 16 << 10,
            head_time: Duration::from_secs(10),
            loop_time: Duration::from_secs(30),
            exchange_time: Duration::from_secs(60),
        }
    }
}

/// What the server counts. Shared with its handlers.
#[derive(Debug, Default)]
pub struct ServerCounts {
    /// Connections accepted.
    pub accepted: AtomicU64,
    /// Connections closed to make room for others.
    pub crowded_out: AtomicU64,
    /// Connections closed because an exchange took too long.
    pub timed_out: AtomicU64,
    /// Connections that could not be accepted.
    pub not_accepted: AtomicU64,
}

impl ServerCounts {
    /// Every count with the value of its label.
    pub(super) fn by_outcome(&self) -> Vec<(&'static str, u64)> {
        let counts = [
            ("accepted", &self.accepted),
            ("crowded_out", &self.crowded_out),
            ("timed_out", &self.timed_out),
            ("not_accepted", &self.not_accepted),
        ];
        counts.into_iter().map(|(outcome, count)| (outcome, count.load(Ordering::Relaxed))).collect()
    }
}

/// Adds one.
fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// Starts the server on a thread of its own. It ends with the process.
///
/// Fails when the thread cannot be started.
pub fn start(listener: StdListener, state: AppState) -> anyhow::Result<()> {
    let serve = move || {
        SERVER.enter();
        // It starts no threads: what blocks is elsewhere.
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let served = runtime.and_then(|runtime| runtime.block_on(run(listener, state)));
        if let Err(error) = served {
            error!("the HTTP server stopped: {error}");
        }
    };
    std::thread::Builder::new()
        .name(SERVER.thread.to_owned())
        .spawn(serve)
        .context("failed to start the HTTP server")?;
    Ok(())
}

/// One connection.
struct Connection {
    task: AbortHandle,
    /// When it last asked, or was accepted: milliseconds since the server began.
    asked_ms: Arc<AtomicU64>,
}

impl Connection {
    fn asked_ms(&self) -> u64 {
        self.asked_ms.load(Ordering::Relaxed)
    }
}

/// Serves for ever. Fails only when the listener is unusable.
async fn run(listener: StdListener, state: AppState) -> io::Result<()> {
    let limits = state.limits;
    listener.set_nonblocking(true)?;
    let listener = TcpListener::from_std(listener)?;
    let begun = Instant::now();
    let router = router(state.clone());
    let mut tasks = JoinSet::new();
    // Cap: `limits.connections`.
    let mut open: Vec<Connection> = Vec::new();
    let mut look = tokio::time::interval(LOOK);
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    count(&state.counts.accepted);
                    open.retain(|connection| !connection.task.is_finished());
                    make_room(&mut open, limits.connections, &state.counts);
                    let asked_ms = Arc::new(AtomicU64::new(milliseconds(begun)));
                    let task = tasks.spawn(exchange(stream, router.clone(), limits, begun, Arc::clone(&asked_ms)));
                    open.push(Connection { task, asked_ms });
                    // So that a connection is served before others are accepted and it has to make room.
                    tokio::task::yield_now().await;
                }
                Err(_) => {
                    count(&state.counts.not_accepted);
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            },
            Some(_) = tasks.join_next() => {}
            _ = look.tick() => {
                close_late(&mut open, milliseconds(begun), limits.exchange_time, &state.counts);
                state.expire();
            }
        }
    }
}

fn milliseconds(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX)
}

/// Closes the connections that asked longest ago until there is room for one more.
fn make_room(open: &mut Vec<Connection>, cap: usize, counts: &ServerCounts) {
    while open.len() >= cap.max(1) {
        let oldest = open.iter().enumerate().min_by_key(|(_, connection)| connection.asked_ms());
        let Some(at) = oldest.map(|(at, _)| at) else { return };
        open.swap_remove(at).task.abort();
        count(&counts.crowded_out);
    }
}

/// Closes the connections whose exchange takes longer than `limit`.
fn close_late(open: &mut Vec<Connection>, now_ms: u64, limit: Duration, counts: &ServerCounts) {
    let limit_ms = u64::try_from(limit.as_millis()).unwrap_or(u64::MAX);
    open.retain(|connection| {
        let late = now_ms.saturating_sub(connection.asked_ms()) > limit_ms;
        if late && !connection.task.is_finished() {
            connection.task.abort();
            count(&counts.timed_out);
        }
        !late && !connection.task.is_finished()
    });
}

/// Serves one connection until it ends. What goes wrong with it is its client's doing and nobody is told.
async fn exchange(stream: TcpStream, router: Router, limits: ServerLimits, begun: Instant, asked_ms: Arc<AtomicU64>) {
    let router = TowerToHyperService::new(router);
    let service = service_fn(move |request| {
        asked_ms.store(milliseconds(begun), Ordering::Relaxed);
        router.call(request)
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.head_time)
        .max_buf_size(limits.head_bytes)
        .serve_connection(TokioIo::new(stream), service);
    let _ = connection.await;
}
