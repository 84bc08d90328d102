//! Directories and files that nobody but the agent may change. It runs as root: whoever can put a link into a directory
//! that it writes to chooses what it writes over, and whoever can open its lock can keep it from starting.

use std::fs::{self, DirBuilder, File, Metadata, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::OFlags;

/// Write permission for everybody and for the group, and the bit with which nobody can rename or remove what is
/// another's.
const OTHERS_WRITE: u32 = 0o002;
const GROUP_WRITES: u32 = 0o020;
const STICKY: u32 = 0o1000;

/// Creates a directory with this mode, or takes the one that is there.
///
/// Fails also when it belongs to another user than root and the one this process runs as, or when others may remove
/// what is in it: everybody, or a group other than root's.
pub fn create(dir: &Path, mode: u32) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(mode).create(dir)?;
    let found = fs::metadata(dir)?;
    if let Some(uid) = stranger(&found) {
        let why = "could replace what is in it; give it to root (chown root) or choose another";
        return Err(refused(format!("it belongs to user {uid}, who {why}")));
    }
    let sticky = found.mode() & STICKY != 0;
    if found.mode() & OTHERS_WRITE != 0 && !sticky {
        return Err(refused(
            "everybody may write to it; take that right away (chmod o-w) or choose another".to_owned(),
        ));
    }
    if found.mode() & GROUP_WRITES != 0 && found.gid() != 0 && !sticky {
        let why = "may write to it; take that right away (chmod g-w) or choose another";
        return Err(refused(format!("group {} {why}", found.gid())));
    }
    Ok(())
}

/// Whether others can make files in a directory that [`create`] takes, and not remove those of anybody else: `/tmp`.
pub fn is_shared(found: &Metadata) -> bool {
    found.mode() & STICKY != 0 && found.mode() & (OTHERS_WRITE | GROUP_WRITES) != 0
}

/// The owner of a file, unless that is root or the user this process runs as.
pub fn stranger(found: &Metadata) -> Option<u32> {
    Some(found.uid()).filter(|uid| *uid != 0 && *uid != rustix::process::geteuid().as_raw())
}

fn refused(why: String) -> io::Error {
    io::Error::new(io::ErrorKind::PermissionDenied, why)
}

/// Opens a file in such a directory with these options, creating it with this mode; never through a link, and only a
/// regular file of root or of the user this process runs as.
pub fn open(path: &Path, mode: u32, options: &mut OpenOptions) -> io::Result<File> {
    let no_wait = OFlags::NOFOLLOW | OFlags::NONBLOCK;
    // Both flags are positive.
    let flags = i32::try_from(no_wait.bits()).unwrap_or_default();
    let file = options.create(true).mode(mode).custom_flags(flags).open(path).map_err(|error| named(path, &error))?;
    let found = file.metadata()?;
    if !found.is_file() {
        return Err(refused(format!("{} is not a regular file; remove it", path.display())));
    }
    match stranger(&found) {
        Some(uid) => Err(refused(format!("{} belongs to user {uid}; remove it", path.display()))),
        None => Ok(file),
    }
}

/// Opens a regular file to read it, wherever it is; waits for nobody to write into a pipe.
pub fn read(path: &Path) -> io::Result<File> {
    let flags = i32::try_from(OFlags::NONBLOCK.bits()).unwrap_or_default();
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path)?;
    match file.metadata()?.is_file() {
        true => Ok(file),
        false => Err(refused(format!("{} is not a regular file", path.display()))),
    }
}

fn named(path: &Path, error: &io::Error) -> io::Error {
    let what = match fs::symlink_metadata(path) {
        Ok(found) if found.is_symlink() => "it is a link; remove it".to_owned(),
        _ => error.to_string(),
    };
    io::Error::new(error.kind(), format!("failed to open {}: {what}", path.display()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, chown, symlink};

    use super::*;

    #[test]
    fn a_directory_of_somebody_else_or_of_everybody_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let inner = dir.path().join("a/b");
        create(&inner, 0o750).unwrap();
        assert_eq!(fs::metadata(&inner).unwrap().mode() & 0o777, 0o750);
        create(&inner, 0o700).unwrap();
        fs::set_permissions(&inner, fs::Permissions::from_mode(0o777)).unwrap();
        assert!(create(&inner, 0o700).unwrap_err().to_string().contains("everybody may write"));
        fs::set_permissions(&inner, fs::Permissions::from_mode(0o1777)).unwrap();
        create(&inner, 0o700).unwrap();
        fs::set_permissions(&inner, fs::Permissions::from_mode(0o770)).unwrap();
        // Without privileges neither can be given away.
        if chown(&inner, None, Some(12345)).is_ok() {
            assert!(create(&inner, 0o700).unwrap_err().to_string().contains("group 12345 may write"));
            chown(&inner, None, Some(0)).unwrap();
            create(&inner, 0o700).unwrap();
        }
        if chown(&inner, Some(12345), None).is_ok() {
            assert!(create(&inner, 0o700).unwrap_err().to_string().contains("belongs to user 12345"));
        }
    }

    #[test]
    fn nothing_is_opened_through_a_link_and_nothing_is_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let append = |name: &str| open(&path(name), 0o600, OpenOptions::new().read(true).append(true));
        fs::write(path("precious"), "x").unwrap();
        symlink(path("precious"), path("link")).unwrap();
        assert!(append("link").unwrap_err().to_string().contains("is a link"));
        symlink(path("new"), path("dangling")).unwrap();
        assert!(append("dangling").is_err() && !path("new").exists());
        rustix::fs::mkfifoat(rustix::fs::CWD, path("fifo"), 0o600.into()).unwrap();
        assert!(append("fifo").unwrap_err().to_string().contains("not a regular file"));
        assert!(read(&path("fifo")).unwrap_err().to_string().contains("not a regular file"));
        assert!(read(&path("link")).is_ok(), "a link is followed to read");
        fs::write(path("foreign"), "x").unwrap();
        if chown(path("foreign"), Some(12345), None).is_ok() {
            assert!(append("foreign").unwrap_err().to_string().contains("belongs to user 12345"));
        }
        assert_eq!(append("file").unwrap().metadata().unwrap().mode() & 0o777, 0o600);
        assert_eq!(fs::read(path("precious")).unwrap(), b"x");
    }
}
