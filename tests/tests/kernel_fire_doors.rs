//! What other people's files, and the end of the stack worker, cost: stacks, and nothing else.

#![allow(clippy::indexing_slicing, reason = "a panic is how a test fails")]

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, ensure};
use memtrace_tests::actor::Actor;
use memtrace_tests::agent::{self, AgentOptions};
use memtrace_tests::cage::Cage;
use memtrace_tests::deadline::Deadline;
use memtrace_tests::figures::not_run_here;
use memtrace_tests::process::niceness;
use memtrace_tests::programs;
use memtrace_tests::trial::Trial;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use rustix::process::Signal;

/// Time until something has happened that happens within seconds.
const LIMIT: Duration = Duration::from_secs(120);
/// Enough for every stack, whatever else the machine does.
const AMPLE: [&str; 2] = ["--stack-budget", "50%"];

/// Waits until `look` finds something.
fn wait_for<T>(what: &str, trial: &Trial, mut look: impl FnMut() -> anyhow::Result<Option<T>>) -> anyhow::Result<T> {
    let deadline = Deadline::after(LIMIT);
    loop {
        if let Some(found) = look()? {
            return Ok(found);
        }
        ensure!(!deadline.has_passed(), "{what}: not in time; the agent said:\n{}", trial.agent.stderr());
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Workers that were replaced.
fn replaced(trial: &Trial) -> anyhow::Result<Option<f64>> {
    trial.agent.metric(r#"memtrace_lost_total{what="stacks/worker_replaced"}"#)
}

#[test]
fn a_file_system_that_does_not_answer_costs_no_kill() -> anyhow::Result<()> {
    if !std::fs::read_to_string("/proc/filesystems")?.lines().any(|line| line.ends_with("\tfuse")) {
        not_run_here("a file system that does not answer", "no FUSE in this kernel");
        return Ok(());
    }
    let trial = Trial::begin(&AMPLE)?;
    let worker = trial.running_worker()?;
    let late = || trial.agent.metric("memtrace_stack_readings_late");
    let silent = silent_file_system(&trial, "first")?;
    wait_for("a reading is given up", &trial, || Ok(late()?.filter(|late| *late > 0.0)))?;
    // From then on none of that kind is read.
    let before = late()?;
    let another = silent_file_system(&trial, "second")?;
    trial.kills_have_stacks()?;
    ensure!(trial.stack_worker()? == Some(worker), "it was replaced:\n{}", trial.agent.stderr());
    ensure!(late()? == before, "{before:?} readings were late, then {:?}:\n{}", late()?, trial.agent.stderr());
    // A worker with such a reading cannot die before the file system lets go of it.
    memtrace_tests::process::signal(worker, Signal::KILL)?;
    wait_for("it is shown", &trial, || {
        Ok(trial.agent.metric(r#"memtrace_stack_workers{state="stuck"}"#)?.filter(|count| *count > 0.0))
    })?;
    wait_for("another worker runs", &trial, || Ok(trial.stack_worker()?.filter(|pid| *pid != worker)))?;
    trial.kills_have_stacks()?;
    ensure!(trial.agent.get("/healthz")?.0 == 200, "it is not healthy");
    ensure!(trial.agent.comes_to_say("does not answer"), "the agent says nothing about it:\n{}", trial.agent.stderr());
    // While it is silent, the agent stops as ever.
    trial.end()?;
    another.finish()?;
    silent.finish()?;
    Ok(())
}

/// Somebody without rights can have file systems of his own, and nobody sees what is below.
#[test]
fn a_file_system_below_an_overlay_of_a_user_costs_no_kill() -> anyhow::Result<()> {
    costs_no_kill("overlay")
}

#[test]
fn a_perf_map_below_an_overlay_of_a_user_costs_no_kill() -> anyhow::Result<()> {
    if !cfg!(target_arch = "x86_64") {
        not_run_here("a perf map below an overlay", "its program has code for x86-64 only");
        return Ok(());
    }
    costs_no_kill("perf-map")
}

fn costs_no_kill(behind: &str) -> anyhow::Result<()> {
    let of_kernel = std::fs::read_to_string("/proc/filesystems")?;
    if ["fuse", "overlay"].iter().any(|fs| !of_kernel.lines().any(|line| line.ends_with(&format!("\t{fs}")))) {
        not_run_here(format!("a file system behind {behind}"), "no FUSE or no overlay in this kernel");
        return Ok(());
    }
    let trial = Trial::begin(&AMPLE)?;
    let worker = trial.running_worker()?;
    let late = || trial.agent.metric("memtrace_stack_readings_late");
    let silent = match hidden_file_system(&trial, "first", behind) {
        Ok(silent) => silent,
        // somebody without rights may have no namespaces of his own, or no overlay in them
        Err(error) if format!("{error:#}").contains("cannot") && !may_have_namespaces()? => {
            not_run_here(format!("a file system behind {behind}"), format!("{error:#}"));
            return trial.end();
        }
        Err(error) => return Err(error),
    };
    wait_for("a reading is given up", &trial, || Ok(late()?.filter(|late| *late > 0.0)))?;
    trial.kills_have_stacks()?;
    ensure!(trial.stack_worker()? == Some(worker), "it was replaced:\n{}", trial.agent.stderr());
    ensure!(trial.agent.get("/healthz")?.0 == 200, "it is not healthy");
    // While it is silent, the agent stops as ever.
    trial.end()?;
    silent.finish()?;
    Ok(())
}

/// Whether the kernel is new enough for overlays in user namespaces (5.11), and lets everybody have
/// those.
fn may_have_namespaces() -> anyhow::Result<bool> {
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    let mut numbers = release.split(['.', '-']).map_while(|part| part.parse::<u32>().ok());
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    let is = |name: &str, value: &str| {
        std::fs::read_to_string(Path::new("/proc/sys").join(name)).is_ok_and(|now| now.trim() == value)
    };
    Ok(version >= (5, 11)
        && Path::new("/proc/sys/user/max_user_namespaces").exists()
        && !is("kernel/unprivileged_userns_clone", "0")
        && !is("user/max_user_namespaces", "0")
        && !is("kernel/apparmor_restrict_unprivileged_userns", "1"))
}

/// A program that grew in code of a file system that does not answer.
fn silent_file_system(trial: &Trial, name: &str) -> anyhow::Result<Actor> {
    hidden_file_system(trial, name, "detached")
}

fn hidden_file_system(trial: &Trial, name: &str, behind: &str) -> anyhow::Result<Actor> {
    let dir = trial.dir().join(name);
    std::fs::create_dir(&dir)?;
    // whoever gives up his rights still gets to the node beside it
    std::fs::set_permissions(trial.dir(), PermissionsExt::from_mode(0o711))?;
    let dir = dir.to_str().context("no text")?;
    let mut silent = Actor::start(None, &["silent", "--dir", dir, "--mib", "256", "--behind", behind])?;
    silent.until("ready")?;
    silent.tell()?;
    let grown = silent.until("grown")?;
    ensure!(grown["failed"] == false, "{grown}");
    Ok(silent)
}

#[test]
fn a_worker_that_is_killed_is_replaced() -> anyhow::Result<()> {
    let trial = Trial::begin(&AMPLE)?;
    let first = trial.running_worker()?;
    memtrace_tests::process::signal(first, Signal::KILL)?;
    let second = wait_for("another worker runs", &trial, || Ok(trial.stack_worker()?.filter(|pid| *pid != first)))?;
    trial.kills_have_stacks()?;
    ensure!(trial.stack_worker()? == Some(second), "it was replaced again");
    ensure!(replaced(&trial)? == Some(1.0), "it is not counted: {:?}", replaced(&trial)?);
    trial.end()
}

/// A service manager that stops the agent sends them to every process of the service.
#[test]
fn signals_to_the_worker_are_left_to_the_recorder() -> anyhow::Result<()> {
    let trial = Trial::begin(&AMPLE)?;
    let worker = trial.running_worker()?;
    for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
        memtrace_tests::process::signal(worker, signal)?;
    }
    trial.kills_have_stacks()?;
    ensure!(trial.stack_worker()? == Some(worker), "it was replaced");
    trial.end()
}

#[test]
fn the_worker_has_no_more_rights_than_it_needs() -> anyhow::Result<()> {
    let trial = Trial::begin(&[])?;
    let worker = trial.running_worker()?;
    let status = std::fs::read_to_string(format!("/proc/{worker}/status"))?;
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        line.map(str::trim).with_context(|| format!("no {name}"))
    };
    // DAC_READ_SEARCH (2), SYS_PTRACE (19), SYSLOG (34), CHECKPOINT_RESTORE (40)
    let most = (1u64 << 2) | (1 << 19) | (1 << 34) | (1 << 40);
    for set in ["CapPrm", "CapEff", "CapInh", "CapAmb"] {
        let held = u64::from_str_radix(field(set)?, 16)?;
        ensure!(held & !most == 0, "{set} is {held:x}, at most {most:x} is needed");
    }
    ensure!(field("NoNewPrivs")? == "1", "it may gain rights");
    trial.end()
}

#[test]
fn a_file_system_can_be_unmounted_when_its_process_has_ended() -> anyhow::Result<()> {
    let trial = Trial::begin(&AMPLE)?;
    let dir = trial.dir().join("volume");
    std::fs::create_dir(&dir)?;
    let mounted = Mounted::tmpfs(&dir)?;
    let program = dir.join("workload");
    std::fs::copy(programs::path("workload")?, &program)?;
    let before = trial.agent.metric("memtrace_stacks_total")?.unwrap_or(0.0);
    let mut actor = Actor::from_command(Command::new(&program), &["burst", "--mib", "256", "--touch", "--gate"])?;
    actor.until("gated")?;
    actor.tell()?;
    ensure!(actor.finish()?.status.success(), "the program failed");
    wait_for("stacks of it are taken", &trial, || {
        Ok(trial.agent.metric("memtrace_stacks_total")?.filter(|stacks| *stacks > before))
    })?;
    wait_for("the file system is free", &trial, || Ok(unmount(&dir, UnmountFlags::empty()).ok()))?;
    std::mem::forget(mounted);
    trial.end()
}

/// A tmpfs, detached when a test fails.
struct Mounted<'a>(&'a Path);

impl<'a> Mounted<'a> {
    fn tmpfs(dir: &'a Path) -> anyhow::Result<Self> {
        mount("volume", dir, "tmpfs", MountFlags::empty(), None).context("failed to mount a tmpfs")?;
        Ok(Self(dir))
    }
}

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        let _ = unmount(self.0, UnmountFlags::DETACH);
    }
}

