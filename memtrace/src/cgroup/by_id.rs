//! Finds the directory of a cgroup by its id, without a walk: kernfs takes the id as a file handle
//! (fs/kernfs/mount.c, `kernfs_fh_to_dentry`; FILEID_KERNFS in include/linux/exportfs.h, 5.5 and
//! newer). Needs CAP_DAC_READ_SEARCH; where that is missing, the caller has to walk.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use rustix::fs::{Dir, Mode, OFlags, fstat, openat};

use super::files::{CgroupDir, MAX_DEPTH};
use super::hierarchy::Hierarchy;

/// `FILEID_KERNFS`.
const FILEID_KERNFS: i32 = 0xfe;
/// Entries of parents' directories that are looked at for the names in a path that is too long for
/// readlink(2): whoever makes such a path can make many.
const ENTRIES_CAP: usize = 8192;

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
        by_id.find(hierarchy, fstat(&by_id.mount).ok()?.st_ino).map(|_| by_id)
    }

    /// The directory of a cgroup. `None` when there is no such cgroup, or when it is outside of what
    /// is mounted here.
    pub(super) fn find(&self, hierarchy: &Hierarchy, id: u64) -> Option<CgroupDir> {
        let path = path_of(self.open(id).ok()?)?;
        let below = path.strip_prefix(&hierarchy.mount).ok()?;
        // A removed one has a path too, and one outside of the mount has the path of something else.
        hierarchy.open_below(below).ok().filter(|dir| dir.id() == Some(id))
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

/// The path of an open directory. That of an ancestor when it is longer than PATH_MAX, which the
/// kernel does not say (fs/proc/base.c, `do_proc_readlink`), and the names below that.
fn path_of(mut dir: OwnedFd) -> Option<PathBuf> {
    let (mut names, mut entries_left) = (Vec::new(), ENTRIES_CAP);
    for _ in 0..=MAX_DEPTH {
        match fs::read_link(format!("/proc/self/fd/{}", dir.as_raw_fd())) {
            Ok(path) => return Some(names.iter().rev().fold(path, |path: PathBuf, name| path.join(name))),
            Err(error) if error.raw_os_error() == Some(libc::ENAMETOOLONG) => {}
            Err(_) => return None,
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let parent = openat(&dir, "..", flags, Mode::empty()).ok()?;
        names.push(name_in(parent.as_fd(), fstat(&dir).ok()?.st_ino, &mut entries_left)?);
        dir = parent;
    }
    None
}

/// The name of the directory with this inode number in another one.
fn name_in(parent: BorrowedFd<'_>, id: u64, entries_left: &mut usize) -> Option<OsString> {
    let entries = Dir::read_from(parent).ok()?.take(*entries_left);
    for entry in entries.flatten() {
        *entries_left = entries_left.saturating_sub(1);
        if entry.ino() == id && entry.file_name() != c"." {
            return Some(OsStr::from_bytes(entry.file_name().to_bytes()).to_owned());
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::of_machine;

    #[test]
    fn cgroups_of_this_machine_are_found_by_id() {
        let Some(hierarchy) = of_machine::found("a memory controller", Hierarchy::find()) else { return };
        let by_id = ById::new(&hierarchy).ok_or("not allowed, or not by this kernel");
        let Some(by_id) = of_machine::found("cgroups by their id", by_id) else { return };
        let found = hierarchy.walk(1, 50).found;
        assert!(found.iter().any(|found| found.parent_id.is_none()));
        for cgroup in found {
            let removed = hierarchy.id_of(&cgroup.path) != Some(cgroup.id);
            let found = by_id.find(&hierarchy, cgroup.id);
            let path = found.map(|dir| hierarchy.path_of(&dir.below));
            assert!(removed || path == Some(cgroup.path.into()));
        }
        assert!(by_id.find(&hierarchy, u64::MAX - 1).is_none());
    }

    #[test]
    fn a_path_longer_than_the_kernel_says_is_put_together_from_names() {
        let root = tempfile::tempdir().unwrap();
        let mut dir: OwnedFd = fs::File::open(root.path()).unwrap().into();
        let mut expected = root.path().canonicalize().unwrap();
        for level in 0..20 {
            let name = OsString::from(format!("{level:0>250}"));
            for other in ["a", "b"] {
                rustix::fs::mkdirat(&dir, other, Mode::RWXU).unwrap();
            }
            rustix::fs::mkdirat(&dir, &name, Mode::RWXU).unwrap();
            dir = openat(&dir, &name, OFlags::PATH | OFlags::DIRECTORY, Mode::empty()).unwrap();
            expected.push(name);
        }
        assert_eq!(path_of(dir), Some(expected));
    }

    #[test]
    fn a_file_system_without_such_handles_is_no_help() {
        let dir = tempfile::tempdir().unwrap();
        let hierarchy = Hierarchy { version: 2, mount: dir.path().into(), hierarchy_id: 0, root: "/".into() };
        assert!(ById::new(&hierarchy).is_none());
    }
}
