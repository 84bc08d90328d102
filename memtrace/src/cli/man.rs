//! `memtrace man` (hidden): manual pages, made from the definition of the command line.

use std::path::PathBuf;

use anyhow::Context;
use clap::CommandFactory;
use clap_mangen::Man;

use super::{Cli, VerbResult, terminal};

/// Arguments of `memtrace man`.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  memtrace man | man -l -
  memtrace man -o /usr/share/man/man1      a page for memtrace and one for each verb")]
pub struct Args {
    /// Write a page for memtrace and one for each verb into DIR
    #[arg(short, long, value_name = "DIR")]
    pub output: Option<PathBuf>,
}

/// Runs the verb.
pub fn run(args: &Args) -> VerbResult {
    let mut command = Cli::command();
    command.build();
    let Some(dir) = &args.output else {
        terminal::write(&page(command)?, None)?;
        return Ok(0);
    };
    std::fs::create_dir_all(dir).with_context(|| format!("failed to create {}", dir.display()))?;
    for verb in command.get_subcommands().filter(|verb| !verb.is_hide_set() && verb.get_name() != "help") {
        // `memtrace-report`, given by `build`.
        let name = verb.get_display_name().unwrap_or_else(|| verb.get_name());
        terminal::write(&page(verb.clone())?, Some(&dir.join(format!("{name}.1"))))?;
    }
    terminal::write(&page(command)?, Some(&dir.join("memtrace.1")))?;
    Ok(0)
}

fn page(command: clap::Command) -> anyhow::Result<String> {
    let mut page = Vec::new();
    Man::new(command).render(&mut page)?;
    Ok(String::from_utf8(page)?)
}
