//! Incidents as an agent serves them over HTTP: plain JSON, one whole incident or a list of short
//! ones. They are bounded as those of a file are ([`crate::codec`]): who answers is an agent, but
//! what it read may come from anywhere.

use serde::Deserialize;

use crate::bounded::Bounds;
use crate::codec::{self, MAX_JSON_BYTES, Unreadable};
use crate::{
    At, Cgroup, Composition, Growth, Host, Incident, Kind, LossNote, MappingNote, Oom, Pressure, Recording, Timeline,
    Verdict, capped, caps,
};

/// Reads one whole incident (`/api/incidents/ID`). Fails as [`codec::decode`] does.
pub fn incident(json: &[u8]) -> Result<Incident, Unreadable> {
    let incident: Incident = parse(json)?;
    codec::check(&incident)?;
    Ok(incident)
}

/// Reads a list of incidents (`/api/incidents`). Their timelines and stacks, which a list has not,
/// are empty. Fails as [`codec::decode`] does; all of them together may be as large as one file.
pub fn list(json: &[u8]) -> Result<Vec<Incident>, Unreadable> {
    let listed: Vec<Listed> = parse(json)?;
    let incidents: Vec<Incident> = listed.into_iter().map(Incident::from).collect();
    incidents.iter().try_for_each(codec::check)?;
    Ok(incidents)
}

fn parse<T: for<'de> Deserialize<'de>>(json: &[u8]) -> Result<T, Unreadable> {
    if json.len() as u64 > MAX_JSON_BYTES {
        return Err(Unreadable::TooLarge { what: "the answer", limit: MAX_JSON_BYTES });
    }
    let bounds = Bounds::new(caps::MEMORY);
    let mut parser = serde_json::Deserializer::from_slice(json);
    let parsed = bounds.parse(&mut parser).and_then(|value| parser.end().map(|()| value));
    parsed.map_err(|error| Unreadable::NotAnIncident { field: bounds.field(), error })
}

/// An incident without its large parts.
#[derive(Deserialize)]
struct Listed {
    schema: u32,
    id: String,
    kind: Kind,
    at: At,
    host: Host,
    cgroup: Cgroup,
    oom: Option<Oom>,
    #[serde(default)]
    pressure: Option<Pressure>,
    recording: Option<Recording>,
    #[serde(deserialize_with = "capped::growth")]
    growth: Vec<Growth>,
    #[serde(deserialize_with = "capped::mappings")]
    mappings: Vec<MappingNote>,
    composition: Composition,
    verdict: Verdict,
    #[serde(deserialize_with = "capped::losses")]
    losses: Vec<LossNote>,
}

impl From<Listed> for Incident {
    fn from(listed: Listed) -> Self {
        Self {
            schema: listed.schema,
            id: listed.id,
            kind: listed.kind,
            at: listed.at,
            host: listed.host,
            cgroup: listed.cgroup,
            oom: listed.oom,
            pressure: listed.pressure,
            recording: listed.recording,
            timeline: Timeline::default(),
            growth: listed.growth,
            mappings: listed.mappings,
            allocation_paths: Vec::new(),
            allocations: None,
            composition: listed.composition,
            verdict: listed.verdict,
            losses: listed.losses,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures;

    #[test]
    fn what_is_served_is_read_back() {
        let burst = fixtures::burst();
        assert_eq!(incident(&serde_json::to_vec(&burst).unwrap()).unwrap(), burst);
        let mut short = serde_json::to_value(&burst).unwrap();
        for large in ["timeline", "allocation_paths", "allocations"] {
            short.as_object_mut().unwrap().remove(large);
        }
        let listed = list(&serde_json::to_vec(&[&short, &short]).unwrap()).unwrap();
        let expected =
            Incident { timeline: Timeline::default(), allocation_paths: Vec::new(), allocations: None, ..burst };
        assert_eq!(listed, [expected.clone(), expected]);
        assert_eq!(list(b"[]\n").unwrap(), []);
    }

    #[test]
    fn what_is_no_incident_is_refused_by_field() {
        let error = |json: &str| list(json.as_bytes()).unwrap_err().to_string();
        assert!(error("[{\"schema\":1,\"id\":7}]").contains("in `[0].id`"), "{}", error("[{\"schema\":1,\"id\":7}]"));
        assert!(error("{}").starts_with("not a memtrace incident"));
        let mut future = serde_json::to_value(fixtures::burst()).unwrap();
        future["schema"] = 99.into();
        let error = incident(&serde_json::to_vec(&future).unwrap()).unwrap_err();
        assert!(matches!(error, Unreadable::Schema { found: 99 }), "{error}");
    }
}
