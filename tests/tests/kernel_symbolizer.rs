//! The process that names frames: what it may do, whose files it can name, what a bad file costs.

#![allow(clippy::indexing_slicing, reason = "a panic is how a test fails")]

use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, ensure};
use memtrace_tests::agent::json_of;
use memtrace_tests::cage::Cage;
use memtrace_tests::claims::MIB;
use memtrace_tests::deadline::Deadline;
use memtrace_tests::elf_bomb;
use memtrace_tests::privileges;
use memtrace_tests::programs::{self, require_root};
use memtrace_tests::trial::Trial;
use memtrace_tests::{json, sample};
use rustix::process::Signal;
use serde_json::{Value, json};

const NOBODY: u32 = 65_534;
/// A user who is not the one that the agent runs as.
const SOMEBODY: u32 = 12_345;
/// Time until a process has done what it does at once, and until names are in an incident.
const LIMIT: Duration = Duration::from_secs(120);
/// Bytes of an answer that fit into a pipe of which nothing is read.
const PIPE_BYTES: usize = 64 << 10;
/// Most kills until the process that names functions is seen at work.
const KILLS: usize = 5;

/// The build id of an ELF file: the note whose name is GNU and whose type is 3, of 20 bytes.
fn build_id(file: &Path) -> anyhow::Result<String> {
    let bytes = std::fs::read(file)?;
    let head = *b"\x04\0\0\0\x14\0\0\0\x03\0\0\0GNU\0";
    let at = bytes.windows(head.len()).position(|window| window == head).context("no build id")?;
    let id = bytes.get(at + head.len()..at + head.len() + 20).context("a short build id")?;
    Ok(id.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// The process that names frames, kept busy: it has more names to write than anybody reads.
struct Busy(Child);

impl Busy {
    fn start(mut command: Command) -> anyhow::Result<Self> {
        let program = programs::path("workload")?;
        let code: Vec<u64> = (0..std::fs::metadata(&program)?.len().min(8 << 20)).step_by(128).collect();
        let module = json!([program, build_id(&program)?]);
        let job = json!({ "unnamed": [[module, code]], "modules": [], "debug_dirs": [], "search": true });
        command.arg("name-frames").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = command.spawn()?;
        child.stdin.take().context("no standard input")?.write_all(&serde_json::to_vec(&job)?)?;
        Ok(Self(child))
    }

    /// A field of /proc/PID/status, once it is confined. Words are separated by one blank.
    fn status(&self, field: &str) -> anyhow::Result<String> {
        let deadline = Deadline::after(LIMIT);
        loop {
            let status = std::fs::read_to_string(format!("/proc/{}/status", self.0.id()))?;
            let find = |field: &str| {
                let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))?;
                Some(line.split_whitespace().collect::<Vec<_>>().join(" "))
            };
            // Two filters: the second makes it whole.
            if find("Seccomp_filters").as_deref().unwrap_or("2") == "2" && find("Seccomp").as_deref() == Some("2") {
                return find(field).with_context(|| format!("no {field} in:\n{status}"));
            }
            ensure!(!deadline.has_passed(), "it is not confined:\n{status}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn the_process_that_names_frames_has_no_privileges() -> anyhow::Result<()> {
    require_root()?;
    let busy = Busy::start(programs::memtrace_command()?)?;
    let four = [NOBODY; 4].map(|id| id.to_string()).join(" ");
    for (field, expected) in [("Uid", four.as_str()), ("Gid", &four), ("Groups", ""), ("NoNewPrivs", "1")] {
        let found = busy.status(field)?;
        ensure!(found == expected, "{field}: {found}");
    }
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        let found = busy.status(set)?;
        ensure!(found.bytes().all(|digit| digit == b'0'), "{set}: {found}");
    }
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", busy.0.id()))?;
    for (limit, most) in [
        ("Max cpu time", 40),
        ("Max file size", 0),
        ("Max data size", 512 * MIB),
        ("Max address space", 64 << 30),
        ("Max stack size", 8 * MIB),
        ("Max core file size", 0),
        ("Max processes", 0),
        ("Max open files", 0),
    ] {
        let line = limits.lines().find_map(|line| line.strip_prefix(limit)).with_context(|| limit.to_owned())?;
        let hard = line.split_whitespace().nth(1).and_then(|hard| hard.parse::<u64>().ok());
        ensure!(hard.is_some_and(|hard| hard <= most), "{limit}:{line}");
    }
    Ok(())
}

#[test]
fn without_the_capabilities_to_change_its_user_it_keeps_it_behind_the_filter() -> anyhow::Result<()> {
    require_root()?;
    let (held, documented) = (privileges::held()?, privileges::documented()?);
    for (name, user) in [("CAP_KILL", NOBODY), ("CAP_SETUID", 0), ("CAP_SETGID", 0)] {
        let bit = documented.iter().find(|one| one.name == name).with_context(|| format!("no {name} on the page"))?.bit;
        let busy = Busy::start(privileges::command(held & !bit, programs::memtrace()?)?)?;
        let four = [user; 4].map(|id| id.to_string()).join(" ");
        ensure!(busy.status("Uid")? == four, "without {name} its users are {}", busy.status("Uid")?);
        ensure!(busy.status("CapPrm")?.bytes().all(|digit| digit == b'0'), "without {name} it has capabilities");
        ensure!(busy.status("NoNewPrivs")? == "1", "without {name} it may gain rights");
    }
    Ok(())
}

#[test]
fn a_user_without_privileges_gets_the_same_names() -> anyhow::Result<()> {
    require_root()?;
    let dir = tempfile::tempdir()?;
    std::fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o755))?;
    let program = dir.path().join("memtrace");
    std::fs::copy(programs::memtrace()?, &program)?;
    let mut command = Command::new(&program);
    command.uid(SOMEBODY).gid(SOMEBODY).current_dir("/");
    let mut busy = Busy::start(command)?;
    for (field, expected) in [("Uid", SOMEBODY), ("Gid", SOMEBODY), ("NoNewPrivs", 1), ("Seccomp", 2)] {
        let found = busy.status(field)?;
        ensure!(found.split(' ').all(|word| word == expected.to_string()), "{field}: {found}");
    }
    let answer = std::io::read_to_string(busy.0.stdout.take().context("no standard output")?)?;
    ensure!(answer.len() > PIPE_BYTES && answer.contains("memory::take_share"), "{} bytes", answer.len());
    ensure!(busy.0.wait()?.success());
    Ok(())
}

