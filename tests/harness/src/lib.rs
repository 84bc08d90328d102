//! The ground that all harnesses share: paths of the checkout, the eBPF toolchain, the one cargo
//! build, and a reader of libtest's output. Nothing here knows a particular test, machine or
//! benchmark.

pub mod build;
pub mod built;
pub mod checkout;
pub mod host;
pub mod libtest;
pub mod run;
pub mod setup;
mod toolchain;
