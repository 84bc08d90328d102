//! Paths of the memtrace binary under test and of the tests' own programs.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, bail, ensure};

/// Environment variable that names the binary under test.
pub const MEMTRACE_BIN: &str = "MEMTRACE_BIN";

/// The memtrace binary under test.
pub fn memtrace() -> anyhow::Result<PathBuf> {
    let Some(path) = std::env::var_os(MEMTRACE_BIN) else {
        bail!("{MEMTRACE_BIN} is not set: run through cargo xtask test");
    };
    let path = std::path::absolute(PathBuf::from(path)).context("failed to make the path of MEMTRACE_BIN absolute")?;
    ensure!(path.is_file(), "{MEMTRACE_BIN}={} is not a file: run through cargo xtask test", path.display());
    Ok(path)
}

/// A command that runs the memtrace binary under test.
pub fn memtrace_command() -> anyhow::Result<Command> {
    Ok(Command::new(memtrace()?))
}

/// Path of one of the tests' programs (`workload`, `oomcage`): beside the running executable or one
/// directory up, which holds below `target/` as well as in a virtual machine.
pub fn path(name: &str) -> anyhow::Result<PathBuf> {
    let running = std::env::current_exe().context("failed to find the running test program")?;
    let beside = running.parent().context("the running test program has no directory")?;
    let found = [Some(beside), beside.parent()].into_iter().flatten().map(|dir| dir.join(name)).find(|p| p.is_file());
    found.with_context(|| format!("no program {name} beside {} or one directory up", running.display()))
}

/// Fails, with instructions, unless the test runs as root.
pub fn require_root() -> anyhow::Result<()> {
    ensure!(rustix::process::geteuid().is_root(), "this test needs root (it loads eBPF programs and makes cgroups)");
    Ok(())
}
