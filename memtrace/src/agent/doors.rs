//! Where clients of the agent come in: the TCP address, the unix socket, and the token that TCP
//! asks for.

use std::fs::Metadata;
use std::io::Read;
use std::net::SocketAddr;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use anyhow::{Context, bail};
use tokio::net::TcpSocket;
use tracing::warn;

use super::AgentConfig;
use super::unix_socket::{self, DEFAULT_SOCKET, SocketFile};
use crate::serve::{Listeners, Token};
use crate::store::own_dir;

/// Bytes of a token file that are read at most.
const TOKEN_FILE_MAX: u64 = 4096;
/// Connections that wait to be accepted; the kernel bounds it by net.core.somaxconn, 4096 as well
/// since 5.4. A client beyond it is answered a second late: TCP sends its request to connect again.
const BACKLOG: u32 = 4096;
/// What the kernel takes of a client before it is read, about: more than a head.
const RECEIVE_BYTES: u32 = 32 << 10;
/// Permissions that a token file must not give: to write for the group, to read or write for
/// everybody.
const OTHERS: u32 = 0o026;

/// Listeners that nobody has been answered at yet.
pub(super) struct Doors {
    /// For the server's thread.
    pub(super) listeners: Listeners,
    /// What TCP asks for; `None` when no token is configured.
    pub(super) token: Option<Token>,
    /// Removes the socket when it is dropped.
    pub(super) socket_file: Option<SocketFile>,
    /// For the log.
    pub(super) address: String,
    /// For the log.
    pub(super) socket: String,
}

impl Doors {
    /// Listens as configured.
    ///
    /// Fails when something that was asked for cannot be had. The default socket was not asked for:
    /// that it cannot be had (a second agent, a file system that is read-only) is logged, and keeps
    /// no recorder from running.
    pub(super) fn open(config: &AgentConfig) -> anyhow::Result<Self> {
        let token = config.token_file.as_deref().map(read_token).transpose()?;
        let tcp = config.listen.map(listen).transpose()?;
        let bound = tcp.as_ref().and_then(|listener| listener.local_addr().ok());
        if let Some(address) = bound.filter(|address| token.is_none() && !address.ip().to_canonical().is_loopback()) {
            warn!("at {address} other machines get health and metrics only; --token-file FILE serves the rest");
        }
        let (socket, socket_file) = match &config.socket {
            None => (None, None),
            Some(path) => match unix_socket::open(path, config.socket_group.as_deref()) {
                Ok((listener, file)) => (Some(listener), Some(file)),
                Err(error) if path == Path::new(DEFAULT_SOCKET) => {
                    warn!("no unix socket at {DEFAULT_SOCKET}: {error:#}; `--socket off` asks for none");
                    (None, None)
                }
                Err(error) => return Err(error.context(format!("failed to serve the socket {}", path.display()))),
            },
        };
        let off = || "off".to_owned();
        let socket_path = config.socket.as_ref().filter(|_| socket.is_some());
        Ok(Self {
            address: bound.map_or_else(off, |address| address.to_string()),
            socket: socket_path.map_or_else(off, |path| path.display().to_string()),
            listeners: Listeners { tcp, socket },
            token,
            socket_file,
        })
    }
}

/// A listener that the server's thread takes over. For a runtime only.
fn listen(address: SocketAddr) -> anyhow::Result<std::net::TcpListener> {
    let made = || {
        let socket = if address.is_ipv6() { TcpSocket::new_v6() } else { TcpSocket::new_v4() }?;
        socket.set_reuseaddr(true)?;
        // accepted ones have it from the listener
        socket.set_recv_buffer_size(RECEIVE_BYTES)?;
        socket.bind(address)?;
        socket.listen(BACKLOG)?.into_std()
    };
    made().with_context(|| format!("failed to listen on {address}; choose another address with --listen"))
}

/// Reads the token. Whoever can read the file has the right, and whoever can write it gives it, so
/// its owner and mode are looked at.
fn read_token(path: &Path) -> anyhow::Result<Token> {
    token_in(path).with_context(|| format!("failed to use the token file {}", path.display()))
}

fn token_in(path: &Path) -> anyhow::Result<Token> {
    let file = own_dir::read(path)?;
    check(&file.metadata()?)?;
    let mut text = String::new();
    if file.take(TOKEN_FILE_MAX + 1).read_to_string(&mut text)? as u64 > TOKEN_FILE_MAX {
        bail!("it is larger than {TOKEN_FILE_MAX} bytes; a token is one line");
    }
    let line = text.strip_suffix('\n').unwrap_or(&text);
    Token::new(line.strip_suffix('\r').unwrap_or(line)).map_err(anyhow::Error::msg)
}

fn check(found: &Metadata) -> anyhow::Result<()> {
    if let Some(uid) = own_dir::stranger(found) {
        bail!("it belongs to user {uid}; give it to root (chown root)");
    }
    if found.mode() & OTHERS != 0 {
        bail!("others may read it or its group may write it (mode {:04o}); chmod 600 it", found.mode() & 0o7777);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};
    use std::os::unix::fs::{PermissionsExt, chown};

    use super::*;

    #[test]
    fn a_token_file_is_one_line_that_no_stranger_reads_or_writes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("token");
        let written = |text: &str, mode: u32| {
            fs::write(&path, text).unwrap();
            fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
            read_token(&path).map(drop).map_err(|error| format!("{error:#}"))
        };
        for good in ["0123456789abcdef", "0123456789abcdef\n", "0123456789abcdef\r\n"] {
            for mode in [0o600, 0o640, 0o400] {
                assert_eq!(written(good, mode), Ok(()), "{good:?} {mode:o}");
            }
        }
        for (text, said) in [
            ("", "16 to 1024"),
            ("short\n", "16 to 1024"),
            ("0123456789abcdef\n0123456789abcdef\n", "one line"),
            ("0123456789abcdef \n", "one line"),
        ] {
            let error = written(text, 0o600).unwrap_err();
            assert!(error.contains("token file") && error.contains(said), "{text:?}: {error}");
        }
        assert!(written(&"x".repeat(5000), 0o600).unwrap_err().contains("larger than 4096 bytes"));
        for mode in [0o644, 0o604, 0o620, 0o602] {
            assert!(written("0123456789abcdef", mode).unwrap_err().contains("chmod 600"), "{mode:o}");
        }
        assert_eq!(written("0123456789abcdef", 0o600), Ok(()));
        if chown(&path, Some(12_345), None).is_ok() {
            assert!(format!("{:#}", read_token(&path).unwrap_err()).contains("belongs to user 12345"));
        }
        assert!(format!("{:#}", read_token(dir.path()).unwrap_err()).contains("not a regular file"));
        assert!(read_token(&dir.path().join("none")).is_err());
    }
}
