//! Memory cgroups: version, files, id and path.

pub mod files;
pub mod hierarchy;
pub mod queries;
pub mod transient;
