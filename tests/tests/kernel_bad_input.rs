//! A privileged agent in a bad environment: BTF, hooks, state directory, disk, port.

#![allow(clippy::indexing_slicing, reason = "a panic is how a test fails")]

use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::time::Duration;

use anyhow::{Context, ensure};
use memtrace_tests::agent::{Agent, AgentOptions, free_port, successful};
use memtrace_tests::cage::Cage;
use memtrace_tests::deadline::Deadline;
use memtrace_tests::disk::TinyDisk;
use memtrace_tests::json;
use memtrace_tests::process;
use memtrace_tests::programs::{self, require_root};
use memtrace_tests::random::SeededRandom;
use memtrace_tests::sample;
use serde_json::Value;

/// Runs an agent that must end by itself, soon and without a panic.
fn ends(options: &AgentOptions, port: u16) -> anyhow::Result<(i32, String)> {
    let mut child = options.command(port)?.spawn().context("failed to start the agent")?;
    let ended = process::wait_at_most(&mut child, Duration::from_secs(20));
    if ended.is_err() {
        child.kill()?;
    }
    let output: Output = child.wait_with_output()?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let status = ended.with_context(|| format!("the agent went on; it said:\n{said}"))?;
    ensure!(!said.contains("panicked"), "the agent panicked:\n{said}");
    Ok((status.code().with_context(|| format!("the agent ended with {status}:\n{said}"))?, said))
}

fn oom_kill(label: &str) -> anyhow::Result<u64> {
    let cage = Cage::new(label, 24 << 20)?;
    cage.command(programs::path("workload")?)?.args(["burst", "--mib", "48"]).stdout(Stdio::null()).status()?;
    ensure!(cage.oom_kills()? == 1, "nobody was killed");
    let id = cage.id();
    cage.remove()?;
    Ok(id)
}

fn has(listed: &[Value], cage_id: u64) -> bool {
    listed.iter().any(|incident| incident.pointer("/cgroup/id").and_then(Value::as_u64) == Some(cage_id))
}

#[test]
fn btf_that_is_missing_or_garbage_is_named() -> anyhow::Result<()> {
    require_root()?;
    let dir = tempfile::tempdir()?;
    let garbage = dir.path().join("garbage.btf");
    std::fs::write(&garbage, [0x9f, 0xeb, 1, 0, 0xff, 0xff, 0xff, 0xff].repeat(64))?;
    for (file, name) in [("/nonexistent/vmlinux.btf", "/nonexistent/vmlinux.btf"), (path(&garbage)?, "garbage.btf")] {
        let (code, said) = ends(&AgentOptions::below(dir.path()).with(&["--btf", file]), free_port()?)?;
        ensure!(code == 3 && said.contains(name), "--btf {file} ended with {code}:\n{said}");
    }
    Ok(())
}

fn path(path: &Path) -> anyhow::Result<&str> {
    path.to_str().context("a path that is not text")
}

#[test]
fn a_required_hook_cannot_be_left_out_and_an_optional_one_can() -> anyhow::Result<()> {
    require_root()?;
    let dir = tempfile::tempdir()?;
    let (code, said) = ends(&AgentOptions::below(dir.path()).with(&["--without", "rss"]), free_port()?)?;
    ensure!(matches!(code, 2 | 3) && said.contains("rss"), "--without rss ended with {code}:\n{said}");
    let (code, said) = ends(&AgentOptions::below(dir.path()).with(&["--without", "no_such_hook"]), free_port()?)?;
    ensure!(code == 2 && said.contains("no_such_hook"), "--without no_such_hook ended with {code}:\n{said}");

    let mut agent = AgentOptions::below(dir.path()).with(&["--without", "exit_mmap"]).start()?;
    let killed = oom_kill("degraded")?;
    let listed = agent.options().incidents_when(Duration::from_secs(30), |listed| has(listed, killed))?;
    ensure!(has(&listed, killed), "a degraded agent saw no kill; it said:\n{}", agent.stderr());
    agent.stop()?;

    let output = programs::memtrace_command()?.args(["doctor", "--without", "exit_mmap"]).output()?;
    let said = String::from_utf8_lossy(&output.stdout);
    let off = said.lines().any(|line| line.contains("exit_mmap") && line.to_lowercase().contains("off"));
    ensure!(off, "doctor does not show exit_mmap off ({}):\n{said}", output.status);
    Ok(())
}

