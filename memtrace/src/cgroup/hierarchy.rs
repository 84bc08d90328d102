//! Which hierarchy the memory controller is in, and where it is mounted: on version 1, on version
//! 2, and on hosts that have both.
//!
//! On a hybrid host cgroup v2 is mounted beside the v1 hierarchies, and a controller is in one of
//! them only. /proc/cgroups says which: `memory 4 ..` is v1 hierarchy 4, `memory 0 ..` is v2
//! (kernel/cgroup/cgroup-v1.c `proc_cgroupstats_show`).
//!
//! Names of cgroups and of mount points are bytes: whoever may make one chooses any but `/` and NUL,
//! and /proc has them as they are. So nothing here has to be UTF-8; [`shown`] makes text of a path.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Component, Path, PathBuf};

use memtrace_engine::decode::printable;

/// Bytes of a path that are shown; the rest is cut. The engine keeps a path for each cgroup.
const SHOWN_CAP: usize = 4096;

/// Why the memory controller cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CgroupError {
    /// A file of /proc cannot be read.
    #[error("failed to read {path}: {error}")]
    Proc {
        /// Its path.
        path: String,
        /// The error of the kernel.
        error: String,
    },
    /// The controller is in a version 1 hierarchy that is not mounted here.
    #[error("the memory controller is in cgroup v1 hierarchy {hierarchy_id}, which is not mounted here")]
    NotMounted {
        /// Its number.
        hierarchy_id: u32,
    },
    /// Version 2 is mounted, and has no memory controller.
    #[error("cgroup v2 at {} has no memory controller", shown(mount))]
    NoController {
        /// Where it is mounted.
        mount: PathBuf,
    },
    /// Neither version is mounted.
    #[error("no cgroup file system with a memory controller is mounted")]
    Nothing,
}

/// The cgroup hierarchy that has the memory controller.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hierarchy {
    /// cgroup version: 1 or 2.
    pub version: u32,
    /// Its mount point.
    pub mount: PathBuf,
    /// Number of the hierarchy, as in /proc/cgroups; 0 on version 2.
    pub hierarchy_id: u32,
    /// The cgroup that is mounted there: `/`, or another one inside a container.
    pub root: PathBuf,
}

/// One line of mountinfo.
struct Mount<'a> {
    root: PathBuf,
    at: PathBuf,
    kind: &'a [u8],
    options: &'a [u8],
}

/// In which memory cgroup a process is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Membership {
    /// Its path in the hierarchy.
    Path(PathBuf),
    /// In one whose path the kernel does not say, because it is longer than PATH_MAX, in this or in
    /// another hierarchy (kernel/cgroup/cgroup.c, `proc_cgroup_show`).
    TooLong,
    /// The process is gone, or is in none.
    None,
}

/// The path of a cgroup or a mount as text that is safe for a terminal, escaped as the engine does
/// (`\xNN`), at most 4 KiB. Only for people: it does not lead back to the cgroup.
pub fn shown(path: &Path) -> String {
    let mut text = printable(path.as_os_str().as_bytes());
    if text.len() > SHOWN_CAP {
        text.truncate(text.floor_char_boundary(SHOWN_CAP));
        text.push('…');
    }
    text
}

impl Hierarchy {
    /// Finds it on this host.
    pub fn find() -> Result<Self, CgroupError> {
        let read = |path: &str| {
            std::fs::read(path).map_err(|error| CgroupError::Proc { path: path.into(), error: error.to_string() })
        };
        // Kernels without version 1 may lack /proc/cgroups.
        let cgroups = read("/proc/cgroups").unwrap_or_default();
        find_in(&read("/proc/self/mountinfo")?, &String::from_utf8_lossy(&cgroups), |mount| {
            std::fs::read_to_string(mount.join("cgroup.controllers")).unwrap_or_default()
        })
    }

    /// The directory of a cgroup, by its path in the hierarchy; `None` when it is outside of what is mounted here.
    pub fn dir_of(&self, path: impl AsRef<Path>) -> Option<PathBuf> {
        self.below(path.as_ref()).map(|below| join(&self.mount, &below))
    }

