//! HTTP: metrics, health, incidents, processes and cgroups.
//!
//! What the session knows a handler asks the agent's loop for ([`LoopRequest`]); what is on disk it
//! reads through an [`IncidentSource`], in threads of their own (`reader`) and one request at a time. `server`
//! accepts and bounds connections, `guard` refuses foreign ones and `access` those without a right,
//! `answers` bounds what is made and kept for them.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::Router;
use axum::body::Bytes;
use axum::extract::{Path as UrlPath, Query, State};
use axum::http::header;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use serde::{Deserialize, Serialize};
use tokio::sync::{Semaphore, mpsc, oneshot};

use memtrace_engine::Counts;
use memtrace_engine::snapshot::{CgroupView, Snapshot};
use memtrace_incident::SigkillCause;
use memtrace_incident::{Incident, Kind};

mod access;
mod answers;
mod guard;
mod metrics;
mod reader;
mod server;
#[cfg(test)]
mod tests;

pub use access::Token;
use access::{Door, WrongTokenLog};
use answers::{BodyBudget, Refusal, Shared, TURN_LIMIT};
use guard::Guard;
pub use guard::HostNames;
pub use metrics::MAX_CGROUP_SERIES;
use reader::Reader;
pub use server::{Listeners, ServerCounts, ServerLimits, start};

/// Incidents on the page, newest first.
const MAX_ROWS: usize = 100;
/// Incidents in one answer of /api/incidents without `limit`.
const DEFAULT_LISTED: usize = 200;
/// Largest `limit` of /api/incidents; a larger one counts as this.
const MAX_LISTED: usize = 1000;

/// A body that is larger is made at most once in a while and shared.
const LARGE_BYTES: usize = 128 << 10;
/// The same for a snapshot: processes and cgroups.
const LARGE_ROWS: usize = 250;
/// Bytes of a ledger that are served: its newest lines.
pub const MAX_LEDGER_BYTES: u64 = 4 << 20;

/// The incidents on disk, read only.
pub trait IncidentSource: Send + Sync + 'static {
    /// The newest incidents, at most `most`, as `memtrace incidents --json` prints them.
    fn list(&self, most: usize) -> Result<String, String>;
    /// One incident as JSON, by id; `None` when there is none.
    fn incident(&self, id: &str) -> Result<Option<String>, String>;
    /// The newest incidents, at most `most`, without `timeline` and `allocation_paths`.
    fn newest(&self, most: usize) -> Result<Vec<Incident>, String>;
    /// The newest lines of the kill ledger, oldest first, at most `most` bytes.
    fn kills(&self, most: u64) -> Result<Vec<u8>, String>;
    /// The same of the SIGKILL ledger.
    fn sigkills(&self, most: u64) -> Result<Vec<u8>, String>;
}