#[test]
fn a_state_directory_that_is_a_file_is_named() -> anyhow::Result<()> {
    require_root()?;
    let dir = tempfile::tempdir()?;
    let mut options = AgentOptions::below(dir.path());
    options.state_dir = dir.path().join("in-the-way");
    std::fs::write(&options.state_dir, "a file")?;
    let (code, said) = ends(&options, free_port()?)?;
    ensure!(code == 1 && said.contains("in-the-way"), "ended with {code}:\n{said}");
    Ok(())
}

#[test]
fn a_port_in_use_is_named() -> anyhow::Result<()> {
    require_root()?;
    let dir = tempfile::tempdir()?;
    let taken = TcpListener::bind("127.0.0.1:0")?;
    let port = taken.local_addr()?.port();
    let (code, said) = ends(&AgentOptions::below(dir.path()), port)?;
    ensure!(code == 1 && said.contains(&format!("127.0.0.1:{port}")), "ended with {code}:\n{said}");
    Ok(())
}

#[test]
fn health_readiness_metrics_and_incidents_are_served() -> anyhow::Result<()> {
    require_root()?;
    let dir = tempfile::tempdir()?;
    let mut agent = AgentOptions::below(dir.path()).start()?;
    for path in ["/healthz", "/readyz", "/metrics"] {
        let (status, body) = agent.get(path)?;
        ensure!(status == 200, "GET {path}: {status} {body}");
    }
    let (_, metrics) = agent.get("/metrics")?;
    ensure!(metrics.trim_end().ends_with("# EOF"), "/metrics is not OpenMetrics:\n{metrics}");
    ensure!(agent.get_json("/api/incidents")?.is_array(), "/api/incidents is not an array");
    ensure!(agent.get("/no/such/page")?.0 == 404, "an unknown page is found");
    // the journal and the incidents contain other people's data
    for name in ["state", "journal"] {
        use std::os::unix::fs::PermissionsExt;
        let mode = std::fs::metadata(dir.path().join(name))?.permissions().mode() & 0o777;
        ensure!(mode & 0o007 == 0, "{name} is open to everyone: {mode:o}");
    }
    let ended = agent.stop()?;
    ensure!(ended.code() == Some(0), "the agent ended with {ended} on SIGTERM; it said:\n{}", agent.stderr());
    Ok(())
}

#[test]
fn a_journal_in_use_is_named() -> anyhow::Result<()> {
    require_root()?;
    let dir = tempfile::tempdir()?;
    let options = AgentOptions::below(dir.path());
    let mut agent = options.start()?;
    let mut second = options.clone();
    second.state_dir = dir.path().join("other");
    let (code, said) = ends(&second, free_port()?)?;
    let journal = path(&options.journal_dir)?;
    let named = said.contains(&format!("another memtrace agent (pid {}) uses the journal in {journal}", agent.pid()));
    ensure!(code == 1 && named && said.contains("--journal-dir"), "ended with {code}:\n{said}");
    second.journal_dir = dir.path().join("other-journal");
    second.state_dir.clone_from(&options.state_dir);
    let (code, said) = ends(&second, free_port()?)?;
    ensure!(code == 1 && said.contains("--state-dir"), "ended with {code}:\n{said}");
    ensure!(agent.is_running()?, "the first agent ended; it said:\n{}", agent.stderr());
    agent.stop()?;
    // one directory for both has one lock
    second.state_dir.clone_from(&options.journal_dir);
    second.journal_dir.clone_from(&options.journal_dir);
    second.start()?.stop()?;
    Ok(())
}

