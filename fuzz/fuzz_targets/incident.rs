//! Any bytes as an incident file, packed and as what would be packed: read, report, write and read again.
#![no_main]

use libfuzzer_sys::fuzz_target;
use memtrace_report::{Style, json, text};
use memtrace_incident::codec;

fn read_and_report(file: &[u8]) {
    let _ = codec::read_cgroup(file);
    let Ok(incident) = codec::decode(file) else { return };
    let narrow = Style { colour: false, width: 0, unicode: false };
    let coloured = Style { colour: true, width: 300, unicode: true };
    for style in [Style::PLAIN, narrow, coloured] {
        let report = text::report(&incident, &style);
        let obeyed = |c: &char| c.is_control() && *c != '\n' && !(style.colour && *c == '\x1b');
        assert_eq!(report.chars().find(obeyed), None, "a control character of the file is in the report");
    }
    let printed = json::incident(&incident).expect("an incident cannot be printed");
    let again: serde_json::Value = serde_json::from_str(&printed).expect("a printed incident is not JSON");
    assert_eq!(Some(again), serde_json::to_value(&incident).ok());
    let file = codec::encode(&incident).expect("an incident cannot be written");
    codec::decode(&file).expect("an incident cannot be read back");
}

fuzz_target!(|bytes: &[u8]| {
    read_and_report(bytes);
    if let Ok(packed) = zstd::encode_all(bytes, 1) {
        read_and_report(&packed);
    }
});
