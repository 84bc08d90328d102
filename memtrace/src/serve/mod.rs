//! HTTP: metrics, health, incidents, processes and cgroups.
//!
//! A handler has no state of its own. What the session knows it asks the agent's loop for ([`LoopRequest`]); what is on
//! disk it reads through an [`IncidentSource`], in a blocking thread and one request at a time.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::Router;
use axum::extract::{Path as UrlPath, Query, State};
use axum::http::{StatusCode, header};
use axum::response::{Html, IntoResponse, Response};
use axum::routing::get;
use serde::Deserialize;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, mpsc, oneshot};
use tracing::error;

use memtrace_engine::Counts;
use memtrace_engine::snapshot::Snapshot;
use memtrace_incident::SigkillCause;
use memtrace_incident::{Incident, Kind};

mod metrics;

/// Incidents on the page, newest first.
const MAX_ROWS: usize = 100;
/// Incidents in one answer of /api/incidents without `limit`.
const DEFAULT_LISTED: usize = 200;
/// Largest `limit` of /api/incidents; a larger one counts as this.
const MAX_LISTED: usize = 1000;

/// The incidents on disk, read only.
pub trait IncidentSource: Send + Sync + 'static {
    /// The newest incidents, at most `most`, as `memtrace incidents --json` prints them.
    fn list(&self, most: usize) -> Result<String, String>;
    /// One incident as JSON, by id; `None` when there is none.
    fn incident(&self, id: &str) -> Result<Option<String>, String>;
    /// The newest incidents, at most `most`, without `timeline` and `allocation_paths`.
    fn newest(&self, most: usize) -> Result<Vec<Incident>, String>;
}

/// Everything /metrics shows, at one moment.
#[derive(Clone, Debug, Default)]
pub struct MetricsSnapshot {
    /// What became of incidents and kills.
    pub counters: Counters,
    /// The engine's own counts.
    pub counts: Counts,
    /// Cgroups and processes, for the series of each cgroup.
    pub snapshot: Snapshot,
    /// Records sent by the kernel side, by ring.
    pub sent: Vec<(&'static str, u64)>,
    /// Journal frames that could not be written.
    pub journal_failures: u64,
    /// Incidents whose stack frames were given function names.
    pub incidents_named: u64,
    /// Incidents whose stack frames could not be named.
    pub incidents_not_named: u64,
    /// Stacks unwound since the start.
    pub stacks: u64,
    /// What stacks have cost since the start.
    pub stack_cost: StackCostTotals,
    /// Every hook, and whether it is attached.
    pub hooks: Vec<(&'static str, bool)>,
    /// Resident memory of the agent, bytes; `None` when /proc/self/statm cannot be read.
    pub resident_bytes: Option<u64>,
    /// Memory of its BPF maps, bytes; `None` when the kernel does not report it.
    pub map_bytes: Option<u64>,
}

/// What stacks have cost since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StackCostTotals {
    /// CPU time in the kernel, nanoseconds.
    pub kernel_ns: u64,
    /// CPU time in the agent, nanoseconds.
    pub user_ns: u64,
    /// Stacks left out to stay within the budget.
    pub thinned: u64,
}

/// What the agent counts about the incidents and kills it writes.
#[derive(Clone, Debug, Default)]
pub struct Counters {
    /// Kills written to the ledger, failed writes included.
    pub kills: u64,
    /// Processes that got SIGKILL, by cause.
    pub sigkills: BTreeMap<SigkillCause, u64>,
    /// Spikes seen.
    pub spikes: u64,
    /// Near misses seen.
    pub near_misses: u64,
    /// Times a cgroup got stuck at its limit with its OOM killer off.
    pub stuck: u64,
    /// Kills seen by only one of the kernel log and the hooks.
    pub disagreements: u64,
    /// Incidents saved, by kind.
    pub saved: BTreeMap<Kind, u64>,
    /// Incidents or ledger lines that could not be written.
    pub write_failures: u64,
    /// Incident files deleted for size or age.
    pub dropped: u64,
}

impl Counters {
    /// Counts one saved incident.
    pub fn count_saved(&mut self, kind: Kind) {
        let count = self.saved.entry(kind).or_default();
        *count = count.saturating_add(1);
    }
}

/// A request to the agent's loop, answered between two of its turns.
pub enum LoopRequest {
    /// Answered as soon as the loop runs.
    Ping(oneshot::Sender<()>),
    /// The state of cgroups and processes.
    Snapshot(oneshot::Sender<Snapshot>),
    /// What /metrics shows.
    Metrics(oneshot::Sender<Box<MetricsSnapshot>>),
}

#[derive(Clone)]
struct AppState {
    requests: mpsc::Sender<LoopRequest>,
    incidents: Arc<dyn IncidentSource>,
    /// One permit: only one request reads from disk at a time, so that many requests do not add up in memory.
    read_permit: Arc<Semaphore>,
}

/// Serves until the runtime ends.
pub async fn run(listener: TcpListener, requests: mpsc::Sender<LoopRequest>, incidents: Arc<dyn IncidentSource>) {
    if let Err(error) = axum::serve(listener, router(requests, incidents)).await {
        error!("the HTTP server stopped: {error}");
    }
}

fn router(requests: mpsc::Sender<LoopRequest>, source: Arc<dyn IncidentSource>) -> Router {
    Router::new()
        .route("/", get(page))
        .route("/healthz", get(async || "ok\n"))
        .route("/readyz", get(ready))
        .route("/metrics", get(metrics_text))
        .route("/api/incidents", get(incidents))
        .route("/api/incidents/{id}", get(incident))
        .route("/api/processes", get(processes))
        .route("/api/cgroups", get(cgroups))
        .with_state(AppState { requests, incidents: source, read_permit: Arc::new(Semaphore::new(1)) })
}

impl AppState {
    async fn ask<T>(&self, request: impl FnOnce(oneshot::Sender<T>) -> LoopRequest) -> Result<T, Response> {
        let (reply, answer) = oneshot::channel();
        let gone = || (StatusCode::SERVICE_UNAVAILABLE, "the agent is stopping\n").into_response();
        self.requests.send(request(reply)).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())
    }

