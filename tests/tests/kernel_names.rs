//! Names that a user chose: of cgroups, of mount points and of processes. They may be any bytes, and
//! neither stop the agent, nor hide a cgroup, nor reach a terminal.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::time::Duration;

use anyhow::{Context, ensure};
use memtrace_tests::actor::Actor;
use memtrace_tests::agent::{AgentOptions, successful};
use memtrace_tests::cage::{Cage, Version};
use memtrace_tests::claims::{self, MIB};
use memtrace_tests::deadline::Deadline;
use memtrace_tests::figures::not_run_here;
use memtrace_tests::json;
use memtrace_tests::programs::{self, require_root};
use memtrace_tests::trial::Trial;
use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
use rustix::thread::UnshareFlags;
use serde_json::Value;

const LIMIT: u64 = 16 * MIB;
/// Levels of cgroups, one inside the other.
const LEVELS: usize = 20;
/// How long it may take until a cgroup is reported that waits for memory.
const STUCK_LIMIT: Duration = Duration::from_secs(60);
/// Bytes of a long name; the kernel takes 255.
const LONG: usize = 240;

/// Names, and how they are shown.
fn names() -> Vec<(Vec<u8>, String)> {
    let name = |name: &[u8], shown: &str| (name.to_vec(), shown.to_owned());
    vec![
        name(b"esc\x1b]0;x\x07", "esc\\x1b]0;x\\x07"),
        name("bidi\u{202e}x".as_bytes(), "bidi\\xe2\\x80\\xaex"),
        name(b"byte\xff", "byte\\xff"),
        name(b",task=x,pid=1", ",task=x,pid=1"),
        name(&[b'n'; LONG], &"n".repeat(LONG)),
    ]
}

/// Cgroups of all names below one, the last of them many levels deep.
struct Named {
    /// Those that a process can be in.
    cages: Vec<Cage>,
    /// Those that are above the last one, from the inside out, so that they are removed in order.
    above: Vec<Cage>,
}

impl Named {
    fn make(label: &str) -> anyhow::Result<Self> {
        let top = Cage::unlimited(label)?;
        let named = |(name, shown): (Vec<u8>, String)| top.child_bytes(&name, &shown)?.limited(LIMIT, 0);
        let mut cages = names().into_iter().map(named).collect::<anyhow::Result<Vec<_>>>()?;
        let mut above = vec![top];
        for level in 1..LEVELS {
            let parent = above.first().context("no parent")?;
            above.insert(0, parent.child(&format!("level{level}"))?);
        }
        let deepest = above.first().context("no parent")?.child("deepest")?;
        cages.push(deepest.limited(LIMIT, 0)?);
        Ok(Self { cages, above })
    }

    fn remove(self) -> anyhow::Result<()> {
        self.cages.into_iter().chain(self.above).try_for_each(Cage::remove)
    }
}

/// No character that a terminal obeys but the end of a line, and none that turns text around.
fn harmless(what: &str, text: &str) -> anyhow::Result<()> {
    let obeyed = |c: &char| (c.is_control() && *c != '\n') || *c == '\u{202e}' || *c == '\u{fffd}';
    let found: Vec<char> = text.chars().filter(obeyed).take(5).collect();
    ensure!(found.is_empty(), "{what} has {found:?}:\n{text}");
    Ok(())
}

fn memtrace(trial: &Trial, arguments: &[&str]) -> anyhow::Result<String> {
    let mut command = programs::memtrace_command()?;
    command.args(arguments).arg("--state-dir").arg(&trial.options().state_dir);
    Ok(String::from_utf8(successful(command)?.stdout)?)
}

/// The kill of this process has an incident and a line of the ledger, with path and limit.
fn is_reported(trial: &Trial, cage: &Cage, incident: &Value, pid: u32) -> anyhow::Result<()> {
    claims::ran_out_itself(incident, cage)?;
    claims::only_victim(incident, pid, "workload")?;
    claims::says(incident, "/oom/victims/0/cgroup_path", cage.path())?;
    let id = json::text(incident, "/id")?;
    let lines = fs::read_to_string(trial.options().state_dir.join("kills.jsonl"))?;
    let line = lines.lines().find(|line| line.contains(id)).with_context(|| format!("{id} has no line:\n{lines}"))?;
    let line: Value = serde_json::from_str(line)?;
    claims_of_line(&line, cage, pid).with_context(|| line.to_string())?;
    harmless("a report", &memtrace(trial, &["report", id])?)
}

fn claims_of_line(line: &Value, cage: &Cage, pid: u32) -> anyhow::Result<()> {
    ensure!(json::text(line, "/cgroup_path")? == cage.path(), "the line has not the path {}", cage.path());
    ensure!(json::number(line, "/limit_bytes")? == LIMIT, "the line has not the limit");
    ensure!(json::number(line, "/pid")? == u64::from(pid), "the line has not the process {pid}");
    Ok(())
}

