//! The cgroup that `record` runs its command in: created, limited, filled, removed.

use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

use super::hierarchy::{Hierarchy, shown};
use memtrace_engine::input::CgroupFound;

/// How long a removal waits for the last processes to exit.
const REMOVE_FOR: Duration = Duration::from_secs(2);
/// Pause between two tries.
const PAUSE: Duration = Duration::from_millis(10);

/// What a limit means for swap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Swap {
    /// The limit of swap stays as it is.
    Leave,
    /// The limit is for memory and swap together, so nothing can be swapped out to get below it.
    None,
}

/// A cgroup that is removed when this value is dropped.
#[derive(Debug)]
pub struct TransientCgroup {
    hierarchy: Hierarchy,
    dir: PathBuf,
    path: PathBuf,
    id: u64,
    removed: bool,
}

impl Hierarchy {
    /// Creates a cgroup below the caller's own, with this limit in bytes.
    ///
    /// On version 2 a cgroup that holds processes cannot enable controllers for its children ("no
    /// internal processes", Documentation/admin-guide/cgroup-v2.rst). Then the nearest ancestor
    /// that has the memory controller enabled is taken, at last the root. Limits of the cgroups in
    /// between do not hold for the new one.
    pub fn create_transient(&self, name: &str, limit: Option<u64>) -> anyhow::Result<TransientCgroup> {
        let fit = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
        if name.is_empty() || name.len() > 64 || name.starts_with('.') || !name.bytes().all(fit) {
            bail!("{name:?} is no name for a cgroup");
        }
        let own = self.own_path().context("failed to find the cgroup of this process")?;
        self.create_below(&own, name, limit)
    }

    fn create_below(&self, own: &Path, name: &str, limit: Option<u64>) -> anyhow::Result<TransientCgroup> {
        let (shown_own, mount) = (shown(own), shown(&self.mount));
        let mut failure = anyhow::anyhow!("none of {shown_own} and its ancestors is mounted at {mount}");
        for parent in own.ancestors() {
            let Some(dir) = self.dir_of(parent) else { continue };
            let may_enable = parent == own || parent == self.root;
            match self.make(&dir, parent, name, may_enable) {
                Ok(transient) => {
                    if limit.is_some() {
                        transient.set_limit(limit, Swap::Leave)?;
                    }
                    return Ok(transient);
                }
                Err(error) => failure = error,
            }
            if self.version == 1 {
                break;
            }
        }
        Err(failure).with_context(|| format!("failed to create a memory cgroup {name}"))
    }

    fn make(&self, parent: &Path, parent_path: &Path, name: &str, may_enable: bool) -> anyhow::Result<TransientCgroup> {
        if self.version != 1 {
            enable_memory(parent, may_enable)?;
        }
        let dir = parent.join(name);
        fs::create_dir(&dir).with_context(|| format!("failed to create {}", dir.display()))?;
        let path = parent_path.join(name);
        let mut transient =
            TransientCgroup { hierarchy: self.clone(), dir: dir.clone(), path: path.clone(), id: 0, removed: false };
        match self.read(&path, 0) {
            Some(found) if found.usage_bytes.is_some() => transient.id = found.id,
            _ => bail!("{} has no memory controller", dir.display()),
        }
        Ok(transient)
    }
}

/// Makes sure that children of this version 2 cgroup have a memory controller; enables it where
/// that is allowed.
fn enable_memory(dir: &Path, may_enable: bool) -> anyhow::Result<()> {
    let file = dir.join("cgroup.subtree_control");
    let enabled = |text: String| text.split_whitespace().any(|controller| controller == "memory");
    if fs::read_to_string(&file).is_ok_and(enabled) {
        return Ok(());
    }
    if !may_enable {
        bail!("{} does not hand out the memory controller", dir.display());
    }
    fs::write(&file, "+memory").with_context(|| format!("failed to enable memory in {}", file.display()))
}

impl TransientCgroup {
    /// Its path in the hierarchy.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Its kernfs id.
    pub const fn id(&self) -> u64 {
        self.id
    }

    /// Reads its files; `None` when it is gone.
    pub fn read(&self, boot_ns: u64) -> Option<CgroupFound> {
        self.hierarchy.read(&self.path, boot_ns)
    }

    /// Moves a process into it. 0 moves the caller, as a child does between fork and exec.
    pub fn add(&self, pid: u32) -> anyhow::Result<()> {
        self.write("cgroup.procs", &pid.to_string())
    }

    /// Processes in it, its own children's not counted.
    pub fn processes(&self) -> Vec<u32> {
        let text = fs::read_to_string(self.dir.join("cgroup.procs")).unwrap_or_default();
        text.lines().filter_map(|line| line.parse().ok()).collect()
    }