    /// Reads from disk in a blocking thread, so that the loop is not held up.
    async fn read<T: Send + 'static>(
        &self,
        read: impl FnOnce(&dyn IncidentSource) -> Result<T, String> + Send + 'static,
    ) -> Result<T, Response> {
        let incidents = Arc::clone(&self.incidents);
        let gone = |_| (StatusCode::SERVICE_UNAVAILABLE, "the agent is stopping\n").into_response();
        let permit = Arc::clone(&self.read_permit).acquire_owned().await.map_err(gone)?;
        let failed = |why: String| (StatusCode::INTERNAL_SERVER_ERROR, format!("{why}\n")).into_response();
        let reading = move || {
            // Held until the read ends: a client that hangs up does not stop it.
            let _permit = permit;
            read(&*incidents)
        };
        tokio::task::spawn_blocking(reading).await.map_err(|error| failed(error.to_string()))?.map_err(failed)
    }
}

/// 200 as soon as the loop answers: it runs once the programs are attached.
async fn ready(State(state): State<AppState>) -> Result<&'static str, Response> {
    state.ask(LoopRequest::Ping).await.map(|()| "ready\n")
}

async fn metrics_text(State(state): State<AppState>) -> Result<Response, Response> {
    let text = metrics::text(*state.ask(LoopRequest::Metrics).await?);
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    Ok(([(header::CONTENT_TYPE, kind)], text).into_response())
}

#[derive(Deserialize)]
struct ProcessQuery {
    /// Only this process.
    pid: Option<u32>,
}

async fn processes(State(state): State<AppState>, Query(query): Query<ProcessQuery>) -> Result<Response, Response> {
    let mut rows = state.ask(LoopRequest::Snapshot).await?.processes;
    rows.retain(|row| query.pid.is_none_or(|pid| row.pid == pid));
    Ok(axum::Json(rows).into_response())
}

async fn cgroups(State(state): State<AppState>) -> Result<Response, Response> {
    Ok(axum::Json(state.ask(LoopRequest::Snapshot).await?.cgroups).into_response())
}

#[derive(Deserialize)]
struct IncidentQuery {
    /// How many incidents to list.
    limit: Option<usize>,
}

async fn incidents(State(state): State<AppState>, Query(query): Query<IncidentQuery>) -> Result<Response, Response> {
    let most = query.limit.unwrap_or(DEFAULT_LISTED).min(MAX_LISTED);
    let text = state.read(move |source| source.list(most)).await?;
    Ok(([(header::CONTENT_TYPE, "application/json")], text).into_response())
}

async fn incident(State(state): State<AppState>, UrlPath(id): UrlPath<String>) -> Result<Response, Response> {
    let text = state.read(move |source| source.incident(&id)).await?;
    let text = text.ok_or_else(|| (StatusCode::NOT_FOUND, "no such incident\n").into_response())?;
    Ok(([(header::CONTENT_TYPE, "application/json")], text).into_response())
}