    /// The path of a cgroup from the root of what is mounted here, which has the empty one; `None`
    /// when it is outside.
    pub(super) fn below(&self, path: &Path) -> Option<PathBuf> {
        let below = path.strip_prefix(&self.root).ok()?;
        below.components().all(|part| matches!(part, Component::Normal(_))).then(|| below.to_owned())
    }

    /// The path in the hierarchy of what is at `below` from the root of what is mounted here.
    pub(super) fn path_of(&self, below: &Path) -> PathBuf {
        join(&self.root, below)
    }

    /// The path of the memory cgroup in the text of a /proc/PID/cgroup file.
    fn path_in(&self, proc_cgroup: &[u8]) -> Option<PathBuf> {
        proc_cgroup.split(|byte| *byte == b'\n').find_map(|line| {
            // A path may hold colons.
            let mut parts = line.splitn(3, |byte| *byte == b':');
            let (id, controllers, path) = (parts.next()?, parts.next()?, parts.next()?);
            let ours = match self.version {
                1 => controllers.split(|byte| *byte == b',').any(|controller| controller == b"memory"),
                _ => id == b"0" && controllers.is_empty(),
            };
            (ours && path.starts_with(b"/")).then(|| OsStr::from_bytes(path).into())
        })
    }

    /// In which memory cgroup a process is.
    pub fn membership(&self, pid: u32) -> Membership {
        self.membership_in(std::fs::read(format!("/proc/{pid}/cgroup")))
    }

    fn membership_in(&self, proc_cgroup: io::Result<Vec<u8>>) -> Membership {
        match proc_cgroup {
            Ok(text) => self.path_in(&text).map_or(Membership::None, Membership::Path),
            Err(error) if error.raw_os_error() == Some(libc::ENAMETOOLONG) => Membership::TooLong,
            Err(_) => Membership::None,
        }
    }

    /// Path of the caller's own memory cgroup.
    pub fn own_path(&self) -> Option<PathBuf> {
        self.path_in(&std::fs::read("/proc/self/cgroup").ok()?)
    }
}

/// Joins without the slash that an empty second path would add.
fn join(path: &Path, below: &Path) -> PathBuf {
    if below.as_os_str().is_empty() { path.to_owned() } else { path.join(below) }
}

/// Finds the hierarchy in mountinfo and the text of /proc/cgroups. `controllers` reads a version 2
/// mount's cgroup.controllers.
fn find_in(mountinfo: &[u8], cgroups: &str, controllers: impl Fn(&Path) -> String) -> Result<Hierarchy, CgroupError> {
    let in_v1 = memory_hierarchy(cgroups).filter(|id| *id != 0);
    let mounts: Vec<Mount> = mountinfo.split(|byte| *byte == b'\n').filter_map(mount).collect();
    // The widest view first: a mount of the root shows more than a mount of a container's cgroup.
    let widest = |kind: &[u8], option: Option<&[u8]>| {
        let has = |mount: &Mount, option| mount.options.split(|byte| *byte == b',').any(|o| o == option);
        mounts
            .iter()
            .filter(|mount| mount.kind == kind)
            .filter(|mount| option.is_none_or(|option| has(mount, option)))
            .min_by_key(|mount| mount.root.as_os_str().len())
    };
    if let Some(hierarchy_id) = in_v1 {
        let mount = widest(b"cgroup", Some(b"memory")).ok_or(CgroupError::NotMounted { hierarchy_id })?;
        return Ok(Hierarchy { version: 1, mount: mount.at.clone(), hierarchy_id, root: mount.root.clone() });
    }
    let mount = widest(b"cgroup2", None).ok_or(CgroupError::Nothing)?;
    if !controllers(&mount.at).split_whitespace().any(|controller| controller == "memory") {
        return Err(CgroupError::NoController { mount: mount.at.clone() });
    }
    Ok(Hierarchy { version: 2, mount: mount.at.clone(), hierarchy_id: 0, root: mount.root.clone() })
}

