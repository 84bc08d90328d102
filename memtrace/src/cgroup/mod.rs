//! Memory cgroups: version, files, id and path, identity read off a path.
