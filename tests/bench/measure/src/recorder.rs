//! One run of `memtrace record`: the recorded command and the resulting file.

use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use memtrace_tests::actor::{Actor, EndedWorkload};
use memtrace_tests::agent::json_of;
use memtrace_tests::{json, process, programs};
use rustix::process::Signal;
use serde_json::Value;

/// A recording in progress; it ends, and its command with it, when dropped.
#[derive(Debug)]
pub(crate) struct Recorder {
    /// The recorded command.
    actor: Option<Actor>,
    file: PathBuf,
}

/// One reading of a cgroup's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct CgroupReading {
    /// Boot clock, ns.
    pub(crate) boot_ns: u64,
    /// Memory, bytes.
    pub(crate) bytes: u64,
}

/// Curves of a recording, oldest reading first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct RecordedCurve {
    /// Usage of the cgroup; unknown readings are left out.
    pub(crate) usage: Vec<CgroupReading>,
    /// Sum of anonymous, file and shared memory of its processes.
    pub(crate) resident: Vec<CgroupReading>,
}

impl Recorder {
    /// Records a command with these options. The file is written in `dir`.
    pub(crate) fn start(dir: &Path, options: &[&str], command: &[&str]) -> anyhow::Result<Self> {
        let file = dir.join("recording.memtrace");
        let mut record = programs::memtrace_command()?;
        record.env_remove("SUDO_UID").env_remove("SUDO_GID").env_remove("SUDO_USER");
        record.args(["record", "--quiet"]).args(options).arg("-o").arg(&file).arg("--");
        Ok(Self { actor: Some(Actor::from_command(record, command)?), file })
    }

    /// The recorded command, to read its output and to continue it.
    pub(crate) fn command(&mut self) -> anyhow::Result<&mut Actor> {
        self.actor.as_mut().context("the recording has ended")
    }

    /// Waits for the end of both. Returns the command's output and the recording.
    pub(crate) fn finish(mut self) -> anyhow::Result<(EndedWorkload, Value)> {
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
            // SIGTERM is passed on to the command and lets the cgroup be removed; SIGKILL would do
            // neither
            let _ = process::signal(actor.pid(), Signal::TERM);
            let _ = actor.finish();
        }
    }
}

impl RecordedCurve {
    /// Reads the timeline of a recording.
    pub(crate) fn of(incident: &Value) -> anyhow::Result<Self> {
        let column = |name: &str| json::list(incident, &format!("/timeline/columns/{name}"));
        let times = column("boot_ns")?;
        let (usage, anon) = (column("usage_bytes")?, column("anon_bytes")?);
        let (file, shmem) = (column("file_bytes")?, column("shmem_bytes")?);
        let mut curve = Self::default();
        for (at, time) in times.iter().enumerate() {
            let boot_ns = time.as_u64().context("a time that is not a number")?;
            let number = |column: &[Value]| column.get(at).and_then(Value::as_u64);
            curve.usage.extend(number(usage).map(|bytes| CgroupReading { boot_ns, bytes }));
            let resident = number(anon).zip(number(file)).zip(number(shmem));
            let ((anon, file), shmem) = resident.context("a reading without resident memory")?;
            curve.resident.push(CgroupReading { boot_ns, bytes: anon + file + shmem });
        }
        Ok(curve)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_curve_has_usage_where_it_is_known_and_resident_memory_always() {
        let columns = serde_json::json!({
            "boot_ns": [1, 2], "usage_bytes": [null, 9], "anon_bytes": [1, 2], "file_bytes": [3, 3],
            "shmem_bytes": [0, 1],
        });
        let curve = RecordedCurve::of(&serde_json::json!({ "timeline": { "columns": columns } })).unwrap();
        assert_eq!(curve.usage, [CgroupReading { boot_ns: 2, bytes: 9 }]);
        assert_eq!(curve.resident, [CgroupReading { boot_ns: 1, bytes: 4 }, CgroupReading { boot_ns: 2, bytes: 6 }]);
    }
}
