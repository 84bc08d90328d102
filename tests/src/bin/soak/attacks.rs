//! What is known to hurt an agent, each in rounds until the end.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use memtrace_tests::actor::Actor;
use memtrace_tests::agent;
use memtrace_tests::cage::Cage;
use memtrace_tests::claims::MIB;
use memtrace_tests::process;
use tempfile::TempDir;

use crate::Yard;

/// Somebody without rights.
const NOBODY_KNOWN: u32 = 12_345;
/// How long a round takes that could go on for ever.
const ROUND: Duration = Duration::from_secs(15);
/// How long a program of an attack may take beyond that.
const LIMIT: Duration = Duration::from_secs(300);
/// Clients that never finish: many more than the agent has room for.
const CLIENTS: usize = 1_100;
/// Unfinished head of such a client, bytes.
const HEAD_BYTES: usize = 390_000;
/// Clients that do not read: all that the agent has room for.
const READERS: usize = 64;
/// Cgroups made at once: more than are followed.
const CGROUPS: usize = 5_000;

/// A way to hurt.
pub(crate) struct Attack {
    name: &'static str,
    round: fn(&Yard) -> anyhow::Result<()>,
}

const ATTACKS: [Attack; 21] = [
    Attack { name: "silent-files", round: silent_files },
    Attack { name: "overlays", round: overlays },
    Attack { name: "perf-maps-below-overlays", round: perf_maps_below_overlays },
    Attack { name: "slow-files", round: slow_files },
    Attack { name: "leases", round: leases },
    Attack { name: "locked-spaces", round: locked_spaces },
    Attack { name: "mounts", round: mounts },
    Attack { name: "debug-bombs", round: debug_bombs },
    Attack { name: "cgroups", round: cgroups },
    Attack { name: "idle-clients", round: idle_clients },
    Attack { name: "deaf-clients", round: deaf_clients },
    Attack { name: "busy-clients", round: busy_clients },
    Attack { name: "uploads", round: uploads },
    Attack { name: "foreign-host", round: foreign_host },
    Attack { name: "perf-maps", round: perf_maps },
    Attack { name: "linked-modules", round: linked_modules },
    Attack { name: "killed-children", round: killed_children },
    Attack { name: "oom-loop", round: oom_loop },
    Attack { name: "short-processes", round: short_processes },
    Attack { name: "growth", round: growth },
    Attack { name: "unmount", round: unmount },
];

/// The attacks of these names; all without names.
pub(crate) fn chosen(names: &[String]) -> anyhow::Result<Vec<&'static Attack>> {
    if names.is_empty() {
        return Ok(ATTACKS.iter().collect());
    }
    let names = names.iter().filter(|name| *name != "none");
    let known = || ATTACKS.iter().map(|attack| attack.name).collect::<Vec<_>>().join(", ");
    let find = |name: &String| ATTACKS.iter().find(|attack| attack.name == name);
    names.map(|name| find(name).with_context(|| format!("no attack {name}; there are: {}", known()))).collect()
}

/// Rounds of one attack.
pub(crate) struct Rounds {
    attack: &'static Attack,
    /// How many rounds, how many of them failed, and why the last one did.
    count: Mutex<(u64, u64, String)>,
}

impl Rounds {
    pub(crate) fn of(attack: &'static Attack) -> Self {
        Self { attack, count: Mutex::default() }
    }

    /// Attacks until the end. A round that fails by itself, say for want of memory, is told and no
    /// fault of the agent's.
    pub(crate) fn run(&self, yard: &Yard) {
        while !yard.is_over() {
            let ended = (self.attack.round)(yard);
            if let Ok(mut count) = self.count.lock() {
                count.0 += 1;
                if let Err(error) = ended {
                    count.1 += 1;
                    count.2 = format!("{error:#}");
                }
            }
            yard.rest(Duration::from_secs(1));
        }
    }

    pub(crate) fn summary(&self) -> String {
        let (rounds, failed, why) = self.count.lock().map(|count| count.clone()).unwrap_or_default();
        let why = if failed > 0 { format!(", {failed} failed: {why}") } else { String::new() };
        format!("{}: {rounds} rounds{why}", self.attack.name)
    }
}

/// A workload of somebody without rights.
fn as_nobody(yard: &Yard, arguments: &[&str]) -> Command {
    let mut command = Command::new(&yard.workload);
    command.args(arguments).uid(NOBODY_KNOWN).gid(NOBODY_KNOWN);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command
}

fn run_as_nobody(yard: &Yard, arguments: &[&str]) -> anyhow::Result<()> {
    let mut child = as_nobody(yard, arguments).spawn().context("failed to start an attacker")?;
    let status = process::wait_at_most(&mut child, LIMIT)?;
    ensure!(status.success(), "the attacker ended with {status}");
    Ok(())
}

/// Code of a file system that does not answer.
fn silent_files(yard: &Yard) -> anyhow::Result<()> {
    on_own_files(yard, &[])
}