#[test]
fn a_state_directory_that_others_may_change_is_refused_and_links_in_it_are_not_followed() -> anyhow::Result<()> {
    use std::os::unix::fs::{PermissionsExt, chown, symlink};
    require_root()?;
    let dir = tempfile::tempdir()?;
    let options = AgentOptions::below(dir.path());
    let precious = dir.path().join("precious");
    std::fs::write(&precious, "precious")?;
    std::fs::create_dir(&options.state_dir)?;
    for (name, said_of) in [("lock", "lock: it is a link"), ("kills.jsonl", "kills.jsonl: it is a link")] {
        let link = options.state_dir.join(name);
        symlink(&precious, &link)?;
        let (code, said) = ends(&options, free_port()?)?;
        ensure!(code == 1 && said.contains(said_of), "a linked {name}: ended with {code}:\n{said}");
        std::fs::remove_file(&link)?;
    }
    ensure!(std::fs::read(&precious)? == b"precious", "a file was written to through a link");
    std::fs::set_permissions(&options.state_dir, std::fs::Permissions::from_mode(0o777))?;
    let (code, said) = ends(&options, free_port()?)?;
    ensure!(code == 1 && said.contains("everybody may write to it"), "ended with {code}:\n{said}");
    std::fs::set_permissions(&options.state_dir, std::fs::Permissions::from_mode(0o755))?;
    chown(&options.state_dir, Some(12_345), None)?;
    let (code, said) = ends(&options, free_port()?)?;
    ensure!(code == 1 && said.contains("belongs to user 12345"), "ended with {code}:\n{said}");
    chown(&options.state_dir, Some(0), None)?;
    let mut agent = options.start()?;
    // Nobody else can take the lock away from the next.
    let mode = std::fs::metadata(options.state_dir.join("lock"))?.permissions().mode() & 0o777;
    ensure!(mode == 0o600, "the lock is open to others: {mode:o}");
    agent.stop()?;
    Ok(())
}

/// Regular files below a directory, with their permissions.
fn permissions(dir: &Path) -> anyhow::Result<Vec<(PathBuf, u32)>> {
    use std::os::unix::fs::PermissionsExt;
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        let about = entry.metadata()?;
        if about.is_dir() {
            found.extend(permissions(&entry.path())?);
        } else if about.is_file() {
            found.push((entry.path(), about.permissions().mode() & 0o777));
        }
    }
    Ok(found)
}

/// What is recorded tells of every program: whoever starts the agent with another umask does not
/// open it to everybody, or close it to the agent.
#[test]
fn the_umask_decides_nothing() -> anyhow::Result<()> {
    require_root()?;
    for umask in [0o000, 0o777] {
        let dir = tempfile::tempdir()?;
        let options = AgentOptions::below(dir.path());
        // of this process: tests of this file run one after another
        let before = rustix::process::umask(umask.into());
        let started = options.start();
        rustix::process::umask(before);
        let mut agent = started?;
        let killed = oom_kill("umask")?;
        until_listed(&agent, &[killed])?;
        agent.stop()?;
        let files = [permissions(&options.state_dir)?, permissions(&options.journal_dir)?].concat();
        ensure!(files.len() >= 4, "only {files:?}");
        for dir in [&options.state_dir, &options.journal_dir] {
            use std::os::unix::fs::PermissionsExt;
            let mode = std::fs::metadata(dir)?.permissions().mode() & 0o777;
            ensure!(mode & 0o022 == 0 && mode & 0o700 == 0o700, "umask {umask:o}: {} is {mode:o}", dir.display());
        }
        for (file, mode) in files {
            ensure!(mode & 0o037 == 0 && mode & 0o600 == 0o600, "umask {umask:o}: {} is {mode:o}", file.display());
        }
    }
    Ok(())
}