/// Programs that keep the CPUs busy would otherwise make it late.
#[test]
fn the_recorder_and_those_who_save_and_answer_go_before_others_and_nothing_else_of_the_agent_does() -> anyhow::Result<()>
{
    let trial = Trial::begin(&AMPLE)?;
    let first = trial.running_worker()?;
    // One that is started by the recorder as it is now.
    memtrace_tests::process::signal(first, Signal::KILL)?;
    let worker = wait_for("another worker runs", &trial, || Ok(trial.stack_worker()?.filter(|pid| *pid != first)))?;
    trial.kills_have_stacks()?;
    let pid = trial.agent.pid();
    ensure!(niceness(pid, pid)? == -20, "the recorder has niceness {}", niceness(pid, pid)?);
    // A thread that was started just now puts itself back first.
    wait_for("all others are behind it", &trial, || {
        let mut early = Vec::new();
        for thread in std::fs::read_dir(format!("/proc/{pid}/task"))? {
            let thread: u32 = thread?.file_name().to_string_lossy().parse()?;
            // A thread that has ended meanwhile does not count.
            let Ok(niceness) = niceness(pid, thread) else { continue };
            let name = std::fs::read_to_string(format!("/proc/{pid}/task/{thread}/comm")).unwrap_or_default();
            if ["packer\n", "storer\n", "http\n"].contains(&name.as_str()) {
                early.push(niceness);
            } else if niceness < 0 && thread != pid {
                return Ok(None);
            }
        }
        early.sort_unstable();
        Ok((early == [-10, -10, -5] && niceness(worker, worker)? >= 0).then_some(()))
    })?;
    trial.end()
}