/// One set of cgroups is found by the agent when it starts, and made by others under its eyes.
#[test]
fn kills_in_cgroups_of_any_name_are_reported_with_path_and_limit_and_reach_no_terminal() -> anyhow::Result<()> {
    require_root()?;
    let before = Named::make("before")?;
    let trial = Trial::begin(&[])?;
    let after = Named::make("after")?;
    let cages: Vec<&Cage> = before.cages.iter().chain(&after.cages).collect();
    let mut pids = Vec::new();
    for cage in &cages {
        let ended = Actor::start(Some(cage), &["burst", "--mib", "64", "--threads", "1"])?.finish()?;
        ended.was_killed()?;
        pids.push(ended.pid);
    }
    let incidents = trial.kills(&cages, cages.len())?;
    for (cage, pid) in cages.iter().zip(pids) {
        let of = |incident: &&Value| json::number(incident, "/cgroup/id").is_ok_and(|id| id == cage.id());
        let incident = incidents.iter().find(of).with_context(|| format!("no incident of {}", cage.path()))?;
        is_reported(&trial, cage, incident, pid)?;
    }
    for verb in [&["incidents"][..], &["incidents", "--kills"], &["incidents", "--json"]] {
        harmless(&format!("{verb:?}"), &memtrace(&trial, verb)?)?;
    }
    for path in ["/metrics", "/", "/api/incidents", "/api/kills", "/api/cgroups", "/api/processes"] {
        let (status, body) = trial.agent.get(path)?;
        ensure!(status == 200, "GET {path}: {status}");
        // The script of the page is our own.
        harmless(path, &body.replace(['\t', '\r'], " "))?;
    }
    harmless("the ledger", &fs::read_to_string(trial.options().state_dir.join("kills.jsonl"))?)?;
    harmless("the log", &trial.agent.stderr())?;
    trial.end()?;
    before.remove()?;
    after.remove()
}

/// A program of any name that does nothing while the agent starts is followed all the same.
#[test]
fn a_process_and_a_cgroup_whose_names_are_not_text_are_found_at_the_start() -> anyhow::Result<()> {
    require_root()?;
    let (dir, top) = (tempfile::tempdir()?, Cage::unlimited("found")?);
    let cage = top.child_bytes(b"cgroup\xff", "cgroup\\xff")?;
    let program = dir.path().join(OsStr::from_bytes(b"name\xff\x1b"));
    fs::copy(programs::path("workload")?, &program)?;
    let burst = ["burst", "--mib", "4", "--threads", "1", "--gate"];
    let mut waiting = Actor::from_command(cage.command(&program)?, &burst)?;
    waiting.until("gated")?;
    let trial = Trial::begin(&[])?;
    let answer = trial.agent.get_json(&format!("/api/processes?pid={}", waiting.pid()))?;
    claims::says(&answer, "/0/comm", "name\\xff\\x1b").with_context(|| answer.to_string())?;
    ensure!(json::number(&answer, "/0/cgroup_id")? == cage.id(), "it is in another cgroup: {answer}");
    waiting.finish()?;
    trial.end()?;
    cage.remove()?;
    top.remove()
}

/// The agent reads memory.oom_control by what the cgroup is called, not by what is shown of it.
#[test]
fn a_cgroup_whose_name_is_not_text_is_reported_while_its_tasks_wait() -> anyhow::Result<()> {
    require_root()?;
    let top = Cage::unlimited("stuck")?;
    let cage = top.child_bytes(b"\xff\x1b", "\\xff\\x1b")?.limited(LIMIT, 0)?;
    if cage.version() == Version::V2 {
        not_run_here("names of stuck cgroups", "memory.oom_control is a file of cgroup v1");
    } else {
        let trial = Trial::begin(&[])?;
        cage.set("memory.oom_control", 1)?;
        let waiting = Actor::start(Some(&cage), &["burst", "--mib", "32", "--threads", "1", "--touch"])?;
        let deadline = Deadline::after(STUCK_LIMIT);
        while trial.agent.metric("memtrace_cgroups_stuck")?.unwrap_or_default() < 1.0 {
            ensure!(!deadline.has_passed(), "no cgroup is stuck; the agent said:\n{}", trial.agent.stderr());
            std::thread::sleep(Duration::from_millis(100));
        }
        cage.set("memory.oom_control", 0)?;
        waiting.finish()?.was_killed()?;
        trial.end()?;
    }
    cage.remove()?;
    top.remove()
}

/// Starts an agent where a file system is mounted on a directory of this name, in a mount namespace
/// of the calling thread alone, and stops it.
fn starts_beside_a_mount_on(name: &[u8]) -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    #[expect(deprecated, reason = "the other function is unsafe because of descriptors, which stay shared")]
    rustix::thread::unshare(UnshareFlags::NEWNS).context("failed to make a mount namespace")?;
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).context("mounts stay shared")?;
    let point = dir.path().join(OsStr::from_bytes(name));
    fs::create_dir(&point)?;
    mount(c"tmpfs", &point, c"tmpfs", MountFlags::empty(), None).context("failed to mount a tmpfs")?;
    let table = fs::read("/proc/thread-self/mountinfo")?;
    ensure!(table.windows(name.len()).any(|bytes| bytes == name), "the mount has another name");
    let mut agent = AgentOptions::below(dir.path()).start()?;
    let ended = agent.stop()?;
    harmless("the log", &agent.stderr())?;
    ensure!(ended.code() == Some(0), "the agent ended with {ended}; it said:\n{}", agent.stderr());
    // The namespace ends with its thread; the directory is removed after the mount.
    rustix::mount::unmount(&point, rustix::mount::UnmountFlags::DETACH).context("failed to unmount")
}

#[test]
fn a_mount_point_whose_name_is_not_text_stops_no_agent() -> anyhow::Result<()> {
    require_root()?;
    let beside = std::thread::spawn(|| starts_beside_a_mount_on(b"point\xff\x1b")).join();
    beside.map_err(|_| anyhow::anyhow!("the thread panicked"))?
}
