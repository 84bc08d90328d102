//! `memtrace exec-in` (hidden): enters a cgroup, drops to the user who called sudo, becomes the command.
//!
//! A process that enters before it becomes the command is in its cgroup from the first instruction on, without a
//! race and without unsafe code between fork and exec.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context;

use super::VerbResult;
use super::invoker::Invoker;

/// Arguments of `memtrace exec-in`.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// Directory of the cgroup
    #[arg(long)]
    cgroup: PathBuf,
    /// The command and its arguments
    #[arg(last = true, required = true)]
    command: Vec<OsString>,
}

/// This binary as a command that enters `cgroup` and becomes `command`.
pub fn command(cgroup: &Path, command: &[OsString]) -> anyhow::Result<Command> {
    let own = std::env::current_exe().context("failed to find this binary")?;
    let mut entering = Command::new(own);
    entering.arg("exec-in").arg("--cgroup").arg(cgroup).arg("--").args(command);
    Ok(entering)
}

/// Runs the verb; does not return when all goes well.
pub fn run(args: &Args) -> VerbResult {
    let invoker = Invoker::find()?;
    let procs = args.cgroup.join("cgroup.procs");
    std::fs::write(&procs, "0").with_context(|| format!("failed to enter the cgroup by {}", procs.display()))?;
    let Some((program, rest)) = args.command.split_first() else { return Ok(2) };
    let mut command = Command::new(program);
    command.args(rest);
    if let Some(invoker) = &invoker {
        if let Some((name, home)) = invoker.user() {
            command.env("HOME", home).env("USER", name).env("LOGNAME", name);
        }
        // After the cgroup, which only root may enter; this process has one thread.
        invoker.become_user()?;
    }
    let error = command.exec();
    eprintln!("memtrace: failed to run {}: {error}", Path::new(program).display());
    // As a shell: 127 not found, 126 found but not runnable.
    Ok(if error.kind() == std::io::ErrorKind::NotFound { 127 } else { 126 })
}
