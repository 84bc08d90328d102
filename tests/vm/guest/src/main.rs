//! Process 1 of an emulated machine (`cargo xtask vm`): prepares the machine, runs the tests,
//! powers it off.
//!
//! It starts a second copy of itself as the runner, so that reaping orphans and waiting for tests
//! do not interfere. Whatever fails, the machine is powered off, because the host waits for its
//! end.

mod prepare;
mod run;

use std::io::Write;
use std::process::{Command, ExitCode};

use anyhow::Context;
use rustix::process::{WaitOptions, wait};
use rustix::system::{RebootCommand, reboot};

/// First argument of the copy that runs the tests.
const RUNNER: &str = "run";

fn main() -> ExitCode {
    if std::env::args().nth(1).as_deref() == Some(RUNNER) {
        return match run::everything() {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                say(format_args!("trouble {error:#}"));
                ExitCode::FAILURE
            }
        };
    }
    if std::process::id() != 1 {
        eprintln!("guest: this is the first process of an emulated machine, see cargo xtask vm");
        return ExitCode::from(2);
    }
    if let Err(error) = init() {
        say(format_args!("trouble {error:#}"));
    }
    rustix::fs::sync();
    let _ = reboot(RebootCommand::PowerOff);
    // If power-off failed: the kernel panics when process 1 exits, which ends the machine too.
    ExitCode::FAILURE
}

fn init() -> anyhow::Result<()> {
    prepare::machine()?;
    let runner = Command::new("/proc/self/exe").arg(RUNNER).spawn().context("failed to start the runner")?;
    loop {
        match wait(WaitOptions::empty()).context("failed to wait for processes")? {
            Some((pid, _)) if i64::from(pid.as_raw_nonzero().get()) == i64::from(runner.id()) => return Ok(()),
            _ => {}
        }
    }
}

/// Prints a line of the protocol with the host, marked by its prefix.
fn say(line: std::fmt::Arguments<'_>) {
    // A closed console cannot be reported anywhere.
    let _ = writeln!(std::io::stdout().lock(), "\n@memtrace {line}");
}
