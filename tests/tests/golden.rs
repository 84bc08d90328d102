//! A capture of a real kill replays to the same bytes in every build. No root.

use std::path::PathBuf;

use anyhow::{Context, ensure};
use memtrace_tests::agent::successful;
use memtrace_tests::figures::say;
use memtrace_tests::programs;

/// A capture; beside the test where its sources are not, as in a virtual machine.
fn capture(name: &str) -> anyhow::Result<PathBuf> {
    let beside = std::env::current_exe().ok().and_then(|test| test.parent().map(|dir| dir.join("golden")));
    let dirs = [Some(PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("golden")), beside];
    let found = dirs.into_iter().flatten().map(|dir| dir.join(name)).find(|file| file.is_file());
    found.with_context(|| format!("no capture {name}"))
}

fn replay(name: &str, arguments: &[&str]) -> anyhow::Result<String> {
    let mut command = programs::memtrace_command()?;
    command.arg("replay").arg(capture(name)?).args(arguments);
    let output = successful(command)?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(said.is_empty(), "the replay of {name} said:\n{said}");
    Ok(String::from_utf8(output.stdout)?)
}

#[test]
fn a_burst_replays_to_the_same_incident() -> anyhow::Result<()> {
    let incidents = replay("burst.mtj", &["--json"])?;
    ensure!(incidents == replay("burst.mtj", &["--json"])?, "two replays differ");
    say(format_args!("burst.mtj: {} B of incidents", incidents.len()));
    insta::assert_snapshot!("burst", incidents);
    Ok(())
}

#[test]
fn a_burst_is_reported_from_its_capture() -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let out = dir.path().to_str().context("a path that is not text")?;
    let table = replay("burst.mtj", &["-o", out])?;
    let mut files = std::fs::read_dir(dir.path())?.collect::<Result<Vec<_>, _>>()?;
    let file = files.pop().with_context(|| format!("no incident file; the replay printed:\n{table}"))?;
    let mut report = programs::memtrace_command()?;
    report.arg("report").arg(file.path());
    insta::assert_snapshot!("burst_report", String::from_utf8(successful(report)?.stdout)?);
    Ok(())
}
