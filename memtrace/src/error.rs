//! Errors with an exit code of their own.
//!
//! Whoever finds the cause returns one of these; everything else is an `anyhow` error and exit code
//! 1. Only `cli` turns an error into a number, so the codes stand in one place.

/// An error with its own exit code.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// The command line, the environment or the configuration is wrong: exit code 2.
    #[error("{0}")]
    Usage(String),
    /// This kernel, or the privileges of this process, cannot do it: exit code 3.
    #[error("{0}")]
    Unsupported(String),
}
