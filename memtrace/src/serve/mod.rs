//! HTTP: metrics, health, incidents, processes. Handlers ask the loop; they hold no state of their own.

use std::path::Path;
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

use crate::engine::incident::Kind;
use crate::engine::snapshot::Snapshot;
use crate::report;
use crate::session::Session;
use crate::store::incidents::Incidents;

mod metrics;

/// Incidents in one answer of /api/incidents, newest first.
const MAX_LISTED: usize = 1000;

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
    /// The metrics text.
    Metrics(oneshot::Sender<String>),
}

/// Answers a question; the asker may have gone.
pub fn answer(ask: Ask, session: &Session, counters: &Counters) {
    match ask {
        Ask::Snapshot(reply) => {
            let _ = reply.send(session.engine().snapshot());
        }
        Ask::Metrics(reply) => {
            let _ = reply.send(metrics::text(session, counters));
        }
    }
}

#[derive(Clone)]
struct Shared {
    asks: mpsc::Sender<Ask>,
    state_dir: Arc<Path>,
}

/// Serves until the runtime ends.
pub async fn run(listener: TcpListener, asks: mpsc::Sender<Ask>, state_dir: Arc<Path>) {
    let router = Router::new()
        .route("/", get(page))
        .route("/healthz", get(async || "ok\n"))
        .route("/readyz", get(ready))
        .route("/metrics", get(metrics_text))
        .route("/api/incidents", get(incidents))
        .route("/api/incidents/{id}", get(incident))
        .route("/api/processes", get(processes))
        .route("/api/cgroups", get(cgroups))
        .with_state(Shared { asks, state_dir });
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
        read: impl FnOnce(Incidents) -> Result<T, String> + Send + 'static,
    ) -> Result<T, Response> {
        let store = Incidents::at(&*self.state_dir);
        let failed = |why: String| (StatusCode::INTERNAL_SERVER_ERROR, format!("{why}\n")).into_response();
        tokio::task::spawn_blocking(move || read(store)).await.map_err(|error| failed(error.to_string()))?.map_err(failed)
    }
}

/// 200 as soon as the loop answers: the programs are attached.
async fn ready(State(shared): State<Shared>) -> Result<&'static str, Response> {
    shared.ask(Ask::Snapshot).await.map(|_| "ready\n")
}

async fn metrics_text(State(shared): State<Shared>) -> Result<Response, Response> {
    let text = shared.ask(Ask::Metrics).await?;
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
    let text = shared.read(list).await?;
    Ok(([(header::CONTENT_TYPE, "application/json")], text).into_response())
}

/// The list as `memtrace incidents --json` prints it.
fn list(store: Incidents) -> Result<String, String> {
    let entries = store.list().map_err(|error| error.to_string())?;
    let found: Vec<_> = entries
        .iter()
        .take(MAX_LISTED)
        .filter_map(|entry| crate::store::incidents::read(&entry.path).ok())
        .collect();
    report::json::list(&found).map_err(|error| error.to_string())
}

async fn incident(State(shared): State<Shared>, UrlPath(id): UrlPath<String>) -> Result<Response, Response> {
    let text = shared
        .read(move |store| {
            let entry = store.find(&id).map_err(|error| error.to_string())?;
            let found = crate::store::incidents::read(&entry.path).map_err(|error| error.to_string())?;
            report::json::incident(&found).map_err(|error| error.to_string())
        })
        .await?;
    Ok(([(header::CONTENT_TYPE, "application/json")], text).into_response())
}

/// A plain page: the newest incidents, each linked to its JSON.
async fn page(State(shared): State<Shared>) -> Result<Html<String>, Response> {
    let rows = shared
        .read(|store| {
            let entries = store.list().map_err(|error| error.to_string())?;
            let row = |entry: &crate::store::incidents::Entry| {
                let found = crate::store::incidents::read(&entry.path).ok()?;
                let who = found.oom.as_ref().and_then(|oom| oom.victims.first()).map_or("", |victim| &victim.comm);
                let at = found.cgroup.path.as_deref().unwrap_or("unknown");
                Some(format!(
                    "<tr><td><a href=\"/api/incidents/{id}\">{id}</a><td>{}<td>{}<td>{}<td>{}",
                    escape(&found.at.wall),
                    escape(who),
                    escape(at),
                    escape(&found.verdict.summary),
                    id = escape(&found.id),
                ))
            };
            Ok(entries.iter().take(100).filter_map(row).collect::<String>())
        })
        .await?;
    Ok(Html(format!(
        "<!doctype html><meta charset=utf-8><title>memtrace</title>\
         <style>body{{font:14px system-ui;margin:2em}}td,th{{padding:.2em 1em .2em 0;text-align:left}}</style>\
         <h1>memtrace</h1><p><a href=/metrics>metrics</a> <a href=/api/processes>processes</a> \
         <a href=/api/cgroups>cgroups</a> <a href=/api/incidents>incidents</a>\
         <table><tr><th>incident<th>when<th>victim<th>cgroup<th>what it means{rows}</table>"
    )))
}

/// Names come from untrusted processes.
fn escape(text: &str) -> String {
    text.chars()
        .fold(String::with_capacity(text.len()), |mut out, c| {
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
