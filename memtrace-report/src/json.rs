//! Incidents as JSON: whole, and in the short form of a list.
//!
//! The keys are those of the incident file (docs/incident.schema.json). Characters that a terminal
//! would obey are escaped, which changes the text and not the value.

use std::borrow::Borrow;
use std::io;

use memtrace_incident::{
    At, Cgroup, Composition, Growth, Host, Incident, Kind, LossNote, MappingNote, Oom, Pressure, Recording, Verdict,
};
use serde::ser::SerializeSeq;
use serde::{Serialize, Serializer};
use serde_json::ser::{Formatter, PrettyFormatter};

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
    let mut serializer = serializer(&mut text);
    let mut list = serializer.serialize_seq(None)?;
    for incident in incidents {
        list.serialize_element(&ListedIncident::from(incident.borrow()))?;
    }
    list.end()?;
    Ok(finished(text))
}

/// Entries of a ledger as one array. Fails only if the serializer does.
pub fn ledger<E: Serialize>(entries: &[E]) -> serde_json::Result<String> {
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
    let mut text = Vec::new();
    value.serialize(&mut serializer(&mut text))?;
    Ok(finished(text))
}

fn serializer(text: &mut Vec<u8>) -> serde_json::Serializer<&mut Vec<u8>, TerminalFormatter> {
    serde_json::Serializer::with_formatter(text, TerminalFormatter::default())
}

/// The text with a line end. A serializer of JSON writes UTF-8.
fn finished(mut text: Vec<u8>) -> String {
    text.push(b'\n');
    String::from_utf8(text).unwrap_or_default()
}

/// Writes indented JSON and escapes what a terminal would obey. serde_json escapes the codes below
/// 32 itself. The others can only be inside a string, where an escape means the same. They are
/// escaped on their way, because a second copy of a large file would be memory for nothing.
#[derive(Default)]
struct TerminalFormatter(PrettyFormatter<'static>);

macro_rules! indented {
    ($($method:ident($($name:ident: $type:ty)?);)*) => {
        $(
            fn $method<W: io::Write + ?Sized>(&mut self, out: &mut W $(, $name: $type)?) -> io::Result<()> {
                self.0.$method(out $(, $name)?)
            }
        )*
    };
}

impl Formatter for TerminalFormatter {
    indented! {
        begin_array();
        end_array();
        begin_array_value(first: bool);
        end_array_value();
        begin_object();
        end_object();
        begin_object_key(first: bool);
        begin_object_value();
        end_object_value();
    }

    fn write_string_fragment<W: io::Write + ?Sized>(&mut self, out: &mut W, text: &str) -> io::Result<()> {
        write_escaped(out, text, plain::is_dangerous)
    }
}

/// Writes a part of a string of JSON, with the characters that are to be escaped as `\uXXXX`.
pub(super) fn write_escaped<W: io::Write + ?Sized>(
    out: &mut W,
    mut text: &str,
    escaped: impl Fn(char) -> bool,
) -> io::Result<()> {
    while let Some((at, character)) = text.char_indices().find(|(_, character)| escaped(*character)) {
        let (before, rest) = text.split_at(at);
        out.write_all(before.as_bytes())?;
        let mut units = [0; 2];
        for unit in character.encode_utf16(&mut units) {
            write!(out, "\\u{unit:04x}")?;
        }
        text = rest.get(character.len_utf8()..).unwrap_or_default();
    }
    out.write_all(text.as_bytes())
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
