//! Writes a file whole or not at all: under a temporary name, synced, renamed, its directory synced.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// Part of every temporary name; [`remove_leftovers`] removes files that have it.
const TEMPORARY: &str = ".memtrace-tmp-";

/// Writes `bytes` to `path`, replacing what is there in one step. A failure leaves the old file as it was.
///
/// With `mode` the file has exactly that mode, otherwise 0666 less the umask. A target that is not a regular file
/// (a terminal, a pipe) is written to, not replaced.
pub fn write(path: &Path, bytes: &[u8], mode: Option<u32>) -> io::Result<()> {
    let target = match fs::metadata(path) {
        Ok(found) if !found.is_file() => return OpenOptions::new().write(true).open(path)?.write_all(bytes),
        // Through a symbolic link: replace what it points to, not the link.
        Ok(_) => fs::canonicalize(path)?,
        Err(_) => path.to_owned(),
    };
    put(&target, bytes, mode, true)?;
    sync_dir(parent(&target))
}

/// As [`write()`], in a directory of the agent's own: a link, device or pipe that has the name is replaced and not
/// written to.
pub fn write_own(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    put(path, bytes, Some(mode), true)?;
    sync_dir(parent(path))
}

/// Replaces a regular file in one step, or makes it, without a sync: after a power failure it is the old one, the new
/// one, or empty.
pub fn replace(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    put(path, bytes, Some(mode), false)
}

fn put(target: &Path, bytes: &[u8], mode: Option<u32>, sync: bool) -> io::Result<()> {
    let temporary = temporary_name(target)?;
    let written = write_new(&temporary, bytes, mode, sync).and_then(|()| fs::rename(&temporary, target));
    if written.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    written
}

/// Makes renames and removals in `dir` durable.
pub fn sync_dir(dir: &Path) -> io::Result<()> {
    match File::open(dir)?.sync_all() {
        // Some file systems cannot sync a directory (EINVAL); the rename itself is done.
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => Ok(()),
        done => done,
    }
}

/// Removes the files that interrupted writes left in `dir`; how many there were.
pub fn remove_leftovers(dir: &Path) -> io::Result<u64> {
    let mut removed = 0;
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let name = entry.file_name();
        if name.to_string_lossy().contains(TEMPORARY) && fs::remove_file(entry.path()).is_ok() {
            removed += 1;
        }
    }
    Ok(removed)
}

fn write_new(path: &Path, bytes: &[u8], mode: Option<u32>, sync: bool) -> io::Result<()> {
    // Process ids are reused (in a container it is always 1): a file of this name is left from a crash.
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = OpenOptions::new().write(true).create_new(true).mode(mode.unwrap_or(0o666)).open(path)?;
    if let Some(mode) = mode {
        file.set_permissions(Permissions::from_mode(mode))?;
    }
    file.write_all(bytes)?;
    if sync { file.sync_all() } else { Ok(()) }
}

fn temporary_name(target: &Path) -> io::Result<PathBuf> {
    let name = target
        .file_name()
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "the path does not name a file"))?;
    let mut hidden = OsString::from(".");
    hidden.push(name);
    hidden.push(format!("{TEMPORARY}{}", std::process::id()));
    Ok(target.with_file_name(hidden))
}

fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        _ => Path::new("."),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replaces_the_whole_file_and_leaves_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        write(&path, b"one", Some(0o640)).unwrap();
        write(&path, b"two", Some(0o640)).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"two");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o640);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_link_is_kept_and_a_device_is_written_to() {
        let dir = tempfile::tempdir().unwrap();
        let (real, link) = (dir.path().join("real"), dir.path().join("link"));
        fs::write(&real, b"old").unwrap();
        std::os::unix::fs::symlink(&real, &link).unwrap();
        write(&link, b"new", None).unwrap();
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        assert_eq!(fs::read(&real).unwrap(), b"new");
        write(Path::new("/dev/null"), b"x", None).unwrap();
    }

    #[test]
    fn a_failed_write_leaves_no_temporary() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("inner")).unwrap();
        assert!(write(&dir.path().join("missing/x"), b"x", None).is_err());
        fs::write(dir.path().join(format!(".x{TEMPORARY}1")), b"half").unwrap();
        assert_eq!(remove_leftovers(dir.path()).unwrap(), 1);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
