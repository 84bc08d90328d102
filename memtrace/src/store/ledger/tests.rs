//! Tests of the ledgers: rotation, torn lines, and files that cannot be written.

use super::*;
use memtrace_incident::{KillEntry, SigkillCause};

type Kills = Ledger<KillLine>;

fn kill(pid: u32) -> KillLine {
    KillLine::Kill(KillEntry {
        incident: "01ARZ3NDEKTSV4RRFFQ69G5FAV".into(),
        boot_ns: 1,
        wall: "2026-03-01T03:12:45Z".into(),
        pid,
        tid: None,
        start_boot_ns: 2,
        comm: "a\nb".into(),
        cgroup_path: None,
        usage_bytes: Some(u64::MAX),
        limit_bytes: None,
        trigger_pid: 3,
        killed: true,
        boot_id: None,
    })
}

fn sigkill(pid: u32) -> SigkillEntry {
    SigkillEntry {
        boot_ns: 1,
        wall: "2026-03-01T03:12:45Z".into(),
        pid,
        start_boot_ns: 2,
        comm: "a\nb".into(),
        cgroup_id: Some(7),
        cgroup_path: None,
        cause: SigkillCause::Process,
        sender_pid: 3,
        sender_start_boot_ns: 4,
        sender_comm: "sh".into(),
        sender_uid: None,
        sender_cgroup_id: None,
        sender_cgroup_path: None,
        incident: None,
        more: None,
    }
}

fn pids(dir: &Path) -> Vec<u32> {
    read::<KillLine>(dir).unwrap().entries.iter().map(|kill| kill.key().1).collect()
}

#[test]
fn the_newest_lines_are_whole_ones_of_both_files() {
    let dir = tempfile::tempdir().unwrap();
    assert_eq!(newest_lines::<KillLine>(dir.path(), 100).unwrap(), b"");
    let mut kills = Kills::open(dir.path()).unwrap();
    let line = lines(&[kill(1)]).unwrap().len() as u64;
    kills.max_bytes = line * 2;
    for pid in 1..=3 {
        kills.append(&[kill(pid)]).unwrap();
    }
    std::fs::OpenOptions::new()
        .append(true)
        .open(dir.path().join(KillLine::FILE))
        .unwrap()
        .write_all(b"{torn")
        .unwrap();
    for (most, newest) in [
        (0, &[][..]),
        (line - 1, &[]),
        (line, &[3]),
        (line + 1, &[3]),
        (line * 2, &[2, 3]),
        (line * 3 - 1, &[2, 3]),
        (line * 3, &[1, 2, 3]),
        (u64::MAX, &[1, 2, 3]),
    ] {
        let found = LedgerLines::<KillLine>::parse(&newest_lines::<KillLine>(dir.path(), most).unwrap());
        let pids: Vec<u32> = found.entries.iter().map(|kill| kill.key().1).collect();
        assert_eq!((&*pids, found.bad_lines), (newest, 0), "{most} bytes");
    }
}

#[test]
fn appends_over_restarts_each_ledger_its_own() {
    let dir = tempfile::tempdir().unwrap();
    assert_eq!(read::<KillLine>(dir.path()).unwrap(), LedgerLines { entries: Vec::new(), bad_lines: 0 });
    Kills::open(dir.path()).unwrap().append(&[kill(1)]).unwrap();
    Kills::open(dir.path()).unwrap().append(&[kill(2)]).unwrap();
    Ledger::open(dir.path()).unwrap().append(&[sigkill(3), sigkill(4)]).unwrap();
    Ledger::<SigkillEntry>::open(dir.path()).unwrap().append(&[]).unwrap();
    assert_eq!(read::<KillLine>(dir.path()).unwrap().entries, [kill(1), kill(2)]);
    assert_eq!(read::<SigkillEntry>(dir.path()).unwrap().entries, [sigkill(3), sigkill(4)]);
}

#[test]
fn a_torn_line_is_cut_off_and_a_bad_one_skipped() {
    let dir = tempfile::tempdir().unwrap();
    Kills::open(dir.path()).unwrap().append(&[kill(1)]).unwrap();
    let mut file = OpenOptions::new().append(true).open(dir.path().join(KillLine::FILE)).unwrap();
    file.write_all(b"not json\n{\"incident\":").unwrap();
    file.write_all(&[0; 9000]).unwrap();
    let mut kills = Kills::open(dir.path()).unwrap();
    assert_eq!(kills.torn_bytes(), 9012);
    kills.append(&[kill(2)]).unwrap();
    assert_eq!(pids(dir.path()), [1, 2]);
    assert_eq!(read::<KillLine>(dir.path()).unwrap().bad_lines, 1);
}

#[test]
fn a_file_without_a_line_end_is_all_torn() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join(KillLine::FILE), vec![b'x'; 5000]).unwrap();
    assert_eq!(Kills::open(dir.path()).unwrap().torn_bytes(), 5000);
    assert_eq!(fs::metadata(dir.path().join(KillLine::FILE)).unwrap().len(), 0);
}

