//! The pure core of memtrace: records and facts in, incidents out. No file, socket, clock, thread or
//! environment, so the same inputs give the same outputs, byte for byte, on any machine.
//!
//! [`Engine::apply`] is the only way in and its [`Out`] the only way out. The rooms, each of which
//! owns its state and stands only on those before it:
//!
//! - `world`: processes, address spaces, cgroups and their curves, as the records tell.
//! - `growth`: which code grew memory.
//! - `build`: an [`memtrace_incident::Incident`] from all of that; recordings.
//! - `oom`: OOM kills, from the kernel's decision to the closed incident; other SIGKILLs.
//! - `limits`: limits that are hit without a kill: spikes, near misses, stuck cgroups.
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
pub use world::{MAX_BEFORE_NS, PROCESSES_CAP};
