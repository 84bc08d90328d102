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
/// Bytes read of /proc/PID/stat and /proc/PID/status, which may list 65,536 groups.
const MAX_STATUS_BYTES: usize = 1 << 20;
/// Bytes read of /proc/PID/mountinfo.
const MAX_MOUNT_BYTES: usize = 256 << 10;

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

    /// Who the process is.
    pub fn credentials(&self) -> Option<Credentials> {
        Credentials::parse(&String::from_utf8_lossy(&self.read("status", MAX_STATUS_BYTES)?))
    }

    /// The file systems in the mounts of this process by device number, and whether another process
    /// answers for each (FUSE): if that one hangs, so does every open(2) and stat(2) there. At most
    /// the first 256 KiB of the mounts are read.
    pub fn file_systems(&self) -> Vec<((u32, u32), bool)> {
        self.read("mountinfo", MAX_MOUNT_BYTES).map(|mounts| file_systems(&mounts)).unwrap_or_default()
    }

    /// The first `most_bytes` of a file in this directory; `None` if it is empty or unreadable.
    pub fn read(&self, name: &str, most_bytes: usize) -> Option<Vec<u8>> {
        let mut bytes = Vec::new();
        self.file(name)?.take(u64::try_from(most_bytes).ok()?).read_to_end(&mut bytes).ok()?;
        (!bytes.is_empty()).then_some(bytes)
    }

    pub(crate) fn file(&self, name: &str) -> Option<File> {
        openat(&self.fd, name, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).ok().map(File::from)
    }

    /// The regular file mapped at exactly `start..end`, even if it was renamed or deleted.
    pub fn open_mapped(&self, start: u64, end: u64) -> Option<File> {
        let handle = openat(&self.fd, mapped_name(start, end), OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).ok()?;
        open_regular(handle)
    }

    /// The stamp of the file mapped at exactly `start..end`, and who may read it, without opening it.
    pub fn stat_mapped(&self, start: u64, end: u64) -> Option<(FileStamp, FileAccess)> {
        let stat = rustix::fs::statat(&self.fd, mapped_name(start, end), rustix::fs::AtFlags::empty()).ok()?;
        let stamp = FileStamp {
            device: stat.st_dev,
            inode: stat.st_ino,
            bytes: u64::try_from(stat.st_size).ok()?,
            modified_s: stat.st_mtime,
            modified_ns: stat.st_mtime_nsec.try_into().ok()?,
        };
        Some((stamp, FileAccess { mode: stat.st_mode, user: stat.st_uid, group: stat.st_gid }))
    }

    /// The regular file that the process itself would open at `path`, inside its own root. No part
    /// of the path may be a link: a process can make links to what it may not read.
    pub fn open_in_root(&self, path: &str) -> Option<File> {
        let root = openat(&self.fd, "root", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).ok()?;
        let inside = ResolveFlags::IN_ROOT | ResolveFlags::NO_SYMLINKS;
        let handle = openat2(root, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), inside).ok()?;
        open_regular(handle)
    }
}

/// Who a process is, as the initial user namespace numbers it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Credentials {
    /// Process id in its innermost pid namespace.
    pub inner_pid: u32,
    /// Real, effective, saved and file system user. Cap: 4.
    pub users: Vec<u32>,
    /// Groups, the supplementary ones too. Cap: what 64 KiB hold.
    pub groups: Vec<u32>,
}

impl Credentials {
    /// Parses /proc/PID/status.
    fn parse(status: &str) -> Option<Self> {
        let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        let numbers = |text: &str| text.split_ascii_whitespace().filter_map(|id| id.parse().ok()).collect();
        let inner_pid = field("NSpid")?.split_ascii_whitespace().next_back()?.parse().ok()?;
        let users: Vec<u32> = numbers(field("Uid")?);
        let mut groups: Vec<u32> = numbers(field("Gid")?);
        groups.extend(field("Groups").map(numbers).unwrap_or_default());
        users.first()?;
        Some(Self { inner_pid, users, groups })
    }

    /// The real user.
    pub fn user(&self) -> Option<u32> {
        self.users.first().copied()
    }

    /// Whether the file is the process' own: it belongs to the one user that the process runs as. A
    /// set-user-id program has two, and reads for neither.
    pub fn owns(&self, file: &File) -> bool {
        file.metadata().is_ok_and(|data| self.users.iter().all(|user| *user == data.uid()))
    }

    /// Whether the mode of the file lets the process read it. Programs may be mapped that cannot be
    /// read (mode 0711), and what is read here comes out for others to see.
    pub fn may_read(&self, FileAccess { mode, user, group }: FileAccess) -> bool {
        let all = |owner: u32| self.users.iter().all(|user| *user == owner);
        all(0)
            || mode & 0o004 != 0
            || (all(user) && mode & 0o400 != 0)
            || (self.groups.contains(&group) && mode & 0o040 != 0)
    }
}

/// Who may read a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileAccess {
    mode: u32,
    user: u32,
    group: u32,
}

impl FileAccess {
    /// That of an open file.
    pub fn of(file: &File) -> Option<Self> {
        let data = file.metadata().ok()?;
        Some(Self { mode: data.mode(), user: data.uid(), group: data.gid() })
    }
}

