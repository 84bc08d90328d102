//! Prints measured figures into the log of every run.

use std::io::Write;

/// Prints a line to stdout past libtest, which would show it only for a failed test.
pub fn say(line: std::fmt::Arguments<'_>) {
    // a closed stdout is no reason to fail a test
    let _ = writeln!(std::io::stdout().lock(), "  | {line}");
}

/// Reports that this test, or a part of it, cannot run on this machine. The test passes without
/// having tested; whoever runs the tests counts it as skipped and shows the reason.
pub fn not_run_here(what: impl std::fmt::Display, why: impl std::fmt::Display) {
    say(format_args!("NOT RUN HERE {what}: {why}"));
}
