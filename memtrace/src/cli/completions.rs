//! `memtrace completions`: completion scripts for shells.

use clap::CommandFactory;
use clap_complete::Shell;

use super::{Cli, VerbResult, terminal};

/// Arguments of `memtrace completions`.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  memtrace completions bash > /usr/share/bash-completion/completions/memtrace
  memtrace completions zsh > /usr/share/zsh/site-functions/_memtrace
  memtrace completions fish > ~/.config/fish/completions/memtrace.fish")]
pub struct Args {
    /// Shell that the script is for
    pub shell: Shell,
}

/// Runs the verb.
pub fn run(args: &Args) -> VerbResult {
    // Rendered first: clap_complete panics where its output cannot be written.
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "memtrace", &mut script);
    terminal::write(&String::from_utf8(script)?, None)?;
    Ok(0)
}
