//! The incident: the file that memtrace publishes, and everything a program needs to read or write
//! one. No kernel, no async runtime, no HTTP: a tool of yours can depend on this crate alone.
//!
//! - [`Incident`] and the types in it are the contract; `memtrace schema` prints it as JSON Schema.
//! - [`Kind`] says what an incident is about, and holds every name and phrase of it.
//! - [`Loss`] names everything that can be missing from a file, with a sentence for people.
//! - [`KillEntry`] and [`SigkillEntry`] are lines of the ledgers beside the incidents.
//! - [`codec`] turns an incident into the bytes of its file and back. Files are hostile: every list
//!   is bounded while it is parsed.
//! - [`units`] writes bytes, times and shares as people read them, the same way everywhere.
//!
//! ```
//! use memtrace_incident::codec;
//!
//! let error = codec::decode(b"hello").unwrap_err();
//! assert_eq!(error.to_string(), "not a memtrace incident (no zstd header)");
//! ```

mod allocation;
mod capped;
pub mod caps;
pub mod codec;
#[cfg(any(test, feature = "fixtures"))]
#[allow(clippy::indexing_slicing, reason = "only tests use it, and a panic is how a test fails")]
pub mod fixtures;
mod incident;
mod kind;
mod ledger;
mod loss;
#[cfg(feature = "schema")]
mod schema;
pub mod units;

pub use allocation::{AllocationPath, AllocationSamples, Allocations, Cause, Cut, Frame, Unattributed};
pub use incident::*;
pub use kind::Kind;
pub use ledger::{KillEntry, SigkillCause, SigkillEntry};
pub use loss::Loss;
#[cfg(feature = "schema")]
pub use schema::json_schema;
