//! The files of a memory cgroup: usage, limit and peak; its id and its path; the walk over all of them.
//!
//! A cgroup's id is the inode number of its directory, which is its kernfs id (fs/kernfs/mount.c):
//! the number that records of the kernel side carry. There is no file that leads from an id to a
//! path, so `path_of` walks.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::hierarchy::Hierarchy;
use memtrace_engine::input::CgroupFound;

/// Most cgroups that one walk visits; the rest is left out.
pub const MAX_CGROUPS: usize = 10_000;
/// Levels below the root that a walk visits; what is deeper is left out.
pub const MAX_DEPTH: usize = 32;
/// Limits from here on are none. Version 1 has no word for it: it writes PAGE_COUNTER_MAX pages in
/// bytes, a number that depends on the page size (include/linux/page_counter.h).
const UNLIMITED: u64 = 1 << 62;

/// What a walk found.
#[derive(Clone, Debug, Default)]
pub struct CgroupWalk {
    /// The cgroups, parents before children. Cap: [`MAX_CGROUPS`].
    pub found: Vec<CgroupFound>,
    /// There were more than [`MAX_CGROUPS`] or deeper ones than [`MAX_DEPTH`].
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

    /// Reads every cgroup, within [`MAX_CGROUPS`] and [`MAX_DEPTH`].
    pub fn walk(&self, boot_ns: u64) -> CgroupWalk {
        let mut walk = CgroupWalk::default();
        let mut seen = 0;
        let complete = self.visit(self.root.clone(), &mut |dir, path, parent_id| {
            seen += 1;
            if seen > MAX_CGROUPS {
                return false;
            }
            walk.found.extend(self.read_dir(dir, path, parent_id, boot_ns));
            true
        });
        walk.truncated = !complete;
        walk
    }

    /// The path of a cgroup by its id; `None` when it is gone or was not found within the caps.
    /// Children of the cgroup `near` are compared first.
    pub fn path_of(&self, id: u64, near: Option<&str>) -> Option<String> {
        let child =
            |parent: &str| children(&self.dir_of(parent)?, parent).into_iter().find(|(_, path)| self.is(path, id));
        if let Some((_, path)) = near.and_then(child) {
            return Some(path);
        }
        let (mut answer, mut seen) = (None, 0);
        self.visit(self.root.clone(), &mut |dir, path, _| {
            seen += 1;
            if id_of(dir) == Some(id) {
                answer = Some(path.to_owned());
            }
            answer.is_none() && seen < MAX_CGROUPS
        });
        answer
    }

    fn is(&self, path: &str, id: u64) -> bool {
        self.id_of(path) == Some(id)
    }

    /// Visits the tree, parents first, until `each` says false. False when it did, or when it went too deep.
    pub(super) fn visit(&self, from: String, each: &mut dyn FnMut(&Path, &str, Option<u64>) -> bool) -> bool {
        let Some(top) = self.dir_of(&from) else { return true };
        let mut complete = true;
        let mut todo = vec![(top, from, None, 0usize)];
        while let Some((dir, path, parent_id, depth)) = todo.pop() {
            if !each(&dir, &path, parent_id) {
                return false;
            }
            let below = children(&dir, &path);
            if below.is_empty() {
                continue;
            }
            if depth >= MAX_DEPTH {
                complete = false;
                continue;
            }
            let id = id_of(&dir);
            todo.extend(below.into_iter().map(|(dir, path)| (dir, path, id, depth + 1)));
        }
        complete
    }

    fn read_dir(&self, dir: &Path, path: &str, parent_id: Option<u64>, boot_ns: u64) -> Option<CgroupFound> {
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

/// The directories in a cgroup's directory, with their paths.
fn children(dir: &Path, path: &str) -> Vec<(PathBuf, String)> {
    let Ok(entries) = fs::read_dir(dir) else { return Vec::new() };
    let mut below: Vec<_> = entries
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .take(MAX_CGROUPS)
        .map(|entry| {
            let name = entry.file_name();
            (entry.path(), format!("{}/{}", path.trim_end_matches('/'), name.to_string_lossy()))
        })
        .collect();
    // Last first: the walk takes from the end.
    below.sort_unstable_by(|a, b| b.1.cmp(&a.1));
    below
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
        let walk = v2.walk(1);
        let paths: Vec<_> = walk.found.iter().map(|found| found.path.as_str()).collect();
        assert_eq!(paths[..5], ["/", "/a", "/a/x", "/d", "/d/d"]);
        assert!(walk.truncated);
        assert_eq!(walk.found.len(), 3 + MAX_DEPTH);
        let parent = |path: &str| walk.found.iter().find(|found| found.path == path).unwrap().parent_id;
        assert_eq!((parent("/"), parent("/a/x")), (None, v2.id_of("/a")));
    }

    #[test]
    fn ids_lead_back_to_paths() {
        let (dir, v2) = tree(2);
        fs::create_dir_all(dir.path().join("a/b")).unwrap();
        let id = v2.id_of("/a/b").unwrap();
        for near in [None, Some("/a"), Some("/"), Some("/gone")] {
            assert_eq!(v2.path_of(id, near).as_deref(), Some("/a/b"));
        }
        assert_eq!(v2.path_of(u64::MAX, None), None);
        assert_eq!(v2.path_of(v2.id_of("/").unwrap(), None).as_deref(), Some("/"));
    }

    #[test]
    fn this_machine_can_be_walked() {
        let Ok(hierarchy) = Hierarchy::find() else { return };
        let walk = hierarchy.walk(1);
        assert!(walk.found.iter().any(|found| found.path == hierarchy.root));
        let own = hierarchy.own_path().unwrap();
        if let Some(found) = hierarchy.read(&own, 1) {
            assert_eq!(hierarchy.id_of_process(std::process::id()), Some(found.id));
            assert_eq!(hierarchy.path_of(found.id, None), Some(own));
        }
    }
}
