//! Reading incidents and ledgers from the agent, for a user who may use its socket and not its files.
//!
//! One request is one connection. The agent is root's and its socket lies where only root can put
//! one; still its answers are bounded in size and time, so that a broken one costs an error and no
//! more.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use axum::body::{Body, Bytes, to_bytes};
use axum::http::{Request, StatusCode, header};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use memtrace_incident::codec::{MAX_JSON_BYTES, Unreadable};
use memtrace_incident::{Incident, served};
use tokio::net::UnixStream;

use super::config::{Config, Flags, READ};
use crate::host;
use crate::serve::MAX_LEDGER_BYTES;
use crate::store::incidents::ReadError;
use crate::store::ledger::{LedgerEntry, LedgerLines};
use crate::store::own_dir;

/// How long an answer may take in all. The agent itself gives up after a minute.
const ANSWER_LIMIT: Duration = Duration::from_secs(60);
/// Bytes of the head of an answer.
const HEAD_MAX: usize = 64 << 10;
/// Incidents that are asked for, most first: fewer when the answer would be too large.
const LISTED: [usize; 2] = [1000, 100];
/// Bytes of a line of a ledger: an answer that is shorter by more has the whole ledger.
const LEDGER_LINE_MAX: u64 = 64 << 10;

/// Where a verb reads incidents.
#[derive(Debug)]
pub(super) struct Sources {
    /// Directory of the files.
    pub(super) state_dir: PathBuf,
    /// The agent; `None` when it must not be asked.
    agent: Option<AgentClient>,
    /// Whether the agent is asked even if the files can be read.
    agent_first: bool,
    /// Whether the agent may be another than the one whose directory was named.
    agent_is_another: bool,
}

impl Sources {
    /// By the flags of a verb: `--socket` asks the agent, else files are read and the agent is
    /// asked when that is not permitted. The default socket is not asked for a directory that was
    /// named: it may be another agent's.
    pub(super) fn of(flags: &Flags<READ>) -> anyhow::Result<Self> {
        let config = Config::load(None, flags)?;
        let (agent_first, dir_named) = (config.is_given("socket"), config.is_given("state_dir"));
        let parsed = config.parse()?;
        let agent = parsed.socket.map(|path| AgentClient { path, limit: ANSWER_LIMIT });
        Ok(Self { state_dir: parsed.state_dir, agent, agent_first, agent_is_another: dir_named && !agent_first })
    }

    /// What `files` finds in the state directory, or `ask` at the agent. Without a right to either
    /// the error says so of both.
    pub(super) fn read<T>(
        &self,
        files: impl FnOnce(&Path) -> anyhow::Result<T>,
        ask: impl FnOnce(&AgentClient) -> anyhow::Result<T>,
    ) -> anyhow::Result<T> {
        if let Some(agent) = self.agent.as_ref().filter(|_| self.agent_first) {
            return ask(agent);
        }
        let denied = match files(&self.state_dir) {
            Err(error) if is_denied(&error) => error,
            read => return read,
        };
        match &self.agent {
            Some(_) if self.agent_is_another => {
                Err(anyhow!("{denied:#} (try sudo, or name the socket of its agent with --socket)"))
            }
            Some(agent) => ask(agent).map_err(|error| anyhow!("{denied:#}; {error:#}")),
            None => Err(anyhow!("{denied:#} (try sudo)")),
        }
    }
}

/// Whether a file or directory could not be read for want of a right.
fn is_denied(error: &anyhow::Error) -> bool {
    let denied = |error: &io::Error| error.kind() == io::ErrorKind::PermissionDenied;
    let of_file = error.downcast_ref::<ReadError>().is_some_and(ReadError::is_denied);
    of_file || error.chain().filter_map(|cause| cause.downcast_ref()).any(denied)
}

/// The agent behind a socket.
#[derive(Debug)]
pub(super) struct AgentClient {
    path: PathBuf,
    /// For one answer.
    limit: Duration,
}

impl AgentClient {
    /// Where it is, for messages.
    pub(super) fn place(&self) -> String {
        format!("the agent at {}", self.path.display())
    }

    /// The newest incidents, without their large parts, and whether the agent may have more.
    pub(super) fn list(&self) -> anyhow::Result<(Vec<Incident>, bool)> {
        let mut error = None;
        for most in LISTED {
            match self.get(&format!("/api/incidents?limit={most}")).and_then(|(_, json)| Ok(served::list(&json)?)) {
                Ok(found) => {
                    let more = found.len() >= most;
                    return Ok((found, more));
                }
                Err(too_large) if matches!(too_large.downcast_ref(), Some(Unreadable::TooLarge { .. })) => {
                    error = Some(too_large);
                }
                Err(error) => return Err(error.context(format!("failed to list incidents of {}", self.place()))),
            }
        }
        Err(error.unwrap_or_else(|| anyhow!("no incidents")))
    }

