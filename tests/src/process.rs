//! What /proc says about a process, and signals without a C library.

use std::process::ExitStatus;
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use rustix::process::{Pid, Resource, Rlimit, Signal, WaitId, WaitIdOptions, getrlimit, setrlimit, waitid};

use crate::deadline::Deadline;

/// Boot clock now, nanoseconds.
pub fn boot_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let (seconds, nanos) = (u64::try_from(now.tv_sec).unwrap_or(0), u64::try_from(now.tv_nsec).unwrap_or(0));
    seconds * 1_000_000_000 + nanos
}

/// Start of a process in clock ticks since boot: field 22 of /proc/PID/stat. `pid` may be `self`.
pub fn start_ticks(pid: impl std::fmt::Display) -> anyhow::Result<u64> {
    stat_field(&format!("/proc/{pid}/stat"), 22)
}

/// Niceness of a thread: field 19 of /proc/PID/task/TID/stat.
pub fn niceness(pid: u32, thread: u32) -> anyhow::Result<i32> {
    stat_field(&format!("/proc/{pid}/task/{thread}/stat"), 19)
}

/// A field of a stat file, counted from 1 as proc(5) does; the third is the first after the name.
fn stat_field<T>(path: &str, number: usize) -> anyhow::Result<T>
where
    T: FromStr<Err: std::error::Error + Send + Sync + 'static>,
{
    let bytes = std::fs::read(path).with_context(|| format!("failed to read {path}"))?;
    // the name in parentheses may contain anything; nothing after the last `)` does
    let text = String::from_utf8_lossy(&bytes);
    let after = text.rsplit_once(')').map(|(_, rest)| rest).with_context(|| format!("{path} has no name"))?;
    let field = after.split_ascii_whitespace().nth(number.saturating_sub(3));
    let field = field.with_context(|| format!("{path} has no field {number}"))?;
    field.parse().with_context(|| format!("{path}: field {number} is not a number"))
}

/// Children that the main thread of a process has started.
pub fn children(pid: u32) -> anyhow::Result<Vec<u32>> {
    let path = format!("/proc/{pid}/task/{pid}/children");
    let text = std::fs::read_to_string(&path).with_context(|| format!("failed to read {path}"))?;
    Ok(text.split_ascii_whitespace().filter_map(|pid| pid.parse().ok()).collect())
}

/// Raises this process' own limit of open files to `wanted`, if it may.
pub fn allow_files(wanted: u64) -> anyhow::Result<()> {
    let limit = getrlimit(Resource::Nofile);
    ensure!(limit.maximum.is_none_or(|most| most >= wanted), "only {:?} files may be open", limit.maximum);
    let current = limit.current.map(|current| current.max(wanted));
    setrlimit(Resource::Nofile, Rlimit { current, ..limit }).context("failed to raise the limit of open files")
}

/// Converts boot-clock nanoseconds to the clock ticks that /proc shows.
pub fn ticks_of_ns(boot_ns: u64) -> u64 {
    boot_ns / (1_000_000_000 / rustix::param::clock_ticks_per_second())
}

/// Resident memory of a process by kind, bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ProcRss {
    /// RssAnon.
    pub anon: u64,
    /// RssFile.
    pub file: u64,
    /// RssShmem.
    pub shmem: u64,
}

impl ProcRss {
    /// Reads /proc/PID/status.
    pub fn read(pid: u32) -> anyhow::Result<Self> {
        let path = format!("/proc/{pid}/status");
        let text = std::fs::read_to_string(&path).with_context(|| format!("failed to read {path}"))?;
        let kib = |name: &str| -> anyhow::Result<u64> {
            let line = text.lines().find_map(|line| line.strip_prefix(name));
            let number = line.and_then(|rest| rest.split_ascii_whitespace().next());
            let number = number.with_context(|| format!("{path} has no {name}"))?;
            Ok(number.parse::<u64>().with_context(|| format!("{path}: {name} is not a number"))? * 1024)
        };
        Ok(Self { anon: kib("RssAnon:")?, file: kib("RssFile:")?, shmem: kib("RssShmem:")? })
    }

    /// Resident memory from a walk of the page tables (smaps_rollup), bytes. Between 6.2 and 6.16,
    /// /proc/PID/status leaves out what each CPU has not yet added to the sum.
    pub fn walked(pid: u32) -> anyhow::Result<u64> {
        let path = format!("/proc/{pid}/smaps_rollup");
        let text = std::fs::read_to_string(&path).with_context(|| format!("failed to read {path}"))?;
        let line =
            text.lines().find_map(|line| line.strip_prefix("Rss:")).with_context(|| format!("{path} has no Rss"))?;
        let kib = line.split_ascii_whitespace().next().and_then(|number| number.parse::<u64>().ok());
        Ok(kib.with_context(|| format!("{path}: Rss is not a number"))? * 1024)
    }

    /// The sum of the three.
    pub fn total(&self) -> u64 {
        self.anon + self.file + self.shmem
    }
}

/// Sends a signal.
pub fn signal(pid: u32, signal: Signal) -> anyhow::Result<()> {
    rustix::process::kill_process(target(pid)?, signal).with_context(|| format!("failed to signal process {pid}"))
}

fn target(pid: u32) -> anyhow::Result<Pid> {
    i32::try_from(pid).ok().and_then(Pid::from_raw).context("not a process id")
}

/// Sends SIGSTOP to a child. On return every thread has stopped and any write in progress has
/// finished.
pub fn stop(pid: u32) -> anyhow::Result<()> {
    signal(pid, Signal::STOP)?;
    let state = waitid(WaitId::Pid(target(pid)?), WaitIdOptions::STOPPED);
    let state = state.with_context(|| format!("failed to wait for process {pid} to stop"))?;
    ensure!(state.is_some_and(|state| state.stopped()), "process {pid} ended where it should have stopped");
    Ok(())
}

/// Waits for a child's end; fails after `limit`.
pub fn wait_at_most(child: &mut std::process::Child, limit: Duration) -> anyhow::Result<ExitStatus> {
    let deadline = Deadline::after(limit);
    loop {
        if let Some(status) = child.try_wait().context("failed to wait for a child")? {
            return Ok(status);
        }
        if deadline.has_passed() {
            bail!("process {} did not end within {:?}", child.id(), deadline.limit());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Exit code as a shell reports it: the code, or 128 plus the signal.
pub fn shell_code(status: ExitStatus) -> i32 {
    use std::os::unix::process::ExitStatusExt;
    status.code().or_else(|| status.signal().map(|signal| 128 + signal)).unwrap_or(1)
}
