//! A file system that stops to answer: FUSE, served by this program itself, with one file, `m`.
//!
//! The file is mapped as code, hidden [`Behind`] something, and from then on no request is answered.
//! Whoever looks at the file hangs until this process ends.
//! Messages are those of include/uapi/linux/fuse.h.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use rustix::fs::{CWD, FileType, MemfdFlags, Mode, makedev, memfd_create, mknodat};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use serde_json::json;

use crate::raw;

/// Bytes of the file.
const FILE_BYTES: usize = 8192;
/// Bytes of a request header, and those of the largest request.
const HEADER_BYTES: usize = 40;
const MAX_REQUEST_BYTES: usize = 1 << 20;

/// How whoever looks gets to the file system without seeing that it is FUSE.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Behind {
    /// Its mount is detached.
    Detached,
    /// Of somebody without rights, in namespaces of his own: an overlay above it.
    Overlay,
    /// The same over /tmp, for whoever looks there for a perf map.
    PerfMap,
}

/// Serves until its child has ended. The child maps the file, makes the server fall silent and says
/// `ready`, or slow to answer; after a line on stdin a child of its own takes memory, whose first stack is taken with
/// the file mapped already. Then it says `grown`, and ends after another line.
pub(crate) fn file_system(dir: &Path, mib: usize, slow: Option<Duration>, behind: Behind) -> anyhow::Result<()> {
    let node = node(dir);
    let own = Path::new("/tmp");
    let (at, device) = if behind == Behind::Detached {
        raw::own_mount_namespace()?;
        (dir.to_owned(), can(open_fuse(&node))?)
    } else {
        can(raw::become_somebody_in_own_namespaces())?;
        // opened by the user namespace that mounts it, before /tmp is another
        let device = can(open_fuse(&node))?;
        mount("silent", own, "tmpfs", MountFlags::empty(), None).context("failed to mount a tmpfs")?;
        ["fuse", "empty", "merged"].iter().try_for_each(|name| std::fs::create_dir(own.join(name)))?;
        (own.join("fuse"), device)
    };
    let options = format!("fd={},rootmode=40000,user_id=0,group_id=0,allow_other", device.as_raw_fd());
    let options = std::ffi::CString::new(options)?;
    can(mount("silent", &at, "fuse", MountFlags::NOSUID | MountFlags::NODEV, options.as_c_str())
        .context("failed to mount a FUSE file system"))?;
    // Grows when the server is to fall silent.
    let silent = File::from(memfd_create("silent", MemfdFlags::CLOEXEC)?);
    let child = raw::fork()?;
    if child == 0 {
        // Were it held here, the file system would outlive its server.
        drop(device);
        let shown = match behind {
            Behind::Detached => at,
            Behind::Overlay => own.join("merged"),
            Behind::PerfMap => own.to_owned(),
        };
        if let Err(error) = map_and_grow(&shown, &silent, mib, behind) {
            eprintln!("workload: {error:#}");
        }
        raw::leave();
    }
    std::thread::spawn(move || serve(device, &silent, slow));
    raw::wait(child)?;
    Ok(())
}

fn map_and_grow(shown: &Path, mut silent: &File, mib: usize, behind: Behind) -> anyhow::Result<()> {
    if behind != Behind::Detached {
        let options = c"lowerdir=/tmp/fuse:/tmp/empty,userxattr";
        can(
            mount("silent", shown, "overlay", MountFlags::empty(), Some(options)).context("failed to mount an overlay")
        )?;
    }
    // While it is mounted, whoever looks knows that it is FUSE: nothing is mapped until it is not.
    let file = File::open(shown.join("m"))?;
    if behind == Behind::Detached {
        unmount(shown, UnmountFlags::DETACH).context("failed to detach the file system")?;
    }
    if behind != Behind::PerfMap {
        raw::map_code(&file, FILE_BYTES).context("failed to map its file as code")?;
    }
    // to close it asks the server as well
    drop(file);
    silent.write_all(b"1")?;
    crate::say("ready", &json!({}))?;
    crate::wait_for_end_of_stdin()?;
    let grower = raw::fork()?;
    if grower == 0 {
        let held = match behind {
            Behind::Detached | Behind::Overlay => Ok(crate::memory::touched(mib)),
            Behind::PerfMap => crate::hostile::touched_by_compiled_code(mib),
        };
        let _ = crate::say("grown", &json!({ "mib": mib, "failed": held.is_err() }));
        let _ = crate::wait_for_end_of_stdin();
        drop(held);
        raw::leave();
    }
    raw::wait(grower)?;
    Ok(())
}

/// Passes on what is to be had. What this machine lets nobody have is said, `cannot`.
fn can<T>(had: anyhow::Result<T>) -> anyhow::Result<T> {
    if let Err(error) = &had {
        crate::say("cannot", &json!({ "why": format!("{error:#}") }))?;
    }
    had
}