/// The `hierarchy` column of `memory` in /proc/cgroups.
fn memory_hierarchy(cgroups: &str) -> Option<u32> {
    cgroups.lines().find_map(|line| {
        let mut columns = line.split_whitespace();
        if columns.next() != Some("memory") {
            return None;
        }
        columns.next()?.parse().ok()
    })
}

/// `id parent dev root mount-point options [optional]... - type source super-options`. Spaces in a
/// name are escaped, so a `-` between two of them is never part of one.
fn mount(line: &[u8]) -> Option<Mount<'_>> {
    let mut words = line.split(|byte| *byte == b' ');
    let (root, at) = (words.nth(3)?, words.next()?);
    let mut right = words.skip_while(|word| *word != b"-").skip(1);
    let (kind, _, options) = (right.next()?, right.next()?, right.next()?);
    Some(Mount { root: unescape(root), at: unescape(at), kind, options })
}

/// Undoes mountinfo's octal escapes (`\040` is a space).
fn unescape(mut rest: &[u8]) -> PathBuf {
    let mut out = Vec::with_capacity(rest.len());
    loop {
        rest = match rest {
            [] => break,
            [b'\\', a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', tail @ ..] => {
                out.push((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'));
                tail
            }
            [byte, tail @ ..] => {
                out.push(*byte);
                tail
            }
        };
    }
    OsString::from_vec(out).into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::of_machine;

    const HYBRID: &str = "\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime shared:9 - cgroup cgroup rw,memory
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
";
    const V1: &str = "#subsys_name\thierarchy\tnum_cgroups\tenabled\ncpu\t1\t1\t1\nmemory\t4\t11\t1\n";
    const V2: &str = "#subsys_name\thierarchy\tnum_cgroups\tenabled\ncpu\t0\t1\t1\nmemory\t0\t11\t1\n";
    const PURE: &str = "31 23 0:28 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw,nsdelegate\n";

    fn found(version: u32, mount: &str, hierarchy_id: u32, root: &str) -> Result<Hierarchy, CgroupError> {
        Ok(Hierarchy { version, mount: mount.into(), hierarchy_id, root: root.into() })
    }

    fn find(mounts: &str, cgroups: &str, controllers: impl Fn(&Path) -> String) -> Result<Hierarchy, CgroupError> {
        find_in(mounts.as_bytes(), cgroups, controllers)
    }

    #[test]
    fn where_the_controller_is() {
        let none = |_: &Path| String::new();
        let memory = |_: &Path| "cpuset cpu io memory pids\n".to_owned();
        assert_eq!(find(HYBRID, V1, none), found(1, "/sys/fs/cgroup/memory", 4, "/"));
        assert_eq!(find(HYBRID, V2, memory), found(2, "/sys/fs/cgroup/unified", 0, "/"));
        assert_eq!(find(PURE, V2, memory), found(2, "/sys/fs/cgroup", 0, "/"));
        assert_eq!(find(PURE, "", memory), found(2, "/sys/fs/cgroup", 0, "/"), "no /proc/cgroups");
        assert_eq!(find(PURE, V1, memory), Err(CgroupError::NotMounted { hierarchy_id: 4 }));
        assert_eq!(find(PURE, V2, none), Err(CgroupError::NoController { mount: "/sys/fs/cgroup".into() }));
        assert_eq!(find("", V2, none), Err(CgroupError::Nothing));
        assert_eq!(find("garbage - x\n\n - - -", "memory", none), Err(CgroupError::Nothing));
    }

    #[test]
    fn the_widest_mount_is_taken_and_escapes_are_undone() {
        let mounts = "1 2 0:3 /docker/ab /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n\
                      1 2 0:3 / /host/cgroup\\040tree rw master:1 - cgroup2 cgroup2 rw\n";
        let memory = |_: &Path| "memory".to_owned();
        assert_eq!(find(mounts, V2, memory), found(2, "/host/cgroup tree", 0, "/"));
    }

    #[test]
    fn paths_and_directories() {
        let v1 = found(1, "/m", 4, "/").unwrap();
        let v2 = found(2, "/m", 0, "/").unwrap();
        let text = "4:memory:/a:b/c\n3:cpuset:/\n1:name=systemd:/s\n0::/u:cri:x\n";
        assert_eq!(v1.path_in(text.as_bytes()), Some("/a:b/c".into()));
        assert_eq!(v2.path_in(text.as_bytes()), Some("/u:cri:x".into()));
        assert_eq!(v1.path_in(b"2:cpu,memory:/x"), Some("/x".into()));
        assert_eq!(v1.path_in(b"0::/x"), None);
        assert_eq!(v1.dir_of("/"), Some("/m".into()));
        assert_eq!(v1.dir_of("/a/b"), Some("/m/a/b".into()));
        assert_eq!(v1.dir_of("/../b"), None);
        assert_eq!(v1.dir_of("b"), None);
        let inner = found(2, "/m", 0, "/docker/ab").unwrap();
        assert_eq!(inner.dir_of("/docker/ab/x"), Some("/m/x".into()));
        assert_eq!(inner.dir_of("/docker/ab"), Some("/m".into()));
        assert_eq!(inner.dir_of("/docker/abc"), None);
        assert_eq!(inner.dir_of("/"), None);
    }

    #[test]
    fn names_that_are_not_text_hide_nothing() {
        let bytes = |path: &[u8]| PathBuf::from(OsStr::from_bytes(path));
        let mounts = b"1 2 0:44 / /home/u/\xff\x1b rw - fuse.x\xfe \xff rw,user_id=1000\n\
            3 2 0:45 / /mnt/- rw - tmpfs - rw\n\
            31 23 0:28 / /sys/\xff\\040fs rw,nosuid shared:9 - cgroup2 cgroup2 rw\n\
            9 2 0:44 / /home/u/\xff";
        let mut hierarchy = find_in(mounts, V2, |_| "memory".to_owned()).unwrap();
        assert_eq!((hierarchy.version, &hierarchy.mount), (2, &bytes(b"/sys/\xff fs")));
        // A name in another hierarchy, before and after the one that counts.
        let proc_cgroup = b"5:cpu:/\xff\n4:memory:/a/\xff:\x1b/b\n3:name=\xff:/\xfe\n0::/u\xff\n";
        assert_eq!(hierarchy.path_in(proc_cgroup), Some(bytes(b"/u\xff")));
        hierarchy.version = 1;
        let path = bytes(b"/a/\xff:\x1b/b");
        assert_eq!(hierarchy.path_in(proc_cgroup), Some(path.clone()));
        assert_eq!(hierarchy.dir_of(&path), Some(bytes(b"/sys/\xff fs/a/\xff:\x1b/b")));
        assert_eq!(shown(&path), "/a/\\xff:\\x1b/b");
        assert_eq!(shown(&bytes(&b"\xff".repeat(5000))), "\\xff".repeat(1024) + "…");
    }

    #[test]
    fn a_membership_without_a_path_is_not_that_of_a_process_that_is_gone() {
        let v2 = found(2, "/m", 0, "/").unwrap();
        let too_long = io::Error::from_raw_os_error(libc::ENAMETOOLONG);
        assert_eq!(v2.membership_in(Err(too_long)), Membership::TooLong);
        assert_eq!(v2.membership_in(Err(io::ErrorKind::NotFound.into())), Membership::None);
        assert_eq!(v2.membership_in(Ok(b"0::/a\n".into())), Membership::Path("/a".into()));
        assert_eq!(v2.membership_in(Ok(b"1:cpu:/a\n".into())), Membership::None);
    }

    #[test]
    fn this_machine_has_one() {
        let Some(hierarchy) = of_machine::found("a memory controller", Hierarchy::find()) else { return };
        assert!(hierarchy.mount.is_dir());
        assert_eq!(hierarchy.version == 2, hierarchy.hierarchy_id == 0);
        let own = hierarchy.own_path().unwrap();
        assert_eq!(hierarchy.membership(std::process::id()), Membership::Path(own));
        assert_eq!(hierarchy.membership(u32::MAX), Membership::None);
    }
}
