//! Shortage of the whole machine: its memory, a node's, or the swap runs out. Only in a virtual
//! machine.

#![allow(clippy::indexing_slicing, reason = "a panic is how a test fails")]

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, ensure};
use memtrace_tests::actor::Actor;
use memtrace_tests::cage::{Cage, Version};
use memtrace_tests::claims::{self, MIB};
use memtrace_tests::deadline::Deadline;
use memtrace_tests::disk::DISK;
use memtrace_tests::figures::{not_run_here, say};
use memtrace_tests::json;
use memtrace_tests::trial::Trial;
use serde_json::Value;

/// How long the agent may take to lock its memory.
const LOCK_LIMIT: Duration = Duration::from_secs(10);

/// Fails on a machine that may be in use: these tests take all memory there is.
fn require_a_virtual_machine() -> anyhow::Result<()> {
    let told = std::env::var_os("MEMTRACE_TESTS_VM").is_some();
    ensure!(told, "this test takes all memory of the machine: run it with cargo xtask vm");
    Ok(())
}

/// A number of /proc/meminfo or of a node's, in MiB.
fn meminfo_mib(file: &str, key: &str) -> anyhow::Result<u64> {
    Ok(meminfo_kib(file, key)? >> 10)
}

/// The same of any file of lines that end in such a number, in KiB.
fn meminfo_kib(file: &str, key: &str) -> anyhow::Result<u64> {
    let text = fs::read_to_string(file).with_context(|| format!("failed to read {file}"))?;
    let line = text.lines().find(|line| line.contains(key)).with_context(|| format!("{file} has no {key}"))?;
    let kib = line.split_ascii_whitespace().rev().nth(1).context("no number")?;
    kib.parse().with_context(|| format!("{file}: {key}"))
}

#[test]
fn a_machine_without_memory_kills_the_largest_and_the_recorder_survives() -> anyhow::Result<()> {
    require_a_virtual_machine()?;
    let mut trial = Trial::begin(&[])?;
    // it is unlocked for a moment when what the start took is given back
    let deadline = Deadline::after(LOCK_LIMIT);
    while meminfo_kib(&format!("/proc/{}/status", trial.agent.pid()), "VmLck:")? == 0 {
        ensure!(!deadline.has_passed(), "the agent's memory is not locked; it said:\n{}", trial.agent.stderr());
        std::thread::sleep(Duration::from_millis(50));
    }
    let adj = fs::read_to_string(format!("/proc/{}/oom_score_adj", trial.agent.pid()))?;
    ensure!(adj.trim() == "-999", "the agent's oom_score_adj is {adj}");

    let available = meminfo_mib("/proc/meminfo", "MemAvailable")?;
    let (large, small) = (Cage::unlimited("large")?, Cage::unlimited("small")?);
    let mib = (available * 70 / 100).to_string();
    let mut holder = Actor::start(Some(&large), &["member", "--comm", "largest", "--mib", &mib, "--wait"])?;
    holder.until("ready")?;
    let mib = (available * 68 / 100).to_string();
    let trigger = Actor::start(Some(&small), &["burst", "--mib", &mib, "--threads", "1", "--touch"])?.finish()?;
    // while the victim is slow to die, the kernel may also kill the trigger; that is another
    // incident
    let victim = holder.finish()?;
    victim.was_killed()?;
    ensure!(trial.agent.is_running()?, "the agent is gone; it said:\n{}", trial.agent.stderr());

    let incident = trial.incident(&large)?;
    claims::says(&incident, "/kind", "oom_kill")?;
    claims::says(&incident, "/oom/scope", "global")?;
    ensure!(incident["oom"]["oom_cgroup"].is_null(), "no cgroup ran out but {}", incident["oom"]["oom_cgroup"]);
    claims::only_victim(&incident, victim.pid, "largest")?;
    let asked = json::number(&incident, "/oom/trigger/pid")?;
    ensure!(asked != u64::from(victim.pid), "the victim is said to be the trigger");
    // whoever asks for a page at that moment is the trigger: usually the program that grows
    say(format_args!("the machine ran out: triggered by {}", incident["oom"]["trigger"]["comm"]));
    let tasks = json::list(&incident, "/oom/tasks")?;
    ensure!(
        tasks.iter().any(|task| task["pid"] == trigger.pid),
        "the table of tasks is that of the machine: {tasks:?}"
    );
    large.remove()?;
    small.remove()?;
    trial.end()
}

/// The cpuset directory of a cage: its own on v2, one of the cpuset hierarchy on v1.
fn cpuset_of(cage: &Cage) -> Option<PathBuf> {
    match cage.version() {
        Version::V2 => Some(cage.dir().to_owned()).filter(|dir| dir.join("cpuset.mems").exists()),
        Version::V1 => {
            Some(Path::new("/sys/fs/cgroup/cpuset").to_owned()).filter(|dir| dir.join("cpuset.mems").exists())
        }
    }
}

