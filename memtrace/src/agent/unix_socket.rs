//! The unix socket for tools on this machine. Its mode (0660) and group decide who may ask, so it
//! must never be open wider, and nobody may put another in its place: its directory belongs to root
//! and only root can change what is in it.
//!
//! A lock beside it (`PATH.lock`) says whose it is. The agent that holds the lock replaces what a
//! dead one has left and removes the socket when it stops; a second agent finds the lock taken.

use std::fs::{self, Metadata, Permissions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, chown};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow, bail};
use rustix::fs::{Mode, fchmod};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, socket_with};
use rustix::process::{getegid, geteuid};
use tracing::warn;

use super::sinks::{Lock, Taken};
use crate::host;
use crate::store::own_dir;

/// Where it is unless it is configured.
pub const DEFAULT_SOCKET: &str = "/run/memtrace.sock";
/// The group that may use it unless another is configured, where there is such a group.
const DEFAULT_GROUP: &str = "memtrace";
const MODE: u32 = 0o660;
/// Of a directory that is created for it.
const DIR_MODE: u32 = 0o755;
/// Connections that wait to be accepted.
const BACKLOG: i32 = 64;

/// The socket in the file system; removed when this is dropped.
#[derive(Debug)]
pub(super) struct SocketFile {
    path: PathBuf,
    /// Device and inode.
    place: Option<(u64, u64)>,
    _lock: Lock,
}

/// Listens at `path`, for `group`: a name, a number, or `None` for the default.
///
/// Fails when the directory is not safe, another agent or program listens there, or what is there
/// is no socket.
pub(super) fn open(path: &Path, group: Option<&str>) -> anyhow::Result<(UnixListener, SocketFile)> {
    let dir = path.parent().context("it has no directory")?;
    own_dir::create(dir, DIR_MODE).with_context(|| format!("failed to use the directory {}", dir.display()))?;
    // Who can make files beside it can be in its place before it, and keep its lock.
    if own_dir::is_shared(&fs::metadata(dir)?) {
        bail!("others may write to {}; choose a directory of root's", dir.display());
    }
    let gid = group_id(group)?;
    let lock = match Lock::take_file(&beside(path, "lock"))? {
        Taken::Held(lock) => lock,
        Taken::ByAnother(pid) => {
            let pid = pid.map_or_else(String::new, |pid| format!(" (pid {pid})"));
            bail!("another memtrace agent{pid} serves it; stop that one or choose another path with --socket");
        }
    };
    let new = beside(path, "new");
    if is_stale(&new)? {
        fs::remove_file(&new).with_context(|| format!("failed to remove {}", new.display()))?;
    }
    is_stale(path)?;
    let listener = listen_at(&new)?;
    if let Err(error) = chown(&new, None, Some(gid)) {
        warn!("the unix socket stays with the agent's own group, not {gid} ({error}); give CAP_CHOWN");
    }
    let made = fs::set_permissions(&new, Permissions::from_mode(MODE))
        .context("failed to set its mode")
        .and_then(|()| fs::rename(&new, path).context("failed to put it in its place"));
    if let Err(error) = made {
        let _ = fs::remove_file(&new);
        return Err(error);
    }
    let place = fs::symlink_metadata(path).ok().as_ref().map(place);
    Ok((listener, SocketFile { path: path.to_owned(), place, _lock: lock }))
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        // Only what this run has made. That a file stays is no harm: the next start replaces it.
        let found = fs::symlink_metadata(&self.path).ok().as_ref().map(place);
        if found.is_some() && found == self.place {
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn place(found: &Metadata) -> (u64, u64) {
    (found.dev(), found.ino())
}

/// `PATH.ENDING`.
fn beside(path: &Path, ending: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".");
    name.push(ending);
    name.into()
}

/// The group that gets the socket. Without a name it is [`DEFAULT_GROUP`], and where there is none
/// root's, or the process' own.
fn group_id(named: Option<&str>) -> anyhow::Result<u32> {
    match named {
        Some(name) => match name.parse().ok().or_else(|| host::group_id(name)) {
            Some(gid) => Ok(gid),
            None => bail!("there is no group `{name}` in /etc/group; make it (groupadd {name}) or give its number"),
        },
        None if geteuid().is_root() => Ok(host::group_id(DEFAULT_GROUP).unwrap_or(0)),
        None => Ok(getegid().as_raw()),
    }
}

/// Whether a socket is there that nobody listens to. Fails when something else is there, or
/// somebody listens.
fn is_stale(path: &Path) -> anyhow::Result<bool> {
    let found = match fs::symlink_metadata(path) {
        Ok(found) => found,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error).with_context(|| format!("failed to look at {}", path.display())),
    };
    if !found.file_type().is_socket() {
        bail!("{} is not a socket; remove it or choose another path with --socket", path.display());
    }
    if let Some(uid) = own_dir::stranger(&found) {
        bail!("{} belongs to user {uid}; remove it or choose another path with --socket", path.display());
    }
    let probe =
        socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC, None)?;
    match connect(&probe, &SocketAddrUnix::new(path)?) {
        Err(Errno::CONNREFUSED) => Ok(true),
        // Somebody listens, has no time, or expects another kind of client.
        _ => bail!("{} is used by another program; choose another path with --socket", path.display()),
    }
}

