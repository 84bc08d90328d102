//! The pure core: records and facts in, incidents out. No file, socket, clock, thread or environment.

pub mod incident;
pub mod input;