/// Waits until one incident waits to be saved.
fn until_one_waits(agent: &Agent) -> anyhow::Result<()> {
    let deadline = Deadline::after(Duration::from_secs(30));
    while agent.metric("memtrace_incidents_waiting")? != Some(1.0) {
        ensure!(!deadline.has_passed(), "nothing waits to be saved; it said:\n{}", agent.stderr());
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}

#[test]
fn a_full_state_directory_is_counted_and_what_it_had_no_room_for_is_saved_later() -> anyhow::Result<()> {
    require_root()?;
    let dir = tempfile::tempdir()?;
    let disk = TinyDisk::mount(256)?;
    let mut options = AgentOptions::below(dir.path());
    options.state_dir = disk.path().to_owned();
    let mut agent = options.start()?;
    // fill what the agent's own files leave to the last byte
    let filler = disk.path().join("filler");
    let _full = std::fs::write(&filler, vec![0u8; 256 << 10]);
    let without_room = oom_kill("full")?;
    until_one_waits(&agent)?;
    let failures = agent.metric("memtrace_incident_write_failures_total")?.unwrap_or_default();
    ensure!(failures > 0.0, "no failed write was counted; it said:\n{}", agent.stderr());
    ensure!(agent.is_running()?, "the agent ended; it said:\n{}", agent.stderr());
    ensure!(agent.get("/healthz")?.0 == 200, "the agent is not healthy");
    for incident in options.incidents()? {
        options.report(json::text(&incident, "/id")?)?;
    }
    // Once there is room, what waits is saved, and the next kill too.
    std::fs::remove_file(&filler)?;
    let killed = oom_kill("room")?;
    let both = |listed: &[Value]| has(listed, killed) && has(listed, without_room);
    let listed = options.incidents_when(Duration::from_secs(90), both)?;
    ensure!(both(&listed), "not both incidents after room was made: {listed:?}; it said:\n{}", agent.stderr());
    ensure!(agent.metric("memtrace_incidents_waiting")? == Some(0.0), "something waits to be saved");
    // What could not be saved until the agent stopped is saved by the next.
    let _full = std::fs::write(&filler, vec![0u8; 256 << 10]);
    let at_the_end = oom_kill("end")?;
    until_one_waits(&agent)?;
    agent.stop()?;
    std::fs::remove_file(&filler)?;
    let mut agent = options.start()?;
    let listed = options.incidents_when(Duration::from_secs(30), |listed| has(listed, at_the_end))?;
    ensure!(has(&listed, at_the_end), "the last incident is lost; the next agent said:\n{}", agent.stderr());
    let kills = std::fs::read_to_string(disk.path().join("kills.jsonl"))?;
    // Other tests kill at the same time.
    let ours = format!("/memtrace-tests-{}-", std::process::id());
    for label in ["full", "room", "end"] {
        let of_label = |line: &&str| line.contains(&ours) && line.contains(&format!("-{label}\","));
        let count = kills.lines().filter(of_label).count();
        ensure!(count == 1, "{count} lines of the kill in {label}, the ledger has\n{kills}");
    }
    agent.stop()?;
    let half: Vec<_> = std::fs::read_dir(disk.path())?
        .filter_map(Result::ok)
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|name| name.contains("tmp") || name.contains("partial"))
        .collect();
    ensure!(half.is_empty(), "half-written files were left: {half:?}");
    Ok(())
}

/// Fills a state directory with what no agent leaves there.
fn litter_state(dir: &Path) -> anyhow::Result<()> {
    std::fs::create_dir(dir)?;
    let incident = |last: char| dir.join(format!("01J0000000000000000000000{last}.memtrace"));
    std::fs::create_dir(incident('1'))?;
    rustix::fs::mkfifoat(rustix::fs::CWD, incident('2'), 0o600.into())?;
    std::os::unix::fs::symlink("/dev/zero", incident('3'))?;
    let mut future = sample::incident();
    future["schema"] = 1_000_000.into();
    std::fs::write(incident('4'), zstd::encode_all(future.to_string().as_bytes(), 3)?)?;
    for (seed, name) in [(1, "kills.jsonl"), (2, "sigkills.jsonl")] {
        std::fs::write(dir.join(name), random_bytes(seed))?;
    }
    Ok(())
}