/// Whether some stack of an incident goes through a function.
fn names(incident: &Value, function: &str) -> bool {
    frames(incident).filter_map(|frame| frame["symbol"].as_str()).any(|symbol| symbol.contains(function))
}

/// The frames of all stacks of an incident.
fn frames(incident: &Value) -> impl Iterator<Item = &Value> {
    let paths = incident["allocation_paths"].as_array().into_iter().flatten();
    paths.flat_map(|path| path["frames"].as_array().into_iter().flatten())
}

/// The incident of a kill of `program`, once its frames have been looked at.
fn named_kill(trial: &Trial, program: &Path) -> anyhow::Result<Value> {
    let of_program = |incident: &Value| frames(incident).any(|frame| frame["module"].as_str() == program.to_str());
    let incident = trial.kill_with_stacks(program, |incident| Ok(of_program(incident)))?;
    let id = json::text(&incident, "/id")?;
    let deadline = Deadline::after(LIMIT);
    while trial.agent.heard(&["named functions", id]).is_none() {
        ensure!(!deadline.has_passed(), "{id} has no names; the agent said:\n{}", trial.agent.stderr());
        std::thread::sleep(Duration::from_millis(100));
    }
    trial.options().report(id)
}

#[test]
fn files_that_only_their_owner_may_read_are_named() -> anyhow::Result<()> {
    let trial = Trial::begin(&["--sample", "256K", "--stack-budget", "100%"])?;
    let dir = tempfile::tempdir()?;
    std::fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o755))?;
    let program = dir.path().join("program");
    std::fs::copy(programs::path("workload")?, &program)?;
    std::fs::set_permissions(&program, PermissionsExt::from_mode(0o700))?;
    let mut nameless = None;
    for owner in [0, SOMEBODY] {
        std::os::unix::fs::chown(&program, Some(owner), Some(owner))?;
        let incident = named_kill(&trial, &program)?;
        ensure!(names(&incident, "memory::take_share"), "no names from a file of user {owner}");
        nameless = Some(without_names(incident));
    }
    trial.end()?;
    // The same by the file alone: as root, and as nobody, who may read it only once it is public.
    let file = dir.path().join("nameless.memtrace");
    std::fs::write(&file, zstd::encode_all(&*serde_json::to_vec(&nameless)?, 3)?)?;
    let memtrace = dir.path().join("memtrace");
    std::fs::copy(programs::memtrace()?, &memtrace)?;
    for (user, mode, named) in [(0, 0o700, true), (NOBODY, 0o700, false), (NOBODY, 0o755, true)] {
        std::fs::set_permissions(&program, PermissionsExt::from_mode(mode))?;
        let mut command = Command::new(&memtrace);
        command.arg("report").arg(&file).args(["--format", "json", "--debug-dir"]).arg(dir.path());
        let report = json_of({
            command.uid(user).gid(user).current_dir("/");
            command
        })?;
        ensure!(names(&report, "memory::take_share") == named, "user {user}, mode {mode:o}");
    }
    Ok(())
}

/// The incident as it was saved at first.
fn without_names(mut incident: Value) -> Value {
    let paths = incident["allocation_paths"].as_array_mut().into_iter().flatten();
    for frame in paths.flat_map(|path| path["frames"].as_array_mut().into_iter().flatten()) {
        if frame["kernel"] == json!(false) {
            frame["symbol"] = Value::Null;
        }
    }
    incident
}

