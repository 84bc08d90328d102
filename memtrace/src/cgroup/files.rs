//! The files of a memory cgroup: usage, limit and peak; its id and its path; the walk over all of them.
//!
//! A cgroup's id is the inode number of its directory, which is its kernfs id (fs/kernfs/mount.c):
//! the number that records of the kernel side carry. There is no file that leads from an id to a
//! path; `by_id` and a walk do.

use std::collections::VecDeque;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::hierarchy::Hierarchy;
use memtrace_engine::input::CgroupFound;

/// Bytes of the paths that wait in a walk: a path can have 4 KiB.
const TODO_BYTES_CAP: usize = 4 << 20;
/// Levels below the root that a walk visits; what is deeper is left out.
pub const MAX_DEPTH: usize = 32;
/// Limits from here on are none. Version 1 has no word for it: it writes PAGE_COUNTER_MAX pages in
/// bytes, a number that depends on the page size (include/linux/page_counter.h).
const UNLIMITED: u64 = 1 << 62;

/// What a walk found.
#[derive(Clone, Debug, Default)]
pub struct CgroupWalk {
    /// The cgroups, parents before children. Cap: what the caller asked for.
    pub found: Vec<CgroupFound>,
    /// There were more than that or deeper ones than [`MAX_DEPTH`].
    pub truncated: bool,
}

impl Hierarchy {
    /// Reads one cgroup by its path; `None` when it is gone.
    pub fn read(&self, path: &str, boot_ns: u64) -> Option<CgroupFound> {
        let dir = self.dir_of(path)?;
        let parent_id = match parent(path) {
            Some(parent) => self.dir_of(parent).and_then(|dir| id_of(&dir)),
            None => None,
        };
        self.read_dir(&dir, path, parent_id, boot_ns)
    }

    /// The id of a cgroup by its path: the inode number of its directory.
    pub fn id_of(&self, path: &str) -> Option<u64> {
        id_of(&self.dir_of(path)?)
    }

    /// The id of a process' memory cgroup; `None` when either is gone.
    pub fn id_of_process(&self, pid: u32) -> Option<u64> {
        self.id_of(&self.path_of_process(pid)?)
    }

    /// Reads cgroups, those near the root first, at most `most` and within [`MAX_DEPTH`].
    pub fn walk(&self, boot_ns: u64, most: usize) -> CgroupWalk {
        let mut found = Vec::new();
        let complete = self.visit(most, &mut |dir, path, parent_id| {
            found.extend(self.read_dir(dir, path, parent_id, boot_ns));
            true
        });
        CgroupWalk { found, truncated: !complete }
    }

    /// Visits the tree, level by level, until `each` says false, but no more than `most` cgroups.
    /// False when it ended before all were visited.
    pub(super) fn visit(&self, most: usize, each: &mut dyn FnMut(&Path, &str, Option<u64>) -> bool) -> bool {
        let Some(top) = self.dir_of(&self.root) else { return true };
        let (mut complete, mut visited, mut todo_bytes) = (true, 0, self.root.len());
        let mut todo = VecDeque::from([(top, self.root.clone(), None, 0usize)]);
        while let Some((dir, path, parent_id, depth)) = todo.pop_front() {
            todo_bytes = todo_bytes.saturating_sub(path.len());
            if visited >= most || !each(&dir, &path, parent_id) {
                return false;
            }
            visited += 1;
            let room = most.saturating_sub(visited + todo.len());
            let (below, all) = children(&dir, &path, room + 1, TODO_BYTES_CAP.saturating_sub(todo_bytes));
            complete &= all;
            if below.is_empty() {
                continue;
            }
            if depth >= MAX_DEPTH {
                complete = false;
                continue;
            }
            let id = id_of(&dir);
            todo_bytes = todo_bytes.saturating_add(below.iter().map(|(_, path)| path.len()).sum());
            todo.extend(below.into_iter().map(|(dir, path)| (dir, path, id, depth + 1)));
        }
        complete
    }

    pub(super) fn read_dir(&self, dir: &Path, path: &str, parent_id: Option<u64>, boot_ns: u64) -> Option<CgroupFound> {
        let (usage, limit, peak) = match self.version {
            1 => ("memory.usage_in_bytes", "memory.limit_in_bytes", "memory.max_usage_in_bytes"),
            _ => ("memory.current", "memory.max", "memory.peak"),
        };
        Some(CgroupFound {
            id: id_of(dir)?,
            parent_id,
            path: path.to_owned(),
            boot_ns,
            usage_bytes: read_number(&dir.join(usage)),
            limit_bytes: read_number(&dir.join(limit)).filter(|limit| *limit < UNLIMITED),
            peak_bytes: read_number(&dir.join(peak)),
        })
    }
}

/// The path of the parent; `None` for the root.
fn parent(path: &str) -> Option<&str> {
    match path.rsplit_once('/')? {
        (_, "") => None,
        ("", _) => Some("/"),
        (parent, _) => Some(parent),
    }
}

/// At most `most` of the directories in a cgroup's directory, with their paths, and whether those are
/// all that have room in `most_bytes` of paths.
fn children(dir: &Path, path: &str, most: usize, most_bytes: usize) -> (Vec<(PathBuf, String)>, bool) {
    let Ok(entries) = fs::read_dir(dir) else { return (Vec::new(), true) };
    let (mut below, mut bytes) = (Vec::new(), 0_usize);
    for entry in entries.flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())).take(most) {
        let path = format!("{}/{}", path.trim_end_matches('/'), entry.file_name().to_string_lossy());
        bytes = bytes.saturating_add(path.len());
        if bytes > most_bytes {
            break;
        }
        below.push((entry.path(), path));
    }
    below.sort_unstable_by(|a, b| a.1.cmp(&b.1));
    (below, bytes <= most_bytes)
}

pub(super) fn id_of(dir: &Path) -> Option<u64> {
    fs::metadata(dir).ok().filter(fs::Metadata::is_dir).map(|metadata| metadata.ino())
}

/// A file that holds one number; `None` when there is none, and for `max`.
fn read_number(file: &Path) -> Option<u64> {
    fs::read_to_string(file).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

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
        let Ok(hierarchy) = Hierarchy::find() else { return };
        let walk = hierarchy.walk(1, 1000);
        assert!(walk.found.iter().any(|found| found.path == hierarchy.root));
        let own = hierarchy.own_path().unwrap();
        if let Some(found) = hierarchy.read(&own, 1) {
            assert_eq!(hierarchy.id_of_process(std::process::id()), Some(found.id));
        }
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
        let complete = hierarchy.visit(1 << 20, &mut |_, _, _| {
            seen += 1;
            true
        });
        assert!(!complete && (fits / 2..fits + 100).contains(&seen), "{seen} of {fits}");
    }
}
