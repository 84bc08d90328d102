//! What every harness stands on: where the checkout is, which toolchain builds the eBPF programs, what one build made,
//! and what libtest printed. Knows no test, machine or benchmark by name.

pub mod build;
pub mod built;
pub mod checkout;
pub mod host;
pub mod libtest;
pub mod run;
pub mod setup;
mod toolchain;
