//! Tests of the codec: round trips, damaged files, zip bombs, and lists above their cap.

use std::io::Write;

use proptest::prelude::*;

use super::*;
use crate::fixtures;

fn packed(json: &[u8]) -> Vec<u8> {
    zstd::encode_all(json, 1).unwrap()
}

#[test]
fn decoding_gives_what_was_encoded() {
    for incident in [fixtures::burst(), fixtures::group(), fixtures::near_miss(), fixtures::recording()] {
        let decoded = decode(&encode(&incident).unwrap()).unwrap();
        assert_eq!(decoded, incident);
        assert!(is_id(&incident.id) && happened(&incident.id).is_some());
    }
}

#[test]
fn the_cgroup_is_read_from_the_beginning_of_a_file() {
    for incident in [fixtures::burst(), fixtures::recording()] {
        let bytes = encode(&incident).unwrap();
        assert_eq!(read_cgroup(&bytes[..]), Some(incident.cgroup));
        assert_eq!(read_cgroup(&bytes[..10]), None);
    }
    assert_eq!(read_cgroup(&packed(b"{\"cgroup\":7}")[..]), None);
    let far = [b"{\"x\":\"", vec![b'x'; 1 << 20].as_slice(), b"\",\"cgroup\":{}}"].concat();
    assert_eq!(read_cgroup(&packed(&far)[..]), None);
}

#[test]
fn a_list_is_refused_at_its_cap_by_name() {
    let refused = |incident: &Incident| decode(&encode(incident).unwrap()).unwrap_err().to_string();
    let mut incident = fixtures::burst();
    let rows = &mut incident.timeline.columns;
    rows.boot_ns.resize(crate::caps::ROWS + 1, 0);
    assert!(refused(&incident).contains(&format!("more than {} rows", crate::caps::ROWS)));
    let mut incident = fixtures::burst();
    let task = incident.oom.as_ref().unwrap().tasks[0].clone();
    incident.oom.as_mut().unwrap().tasks = vec![task; crate::caps::TASKS + 1];
    assert!(refused(&incident).contains(&format!("more than {} tasks", crate::caps::TASKS)));
}

#[test]
fn an_id_is_a_safe_file_name_or_refused() {
    for evil in ["../../etc/passwd", "", "01", "01ARZ3NDEKTSV4RRFFQ69G5FA/", "81ARZ3NDEKTSV4RRFFQ69G5FAV", "ILOU"] {
        let mut incident = fixtures::burst();
        incident.id = evil.to_owned();
        assert!(matches!(decode(&encode(&incident).unwrap()), Err(Unreadable::BadId)), "{evil}");
    }
}

#[test]
fn each_kind_of_damage_has_its_own_message() {
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
}

#[test]
fn a_zip_bomb_is_refused_at_the_cap() {
    let bomb = packed(&vec![b' '; 4 << 20]);
    assert!(bomb.len() < 4096);
    assert!(matches!(measure(&bomb, 1 << 20), Err(Unreadable::TooLarge { .. })));
    assert!(measure(&bomb, 4 << 20).is_ok());
    // The real cap: a frame that holds more than MAX_JSON_BYTES.
    let mut encoder = zstd::Encoder::new(Vec::new(), 1).unwrap();
    let zeros = vec![b' '; 1 << 20];
    for _ in 0..=(MAX_JSON_BYTES >> 20) {
        encoder.write_all(&zeros).unwrap();
    }
    let bomb = encoder.finish().unwrap();
    assert!(decode(&bomb).unwrap_err().to_string().contains("larger than"));
}

proptest! {
    #[test]
    fn any_bytes_give_an_error_and_no_panic(bytes in prop::collection::vec(any::<u8>(), 0..500)) {
        prop_assert!(decode(&bytes).is_err());
        prop_assert!(decode(&packed(&bytes)).is_err());
        let mut headed = ZSTD_MAGIC.to_vec();
        headed.extend_from_slice(&bytes);
        let _ = decode(&headed);
    }

    #[test]
    fn any_damage_gives_no_panic(at in any::<prop::sample::Index>(), byte in any::<u8>(), packed_first in any::<bool>()) {
        let good = encode(&fixtures::group()).unwrap();
        let mut bytes = if packed_first { good } else { zstd::decode_all(&good[..]).unwrap() };
        let at = at.index(bytes.len());
        bytes[at] = byte;
        let _ = decode(&if packed_first { bytes } else { packed(&bytes) });
    }
}