#[test]
fn debug_information_that_grows_without_end_costs_its_own_names_only() -> anyhow::Result<()> {
    require_root()?;
    let dir = tempfile::tempdir()?;
    let program = programs::path("workload")?;
    std::fs::copy(&program, dir.path().join("program"))?;
    std::fs::write(dir.path().join("bomb"), elf_bomb::file([7; 20], 1 << 30, &[])?.0)?;
    let frame = |module: &str, id: &str, offset: u64| {
        json!({ "module": module, "build_id": id, "offset": offset, "symbol": null, "file": null, "line": null,
            "kernel": false, "inlined": false })
    };
    let id = build_id(&program)?;
    let mut frames = vec![frame("/a/bomb", &"07".repeat(20), 0x100)];
    frames.extend((0..4 << 20).step_by(4096).take(500).map(|offset| frame("/b/program", &id, offset)));
    let mut incident = sample::incident();
    incident["allocation_paths"] = json!([{
        "weight_bytes": 4096, "cause": "touch", "cut": null, "mapped_by": null, "frames": frames,
        "process": { "pid": 4242, "tid": 4242, "start_boot_ns": 5_000_000_000_u64, "comm": "workload" },
    }]);
    let file = dir.path().join("incident.memtrace");
    std::fs::write(&file, zstd::encode_all(&*serde_json::to_vec(&incident)?, 3)?)?;
    // All processes of the report together; each may have 512 MiB.
    let cage = Cage::new("report", 768 * MIB)?;
    let mut command = cage.command(programs::memtrace()?)?;
    command.arg("report").arg(&file).args(["--format", "json", "--debug-dir"]).arg(dir.path());
    let report = json_of(command)?;
    ensure!(cage.oom_kills()? == 0, "the report ran out of memory");
    let frames = json::list(&report, "/allocation_paths/0/frames")?;
    let named = frames.iter().filter(|frame| !frame["symbol"].is_null()).count();
    ensure!(frames[0]["symbol"].is_null() && named > 10, "{named} of {} frames are named", frames.len());
    cage.remove()
}

/// The process that names functions for this agent, once it is confined.
fn confined_symbolizer(agent: u32) -> Option<u32> {
    let tasks = std::fs::read_dir(format!("/proc/{agent}/task")).ok()?;
    let children = tasks.filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("children")).ok());
    let children: Vec<u32> =
        children.flat_map(|list| list.split(' ').filter_map(|pid| pid.parse().ok()).collect::<Vec<_>>()).collect();
    let is_nobody = |pid: &u32| {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        privileges::field(&status, "Uid").is_some_and(|users| users.starts_with("65534"))
    };
    children.into_iter().find(is_nobody)
}

/// Stops the process that names functions for an agent with these capabilities, which then hangs. Returns the agent,
/// once it has given the process up, and the process.
fn hanging_symbolizer(capabilities: u64) -> anyhow::Result<(Trial, u32)> {
    let trial = Trial::begin_with_capabilities(capabilities, &[])?;
    let agent = trial.agent.pid();
    let over = AtomicBool::new(false);
    let stopped = std::thread::scope(|scope| {
        let watch = scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                let found = confined_symbolizer(agent);
                if let Some(pid) = found.filter(|pid| memtrace_tests::process::signal(*pid, Signal::STOP).is_ok()) {
                    return Some(pid);
                }
                std::thread::yield_now();
            }
            None
        });
        let mut killed = Ok(());
        for _ in 0..KILLS {
            killed = trial.kill_with_stacks(&programs::path("workload")?, |_| Ok(true)).map(drop);
            let deadline = Deadline::after(Duration::from_secs(5));
            while killed.is_ok() && !watch.is_finished() && !deadline.has_passed() {
                std::thread::sleep(Duration::from_millis(10));
            }
            if killed.is_err() || watch.is_finished() {
                break;
            }
        }
        over.store(true, Ordering::Relaxed);
        let stopped = watch.join().ok().flatten();
        killed.and_then(|()| stopped.context("no process that names functions was seen"))
    })?;
    let deadline = Deadline::after(LIMIT);
    while !trial.agent.says("named functions") && !trial.agent.says("no names") {
        ensure!(!deadline.has_passed(), "the agent does not give it up; it said:\n{}", trial.agent.stderr());
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok((trial, stopped))
}

#[test]
fn a_process_that_names_functions_and_hangs_is_ended_unless_kill_is_missing() -> anyhow::Result<()> {
    require_root()?;
    let held = privileges::held()?;
    let kill = privileges::documented()?.into_iter().find(|one| one.name == "CAP_KILL").context("no CAP_KILL")?.bit;
    let (with, without) = std::thread::scope(|scope| {
        let with = scope.spawn(|| hanging_symbolizer(held));
        let without = scope.spawn(|| hanging_symbolizer(held & !kill));
        (with.join(), without.join())
    });
    let panicked = |_| anyhow::anyhow!("a thread of the test panicked");
    let (with, ended) = with.map_err(panicked)??;
    let (without, left) = without.map_err(panicked)??;
    let state = |pid: u32| {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        privileges::field(&status, "State")
    };
    ensure!(state(ended).is_none(), "with CAP_KILL it is left behind: {:?}", state(ended));
    let found = state(left);
    ensure!(found.as_deref().is_some_and(|state| state.starts_with('T')), "without CAP_KILL it is {found:?}");
    memtrace_tests::process::signal(left, Signal::KILL)?;
    with.end()?;
    without.end()
}
