//! Processes: taking stock of what already runs, and what a stack of addresses means.
//!
//! A record of the stacks ring goes `stacks` → `known` (its process) → `maps` and `modules` (whose code) → `unwind`
//! (`cfi`, `rule`: the callers); its frames are facts for the engine, and `symbolize` names them later and elsewhere. All
//! of it reads what processes brought along: files, mappings and names are bounded, and nothing in them is believed.

pub mod apart;
pub mod budget;
pub mod cfi;
pub mod debug_files;
pub mod elf;
pub mod jit;
pub mod kallsyms;
pub mod known;
pub mod maps;
pub mod modules;
pub mod proc_dir;
pub mod rule;
pub mod stacks;
pub mod stock;
pub mod symbolize;
pub mod trigger;
pub mod unwind;

#[cfg(test)]
mod hostile_tests;
#[cfg(test)]
mod tests;
