//! Measured figures, said in every log of a run.

use std::io::Write;

/// Writes a line to stdout past the test runner, which shows what tests print only when they fail.
pub fn say(line: std::fmt::Arguments<'_>) {
    // A closed stdout is no reason to fail a test.
    let _ = writeln!(std::io::stdout().lock(), "  | {line}");
}

/// Says that this test, or a part of it, cannot be run on this machine. The test then passes without having tested,
/// and who runs the tests counts it as skipped and says why.
pub fn not_run_here(what: impl std::fmt::Display, why: impl std::fmt::Display) {
    say(format_args!("NOT RUN HERE {what}: {why}"));
}
