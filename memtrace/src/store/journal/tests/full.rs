//! The journal on a file system that is smaller than its ring, or that others fill. Real ones, so these tests need root.

use std::ffi::CStr;
use std::os::unix::fs::MetadataExt;

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use super::*;
use crate::of_machine;

/// A tmpfs; unmounted when dropped.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    fn mount(options: &CStr) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let mounted = mount(c"tmpfs", dir.path(), c"tmpfs", MountFlags::empty(), Some(options));
        of_machine::found("a file system to fill", mounted).map(|()| Self(dir))
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    /// Takes all room that is left, but for a page.
    fn fill(&self) -> std::path::PathBuf {
        let filler = self.path().join("filler");
        let room = rustix::fs::statfs(self.path()).unwrap();
        fs::write(&filler, vec![0; (room.f_bavail as usize - 1) * room.f_bsize as usize]).unwrap();
        filler
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = unmount(self.0.path(), UnmountFlags::DETACH);
    }
}

/// Bytes that records of eight take.
const RECORD_BYTES: u64 = FRAME_BYTES as u64 + 8;

fn is_gapless(records: &[u64]) -> bool {
    records.windows(2).all(|pair| pair[1] == pair[0] + 1)
}

#[test]
fn a_ring_larger_than_its_file_system_has_the_newest_that_fits_and_loses_nothing() {
    let Some(disk) = SmallDisk::mount(c"size=1m") else { return };
    let mut writer = JournalWriter::open(disk.path(), 512 << 10, 4 << 20).unwrap();
    let count = (6 << 20) / RECORD_BYTES;
    fill(&mut writer, 0..count);
    writer.flush().unwrap();
    assert_eq!(writer.lost(), 0);
    let (records, _, stats) = read(disk.path());
    assert_eq!((*records.last().unwrap(), stats.torn_bytes, stats.missing_segments), (count - 1, 0, 0));
    assert!(is_gapless(&records));
    // At least an eighth less than there is room for, and the segment that is being written.
    assert!(records.len() as u64 * RECORD_BYTES > 512 << 10, "{} records", records.len());
    let on_disk: u64 = names(disk.path()).iter().map(|name| fs::metadata(disk.path().join(name)).unwrap().len()).sum();
    assert_eq!(on_disk, writer.bytes());
}

#[test]
fn what_others_take_is_given_up_and_taken_again_when_they_are_gone() {
    let Some(disk) = SmallDisk::mount(c"size=4m") else { return };
    let dir = disk.path().join("journal");
    let mut writer = JournalWriter::open(&dir, 256 << 10, 2 << 20).unwrap();
    let step = (3 << 20) / RECORD_BYTES;
    fill(&mut writer, 0..step);
    writer.flush().unwrap();
    assert!(writer.bytes() > 1 << 20);
    let filler = disk.fill();
    fill(&mut writer, step..step + 1000);
    let given_up = writer.bytes();
    fill(&mut writer, step + 1000..2 * step);
    writer.flush().unwrap();
    assert!(given_up > 1 << 20, "no more than is needed is given up: {given_up} bytes are left");
    let (records, _, _) = read(&dir);
    assert!(is_gapless(&records) && *records.last().unwrap() == 2 * step - 1);
    assert!(names(&dir).iter().all(|name| fs::metadata(dir.join(name)).unwrap().size() < 600 << 10));
    fs::remove_file(filler).unwrap();
    fill(&mut writer, 2 * step..4 * step);
    writer.flush().unwrap();
    assert!(writer.bytes() > (2 << 20) - (512 << 10), "the ring is as large as before: {} bytes", writer.bytes());
    assert!(names(&dir).len() <= 9, "and so are its segments: {:?}", names(&dir));
    assert_eq!(writer.lost(), 0);
    assert!(is_gapless(&read(&dir).0));
}

