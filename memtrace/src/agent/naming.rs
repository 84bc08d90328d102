//! Names for incidents that are on disk: one at a time, beside the loop, in processes that may take their time, or die.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use tokio::task::JoinHandle;
use tracing::{info, warn};

use crate::process::apart;
use crate::process::modules::OpenModule;
use crate::process::symbolize::{Questions, Summary, Symbolizer};
use crate::store::incidents;
use memtrace_incident::{AllocationPath, Incident};

/// Incidents waiting; the oldest goes without names for one more.
const MAX_WAITING: usize = 256;
/// What is under way or waits when the agent stops may still take this long.
const LAST: Duration = Duration::from_secs(5);

/// Files that wait for names, and the one that gets them.
#[derive(Debug, Default)]
pub(super) struct Naming {
    /// Cap: [`MAX_WAITING`].
    waiting: VecDeque<PathBuf>,
    running: Option<(PathBuf, JoinHandle<anyhow::Result<Summary>>)>,
    /// Incidents that got names.
    pub(super) named: u64,
    /// Incidents that got none since something failed.
    pub(super) failed: u64,
}

/// How naming one incident ended.
pub(super) struct Ended(anyhow::Result<Summary>);

impl Naming {
    /// An incident is on disk.
    pub(super) fn saved(&mut self, incident: &Incident, path: &Path) {
        let nameless =
            |path: &AllocationPath| path.frames.iter().any(|frame| frame.symbol.is_none() && frame.offset.is_some());
        if !incident.allocation_paths.iter().any(nameless) {
            return;
        }
        if self.waiting.len() >= MAX_WAITING {
            self.waiting.pop_front();
            self.failed = self.failed.saturating_add(1);
        }
        self.waiting.push_back(path.to_owned());
    }

    /// Whether the next one is to be started.
    pub(super) fn wants_modules(&self) -> bool {
        self.running.is_none() && !self.waiting.is_empty()
    }

    /// Starts the next one with the modules that are held open.
    pub(super) fn start(&mut self, modules: Vec<OpenModule>) {
        let Some(path) = self.waiting.pop_front() else { return };
        let file = path.clone();
        let running = tokio::task::spawn_blocking(move || name(&file, modules));
        self.running = Some((path, running));
    }

    /// Waits until the one that is under way has ended, for ever when there is none.
    pub(super) async fn ended(&mut self) -> Ended {
        let Some((_, running)) = &mut self.running else { return std::future::pending().await };
        Ended(running.await.context("the thread ended early").flatten())
    }

    /// Takes note of how it ended.
    pub(super) fn note(&mut self, ended: Ended) {
        let Some((path, _)) = self.running.take() else { return };
        match ended.0 {
            Ok(summary) => {
                self.named = self.named.saturating_add(1);
                info!(file = %path.display(), frames = summary.asked, named = summary.named, "named functions");
            }
            Err(error) => {
                self.failed = self.failed.saturating_add(1);
                warn!(file = %path.display(), "no names for an incident: {error:#}; reports show offsets");
            }
        }
    }

    /// The agent stops: what is under way or waits gets names, as far as it does so soon.
    pub(super) async fn stop(&mut self, modules: Vec<OpenModule>) {
        let until = tokio::time::Instant::now() + LAST;
        loop {
            if self.running.is_none() {
                self.start(modules.clone());
            }
            if self.running.is_none() {
                return;
            }
            let Ok(ended) = tokio::time::timeout_at(until, self.ended()).await else { return };
            self.note(ended);
        }
    }
}

/// Reads, names, writes again. The file is as it was until it is written whole.
fn name(path: &Path, modules: Vec<OpenModule>) -> anyhow::Result<Summary> {
    let mut incident = incidents::read(path)?;
    let questions = Questions::of(&incident);
    let summary = apart::answer(&Symbolizer::with_modules(modules, &[]), &questions).apply(&mut incident);
    if summary.named > 0 {
        incidents::write(path, &incident).with_context(|| format!("failed to write {}", path.display()))?;
    }
    Ok(summary)
}
