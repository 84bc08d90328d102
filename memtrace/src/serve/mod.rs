//! HTTP: metrics, health, incidents, processes. Handlers ask the loop; they hold no state of their own.

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
/// Incidents in one answer of /api/incidents unless asked for fewer or more.
const LISTED: usize = 200;
/// And at most.
const MAX_LISTED: usize = 1000;

/// What is on disk, to those who may only look.
pub trait Library: Send + Sync + 'static {
    /// The newest incidents, at most `most`, as `memtrace incidents --json` prints them.
    fn list(&self, most: usize) -> Result<String, String>;
    /// One incident as JSON, by id; `None` when there is none.
    fn incident(&self, id: &str) -> Result<Option<String>, String>;
    /// The newest incidents, at most `most`, without `timeline` and `allocation_paths`.
    fn newest(&self, most: usize) -> Result<Vec<Incident>, String>;
}

/// Everything /metrics tells, at one moment.
#[derive(Clone, Debug, Default)]
pub struct Readings {
    /// The daemon's sinks.
    pub counters: Counters,
    /// The engine's own counts.
    pub counts: Counts,
    /// Cgroups and processes.
    pub snapshot: Snapshot,
    /// Records sent by the kernel side, by ring.
    pub sent: Vec<(&'static str, u64)>,
    /// Losses by `ring/reason`.
    pub losses: Vec<(String, u64)>,
    /// Journal frames that could not be written.
    pub journal_failures: u64,
    /// Incidents whose functions got names.
    pub incidents_named: u64,
    /// Incidents that got none since something failed.
    pub incidents_not_named: u64,
    /// Stacks unwound.
    pub stacks: u64,
    /// What stacks have cost.
    pub stack_cost: StackCost,
    /// Hooks and whether they are attached.
    pub hooks: Vec<(&'static str, bool)>,
    /// Resident memory of the agent.
    pub resident_bytes: Option<u64>,
    /// Memory of its BPF maps.
    pub map_bytes: Option<u64>,
}

/// What stacks have cost since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StackCost {
    /// In the kernel, nanoseconds.
    pub kernel_ns: u64,
    /// In the agent, nanoseconds.
    pub user_ns: u64,
    /// Stacks the budget left out.
    pub thinned: u64,
}

/// What the daemon counts about its own sinks.
#[derive(Clone, Debug, Default)]
pub struct Counters {
    /// Kills written to the ledger, or at least tried.
    pub kills: u64,
    /// Processes that got SIGKILL, by why.
    pub sigkills: BTreeMap<SigkillCause, u64>,
    /// Spikes seen.
    pub spikes: u64,
    /// Near misses seen.
    pub near_misses: u64,
    /// Cgroups that got stuck at their limit with their OOM killer off.
    pub stuck: u64,
    /// Kills only one of kernel log and hooks knows.
    pub disagreements: u64,
    /// OOM incidents saved.
    pub saved_oom_kills: u64,
    /// Spike incidents saved.
    pub saved_spikes: u64,
    /// Near misses saved.
    pub saved_near_misses: u64,
    /// Cgroups that were stuck, saved.
    pub saved_stuck: u64,
    /// Incidents or ledger lines that could not be written.
    pub write_failures: u64,
    /// Incidents dropped for size or age.
    pub dropped: u64,
}

impl Counters {
    /// Counts one saved incident.
    pub fn saved(&mut self, kind: Kind) {
        let counter = match kind {
            Kind::OomKill => &mut self.saved_oom_kills,
            Kind::NearMiss => &mut self.saved_near_misses,
            Kind::Stuck => &mut self.saved_stuck,
            Kind::Spike | Kind::Recording => &mut self.saved_spikes,
        };
        *counter = counter.saturating_add(1);
    }
}

/// A question to the loop, answered between two of its turns.
pub enum Ask {
    /// Whether it turns.
    Ping(oneshot::Sender<()>),
    /// The state of cgroups and processes.
    Snapshot(oneshot::Sender<Snapshot>),
    /// What /metrics tells.
    Readings(oneshot::Sender<Box<Readings>>),
}

#[derive(Clone)]
struct Shared {
    asks: mpsc::Sender<Ask>,
    library: Arc<dyn Library>,
    /// One answer from disk is made at a time: however many ask, what is read does not add up in memory.
    reading: Arc<Semaphore>,
}

/// Serves until the runtime ends.
pub async fn run(listener: TcpListener, asks: mpsc::Sender<Ask>, library: Arc<dyn Library>) {
    if let Err(error) = axum::serve(listener, router(asks, library)).await {
        error!("HTTP: {error}");
    }
}

fn router(asks: mpsc::Sender<Ask>, library: Arc<dyn Library>) -> Router {
    Router::new()
        .route("/", get(page))
        .route("/healthz", get(async || "ok\n"))
        .route("/readyz", get(ready))
        .route("/metrics", get(metrics_text))
        .route("/api/incidents", get(incidents))
        .route("/api/incidents/{id}", get(incident))
        .route("/api/processes", get(processes))
        .route("/api/cgroups", get(cgroups))
        .with_state(Shared { asks, library, reading: Arc::new(Semaphore::new(1)) })
}

impl Shared {
    async fn ask<T>(&self, question: impl FnOnce(oneshot::Sender<T>) -> Ask) -> Result<T, Response> {
        let (reply, answer) = oneshot::channel();
        let gone = || (StatusCode::SERVICE_UNAVAILABLE, "the agent is stopping\n").into_response();
        self.asks.send(question(reply)).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())
    }