#[test]
fn the_run_before_makes_room_before_this_one_does() {
    let Some(disk) = SmallDisk::mount(c"size=1m") else { return };
    let mut writer = JournalWriter::open(disk.path(), 128 << 10, 4 << 20).unwrap();
    let count = (2 << 20) / RECORD_BYTES;
    fill(&mut writer, 0..count);
    drop(writer);
    set_aside(disk.path()).unwrap();
    let previous = disk.path().join(PREVIOUS);
    let before = names(&previous);
    assert!(before.len() > 4, "{before:?}");
    let mut writer = JournalWriter::open(disk.path(), 128 << 10, 4 << 20).unwrap();
    fill(&mut writer, 0..(512 << 10) / RECORD_BYTES);
    writer.flush().unwrap();
    assert_eq!((writer.lost(), read(disk.path()).0[0]), (0, 0), "nothing of this run is gone");
    let left = names(&previous);
    assert!(!left.is_empty() && before.ends_with(&left), "the newest of the run before are left: {left:?}");
    assert_eq!(*read(&previous).0.last().unwrap(), count - 1);
    fill(&mut writer, (512 << 10) / RECORD_BYTES..count);
    writer.flush().unwrap();
    assert!(names(&previous).is_empty(), "then it is this one's turn");
    assert_eq!((writer.lost(), *read(disk.path()).0.last().unwrap()), (0, count - 1));
}

#[test]
fn where_nothing_helps_each_flush_tries_once_and_what_is_lost_is_counted() {
    let Some(disk) = SmallDisk::mount(c"size=256k") else { return };
    let dir = disk.path().join("journal");
    let mut writer = JournalWriter::open(&dir, 64 << 10, 1 << 20).unwrap();
    let filler = disk.fill();
    let preamble: Vec<Fact> = (0..1000).map(tick).collect();
    for attempts in 1..=3 {
        assert!(writer.rotate_needed());
        assert_eq!(writer.begin_segment(&preamble).unwrap_err().kind(), io::ErrorKind::StorageFull);
        assert!(!writer.rotate_needed(), "it rests until the flush");
        assert!(writer.append(&Input::Record(b"lost")).is_err());
        assert_eq!((writer.lost(), names(&dir).len()), (attempts, 0));
        writer.flush().unwrap();
    }
    fs::remove_file(filler).unwrap();
    fill(&mut writer, 0..10);
    writer.flush().unwrap();
    assert_eq!((read(&dir).0, writer.lost()), ((0..10).collect(), 3));
}

#[test]
fn no_more_than_a_share_of_many_files_is_given_up_between_two_flushes() {
    let Some(disk) = SmallDisk::mount(c"size=256k") else { return };
    let previous = disk.path().join(PREVIOUS);
    fs::create_dir(&previous).unwrap();
    for sequence in 1..=100 {
        // Empty: giving them up makes no room.
        fs::write(previous.join(file_name(sequence)), "").unwrap();
    }
    fs::create_dir(previous.join(file_name(101))).unwrap();
    let mut writer = JournalWriter::open(disk.path(), 64 << 10, 1 << 20).unwrap();
    let filler = disk.fill();
    let preamble: Vec<Fact> = (0..1000).map(tick).collect();
    for left in [37, 1, 1] {
        assert!(writer.begin_segment(&preamble).is_err());
        assert_eq!(names(&previous).len(), left, "and a directory is no segment");
        writer.flush().unwrap();
    }
    fs::remove_file(filler).unwrap();
    writer.begin_segment(&preamble).unwrap();
}

#[test]
fn where_files_are_scarce_old_segments_make_room_for_new_ones_and_for_the_directory() {
    // The root, and six files.
    let Some(disk) = SmallDisk::mount(c"size=4m,nr_inodes=7") else { return };
    let mut writer = JournalWriter::open(disk.path(), 1000, 1 << 20).unwrap();
    fill(&mut writer, 0..1000);
    writer.flush().unwrap();
    assert_eq!((names(disk.path()).len(), writer.lost()), (6, 0));
    drop(writer);
    set_aside(disk.path()).unwrap();
    let previous = disk.path().join(PREVIOUS);
    assert_eq!((names(disk.path()), names(&previous).len()), (vec![PREVIOUS.to_owned()], 5));
    assert_eq!(*read(&previous).0.last().unwrap(), 999);
}
