//! /proc/PID held open: what is read through it belongs to that process, or is an error.
//!
//! A process id is reused once its process is gone, so a path like /proc/123/maps may lead to
//! another process a moment later. An open directory does not: after the process has ended, every
//! read through it fails. [`ProcDir::open`] compares the start time, which tells two processes of
//! one id apart.
//!
//! Files of a process are opened only if they are regular files: opening a device or a FIFO may
//! block or do something. Paths are resolved inside the process' own root.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::{Mode, OFlags, ResolveFlags, openat, openat2};

/// Nanoseconds of a clock tick in /proc: `USER_HZ` is 100 whatever `CONFIG_HZ` is.
const TICK_NS: u64 = 10_000_000;
/// Bytes read of /proc/PID/stat and /proc/PID/status.
const MAX_STATUS_BYTES: usize = 64 << 10;
/// Bytes read of /proc/PID/mountinfo.
const MAX_MOUNT_BYTES: usize = 4 << 20;

/// The /proc directory of one process.
#[derive(Debug)]
pub struct ProcDir {
    fd: OwnedFd,
}

impl ProcDir {
    /// The process `pid` that started at `start_boot_ns` (boot clock); `None` if it has ended.
    pub fn open(pid: u32, start_boot_ns: u64) -> Option<Self> {
        let dir = Self::of(pid)?;
        // /proc cuts the start time to ticks; one more tick for a start read across a suspend.
        let ticks = dir.start_ticks()?;
        (ticks.abs_diff(start_boot_ns.checked_div(TICK_NS)?) <= 1).then_some(dir)
    }

    /// Whichever process has the id `pid` now.
    pub fn of(pid: u32) -> Option<Self> {
        let dir = File::options()
            .read(true)
            .custom_flags(OFlags::DIRECTORY.bits().cast_signed())
            .open(Path::new("/proc").join(pid.to_string()))
            .ok()?;
        Some(Self { fd: dir.into() })
    }

    /// Start time in clock ticks since boot: field 22 of /proc/PID/stat.
    pub fn start_ticks(&self) -> Option<u64> {
        let stat = self.read("stat", MAX_STATUS_BYTES)?;
        // The name may hold anything, parentheses too; the last parenthesis ends it.
        let behind = stat.iter().rposition(|byte| *byte == b')')?.checked_add(1)?;
        let fields = std::str::from_utf8(stat.get(behind..)?).ok()?;
        fields.split_ascii_whitespace().nth(19)?.parse().ok()
    }

    /// Process id in its innermost pid namespace, and the user ids it runs as: real, effective,
    /// saved, file system.
    pub fn status(&self) -> Option<(u32, Vec<u32>)> {
        let status = String::from_utf8_lossy(&self.read("status", MAX_STATUS_BYTES)?).into_owned();
        let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        let pid = field("NSpid")?.split_ascii_whitespace().next_back()?.parse().ok()?;
        let users = field("Uid")?.split_ascii_whitespace().filter_map(|id| id.parse().ok()).collect();
        Some((pid, users))
    }

    /// Whether a process answers for the file system with this device number (FUSE). If that
    /// process hangs, so does every open(2) and stat(2) there. `None` if the mounts of this
    /// process do not list the device.
    pub fn is_fuse(&self, device: (u32, u32)) -> Option<bool> {
        is_fuse(&self.read("mountinfo", MAX_MOUNT_BYTES)?, device)
    }

    /// The first `most_bytes` of a file in this directory; `None` if it is empty or unreadable.
    pub fn read(&self, name: &str, most_bytes: usize) -> Option<Vec<u8>> {
        let file: File = openat(&self.fd, name, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).ok()?.into();
        let mut bytes = Vec::new();
        file.take(u64::try_from(most_bytes).ok()?).read_to_end(&mut bytes).ok()?;
        (!bytes.is_empty()).then_some(bytes)
    }

    /// The regular file mapped at exactly `start..end`, even if it was renamed or deleted.
    pub fn open_mapped(&self, start: u64, end: u64) -> Option<File> {
        let handle = openat(&self.fd, mapped_name(start, end), OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).ok()?;
        open_regular(handle)
    }

    /// The stamp of the file mapped at exactly `start..end`, without opening it.
    pub fn stat_mapped(&self, start: u64, end: u64) -> Option<FileStamp> {
        let stat = rustix::fs::statat(&self.fd, mapped_name(start, end), rustix::fs::AtFlags::empty()).ok()?;
        Some(FileStamp {
            device: stat.st_dev,
            inode: stat.st_ino,
            bytes: u64::try_from(stat.st_size).ok()?,
            modified_s: stat.st_mtime,
            modified_ns: stat.st_mtime_nsec.try_into().ok()?,
        })
    }