#[test]
fn a_log_that_nobody_reads_stops_nothing() -> anyhow::Result<()> {
    programs::require_root()?;
    let dir = tempfile::tempdir()?;
    let options = AgentOptions::below(dir.path()).with(&["--after", "100ms"]);
    let port = agent::free_port()?;
    let (pipe, end) = std::io::pipe()?;
    rustix::pipe::fcntl_setpipe_size(&pipe, 4096)?;
    // As a service manager has it: one for both.
    let mut child = options.command(port)?.stdout(end.try_clone()?).stderr(end).spawn()?;
    let deadline = Deadline::after(LIMIT);
    while !agent::get(port, "/readyz").is_ok_and(|(status, _)| status == 200) {
        ensure!(!deadline.has_passed() && child.try_wait()?.is_none(), "the agent is not ready");
        std::thread::sleep(Duration::from_millis(50));
    }
    let cage = Cage::new("unread", 16 << 20)?;
    // Each is told in several lines: many more than fit.
    for _ in 0..30 {
        Actor::start(Some(&cage), &["burst", "--mib", "32"])?.finish()?.was_killed()?;
    }
    let ledger = options.state_dir.join("kills.jsonl");
    loop {
        let lines = std::fs::read_to_string(&ledger).unwrap_or_default().lines().count();
        if lines >= 30 {
            break;
        }
        ensure!(!deadline.has_passed(), "{lines} of 30 kills are in the ledger");
        std::thread::sleep(Duration::from_millis(50));
    }
    memtrace_tests::process::signal(child.id(), Signal::TERM)?;
    let status = memtrace_tests::process::wait_at_most(&mut child, LIMIT)?;
    ensure!(status.success(), "the agent ended with {status}");
    drop(pipe);
    cage.remove()
}

#[test]
fn a_worker_that_nobody_started_says_so() -> anyhow::Result<()> {
    let output = Command::new(programs::memtrace()?).arg("stack-worker").stdin(Stdio::null()).output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.code() == Some(1) && !said.contains("panicked"), "it ended with {}:\n{said}", output.status);
    Ok(())
}
