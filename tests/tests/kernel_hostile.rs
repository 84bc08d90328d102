//! Programs that want to keep the agent busy, one at a time: they cost nobody else a kill or its
//! stacks. `cargo xtask soak` has all of them at once.

#![allow(clippy::indexing_slicing, reason = "a panic is how a test fails")]

use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, ensure};
use memtrace_tests::actor::Actor;
use memtrace_tests::cage::Cage;
use memtrace_tests::claims::{self, MIB};
use memtrace_tests::deadline::SLOWNESS;
use memtrace_tests::figures::not_run_here;
use memtrace_tests::trial::Trial;
use memtrace_tests::{json, programs};

/// Enough for every stack, whatever else the machine does.
const AMPLE: [&str; 2] = ["--stack-budget", "50%"];
/// Somebody without rights.
const SOMEBODY: u32 = 12_345;
/// Programs that run when an agent starts.
const CROWD: u32 = 5_000;

/// A program that wants to hurt.
struct Hostile {
    name: &'static str,
    /// Of `workload`; for `DIR` it has a directory of its own.
    arguments: &'static [&'static str],
    user: u32,
}

const HOSTILE: [Hostile; 7] = [
    Hostile {
        name: "8,000 links to one ELF file with the longest headers",
        arguments: &["linked-modules", "--dir", "DIR", "--count", "8000", "--ms", "0"],
        user: SOMEBODY,
    },
    Hostile {
        name: "code that nobody else can open",
        arguments: &["leased", "--dir", "DIR", "--ms", "0"],
        user: SOMEBODY,
    },
    Hostile {
        name: "an address space that is always locked",
        arguments: &["locked", "--mappings", "30000", "--ms", "0"],
        user: SOMEBODY,
    },
    Hostile {
        name: "a perf map of 40 MiB that grows",
        arguments: &["perf-map", "--map-mib", "40", "--ms", "0"],
        user: SOMEBODY,
    },
    Hostile { name: "an exec storm", arguments: &["loop", "exec", "--ms", "0"], user: SOMEBODY },
    Hostile { name: "a fork bomb", arguments: &["fork-bomb", "--most", "1500", "--ms", "0"], user: SOMEBODY },
    // only who may mount can have them, which in a user namespace is everybody
    Hostile { name: "4,000 mounts", arguments: &["mounts", "--dir", "DIR", "--count", "4000", "--ms", "0"], user: 0 },
];

impl Hostile {
    fn start(&self, workload: &Path, dir: &Path) -> anyhow::Result<Actor> {
        let dir = dir.to_str().context("a path that is not text")?;
        let arguments: Vec<&str> =
            self.arguments.iter().map(|argument| if *argument == "DIR" { dir } else { argument }).collect();
        let mut command = Command::new(workload);
        command.uid(self.user).gid(self.user);
        Actor::from_command(command, &arguments)
    }

    /// With an agent of its own: what one has led to must not keep another from being tried.
    fn try_beside_kills(&self, workload: &Path, dir: &Path) -> anyhow::Result<()> {
        let trial = Trial::begin(&AMPLE)?;
        let worker = trial.running_worker()?;
        let mut actor = self.start(workload, dir)?;
        actor.until("attacking")?;
        trial.kills_have_stacks()?;
        ensure!(trial.agent.get("/healthz")?.0 == 200, "the agent is not healthy");
        // those of a process that has ended are none
        let arguments = std::fs::read(format!("/proc/{}/cmdline", actor.pid()))?;
        ensure!(!arguments.is_empty(), "the attack was over before");
        let ended = actor.finish()?;
        ensure!(ended.status.success(), "it ended with {}", ended.status);
        let now = trial.stack_worker()?;
        ensure!(now == Some(worker), "the worker was replaced:\n{}", trial.agent.stderr());
        trial.end()
    }
}

#[test]
fn hostile_programs_cost_nobody_else_a_kill_or_its_stacks() -> anyhow::Result<()> {
    if std::env::var_os(SLOWNESS).is_some() {
        not_run_here(
            "hostile programs",
            "they want to hurt the agent's own code, and thousands take long under emulation",
        );
        return Ok(());
    }
    let open = tempfile::tempdir()?;
    std::fs::set_permissions(open.path(), PermissionsExt::from_mode(0o755))?;
    let workload = open.path().join("workload");
    std::fs::copy(programs::path("workload")?, &workload)?;
    for (at, hostile) in HOSTILE.iter().enumerate() {
        if hostile.arguments[0] == "perf-map" && !cfg!(target_arch = "x86_64") {
            not_run_here(hostile.name, "its program has code for x86-64 only");
            continue;
        }
        let dir = open.path().join(at.to_string());
        std::fs::create_dir(&dir)?;
        chown(&dir, Some(hostile.user), Some(hostile.user))?;
        hostile.try_beside_kills(&workload, &dir).with_context(|| hostile.name)?;
    }
    Ok(())
}

#[test]
fn a_program_that_maps_more_than_the_machine_has_is_reported_as_any_other() -> anyhow::Result<()> {
    if std::fs::read_to_string("/proc/sys/vm/overcommit_memory")?.trim() == "2" {
        not_run_here("a mapping of 100 GiB", "vm.overcommit_memory is 2");
        return Ok(());
    }
    let trial = Trial::begin(&AMPLE)?;
    let cage = Cage::new("sparse", 32 * MIB)?;
    let victim = Actor::start(Some(&cage), &["sparse", "--gib", "100"])?.finish()?;
    victim.was_killed()?;
    let incident = trial.kills(&[&cage], 1)?.pop().context("no incident")?;
    claims::only_victim(&incident, victim.pid, "workload")?;
    let mapped = json::list(&incident, "/mappings")?;
    let largest = mapped.iter().filter_map(|mapping| mapping["change_bytes"].as_i64()).max();
    ensure!(largest >= Some(100 << 30), "the largest call mapped {largest:?} bytes: {mapped:?}");
    cage.remove()?;
    trial.end()
}

#[test]
fn an_agent_starts_among_thousands_of_processes() -> anyhow::Result<()> {
    if std::env::var_os(SLOWNESS).is_some() {
        not_run_here("a start among thousands of processes", "thousands take long under emulation");
        return Ok(());
    }
    let most: u32 = std::fs::read_to_string("/proc/sys/kernel/threads-max")?.trim().parse()?;
    if most < 2 * CROWD {
        not_run_here("a start among thousands of processes", format!("kernel.threads-max is {most}"));
        return Ok(());
    }
    let mut crowd = Actor::start(None, &["crowd", "--processes", &CROWD.to_string()])?;
    crowd.until("ready")?;
    let trial = Trial::begin(&AMPLE)?;
    let known = trial.agent.metric("memtrace_processes")?.context("no memtrace_processes")?;
    ensure!(known >= f64::from(CROWD), "only {known} processes are known");
    trial.kills_have_stacks()?;
    crowd.tell()?;
    ensure!(crowd.finish()?.status.success(), "the crowd failed");
    trial.end()
}
