//! Runs other programs. The command line is printed before it runs, and errors name it.

use std::fmt::Arguments;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::checkout::Checkout;

/// Prints one line of progress to stderr.
pub fn say(line: Arguments<'_>) {
    let _ = writeln!(std::io::stderr(), "xtask: {line}");
}

/// A command for the cargo that runs us, with the repository as working directory.
pub fn cargo(checkout: &Checkout) -> Command {
    let cargo = std::env::var_os("CARGO").map_or_else(|| PathBuf::from("cargo"), PathBuf::from);
    let mut command = Command::new(cargo);
    command.current_dir(&checkout.root).env("CARGO_TERM_COLOR", color());
    command
}

/// Runs a command with our own stdout and stderr. Fails unless it succeeds.
pub fn run(command: &mut Command) -> Result<()> {
    say(format_args!("running {}", shown(command)));
    let status = command.status().with_context(|| format!("failed to start {}", shown(command)))?;
    if !status.success() {
        bail!("{} ended with {status}", shown(command));
    }
    Ok(())
}

/// Runs a command and returns its standard output. Fails unless it succeeds.
pub fn output(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("failed to start {}", shown(command)))?;
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        bail!("{} ended with {}: {}", shown(command), output.status, stderr.trim());
    }
    String::from_utf8(output.stdout).with_context(|| format!("{} printed something that is not UTF-8", shown(command)))
}

/// Whether a command can be started and succeeds; its output is discarded.
pub fn succeeds(command: &mut Command) -> bool {
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok_and(|s| s.success())
}

/// The command line as one would type it, without environment variables.
pub fn shown(command: &Command) -> String {
    let program = Path::new(command.get_program());
    let mut line = program.file_name().unwrap_or(program.as_os_str()).to_string_lossy().into_owned();
    for arg in command.get_args() {
        line.push(' ');
        line.push_str(&arg.to_string_lossy());
    }
    line
}

/// Keeps cargo's colours when our stderr is a terminal, although cargo itself writes to a pipe.
fn color() -> String {
    use std::io::IsTerminal;
    std::env::var("CARGO_TERM_COLOR")
        .unwrap_or_else(|_| if std::io::stderr().is_terminal() { "always" } else { "never" }.to_owned())
}
