//! The loop: sources to Input to Engine to Effect to sinks.
