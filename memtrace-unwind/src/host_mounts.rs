//! The file systems that the host has mounted, by device number.
//!
//! A number is used again once its file system is gone, so the table is only as good as it is new.
//! The kernel says when it has changed: mountinfo can be polled (fs/proc_namespace.c,
//! `mounts_poll`), and it says so before the number is free.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::proc_dir::{FileStamp, ProcDir, mounted};

/// Bytes read of the host's mountinfo; its containers have long options.
const MAX_BYTES: u64 = 4 << 20;
/// Device numbers kept.
const MAX_DEVICES: usize = 16_384;
/// Pause between two readings, however often the table changes. Until the next one nothing is
/// known.
const PAUSE: Duration = Duration::from_secs(1);
/// What the kinds of file systems begin with that another process or another machine answers for.
const REMOTE: [&str; 12] =
    ["fuse", "nfs", "cifs", "smb", "ceph", "9p", "afs", "autofs", "glusterfs", "lustre", "ocfs2", "virtiofs"];

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct HostMounts {
    table: Option<File>,
    read: Option<Instant>,
    /// The table has changed since.
    stale: bool,
    /// Those that answer for themselves, and that of memory files, which nobody mounts. Cap:
    /// [`MAX_DEVICES`].
    devices: BTreeSet<(u32, u32)>,
}

impl HostMounts {
    /// Whether a file system with this number is mounted on the host and answers for itself:
    /// neither another process nor another machine does.
    pub(crate) fn have(&mut self, device: (u32, u32)) -> bool {
        self.stale |= self.table.as_ref().is_none_or(has_changed);
        if self.stale && self.read.is_none_or(|read| read.elapsed() >= PAUSE) {
            self.read_table();
        }
        // The number of a disk is that of the disk.
        self.devices.contains(&device) && (!self.stale || device.0 != 0)
    }

    fn read_table(&mut self) {
        if self.table.is_none() {
            // Of the first process, or of this one if that is hidden. What has changed is said
            // since it was opened.
            let of = |pid| ProcDir::of(pid).and_then(|dir| dir.file("mountinfo"));
            self.table = of(1).or_else(|| of(std::process::id()));
        }
        self.read = Some(Instant::now());
        let mut mounts = Vec::new();
        let Some(mut table) = self.table.as_ref() else { return };
        let begun = table.seek(SeekFrom::Start(0)).is_ok();
        self.stale = !begun || table.take(MAX_BYTES).read_to_end(&mut mounts).is_err();
        let answer = |kind: &[u8]| !REMOTE.iter().any(|remote| kind.starts_with(remote.as_bytes()));
        let found = mounted(&mounts).filter(|(_, kind)| answer(kind)).map(|(device, _)| device);
        self.devices = found.chain(of_memory_files()).take(MAX_DEVICES).collect();
    }
}

/// Whether the table has changed since this was last asked.
fn has_changed(table: &File) -> bool {
    let mut asked = [PollFd::new(table, PollFlags::PRI)];
    let answered = poll(&mut asked, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }));
    answered.is_err() || asked.iter().any(|asked| asked.revents().intersects(PollFlags::PRI | PollFlags::ERR))
}

fn of_memory_files() -> Option<(u32, u32)> {
    let file = rustix::fs::memfd_create("device", rustix::fs::MemfdFlags::CLOEXEC).ok()?;
    Some(FileStamp::of(&file.into())?.device())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_host_has_mounted_is_known() {
        let mut mounts = HostMounts::default();
        assert!(mounts.have(of_memory_files().unwrap()) && !mounts.stale);
        assert!(mounts.devices.len() > 1 && !mounts.have((0, 0)));
    }

    #[test]
    fn numbers_that_are_given_away_are_not_known_until_the_table_is_read_again() {
        let mut mounts = HostMounts::default();
        assert!(!mounts.have((0, 0)));
        mounts.devices.extend([(0, 7), (8, 1)]);
        assert!(mounts.have((0, 7)) && mounts.have((8, 1)));
        mounts.stale = true;
        assert!(!mounts.have((0, 7)) && mounts.have((8, 1)));
        mounts.read = mounts.read.and_then(|read| read.checked_sub(PAUSE));
        assert!(!mounts.have((0, 7)) && !mounts.have((8, 1)) && !mounts.stale);
    }
}
