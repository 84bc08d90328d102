//! While a process is idle, the agent's figures for it equal /proc/PID/status: one thread, eight
//! threads, a fork.

use std::time::Duration;

use anyhow::{Context, ensure};
use memtrace_tests::agent::{Agent, AgentOptions};
use memtrace_tests::figures::say;
use memtrace_tests::idle::{IdleWorkload, recorded};
use memtrace_tests::process::ProcRss;
use memtrace_tests::programs::require_root;

const QUANTUM: u64 = 256 << 10;

/// Compares every process of the workload three times.
fn compare(agent: &Agent, name: &str, quiet: &IdleWorkload) -> anyhow::Result<()> {
    for _ in 0..3 {
        for &(pid, start) in quiet.processes() {
            let said = recorded(agent, pid, start)?;
            let truth = ProcRss::read(pid)?;
            let off = said.total().abs_diff(truth.total());
            say(format_args!("{name:<10} pid {pid}: off by {off} B; recorded {said:?}, /proc {truth:?}"));
            ensure!(off <= QUANTUM, "{name}: off by {off} B; recorded {said:?}, /proc {truth:?}");
        }
        std::thread::sleep(Duration::from_millis(200));
    }
    Ok(())
}

#[test]
fn recorded_rss_equals_proc_at_quiet_moments() -> anyhow::Result<()> {
    require_root()?;
    let dir = tempfile::tempdir()?;
    let mut agent = AgentOptions::below(dir.path()).start()?;
    let hold = |threads: &'static str| {
        ["hold", "--anon-mib", "40", "--file-mib", "16", "--shmem-mib", "8", "--threads", threads]
    };
    for (name, arguments) in [
        ("1 thread", hold("1").as_slice()),
        ("8 threads", hold("8").as_slice()),
        ("forked", ["forked", "--mib", "24"].as_slice()),
    ] {
        let quiet = IdleWorkload::start(arguments)?;
        ensure!(quiet.processes().len() == if name == "forked" { 2 } else { 1 }, "{name}: {:?}", quiet.processes());
        compare(&agent, name, &quiet).with_context(|| format!("the agent said:\n{}", agent.stderr()))?;
        quiet.end(Duration::from_secs(10))?;
    }
    agent.stop()?;
    Ok(())
}
