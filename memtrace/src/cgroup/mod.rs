//! Memory cgroups: version, files, id and path, identity read off a path.

pub mod files;
pub mod hierarchy;
pub mod identity;
pub mod transient;