/// Everything /metrics shows, at one moment.
#[derive(Clone, Debug, Default)]
pub struct MetricsSnapshot {
    /// What became of incidents and kills.
    pub counters: Counters,
    /// The engine's own counts.
    pub counts: Counts,
    /// The cgroups that have series of their own, at most [`MAX_CGROUP_SERIES`].
    pub cgroups: Vec<CgroupView>,
    /// Records sent by the kernel side, by ring.
    pub sent: Vec<(&'static str, u64)>,
    /// Journal frames that could not be written.
    pub journal_failures: u64,
    /// Lines of the agent's log that were not written, because too many waited.
    pub log_lines_lost: u64,
    /// Incidents that wait to be written.
    pub incidents_waiting: u64,
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
    /// Processes that unwind stacks, by what they do.
    pub stack_workers: Vec<(&'static str, u64)>,
    /// Readings that the one that runs has given up and that have not ended.
    pub stack_readings_late: u64,
    /// Resident memory of the one that runs, bytes.
    pub stack_worker_bytes: Option<u64>,
    /// CPU time of all of them since the start, nanoseconds.
    pub stack_worker_cpu_ns: u64,
    /// Connections to this server, by what became of them.
    pub connections: Vec<(&'static str, u64)>,
    /// Requests that this server refused, by why.
    pub refused: Vec<(&'static str, u64)>,
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
    /// How long no agent watched before this run, nanoseconds.
    pub unwatched_ns: u64,
    /// Kills of that time that were found.
    pub unwatched_kills: u64,
    /// Incidents saved, by kind.
    pub saved: BTreeMap<Kind, u64>,
    /// Incidents or ledger lines that could not be written.
    pub write_failures: u64,
    /// Incidents that were not written, because too many waited or one could not be encoded.
    pub given_up: u64,
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

/// What the handlers share.
#[derive(Clone)]
pub struct AppState {
    requests: mpsc::Sender<LoopRequest>,
    incidents: Arc<dyn IncidentSource>,
    names: HostNames,
    token: Option<Arc<Token>>,
    counts: Arc<ServerCounts>,
    wrong_tokens: Arc<WrongTokenLog>,
    /// One permit: only one request reads from disk at a time, so that many requests do not add up in memory.
    read_permit: Arc<Semaphore>,
    /// Reads for clients of TCP, and after [`Self::for_socket`] for those of the unix socket.
    reader: Reader,
    socket_reader: Reader,
    answers: Arc<Answers>,
    bodies: BodyBudget,
    limits: ServerLimits,
}

/// Answers that may be large.
struct Answers {
    snapshot: Shared<Arc<Snapshot>>,
    metrics: Shared<Bytes>,
    processes: Shared<Bytes>,
    cgroups: Shared<Bytes>,
}

impl AppState {
    /// Asks `requests`, reads from `incidents`, answers to `names`, and over TCP to who knows the
    /// `token`. Fails when a thread that reads cannot be started.
    pub fn new(
        requests: mpsc::Sender<LoopRequest>,
        incidents: Arc<dyn IncidentSource>,
        names: HostNames,
        token: Option<Token>,
        limits: ServerLimits,
    ) -> anyhow::Result<Self> {
        let body = || Shared::new(|bytes: &Bytes| bytes.len() > LARGE_BYTES);
        let rows = |snapshot: &Arc<Snapshot>| snapshot.processes.len() + snapshot.cgroups.len() > LARGE_ROWS;
        let answers = Answers { snapshot: Shared::new(rows), metrics: body(), processes: body(), cgroups: body() };
        Ok(Self {
            requests,
            incidents,
            names,
            token: token.map(Arc::new),
            counts: Arc::default(),
            wrong_tokens: Arc::default(),
            read_permit: Arc::new(Semaphore::new(1)),
            reader: Reader::start()?,
            socket_reader: Reader::start()?,
            answers: Arc::new(answers),
            bodies: BodyBudget::of_tcp(),
            limits,
        })
    }

    /// The same for clients of the unix socket: what those of TCP take up is not missing here.
    fn for_socket(&self) -> Self {
        Self {
            read_permit: Arc::new(Semaphore::new(1)),
            reader: self.socket_reader.clone(),
            bodies: BodyBudget::of_socket(),
            ..self.clone()
        }
    }

    /// Gives back what nobody asks for any more.
    fn expire(&self) {
        let Answers { snapshot, metrics, processes, cgroups } = &*self.answers;
        snapshot.expire();
        [metrics, processes, cgroups].into_iter().for_each(Shared::expire);
    }

    /// The answer of the agent's loop, or 503 when it gives none in time.
    async fn ask<T>(&self, request: impl FnOnce(oneshot::Sender<T>) -> LoopRequest) -> Result<T, Refusal> {
        let (reply, answer) = oneshot::channel();
        let asked = async {
            let gone = || Refusal::Busy("the agent is stopping");
            self.requests.send(request(reply)).await.map_err(|_| gone())?;
            answer.await.map_err(|_| gone())
        };
        let late = |_| Refusal::Busy("the agent's loop did not answer in time");
        tokio::time::timeout(self.limits.loop_time, asked).await.map_err(late)?
    }

    async fn snapshot(&self) -> Result<Arc<Snapshot>, Refusal> {
        self.answers.snapshot.get(async { self.ask(LoopRequest::Snapshot).await.map(Arc::new) }).await
    }

    /// Reads from disk in another thread, so that other requests are not held up.
    async fn read<T: Send + 'static>(
        &self,
        read: impl FnOnce(&dyn IncidentSource) -> Result<T, String> + Send + 'static,
    ) -> Result<T, Refusal> {
        let incidents = Arc::clone(&self.incidents);
        let turn = tokio::time::timeout(TURN_LIMIT, Arc::clone(&self.read_permit).acquire_owned()).await;
        let late = |_| Refusal::Busy("others wait for files to be read; try again");
        let permit = turn.map_err(late)?.map_err(|_| Refusal::Busy("the agent is stopping"))?;
        let reading = move || {
            // Held until the read ends: a client that hangs up does not stop it.
            let _permit = permit;
            read(&*incidents)
        };
        let read = self.reader.run(reading).await;
        read.ok_or_else(|| Refusal::Failed("failed to read files".to_owned()))?.map_err(Refusal::Failed)
    }

    fn answer(&self, kind: &'static str, body: Bytes) -> Result<Response, Refusal> {
        Ok(([(header::CONTENT_TYPE, kind)], self.bodies.body(body)?).into_response())
    }
}

const JSON: &str = "application/json";
const JSON_LINES: &str = "application/jsonl";

/// A body without the room that it grew into, which the budget of bodies does not count.
fn fitted(body: Vec<u8>) -> Bytes {
    body.into_boxed_slice().into()
}

fn json(rows: &impl Serialize) -> Result<Bytes, Refusal> {
    serde_json::to_vec(rows).map(fitted).map_err(|error| Refusal::Failed(error.to_string()))
}

/// What answers to connections that came in by this door.
fn router(state: AppState, door: Door) -> Router {
    let state = if door == Door::Socket { state.for_socket() } else { state };
    let guard = Guard {
        door,
        names: state.names.clone(),
        token: state.token.clone(),
        counts: Arc::clone(&state.counts),
        wrong_tokens: Arc::clone(&state.wrong_tokens),
    };
    let guard = axum::middleware::from_fn_with_state(guard, guard::guard);
    Router::new()
        .route("/", get(page))
        .route("/healthz", get(async || "ok\n"))
        .route("/readyz", get(ready))
        .route("/metrics", get(metrics_text))
        .route("/api/incidents", get(incidents))
        .route("/api/incidents/{id}", get(incident))
        .route("/api/kills", get(kills))
        .route("/api/sigkills", get(sigkills))
        .route("/api/processes", get(processes))
        .route("/api/cgroups", get(cgroups))
        .layer(guard)
        .with_state(state)
}

/// 200 as soon as the loop answers: it runs once the programs are attached.
async fn ready(State(state): State<AppState>) -> Result<&'static str, Refusal> {
    state.ask(LoopRequest::Ping).await.map(|()| "ready\n")
}

async fn metrics_text(State(state): State<AppState>) -> Result<Response, Refusal> {
    let text = async {
        let mut snapshot = state.ask(LoopRequest::Metrics).await?;
        snapshot.connections = state.counts.by_outcome();
        snapshot.refused = state.counts.refused();
        Ok(fitted(metrics::text(*snapshot).into_bytes()))
    };
    let text = state.answers.metrics.get(text).await?;
    state.answer("application/openmetrics-text; version=1.0.0; charset=utf-8", text)
}

#[derive(Deserialize)]
struct ProcessQuery {
    /// Only this process.
    pid: Option<u32>,
}

async fn processes(State(state): State<AppState>, Query(query): Query<ProcessQuery>) -> Result<Response, Refusal> {
    let rows = match query.pid {
        None => state.answers.processes.get(async { json(&state.snapshot().await?.processes) }).await?,
        Some(pid) => {
            let snapshot = state.snapshot().await?;
            json(&snapshot.processes.iter().filter(|row| row.pid == pid).collect::<Vec<_>>())?
        }
    };
    state.answer(JSON, rows)
}

async fn cgroups(State(state): State<AppState>) -> Result<Response, Refusal> {
    let rows = state.answers.cgroups.get(async { json(&state.snapshot().await?.cgroups) }).await?;
    state.answer(JSON, rows)
}

#[derive(Deserialize)]
struct IncidentQuery {
    /// How many incidents to list.
    limit: Option<usize>,
}

async fn incidents(State(state): State<AppState>, Query(query): Query<IncidentQuery>) -> Result<Response, Refusal> {
    let most = query.limit.unwrap_or(DEFAULT_LISTED).min(MAX_LISTED);
    let text = state.read(move |source| source.list(most)).await?;
    state.answer(JSON, fitted(text.into_bytes()))
}

async fn incident(State(state): State<AppState>, UrlPath(id): UrlPath<String>) -> Result<Response, Refusal> {
    let text = state.read(move |source| source.incident(&id)).await?;
    state.answer(JSON, fitted(text.ok_or(Refusal::NoSuchIncident)?.into_bytes()))
}

async fn kills(State(state): State<AppState>) -> Result<Response, Refusal> {
    let lines = state.read(|source| source.kills(MAX_LEDGER_BYTES)).await?;
    state.answer(JSON_LINES, fitted(lines))
}

async fn sigkills(State(state): State<AppState>) -> Result<Response, Refusal> {
    let lines = state.read(|source| source.sigkills(MAX_LEDGER_BYTES)).await?;
    state.answer(JSON_LINES, fitted(lines))
}

/// A plain page: the newest incidents, each linked to its JSON.
async fn page(State(state): State<AppState>) -> Result<Response, Refusal> {
    let rows: String = state.read(|source| source.newest(MAX_ROWS)).await?.iter().map(row).collect();
    let page = format!(
        "<!doctype html><meta charset=utf-8><title>memtrace</title>\
         <style>body{{font:14px system-ui;margin:2em}}td,th{{padding:.2em 1em .2em 0;text-align:left}}</style>\
         <h1>memtrace</h1><p><a href=/metrics>metrics</a> <a href=/api/processes>processes</a> \
         <a href=/api/cgroups>cgroups</a> <a href=/api/incidents>incidents</a>\
         <table><tr><th>incident<th>when<th>victim<th>cgroup<th>what it means{rows}</table>"
    );
    state.answer("text/html; charset=utf-8", fitted(page.into_bytes()))
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
