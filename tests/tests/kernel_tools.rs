//! Tests of the tests' own tools: workloads reach what they promise, cages kill, the kernel log is
//! read.

#![allow(clippy::indexing_slicing, reason = "a panic is how a test fails")]

use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, ensure};
use memtrace_tests::cage::Cage;
use memtrace_tests::figures::say;
use memtrace_tests::printk::{self, KernelLogTail};
use memtrace_tests::process::{self, ProcRss};
use memtrace_tests::programs::{self, require_root};

#[test]
fn a_caged_burst_is_oom_killed_and_reported_as_137() -> anyhow::Result<()> {
    require_root()?;
    let workload = programs::path("workload")?;
    let mut command = Command::new(programs::path("oomcage")?);
    command.args(["--limit", "64M", "--"]).arg(&workload).args(["burst", "--mib", "128"]);
    let status = command.stdout(Stdio::null()).status()?;
    assert_eq!(status.code(), Some(137));
    let mut command = Command::new(programs::path("oomcage")?);
    command.args(["--limit", "64M", "--"]).arg(&workload).args(["exit-after", "--ms", "1", "--code", "7"]);
    let status = command.stdout(Stdio::null()).status()?;
    assert_eq!(status.code(), Some(7));
    Ok(())
}

#[test]
fn the_kernel_log_names_the_kill_and_its_clock_has_a_steady_offset() -> anyhow::Result<()> {
    require_root()?;
    let mut log = KernelLogTail::open_at_end()?;
    let mut anchors = vec![log.anchor(20)?];
    let from = log.next_seq()?;
    let cage = Cage::new("tools", 32 << 20)?;
    let before = process::boot_ns();
    let mut child = cage
        .command(programs::path("workload")?)?
        .args(["burst", "--mib", "64"])
        .stdout(Stdio::null())
        .spawn()
        .context("failed to start the workload")?;
    let pid = child.id();
    process::wait_at_most(&mut child, Duration::from_secs(10))?;
    let after = process::boot_ns();
    log.drain()?;
    anchors.push(log.anchor(20)?);
    ensure!(cage.oom_kills()? == 1, "the kernel counted {} OOM kills", cage.oom_kills()?);
    assert_eq!(log.killed_pids(from), [pid]);
    let kill = log.kill_of(pid, from).context("no line about the kill")?;
    let anchor = printk::nearest(&anchors, after)?;
    let at = anchor.boot_ns(kill.killed_line_ns)?;
    assert!((before..=after).contains(&at), "{at} is not in {before}..{after}");
    let (drift, unsure) = printk::drift(&anchors)?;
    say(format_args!("offset {} ns, uncertainty {} ns, drift {drift} ns", anchor.offset_ns, anchor.uncertainty_ns));
    assert!(unsure < 500_000, "the offset is only known within {unsure} ns");
    cage.remove()
}

#[test]
fn hold_reaches_the_state_it_was_asked_for() -> anyhow::Result<()> {
    for threads in ["1", "8"] {
        let mut child = Command::new(programs::path("workload")?)
            .args(["hold", "--anon-mib", "24", "--file-mib", "16", "--shmem-mib", "8", "--threads", threads])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("failed to start the workload")?;
        let stdout = child.stdout.take().context("no stdout")?;
        let ready = BufReader::new(stdout).lines().map_while(Result::ok).any(|line| line.contains("\"ready\""));
        ensure!(ready, "hold was never ready");
        let rss = ProcRss::read(child.id())?;
        // Up to 6.1 a thread keeps up to 64 pages of each kind to itself, gained or given back, before /proc sees them
        // (mm/memory.c, check_sync_rss_stat).
        let kept = threads.parse::<u64>()? * 64 * 4096;
        // The program, its allocator and the stacks of its threads come to less than 4 MiB.
        let seen = |have: u64, want: u64| (want - kept..want + (4 << 20) + kept).contains(&have);
        assert!(seen(rss.anon, 24 << 20) && seen(rss.file, 16 << 20), "{rss:?}");
        assert!((8 << 20) - kept <= rss.shmem && rss.shmem <= 8 << 20, "{rss:?}");
        child.stdin.take().context("no stdin")?.write_all(b"\n")?;
        let status = process::wait_at_most(&mut child, Duration::from_secs(10))?;
        assert_eq!(status.code(), Some(0));
    }
    Ok(())
}