    /// The regular file that the process itself would open at `path`, inside its own root.
    pub fn open_in_root(&self, path: &str) -> Option<File> {
        let root = openat(&self.fd, "root", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).ok()?;
        let inside = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        let handle = openat2(root, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), inside).ok()?;
        open_regular(handle)
    }
}

/// Identifies a file and its content: device, inode, size and modification time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FileStamp {
    device: u64,
    /// Inode number, as in stat(2).
    pub inode: u64,
    bytes: u64,
    modified_s: i64,
    modified_ns: i64,
}

impl FileStamp {
    /// The stamp of an open file.
    pub fn of(file: &File) -> Option<Self> {
        let data = file.metadata().ok()?;
        Some(Self {
            device: data.dev(),
            inode: data.ino(),
            bytes: data.size(),
            modified_s: data.mtime(),
            modified_ns: data.mtime_nsec(),
        })
    }
}

fn is_fuse(mounts: &[u8], (major, minor): (u32, u32)) -> Option<bool> {
    let device = format!("{major}:{minor}");
    String::from_utf8_lossy(mounts).lines().find_map(|line| {
        // ID PARENT MAJOR:MINOR ROOT MOUNT OPTIONS [TAGS] - TYPE SOURCE OPTIONS
        let (head, tail) = line.split_once(" - ")?;
        (head.split(' ').nth(2)? == device).then(|| tail.starts_with("fuse"))
    })
}

fn mapped_name(start: u64, end: u64) -> String {
    format!("map_files/{start:x}-{end:x}")
}

/// Opens the file behind an `O_PATH` handle for reading, only if it is a regular file.
pub fn open_regular(handle: OwnedFd) -> Option<File> {
    let kind = rustix::fs::fstat(&handle).ok()?.st_mode;
    if rustix::fs::FileType::from_raw_mode(kind) != rustix::fs::FileType::RegularFile {
        return None;
    }
    let path = fd_path(&handle);
    File::options().read(true).custom_flags(OFlags::NONBLOCK.bits().cast_signed()).open(path).ok()
}

/// A path through which this process can open the file behind `fd` once more.
pub fn fd_path(fd: &impl AsFd) -> std::path::PathBuf {
    use std::os::fd::AsRawFd;
    Path::new("/proc/self/fd").join(fd.as_fd().as_raw_fd().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_and_no_other() {
        let pid = std::process::id();
        let start_ns = ProcDir::of(pid).unwrap().start_ticks().unwrap() * TICK_NS;
        let dir = ProcDir::open(pid, start_ns + 1234).unwrap();
        assert!(dir.status().unwrap().1.len() == 4);
        assert!(dir.read("maps", 100).unwrap().len() == 100);
        assert!(ProcDir::open(pid, start_ns + 5 * TICK_NS).is_none(), "another process of that id");
        assert!(ProcDir::open(u32::MAX, start_ns).is_none());
    }

    #[test]
    fn only_regular_files_inside_the_root_are_opened() {
        let dir = ProcDir::of(std::process::id()).unwrap();
        assert!(dir.open_in_root("/proc/self/exe").is_none() && dir.open_in_root("/dev/null").is_none());
        assert!(dir.open_in_root("/../../etc/passwd").is_some() && dir.open_in_root("/none").is_none());
    }

    #[test]
    fn a_fuse_mount_is_recognized() {
        let mounts = b"22 1 8:1 / / rw - ext4 /dev/sda1 rw\n\
            23 22 0:45 / /home/x\\040y rw,nosuid shared:3 master:1 - fuse.sshfs host: rw\n\
            24 22 0:46 / /run rw - tmpfs tmpfs rw\nnonsense\n";
        let found = [(8, 1), (0, 45), (0, 46), (0, 47)].map(|device| is_fuse(mounts, device));
        assert_eq!(found, [Some(false), Some(true), Some(false), None]);
        assert!(ProcDir::of(std::process::id()).unwrap().is_fuse((0, 0)).is_none());
    }

    #[test]
    fn a_dead_process_gives_nothing() {
        let mut child = std::process::Command::new("/bin/sleep").arg("60").spawn().unwrap();
        let dir = ProcDir::of(child.id()).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(dir.read("maps", 100).is_none() && dir.start_ticks().is_none());
    }
}
