//! `memtrace agent`: the daemon.

use std::path::PathBuf;

use super::config::{AGENT, Config, Flags};
use super::{VerbResult, terminal};
use crate::agent;

/// Arguments of `memtrace agent`.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  sudo memtrace agent
  sudo memtrace agent --state-dir /srv/memtrace --listen 0.0.0.0:9469
  sudo memtrace agent --config /etc/memtrace.toml
  memtrace agent --print-config > memtrace.toml     a file to start from

The agent is ready when it logs `ready` and /readyz answers 200. SIGTERM stops it: it closes open
incidents and logs what it lost. Every flag but --config and --print-config is also a key of the
file, with `_` for `-` (`state_dir = \"/srv/memtrace\"`); a flag wins over the file.")]
pub struct Args {
    /// TOML file with settings
    #[arg(long, value_name = "FILE", value_hint = clap::ValueHint::FilePath)]
    config: Option<PathBuf>,
    /// Print the effective configuration as TOML and exit; needs no privileges
    #[arg(long)]
    print_config: bool,
    #[command(flatten)]
    pub(super) settings: Flags<AGENT>,
}

/// Runs the verb until SIGTERM or SIGINT.
pub fn run(args: &Args) -> VerbResult {
    let config = Config::load(args.config.as_deref(), &args.settings)?;
    let parsed = config.parse()?;
    if args.print_config {
        terminal::write(&config.to_toml()?, None)?;
    } else {
        agent::run(parsed)?;
    }
    Ok(0)
}