/// Fills a journal directory with segments that no agent has written.
fn litter_journal(dir: &Path) -> anyhow::Result<()> {
    std::fs::create_dir(dir)?;
    let segment = |number: u64| dir.join(format!("journal-{number:020}.mtj"));
    std::fs::write(segment(1), random_bytes(3))?;
    std::fs::write(segment(2), [b"MTJR\x01\0\0\0".to_vec(), random_bytes(4)].concat())?;
    std::fs::create_dir(segment(3))?;
    rustix::fs::mkfifoat(rustix::fs::CWD, segment(4), 0o600.into())?;
    std::fs::write(segment(u64::MAX), b"MTJR\x01\0\0\0")?;
    Ok(())
}

fn random_bytes(seed: u64) -> Vec<u8> {
    let mut random = SeededRandom::new(seed);
    (0..1000).flat_map(|_| random.next_u64().to_le_bytes()).collect()
}

#[test]
fn what_is_in_the_state_directory_already() -> anyhow::Result<()> {
    require_root()?;
    let dir = tempfile::tempdir()?;
    let options = AgentOptions::below(dir.path());
    litter_state(&options.state_dir)?;
    litter_journal(&options.journal_dir)?;
    let mut killed = Vec::new();
    // the second start finds what the first has moved aside
    for label in ["litter", "again"] {
        let mut agent = options.start()?;
        killed.push(oom_kill(label)?);
        until_listed(&agent, &killed).with_context(|| label)?;
        let kills = String::from_utf8_lossy(&std::fs::read(options.state_dir.join("kills.jsonl"))?).into_owned();
        let ours = format!("/memtrace-tests-{}-", std::process::id());
        let lines = kills.lines().filter(|line| line.contains(&ours) && line.contains(&format!("-{label}\","))).count();
        ensure!(lines == 1, "{label}: {lines} lines in the ledger");
        for path in ["/", "/api/incidents", "/healthz", "/metrics"] {
            let (status, body) = agent.get(path)?;
            ensure!(status == 200, "{label}: GET {path}: {status} {body}");
        }
        let lost = agent.metric("memtrace_journal_write_failures_total")?;
        ensure!(lost == Some(0.0), "{label}: {lost:?} frames of the journal were not written");
        for ledger in ["--kills", "--sigkills"] {
            let mut command = programs::memtrace_command()?;
            command.args(["incidents", ledger, "--state-dir"]).arg(&options.state_dir);
            successful(command)?;
        }
        agent.kill_9()?;
        // the next start recovers the incident, and finds something else under its name
        let listed = options.incidents()?;
        let newest = listed.iter().find(|incident| has(std::slice::from_ref(incident), killed[killed.len() - 1]));
        let id = json::text(newest.context("the incident is gone")?, "/id")?;
        let file = options.state_dir.join(format!("{id}.memtrace"));
        std::fs::remove_file(&file)?;
        match label {
            "litter" => rustix::fs::mkfifoat(rustix::fs::CWD, &file, 0o600.into())?,
            _ => std::os::unix::fs::symlink("/dev/zero", &file)?,
        }
    }
    let mut agent = options.start()?;
    until_listed(&agent, &killed).context("the last start")?;
    agent.stop()?;
    Ok(())
}

/// Waits until the incidents of all these cgroups are listed.
fn until_listed(agent: &Agent, cage_ids: &[u64]) -> anyhow::Result<()> {
    let all = |listed: &[Value]| cage_ids.iter().all(|id| has(listed, *id));
    let listed = agent.options().incidents_when(Duration::from_secs(60), all)?;
    ensure!(all(&listed), "not saved: {listed:?}; it said:\n{}", agent.stderr());
    Ok(())
}

