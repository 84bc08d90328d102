//! Tests of the directory of incidents: round trips, ids.

use std::os::unix::fs::PermissionsExt;

use super::*;
use memtrace_incident::codec::happened;
use memtrace_incident::fixtures;

fn id(time_ms: u64, rest: u128) -> String {
    ulid::Ulid::from_parts(time_ms, rest).to_string()
}

fn store(count: u64) -> (tempfile::TempDir, IncidentStore) {
    let dir = tempfile::tempdir().unwrap();
    let store = IncidentStore::create(dir.path().join("incidents")).unwrap();
    for number in 1..=count {
        let mut incident = fixtures::burst();
        incident.id = id(number * 1000, 7);
        store.save(&incident).unwrap();
    }
    (dir, store)
}

#[test]
fn what_is_saved_is_read_back() {
    let (dir, store) = store(0);
    for incident in [fixtures::burst(), fixtures::group(), fixtures::recording()] {
        let path = store.save(&incident).unwrap();
        assert_eq!(read(&path).unwrap(), incident);
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o640);
        assert!(happened(&incident.id).is_some());
    }
    assert_eq!(store.list().unwrap().len(), 3);
    assert_eq!(fs::read_dir(dir.path().join("incidents")).unwrap().count(), 3);
}

#[test]
fn what_has_the_name_of_an_incident_is_replaced_and_nothing_is_written_through_it() {
    let (dir, store) = store(0);
    let incident = fixtures::burst();
    let path = store.path(&incident.id).unwrap();
    // Nobody reads from it: to open it for writing is to wait for ever.
    rustix::fs::mkfifoat(rustix::fs::CWD, &path, 0o600.into()).unwrap();
    store.save(&incident).unwrap();
    assert_eq!(store.list().unwrap().len(), 1);
    fs::remove_file(&path).unwrap();
    let precious = dir.path().join("precious");
    fs::write(&precious, "x").unwrap();
    std::os::unix::fs::symlink(&precious, &path).unwrap();
    store.save(&incident).unwrap();
    assert_eq!((store.list().unwrap().len(), fs::read(&precious).unwrap()), (1, b"x".to_vec()));
    fs::remove_file(&path).unwrap();
    fs::create_dir(&path).unwrap();
    assert!(store.save(&incident).is_err());
    assert_eq!(fs::read_dir(store.dir()).unwrap().count(), 1, "nothing half written is left");
}

#[test]
fn an_unreadable_file_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.memtrace");
    fs::write(&path, b"hello").unwrap();
    let told = read(&path).unwrap_err().to_string();
    assert_eq!(told, format!("failed to read incident {}: not a memtrace incident (no zstd header)", path.display()));
}

#[test]
fn an_id_cannot_leave_the_directory() {
    let (dir, store) = store(1);
    for evil in ["../../etc/passwd", "", "01", "01ARZ3NDEKTSV4RRFFQ69G5FA/", "81ARZ3NDEKTSV4RRFFQ69G5FAV", "ILOU"] {
        let mut incident = fixtures::burst();
        incident.id = evil.to_owned();
        assert!(store.save(&incident).is_err(), "{evil}");
    }
    assert!(matches!(store.find("../x"), Err(FindError::NotAnId(_))));
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[test]
fn finds_by_id_and_by_the_beginning_of_one() {
    let (_dir, store) = store(3);
    let listed: Vec<String> = store.list().unwrap().into_iter().map(|entry| entry.id).collect();
    assert_eq!(listed, [id(3000, 7), id(2000, 7), id(1000, 7)]);
    assert_eq!(store.find(&id(2000, 7)).unwrap().id, id(2000, 7));
    assert_eq!(store.find(&id(2000, 7)[..10].to_lowercase()).unwrap().id, id(2000, 7));
    assert_eq!(store.find("latest").unwrap().id, id(3000, 7));
    assert!(matches!(store.find("0"), Err(FindError::Ambiguous { .. })));
    assert!(matches!(store.find("7"), Err(FindError::NotFound { .. })));
}

#[test]
fn a_crash_leaves_nothing_half_written() {
    let (dir, store) = store(1);
    let inner = dir.path().join("incidents");
    fs::write(inner.join(".01X.memtrace.memtrace-tmp-1"), b"half").unwrap();
    fs::write(inner.join("notes.memtrace"), b"not ours").unwrap();
    IncidentStore::create(&inner).unwrap();
    assert_eq!(store.list().unwrap().len(), 1);
    assert_eq!(fs::read_dir(&inner).unwrap().count(), 2);
}
