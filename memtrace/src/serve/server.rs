//! The server: a thread with a runtime of its own. No client holds up the recorder, and no recorder that is held up
//! holds up `/healthz`.
//!
//! Everything a client can make it keep has a cap: connections, bytes and time of a request's head,
//! time of a whole exchange. Beyond the cap of connections the one that asked longest ago is
//! closed, so somebody who opens many of them and keeps them keeps nobody out. TCP and the unix
//! socket each have a right to a share, so that clients of one keep none of the other out.

use std::io;
use std::net::{SocketAddr, TcpListener as StdTcpListener};
use std::os::unix::net::UnixListener as StdUnixListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context;
use axum::Router;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::{Service, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::task::{AbortHandle, JoinSet};
use tracing::error;

use super::access::Door;
use super::guard::Peer;
use super::{AppState, router};
use crate::own_process::rights::SERVER;

/// How long to wait after a connection could not be accepted, which is when descriptors or memory ran out.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// How often connections are looked at.
const LOOK: Duration = Duration::from_secs(1);

/// What clients can make the server keep.
#[derive(Clone, Copy, Debug)]
pub struct ServerLimits {
    /// Connections at once. With a unix socket it has a right to a quarter of them, and TCP to the
    /// rest.
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
    /// Requests for another host.
    pub foreign_host: AtomicU64,
    /// Requests without the token they need.
    pub no_token: AtomicU64,
    /// Requests with a wrong token.
    pub wrong_token: AtomicU64,
    /// Requests that need a token where none is configured.
    pub not_here: AtomicU64,
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

    /// Requests that were refused, by why: the value of the label.
    pub(super) fn refused(&self) -> Vec<(&'static str, u64)> {
        let counts = [
            ("foreign_host", &self.foreign_host),
            ("no_token", &self.no_token),
            ("wrong_token", &self.wrong_token),
            ("not_here", &self.not_here),
        ];
        counts.into_iter().map(|(reason, count)| (reason, count.load(Ordering::Relaxed))).collect()
    }
}

/// Where clients come in.
#[derive(Debug, Default)]
pub struct Listeners {
    /// HTTP over TCP.
    pub tcp: Option<StdTcpListener>,
    /// HTTP over a unix socket.
    pub socket: Option<StdUnixListener>,
}

/// Adds one.
pub(super) fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// Starts the server on a thread of its own. It ends with the process.
///
/// Fails when the thread or its runtime cannot be started.
pub fn start(listeners: Listeners, state: AppState) -> anyhow::Result<()> {
    // Before the thread gives up its rights: the first runtime of a process makes a pair of sockets, for signals.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.context("failed to start the runtime of the HTTP server")?;
    let serve = move || {
        // It starts no threads: what blocks is elsewhere.
        SERVER.enter();
        if let Err(error) = runtime.block_on(run(listeners, state)) {
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

/// Connections that came in by one listener.
struct Clients {
    /// Cap: with those of the other listener [`ServerLimits::connections`].
    open: Vec<Connection>,
    /// How many of them the other listener's clients cannot take away.
    share: usize,
}

/// All that is served.
struct Server {
    state: AppState,
    begun: Instant,
    tasks: JoinSet<()>,
    /// What answers, by the door.
    routers: [(Door, Router); 3],
    tcp: Clients,
    socket: Clients,
}

/// Serves for ever. Fails only when a listener is unusable.
async fn run(listeners: Listeners, state: AppState) -> io::Result<()> {
    let tcp =
        listeners.tcp.map(|listener| listener.set_nonblocking(true).and_then(|()| TcpListener::from_std(listener)));
    let socket =
        listeners.socket.map(|listener| listener.set_nonblocking(true).and_then(|()| UnixListener::from_std(listener)));
    let (tcp, socket) = (tcp.transpose()?, socket.transpose()?);
    let mut server = Server::new(state, socket.is_some());
    let mut look = tokio::time::interval(LOOK);
    loop {
        tokio::select! {
            accepted = accept_tcp(tcp.as_ref()) => match accepted {
                Ok((stream, peer)) => {
                    let door = Door::of(stream.local_addr().ok(), peer);
                    server.admit(stream, door, Peer(Some(peer.ip()))).await;
                }
                Err(_) => server.not_accepted().await,
            },
            accepted = accept_socket(socket.as_ref()) => match accepted {
                Ok(stream) => server.admit(stream, Door::Socket, Peer(None)).await,
                Err(_) => server.not_accepted().await,
            },
            Some(_) = server.tasks.join_next() => {}
            _ = look.tick() => server.look(),
        }
    }
}

/// The next connection; never, without a listener.
async fn accept_tcp(listener: Option<&TcpListener>) -> io::Result<(TcpStream, SocketAddr)> {
    match listener {
        Some(listener) => listener.accept().await,
        None => std::future::pending().await,
    }
}

/// The same of the unix socket.
async fn accept_socket(listener: Option<&UnixListener>) -> io::Result<UnixStream> {
    match listener {
        Some(listener) => listener.accept().await.map(|(stream, _)| stream),
        None => std::future::pending().await,
    }
}

impl Server {
    fn new(state: AppState, has_socket: bool) -> Self {
        let all = state.limits.connections;
        let of_socket = if has_socket { (all / 4).max(1) } else { 0 };
        let clients = |share: usize| Clients { open: Vec::new(), share };
        Self {
            routers: [Door::Socket, Door::Loopback, Door::Network].map(|door| (door, router(state.clone(), door))),
            state,
            begun: Instant::now(),
            tasks: JoinSet::new(),
            tcp: clients(all.saturating_sub(of_socket)),
            socket: clients(of_socket),
        }
    }

    /// Serves a connection, and closes another when there are too many.
    async fn admit<S>(&mut self, stream: S, door: Door, peer: Peer)
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        count(&self.state.counts.accepted);
        let Some((_, router)) = self.routers.iter().find(|(of, _)| *of == door) else { return };
        let (own, other) = match door {
            Door::Socket => (&mut self.socket, &mut self.tcp),
            Door::Loopback | Door::Network => (&mut self.tcp, &mut self.socket),
        };
        make_room(own, other, self.state.limits.connections, &self.state.counts);
        let asked_ms = Arc::new(AtomicU64::new(milliseconds(self.begun)));
        let exchange = exchange(stream, peer, router.clone(), self.state.limits, self.begun, Arc::clone(&asked_ms));
        let task = self.tasks.spawn(exchange);
        own.open.push(Connection { task, asked_ms });
        // So that a connection is served before others are accepted and it has to make room.
        tokio::task::yield_now().await;
    }

    async fn not_accepted(&self) {
        count(&self.state.counts.not_accepted);
        tokio::time::sleep(ACCEPT_PAUSE).await;
    }

    /// Closes what takes too long, and drops what nobody asks for any more.
    fn look(&mut self) {
        let (now_ms, limit) = (milliseconds(self.begun), self.state.limits.exchange_time);
        for clients in [&mut self.tcp, &mut self.socket] {
            close_late(&mut clients.open, now_ms, limit, &self.state.counts);
        }
        self.state.expire();
    }
}

fn milliseconds(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX)
}

/// Closes connections until there is room for one more of `own`: those of the others while they are
/// more than their share and `own` less than its, else `own`; of them the one that asked longest
/// ago.
fn make_room(own: &mut Clients, other: &mut Clients, cap: usize, counts: &ServerCounts) {
    for clients in [&mut *own, &mut *other] {
        clients.open.retain(|connection| !connection.task.is_finished());
    }
    while own.open.len() + other.open.len() >= cap.max(1) {
        let others_go = own.open.len() < own.share && !other.open.is_empty();
        let open = if others_go || own.open.is_empty() { &mut other.open } else { &mut own.open };
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
async fn exchange<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(
    stream: S,
    peer: Peer,
    router: Router,
    limits: ServerLimits,
    begun: Instant,
    asked_ms: Arc<AtomicU64>,
) {
    let router = TowerToHyperService::new(router);
    let service = service_fn(move |mut request: hyper::Request<Incoming>| {
        asked_ms.store(milliseconds(begun), Ordering::Relaxed);
        request.extensions_mut().insert(peer);
        router.call(request)
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.head_time)
        .max_buf_size(limits.head_bytes)
        .serve_connection(TokioIo::new(stream), service);
    let _ = connection.await;
}