#[test]
fn a_state_directory_on_a_read_only_file_system_is_named() -> anyhow::Result<()> {
    require_root()?;
    let dir = tempfile::tempdir()?;
    let disk = TinyDisk::mount(256)?;
    rustix::mount::mount_remount(disk.path(), rustix::mount::MountFlags::RDONLY, c"")?;
    for state_dir in [disk.path().to_owned(), disk.path().join("state")] {
        let mut options = AgentOptions::below(dir.path());
        options.state_dir.clone_from(&state_dir);
        let (code, said) = ends(&options, free_port()?)?;
        ensure!(code == 1 && said.contains(path(&state_dir)?), "ended with {code}:\n{said}");
    }
    Ok(())
}

/// Connections of somebody who does not wish the agent well: more than it has descriptors for by default.
const HOSTILE_CONNECTIONS: usize = 1100;
/// Connections that the agent holds at most.
const CONNECTIONS_CAP: usize = 64;
/// What the agent may grow by meanwhile, a kill and its incident included. Half of the bytes it is sent.
const GROWTH_CAP: f64 = 100.0 * 1024.0 * 1024.0;

#[test]
fn clients_that_never_finish_keep_neither_others_nor_incidents_out() -> anyhow::Result<()> {
    require_root()?;
    memtrace_tests::process::allow_files(HOSTILE_CONNECTIONS as u64 + 200)?;
    let dir = tempfile::tempdir()?;
    let options = AgentOptions::below(dir.path());
    let mut agent = options.start()?;
    let resident = "memtrace_self_memory_bytes{part=\"resident\"}";
    let before = agent.metric(resident)?.context("no resident memory")?;
    let sockets_before = sockets(&agent)?;
    let head = [b"GET / HTTP/1.1\r\nHost: localhost\r\nX: ".to_vec(), vec![b'x'; 390_000]].concat();
    let mut open = Vec::with_capacity(HOSTILE_CONNECTIONS);
    for n in 0..HOSTILE_CONNECTIONS {
        let mut stream = TcpStream::connect(("127.0.0.1", agent.port()))?;
        stream.set_nonblocking(true)?;
        // Half of them send what has no end, half nothing. The agent may have closed it already.
        if n % 2 == 0 {
            let _ = stream.write(&head);
        }
        open.push(stream);
    }
    ensure!(agent.get("/healthz")?.0 == 200, "the agent is not healthy");
    let killed = oom_kill("crowd")?;
    let listed = options.incidents_when(Duration::from_secs(60), |listed| has(listed, killed))?;
    ensure!(has(&listed, killed), "the incident is lost; it said:\n{}", agent.stderr());
    let grown = agent.metric(resident)?.context("no resident memory")? - before;
    ensure!(grown < GROWTH_CAP, "it grew by {grown} bytes");
    let accepted = agent.metric("memtrace_http_connections_total{outcome=\"accepted\"}")?.unwrap_or_default();
    ensure!(accepted >= HOSTILE_CONNECTIONS as f64, "{accepted} connections were accepted");
    let held = sockets(&agent)?;
    ensure!(held <= sockets_before + CONNECTIONS_CAP, "it holds {held} sockets, {sockets_before} before");
    drop(open);
    agent.stop()?;
    Ok(())
}

/// Sockets that the agent holds.
fn sockets(agent: &Agent) -> anyhow::Result<usize> {
    let files = std::fs::read_dir(format!("/proc/{}/fd", agent.pid()))?.filter_map(Result::ok);
    let targets = files.filter_map(|file| std::fs::read_link(file.path()).ok());
    Ok(targets.filter(|target| target.to_string_lossy().starts_with("socket:")).count())
}
