//! `memtrace report`.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use anyhow::Context;

use super::incidents::unreadable;
use super::terminal::{self, Colour};
use super::{Outcome, STATE_DIR};
use crate::engine::incident::Incident;
use crate::refusal::Refusal;
use crate::report::{json, text};
use crate::store::incidents::{self, FindError, Incidents};

/// Arguments of `memtrace report`.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  memtrace report latest                     the newest incident of this machine
  memtrace report 01KJHQ                     by the beginning of its id
  memtrace report ./01KJHQ3V4D.memtrace      a file, from whatever machine
  memtrace report latest --format json | jq .verdict
  ssh node-7 sudo cat /var/lib/memtrace/ID.memtrace | memtrace report -")]
pub struct Args {
    /// Id of an incident or its beginning, `latest`, an incident file, or `-` for standard input
    #[arg(value_name = "ID|FILE")]
    pub incident: OsString,
    /// What to print
    #[arg(long, value_enum, default_value_t)]
    pub format: Format,
    /// Write to FILE instead of standard output
    #[arg(short, long, value_name = "FILE")]
    pub output: Option<PathBuf>,
    /// The agent's state directory
    #[arg(long, value_name = "DIR", default_value = STATE_DIR)]
    pub state_dir: PathBuf,
    /// When to use colours
    #[arg(long, value_enum, value_name = "WHEN", default_value_t)]
    pub color: Colour,
}

/// What `memtrace report` prints.
#[derive(clap::ValueEnum, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Format {
    /// One screen for people
    #[default]
    Text,
    /// The whole incident file
    Json,
}

/// Runs the verb.
pub fn run(args: &Args) -> Outcome {
    let incident = load(&args.incident, &args.state_dir)?;
    let rendered = match args.format {
        Format::Text => text::report(&incident, &terminal::style(args.color, args.output.is_some())),
        Format::Json => json::incident(&incident)?,
    };
    terminal::write(&rendered, args.output.as_deref())?;
    Ok(0)
}

/// The incident that an argument names: a file, standard input, or an id in the state directory.
fn load(named: &OsString, state_dir: &Path) -> anyhow::Result<Incident> {
    if named == "-" {
        return incidents::read_from(std::io::stdin().lock()).context("failed to read incident from standard input");
    }
    let path = Path::new(named);
    let text = named.to_str().unwrap_or_default();
    // What cannot be an id is a file, whether it exists or not.
    let file = text.is_empty() || text.contains(['/', '.']) || path.is_file();
    if file {
        return Ok(incidents::read(path)?);
    }
    match Incidents::at(state_dir).find(text) {
        Ok(entry) => Ok(incidents::read(&entry.path)?),
        Err(FindError::NotAnId(_)) => {
            Err(Refusal::Usage(format!("{text:?} is neither a file nor the id of an incident")).into())
        }
        Err(FindError::Io { source, .. }) => Err(unreadable(source, state_dir)),
        Err(other) => Err(other.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::{Style, fixtures};

    fn args(incident: impl Into<OsString>, dir: &Path, format: Format) -> Args {
        Args {
            incident: incident.into(),
            format,
            output: Some(dir.join("out")),
            state_dir: dir.to_owned(),
            color: Colour::Auto,
        }
    }

    #[test]
    fn a_file_an_id_and_the_latest_give_the_same_report() {
        let dir = tempfile::tempdir().unwrap();
        let burst = fixtures::burst();
        let path = Incidents::create(dir.path()).unwrap().save(&burst).unwrap();
        for named in
            [path.as_os_str().to_owned(), burst.id[..8].into(), burst.id.to_lowercase().into(), "latest".into()]
        {
            assert_eq!(run(&args(&named, dir.path(), Format::Text)).unwrap(), 0);
            let written = std::fs::read_to_string(dir.path().join("out")).unwrap();
            assert_eq!(written, text::report(&burst, &Style::PLAIN));
        }
        run(&args("latest", dir.path(), Format::Json)).unwrap();
        let written = std::fs::read_to_string(dir.path().join("out")).unwrap();
        assert_eq!(serde_json::from_str::<Incident>(&written).unwrap(), burst);
    }

    #[test]
    fn what_cannot_be_found_is_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let error = |named: &str| run(&args(named, dir.path(), Format::Text)).unwrap_err();
        assert!(matches!(error("not-an-id").downcast_ref(), Some(Refusal::Usage(_))));
        assert!(error("./no.memtrace").to_string().starts_with("failed to read incident ./no.memtrace: No such file"));
        assert!(error("01KJ").to_string().starts_with("no incident 01KJ in "));
        assert!(error("latest").to_string().starts_with("no incident latest in "));
    }
}
