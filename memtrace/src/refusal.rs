//! Refusals: errors with an exit code of their own. Whoever finds out says so; only `cli` turns it into a number.

/// A refusal with its own exit code; everything else is exit code 1.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// The command line, the environment or the configuration is wrong: exit code 2.
    #[error("{0}")]
    Usage(String),
    /// This kernel or these privileges cannot do it: exit code 3.
    #[error("{0}")]
    Unsupported(String),
}
