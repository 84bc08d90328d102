//! What is on disk: the journal, the kill ledger, incidents and their retention.
