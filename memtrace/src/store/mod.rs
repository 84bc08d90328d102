//! What is on disk: the journal, the ledgers, incidents and their retention.

pub mod atomic;
pub mod incidents;
pub mod journal;
pub mod ledger;
