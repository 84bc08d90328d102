//! Function names for saved incidents.
//!
//! An incident is saved at once, with module and offset in place of names. Looking the names up reads debug information
//! of other people's programs and may take long, so it happens afterwards: one incident at a time, in a thread beside
//! the loop and a subprocess that may hang or die. The file is then written again with the names.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use memtrace_incident::{AllocationPath, Incident};
use memtrace_unwind::modules::OpenModule;
use tokio::task::JoinHandle;
use tracing::{info, warn};

use crate::store::incidents;
use crate::symbolize::frame_names::{NamingSummary, UnnamedFrames};
use crate::symbolize::subprocess;
use crate::symbolize::symbolizer::Symbolizer;

/// Most incidents waiting; when it is reached the oldest goes without names.
const MAX_WAITING: usize = 256;
/// Time for what is running or waits when the agent stops.
const STOP_LIMIT: Duration = Duration::from_secs(5);

/// Files whose frames are to be named, and the one being worked on.
#[derive(Debug, Default)]
pub(super) struct SymbolizeQueue {
    /// Cap: [`MAX_WAITING`].
    waiting: VecDeque<PathBuf>,
    running: Option<(PathBuf, JoinHandle<anyhow::Result<NamingSummary>>)>,
    /// Incidents whose frames were named.
    pub(super) named: u64,
    /// Incidents whose frames could not be named.
    pub(super) failed: u64,
}

/// How it ended for one incident.
pub(super) struct SymbolizeResult(anyhow::Result<NamingSummary>);

impl SymbolizeQueue {
    /// Queues an incident that was saved to `path`, unless all of its frames have names.
    pub(super) fn push(&mut self, incident: &Incident, path: &Path) {
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

    /// Whether [`Self::start`] has something to do.
    pub(super) fn wants_modules(&self) -> bool {
        self.running.is_none() && !self.waiting.is_empty()
    }

    /// Starts the next incident with the modules that the session holds open.
    pub(super) fn start(&mut self, modules: Vec<OpenModule>) {
        // Retention may have deleted some meanwhile.
        let next = std::iter::from_fn(|| self.waiting.pop_front()).find(|path| path.exists());
        let Some(path) = next else { return };
        let file = path.clone();
        let running = tokio::task::spawn_blocking(move || symbolize(&file, modules));
        self.running = Some((path, running));
    }

    /// Waits until the running one has ended; for ever when none is running.
    pub(super) async fn ended(&mut self) -> SymbolizeResult {
        let Some((_, running)) = &mut self.running else { return std::future::pending().await };
        SymbolizeResult(running.await.context("the thread ended early").flatten())
    }

    /// Counts and logs how the running one ended. Returns its file.
    pub(super) fn finish(&mut self, ended: SymbolizeResult) -> Option<PathBuf> {
        let (path, _) = self.running.take()?;
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
        Some(path)
    }

    /// Names what is running and what waits, as far as [`STOP_LIMIT`] allows: the agent stops.
    pub(super) async fn stop(&mut self, modules: Vec<OpenModule>) {
        let until = tokio::time::Instant::now() + STOP_LIMIT;
        loop {
            if self.running.is_none() {
                self.start(modules.clone());
            }
            if self.running.is_none() {
                return;
            }
            let Ok(ended) = tokio::time::timeout_at(until, self.ended()).await else { return };
            self.finish(ended);
        }
    }
}

/// Reads an incident, names its frames and writes it again, whole or not at all.
fn symbolize(path: &Path, modules: Vec<OpenModule>) -> anyhow::Result<NamingSummary> {
    let mut incident = incidents::read(path)?;
    let unnamed = UnnamedFrames::of(&incident);
    let summary = subprocess::find(&Symbolizer::with_modules(modules, &[]), &unnamed).apply(&mut incident);
    if summary.named > 0 {
        incidents::write(path, &incident).with_context(|| format!("failed to write {}", path.display()))?;
    }
    Ok(summary)
}
