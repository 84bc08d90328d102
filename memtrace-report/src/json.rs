//! Incident to JSON: the whole file, and the short form of a list.

use std::borrow::Borrow;

use memtrace_incident::{
    At, Cgroup, Composition, Growth, Host, Incident, Kind, LossNote, MappingNote, Oom, Pressure, Recording,
    SigkillEntry, Verdict,
};
use serde::ser::SerializeSeq;
use serde::{Serialize, Serializer};

use super::plain;

/// The whole incident, pretty.
pub fn incident(incident: &Incident) -> serde_json::Result<String> {
    pretty(incident)
}

/// Whole incidents as one array.
pub fn incidents(incidents: &[Incident]) -> serde_json::Result<String> {
    pretty(incidents)
}

/// Incidents as one array, without `timeline`, `allocation_paths` and `allocations`.
///
/// Each is written before the next is asked for: of an iterator that reads files, one is in memory at a time.
pub fn list(incidents: impl IntoIterator<Item: Borrow<Incident>>) -> serde_json::Result<String> {
    let mut text = Vec::new();
    let mut serializer = serde_json::Serializer::pretty(&mut text);
    let mut list = serializer.serialize_seq(None)?;
    for incident in incidents {
        list.serialize_element(&ListedIncident::from(incident.borrow()))?;
    }
    list.end()?;
    // A serializer of JSON writes UTF-8.
    Ok(harmless(String::from_utf8(text).unwrap_or_default()))
}

/// Entries of the ledger of SIGKILLs as one array.
pub fn sigkills(entries: &[SigkillEntry]) -> serde_json::Result<String> {
    pretty(entries)
}

/// An incident file without what is large in it.
#[derive(Serialize)]
struct ListedIncident<'a> {
    schema: u32,
    id: &'a str,
    kind: Kind,
    at: &'a At,
    host: &'a Host,
    cgroup: &'a Cgroup,
    oom: &'a Option<Oom>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pressure: &'a Option<Pressure>,
    recording: &'a Option<Recording>,
    growth: &'a [Growth],
    mappings: &'a [MappingNote],
    composition: &'a Composition,
    verdict: &'a Verdict,
    losses: &'a [LossNote],
}

impl<'a> From<&'a Incident> for ListedIncident<'a> {
    fn from(incident: &'a Incident) -> Self {
        Self {
            schema: incident.schema,
            id: &incident.id,
            kind: incident.kind,
            at: &incident.at,
            host: &incident.host,
            cgroup: &incident.cgroup,
            oom: &incident.oom,
            pressure: &incident.pressure,
            recording: &incident.recording,
            growth: &incident.growth,
            mappings: &incident.mappings,
            composition: &incident.composition,
            verdict: &incident.verdict,
            losses: &incident.losses,
        }
    }
}

fn pretty<T: Serialize + ?Sized>(value: &T) -> serde_json::Result<String> {
    Ok(harmless(serde_json::to_string_pretty(value)?))
}

/// JSON as a terminal may see it, with a line end.
fn harmless(mut text: String) -> String {
    // JSON itself only escapes the first 32: the rest of what a terminal obeys can only be inside a string.
    if text.contains(|character| character != '\n' && plain::is_dangerous(character)) {
        text = text.chars().fold(String::with_capacity(text.len()), |mut out, character| {
            if character != '\n' && plain::is_dangerous(character) {
                let mut units = [0; 2];
                for unit in character.encode_utf16(&mut units) {
                    out.push_str(&format!("\\u{unit:04x}"));
                }
            } else {
                out.push(character);
            }
            out
        });
    }
    text.push('\n');
    text
}

#[cfg(test)]
mod tests {
    use memtrace_incident::fixtures;

    use super::*;

    #[test]
    fn the_list_form_leaves_out_what_is_large_and_nothing_else() {
        for incident in [fixtures::burst(), fixtures::near_miss()] {
            let mut whole = serde_json::to_value(&incident).unwrap();
            whole.as_object_mut().unwrap().remove("timeline").unwrap();
            whole.as_object_mut().unwrap().remove("allocation_paths").unwrap();
            whole.as_object_mut().unwrap().remove("allocations").unwrap();
            let listed: serde_json::Value = serde_json::from_str(&list([&incident]).unwrap()).unwrap();
            assert_eq!(listed, serde_json::Value::Array(vec![whole]));
        }
    }

    #[test]
    fn a_terminal_has_nothing_to_obey_and_the_content_is_the_same() {
        let hostile = fixtures::hostile();
        let text = incident(&hostile).unwrap();
        assert!(text.chars().all(|character| character == '\n' || !plain::is_dangerous(character)));
        assert_eq!(serde_json::from_str::<Incident>(&text).unwrap(), hostile);
    }
}
