//! The kernel: its layout (btf), what it can do (facts, support), its log (log), its hooks and programs (hooks,
//! object, probe), and the calls that these did not see (misses).

pub mod btf;
pub mod facts;
pub mod hooks;
pub mod log;
mod misses;
pub mod object;
pub mod probe;
pub mod support;
