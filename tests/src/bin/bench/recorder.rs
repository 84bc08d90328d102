//! One run of `memtrace record`: the command it records, and the file that comes of it.

use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use memtrace_tests::actor::{Actor, Ended};
use memtrace_tests::agent::json_of;
use memtrace_tests::{json, process, programs};
use rustix::process::Signal;
use serde_json::Value;

/// A recording in progress; ended when dropped, and its command with it.
#[derive(Debug)]
pub(crate) struct Recorder {
    /// What the command says.
    actor: Option<Actor>,
    file: PathBuf,
}

/// One reading of a cgroup's usage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Reading {
    /// Boot clock.
    pub(crate) boot_ns: u64,
    /// Usage.
    pub(crate) bytes: u64,
}

impl Recorder {
    /// Records a command with these options; the file is written in `dir`.
    pub(crate) fn start(dir: &Path, options: &[&str], command: &[&str]) -> anyhow::Result<Self> {
        let file = dir.join("recording.memtrace");
        let mut record = programs::memtrace_command()?;
        record.env_remove("SUDO_UID").env_remove("SUDO_GID").env_remove("SUDO_USER");
        record.args(["record", "--quiet"]).args(options).arg("-o").arg(&file).arg("--");
        Ok(Self { actor: Some(Actor::from_command(record, command)?), file })
    }

    /// The command, to listen to and to tell to go on.
    pub(crate) fn command(&mut self) -> anyhow::Result<&mut Actor> {
        self.actor.as_mut().context("the recording has ended")
    }

    /// Waits for the end of both; what the command said, and the recording.
    pub(crate) fn finish(mut self) -> anyhow::Result<(Ended, Value)> {
        let ended = self.actor.take().context("the recording has ended")?.finish()?;
        ensure!(self.file.is_file(), "no recording: memtrace record ended with {}", ended.status);
        let mut report = programs::memtrace_command()?;
        report.arg("report").arg(&self.file).args(["--format", "json"]);
        let recording = json_of(report)?;
        std::fs::remove_file(&self.file).with_context(|| format!("failed to remove {}", self.file.display()))?;
        Ok((ended, recording))
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        if let Some(actor) = self.actor.take() {
            // It hands SIGTERM on and removes the cgroup it made; killed, it could not.
            let _ = process::signal(actor.pid(), Signal::TERM);
            let _ = actor.finish();
        }
    }
}

/// The readings of a file's curve whose usage is known, oldest first.
pub(crate) fn usage_curve(incident: &Value) -> anyhow::Result<Vec<Reading>> {
    let times = json::list(incident, "/timeline/columns/boot_ns")?;
    let usage = json::list(incident, "/timeline/columns/usage_bytes")?;
    ensure!(times.len() == usage.len(), "{} times and {} readings of usage", times.len(), usage.len());
    let reading = |(time, usage): (&Value, &Value)| Some(Reading { boot_ns: time.as_u64()?, bytes: usage.as_u64()? });
    Ok(times.iter().zip(usage).filter_map(reading).collect())
}
