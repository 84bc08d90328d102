//! Which hierarchy the memory controller is in, and where it is mounted: on version 1, on version
//! 2, and on hosts that have both.
//!
//! On a hybrid host cgroup v2 is mounted beside the v1 hierarchies, and a controller is in one of
//! them only. /proc/cgroups says which: `memory 4 ..` is v1 hierarchy 4, `memory 0 ..` is v2
//! (kernel/cgroup/cgroup-v1.c `proc_cgroupstats_show`).

use std::path::{Path, PathBuf};

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
    #[error("cgroup v2 at {} has no memory controller", mount.display())]
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
    pub root: String,
}

/// One line of mountinfo.
struct Mount {
    root: String,
    at: PathBuf,
    kind: String,
    options: String,
}

impl Hierarchy {
    /// Finds it on this host.
    pub fn find() -> Result<Self, CgroupError> {
        let read = |path: &str| {
            std::fs::read_to_string(path)
                .map_err(|error| CgroupError::Proc { path: path.into(), error: error.to_string() })
        };
        // Kernels without version 1 may lack /proc/cgroups.
        let cgroups = read("/proc/cgroups").unwrap_or_default();
        find_in(&read("/proc/self/mountinfo")?, &cgroups, |mount| {
            std::fs::read_to_string(mount.join("cgroup.controllers")).unwrap_or_default()
        })
    }

    /// The directory of a cgroup, by its path in the hierarchy; `None` when it is outside of what is mounted here.
    pub fn dir_of(&self, path: &str) -> Option<PathBuf> {
        let below = match self.root.as_str() {
            "/" => path.strip_prefix('/')?,
            root => match path.strip_prefix(root)? {
                "" => "",
                rest => rest.strip_prefix('/')?,
            },
        };
        let outside = below.split('/').any(|part| part == ".." || part == ".");
        (!outside).then(|| if below.is_empty() { self.mount.clone() } else { self.mount.join(below) })
    }

    /// The path of the memory cgroup in the text of a /proc/PID/cgroup file.
    pub fn path_in(&self, proc_cgroup: &str) -> Option<String> {
        proc_cgroup.lines().find_map(|line| {
            // A path may hold colons.
            let (id, rest) = line.split_once(':')?;
            let (controllers, path) = rest.split_once(':')?;
            let ours = match self.version {
                1 => controllers.split(',').any(|controller| controller == "memory"),
                _ => id == "0" && controllers.is_empty(),
            };
            (ours && path.starts_with('/')).then(|| path.to_owned())
        })
    }

    /// Path of a process' memory cgroup; `None` when the process is gone or outside of what is mounted here.
    pub fn path_of_process(&self, pid: u32) -> Option<String> {
        self.path_in(&std::fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?)
    }

    /// Path of the caller's own memory cgroup.
    pub fn own_path(&self) -> Option<String> {
        self.path_in(&std::fs::read_to_string("/proc/self/cgroup").ok()?)
    }
}

/// Finds the hierarchy in the text of mountinfo and /proc/cgroups. `controllers` reads a version 2
/// mount's cgroup.controllers.
fn find_in(mountinfo: &str, cgroups: &str, controllers: impl Fn(&Path) -> String) -> Result<Hierarchy, CgroupError> {
    let in_v1 = memory_hierarchy(cgroups).filter(|id| *id != 0);
    let mounts: Vec<Mount> = mountinfo.lines().filter_map(mount).collect();
    // The widest view first: a mount of the root shows more than a mount of a container's cgroup.
    let widest = |kind: &str, option: Option<&str>| {
        mounts
            .iter()
            .filter(|mount| mount.kind == kind)
            .filter(|mount| option.is_none_or(|option| mount.options.split(',').any(|o| o == option)))
            .min_by_key(|mount| mount.root.len())
    };
    if let Some(hierarchy_id) = in_v1 {
        let mount = widest("cgroup", Some("memory")).ok_or(CgroupError::NotMounted { hierarchy_id })?;
        return Ok(Hierarchy { version: 1, mount: mount.at.clone(), hierarchy_id, root: mount.root.clone() });
    }
    let mount = widest("cgroup2", None).ok_or(CgroupError::Nothing)?;
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

/// `id parent dev root mount-point options [optional]... - type source super-options`
fn mount(line: &str) -> Option<Mount> {
    let (left, right) = line.split_once(" - ")?;
    let mut left = left.split(' ').skip(3);
    let (root, at) = (left.next()?, left.next()?);
    let mut right = right.split(' ');
    let (kind, _, options) = (right.next()?, right.next()?, right.next()?);
    Some(Mount { root: unescape(root), at: unescape(at).into(), kind: kind.into(), options: options.into() })
}

/// Undoes mountinfo's octal escapes (`\040` is a space).
fn unescape(text: &str) -> String {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
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
    String::from_utf8_lossy(&out).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

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

    #[test]
    fn where_the_controller_is() {
        let none = |_: &Path| String::new();
        let memory = |_: &Path| "cpuset cpu io memory pids\n".to_owned();
        assert_eq!(find_in(HYBRID, V1, none), found(1, "/sys/fs/cgroup/memory", 4, "/"));
        assert_eq!(find_in(HYBRID, V2, memory), found(2, "/sys/fs/cgroup/unified", 0, "/"));
        assert_eq!(find_in(PURE, V2, memory), found(2, "/sys/fs/cgroup", 0, "/"));
        assert_eq!(find_in(PURE, "", memory), found(2, "/sys/fs/cgroup", 0, "/"), "no /proc/cgroups");
        assert_eq!(find_in(PURE, V1, memory), Err(CgroupError::NotMounted { hierarchy_id: 4 }));
        assert_eq!(find_in(PURE, V2, none), Err(CgroupError::NoController { mount: "/sys/fs/cgroup".into() }));
        assert_eq!(find_in("", V2, none), Err(CgroupError::Nothing));
        assert_eq!(find_in("garbage - x\n\n - - -", "memory", none), Err(CgroupError::Nothing));
    }

    #[test]
    fn the_widest_mount_is_taken_and_escapes_are_undone() {
        let mounts = "1 2 0:3 /docker/ab /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n\
                      1 2 0:3 / /host/cgroup\\040tree rw master:1 - cgroup2 cgroup2 rw\n";
        let memory = |_: &Path| "memory".to_owned();
        assert_eq!(find_in(mounts, V2, memory), found(2, "/host/cgroup tree", 0, "/"));
    }

    #[test]
    fn paths_and_directories() {
        let v1 = found(1, "/m", 4, "/").unwrap();
        let v2 = found(2, "/m", 0, "/").unwrap();
        let text = "4:memory:/a:b/c\n3:cpuset:/\n1:name=systemd:/s\n0::/u:cri:x\n";
        assert_eq!(v1.path_in(text).as_deref(), Some("/a:b/c"));
        assert_eq!(v2.path_in(text).as_deref(), Some("/u:cri:x"));
        assert_eq!(v1.path_in("2:cpu,memory:/x").as_deref(), Some("/x"));
        assert_eq!(v1.path_in("0::/x"), None);
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
    fn this_machine_has_one() {
        let Ok(hierarchy) = Hierarchy::find() else { return };
        assert!(hierarchy.mount.is_dir());
        assert_eq!(hierarchy.version == 2, hierarchy.hierarchy_id == 0);
        assert_eq!(hierarchy.path_of_process(std::process::id()), hierarchy.own_path());
        assert_eq!(hierarchy.path_of_process(u32::MAX), None);
    }
}
