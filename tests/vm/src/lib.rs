//! Boots the kernels that memtrace supports in emulated machines and runs tests or a benchmark
//! there.
//!
//! This crate is the host side. A machine is QEMU (`machine`) with a kernel from Debian's archive
//! (`apt`, `kernels`) and one archive of programs (`payload`); process 1 in it is
//! `tests/vm/guest`. Host and guest communicate over the serial console (`console`) and a shared
//! directory. `matrix` runs the tests on every kernel, `task` runs one benchmark on some.
//! Example: `cargo xtask vm sid --cgroup v2 --filter quiet_moments`.

mod apt;
mod console;
mod kernels;
mod machine;
mod matrix;
mod payload;
mod selection;
mod slots;
pub mod snapshot;
mod table;
mod task;
mod tsc;
mod verifier;
mod watch;

pub use self::kernels::names as kernel_names;
pub use self::machine::Processors;
pub use self::matrix::{Args, MachineReport, prefetch, run, run_matrix};
pub use self::selection::Selection;
pub use self::slots::Slots;
pub use self::task::{BenchFigures, BenchTask, NamedFigures};
