//! What the agent may do after its start, and what it loses without each capability.

#![allow(clippy::indexing_slicing, reason = "a panic is how a test fails")]

use std::collections::BTreeSet;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, ensure};
use memtrace_tests::actor::Actor;
use memtrace_tests::agent::AgentOptions;
use memtrace_tests::cage::Cage;
use memtrace_tests::claims::{self, MIB};
use memtrace_tests::deadline::{Deadline, SLOWNESS};
use memtrace_tests::figures::{not_run_here, say};
use memtrace_tests::privileges::{self, Capability, field};
use memtrace_tests::trial::Trial;
use memtrace_tests::{growth, json, programs};
use rustix::process::Signal;
use serde_json::Value;

/// Time until something has happened that happens within seconds.
const LIMIT: Duration = Duration::from_secs(120);
/// Stacks of these kills, whatever else the machine does.
const AMPLE: [&str; 4] = ["--stack-budget", "100%", "--socket-group", "12345"];
/// A user who is not the one that the agent runs as.
const SOMEBODY: u32 = 12_345;
/// Agents that see the same kills.
const AGENTS_AT_ONCE: usize = 4;
/// Most rounds of kills until what is expected has been seen: a host under load can lose stacks.
const ROUNDS: usize = 5;
/// Answers of an agent after which it has read the mappings of a program.
const TURNS: usize = 5;

/// Held by a test: agents that all take stacks of everything cost one another theirs.
static ALONE: Mutex<()> = Mutex::new(());

