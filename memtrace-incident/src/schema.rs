//! The JSON Schema of the incident file, derived from the types. Their doc comments are the
//! descriptions in it.

use crate::Incident;

/// The JSON Schema of the incident file, pretty-printed, with a newline at its end.
/// `docs/incident.schema.json` is a copy of it.
pub fn json_schema() -> serde_json::Result<String> {
    let mut text = serde_json::to_string_pretty(&schemars::schema_for!(Incident))?;
    text.push('\n');
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_published_schema_is_this_one() {
        let published = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/incident.schema.json");
        assert!(
            std::fs::read_to_string(published).unwrap_or_default() == json_schema().unwrap(),
            "docs/incident.schema.json is out of date: memtrace schema > docs/incident.schema.json"
        );
    }
}
