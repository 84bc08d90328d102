//! Names for frames: from a module and an offset to function, source file and line.
//!
//! This never happens on the way of a kill: the raw incident is on disk before. [`frame_names`]
//! collects what an incident has no names for and writes the answers into it. Debug information comes
//! with the traced programs and can be crafted, so a process of its own reads it ([`subprocess`]):
//! it is given a [`job`], opens the files that may have the names ([`debug_files`]), locks itself in
//! ([`confine`]) and only then looks into them ([`symbolizer`]).

pub mod confine;
pub mod debug_files;
pub mod frame_names;
pub mod job;
pub mod subprocess;
pub mod symbolizer;

#[cfg(test)]
mod program_tests;