#[test]
fn a_rotation_that_fails_loses_nothing_and_is_done_later() {
    let dir = tempfile::tempdir().unwrap();
    let mut kills = Kills::with_cap(dir.path(), 1000).unwrap();
    // No new file can be made, as without an inode.
    let next = dir.path().join(KillLine::FILE_NEXT);
    fs::create_dir(&next).unwrap();
    let mut pid = 0;
    let refused = loop {
        pid += 1;
        if let Err(error) = kills.append(&[kill(pid)]) {
            break error.to_string();
        }
    };
    assert!(refused.contains("no new one can be made"), "{refused}");
    let size = fs::metadata(dir.path().join(KillLine::FILE)).unwrap().len();
    assert!((1000..=2000).contains(&size), "{size} bytes");
    assert_eq!(pids(dir.path()), (1..pid).collect::<Vec<_>>(), "all before are there");
    assert!(kills.write_unwritten().is_err() && kills.unwritten() == 1);
    fs::remove_dir(&next).unwrap();
    kills.append(&[kill(pid + 1)]).unwrap();
    assert_eq!(pids(dir.path()), (1..pid + 2).collect::<Vec<_>>(), "and the one that could not be written");
    assert_eq!((kills.unwritten(), kills.given_up()), (0, 0));
    assert!(dir.path().join(KillLine::FILE_BEFORE).exists() && !next.exists());
    // A file that was taken away is begun anew at the next rotation.
    fs::remove_file(dir.path().join(KillLine::FILE)).unwrap();
    for pid in 100..110 {
        kills.append(&[kill(pid)]).unwrap();
    }
    assert_eq!(pids(dir.path()).last(), Some(&109));
}

#[test]
fn entries_that_cannot_be_written_wait_and_the_oldest_are_given_up() {
    let dir = tempfile::tempdir().unwrap();
    let mut kills = Kills::open(dir.path()).unwrap();
    let file = std::mem::replace(&mut kills.file, OpenOptions::new().write(true).open("/dev/full").unwrap());
    let all: Vec<KillLine> = (0..MAX_UNWRITTEN as u32 + 3).map(kill).collect();
    for some in [&all[..1], &all[1..MAX_UNWRITTEN], &all[MAX_UNWRITTEN..]] {
        assert!(kills.append(some).is_err());
    }
    assert_eq!((kills.unwritten(), kills.given_up()), (MAX_UNWRITTEN as u64, 3));
    kills.file = file;
    kills.write_unwritten().unwrap();
    assert_eq!(pids(dir.path()), (3..MAX_UNWRITTEN as u32 + 3).collect::<Vec<_>>());
}

#[test]
fn the_ledger_before_is_kept_once() {
    let dir = tempfile::tempdir().unwrap();
    let mut kills = Kills::with_cap(dir.path(), 1000).unwrap();
    for pid in 0..20 {
        kills.append(&[kill(pid)]).unwrap();
    }
    assert!(fs::metadata(dir.path().join(KillLine::FILE)).unwrap().len() <= 1000);
    assert!(fs::metadata(dir.path().join(KillLine::FILE_BEFORE)).unwrap().len() <= 1000);
    let pids = pids(dir.path());
    assert_eq!(*pids.last().unwrap(), 19);
    assert!(pids.windows(2).all(|pair| pair[1] == pair[0] + 1));
}

#[test]
fn a_flood_of_sigkills_leaves_the_entries_of_others() {
    let dir = tempfile::tempdir().unwrap();
    let mut ledger = Ledger::<SigkillEntry>::open(dir.path()).unwrap();
    let by = |uid: u32, pid: u32| SigkillEntry {
        sender_uid: Some(uid),
        wall: format!("2026-03-01T03:12:45.{pid:09}Z"),
        ..sigkill(pid)
    };
    ledger.append(&[by(0, 1), by(1001, 2)]).unwrap();
    for begin in (3..60_000).step_by(100) {
        let flood: Vec<_> = (begin..begin + 100).map(|pid| by(1000, pid)).collect();
        ledger.append(&flood).unwrap();
    }
    let found = read::<SigkillEntry>(dir.path()).unwrap();
    assert_eq!((found.bad_lines, found.entries[..2].to_vec()), (0, vec![by(0, 1), by(1001, 2)]));
    let all = found.entries.iter().map(|entry| 1 + entry.more.as_ref().map_or(0, |more| more.count)).sum::<u64>();
    assert_eq!(all, 60_002, "each has a line or is counted");
    for (name, most) in [(SigkillEntry::FILE, 2 << 20), (SigkillEntry::FILE_BEFORE, (1 << 20) + 4096)] {
        assert!(fs::metadata(dir.path().join(name)).unwrap().len() <= most, "{name}");
    }
    let stands = found.entries.iter().find(|entry| entry.more.is_some()).unwrap();
    assert!(stands.stands_for(&by(1000, 4)) && !stands.stands_for(&by(0, 4)) && !stands.stands_for(&by(1000, 90_000)));
}

#[test]
fn a_rotation_beside_a_reader_hides_no_file() {
    let dir = tempfile::tempdir().unwrap();
    let mut kills = Kills::with_cap(dir.path(), 1000).unwrap();
    let mut pid = 0;
    for _ in 0..5 {
        let place = || identity(open_if_there(dir.path(), KillLine::FILE_BEFORE).unwrap().as_ref()).unwrap();
        let (first, mut rotated) = (place(), false);
        let rotate_once = || {
            while !rotated {
                pid += 1;
                kills.append(&[kill(pid)]).unwrap();
                rotated = place() != first;
            }
        };
        let ledger = read_with::<KillLine>(dir.path(), rotate_once).unwrap();
        let read: Vec<u32> = ledger.entries.iter().map(|kill| kill.key().1).collect();
        assert_eq!(read, pids(dir.path()));
        assert!(read.len() > 1 && read.last() == Some(&pid), "{read:?}");
    }
}
