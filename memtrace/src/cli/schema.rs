//! `memtrace schema`.

use super::{Outcome, terminal};
use crate::engine::incident::Incident;

/// Arguments of `memtrace schema`.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Example:
  memtrace schema > incident.schema.json
  memtrace report latest --format json | check-jsonschema --schemafile incident.schema.json -")]
pub struct Args {}

/// Runs the verb.
pub fn run(_args: &Args) -> Outcome {
    terminal::write(&schema()?, None)?;
    Ok(0)
}

/// The JSON Schema of the incident file, as published.
pub fn schema() -> serde_json::Result<String> {
    let mut text = serde_json::to_string_pretty(&schemars::schema_for!(Incident))?;
    text.push('\n');
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_published_schema_is_this_one() {
        crate::blessed::check("docs/incident.schema.json", &schema().unwrap());
    }
}
