//! From a copied user stack and its registers to frames: whose code, at which offset.
//!
//! A stack sample is a few registers and the bytes above the stack pointer. [`process_cache`]
//! knows the processes: it reads /proc/PID/maps ([`proc_dir`], [`maps`]) and opens the files that
//! code was mapped from ([`modules`], [`elf`]). [`unwind`] then walks from frame to caller: call
//! frame information ([`cfi`]) gives a [`rule`] for each address, frame pointers stand in where a
//! module has none, and [`perf_map`] names code that a JIT compiler wrote. Every reading goes
//! through the [`gate`], which refuses, announces and accounts. A frame of a file is
//! `(module, offset)`; its function is looked up later and elsewhere.
//!
//! Everything read here comes from the traced programs: a container brings its own binaries, and
//! its own unwind tables. So every file, mapping, name and table is read with a bound, arithmetic on
//! its numbers is checked, and a broken one costs its own frames only. The crate has no runtime,
//! no eBPF loader and no serialization below it, so that fuzzers build it alone.

mod accounts;
mod backoff;
pub mod cfi;
pub mod elf;
pub mod gate;
mod holders;
mod host_mounts;
pub mod maps;
pub mod modules;
pub mod perf_map;
pub mod proc_dir;
pub mod process_cache;
mod readers;
pub mod rule;
pub mod unwind;

#[cfg(test)]
mod hostile_tests;
