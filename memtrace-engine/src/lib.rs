//! The pure core of memtrace: records and facts in, incidents out. It uses no file, socket, clock,
//! thread or environment, so the same inputs give the same outputs, byte for byte, on any machine.
//! That is what makes a journal replayable.
//!
//! [`Engine::apply`] takes every input, and everything that follows from it is in [`Out`]. Each
//! room owns its state and uses only the rooms before it:
//!
//! - `world`: the model of processes, address spaces, cgroups and their curves.
//! - `growth`: attributes grown memory to the code that grew it.
//! - `build`: makes a [`memtrace_incident::Incident`] of all that, and holds recordings.
//! - `oom`: OOM kills, from the kernel's decision to the closed incident, and all other SIGKILLs.
//! - `limits`: limits that are hit without a kill: spikes, near misses and stuck cgroups.
//!
//! ```
//! use memtrace_engine::input::{Fact, Input};
//! use memtrace_engine::{Engine, Out};
//!
//! let (mut engine, mut out) = (Engine::new(), Out::default());
//! engine.apply(&Input::Fact(Fact::Tick { boot_ns: 1 }), &mut out);
//! assert!(out.outputs.is_empty());
//! ```

pub mod decode;
pub mod input;
pub mod output;
pub mod snapshot;

mod build;
mod capacity;
mod clock;
mod engine;
mod growth;
mod limits;
mod losses;
mod oom;
mod preamble;
mod run;
#[cfg(test)]
mod test_support;
#[cfg(test)]
mod tests;
mod world;

pub use engine::{Counts, Engine};
pub use output::Out;
pub use snapshot::{CgroupView, ProcessView, Snapshot};
pub use world::{CGROUPS_CAP, MAX_BEFORE_NS, PROCESSES_CAP};
