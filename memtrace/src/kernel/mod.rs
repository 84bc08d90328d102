//! The kernel: its layout (btf), what it can do (support), its log (log), its programs (probe).

pub mod btf;
pub mod facts;
pub mod hooks;
pub mod log;
pub mod support;
