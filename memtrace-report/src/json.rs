//! Incidents as JSON: whole, and in the short form of a list.
//!
//! The keys are those of the incident file (docs/incident.schema.json). Characters that a terminal
//! would obey are escaped, which changes the text and not the value.

use std::borrow::Borrow;

use memtrace_incident::{
    At, Cgroup, Composition, Growth, Host, Incident, Kind, LossNote, MappingNote, Oom, Pressure, Recording,
    SigkillEntry, Verdict,
};
use serde::ser::SerializeSeq;
use serde::{Serialize, Serializer};

use super::plain;

/// A whole incident, indented. Fails only if the serializer does.
pub fn incident(incident: &Incident) -> serde_json::Result<String> {
    pretty(incident)
}

/// Whole incidents as one array. Fails only if the serializer does.
pub fn incidents(incidents: &[Incident]) -> serde_json::Result<String> {
    pretty(incidents)
}

/// Incidents as one array, without `timeline`, `allocation_paths` and `allocations`.
///
/// Each is written before the next is taken from the iterator, so an iterator that reads files has
/// one of them in memory at a time.
pub fn list(incidents: impl IntoIterator<Item: Borrow<Incident>>) -> serde_json::Result<String> {
    let mut text = Vec::new();
    let mut serializer = serde_json::Serializer::pretty(&mut text);
    let mut list = serializer.serialize_seq(None)?;
    for incident in incidents {
        list.serialize_element(&ListedIncident::from(incident.borrow()))?;
    }
    list.end()?;
    // A serializer of JSON writes UTF-8.
    Ok(escape_for_terminal(String::from_utf8(text).unwrap_or_default()))
}

/// Entries of the SIGKILL ledger as one array. Fails only if the serializer does.
pub fn sigkills(entries: &[SigkillEntry]) -> serde_json::Result<String> {
    pretty(entries)
}

/// An incident without its large parts.
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
    Ok(escape_for_terminal(serde_json::to_string_pretty(value)?))
}

/// Escapes what a terminal would obey, and adds a line end.
fn escape_for_terminal(mut text: String) -> String {
    // serde_json escapes the codes below 32. The others can only be inside a string, where an
    // escape means the same.
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
