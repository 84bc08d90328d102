//! Who may ask the agent what: the unix socket by its mode, TCP by address and token.

#![allow(clippy::indexing_slicing, reason = "a panic is how a test fails")]

use std::fs::{self, Permissions};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Output, Stdio};
use std::time::Duration;

use anyhow::{Context, ensure};
use memtrace_tests::address::OwnAddress;
use memtrace_tests::agent::{self, AgentOptions, free_port};
use memtrace_tests::cage::Cage;
use memtrace_tests::figures::not_run_here;
use memtrace_tests::json;
use memtrace_tests::process;
use memtrace_tests::programs::{self, require_root};
use rustix::process::Signal;

/// The group of the socket, and a user who is in no group but their own.
const GROUP: u32 = 12_399;
const USER: u32 = 12_345;
const TOKEN: &str = "correct-horse-battery";
/// Clients that connect at once.
const CLIENTS: usize = 2000;
/// What is answered to everybody.
const OPEN: [&str; 3] = ["/healthz", "/readyz", "/metrics"];
/// What is not.
const GUARDED: [&str; 7] =
    ["/", "/api/incidents", "/api/kills", "/api/sigkills", "/api/processes", "/api/cgroups", "/none"];

/// A directory that everybody may enter.
fn open_dir() -> anyhow::Result<tempfile::TempDir> {
    let dir = tempfile::tempdir()?;
    fs::set_permissions(dir.path(), Permissions::from_mode(0o755))?;
    Ok(dir)
}

fn text(path: &Path) -> anyhow::Result<&str> {
    path.to_str().context("a path that is not text")
}

/// Runs `memtrace` as a user without privileges, in this group alone.
fn as_user(group: u32, arguments: &[&str]) -> anyhow::Result<Output> {
    let mut command = programs::memtrace_command()?;
    command.args(arguments).uid(USER).gid(group).current_dir("/").stdin(Stdio::null());
    command.output().context("failed to run memtrace")
}

/// It ended with 1 and said each of `words`.
fn refused(output: &Output, words: &[&str]) -> anyhow::Result<()> {
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.code() == Some(1), "ended with {}:\n{said}", output.status);
    for word in words {
        ensure!(said.contains(word), "does not say {word:?}:\n{said}");
    }
    Ok(())
}

/// Runs an agent that must end by itself with code 1, and returns what it said.
fn fails(options: &AgentOptions) -> anyhow::Result<String> {
    let mut child = options.command(free_port()?)?.spawn().context("failed to start the agent")?;
    let ended = process::wait_at_most(&mut child, Duration::from_secs(60));
    if ended.is_err() {
        child.kill()?;
    }
    let output = child.wait_with_output()?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.code() == Some(1), "ended with {}:\n{said}", output.status);
    Ok(said)
}