/// Listens at a path where nothing is. The file is the owner's alone: the kernel gives it the mode
/// of the socket (net/unix/af_unix.c `unix_bind_bsd`), whatever the umask of this process is.
fn listen_at(path: &Path) -> anyhow::Result<UnixListener> {
    let address = SocketAddrUnix::new(path).map_err(|error| match error {
        Errno::NAMETOOLONG => anyhow!("the path is longer than an address of a socket can be; choose a shorter one"),
        error => error.into(),
    })?;
    let socket: OwnedFd = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    fchmod(&socket, Mode::RUSR | Mode::WUSR).context("failed to set the mode of a socket")?;
    bind(&socket, &address).with_context(|| format!("failed to make {}", path.display()))?;
    listen(&socket, BACKLOG).context("failed to listen")?;
    Ok(socket.into())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;
    use std::os::unix::net::UnixStream;

    use super::*;

    fn refusal(path: &Path) -> String {
        format!("{:#}", open(path, None).unwrap_err())
    }

    #[test]
    fn it_is_for_owner_and_group_and_gone_when_its_agent_is() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run/agent.sock");
        let own = getegid().as_raw().to_string();
        let (listener, file) = open(&path, Some(&own)).unwrap();
        let found = fs::symlink_metadata(&path).unwrap();
        assert!(found.file_type().is_socket());
        assert_eq!((found.mode() & 0o7777, found.gid().to_string()), (MODE, own));
        UnixStream::connect(&path).unwrap();
        assert!(refusal(&path).contains(&format!("another memtrace agent (pid {})", std::process::id())));
        UnixStream::connect(&path).unwrap();
        drop((listener, file));
        assert!(!path.exists());
        // What another has put there since stays.
        let (_listener, file) = open(&path, None).unwrap();
        fs::remove_file(&path).unwrap();
        fs::write(&path, "another's").unwrap();
        drop(file);
        assert_eq!(fs::read(&path).unwrap(), b"another's");
    }

    #[test]
    fn only_a_socket_that_nobody_listens_to_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent.sock");
        // What one that was killed leaves, at either step.
        drop(UnixListener::bind(&path).unwrap());
        drop(UnixListener::bind(beside(&path, "new")).unwrap());
        drop(open(&path, None).unwrap());
        for at in [path.clone(), beside(&path, "new")] {
            fs::write(&at, "precious").unwrap();
            assert!(refusal(&path).contains("is not a socket; remove it"), "{}", refusal(&path));
            assert_eq!(fs::read(&at).unwrap(), b"precious");
            fs::remove_file(&at).unwrap();
        }
        symlink(dir.path().join("elsewhere"), &path).unwrap();
        assert!(refusal(&path).contains("is not a socket"), "a link is not followed");
        fs::remove_file(&path).unwrap();
        let another = UnixListener::bind(&path).unwrap();
        assert!(refusal(&path).contains("is used by another program"));
        drop(another);
        fs::remove_file(&path).unwrap();
        let _datagrams = std::os::unix::net::UnixDatagram::bind(&path).unwrap();
        assert!(refusal(&path).contains("is used by another program"));
    }

    #[test]
    fn what_cannot_be_is_said() {
        let dir = tempfile::tempdir().unwrap();
        let no_group = format!("{:#}", open(&dir.path().join("s"), Some("no-such-group")).unwrap_err());
        assert!(no_group.contains("no group `no-such-group`"), "{no_group}");
        assert!(refusal(&dir.path().join("x".repeat(120))).contains("choose a shorter one"));
        fs::set_permissions(dir.path(), Permissions::from_mode(0o777)).unwrap();
        assert!(refusal(&dir.path().join("s")).contains("everybody may write to it"));
        fs::set_permissions(dir.path(), Permissions::from_mode(0o1777)).unwrap();
        assert!(refusal(&dir.path().join("s")).contains("others may write to"));
    }
}