    /// The newest entries of a ledger, oldest first, and whether the agent may have more.
    pub(super) fn ledger<E: LedgerEntry>(&self) -> anyhow::Result<(LedgerLines<E>, bool)> {
        let name = E::FILE.trim_end_matches(".jsonl");
        let (found, lines) = self.get(&format!("/api/{name}"))?;
        if !found {
            bail!("{} is older than this memtrace and serves no {name}; update it, or try sudo", self.place());
        }
        let more = lines.len() as u64 > MAX_LEDGER_BYTES.saturating_sub(LEDGER_LINE_MAX);
        Ok((LedgerLines::parse(&lines), more))
    }

    /// One whole incident: `latest`, or an id or the beginning of one, which has no character that
    /// a URL would have to escape.
    pub(super) fn incident(&self, id: &str) -> anyhow::Result<Incident> {
        let (found, json) = self.get(&format!("/api/incidents/{id}"))?;
        if !found {
            bail!(
                "{} has no incident {id}, or several that begin with it; `memtrace incidents` lists them",
                self.place()
            );
        }
        served::incident(&json).with_context(|| format!("failed to read incident {id} of {}", self.place()))
    }

    /// The body of an answer, and whether there is such a thing (200, not 404).
    fn get(&self, target: &str) -> anyhow::Result<(bool, Bytes)> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("failed to start the runtime")?;
        let answer = runtime.block_on(async { tokio::time::timeout(self.limit, self.exchange(target)).await });
        let late =
            |_| anyhow!("{} did not answer within {} s; its log may say why", self.place(), self.limit.as_secs());
        let (status, body) = answer.map_err(late)??;
        match status {
            StatusCode::OK => Ok((true, body)),
            StatusCode::NOT_FOUND => Ok((false, body)),
            status => {
                let said: String =
                    String::from_utf8_lossy(&body).chars().filter(|c| !c.is_control()).take(200).collect();
                bail!("{} answered {status}: {said}", self.place())
            }
        }
    }

    async fn exchange(&self, target: &str) -> anyhow::Result<(StatusCode, Bytes)> {
        // Where others can put one, they can answer in the agent's place.
        if let Some(uid) = fs::symlink_metadata(&self.path).ok().and_then(|found| own_dir::stranger(&found)) {
            bail!("{} belongs to user {uid}, not to root: it is no agent's", self.path.display());
        }
        let stream = UnixStream::connect(&self.path).await.map_err(|error| self.unreachable(&error))?;
        let broken = || format!("{} gave no answer that is HTTP", self.place());
        let handshake = http1::Builder::new().max_buf_size(HEAD_MAX).handshake(TokioIo::new(stream));
        let (mut sender, connection) = handshake.await.with_context(broken)?;
        // Ends with the runtime.
        tokio::spawn(connection);
        let request = Request::get(target).header(header::HOST, "localhost").header(header::CONNECTION, "close");
        let request = request.body(Body::empty()).with_context(|| format!("failed to ask for {target}"))?;
        let answer = sender.send_request(request).await.with_context(broken)?;
        let length = answer.headers().get(header::CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse().ok());
        if length.is_some_and(|length: u64| length > MAX_JSON_BYTES) {
            return Err(Unreadable::TooLarge { what: "the answer", limit: MAX_JSON_BYTES }.into());
        }
        let status = answer.status();
        let body = to_bytes(Body::new(answer.into_body()), usize::try_from(MAX_JSON_BYTES)?).await;
        Ok((status, body.with_context(|| format!("{} did not answer to the end", self.place()))?))
    }

    /// Why the socket cannot be connected to, and the way out.
    fn unreachable(&self, error: &io::Error) -> anyhow::Error {
        let path = self.path.display();
        match error.kind() {
            io::ErrorKind::NotFound => {
                anyhow!("no agent serves {path}: start one, name its socket with --socket, or try sudo")
            }
            io::ErrorKind::ConnectionRefused => {
                anyhow!("no agent listens at {path}: the one that did has ended; start it again")
            }
            io::ErrorKind::PermissionDenied => {
                let gid = fs::metadata(&self.path).ok().map(|found| found.gid());
                let group = gid.map_or_else(
                    || "its group".to_owned(),
                    |gid| host::group_name(gid).map_or_else(|| format!("group {gid}"), |name| format!("group {name}")),
                );
                anyhow!("no permission to use {path}: it is for root and {group}; join that group or try sudo")
            }
            io::ErrorKind::WouldBlock => anyhow!("the agent at {path} is busy with other clients; try again"),
            _ => anyhow!("failed to connect to {path}: {error}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixListener;

    use memtrace_incident::fixtures;
    use memtrace_report::json;

    use super::*;

    /// A client of something that answers this, once.
    fn answering(dir: &Path, answer: Vec<u8>) -> AgentClient {
        let path = dir.join("socket");
        let _ = fs::remove_file(&path);
        let listener = UnixListener::bind(&path).unwrap();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let _ = stream.read(&mut [0; 4096]);
            let _ = stream.write_all(&answer);
        });
        AgentClient { path, limit: ANSWER_LIMIT }
    }

    fn http(status: &str, body: &[u8]) -> Vec<u8> {
        let head = format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\n\r\n", body.len());
        [head.as_bytes(), body].concat()
    }

    #[test]
    fn an_agent_is_asked_for_a_list_and_for_one() {
        let dir = tempfile::tempdir().unwrap();
        let burst = fixtures::burst();
        let text = json::list([&burst]).unwrap();
        let (found, more) = answering(dir.path(), http("200 OK", text.as_bytes())).list().unwrap();
        assert!(found.len() == 1 && found[0].id == burst.id && !more);
        let text = json::incident(&burst).unwrap();
        assert_eq!(answering(dir.path(), http("200 OK", text.as_bytes())).incident("latest").unwrap(), burst);
    }

    #[test]
    fn what_goes_wrong_is_said_with_the_way_out() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        let error = |client: &AgentClient| format!("{:#}", client.incident("latest").unwrap_err());
        for (answer, said) in [
            (http("404 Not Found", b"no such incident\n"), "has no incident latest"),
            (
                http("503 Service Unavailable", b"the agent is \x1bstopping\n"),
                "503 Service Unavailable: the agent is stopping",
            ),
            (http("200 OK", b"[]"), "not a memtrace incident"),
            (b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n".to_vec(), "larger than the 64 MiB"),
            (b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nx".to_vec(), "did not answer to the end"),
            (b"SSH-2.0\r\n\r\n".to_vec(), "no answer that is HTTP"),
            ([b"HTTP/1.1 200 OK\r\nx: ".to_vec(), vec![b'y'; HEAD_MAX * 2]].concat(), "no answer that is HTTP"),
        ] {
            let error = error(&answering(dir, answer));
            assert!(error.contains(said), "{said}: {error}");
        }
        let silent = dir.join("silent");
        let listener = UnixListener::bind(&silent).unwrap();
        let client = AgentClient { path: silent, limit: Duration::from_millis(100) };
        assert!(error(&client).contains("did not answer within"), "{}", error(&client));
        drop(listener);
        assert!(error(&client).contains("the one that did has ended"), "{}", error(&client));
        let client = AgentClient { path: dir.join("none"), limit: ANSWER_LIMIT };
        assert!(error(&client).contains("no agent serves"), "{}", error(&client));
        let denied = client.unreachable(&io::ErrorKind::PermissionDenied.into()).to_string();
        assert!(denied.contains("join that group"), "{denied}");
    }

    #[test]
    fn the_agent_is_asked_when_files_are_denied_or_when_it_is_named() {
        let sources = |given: &[(&'static str, &str)]| {
            let given: Vec<_> = given.iter().map(|(key, text)| (*key, OsStr::new(*text))).collect();
            Sources::of(&Flags::with(&given)).unwrap()
        };
        let read = |given: &[(&'static str, &str)], files: Option<io::ErrorKind>| {
            let files = |_: &Path| match files {
                None => Ok("files".to_owned()),
                Some(kind) => Err(anyhow::Error::new(io::Error::from(kind)).context("failed to list")),
            };
            sources(given).read(files, |agent| Ok(agent.place())).map_err(|error| error.to_string())
        };
        let denied = Some(io::ErrorKind::PermissionDenied);
        assert_eq!(read(&[], None).unwrap(), "files");
        assert_eq!(read(&[], denied).unwrap(), "the agent at /run/memtrace.sock");
        assert!(read(&[], Some(io::ErrorKind::InvalidData)).unwrap_err().contains("failed to list"));
        assert_eq!(read(&[("socket", "/x")], None).unwrap(), "the agent at /x");
        assert_eq!(read(&[("socket", "/x"), ("state_dir", "/s")], denied).unwrap(), "the agent at /x");
        assert!(read(&[("state_dir", "/s")], denied).unwrap_err().contains("name the socket of its agent"));
        assert!(read(&[("socket", "off")], denied).unwrap_err().ends_with("(try sudo)"));
        let both = sources(&[])
            .read::<()>(|_| Err(io::Error::from(io::ErrorKind::PermissionDenied).into()), |_| Err(anyhow!("no agent")));
        let both = both.unwrap_err().to_string();
        assert!(both.contains("denied") && both.ends_with("; no agent"), "{both}");
    }
}
