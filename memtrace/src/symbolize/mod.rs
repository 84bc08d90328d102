//! Names for frames: from a module and an offset to function, source file and line.
//!
//! This never happens on the way of a kill: the raw incident is on disk before. [`frame_names`]
//! collects what an incident has no names for and writes the answers into it. [`symbolizer`] finds
//! them in symbol tables and debug information; [`debug_files`] finds the files that have those.
//! The agent runs the symbolizer in a process of its own ([`subprocess`]), since debug information
//! comes with the traced programs and can be crafted.

pub mod debug_files;
pub mod frame_names;
pub mod subprocess;
pub mod symbolizer;

#[cfg(test)]
mod program_tests;
