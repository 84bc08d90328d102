//! What is on disk: the journal, the kill ledger, incidents and their retention.

pub mod atomic;
pub mod incidents;
pub mod journal;
pub mod kills;