/// Waits until `look` finds something.
fn wait_for<T>(what: &str, mut look: impl FnMut() -> anyhow::Result<Option<T>>) -> anyhow::Result<T> {
    let deadline = Deadline::after(LIMIT);
    loop {
        if let Some(found) = look()? {
            return Ok(found);
        }
        ensure!(!deadline.has_passed(), "not in time: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The capabilities of the page that the test itself has; the others are reported.
fn available() -> anyhow::Result<Vec<Capability>> {
    let held = privileges::held()?;
    let (here, elsewhere): (Vec<_>, Vec<_>) =
        privileges::documented()?.into_iter().partition(|one| held & one.bit != 0);
    for one in elsewhere {
        not_run_here(format!("without {}", one.name), "this machine does not give it anyway");
    }
    Ok(here)
}

/// The threads of the agent by name, as `status` files.
fn threads(agent: u32) -> anyhow::Result<Vec<(String, String)>> {
    let mut found = Vec::new();
    for thread in std::fs::read_dir(format!("/proc/{agent}/task"))? {
        let dir = thread?.path();
        // A thread may end in between.
        let Ok(status) = std::fs::read_to_string(dir.join("status")) else { continue };
        found.push((field(&status, "Name").context("a thread without a name")?, status));
    }
    Ok(found)
}

/// Holds a `status` file against what the page says.
fn holds_what_is_documented(name: &str, status: &str) -> anyhow::Result<()> {
    let holders = privileges::holders()?;
    let documented = holders.iter().find(|holder| holder.name == name);
    let documented = documented.with_context(|| format!("the thread {name} is on no page"))?;
    let held = privileges::held()?;
    for (set, expected) in [
        ("CapPrm", documented.holds & held),
        ("CapEff", documented.uses & held),
        ("CapBnd", documented.holds & held),
        ("CapInh", 0),
        ("CapAmb", 0),
    ] {
        let found = u64::from_str_radix(&field(status, set).with_context(|| format!("no {set}"))?, 16)?;
        ensure!(found == expected, "{name}: {set} is {found:x}, not {expected:x}");
    }
    ensure!(field(status, "NoNewPrivs").as_deref() == Some("1"), "{name} may gain rights");
    match field(status, "Seccomp").as_deref() {
        None => not_run_here("filters of system calls", "this kernel has no seccomp"),
        mode => ensure!(mode == Some("2"), "{name} has no filter"),
    }
    Ok(())
}

/// The same for a thread of the agent: one that was started just now gives up the rest first.
fn settles(name: &str, mut status: String, agent: u32) -> anyhow::Result<()> {
    let deadline = Deadline::after(LIMIT);
    let thread = field(&status, "Pid").context("a thread without a number")?;
    while let Err(error) = holds_what_is_documented(name, &status) {
        ensure!(!deadline.has_passed(), "{error:#}");
        std::thread::sleep(Duration::from_millis(20));
        // It may end meanwhile.
        let Ok(next) = std::fs::read_to_string(format!("/proc/{agent}/task/{thread}/status")) else { break };
        status = next;
    }
    Ok(())
}

#[test]
fn every_thread_has_the_rights_that_are_documented() -> anyhow::Result<()> {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    // Without the hook the path of a new cgroup is looked up by a thread.
    let trial = Trial::begin(&[&AMPLE[..], &["--without", "cgroup_mkdir"]].concat())?;
    let worker = trial.running_worker()?;
    let has_stacks = |incident: &Value| Ok(growth::touching(incident)?.iter().any(|(path, _)| user_frames(path)));
    let mut seen = BTreeSet::new();
    let expected: BTreeSet<String> = privileges::holders()?.into_iter().map(|holder| holder.name).collect();
    let expected: BTreeSet<_> = expected.into_iter().filter(|name| !name.contains(' ')).collect();
    for _ in 0..ROUNDS {
        trial.kill_with_stacks(&programs::path("workload")?, has_stacks)?;
        for (name, status) in threads(trial.agent.pid())? {
            // It reads what the process that names functions writes, for as long as that lives.
            let name = if name == "names" { "naming".to_owned() } else { name };
            settles(&name, status, trial.agent.pid())?;
            seen.insert(name);
        }
        if seen.is_superset(&expected) {
            break;
        }
    }
    ensure!(seen == expected, "{seen:?} were seen, not {expected:?}");
    let of_worker = |pid: u32| Ok::<_, anyhow::Error>(std::fs::read_to_string(format!("/proc/{pid}/status"))?);
    holds_what_is_documented("memtrace stack-worker", &of_worker(worker)?)?;
    // One that is started later has the same, and works.
    memtrace_tests::process::signal(worker, Signal::KILL)?;
    let next = wait_for("another worker runs", || {
        let running = trial.stack_worker()?.filter(|pid| *pid != worker);
        Ok(running.filter(|_| trial.agent.says("another stack worker runs")))
    })?;
    trial.kill_with_stacks(&programs::path("workload")?, has_stacks)?;
    holds_what_is_documented("memtrace stack-worker", &of_worker(next)?)?;
    for path in ["/", "/healthz", "/readyz", "/metrics", "/api/incidents", "/api/processes", "/api/cgroups"] {
        let (code, body) = trial.agent.get(path)?;
        ensure!(code == 200, "{path} gave {code}: {body}");
    }
    trial.end()
}

fn user_frames(path: &Value) -> bool {
    growth::user_frames(path).count() > 0
}

/// What an agent knows and does.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Facts {
    /// Victim, cgroup and scope of each kill.
    kills: Vec<String>,
    /// Each has a curve up to its limit.
    curves: bool,
    /// User frames of a program that everybody may read.
    frames: bool,
    /// They have names.
    names: bool,
    /// The same of a program that only another user may read.
    private_frames: bool,
    /// The same of a program whose file was removed.
    removed_frames: bool,
    kernel_names: bool,
    kernel_log: bool,
    /// Memory of the agent is locked.
    locked: bool,
    /// The OOM killer leaves the agent to the last.
    protected: bool,
    /// The recorder goes before others.
    first: bool,
    /// Its socket has the group that was asked for.
    grouped: bool,
    /// Its bounding set is cut.
    bounded: bool,
}

impl Facts {
    /// What is seen in any round counts: all that can be missing by chance.
    fn or(self, other: Self) -> Self {
        Self {
            kills: other.kills,
            curves: self.curves | other.curves,
            frames: self.frames | other.frames,
            names: self.names | other.names,
            private_frames: self.private_frames | other.private_frames,
            removed_frames: self.removed_frames | other.removed_frames,
            kernel_names: self.kernel_names | other.kernel_names,
            kernel_log: self.kernel_log | other.kernel_log,
            ..other
        }
    }

    /// With everything, on this machine.
    fn whole(kills: Vec<String>, held: u64) -> anyhow::Result<Self> {
        let resource = privileges::documented()?.into_iter().find(|one| one.name == "CAP_SYS_RESOURCE");
        Ok(Self {
            kills,
            curves: true,
            frames: true,
            names: true,
            private_frames: true,
            removed_frames: true,
            kernel_names: sysctl("kptr_restrict")? != 2,
            kernel_log: true,
            locked: true,
            protected: resource.is_some_and(|one| held & one.bit != 0),
            first: true,
            grouped: true,
            bounded: true,
        })
    }

    /// What the page says is lost without this one.
    fn without(mut self, capability: &str) -> anyhow::Result<Self> {
        match capability {
            "CAP_SYSLOG" => {
                self.kernel_log = sysctl("dmesg_restrict")? == 0;
                self.kernel_names = sysctl("kptr_restrict")? == 0 && sysctl("perf_event_paranoid")? <= 1;
            }
            "CAP_SYS_RESOURCE" => self.protected = false,
            "CAP_IPC_LOCK" => self.locked = false,
            "CAP_SYS_NICE" => self.first = false,
            "CAP_CHOWN" => self.grouped = false,
            "CAP_SYS_PTRACE" => {
                (self.frames, self.names, self.private_frames, self.removed_frames) = (false, false, false, false);
            }
            "CAP_DAC_READ_SEARCH" => self.private_frames = false,
            "CAP_CHECKPOINT_RESTORE" => self.removed_frames = false,
            "CAP_SETPCAP" => self.bounded = false,
            // Of the process that names functions: see the other tests.
            "CAP_SETUID" | "CAP_SETGID" | "CAP_KILL" => {}
            other => anyhow::bail!("nothing is known about {other}"),
        }
        Ok(self)
    }
}

/// A setting of the kernel.
fn sysctl(name: &str) -> anyhow::Result<i64> {
    let path = format!("/proc/sys/kernel/{name}");
    Ok(std::fs::read_to_string(&path).with_context(|| path)?.trim().parse()?)
}

/// An agent that lacks something, and what is expected of it.
struct Case {
    /// Capability that it lacks; `None`: nothing.
    lacks: Option<Capability>,
    trial: Trial,
    /// What `doctor` says is lost.
    lost: Vec<String>,
    found: Facts,
}

impl Case {
    /// What is not as the page says, with these capabilities or one less.
    fn problem(&self, all: u64) -> anyhow::Result<Option<String>> {
        let whole = Facts::whole(self.found.kills.clone(), all)?;
        let (expected, name) = match &self.lacks {
            Some(one) => (whole.without(&one.name)?, one.name.as_str()),
            None => (whole, "nothing"),
        };
        let said = self.trial.agent.stderr();
        let problem = format!("without {name}:\n  found    {:?}\n  expected {expected:?}\n{said}", self.found);
        Ok((self.found != expected).then_some(problem))
    }
}

/// What `doctor` says with these capabilities, and its exit code.
fn doctor(keep: u64) -> anyhow::Result<(Value, Option<i32>)> {
    let mut command = privileges::command(keep, programs::memtrace()?)?;
    let output = command.args(["doctor", "--json"]).output().context("failed to run doctor")?;
    let said = serde_json::from_slice(&output.stdout).with_context(|| format!("doctor said {output:?}"))?;
    Ok((said, output.status.code()))
}

/// Whether the agent does not start with these capabilities: exit code 3, and a sentence that names what is missing.
fn is_refused(keep: u64, name: &str) -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let mut command =
        AgentOptions::below(dir.path()).with_capabilities(keep).command(memtrace_tests::agent::free_port()?)?;
    let output = command.output().context("failed to start the agent")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.code() == Some(3), "without {name} the agent ended with {}; it said:\n{said}", output.status);
    ensure!(said.contains(name), "without {name} the agent said:\n{said}");
    Ok(())
}

