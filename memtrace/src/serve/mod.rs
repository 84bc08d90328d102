//! HTTP: metrics, health, incidents, processes. Handlers ask the loop; they hold no state of their own.

use std::sync::Arc;

use axum::Router;
use axum::extract::{Path as UrlPath, Query, State};
use axum::http::{StatusCode, header};
use axum::response::{Html, IntoResponse, Response};
use axum::routing::get;
use serde::Deserialize;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot};
use tracing::error;

use crate::engine::Counts;
use crate::engine::incident::{Incident, Kind};
use crate::engine::snapshot::Snapshot;

mod metrics;

/// Incidents on the page, newest first.
const MAX_ROWS: usize = 100;

/// What is on disk, to those who may only look.
pub trait Library: Send + Sync + 'static {
    /// The list as `memtrace incidents --json` prints it.
    fn list(&self) -> Result<String, String>;
    /// One incident as JSON, by id; `None` when there is none.
    fn incident(&self, id: &str) -> Result<Option<String>, String>;
    /// The newest incidents, at most `most`.
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
    /// Hooks and whether they are attached.
    pub hooks: Vec<(&'static str, bool)>,
    /// Resident memory of the agent.
    pub resident_bytes: Option<u64>,
    /// Memory of its BPF maps.
    pub map_bytes: Option<u64>,
}

/// What the daemon counts about its own sinks.
#[derive(Clone, Debug, Default)]
pub struct Counters {
    /// Kills written to the ledger, or at least tried.
    pub kills: u64,
    /// Spikes seen.
    pub spikes: u64,
    /// Near misses seen.
    pub near_misses: u64,
    /// Kills only one of kernel log and hooks knows.
    pub disagreements: u64,
    /// OOM incidents saved.
    pub saved_oom_kills: u64,
    /// Spike incidents saved.
    pub saved_spikes: u64,
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
            Kind::Spike | Kind::Recording => &mut self.saved_spikes,
        };
        *counter = counter.saturating_add(1);
    }
}

/// A question to the loop, answered between two of its turns.
pub enum Ask {
    /// The state of cgroups and processes.
    Snapshot(oneshot::Sender<Snapshot>),
    /// What /metrics tells.
    Readings(oneshot::Sender<Box<Readings>>),
}

#[derive(Clone)]
struct Shared {
    asks: mpsc::Sender<Ask>,
    library: Arc<dyn Library>,
}

/// Serves until the runtime ends.
pub async fn run(listener: TcpListener, asks: mpsc::Sender<Ask>, library: Arc<dyn Library>) {
    let router = Router::new()
        .route("/", get(page))
        .route("/healthz", get(async || "ok\n"))
        .route("/readyz", get(ready))
        .route("/metrics", get(metrics_text))
        .route("/api/incidents", get(incidents))
        .route("/api/incidents/{id}", get(incident))
        .route("/api/processes", get(processes))
        .route("/api/cgroups", get(cgroups))
        .with_state(Shared { asks, library });
    if let Err(error) = axum::serve(listener, router).await {
        error!("HTTP: {error}");
    }
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
        let failed = |why: String| (StatusCode::INTERNAL_SERVER_ERROR, format!("{why}\n")).into_response();
        tokio::task::spawn_blocking(move || read(&*library))
            .await
            .map_err(|error| failed(error.to_string()))?
            .map_err(failed)
    }
}

/// 200 as soon as the loop answers: the programs are attached.
async fn ready(State(shared): State<Shared>) -> Result<&'static str, Response> {
    shared.ask(Ask::Snapshot).await.map(|_| "ready\n")
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

async fn incidents(State(shared): State<Shared>) -> Result<Response, Response> {
    let text = shared.read(|library| library.list()).await?;
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
    #[test]
    fn names_cannot_break_out_of_the_page() {
        assert_eq!(super::escape("<a href='x'>&\""), "&lt;a href=&#39;x&#39;&gt;&amp;&quot;");
    }
}
