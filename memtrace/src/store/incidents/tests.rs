//! Tests of the incident store: round trips, hostile files, retention.

use std::io::Write;
use std::os::unix::fs::PermissionsExt;

use proptest::prelude::*;

use super::*;
use crate::report::fixtures;

fn packed(json: &[u8]) -> Vec<u8> {
    zstd::encode_all(json, 1).unwrap()
}

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
fn every_kind_of_damage_has_its_message() {
    let good = encode(&fixtures::burst()).unwrap();
    let message = |bytes: &[u8]| decode(bytes).unwrap_err().to_string();
    assert_eq!(message(b"hello"), "not a memtrace incident (no zstd header)");
    assert_eq!(message(b""), "not a memtrace incident (no zstd header)");
    assert_eq!(message(&good[..3]), "the file is truncated");
    assert_eq!(message(&good[..good.len() - 1]), "the file is truncated");
    assert_eq!(message(&good[..good.len() / 2]), "the file is truncated");
    assert!(message(&packed(b"{}")).starts_with("not a memtrace incident: missing field"));
    assert!(
        message(&packed(&[b"{\"x\":".as_slice(), &[b'['; 100_000]].concat())).starts_with("not a memtrace incident: ")
    );
    assert_eq!(
        message(&packed(br#"{"schema":7,"brand":"new"}"#)),
        "schema 7 is newer than this memtrace reads (1); update memtrace"
    );

    let mut newer = fixtures::burst();
    newer.schema = 7;
    assert_eq!(message(&encode(&newer).unwrap()), "schema 7 is newer than this memtrace reads (1); update memtrace");
    let mut short = fixtures::burst();
    short.timeline.columns.anon_bytes.pop();
    assert!(message(&encode(&short).unwrap()).starts_with("timeline column anon_bytes has "));

    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.memtrace");
    fs::write(&path, b"hello").unwrap();
    let told = read(&path).unwrap_err().to_string();
    assert_eq!(told, format!("failed to read incident {}: not a memtrace incident (no zstd header)", path.display()));
}

#[test]
fn a_bomb_is_refused_at_the_cap() {
    let bomb = packed(&vec![b' '; 4 << 20]);
    assert!(bomb.len() < 4096);
    assert!(matches!(decompress(&bomb, 1 << 20), Err(Unreadable::TooLarge { .. })));
    assert_eq!(decompress(&bomb, 4 << 20).unwrap().len(), 4 << 20);
    // The whole of it: a frame that claims and holds more than the real cap.
    let mut encoder = zstd::Encoder::new(Vec::new(), 1).unwrap();
    let zeros = vec![b' '; 1 << 20];
    for _ in 0..=(MAX_JSON_BYTES >> 20) {
        encoder.write_all(&zeros).unwrap();
    }
    let bomb = encoder.finish().unwrap();
    assert!(decode(&bomb).unwrap_err().to_string().contains("larger than"));
}

#[test]
fn an_id_cannot_leave_the_directory() {
    let (dir, store) = store(1);
    for evil in ["../../etc/passwd", "", "01", "01ARZ3NDEKTSV4RRFFQ69G5FA/", "81ARZ3NDEKTSV4RRFFQ69G5FAV", "ILOU"] {
        let mut incident = fixtures::burst();
        incident.id = evil.to_owned();
        assert!(store.save(&incident).is_err(), "{evil}");
        assert!(matches!(decode(&encode(&incident).unwrap()), Err(Unreadable::BadId)), "{evil}");
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
fn retention_drops_the_oldest() {
    let (_dir, store) = store(5);
    let each = store.list().unwrap()[0].bytes;
    let now = SystemTime::UNIX_EPOCH + Duration::from_secs(10);
    assert_eq!(store.retain(each * 5 + 100, None, now).unwrap(), DeletedFiles::default());
    assert_eq!(store.retain(each * 3 + 100, None, now).unwrap().files, 2);
    assert_eq!(store.retain(u64::MAX, Some(Duration::from_millis(6500)), now).unwrap().files, 1);
    assert_eq!(store.list().unwrap().len(), 2);
    assert_eq!(store.find("latest").unwrap().id, id(5000, 7));
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

proptest! {
    #[test]
    fn any_bytes_are_survived(bytes in prop::collection::vec(any::<u8>(), 0..500)) {
        prop_assert!(decode(&bytes).is_err());
        prop_assert!(decode(&packed(&bytes)).is_err());
        let mut headed = ZSTD_MAGIC.to_vec();
        headed.extend_from_slice(&bytes);
        let _ = decode(&headed);
    }

    #[test]
    fn any_damage_is_survived(at in any::<prop::sample::Index>(), byte in any::<u8>(), packed_first in any::<bool>()) {
        let good = encode(&fixtures::group()).unwrap();
        let mut bytes = if packed_first { good } else { zstd::decode_all(&good[..]).unwrap() };
        let at = at.index(bytes.len());
        bytes[at] = byte;
        let _ = decode(&if packed_first { bytes } else { packed(&bytes) });
    }
}
