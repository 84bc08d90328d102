//! Function names for saved incidents.
//!
//! An incident is saved at once, with module and offset in place of names. Looking the names up reads debug information
//! of other people's programs and may take long, so it happens afterwards: one incident at a time, in a thread beside
//! the loop and a subprocess that may hang or die. The file is then written again with the names.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use memtrace_unwind::modules::OpenModule;
use tokio::task::JoinHandle;
use tracing::{info, warn};

use super::storer::SavedIncident;
use crate::session::ModuleFile;
use crate::store::incidents;
use crate::symbolize::frame_names::{ModuleName, NamingSummary, UnnamedFrames};
use crate::symbolize::job::NameSources;
use crate::symbolize::subprocess;

/// Most incidents waiting; when it is reached the oldest goes without names.
const MAX_WAITING: usize = 256;
/// Time for what is running or waits when the agent stops.
const STOP_LIMIT: Duration = Duration::from_secs(5);

/// Files whose frames are to be named, and the one being worked on.
#[derive(Debug, Default)]
pub(super) struct SymbolizeQueue {
    /// Cap: [`MAX_WAITING`].
    waiting: VecDeque<SavedIncident>,
    /// The first one's modules were asked for.
    asked: bool,
    running: Option<(PathBuf, JoinHandle<anyhow::Result<NamingSummary>>)>,
    /// Incidents whose frames were named.
    pub(super) named: u64,
    /// Incidents whose frames could not be named.
    pub(super) failed: u64,
}

/// How it ended for one incident.
pub(super) struct SymbolizeResult(anyhow::Result<NamingSummary>);

impl SymbolizeQueue {
    /// Queues an incident that was saved, unless all of its frames have names.
    pub(super) fn push(&mut self, incident: SavedIncident) {
        if incident.modules.is_empty() {
            return;
        }
        if self.waiting.len() >= MAX_WAITING {
            self.waiting.pop_front();
            self.failed = self.failed.saturating_add(1);
        }
        self.waiting.push_back(incident);
    }

    /// Modules whose files are needed for the next incident, if they were not asked for yet.
    pub(super) fn wanted_modules(&mut self) -> Option<Vec<ModuleName>> {
        let next = self.waiting.front().filter(|_| self.running.is_none() && !self.asked)?;
        self.asked = true;
        Some(next.modules.clone())
    }

    /// Whether [`Self::start`] waits for the modules that were asked for.
    pub(super) fn waits_for_modules(&self) -> bool {
        self.asked
    }

    /// Whether incidents are being named, or wait for that.
    pub(super) fn is_busy(&self) -> bool {
        self.running.is_some() || !self.waiting.is_empty()
    }

    /// Starts the next incident with the files of its modules.
    pub(super) fn start(&mut self, modules: Vec<ModuleFile>) {
        self.asked = false;
        // Retention may have deleted it meanwhile.
        let Some(next) = self.waiting.pop_front().filter(|next| next.path.exists()) else { return };
        let file = next.path.clone();
        let running = tokio::task::spawn_blocking(move || symbolize(&file, modules));
        self.running = Some((next.path, running));
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
    pub(super) async fn stop(&mut self, mut modules: impl FnMut(Vec<ModuleName>) -> Vec<ModuleFile>) {
        let until = tokio::time::Instant::now() + STOP_LIMIT;
        self.asked = false;
        loop {
            if let Some(wanted) = self.wanted_modules() {
                self.start(modules(wanted));
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
fn symbolize(path: &Path, modules: Vec<ModuleFile>) -> anyhow::Result<NamingSummary> {
    let mut incident = incidents::read(path)?;
    let unnamed = UnnamedFrames::of(&incident);
    let modules = modules.into_iter().map(OpenModule::from).collect();
    let summary = subprocess::find(&NameSources::with_modules(modules, &[]), &unnamed).apply(&mut incident);
    if summary.named > 0 {
        incidents::write_again(path, &incident).with_context(|| format!("failed to write {}", path.display()))?;
    }
    Ok(summary)
}