/// The same of somebody without rights, below an overlay in a user namespace.
fn overlays(yard: &Yard) -> anyhow::Result<()> {
    on_own_files(yard, &["--behind", "overlay"])
}

/// A /tmp that does not answer, where perf maps are looked for.
fn perf_maps_below_overlays(yard: &Yard) -> anyhow::Result<()> {
    on_own_files(yard, &["--behind", "perf-map"])
}

/// Code of a file system that takes its time: for one reading a little less than is waited for.
fn slow_files(yard: &Yard) -> anyhow::Result<()> {
    on_own_files(yard, &["--answer-ms", "150"])
}

fn on_own_files(yard: &Yard, more: &[&str]) -> anyhow::Result<()> {
    // its namespaces are somebody's
    let dir = open_dir(yard)?;
    let dir = dir.path().join("fs");
    std::fs::create_dir(&dir)?;
    let dir = dir.display().to_string();
    let mut actor = Actor::start(None, &[&["silent", "--mib", "24", "--dir", &dir], more].concat())?;
    actor.until("ready")?;
    actor.tell()?;
    actor.until("grown")?;
    yard.rest(ROUND);
    Ok(())
}

/// A directory that the attackers can write to.
fn open_dir(yard: &Yard) -> anyhow::Result<TempDir> {
    let dir = tempfile::tempdir_in(&yard.dir)?;
    std::os::unix::fs::chown(dir.path(), Some(NOBODY_KNOWN), Some(NOBODY_KNOWN))?;
    Ok(dir)
}

/// Code that whoever opens it waits for, unless he asks not to.
fn leases(yard: &Yard) -> anyhow::Result<()> {
    let dir = open_dir(yard)?;
    run_as_nobody(yard, &["leased", "--dir", &dir.path().display().to_string(), "--ms", "15000"])
}

/// A process that keeps its own address space locked.
fn locked_spaces(yard: &Yard) -> anyhow::Result<()> {
    run_as_nobody(yard, &["locked", "--mappings", "30000", "--ms", "15000"])
}

/// A list of mounts of more than a megabyte.
fn mounts(yard: &Yard) -> anyhow::Result<()> {
    let dir = tempfile::tempdir_in(&yard.dir)?;
    let dir = dir.path().display().to_string();
    Actor::start(None, &["mounts", "--dir", &dir, "--count", "4000", "--ms", "15000"])?.finish()?.succeeded()
}

/// Victims with frames in code whose debug information grows without end.
fn debug_bombs(yard: &Yard) -> anyhow::Result<()> {
    let (dir, cage) = (tempfile::tempdir_in(&yard.dir)?, Cage::new("soak-bomb", 24 * MIB)?);
    let mut command = cage.command(&yard.workload)?;
    command.args(["debug-bomb", "--mib", "64", "--dir"]).arg(dir.path());
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
    let status = process::wait_at_most(&mut child, LIMIT)?;
    ensure!(process::shell_code(status) == 137, "the victim ended with {status}");
    // its functions are looked for in the file
    yard.rest(ROUND);
    cage.remove()
}

/// More cgroups than are followed, with work in each.
fn cgroups(yard: &Yard) -> anyhow::Result<()> {
    let parent = Cage::unlimited("soak-many")?;
    let mut made = Vec::with_capacity(CGROUPS);
    for n in 0..CGROUPS {
        if yard.is_over() {
            break;
        }
        made.push(parent.child(&format!("c{n}"))?);
    }
    let prefix = format!("{}/c", parent.dir().display());
    Actor::start(None, &["wander", "--prefix", &prefix, "--from", "0", "--to", &made.len().to_string()])?
        .finish()?
        .succeeded()?;
    drop(made);
    parent.remove()
}

fn connect(yard: &Yard) -> anyhow::Result<TcpStream> {
    TcpStream::connect(("127.0.0.1", yard.port)).context("failed to connect")
}

/// Connections that send nothing or a head without an end.
fn idle_clients(yard: &Yard) -> anyhow::Result<()> {
    let head = [b"GET / HTTP/1.1\r\nHost: localhost\r\nX: ".to_vec(), vec![b'x'; HEAD_BYTES]].concat();
    let mut open = Vec::with_capacity(CLIENTS);
    for n in 0..CLIENTS {
        if yard.is_over() {
            break;
        }
        let mut stream = connect(yard)?;
        stream.set_nonblocking(true)?;
        if n % 2 == 0 {
            // the agent may have closed it
            let _ = stream.write(&head);
        }
        open.push(stream);
    }
    yard.rest(ROUND);
    Ok(())
}

/// Connections that ask for the largest answers and read none.
fn deaf_clients(yard: &Yard) -> anyhow::Result<()> {
    let mut open = Vec::with_capacity(READERS);
    for n in 0..READERS {
        let mut stream = connect(yard)?;
        let path = if n % 2 == 0 { "/api/incidents?limit=1000" } else { "/api/processes" };
        let _ = write!(stream, "GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n");
        open.push(stream);
    }
    yard.rest(ROUND);
    Ok(())
}

