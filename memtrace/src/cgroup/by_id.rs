//! Finds the directory of a cgroup by its id, without a walk: kernfs takes the id as a file handle
//! (fs/kernfs/mount.c, `kernfs_fh_to_dentry`; FILEID_KERNFS in include/linux/exportfs.h, 5.5 and
//! newer). Needs CAP_DAC_READ_SEARCH; where that is missing, the caller has to walk.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::PathBuf;

use super::files::id_of;
use super::hierarchy::Hierarchy;

/// `FILEID_KERNFS`.
const FILEID_KERNFS: i32 = 0xfe;

/// `struct file_handle` (include/linux/fs.h) of a kernfs node.
#[repr(C)]
struct KernfsHandle {
    handle_bytes: u32,
    handle_type: i32,
    id: u64,
}

/// Opens cgroups of one hierarchy by their ids.
#[derive(Debug)]
pub(super) struct ById {
    mount: fs::File,
}

impl ById {
    /// `None` where this kernel or these privileges do not open the root by its id.
    pub(super) fn new(hierarchy: &Hierarchy) -> Option<Self> {
        let by_id = Self { mount: fs::File::open(&hierarchy.mount).ok()? };
        by_id.find(hierarchy, id_of(&hierarchy.mount)?).map(|_| by_id)
    }

    /// The directory of a cgroup and its path from the root of the hierarchy. `None` when there is
    /// no such cgroup, or when it is outside of what is mounted here.
    pub(super) fn find(&self, hierarchy: &Hierarchy, id: u64) -> Option<(PathBuf, String)> {
        let fd = self.open(id).ok()?;
        let dir = fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())).ok()?;
        let below = dir.strip_prefix(&hierarchy.mount).ok()?.to_string_lossy().into_owned();
        let path = match (hierarchy.root.trim_end_matches('/'), below.as_str()) {
            (_, "") => hierarchy.root.clone(),
            (root, below) => format!("{root}/{below}"),
        };
        // A removed one has a link too, and one outside of the mount has a link to somewhere else.
        (id_of(&dir) == Some(id)).then_some((dir, path))
    }

    fn open(&self, id: u64) -> io::Result<OwnedFd> {
        let mut handle = KernfsHandle { handle_bytes: 8, handle_type: FILEID_KERNFS, id };
        let flags = libc::O_PATH | libc::O_DIRECTORY | libc::O_CLOEXEC;
        // SAFETY: the kernel reads the handle, whose `handle_bytes` bytes follow its head, during
        // the call. The descriptor it returns is new, so nothing else owns it.
        #[expect(unsafe_code, reason = "open_by_handle_at(2) has no safe call")]
        unsafe {
            let mount = libc::c_long::from(self.mount.as_raw_fd());
            let fd = libc::syscall(libc::SYS_open_by_handle_at, mount, &raw mut handle, libc::c_long::from(flags));
            match i32::try_from(fd) {
                Ok(fd) if fd >= 0 => Ok(OwnedFd::from_raw_fd(fd)),
                _ => Err(io::Error::last_os_error()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cgroups_of_this_machine_are_found_by_id() {
        let Ok(hierarchy) = Hierarchy::find() else { return };
        // Without the capability.
        let Some(by_id) = ById::new(&hierarchy) else { return };
        let found = hierarchy.walk(1, 50).found;
        assert!(found.iter().any(|found| found.path == hierarchy.root));
        for cgroup in found {
            let dir = hierarchy.dir_of(&cgroup.path).unwrap();
            let removed = hierarchy.id_of(&cgroup.path) != Some(cgroup.id);
            assert!(removed || by_id.find(&hierarchy, cgroup.id) == Some((dir, cgroup.path)));
        }
        assert_eq!(by_id.find(&hierarchy, u64::MAX - 1), None);
    }

    #[test]
    fn a_file_system_without_such_handles_is_no_help() {
        let dir = tempfile::tempdir().unwrap();
        let hierarchy = Hierarchy { version: 2, mount: dir.path().into(), hierarchy_id: 0, root: "/".into() };
        assert!(ById::new(&hierarchy).is_none());
    }
}
