//! Bombs: small files that hold very much, one for each list and each string of the published
//! schema, so that a new field is covered when it is added. Each is refused or read shortened, and
//! none takes the memory that it asks for.

use std::fs;
use std::io::Write;

use serde_json::{Value, json};

use super::*;

/// JSON of the largest bombs: just below what is read at all.
const LARGEST: usize = (MAX_JSON_BYTES as usize) - (2 << 20);
/// JSON of a bomb in one list, which is many times what the list may have.
const LIST: usize = 16 << 20;
/// JSON of a bomb in one string.
const STRING: usize = 8 << 20;
/// Stands in the JSON where the bomb goes.
const HERE: &str = "@@";
const ID: &str = "01KJHQ3V4D9T4X0Y6S5R2M8ZNC";
/// What this process may take at its peak. The bombs are made piece by piece.
const PEAK: u64 = 224 << 20;

struct Schema(Value);

impl Schema {
    fn published() -> Self {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/incident.schema.json");
        Self(serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap())
    }

    /// The definition behind references and `null` alternatives.
    fn resolve<'a>(&'a self, node: &'a Value) -> &'a Value {
        if let Some(name) = node["$ref"].as_str() {
            return self.resolve(self.0.pointer(name.trim_start_matches('#')).unwrap());
        }
        match node["anyOf"].as_array() {
            Some(choices) => self.resolve(choices.iter().find(|choice| choice["type"] != "null").unwrap()),
            None => node,
        }
    }

    fn is(node: &Value, kind: &str) -> bool {
        node["type"] == kind || node["type"].as_array().is_some_and(|kinds| kinds.iter().any(|known| known == kind))
    }

    /// A value of this type. With `all`, with every field, otherwise with those that it must have.
    fn value(&self, node: &Value, all: bool) -> Value {
        let node = self.resolve(node);
        if let Some(choices) = node["oneOf"].as_array() {
            return choices[0]["const"].clone();
        }
        if let Some(choices) = node["enum"].as_array() {
            return choices[0].clone();
        }
        if Self::is(node, "object") {
            let required = node["required"].as_array().cloned().unwrap_or_default();
            let fields = node["properties"].as_object().unwrap().iter();
            let wanted = fields.filter(|(name, _)| all || required.iter().any(|known| known == *name));
            return wanted.map(|(name, field)| (name.clone(), self.value(field, all))).collect();
        }
        if Self::is(node, "array") {
            return if all { json!([self.value(&node["items"], true)]) } else { json!([]) };
        }
        if Self::is(node, "string") {
            return json!(if all { "a" } else { "" });
        }
        if Self::is(node, "boolean") { json!(false) } else { json!(1) }
    }

    /// The place of every list and string: a pointer into a value with every field, and its type.
    fn places(&self, node: &Value, at: String, found: &mut Vec<(String, Value)>) {
        let node = self.resolve(node);
        if Self::is(node, "object") {
            for (name, field) in node["properties"].as_object().unwrap() {
                self.places(field, format!("{at}/{name}"), found);
            }
        } else if Self::is(node, "array") {
            found.push((at.clone(), node.clone()));
            self.places(&node["items"], format!("{at}/0"), found);
        } else if Self::is(node, "string") && node.get("oneOf").is_none() && node.get("enum").is_none() {
            found.push((at, node.clone()));
        }
    }
}

/// The file of `bytes` of JSON with `begin`, as many of `piece` as fit, and `end` at `place`.
fn bomb(base: &Value, place: &str, bytes: usize, [begin, piece, end]: [&str; 3]) -> Vec<u8> {
    let mut base = base.clone();
    *base.pointer_mut(place).unwrap() = json!(HERE);
    let text = base.to_string();
    let (before, after) = text.split_once(&format!("\"{HERE}\"")).unwrap();
    let mut encoder = zstd::Encoder::new(Vec::new(), 1).unwrap();
    let block = piece.repeat(((1 << 16) / piece.len()).max(1));
    encoder.write_all(before.as_bytes()).unwrap();
    encoder.write_all(begin.as_bytes()).unwrap();
    for _ in 0..bytes.saturating_sub(text.len()) / block.len() {
        encoder.write_all(block.as_bytes()).unwrap();
    }
    // The last piece has no comma.
    encoder.write_all(piece.trim_end_matches(',').as_bytes()).unwrap();
    encoder.write_all(end.as_bytes()).unwrap();
    encoder.write_all(after.as_bytes()).unwrap();
    encoder.finish().unwrap()
}

fn peak() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
}

/// Reads the bomb, and what is made of it if it is read.
fn read(bytes: &[u8], what: &str) -> Option<String> {
    let read = decode(bytes);
    let peak = peak() >> 20;
    assert!(peak < PEAK >> 20, "{what}: {peak} MiB");
    match read {
        Ok(incident) => {
            let kept = serde_json::to_string(&incident).unwrap().len();
            assert!(kept < 8 * caps::TEXT, "{what}: {kept} bytes are kept of a bomb");
            None
        }
        Err(error) => Some(error.to_string()),
    }
}

/// One after the other, because the peak is that of the process.
#[test]
fn no_bomb_takes_memory() {
    no_list_or_string_of_the_schema_makes_a_bomb();
    no_product_of_lists_and_nothing_unknown_makes_a_bomb();
    what_is_written_can_be_read_whatever_the_stacks();
}