    /// Runs file access where it does not hold up the loop.
    async fn read<T: Send + 'static>(
        &self,
        read: impl FnOnce(&dyn Library) -> Result<T, String> + Send + 'static,
    ) -> Result<T, Response> {
        let library = Arc::clone(&self.library);
        let gone = |_| (StatusCode::SERVICE_UNAVAILABLE, "the agent is stopping\n").into_response();
        let permit = Arc::clone(&self.reading).acquire_owned().await.map_err(gone)?;
        let failed = |why: String| (StatusCode::INTERNAL_SERVER_ERROR, format!("{why}\n")).into_response();
        let reading = move || {
            // Goes with the reading, not with the asker: who hangs up has not stopped it.
            let _permit = permit;
            read(&*library)
        };
        tokio::task::spawn_blocking(reading).await.map_err(|error| failed(error.to_string()))?.map_err(failed)
    }
}

/// 200 as soon as the loop answers: the programs are attached.
async fn ready(State(shared): State<Shared>) -> Result<&'static str, Response> {
    shared.ask(Ask::Ping).await.map(|()| "ready\n")
}

async fn metrics_text(State(shared): State<Shared>) -> Result<Response, Response> {
    let text = metrics::text(&*shared.ask(Ask::Readings).await?);
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    Ok(([(header::CONTENT_TYPE, kind)], text).into_response())
}

/// Which processes to list.
#[derive(Deserialize)]
struct Which {
    pid: Option<u32>,
}

async fn processes(State(shared): State<Shared>, Query(which): Query<Which>) -> Result<Response, Response> {
    let mut rows = shared.ask(Ask::Snapshot).await?.processes;
    rows.retain(|row| which.pid.is_none_or(|pid| row.pid == pid));
    Ok(axum::Json(rows).into_response())
}

async fn cgroups(State(shared): State<Shared>) -> Result<Response, Response> {
    Ok(axum::Json(shared.ask(Ask::Snapshot).await?.cgroups).into_response())
}

/// How many incidents to list.
#[derive(Deserialize)]
struct HowMany {
    limit: Option<usize>,
}

async fn incidents(State(shared): State<Shared>, Query(many): Query<HowMany>) -> Result<Response, Response> {
    let most = many.limit.unwrap_or(LISTED).min(MAX_LISTED);
    let text = shared.read(move |library| library.list(most)).await?;
    Ok(([(header::CONTENT_TYPE, "application/json")], text).into_response())
}

async fn incident(State(shared): State<Shared>, UrlPath(id): UrlPath<String>) -> Result<Response, Response> {
    let text = shared.read(move |library| library.incident(&id)).await?;
    let text = text.ok_or_else(|| (StatusCode::NOT_FOUND, "no such incident\n").into_response())?;
    Ok(([(header::CONTENT_TYPE, "application/json")], text).into_response())
}

/// A plain page: the newest incidents, each linked to its JSON.
async fn page(State(shared): State<Shared>) -> Result<Html<String>, Response> {
    let rows: String = shared.read(|library| library.newest(MAX_ROWS)).await?.iter().map(row).collect();
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

/// Names come from untrusted processes.
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

    /// Tells how many incidents it was asked for, and how many ask at once.
    #[derive(Default)]
    struct Counting {
        now: AtomicUsize,
        most: AtomicUsize,
    }

    impl Library for Counting {
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
        let library = Arc::new(Counting::default());
        let counting = Arc::clone(&library);
        runtime.block_on(async move {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = listener.local_addr().unwrap();
            let (asks, mut asked) = mpsc::channel(4);
            tokio::spawn(run(listener, asks, counting));
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
            match asked.recv().await.unwrap() {
                Ask::Ping(reply) => reply.send(()).unwrap(),
                _ => panic!("readiness asked for more than a ping"),
            }
            assert!(ready.await.unwrap().ends_with("ready\n"));
        });
        assert_eq!(library.most.load(Ordering::SeqCst), 1);
    }
}
