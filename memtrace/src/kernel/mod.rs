//! The kernel side, seen from userspace.
//!
//! What a start does, in order: `facts` asks the machine, with `btf` as the reader of the kernel's
//! types; `support` makes a plan of the facts, by what `hooks` says that each hook needs; `probe`
//! loads `object` and attaches it by the plan; `status` says what came of it. From then on `probe`
//! drains the rings, `misses` counts the calls that programs were not run for, and `log` reads what
//! the kernel itself logs about OOM kills.

pub mod btf;
pub mod facts;
pub mod hooks;
pub mod log;
mod misses;
pub mod object;
pub mod probe;
pub mod status;
pub mod support;
