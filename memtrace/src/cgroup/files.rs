//! The files of a memory cgroup: usage, limit and peak; its id and its path; the walk over all of them.
//!
//! A cgroup's id is the inode number of its directory, which is its kernfs id (fs/kernfs/mount.c):
//! the number that records of the kernel side carry. There is no file that leads from an id to a
//! path; `by_id` and a walk do.

use std::collections::VecDeque;
use std::ffi::OsStr;
use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use memtrace_engine::input::CgroupFound;
use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, fstat, openat, statat};
use rustix::io::Errno;

use super::hierarchy::{Hierarchy, Membership, shown};

/// Bytes of the paths that wait in a walk: a path can have 8 KiB.
const TODO_BYTES_CAP: usize = 4 << 20;
/// Levels below the root that a walk visits; what is deeper is left out.
pub const MAX_DEPTH: usize = 32;
/// Bytes of a path that are opened at once. The kernel takes less than PATH_MAX; a tree can be
/// deeper, and the rest is opened from there.
const OPEN_AT_ONCE: usize = 2048;
/// Bytes that are read of a file: numbers, or a few lines with one.
const FILE_BYTES_CAP: u64 = 4096;
/// Limits from here on are none. Version 1 has no word for it: it writes PAGE_COUNTER_MAX pages in
/// bytes, a number that depends on the page size (include/linux/page_counter.h).
const UNLIMITED: u64 = 1 << 62;

/// What a walk found.
#[derive(Clone, Debug, Default)]
pub struct CgroupWalk {
    /// The cgroups, parents before children. Cap: what the caller asked for.
    pub found: Vec<CgroupFound>,
    /// There were more than that, deeper ones than [`MAX_DEPTH`], or some that could not be read.
    pub truncated: bool,
}

/// The directory of a cgroup, open: its files are read through it, whatever its path is made of and
/// however long it is.
#[derive(Debug)]
pub(super) struct CgroupDir {
    fd: OwnedFd,
    /// From the root of what is mounted, which has the empty path.
    pub(super) below: PathBuf,
}

impl CgroupDir {
    pub(super) const fn new(fd: OwnedFd, below: PathBuf) -> Self {
        Self { fd, below }
    }

    /// Its id: its inode number.
    pub(super) fn id(&self) -> Option<u64> {
        fstat(&self.fd).ok().map(|stat| stat.st_ino)
    }

    /// The id of its parent; `None` for the root.
    fn parent_id(&self) -> Option<u64> {
        let is_root = self.below.as_os_str().is_empty();
        if is_root { None } else { statat(&self.fd, "..", AtFlags::empty()).ok().map(|stat| stat.st_ino) }
    }

    /// The same directory once more.
    pub(super) fn try_clone(&self) -> Option<Self> {
        Some(Self { fd: self.fd.try_clone().ok()?, below: self.below.clone() })
    }

    /// One of its files, to be read.
    pub(super) fn file(&self, name: &str) -> Option<File> {
        openat(&self.fd, name, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).ok().map(File::from)
    }

    /// The text of one of its files.
    pub(super) fn read(&self, name: &str) -> Option<String> {
        let mut text = Vec::new();
        self.file(name)?.take(FILE_BYTES_CAP).read_to_end(&mut text).ok()?;
        Some(String::from_utf8_lossy(&text).into_owned())
    }

    /// A file that holds one number; `None` when there is none, and for `max`.
    fn number(&self, name: &str) -> Option<u64> {
        self.read(name)?.trim().parse().ok()
    }

    /// The paths of at most `most` of the directories in it, and whether those are all that have room
    /// in `most_bytes` of paths. One that cannot be read has not all.
    fn children(&self, most: usize, most_bytes: usize) -> (Vec<PathBuf>, bool) {
        let (mut below, mut bytes) = (Vec::new(), 0_usize);
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let entries = match openat(&self.fd, ".", flags, Mode::empty()).and_then(Dir::new) {
            Ok(entries) => entries,
            Err(error) => return (below, is_gone(error)),
        };
        for entry in entries {
            let entry = match entry {
                Ok(entry) => entry,
                Err(error) => return (below, is_gone(error)),
            };
            let name = entry.file_name().to_bytes();
            if name == b"." || name == b".." || !self.is_dir(&entry) {
                continue;
            }
            if below.len() >= most {
                break;
            }
            let path = self.below.join(OsStr::from_bytes(name));
            bytes = bytes.saturating_add(path.as_os_str().len());
            if bytes > most_bytes {
                break;
            }
            below.push(path);
        }
        below.sort_unstable();
        (below, bytes <= most_bytes)
    }

