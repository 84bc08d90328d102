//! Measured figures, said in every log of a run.

use std::io::Write;

/// Writes a line to stdout past the test runner, which shows what tests print only when they fail.
pub fn say(line: std::fmt::Arguments<'_>) {
    // A closed stdout is no reason to fail a test.
    let _ = writeln!(std::io::stdout().lock(), "  | {line}");
}
