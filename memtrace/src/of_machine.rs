//! For tests that need something of this machine.

use std::fmt::Display;
use std::io::Write;

/// What was found, or `None`, having reported that this test, or a part of it, does not run here. Whoever runs the tests
/// shows it.
pub(crate) fn found<T, E: Display>(what: &str, result: Result<T, E>) -> Option<T> {
    result
        .inspect_err(|why| {
            // past libtest, which shows what a test prints only when it fails
            let _ = writeln!(std::io::stdout().lock(), "  | NOT RUN HERE {what}: {why}");
        })
        .ok()
}