/// Who a process is at a glance: the user that owns its directory in /proc, which is its effective one;
/// `None` also for root, who owns those of processes that are not to be looked into (fs/proc/base.c,
/// `task_dump_owner`).
pub fn owner_of(pid: u32) -> Option<u32> {
    let data = std::fs::metadata(Path::new("/proc").join(pid.to_string())).ok()?;
    Some(data.uid()).filter(|user| *user != 0)
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
    /// Major and minor number of the device, as stat(2) has them.
    pub fn device(&self) -> (u32, u32) {
        (rustix::fs::major(self.device), rustix::fs::minor(self.device))
    }

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

/// Whether a process or thread runs, or would if there were a CPU for it: state `R` in the `stat` of its
/// directory in /proc. That file waits for nobody (fs/proc/array.c, `do_task_stat` takes no lock of the
/// address space).
pub fn wants_to_run(dir: impl AsRef<Path>) -> bool {
    std::fs::read(dir.as_ref().join("stat")).is_ok_and(|stat| is_running(&stat))
}

/// Whether the state in a `stat` file is `R`. The name before it may be any bytes.
fn is_running(stat: &[u8]) -> bool {
    let behind = stat.iter().rposition(|byte| *byte == b')').and_then(|end| stat.get(end..));
    behind.is_some_and(|fields| fields.starts_with(b") R"))
}

/// Device number and kind of each mount in a mountinfo file. Any byte can be in the name of a mount
/// point and in the kind of a FUSE; spaces there are escaped.
pub(crate) fn mounted(mounts: &[u8]) -> impl Iterator<Item = ((u32, u32), &[u8])> {
    mounts.split(|byte| *byte == b'\n').filter_map(mounted_in)
}

/// `ID PARENT MAJOR:MINOR ROOT MOUNT OPTIONS [TAGS] - TYPE SOURCE OPTIONS`
fn mounted_in(line: &[u8]) -> Option<((u32, u32), &[u8])> {
    let mut words = line.split(|byte| *byte == b' ');
    let (major, minor) = std::str::from_utf8(words.nth(2)?).ok()?.split_once(':')?;
    let kind = words.skip_while(|word| *word != b"-").nth(1)?;
    Some(((major.parse().ok()?, minor.parse().ok()?), kind))
}

fn file_systems(mounts: &[u8]) -> Vec<((u32, u32), bool)> {
    mounted(mounts).map(|(device, kind)| (device, kind.starts_with(b"fuse"))).collect()
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
        assert!(dir.credentials().unwrap().users.len() == 4);
        assert!(dir.read("maps", 100).unwrap().len() == 100);
        assert!(ProcDir::open(pid, start_ns + 5 * TICK_NS).is_none(), "another process of that id");
        assert!(ProcDir::open(u32::MAX, start_ns).is_none());
    }

    #[test]
    fn only_regular_files_inside_the_root_are_opened() {
        let dir = ProcDir::of(std::process::id()).unwrap();
        assert!(dir.open_in_root("/proc/self/exe").is_none() && dir.open_in_root("/dev/null").is_none());
        assert!(dir.open_in_root("/../../etc/passwd").is_some() && dir.open_in_root("/none").is_none());
        let made = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/etc", made.path().join("link")).unwrap();
        let through = made.path().join("link/passwd");
        assert!(dir.open_in_root(through.to_str().unwrap()).is_none(), "through a link");
    }

    #[test]
    fn a_fuse_mount_is_recognized() {
        let mounts = b"22 1 8:1 / / rw - ext4 /dev/sda1 rw\n\
            23 22 0:45 / /home/x\\040y rw,nosuid shared:3 master:1 - fuse.sshfs host: rw\n\
            24 22 0:46 / /run rw - tmpfs tmpfs rw\nnonsense\n\
            25 22 0:47 / /home/x/\xff rw - fuse.\xfe \xff rw\n26 22 0:48 / /- rw - tmpfs - rw\n";
        let expected = [((8, 1), false), ((0, 45), true), ((0, 46), false), ((0, 47), true), ((0, 48), false)];
        assert_eq!(file_systems(mounts), expected);
        assert!(!ProcDir::of(std::process::id()).unwrap().file_systems().is_empty());
    }

    #[test]
    fn a_name_that_is_not_text_hides_no_state() {
        assert!(is_running(b"7 (\xff) R) R 1 2"));
        assert!(!is_running(b"7 () R \xff) S 1 2") && !is_running(b"7 (x) D 1") && !is_running(b""));
    }

    #[test]
    fn a_process_reads_what_the_mode_lets_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("program");
        let file = File::create(&path).unwrap();
        std::os::unix::fs::chown(&path, Some(1000), Some(50)).unwrap();
        let who = |user: u32, saved: u32, group: u32| {
            let status = format!("NSpid:\t77\t3\nUid:\t{user}\t{user}\t{saved}\t{user}\nGid:\t7\nGroups:\t{group} \n");
            Credentials::parse(&status).unwrap()
        };
        assert_eq!((who(5, 5, 9).inner_pid, who(5, 5, 9).user()), (3, Some(5)));
        let readers = [who(1000, 1000, 7), who(1001, 1001, 50), who(1001, 1001, 7), who(0, 0, 7), who(1000, 0, 7)];
        for (mode, expected) in [
            (0o711, [true, false, false, true, false]),
            (0o750, [true, true, false, true, false]),
            (0o755, [true; 5]),
            (0o311, [false, false, false, true, false]),
        ] {
            std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(mode)).unwrap();
            assert_eq!(
                readers.each_ref().map(|reader| reader.may_read(FileAccess::of(&file).unwrap())),
                expected,
                "{mode:o}"
            );
        }
        assert_eq!(readers.each_ref().map(|reader| reader.owns(&file)), [true, false, false, false, false]);
        assert_eq!(Credentials::parse("Uid:\t\nNSpid:\t1\nGid:\t0\n"), None);
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