#[test]
fn a_node_without_memory_is_a_shortage_of_the_cpuset() -> anyhow::Result<()> {
    require_a_virtual_machine()?;
    let cage = Cage::unlimited("cpuset")?;
    let node = Path::new("/sys/devices/system/node/node1");
    let Some(mut cpuset) = cpuset_of(&cage).filter(|_| node.exists()) else {
        not_run_here("cpuset", "this kernel has no cpuset controller in this hierarchy, or one memory node only");
        return cage.remove();
    };
    let trial = Trial::begin(&[])?;
    if cage.version() == Version::V1 {
        cpuset = cpuset.join("memtrace-tests");
        fs::create_dir(&cpuset).context("failed to make a cpuset")?;
        let cpus = fs::read_to_string("/sys/fs/cgroup/cpuset/cpuset.cpus").context("failed to read the CPUs")?;
        fs::write(cpuset.join("cpuset.cpus"), cpus.trim()).context("failed to set the CPUs")?;
    }
    fs::write(cpuset.join("cpuset.mems"), "1").context("failed to set the memory node")?;
    let free = meminfo_mib("/sys/devices/system/node/node1/meminfo", "MemTotal")?;
    let mib = (free + 64).to_string();
    let mut idle = Actor::start(Some(&cage), &["member", "--comm", "idle", "--mib", "1", "--wait"])?;
    idle.until("ready")?;
    let victim = if cage.version() == Version::V1 {
        // enter the cpuset first: the memory cgroup that it is started in belongs to another
        // hierarchy
        let workload = memtrace_tests::programs::path("workload")?;
        let oomcage = memtrace_tests::programs::path("oomcage")?;
        let mut command = cage.command(oomcage)?;
        command.arg("--enter").arg(&cpuset).arg("--").arg(workload);
        Actor::from_command(command, &["burst", "--mib", &mib, "--threads", "1", "--touch"])?.finish()?
    } else {
        Actor::start(Some(&cage), &["burst", "--mib", &mib, "--threads", "1", "--touch"])?.finish()?
    };
    victim.was_killed()?;
    let incident = trial.incident(&cage)?;
    claims::says(&incident, "/kind", "oom_kill")?;
    claims::says(&incident, "/oom/scope", "cpuset")?;
    claims::only_victim(&incident, victim.pid, "workload")?;
    ensure!(idle.finish()?.status.success(), "its neighbour lives on");
    if cage.version() == Version::V1 {
        fs::remove_dir(&cpuset).context("failed to remove the cpuset")?;
    }
    cage.remove()?;
    trial.end()
}

#[test]
fn swap_and_its_limit_are_in_the_curve() -> anyhow::Result<()> {
    require_a_virtual_machine()?;
    let swap = Swap::on()?;
    let trial = Trial::begin(&[])?;
    let cage = Cage::with_swap("swap", 32 * MIB, 16 * MIB)?;
    let ended = Actor::start(Some(&cage), &["burst", "--mib", "128", "--threads", "1", "--touch"])?.finish()?;
    ended.was_killed()?;
    let incident = trial.incident(&cage)?;
    claims::says(&incident, "/oom/scope", "cgroup")?;
    claims::counts(&incident, "/cgroup/limit_bytes", 32 * MIB)?;
    // v1's counter is of memory and swap together
    let together = if cage.version() == Version::V1 { 32 * MIB } else { 0 };
    claims::counts(&incident, "/cgroup/swap_limit_bytes", together + 16 * MIB)?;
    let limits = json::list(&incident, "/timeline/columns/swap_limit_bytes")?;
    let limit = limits.iter().filter_map(Value::as_u64).next_back();
    ensure!(limit == Some(together + 16 * MIB), "the curve has a swap limit of {limit:?}");
    let used = claims::highest(&incident, "swap_usage_bytes")?;
    let held = claims::highest(&incident, "swap_bytes")?;
    say(format_args!(
        "swap: {} MiB of {} MiB used, {} MiB by processes",
        used >> 20,
        (together >> 20) + 16,
        held >> 20
    ));
    ensure!(used + 2 * MIB >= together + 16 * MIB, "the curve shows {used} of swap used");
    ensure!(held >= 12 * MIB, "the curve shows {held} of its processes swapped out");
    cage.remove()?;
    drop(swap);
    trial.end()
}

/// The swap disk, in use until dropped.
struct Swap;

impl Swap {
    fn on() -> anyhow::Result<Self> {
        let ended = Actor::start(None, &["swap", "--device", DISK])?.finish()?;
        ensure!(ended.status.success(), "{DISK} cannot be swapped to");
        Ok(Self)
    }
}

impl Drop for Swap {
    fn drop(&mut self) {
        // an error does not matter: the machine ends with the tests
        let _ = Actor::start(None, &["swap", "--device", DISK, "--off"]).and_then(Actor::finish);
    }
}
