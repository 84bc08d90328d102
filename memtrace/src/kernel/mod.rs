//! The kernel: its layout (btf), what it can do (facts, support), its log (log), its hooks and programs (hooks,
//! object, probe).

pub mod btf;
pub mod facts;
pub mod hooks;
pub mod log;
pub mod object;
pub mod probe;
pub mod support;