/// A client that asks as fast as it gets answers.
fn busy_clients(yard: &Yard) -> anyhow::Result<()> {
    let begin = Instant::now();
    while begin.elapsed() < ROUND && !yard.is_over() {
        // turned away at the cap is an answer too
        let _ = agent::get(yard.port, "/api/processes");
        let _ = agent::get(yard.port, "/metrics");
    }
    Ok(())
}

/// A body of 100 GB.
fn uploads(yard: &Yard) -> anyhow::Result<()> {
    let begin = Instant::now();
    let mut stream = connect(yard)?;
    stream.set_write_timeout(Some(ROUND))?;
    write!(stream, "POST /api/incidents HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000000000\r\n\r\n")?;
    // until it is closed
    while begin.elapsed() < ROUND && !yard.is_over() && stream.write_all(&[0; 1 << 16]).is_ok() {}
    Ok(())
}

/// A web page that wants to read the agent.
fn foreign_host(yard: &Yard) -> anyhow::Result<()> {
    let mut stream = connect(yard)?;
    stream.set_read_timeout(Some(ROUND))?;
    write!(stream, "GET /api/incidents HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n")?;
    let mut answer = [0; 12];
    stream.read_exact(&mut answer)?;
    if answer.starts_with(b"HTTP/1.1 2") {
        yard.fault("a foreign Host was answered".to_owned());
    }
    Ok(())
}

/// Programs that compile code, with perf maps that grow.
fn perf_maps(yard: &Yard) -> anyhow::Result<()> {
    let one = || as_nobody(yard, &["perf-map", "--map-mib", "40", "--ms", "15000"]).spawn();
    let mut all = (0..4).map(|_| one()).collect::<Result<Vec<_>, _>>().context("failed to start an attacker")?;
    for child in &mut all {
        let status = process::wait_at_most(child, LIMIT)?;
        ensure!(status.success(), "the attacker ended with {status}");
    }
    Ok(())
}

/// Thousands of names of one ELF file with the longest headers.
fn linked_modules(yard: &Yard) -> anyhow::Result<()> {
    let dir = yard.dir.join("links");
    if !dir.exists() {
        std::fs::create_dir(&dir)?;
        std::os::unix::fs::chown(&dir, Some(NOBODY_KNOWN), Some(NOBODY_KNOWN))?;
    }
    run_as_nobody(yard, &["linked-modules", "--dir", &dir.display().to_string(), "--count", "8000", "--ms", "15000"])
}

fn killed_children(yard: &Yard) -> anyhow::Result<()> {
    run_as_nobody(yard, &["kill-children", "--count", "1000"])
}

/// A container that is killed and started again without end.
fn oom_loop(yard: &Yard) -> anyhow::Result<()> {
    let cage = Cage::new("soak-loop", 12 * MIB)?;
    for _ in 0..10 {
        if yard.is_over() {
            break;
        }
        let mut command = cage.command(&yard.workload)?;
        command.args(["burst", "--mib", "24"]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut child = command.spawn().context("failed to start a container")?;
        process::wait_at_most(&mut child, LIMIT)?;
    }
    cage.remove()
}

fn short_processes(yard: &Yard) -> anyhow::Result<()> {
    run_as_nobody(yard, &["loop", "exec", "--ms", "15000", "--per-s", "100"])
}

/// Memory taken and given back as fast as the kernel lets, for more stacks than there is a budget.
fn growth(yard: &Yard) -> anyhow::Result<()> {
    run_as_nobody(yard, &["loop", "fresh", "--ms", "10000"])
}

/// A file system that code was run from goes when its processes have gone.
fn unmount(yard: &Yard) -> anyhow::Result<()> {
    let dir = tempfile::tempdir_in(&yard.dir)?;
    let fs = dir.path();
    rustix::mount::mount("soak", fs, "tmpfs", rustix::mount::MountFlags::empty(), None).context("no tmpfs")?;
    let ran = (|| {
        let program = fs.join("workload");
        // By a process: while this one has it open for writing, its other threads start programs that inherit it.
        let copied = Command::new("cp").arg(&yard.workload).arg(&program).status()?;
        ensure!(copied.success(), "cp ended with {copied}");
        let mut child = Command::new(&program)
            .args(["burst", "--mib", "32", "--touch"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()?;
        process::wait_at_most(&mut child, LIMIT)
    })();
    let begin = Instant::now();
    loop {
        match rustix::mount::unmount(fs, rustix::mount::UnmountFlags::empty()) {
            Ok(()) => break,
            Err(error) if begin.elapsed() > LIMIT => {
                let _ = rustix::mount::unmount(fs, rustix::mount::UnmountFlags::DETACH);
                yard.fault(format!("a file system could not be unmounted for {LIMIT:?}: {error}"));
                bail!("it stays mounted: {error}");
            }
            Err(_) => std::thread::sleep(Duration::from_millis(200)),
        }
    }
    ran?;
    Ok(())
}