/// A plain page: the newest incidents, each linked to its JSON.
async fn page(State(state): State<AppState>) -> Result<Html<String>, Response> {
    let rows: String = state.read(|source| source.newest(MAX_ROWS)).await?.iter().map(row).collect();
    Ok(Html(format!(
        "<!doctype html><meta charset=utf-8><title>memtrace</title>\
         <style>body{{font:14px system-ui;margin:2em}}td,th{{padding:.2em 1em .2em 0;text-align:left}}</style>\
         <h1>memtrace</h1><p><a href=/metrics>metrics</a> <a href=/api/processes>processes</a> \
         <a href=/api/cgroups>cgroups</a> <a href=/api/incidents>incidents</a>\
         <table><tr><th>incident<th>when<th>victim<th>cgroup<th>what it means{rows}</table>"
    )))
}

fn row(incident: &Incident) -> String {
    let who = incident.oom.as_ref().and_then(|oom| oom.victims.first()).map_or("", |victim| &victim.comm);
    format!(
        "<tr><td><a href=\"/api/incidents/{id}\">{id}</a><td>{}<td>{}<td>{}<td>{}",
        escape(&incident.at.wall),
        escape(who),
        escape(incident.cgroup.path.as_deref().unwrap_or("unknown")),
        escape(&incident.verdict.summary),
        id = escape(&incident.id),
    )
}

/// Text for HTML: names come from untrusted processes.
fn escape(text: &str) -> String {
    text.chars().fold(String::with_capacity(text.len()), |mut out, c| {
        match c {
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '&' => out.push_str("&amp;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            c => out.push(c),
        }
        out
    })
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    use super::*;

    #[test]
    fn names_cannot_break_out_of_the_page() {
        assert_eq!(escape("<a href='x'>&\""), "&lt;a href=&#39;x&#39;&gt;&amp;&quot;");
    }

    /// Answers with how many incidents it was asked for; counts how many requests read at once.
    #[derive(Default)]
    struct Counting {
        now: AtomicUsize,
        most: AtomicUsize,
    }

    impl IncidentSource for Counting {
        fn list(&self, most: usize) -> Result<String, String> {
            let now = self.now.fetch_add(1, Ordering::SeqCst) + 1;
            self.most.fetch_max(now, Ordering::SeqCst);
            std::thread::sleep(Duration::from_millis(20));
            self.now.fetch_sub(1, Ordering::SeqCst);
            Ok(most.to_string())
        }

        fn incident(&self, _: &str) -> Result<Option<String>, String> {
            Ok(None)
        }

        fn newest(&self, _: usize) -> Result<Vec<Incident>, String> {
            Ok(Vec::new())
        }
    }

    fn get(address: std::net::SocketAddr, path: &str) -> String {
        let mut stream = std::net::TcpStream::connect(address).unwrap();
        write!(stream, "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }

    #[test]
    fn lists_are_limited_and_read_one_at_a_time_and_readiness_is_a_ping() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let source = Arc::new(Counting::default());
        let counting = Arc::clone(&source);
        runtime.block_on(async move {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = listener.local_addr().unwrap();
            let (sender, mut requests) = mpsc::channel(4);
            tokio::spawn(run(listener, sender, counting));
            let of = |path: &'static str| tokio::task::spawn_blocking(move || get(address, path));
            for (path, end) in [
                ("/api/incidents", "\r\n\r\n200"),
                ("/api/incidents?limit=3", "\r\n\r\n3"),
                ("/api/incidents?limit=0", "\r\n\r\n0"),
                ("/api/incidents?limit=100000", "\r\n\r\n1000"),
            ] {
                let answer = of(path).await.unwrap();
                assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with(end), "{path}: {answer}");
            }
            assert!(of("/api/incidents?limit=x").await.unwrap().starts_with("HTTP/1.1 400"));
            let together: Vec<_> = (0..8).map(|_| of("/api/incidents")).collect();
            for answer in together {
                assert!(answer.await.unwrap().starts_with("HTTP/1.1 200"));
            }
            let ready = of("/readyz");
            match requests.recv().await.unwrap() {
                LoopRequest::Ping(reply) => reply.send(()).unwrap(),
                _ => panic!("readiness asked for more than a ping"),
            }
            assert!(ready.await.unwrap().ends_with("ready\n"));
        });
        assert_eq!(source.most.load(Ordering::SeqCst), 1);
    }
}
