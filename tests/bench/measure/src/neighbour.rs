//! A noisy neighbour: builds in a loop, in a cgroup of its own, until dropped.

use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

use anyhow::{Context, ensure};
use memtrace_tests::cage::Cage;
use tempfile::TempDir;

/// Functions in the source that is compiled, about a second's work.
const FUNCTIONS: u32 = 1500;

/// A build that is repeated until this is dropped.
#[derive(Debug)]
pub(crate) struct Neighbour {
    end: Arc<AtomicBool>,
    builds: Arc<AtomicU64>,
    thread: Option<JoinHandle<anyhow::Result<()>>>,
}

impl Neighbour {
    /// Starts to build.
    pub(crate) fn start() -> anyhow::Result<Self> {
        let dir = tempfile::tempdir().context("failed to make a directory to build in")?;
        let text: String = (0..FUNCTIONS)
            .map(|i| format!("int f{i}(int a, int b) {{ int s = {i}; while (a--) s += b * a ^ s; return s; }}\n"))
            .collect();
        std::fs::write(dir.path().join("many.c"), text).context("failed to write a source to build")?;
        let cage = Cage::unlimited("neighbour")?;
        let (end, builds) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (seen, count) = (Arc::clone(&end), Arc::clone(&builds));
        let thread = std::thread::spawn(move || build(&dir, cage, &seen, &count));
        Ok(Self { end, builds, thread: Some(thread) })
    }

    /// Stops it. Returns the number of finished builds.
    pub(crate) fn finish(mut self) -> anyhow::Result<u64> {
        self.end.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.join().map_err(|_| anyhow::anyhow!("the thread of the neighbour panicked"))??;
        }
        Ok(self.builds.load(Ordering::Relaxed))
    }
}

impl Drop for Neighbour {
    fn drop(&mut self) {
        self.end.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // an error of the neighbour must not stop the benchmark
            let _ = thread.join();
        }
    }
}

fn build(dir: &TempDir, cage: Cage, end: &AtomicBool, builds: &AtomicU64) -> anyhow::Result<()> {
    while !end.load(Ordering::Relaxed) {
        let mut gcc = cage.command("gcc")?;
        gcc.args(["-O2", "-c", "-o", "many.o", "many.c"]).current_dir(dir.path()).stdin(Stdio::null());
        let output = gcc.output().context("failed to run gcc")?;
        ensure!(output.status.success(), "gcc ended with {}", output.status);
        builds.fetch_add(1, Ordering::Relaxed);
    }
    cage.remove()
}
