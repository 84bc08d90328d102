//! Threads on every CPU of this machine: does the agent add up what each holds. Prints figures, not
//! a chapter, because the chapter combines all machines.

use std::time::Duration;

use anyhow::{Context, ensure};
use memtrace_tests::agent::{Agent, AgentOptions};
use memtrace_tests::idle::{IdleWorkload, recorded};
use memtrace_tests::process::ProcRss;
use serde_json::{Value, json};

/// Comparisons in each idle phase.
const LOOKS: usize = 3;
/// Rounds, each with new processes.
const ROUNDS: usize = 3;
/// How long a workload may take to end: with more threads than CPUs, an emulated machine is slow.
const END_LIMIT: Duration = Duration::from_secs(120);

/// Figures of one machine.
pub(crate) fn run() -> anyhow::Result<Value> {
    let cpus = std::thread::available_parallelism().context("failed to count processors")?.get();
    let threads = cpus.to_string();
    let dir = tempfile::tempdir().context("failed to make a directory for the agent")?;
    let mut agent = AgentOptions::below(dir.path()).start()?;
    let hold = ["hold", "--anon-mib", "40", "--file-mib", "16", "--shmem-mib", "8", "--pinned", "--threads", &threads];
    let (mut walked, mut counted, mut looks) = (0, 0, 0);
    for _ in 0..ROUNDS {
        for arguments in [hold.as_slice(), &["forked", "--mib", "24"]] {
            let quiet = IdleWorkload::start(arguments)?;
            for &(pid, start) in quiet.processes().iter().cycle().take(LOOKS * quiet.processes().len()) {
                let said = recorded(&agent, pid, start)?.total();
                walked = said.abs_diff(ProcRss::walked(pid)?).max(walked);
                counted = said.abs_diff(ProcRss::read(pid)?.total()).max(counted);
                looks += 1;
            }
            quiet.end(END_LIMIT)?;
        }
    }
    let memory = memory(&agent)?;
    ensure!(agent.is_running()?, "the agent did not live to the end; it said:\n{}", agent.stderr());
    agent.stop()?;
    Ok(
        json!({ "cpus": cpus, "looks": looks, "worst_off_walked": walked, "worst_off_status": counted, "agent": memory }),
    )
}

/// Memory of the agent: resident, and its maps as the kernel counts them.
fn memory(agent: &Agent) -> anyhow::Result<Value> {
    let dir = format!("/proc/{}/fdinfo", agent.pid());
    let mut maps = std::collections::BTreeMap::new();
    for entry in std::fs::read_dir(&dir).with_context(|| format!("failed to read {dir}"))? {
        // a descriptor closed meanwhile is no map
        let text = std::fs::read_to_string(entry?.path()).unwrap_or_default();
        maps.extend(map_of(&text));
    }
    Ok(json!({
        "rss_bytes": ProcRss::read(agent.pid())?.total(),
        "maps": maps.len(),
        "map_bytes": maps.values().sum::<u64>(),
    }))
}

/// Id and bytes of a BPF map, if this /proc/PID/fdinfo/FD is of one.
fn map_of(fdinfo: &str) -> Option<(u64, u64)> {
    let number = |key: &str| fdinfo.lines().find_map(|line| line.strip_prefix(key)?.trim().parse::<u64>().ok());
    Some((number("map_id:")?, number("memlock:")?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_are_told_by_their_id() {
        assert_eq!(map_of("pos:\t0\nmap_type:\t27\nmemlock:\t4096\nmap_id:\t7\nfrozen:\t0\n"), Some((7, 4096)));
        assert_eq!(map_of("pos:\t0\nprog_type:\t17\nmemlock:\t4096\nprog_id:\t7\n"), None);
    }
}
