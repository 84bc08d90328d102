//! The kernels that memtrace is for, each booted in an emulated machine, and what runs there: tests or one benchmark.
//!
//! The host side. A machine is QEMU ([`machine`]) with a kernel from Debian's archive ([`apt`], [`kernels`]) and one
//! archive of programs ([`payload`]), of which `tests/vm/guest` is process 1. The two talk over the serial console
//! ([`console`]) and a shared directory. [`matrix`] runs the tests on every kernel, [`task`] a benchmark on some.

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
mod verifier;
mod watch;

pub use self::kernels::names as kernel_names;
pub use self::machine::Processors;
pub use self::matrix::{Args, MachineReport, prefetch, run, run_matrix};
pub use self::selection::Selection;
pub use self::slots::Slots;
pub use self::task::{BenchFigures, BenchTask, NamedFigures};