/// Status of a GET at the unix socket.
fn ask_socket(path: &Path, target: &str) -> anyhow::Result<String> {
    let mut stream = UnixStream::connect(path).with_context(|| format!("failed to connect to {}", path.display()))?;
    write!(stream, "GET {target} HTTP/1.1\r\nHost: any.example\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer.split(' ').nth(1).unwrap_or_default().to_owned())
}

#[test]
fn members_of_the_group_read_incidents_through_the_socket_and_nobody_else_does() -> anyhow::Result<()> {
    require_root()?;
    let dir = open_dir()?;
    let options = AgentOptions::below(dir.path()).with(&["--socket-group", &GROUP.to_string(), "--after", "300ms"]);
    let socket = text(&options.socket)?.to_owned();
    let mut agent = options.start()?;
    let found = fs::symlink_metadata(&socket)?;
    ensure!(found.file_type().is_socket(), "it is no socket");
    let owned = (found.uid(), found.gid(), found.mode() & 0o7777);
    ensure!(owned == (0, GROUP, 0o660), "owner, group and mode are {owned:?}");

    let cage = Cage::new("doors", 24 << 20)?;
    cage.command(programs::path("workload")?)?.args(["burst", "--mib", "48"]).stdout(Stdio::null()).status()?;
    let id = cage.id();
    cage.remove()?;
    let ours = |incident: &serde_json::Value| incident.pointer("/cgroup/id").and_then(|id| id.as_u64()) == Some(id);
    let listed = options.incidents_when(Duration::from_secs(60), |listed| listed.iter().any(ours))?;
    let incident = listed.iter().find(|incident| ours(incident)).context("the kill has no incident")?;
    let id = json::text(incident, "/id")?;

    let listed = as_user(GROUP, &["incidents", "--json", "--socket", &socket])?;
    let said = String::from_utf8_lossy(&listed.stderr);
    ensure!(listed.status.success(), "a member gets {}: {said}", listed.status);
    ensure!(String::from_utf8_lossy(&listed.stdout).contains(id), "a member does not see {id}");
    let report = as_user(GROUP, &["report", id, "--socket", &socket])?;
    let said = String::from_utf8_lossy(&report.stdout);
    ensure!(report.status.success() && said.contains("OOM kill"), "a member gets {}: {said}", report.status);
    let kills = as_user(GROUP, &["incidents", "--kills", "--json", "--socket", &socket])?;
    let said = String::from_utf8_lossy(&kills.stderr);
    ensure!(kills.status.success(), "a member gets {}: {said}", kills.status);
    ensure!(String::from_utf8_lossy(&kills.stdout).contains(id), "a member does not see the kill of {id}");
    let none = as_user(GROUP, &["report", "0123456789", "--socket", &socket])?;
    refused(&none, &["has no incident 0123456789"])?;

    // Who is not in the group gets nothing: from the socket, from the files, or from the socket
    // that files lead to.
    let group = format!("group {GROUP}");
    for verb in [&["incidents"][..], &["incidents", "--kills"], &["report", "latest"]] {
        let arguments = [verb, &["--socket", &socket]].concat();
        refused(&as_user(USER, &arguments)?, &["no permission to use", &socket, &group, "sudo"])?;
        let arguments = [verb, &["--state-dir", text(&options.state_dir)?]].concat();
        refused(&as_user(GROUP, &arguments)?, &["denied", "sudo", "--socket"])?;
    }
    agent.stop()?;
    ensure!(!Path::new(&socket).exists(), "the socket is still there");
    refused(&as_user(GROUP, &["incidents", "--socket", &socket])?, &["no agent serves", &socket])?;
    Ok(())
}

#[test]
fn a_socket_of_a_dead_agent_is_replaced_and_nothing_else_is() -> anyhow::Result<()> {
    require_root()?;
    let dir = open_dir()?;
    let options = AgentOptions::below(dir.path());
    let mut agent = options.start()?;
    // A second one, with directories of its own, does not take it away.
    let mut second = AgentOptions::below(&dir.path().join("second"));
    second.socket.clone_from(&options.socket);
    let said = fails(&second)?;
    let pid = format!("another memtrace agent (pid {})", agent.pid());
    ensure!(said.contains(&pid) && said.contains("--socket"), "the second said:\n{said}");
    ensure!(ask_socket(&options.socket, "/api/incidents")? == "200", "the first has lost its socket");
    agent.kill_9()?;
    let refused = UnixStream::connect(&options.socket).err().map(|error| error.kind());
    ensure!(refused == Some(std::io::ErrorKind::ConnectionRefused), "the dead agent left {refused:?}");
    let mut agent = options.start()?;
    ensure!(ask_socket(&options.socket, "/readyz")? == "200", "the stale socket was not replaced");
    agent.stop()?;

    fs::write(&options.socket, "precious")?;
    let said = fails(&options)?;
    ensure!(said.contains("is not a socket") && said.contains(text(&options.socket)?), "it said:\n{said}");
    ensure!(fs::read(&options.socket)? == b"precious", "the file is gone");
    fs::remove_file(&options.socket)?;
    fs::set_permissions(dir.path(), Permissions::from_mode(0o777))?;
    let said = fails(&options)?;
    ensure!(said.contains("everybody may write to it"), "it said:\n{said}");
    Ok(())
}

#[test]
fn from_other_addresses_only_health_and_metrics_are_answered_without_the_token() -> anyhow::Result<()> {
    require_root()?;
    let dir = open_dir()?;
    let other = OwnAddress::add()?;
    let mut options = AgentOptions::below(dir.path());
    options.listen = Ipv4Addr::UNSPECIFIED;
    let mut agent = options.start()?;
    let at = |ip: Ipv4Addr, port: u16| SocketAddr::from((ip, port));
    let (near, far) = (at(Ipv4Addr::LOCALHOST, agent.port()), at(other.ip(), agent.port()));
    let ask = |address, path: &str, headers: &str| anyhow::Ok(agent::request(address, path, headers)?.0);
    for path in OPEN {
        ensure!(ask(near, path, "")? == 200 && ask(far, path, "")? == 200, "{path} is not answered");
    }
    for path in GUARDED {
        let (status, said) = agent::request(far, path, "")?;
        ensure!(status == 403 && said.contains("--token-file"), "{path} from {far}: {status} {said}");
        ensure!(ask(near, path, "")? == if path == "/none" { 404 } else { 200 }, "{path} on loopback");
    }
    let refused = agent.metric("memtrace_http_refused_total{reason=\"not_here\"}")?;
    ensure!(refused == Some(GUARDED.len() as f64), "{refused:?} refusals were counted");
    agent.stop()?;

    let file = dir.path().join("token");
    fs::write(&file, format!("{TOKEN}\n"))?;
    let options = options.with(&["--token-file", text(&file)?]);
    fs::set_permissions(&file, Permissions::from_mode(0o644))?;
    let said = fails(&options)?;
    ensure!(said.contains(text(&file)?) && said.contains("chmod 600"), "it said:\n{said}");
    fs::set_permissions(&file, Permissions::from_mode(0o600))?;
    let mut agent = options.start()?;
    let (near, far) = (at(Ipv4Addr::LOCALHOST, agent.port()), at(other.ip(), agent.port()));
    let bearer = |token: &str| format!("Authorization: Bearer {token}\r\n");
    // `any:correct-horse-battery`, as a browser sends it.
    let password = "Authorization: Basic YW55OmNvcnJlY3QtaG9yc2UtYmF0dGVyeQ==\r\n";
    for address in [near, far] {
        for path in OPEN {
            ensure!(ask(address, path, "")? == 200, "{path} is not answered at {address}");
        }
        for path in GUARDED {
            let right = if path == "/none" { 404 } else { 200 };
            for (headers, status) in [
                ("", 401),
                (&*bearer("correct-horse-batterx"), 401),
                (&*bearer(&TOKEN[..16]), 401),
                (&*bearer(TOKEN), right),
                (password, right),
            ] {
                let got = ask(address, path, headers)?;
                ensure!(got == status, "{path} at {address} with {headers:?}: {got}");
            }
        }
    }
    ensure!(ask_socket(&options.socket, "/api/incidents")? == "200", "the socket asks for a token");
    let wrong = agent.metric("memtrace_http_refused_total{reason=\"wrong_token\"}")?;
    let tried = 2.0 * 2.0 * GUARDED.len() as f64;
    ensure!(wrong == Some(tried), "{wrong:?} of {tried} wrong tokens were counted");
    ensure!(agent.comes_to_say("wrong token"), "wrong tokens are not logged");
    agent.stop()?;
    let logged = agent.stderr().lines().filter(|line| line.contains("wrong token")).count();
    ensure!((1..10).contains(&logged), "wrong tokens are {logged} lines of the log");
    ensure!(!agent.stderr().contains("correct-horse"), "the log has the token");
    Ok(())
}

/// A request to connect that finds no room is sent again after a second: health would be late.
#[test]
fn two_thousand_connect_while_the_agent_stands_still() -> anyhow::Result<()> {
    require_root()?;
    process::allow_files(2 * CLIENTS as u64)?;
    let room: usize = fs::read_to_string("/proc/sys/net/core/somaxconn")?.trim().parse()?;
    if room <= CLIENTS {
        not_run_here("thousands of clients", format!("net.core.somaxconn is {room}"));
        return Ok(());
    }
    let dir = open_dir()?;
    let mut agent = AgentOptions::below(dir.path()).start()?;
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, agent.port()));
    process::stop(agent.pid())?;
    // long enough to send again several times, which helps nobody while the agent stands still
    let connect = |_| TcpStream::connect_timeout(&address, Duration::from_secs(10));
    let clients = (0..CLIENTS).map(connect).collect::<Result<Vec<_>, _>>();
    process::signal(agent.pid(), Signal::CONT)?;
    let clients = clients.context("a client was not let in")?;
    ensure!(agent.get("/healthz")?.0 == 200, "it is not healthy");
    drop(clients);
    ensure!(agent.stop()?.success(), "the agent did not end well");
    Ok(())
}