/// The programs of a round: one that everybody may read, one that only another user may, and one whose file is
/// removed.
fn programs_below(dir: &Path) -> anyhow::Result<[PathBuf; 3]> {
    std::fs::set_permissions(dir, PermissionsExt::from_mode(0o755))?;
    let paths = ["public", "private", "removed"].map(|name| dir.join(name));
    for path in &paths {
        std::fs::copy(programs::path("workload")?, path)?;
    }
    std::fs::set_permissions(&paths[1], PermissionsExt::from_mode(0o700))?;
    chown(&paths[1], Some(SOMEBODY), Some(SOMEBODY))?;
    Ok(paths)
}

/// Kills three programs and adds what each agent knows about it.
fn round(cases: &mut [Case]) -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let paths = programs_below(dir.path())?;
    let cages = [Cage::new("public", 32 * MIB)?, Cage::new("private", 32 * MIB)?, Cage::new("removed", 32 * MIB)?];
    // It is started from a file that has no path any more.
    let file = std::fs::File::open(&paths[2])?;
    std::fs::remove_file(&paths[2])?;
    let removed = PathBuf::from(format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd()));
    let mut actors = Vec::new();
    for (cage, path) in cages.iter().zip([&paths[0], &paths[1], &removed]) {
        let burst = ["burst", "--mib", "128", "--touch", "--threads", "1", "--gate"];
        let mut actor = Actor::from_command(cage.command(path)?, &burst)?;
        actor.until("gated")?;
        actors.push(actor);
    }
    for _ in 0..TURNS {
        for case in &*cases {
            case.trial.agent.metric("memtrace_stacks_total")?;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    for mut actor in actors {
        actor.tell()?;
        actor.finish()?.was_killed()?;
    }
    for case in &mut *cases {
        let facts = facts(&case.trial, &cages, &paths, &case.lost)?;
        case.found = std::mem::take(&mut case.found).or(facts);
    }
    cages.into_iter().try_for_each(Cage::remove)
}

/// What the agent knows about the three kills.
fn facts(trial: &Trial, cages: &[Cage; 3], paths: &[PathBuf; 3], lost: &[String]) -> anyhow::Result<Facts> {
    let id_of = |listed: &[Value], cage: &Cage| {
        let found = listed.iter().find(|incident| incident["cgroup"]["id"] == cage.id())?;
        found["id"].as_str().map(str::to_owned)
    };
    trial.wait_for(LIMIT, |listed| cages.iter().all(|cage| id_of(listed, cage).is_some()))?;
    let listed = trial.agent.get_json("/api/incidents?limit=1000")?;
    let listed = listed.as_array().context("not an array")?;
    let mut facts = Facts { curves: true, ..Facts::default() };
    let mut frames = [false; 3];
    for ((cage, path), frames) in cages.iter().zip(paths).zip(&mut frames) {
        let id =
            id_of(listed, cage).with_context(|| format!("no incident; the agent said:\n{}", trial.agent.stderr()))?;
        let incident = trial.agent.get_json(&format!("/api/incidents/{id}"))?;
        let missing = claims::degraded(&incident)?;
        ensure!(missing == lost, "{missing:?} is lost, announced is {lost:?}");
        claims::ran_out_itself(&incident, cage)?;
        facts.kills.push(format!("{} {}", incident["kind"], incident["oom"]["scope"]));
        facts.curves &= json::list(&incident, "/timeline/columns/boot_ns").is_ok_and(|curve| curve.len() > 10);
        facts.kernel_log |= !incident["oom"]["kernel_log"].is_null();
        facts.kernel_names |= incident["oom"]["trigger_kernel_stack"].as_array().is_some_and(|stack| !stack.is_empty());
        *frames = of_program(&incident, path).next().is_some();
        // One is enough: it takes a while.
        if *frames && *path == paths[0] {
            facts.names = is_named(trial, &id, path)?;
        }
    }
    [facts.frames, facts.private_frames, facts.removed_frames] = frames;
    let status = std::fs::read_to_string(format!("/proc/{}/status", trial.agent.pid()))?;
    facts.locked = field(&status, "VmLck").is_some_and(|locked| locked != "0 kB");
    let adjusted = std::fs::read_to_string(format!("/proc/{}/oom_score_adj", trial.agent.pid()))?;
    facts.protected = adjusted.trim() == "-999";
    facts.grouped = std::fs::metadata(&trial.options().socket)?.gid() == SOMEBODY;
    let recorder = trial.agent.pid();
    facts.first = memtrace_tests::process::niceness(recorder, recorder)? == -20;
    let bounding = u64::from_str_radix(&field(&status, "CapBnd").context("no bounding set")?, 16)?;
    let recorder = privileges::holders()?.into_iter().find(|holder| holder.name == "memtrace");
    facts.bounded = bounding & !recorder.context("no recorder on the page")?.holds == 0;
    Ok(facts)
}

/// Frames in code of this program whose file was read: with its build id.
fn of_program<'a>(incident: &'a Value, program: &'a Path) -> impl Iterator<Item = &'a Value> {
    let paths = incident["allocation_paths"].as_array().into_iter().flatten();
    let frames = paths.flat_map(|path| path["frames"].as_array().into_iter().flatten());
    let program = program.to_string_lossy().into_owned();
    frames.filter(move |frame| {
        frame["module"].as_str().is_some_and(|module| module.starts_with(&program)) && !frame["build_id"].is_null()
    })
}

/// Whether functions of the program have names, once its incident was looked at.
fn is_named(trial: &Trial, id: &str, program: &Path) -> anyhow::Result<bool> {
    wait_for("an incident is named", || {
        let done = trial.agent.heard(&["named functions", id]).or_else(|| trial.agent.heard(&["no names", id]));
        Ok(done)
    })?;
    let incident = trial.agent.get_json(&format!("/api/incidents/{id}"))?;
    let named = |frame: &Value| frame["symbol"].as_str().is_some_and(|name| name.contains("memory::take_share"));
    Ok(of_program(&incident, program).any(named))
}

#[test]
fn without_a_capability_what_the_documents_say_is_lost_and_nothing_else() -> anyhow::Result<()> {
    programs::require_root()?;
    if std::env::var_os(SLOWNESS).is_some() {
        let why = "agents that take every stack cost one another theirs under emulation";
        not_run_here("an agent without each capability", why);
        return Ok(());
    }
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let capabilities = available()?;
    let all = capabilities.iter().fold(0, |mask, one| mask | one.bit);
    let (base, code) = doctor(all)?;
    ensure!(code == Some(0), "with every capability of the page doctor says {base}");
    let base = claims::announced(&base)?;
    let mut waiting = vec![None];
    for one in &capabilities {
        let (report, code) = doctor(all & !one.bit)?;
        let sentence = format!("no {}: {}", one.name, one.lost);
        let fatal = json::list(&report, "/fatal")?;
        let is_fatal = fatal.iter().any(|problem| problem["what"].as_str() == Some(&sentence));
        ensure!(is_fatal == one.required, "doctor says that {fatal:?} is in the way without {}", one.name);
        if code != Some(0) {
            // Before Linux 5.11 maps must fit into the limit of locked memory.
            let needed = one.required || one.name == "CAP_SYS_RESOURCE";
            ensure!(code == Some(3) && needed, "doctor ended with {code:?} without {}: {report}", one.name);
            is_refused(all & !one.bit, &one.name)?;
            continue;
        }
        let mut expected = base.clone();
        expected.push(sentence);
        expected.sort();
        ensure!(claims::announced(&report)? == expected, "doctor does not announce {expected:?}: {report}");
        waiting.push(Some(one.clone()));
    }
    let mut problems = Vec::new();
    for group in waiting.chunks(AGENTS_AT_ONCE) {
        problems.extend(try_group(group, &base, all)?);
    }
    let names: Vec<_> = capabilities.iter().map(|one| one.name.as_str()).collect();
    say(format_args!("taken away one by one: {}", names.join(", ")));
    ensure!(problems.is_empty(), "{}", problems.join("\n"));
    Ok(())
}

/// Starts an agent without each of these, shows all of them the same kills, and returns what is not as it should be.
fn try_group(group: &[Option<Capability>], base: &[String], all: u64) -> anyhow::Result<Vec<String>> {
    let mut cases = Vec::new();
    for lacks in group.iter().cloned() {
        let mut lost = base.to_vec();
        lost.extend(lacks.iter().map(|one| format!("no {}: {}", one.name, one.lost)));
        lost.sort();
        let trial = Trial::begin_with_capabilities(all & !lacks.as_ref().map_or(0, |one| one.bit), &AMPLE)?;
        cases.push(Case { lacks, trial, lost, found: Facts::default() });
    }
    let mut problems = Vec::new();
    for _ in 0..ROUNDS {
        round(&mut cases)?;
        problems =
            cases.iter().map(|case| case.problem(all)).filter_map(Result::transpose).collect::<anyhow::Result<_>>()?;
        if problems.is_empty() {
            break;
        }
    }
    cases.into_iter().try_for_each(|case| case.trial.end())?;
    Ok(problems)
}
