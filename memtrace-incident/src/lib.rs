//! The incident file that memtrace publishes: its types, its units and its codec. A program that
//! reads or writes incident files needs this crate alone; it has no kernel code, no async runtime
//! and no HTTP.
//!
//! - [`Incident`] and the types in it are the file format. `memtrace schema` prints it as JSON
//!   Schema.
//! - [`Kind`] is what an incident is about. Every name and phrase of a kind stands there.
//! - [`Loss`] lists everything that can be missing from a file, each with a label and a sentence.
//! - [`KillEntry`], [`UnwatchedEntry`] and [`SigkillEntry`] are lines of the ledgers beside the
//!   incident files.
//! - [`codec`] turns an incident into the bytes of its file and back. A file may come from
//!   anywhere, so every list and string is bounded while it is parsed, and so is their sum.
//! - [`served`] reads the same from an answer of the agent over HTTP.
//! - [`units`] formats bytes, times and percentages. All reports use it, so figures look alike.
//!
//! ```
//! use memtrace_incident::codec;
//!
//! let error = codec::decode(b"hello").unwrap_err();
//! assert_eq!(error.to_string(), "not a memtrace incident (no zstd header)");
//! ```

mod allocation;
mod bounded;
mod capped;
pub mod caps;
pub mod codec;
#[cfg(any(test, feature = "fixtures"))]
#[allow(clippy::indexing_slicing, reason = "made by hand, for tests: a panic is how one fails")]
pub mod fixtures;
mod incident;
mod kind;
mod ledger;
mod loss;
#[cfg(feature = "schema")]
mod schema;
pub mod served;
mod timeline;
pub mod units;
mod unwatched;

pub use allocation::{AllocationPath, AllocationSamples, Allocations, Cause, Cut, Frame, Unattributed};
pub use bounded::shorten;
pub use incident::*;
pub use kind::Kind;
pub use ledger::{KillEntry, MoreSigkills, SigkillCause, SigkillEntry};
pub use loss::Loss;
#[cfg(feature = "schema")]
pub use schema::json_schema;
pub use timeline::{Columns, Timeline};
pub use unwatched::{CountedKills, KillLine, LoggedKill, Moment, NotWatched, UnwatchedEntry, UnwatchedKills};