    /// Sets the limit in bytes; `None` removes it.
    pub fn set_limit(&self, limit: Option<u64>, swap: Swap) -> anyhow::Result<()> {
        let number = |none: &str| limit.map_or_else(|| none.to_owned(), |limit| limit.to_string());
        if self.hierarchy.version == 1 {
            const BOTH: &str = "memory.memsw.limit_in_bytes";
            let both = self.dir.join(BOTH).exists();
            // The limit of memory and swap must never be below that of memory: raise it before,
            // lower it after.
            if both {
                self.write(BOTH, "-1")?;
            }
            self.write("memory.limit_in_bytes", &number("-1"))?;
            if both && swap == Swap::None && limit.is_some() {
                self.write(BOTH, &number("-1"))?;
            }
            return Ok(());
        }
        self.write("memory.max", &number("max"))?;
        if swap == Swap::None && self.dir.join("memory.swap.max").exists() {
            self.write("memory.swap.max", "0")?;
        }
        Ok(())
    }

    /// Removes it and the empty cgroups in it. Fails when processes are still in it after two
    /// seconds.
    pub fn remove(mut self) -> anyhow::Result<()> {
        self.removed = true;
        remove_tree(&self.dir, REMOVE_FOR).with_context(|| format!("failed to remove {}", self.dir.display()))
    }

    fn write(&self, name: &str, text: &str) -> anyhow::Result<()> {
        let file = self.dir.join(name);
        // Never creates: on a cgroup file system a missing file is a missing feature.
        let write = || io::Write::write_all(&mut fs::OpenOptions::new().write(true).open(&file)?, text.as_bytes());
        write().with_context(|| format!("failed to write {text} to {}", file.display()))
    }
}

impl Drop for TransientCgroup {
    fn drop(&mut self) {
        if !self.removed {
            let _ = remove_tree(&self.dir, REMOVE_FOR);
        }
    }
}

/// Removes a cgroup and those below it, deepest first, trying again while the kernel is busy.
fn remove_tree(dir: &Path, patience: Duration) -> io::Result<()> {
    let until = Instant::now() + patience;
    loop {
        match remove_once(dir, 0) {
            Ok(()) => return Ok(()),
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
            Err(error) if error.kind() == ErrorKind::ResourceBusy && Instant::now() < until => {
                std::thread::sleep(PAUSE);
            }
            Err(error) => return Err(error),
        }
    }
}

fn remove_once(dir: &Path, depth: usize) -> io::Result<()> {
    if depth < super::files::MAX_DEPTH {
        for entry in fs::read_dir(dir)?.flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                remove_once(&entry.path(), depth + 1)?;
            }
        }
    }
    fs::remove_dir(dir)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::of_machine;

    #[test]
    fn names_that_are_none() {
        let hierarchy = Hierarchy { version: 2, mount: "/nowhere".into(), hierarchy_id: 0, root: "/".into() };
        for name in ["", "..", ".x", "a/b", "a b", "a\n"] {
            assert!(hierarchy.create_transient(name, None).unwrap_err().to_string().contains("is no name"), "{name}");
        }
        assert!(hierarchy.create_transient("fine", None).is_err());
    }

    #[test]
    fn version_2_falls_back_to_an_ancestor_that_hands_out_memory() {
        let dir = tempfile::tempdir().unwrap();
        let hierarchy = Hierarchy { version: 2, mount: dir.path().into(), hierarchy_id: 0, root: "/".into() };
        let own = dir.path().join("a/b/c");
        fs::create_dir_all(&own).unwrap();
        // A directory in the place of the file refuses the write, as a cgroup with processes does.
        fs::create_dir(own.join("cgroup.subtree_control")).unwrap();
        fs::write(dir.path().join("a/cgroup.subtree_control"), "cpu memory\n").unwrap();
        let error = hierarchy.create_below(Path::new("/a/b/c"), "t", None).unwrap_err();
        // This is no cgroup file system, so no files appear in the new directory and it is given back.
        assert!(!dir.path().join("a/t").exists() && !dir.path().join("t").exists(), "{error:#}");
        assert_eq!(enable_memory(&dir.path().join("a"), false).map_err(|e| e.to_string()), Ok(()));
        assert!(enable_memory(&dir.path().join("a/b"), false).is_err());
        assert!(enable_memory(&own, true).is_err());
    }

    #[test]
    fn a_real_one_comes_and_goes() {
        let Some(hierarchy) = of_machine::found("a memory controller", Hierarchy::find()) else { return };
        let name = format!("memtrace-test-{}", std::process::id());
        let transient = hierarchy.create_transient(&name, Some(64 << 20));
        let Some(transient) = of_machine::found("a cgroup of one's own", transient) else { return };
        let found = transient.read(1).unwrap();
        assert_eq!((found.id, found.limit_bytes), (transient.id(), Some(64 << 20)));
        assert!(found.path.ends_with(&name) && transient.processes().is_empty());
        transient.set_limit(Some(32 << 20), Swap::None).unwrap();
        assert_eq!(transient.read(1).unwrap().limit_bytes, Some(32 << 20));
        transient.set_limit(None, Swap::Leave).unwrap();
        assert_eq!(transient.read(1).unwrap().limit_bytes, None);
        assert_eq!(hierarchy.id_of(transient.path()), Some(transient.id()));
        fs::create_dir(transient.dir().join("inner")).unwrap();
        let dir = transient.dir().to_path_buf();
        transient.remove().unwrap();
        assert!(!dir.exists());
        let again = hierarchy.create_transient(&name, None).unwrap();
        let dir = again.dir().to_path_buf();
        drop(again);
        assert!(!dir.exists());
    }
}
