//! Files whose pages go through the page cache: on a disk, or the disk itself where no file system
//! is on one. And a disk so small that it is soon full.

use std::ffi::CString;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use rustix::fs::FsWord;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use tempfile::{NamedTempFile, TempDir};

/// `TMPFS_MAGIC` and `RAMFS_MAGIC` (include/uapi/linux/magic.h). Pages of these cannot be dropped
/// from memory.
const IN_MEMORY: [FsWord; 2] = [0x0102_1994, 0x8584_58f6];
/// The disk of a virtual machine.
pub const DISK: &str = "/dev/vda";

/// A file or device of at least the asked size.
#[derive(Debug)]
pub enum Readable {
    /// A file, removed when dropped.
    File(NamedTempFile),
    /// A block device.
    Device(PathBuf),
}

impl Readable {
    /// Where it is.
    pub fn path(&self) -> &Path {
        match self {
            Self::File(file) => file.path(),
            Self::Device(path) => path,
        }
    }
}

/// Whether files in `dir` are on a disk, so that their pages can leave memory.
pub fn is_on_disk(dir: &Path) -> bool {
    rustix::fs::statfs(dir).is_ok_and(|fs| !IN_MEMORY.contains(&fs.f_type))
}

/// Makes a file of `mib`, or finds the disk of a virtual machine. The file's pages are dropped from
/// the cache as far as the kernel agrees.
pub fn readable(mib: usize) -> anyhow::Result<Readable> {
    let dir = Path::new("/var/tmp");
    if !is_on_disk(dir) {
        let device = PathBuf::from(DISK);
        ensure!(device.exists(), "{} is in memory and there is no {DISK}: nothing to read from", dir.display());
        return Ok(Readable::Device(device));
    }
    let mut file = NamedTempFile::new_in(dir).context("failed to make a file to read")?;
    let chunk = vec![7u8; 1 << 20];
    (0..mib).try_for_each(|_| file.write_all(&chunk)).context("failed to fill a file to read")?;
    file.as_file().sync_all().context("failed to sync a file to read")?;
    drop_cached(file.as_file())?;
    Ok(Readable::File(file))
}

/// Drops clean pages of a file, so that the next reader is charged for them.
fn drop_cached(file: &File) -> anyhow::Result<()> {
    rustix::fs::fadvise(file, 0, None, rustix::fs::Advice::DontNeed).context("failed to drop a file from the cache")
}

/// A small tmpfs, unmounted when dropped.
#[derive(Debug)]
pub struct TinyDisk(TempDir);

impl TinyDisk {
    /// Mounts one of so many KiB.
    pub fn mount(kib: usize) -> anyhow::Result<Self> {
        let dir = tempfile::tempdir().context("failed to make a directory to mount on")?;
        let options = CString::new(format!("size={kib}k,mode=0700"))?;
        mount(c"tmpfs", dir.path(), c"tmpfs", MountFlags::empty(), Some(options.as_c_str()))
            .context("failed to mount a tiny tmpfs")?;
        Ok(Self(dir))
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for TinyDisk {
    fn drop(&mut self) {
        // a busy mount goes away with its last user
        let _ = unmount(self.0.path(), UnmountFlags::DETACH);
    }
}

/// A new file, already unlinked, that lives as long as it is open.
pub fn unlinked(path: &Path) -> anyhow::Result<File> {
    let made = File::options().create_new(true).read(true).write(true).open(path);
    let file = made.with_context(|| format!("failed to create {}", path.display()))?;
    std::fs::remove_file(path).with_context(|| format!("failed to remove {}", path.display()))?;
    Ok(file)
}
