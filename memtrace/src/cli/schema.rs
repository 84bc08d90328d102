//! `memtrace schema`: prints the JSON Schema of the incident file.

use super::{VerbResult, terminal};

/// Arguments of `memtrace schema`.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Example:
  memtrace schema > incident.schema.json
  memtrace report latest --format json | check-jsonschema --schemafile incident.schema.json -")]
pub struct Args {}

/// Runs the verb.
pub fn run(_args: &Args) -> VerbResult {
    terminal::write(&memtrace_incident::json_schema()?, None)?;
    Ok(0)
}