fn no_list_or_string_of_the_schema_makes_a_bomb() {
    let schema = Schema::published();
    let mut base = schema.value(&schema.0, true);
    (base["id"], base["schema"]) = (json!(ID), json!(SCHEMA));
    assert_eq!(read(&zstd::encode_all(base.to_string().as_bytes(), 1).unwrap(), "the base"), None);
    let mut places = Vec::new();
    schema.places(&schema.0, String::new(), &mut places);
    let lists = places.iter().filter(|(_, node)| Schema::is(node, "array")).count();
    assert!(lists > 20 && places.len() - lists > 40, "{lists} lists of {} places", places.len());
    for (place, node) in &places {
        let name = place.rsplit('/').find(|step| step.parse::<u32>().is_err()).unwrap();
        if Schema::is(node, "array") {
            for all in [false, true] {
                let piece = format!("{},", schema.value(&node["items"], all));
                let refused = read(&bomb(&base, place, LIST, ["[", &piece, "]"]), place);
                let refused = refused.unwrap_or_else(|| panic!("{place} is read"));
                assert!(refused.contains(name), "{place}: {refused}");
            }
        } else {
            read(&bomb(&base, place, STRING, ["\"", "long ", "\""]), place);
            read(&bomb(&base, place, STRING, ["\"", "\\u0000", "\""]), place);
        }
    }
}

fn no_product_of_lists_and_nothing_unknown_makes_a_bomb() {
    let schema = Schema::published();
    let mut base = schema.value(&schema.0, true);
    (base["id"], base["schema"]) = (json!(ID), json!(SCHEMA));
    let mut path = base["allocation_paths"][0].clone();
    let frames = [
        json!({"inlined": false}),
        json!({"inlined": true, "symbol": "a", "module": "b", "file": "c", "build_id": "d"}),
        json!({"inlined": true, "symbol": "\n".repeat(caps::TEXT)}),
    ];
    for (number, frame) in frames.into_iter().enumerate() {
        for frames in [1, 100, if number == 2 { 1000 } else { caps::FRAMES }] {
            path["frames"] = json!(vec![frame.clone(); frames]);
            let bomb = bomb(&base, "/allocation_paths", LARGEST, ["[", &format!("{path},"), "]"]);
            let read = decode(&bomb).map(|incident| incident.allocation_paths.len());
            let peak = peak() >> 20;
            assert!(peak < PEAK >> 20, "{frames} frames a path: {peak} MiB");
            // What is read is all text, which takes no more than its JSON.
            match read {
                Ok(paths) => assert!(number == 2 && paths < caps::ALLOCATION_PATHS, "{frames} frames a path"),
                Err(error) => assert!(error.to_string().contains("`allocation_paths"), "{error}"),
            }
        }
    }
    // Text that becomes six times as long in a report.
    path["frames"] = json!([{"inlined": true, "symbol": "\u{7f}".repeat(caps::TEXT)}]);
    let refused = read(&bomb(&base, "/allocation_paths", LARGEST, ["[", &format!("{path},"), "]"]), "escapes");
    assert!(refused.is_some_and(|refused| refused.contains("more than memtrace reads")));
    // A field that this version does not know, with anything in it, in place of a list that it
    // reads past.
    for pieces in [["[", "[],", "]"], ["[", "{\"a\":\"b\"},", "]"], ["\"", "x", "\""], ["{", "\"k\":1,", "}"]] {
        let mut more = base.clone();
        more["unknown"] = json!(1);
        assert_eq!(read(&bomb(&more, "/unknown", LARGEST, pieces), "unknown"), None);
    }
}

fn what_is_written_can_be_read_whatever_the_stacks() {
    let mut incident = crate::fixtures::burst();
    let frame = crate::Frame { symbol: Some("s".repeat(60)), module: Some("/m".into()), ..crate::Frame::default() };
    let path = crate::AllocationPath { frames: vec![frame; 1024], ..incident.allocation_paths[0].clone() };
    incident.allocation_paths = vec![path; 2048];
    let read = decode(&encode(&incident).unwrap()).unwrap();
    assert_eq!(read.allocation_paths.len(), 2048);
    assert!(read.allocation_paths.iter().all(|path| path.frames.len() == 128 && path.cut == Some(Cut::Frames)));
}

#[test]
fn a_long_string_loses_its_middle_and_an_error_names_its_field() {
    let mut incident = crate::fixtures::burst();
    incident.cgroup.path = Some(format!("/{}é/end", "ü".repeat(caps::TEXT)));
    let read = decode(&encode(&incident).unwrap()).unwrap().cgroup.path.unwrap();
    assert!(read.len() <= caps::TEXT && read.starts_with("/üü") && read.ends_with("üé/end") && read.contains('…'));
    let mut wrong = serde_json::to_value(&incident).unwrap();
    wrong["oom"]["victims"][0]["pid"] = json!("four");
    let error = decode(&zstd::encode_all(wrong.to_string().as_bytes(), 1).unwrap()).unwrap_err().to_string();
    assert!(error.starts_with("not a memtrace incident: in `oom.victims[0].pid`: invalid type"), "{error}");
}
