//! Running other programs: what is run is said first, and an error names the command.

use std::fmt::Arguments;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::checkout::Checkout;

/// One line of progress on stderr.
pub fn say(line: Arguments<'_>) {
    let _ = writeln!(std::io::stderr(), "xtask: {line}");
}

/// The cargo that runs us, in the repository.
pub fn cargo(checkout: &Checkout) -> Command {
    let cargo = std::env::var_os("CARGO").map_or_else(|| PathBuf::from("cargo"), PathBuf::from);
    let mut command = Command::new(cargo);
    command.current_dir(&checkout.root).env("CARGO_TERM_COLOR", color());
    command
}

/// Runs to success; its output goes where ours goes.
pub fn run(command: &mut Command) -> Result<()> {
    say(format_args!("running {}", shown(command)));
    let status = command.status().with_context(|| format!("failed to start {}", shown(command)))?;
    if !status.success() {
        bail!("{} ended with {status}", shown(command));
    }
    Ok(())
}

/// Runs to success and gives its standard output.
pub fn output(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("failed to start {}", shown(command)))?;
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        bail!("{} ended with {}: {}", shown(command), output.status, stderr.trim());
    }
    String::from_utf8(output.stdout).with_context(|| format!("{} printed something that is not UTF-8", shown(command)))
}

/// Whether it runs and succeeds, with nothing shown.
pub fn succeeds(command: &mut Command) -> bool {
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok_and(|s| s.success())
}

/// The command as one would type it, without its environment.
pub fn shown(command: &Command) -> String {
    let program = Path::new(command.get_program());
    let mut line = program.file_name().unwrap_or(program.as_os_str()).to_string_lossy().into_owned();
    for arg in command.get_args() {
        line.push(' ');
        line.push_str(&arg.to_string_lossy());
    }
    line
}

/// Colour where a person looks on, also through our pipes.
fn color() -> String {
    use std::io::IsTerminal;
    std::env::var("CARGO_TERM_COLOR")
        .unwrap_or_else(|_| if std::io::stderr().is_terminal() { "always" } else { "never" }.to_owned())
}