/// A node for FUSE that everybody may open; there may be none where /dev/fuse is enough.
fn node(dir: &Path) -> PathBuf {
    let node = dir.with_extension("fuse");
    let _ = mknodat(CWD, &node, FileType::CharacterDevice, Mode::empty(), makedev(10, 229));
    let _ = std::fs::set_permissions(&node, PermissionsExt::from_mode(0o666));
    node
}

/// /dev/fuse, or that node.
fn open_fuse(node: &Path) -> anyhow::Result<File> {
    let open = |path: &Path| File::options().read(true).write(true).custom_flags(libc::O_CLOEXEC).open(path);
    open(Path::new("/dev/fuse")).or_else(|_| open(node)).context("failed to open FUSE")
}

/// Answers until something is in `silent`; then takes requests and keeps them, or is `slow` to answer.
fn serve(mut device: File, silent: &File, slow: Option<Duration>) {
    let mut request = vec![0; MAX_REQUEST_BYTES];
    while let Ok(bytes) = device.read(&mut request) {
        let Some((header, body)) = request.get(..bytes).and_then(|request| request.split_at_checked(HEADER_BYTES))
        else {
            continue;
        };
        let is_silent = silent.metadata().is_ok_and(|about| about.len() > 0);
        if is_silent && slow.is_none() {
            continue;
        }
        let (operation, unique, node) = (number(header, 4, 4), number(header, 8, 8), number(header, 16, 8));
        let Some((error, answer)) = answer(operation, node, body) else { continue };
        if let Some(slow) = slow.filter(|_| is_silent) {
            std::thread::sleep(slow);
        }
        let length = 16 + answer.len();
        let mut reply = u32::try_from(length).unwrap_or(0).to_le_bytes().to_vec();
        reply.extend((-error).to_le_bytes());
        reply.extend(unique.to_le_bytes());
        reply.extend(answer);
        let _ = device.write_all(&reply);
    }
}

/// Error number and answer; `None`: the request wants none.
fn answer(operation: u64, node: u64, body: &[u8]) -> Option<(i32, Vec<u8>)> {
    const ENOENT: i32 = 2;
    const ENOSYS: i32 = 38;
    Some(match operation {
        // FORGET, INTERRUPT, BATCH_FORGET
        2 | 36 | 42 => return None,
        // INIT: version 7.31, then the read-ahead that was asked for, and room for writes
        26 => {
            let mut answer = [7u32, 31].map(u32::to_le_bytes).concat();
            answer.extend(body.get(8..12)?);
            answer.extend([0; 4]);
            answer.extend([16u16, 12].map(u16::to_le_bytes).concat());
            answer.extend([131_072u32, 1].map(u32::to_le_bytes).concat());
            answer.resize(64, 0);
            (0, answer)
        }
        // LOOKUP
        1 if body.starts_with(b"m\0") => {
            let mut answer = 2u64.to_le_bytes().to_vec();
            answer.resize(40, 0);
            answer.extend(attributes(2));
            (0, answer)
        }
        1 => (ENOENT, Vec::new()),
        // GETATTR: valid for no time at all
        3 => (0, [vec![0; 16], attributes(node)].concat()),
        // STATFS: blocks of 4 KiB, names of 255 bytes
        17 => (0, [vec![0; 40], [4096u32, 255, 4096].map(u32::to_le_bytes).concat(), vec![0; 28]].concat()),
        // OPEN, OPENDIR
        14 | 27 => (0, [1u64.to_le_bytes().to_vec(), vec![0; 8]].concat()),
        // READ
        15 => {
            let size = usize::try_from(number(body, 16, 4)).ok()?.min(FILE_BYTES);
            (0, vec![0x90; size])
        }
        // FLUSH, RELEASE, RELEASEDIR, ACCESS
        25 | 18 | 29 | 34 => (0, Vec::new()),
        _ => (ENOSYS, Vec::new()),
    })
}

/// struct fuse_attr of the directory (1) or the file (2).
fn attributes(node: u64) -> Vec<u8> {
    let (mode, bytes) = if node == 1 { (0o040_755u32, 4096) } else { (0o100_755, FILE_BYTES as u64) };
    let mut attributes = [node, bytes, bytes.div_ceil(512), 0, 0, 0].map(u64::to_le_bytes).concat();
    attributes.extend([0u32, 0, 0, mode, 1, 0, 0, 0, 4096, 0].map(u32::to_le_bytes).concat());
    attributes
}

/// A little-endian number in a message; 0 beyond its end.
fn number(message: &[u8], at: usize, bytes: usize) -> u64 {
    let bytes = message.get(at..at + bytes).unwrap_or_default();
    bytes.iter().rev().fold(0, |number, byte| (number << 8) | u64::from(*byte))
}