    fn is_dir(&self, entry: &rustix::fs::DirEntry) -> bool {
        match entry.file_type() {
            FileType::Unknown => statat(&self.fd, entry.file_name(), AtFlags::SYMLINK_NOFOLLOW)
                .is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Directory),
            kind => kind == FileType::Directory,
        }
    }
}

/// Whether a directory cannot be read because it has been removed. kernfs says ENODEV of a file whose
/// cgroup is gone (fs/kernfs/file.c).
fn is_gone(error: Errno) -> bool {
    matches!(error, Errno::NOENT | Errno::NODEV)
}

impl Hierarchy {
    /// Opens a cgroup by its path in the hierarchy.
    fn open(&self, path: &Path) -> Option<CgroupDir> {
        self.open_below(&self.below(path)?).ok()
    }

    /// Opens a cgroup by its path from the root of what is mounted here.
    pub(super) fn open_below(&self, below: &Path) -> Result<CgroupDir, Errno> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let mut fd = openat(CWD, &self.mount, flags, Mode::empty())?;
        let mut part = PathBuf::new();
        for name in below {
            if part.as_os_str().len().saturating_add(name.len()) >= OPEN_AT_ONCE {
                fd = openat(&fd, &part, flags, Mode::empty())?;
                part.clear();
            }
            part.push(name);
        }
        if !part.as_os_str().is_empty() {
            fd = openat(&fd, &part, flags, Mode::empty())?;
        }
        Ok(CgroupDir::new(fd, below.to_owned()))
    }

    /// Reads one cgroup by its path; `None` when it is gone.
    pub fn read(&self, path: impl AsRef<Path>, boot_ns: u64) -> Option<CgroupFound> {
        self.read_dir(&self.open(path.as_ref())?, boot_ns)
    }

    /// The id of a cgroup by its path: the inode number of its directory.
    pub fn id_of(&self, path: impl AsRef<Path>) -> Option<u64> {
        self.open(path.as_ref())?.id()
    }

    /// The id of a process' memory cgroup; `None` when either is gone or the path is too long.
    pub fn id_of_process(&self, pid: u32) -> Option<u64> {
        match self.membership(pid) {
            Membership::Path(path) => self.id_of(path),
            Membership::TooLong | Membership::None => None,
        }
    }

    /// Reads cgroups, those near the root first, at most `most` and within [`MAX_DEPTH`].
    pub fn walk(&self, boot_ns: u64, most: usize) -> CgroupWalk {
        let mut found = Vec::new();
        let complete = self.visit(most, &mut |dir| {
            found.extend(self.read_dir(dir, boot_ns));
            true
        });
        CgroupWalk { found, truncated: !complete }
    }

    /// Visits the tree, level by level, until `each` says false, but no more than `most` cgroups.
    /// False when it ended before all were visited.
    pub(super) fn visit(&self, most: usize, each: &mut dyn FnMut(&CgroupDir) -> bool) -> bool {
        let (mut complete, mut visited, mut todo_bytes) = (true, 0_usize, 0_usize);
        let mut todo = VecDeque::from([(PathBuf::new(), 0_usize)]);
        while let Some((below, depth)) = todo.pop_front() {
            todo_bytes = todo_bytes.saturating_sub(below.as_os_str().len());
            if visited >= most {
                return false;
            }
            visited += 1;
            let dir = match self.open_below(&below) {
                Ok(dir) => dir,
                Err(error) => {
                    complete &= is_gone(error);
                    continue;
                }
            };
            if !each(&dir) {
                return false;
            }
            let room = most.saturating_sub(visited + todo.len());
            let (below, all) = dir.children(room + 1, TODO_BYTES_CAP.saturating_sub(todo_bytes));
            complete &= all && (below.is_empty() || depth < MAX_DEPTH);
            if depth < MAX_DEPTH {
                todo_bytes = below.iter().fold(todo_bytes, |sum, path| sum.saturating_add(path.as_os_str().len()));
                todo.extend(below.into_iter().map(|path| (path, depth + 1)));
            }
        }
        complete
    }

    pub(super) fn read_dir(&self, dir: &CgroupDir, boot_ns: u64) -> Option<CgroupFound> {
        let (usage, limit, peak) = match self.version {
            1 => ("memory.usage_in_bytes", "memory.limit_in_bytes", "memory.max_usage_in_bytes"),
            _ => ("memory.current", "memory.max", "memory.peak"),
        };
        Some(CgroupFound {
            id: dir.id()?,
            parent_id: dir.parent_id(),
            path: shown(&self.path_of(&dir.below)),
            boot_ns,
            usage_bytes: dir.number(usage),
            limit_bytes: dir.number(limit).filter(|limit| *limit < UNLIMITED),
            peak_bytes: dir.number(peak),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::of_machine;

    fn tree(version: u32) -> (tempfile::TempDir, Hierarchy) {
        let dir = tempfile::tempdir().unwrap();
        let hierarchy = Hierarchy { version, mount: dir.path().into(), hierarchy_id: 0, root: "/".into() };
        (dir, hierarchy)
    }

    fn write(dir: &Path, name: &str, text: &str) {
        fs::create_dir_all(dir).unwrap();
        fs::write(dir.join(name), text).unwrap();
    }

    #[test]
    fn numbers_of_both_versions() {
        let (dir, v2) = tree(2);
        let a = dir.path().join("a/b");
        write(&a, "memory.current", "4096\n");
        write(&a, "memory.max", "max\n");
        let found = v2.read("/a/b", 7).unwrap();
        assert_eq!((found.usage_bytes, found.limit_bytes, found.peak_bytes), (Some(4096), None, None));
        assert_eq!((found.path.as_str(), found.boot_ns), ("/a/b", 7));
        assert_eq!(found.parent_id, v2.id_of("/a"));
        assert_eq!(v2.read("/a", 7).unwrap().parent_id, v2.id_of("/"));
        assert_eq!(v2.read("/", 7).unwrap().parent_id, None);
        assert_eq!(v2.read("/gone", 7), None);

        let v1 = Hierarchy { version: 1, ..v2 };
        write(&a, "memory.usage_in_bytes", "5\n");
        write(&a, "memory.limit_in_bytes", "9223372036854771712\n");
        write(&a, "memory.max_usage_in_bytes", "6\n");
        let found = v1.read("/a/b", 7).unwrap();
        assert_eq!((found.usage_bytes, found.limit_bytes, found.peak_bytes), (Some(5), None, Some(6)));
        write(&a, "memory.limit_in_bytes", "1048576\n");
        assert_eq!(v1.read("/a/b", 7).unwrap().limit_bytes, Some(1_048_576));
    }

    #[test]
    fn the_walk_goes_parents_first_and_stops_at_its_depth() {
        let (dir, v2) = tree(2);
        let mut deep = dir.path().to_path_buf();
        for _ in 0..MAX_DEPTH + 3 {
            deep.push("d");
        }
        fs::create_dir_all(&deep).unwrap();
        fs::create_dir_all(dir.path().join("a/x")).unwrap();
        fs::write(dir.path().join("a/file"), "").unwrap();
        let walk = v2.walk(1, 100);
        let paths: Vec<_> = walk.found.iter().map(|found| found.path.as_str()).collect();
        assert_eq!(paths[..5], ["/", "/a", "/d", "/a/x", "/d/d"]);
        assert!(walk.truncated);
        assert_eq!(walk.found.len(), 3 + MAX_DEPTH);
        let parent = |path: &str| walk.found.iter().find(|found| found.path == path).unwrap().parent_id;
        assert_eq!((parent("/"), parent("/a/x")), (None, v2.id_of("/a")));
    }

    #[test]
    fn a_walk_is_bounded_and_takes_those_near_the_root() {
        let (dir, v2) = tree(2);
        (0..20).for_each(|n| fs::create_dir_all(dir.path().join(format!("a/deep/{n}"))).unwrap());
        (0..5).for_each(|n| fs::create_dir_all(dir.path().join(format!("b{n}"))).unwrap());
        for (most, truncated) in [(0, true), (1, true), (8, true), (27, true), (28, false), (100, false)] {
            let walk = v2.walk(1, most);
            assert_eq!((walk.found.len(), walk.truncated), (most.min(28), truncated), "{most}");
        }
        let paths: Vec<_> = v2.walk(1, 8).found.into_iter().map(|found| found.path).collect();
        assert_eq!(paths, ["/", "/a", "/b0", "/b1", "/b2", "/b3", "/b4", "/a/deep"]);
    }

    #[test]
    fn this_machine_can_be_walked() {
        let Some(hierarchy) = of_machine::found("a memory controller", Hierarchy::find()) else { return };
        let walk = hierarchy.walk(1, 1000);
        assert!(walk.found.iter().any(|found| found.path == shown(&hierarchy.root)));
        let own = hierarchy.own_path().unwrap();
        if let Some(found) = hierarchy.read(&own, 1) {
            assert_eq!(hierarchy.id_of_process(std::process::id()), Some(found.id));
        }
    }

    #[test]
    fn a_tree_deeper_than_path_max_is_walked_and_read() {
        let (dir, v2) = tree(2);
        let (mut fd, mut below) = (v2.open_below(Path::new("")).unwrap().fd, PathBuf::from("/"));
        for _ in 0..20 {
            let name = "n".repeat(250);
            rustix::fs::mkdirat(&fd, &name, Mode::RWXU).unwrap();
            fd = openat(&fd, &name, OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty()).unwrap();
            below.push(&name);
        }
        let file = openat(&fd, "memory.max", OFlags::CREATE | OFlags::WRONLY, Mode::RWXU).unwrap();
        rustix::io::write(file, b"4096\n").unwrap();
        let walk = v2.walk(1, 100);
        assert_eq!((walk.found.len(), walk.truncated), (21, false));
        let last = walk.found.last().unwrap();
        assert_eq!((last.limit_bytes, last.path.len()), (Some(4096), 4096 + '…'.len_utf8()));
        assert_eq!((v2.id_of(&below), v2.read(&below, 1).as_ref()), (Some(last.id), Some(last)));
        assert_eq!(last.parent_id, v2.id_of(below.parent().unwrap()));
        assert!(fs::metadata(dir.path().join(below.strip_prefix("/").unwrap())).is_err(), "not by one path");
    }

    #[test]
    fn names_that_are_not_text_are_walked_and_read() {
        let (dir, v2) = tree(2);
        let names: [&[u8]; 4] = [b"\x1b[31m", b"\xff", "\u{202e}x".as_bytes(), br"\xff"];
        let shown = ["/\\x1b[31m", "/\\xff", "/\\xe2\\x80\\xaex", "/\\xff"];
        for name in names {
            write(&dir.path().join(OsStr::from_bytes(name)).join("below"), "memory.max", "8192\n");
        }
        let walk = v2.walk(1, 100);
        assert_eq!((walk.found.len(), walk.truncated), (9, false));
        for (name, shown) in names.into_iter().zip(shown) {
            let path = Path::new("/").join(OsStr::from_bytes(name)).join("below");
            let found = v2.read(&path, 1).unwrap();
            assert_eq!((found.limit_bytes, found.path), (Some(8192), format!("{shown}/below")));
            assert!(walk.found.iter().any(|walked| walked.id == found.id && walked.limit_bytes == Some(8192)));
        }
    }

    #[test]
    fn a_walk_is_complete_without_what_is_gone_and_not_without_what_cannot_be_read() {
        let (dir, v2) = tree(2);
        fs::create_dir(dir.path().join("a")).unwrap();
        let a = dir.path().join("a");
        assert!(v2.visit(9, &mut |_| fs::remove_dir(&a).is_ok() || !a.exists()));
        let file = dir.path().join("file");
        fs::write(&file, "").unwrap();
        assert!(Hierarchy { mount: file, ..v2 }.walk(1, 9).truncated);
    }

    #[test]
    fn paths_that_wait_are_bounded_by_their_bytes() {
        let dir = tempfile::tempdir().unwrap();
        let hierarchy = Hierarchy { version: 2, mount: dir.path().into(), hierarchy_id: 0, root: "/".into() };
        // Ten levels of long names, and at the end of them as many as do not fit.
        let deep: std::path::PathBuf = std::iter::repeat_n("x".repeat(240), 10).collect();
        let fits = TODO_BYTES_CAP / 2400;
        (0..fits + 100).for_each(|n| fs::create_dir_all(dir.path().join(&deep).join(n.to_string())).unwrap());
        let mut seen = 0;
        let complete = hierarchy.visit(1 << 20, &mut |_| {
            seen += 1;
            true
        });
        assert!(!complete && (fits / 2..fits + 100).contains(&seen), "{seen} of {fits}");
    }
}
