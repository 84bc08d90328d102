//! What is on disk: the journal, the ledgers, and the incident files with their retention.

pub mod atomic;
pub mod incidents;
pub mod journal;
pub mod ledger;
pub mod own_dir;
pub mod retention;
