//! A temporary memory cgroup with a limit, on cgroup v1 and v2, and a race-free way to start a
//! program in it.
//!
//! It is made inside the memory cgroup of the caller. On v2 a cgroup with processes cannot delegate
//! its memory controller, so the nearest ancestor that does is the parent.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use rustix::process::Signal;

use crate::{process, programs};

/// Which hierarchy the memory controller is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    /// A hierarchy of its own.
    V1,
    /// The unified hierarchy.
    V2,
}

/// A directory of the memory hierarchy and its path inside that hierarchy.
#[derive(Clone, Debug)]
pub struct CgroupDir {
    /// Version of the hierarchy.
    pub version: Version,
    /// Directory.
    pub dir: PathBuf,
    /// Path from the root of the hierarchy.
    pub path: String,
}

impl CgroupDir {
    /// File with its usage.
    pub fn usage_file(&self) -> PathBuf {
        self.dir.join(match self.version {
            Version::V1 => "memory.usage_in_bytes",
            Version::V2 => "memory.current",
        })
    }

    /// Usage now, bytes.
    pub fn usage(&self) -> anyhow::Result<u64> {
        number_in(&self.usage_file())
    }
}

/// A temporary memory cgroup; removed when dropped.
#[derive(Debug)]
pub struct Cage {
    place: CgroupDir,
    limit: u64,
    id: u64,
    removed: bool,
}

impl Cage {
    /// Makes a cgroup named after `label` and this process, with a memory limit and no swap.
    pub fn new(label: &str, limit_bytes: u64) -> anyhow::Result<Self> {
        Self::unlimited(label)?.limited(limit_bytes, 0)
    }

    /// Like [`Cage::new`], with room for `swap_bytes` of swap beyond the memory.
    pub fn with_swap(label: &str, limit_bytes: u64, swap_bytes: u64) -> anyhow::Result<Self> {
        Self::unlimited(label)?.limited(limit_bytes, swap_bytes)
    }

    /// Makes a cgroup named after `label` and this process, without a limit.
    pub fn unlimited(label: &str) -> anyhow::Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let serial = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("memtrace-tests-{}-{serial}-{label}", std::process::id());
        Self::make(&parent_place()?, name.as_ref(), &name)
    }

    /// Makes a child cgroup without a limit. No process can live in this one afterwards.
    pub fn child(&self, name: &str) -> anyhow::Result<Self> {
        self.child_bytes(name.as_bytes(), name)
    }

    /// The same with a name of any bytes. `shown` is what [`Cage::path`] has of it.
    pub fn child_bytes(&self, name: &[u8], shown: &str) -> anyhow::Result<Self> {
        if self.version() == Version::V2 {
            self.set("cgroup.subtree_control", "+memory")?;
        }
        Self::make(&self.place, OsStr::from_bytes(name), shown)
    }

    fn make(parent: &CgroupDir, name: &OsStr, shown: &str) -> anyhow::Result<Self> {
        let dir = parent.dir.join(name);
        fs::create_dir(&dir).with_context(|| format!("failed to make cgroup {}", dir.display()))?;
        let path = format!("{}/{shown}", parent.path.trim_end_matches('/'));
        let id = fs::metadata(&dir).with_context(|| format!("failed to stat {}", dir.display()))?.ino();
        let place = CgroupDir { version: parent.version, dir, path };
        Ok(Self { place, limit: u64::MAX, id, removed: false })
    }

    /// Sets its memory limit, with room for `swap_bytes` of swap beyond the memory.
    pub fn limited(mut self, limit_bytes: u64, swap_bytes: u64) -> anyhow::Result<Self> {
        self.limit = limit_bytes;
        match self.place.version {
            Version::V1 => {
                self.set("memory.limit_in_bytes", limit_bytes)?;
                if self.has("memory.memsw.limit_in_bytes") {
                    self.set("memory.memsw.limit_in_bytes", limit_bytes.saturating_add(swap_bytes))?;
                }
            }
            Version::V2 => {
                self.set("memory.max", limit_bytes)?;
                if self.has("memory.swap.max") {
                    self.set("memory.swap.max", swap_bytes)?;
                }
            }
        }
        Ok(self)
    }

    /// A command that runs `program` inside. It enters before exec, so that nothing is charged
    /// elsewhere.
    pub fn command(&self, program: impl AsRef<OsStr>) -> anyhow::Result<Command> {
        let mut command = Command::new(programs::path("oomcage")?);
        command.arg("--enter").arg(&self.place.dir).arg("--").arg(program);
        Ok(command)
    }

    /// Version of the hierarchy.
    pub fn version(&self) -> Version {
        self.place.version
    }

    /// Directory of the cgroup.
    pub fn dir(&self) -> &Path {
        &self.place.dir
    }

    /// Path from the root of the memory hierarchy.
    pub fn path(&self) -> &str {
        &self.place.path
    }

    /// Inode number of the directory: the kernfs id.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Limit that was set, bytes.
    pub fn limit(&self) -> u64 {
        self.limit
    }

    /// Usage now, bytes.
    pub fn usage(&self) -> anyhow::Result<u64> {
        self.place.usage()
    }

    /// The kernel's watermark, bytes; `None` where v2 does not have it (before 5.19).
    pub fn peak(&self) -> anyhow::Result<Option<u64>> {
        let name = match self.place.version {
            Version::V1 => "memory.max_usage_in_bytes",
            Version::V2 => "memory.peak",
        };
        if self.has(name) { self.number(name).map(Some) } else { Ok(None) }
    }

    /// How often a charge hit the limit.
    pub fn failcnt(&self) -> anyhow::Result<u64> {
        match self.place.version {
            Version::V1 => self.number("memory.failcnt"),
            Version::V2 => self.keyed("memory.events", "max"),
        }
    }

    /// Number of processes that the OOM killer killed here, as the kernel counts.
    pub fn oom_kills(&self) -> anyhow::Result<u64> {
        match self.place.version {
            Version::V1 => self.keyed("memory.oom_control", "oom_kill"),
            Version::V2 => self.keyed("memory.events", "oom_kill"),
        }
    }

    /// Removes the cgroup: kills what is left in it, then retries for about two seconds.
    pub fn remove(mut self) -> anyhow::Result<()> {
        self.removed = true;
        remove_dir(&self.place.dir)
    }

    /// Writes one of its control files.
    pub fn set(&self, name: &str, value: impl std::fmt::Display) -> anyhow::Result<()> {
        let file = self.file(name);
        fs::write(&file, value.to_string()).with_context(|| format!("failed to write {value} to {}", file.display()))
    }

    /// Whether it has this control file.
    pub fn has(&self, name: &str) -> bool {
        self.file(name).exists()
    }

    fn file(&self, name: &str) -> PathBuf {
        self.place.dir.join(name)
    }

    fn number(&self, name: &str) -> anyhow::Result<u64> {
        number_in(&self.file(name))
    }

    /// Number after a key in one of its files.
    pub fn keyed(&self, name: &str, key: &str) -> anyhow::Result<u64> {
        let file = self.file(name);
        let text = fs::read_to_string(&file).with_context(|| format!("failed to read {}", file.display()))?;
        let value = text.lines().find_map(|line| line.split_once(' ').filter(|(k, _)| *k == key).map(|(_, v)| v));
        let value = value.with_context(|| format!("{} has no {key}", file.display()))?;
        value.trim().parse().with_context(|| format!("{}: {key} is not a number", file.display()))
    }
}

impl Drop for Cage {
    fn drop(&mut self) {
        if !self.removed {
            // no way to report it while unwinding; the next run shows a leftover directory
            let _ = remove_dir(&self.place.dir);
        }
    }
}

/// Moves the calling process into a cgroup directory.
pub fn enter(dir: &Path) -> anyhow::Result<()> {
    let file = dir.join("cgroup.procs");
    fs::write(&file, std::process::id().to_string()).with_context(|| format!("failed to enter {}", file.display()))
}

/// The memory cgroup this process runs in.
pub fn own_place() -> anyhow::Result<CgroupDir> {
    // What others mounted may have any name.
    let read = |path: &str| {
        let bytes = fs::read(path).with_context(|| format!("failed to read {path}"))?;
        anyhow::Ok(String::from_utf8_lossy(&bytes).into_owned())
    };
    place_of(&read("/proc/self/cgroup")?, &read("/proc/self/mountinfo")?)
}

/// The watermark of the memory cgroup of this process, bytes; `None` where v2 does not have it
/// (before 5.19).
pub fn own_peak() -> anyhow::Result<(CgroupDir, Option<u64>)> {
    let place = own_place()?;
    let file = place.dir.join(match place.version {
        Version::V1 => "memory.max_usage_in_bytes",
        Version::V2 => "memory.peak",
    });
    if !file.exists() {
        return Ok((place, None));
    }
    let peak = number_in(&file)?;
    Ok((place, Some(peak)))
}

fn number_in(file: &Path) -> anyhow::Result<u64> {
    let text = fs::read_to_string(file).with_context(|| format!("failed to read {}", file.display()))?;
    text.trim().parse().with_context(|| format!("{} is not a number", file.display()))
}

fn place_of(membership: &str, mounts: &str) -> anyhow::Result<CgroupDir> {
    let mut unified = None;
    let mut memory = None;
    for line in membership.lines() {
        let mut parts = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) = (parts.next(), parts.next(), parts.next()) else { continue };
        if controllers.is_empty() {
            unified = Some(path);
        } else if controllers.split(',').any(|c| c == "memory") {
            memory = Some(path);
        }
    }
    let (version, path) = match (memory, unified) {
        (Some(path), _) => (Version::V1, path),
        (None, Some(path)) => (Version::V2, path),
        (None, None) => bail!("this process is in no memory cgroup"),
    };
    for line in mounts.lines() {
        let Some((left, right)) = line.split_once(" - ") else { continue };
        let mut left = left.split(' ').skip(3);
        let mut right = right.split(' ');
        let (Some(root), Some(mount), Some(kind)) = (left.next(), left.next(), right.next()) else { continue };
        let options = right.nth(1).unwrap_or("");
        let matches = match version {
            Version::V1 => kind == "cgroup" && options.split(',').any(|o| o == "memory"),
            Version::V2 => kind == "cgroup2",
        };
        let below = if root == "/" { Some(path) } else { path.strip_prefix(root) };
        if let (true, Some(below)) = (matches, below) {
            let dir = Path::new(mount).join(below.trim_start_matches('/'));
            return Ok(CgroupDir { version, dir, path: path.to_owned() });
        }
    }
    bail!("the memory cgroup hierarchy of {path} is not mounted")
}

/// Directory in which a cage can be made: the caller's own memory cgroup; on v2 the nearest
/// ancestor that delegates memory.
fn parent_place() -> anyhow::Result<CgroupDir> {
    let mut place = own_place()?;
    if place.version == Version::V1 {
        return Ok(place);
    }
    loop {
        let control = place.dir.join("cgroup.subtree_control");
        let handed_down = || {
            fs::read_to_string(&control)
                .with_context(|| format!("failed to read {}", control.display()))
                .map(|text| text.split_ascii_whitespace().any(|c| c == "memory"))
        };
        // fails with EBUSY in a cgroup with processes; then an ancestor has to do
        if handed_down()? || (fs::write(&control, "+memory").is_ok() && handed_down()?) {
            return Ok(place);
        }
        let (Some(dir), Some((path, _))) = (place.dir.parent(), place.path.rsplit_once('/')) else {
            bail!("no cgroup above this process hands the memory controller down");
        };
        ensure!(!place.path.trim_matches('/').is_empty(), "no cgroup above this process hands memory down");
        place = CgroupDir { version: place.version, dir: dir.to_owned(), path: path.to_owned() };
    }
}

fn remove_dir(dir: &Path) -> anyhow::Result<()> {
    for attempt in 0u64..60 {
        match fs::remove_dir(dir) {
            Ok(()) => return Ok(()),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            Err(error) if attempt == 59 => {
                return Err(error).with_context(|| format!("failed to remove cgroup {}", dir.display()));
            }
            Err(_) => {}
        }
        for pid in fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default().lines() {
            if let Ok(pid) = pid.trim().parse() {
                // an error means that it is gone already
                let _ = process::signal(pid, Signal::KILL);
            }
        }
        std::thread::sleep(Duration::from_millis(5 + attempt));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_memory_hierarchy_on_v1_v2_and_hybrid() {
        let v1 = place_of(
            "4:cpu,memory:/a/b\n0::/elsewhere\n",
            "35 31 0:32 / /sys/fs/cgroup/memory rw shared:1 - cgroup cgroup rw,cpu,memory\n",
        )
        .unwrap();
        assert_eq!((v1.version, v1.path.as_str()), (Version::V1, "/a/b"));
        assert_eq!(v1.dir, Path::new("/sys/fs/cgroup/memory/a/b"));
        let v2 = place_of("0::/x/y\n", "30 20 0:26 /x /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n").unwrap();
        assert_eq!((v2.version, v2.path.as_str()), (Version::V2, "/x/y"));
        assert_eq!(v2.dir, Path::new("/sys/fs/cgroup/y"));
        assert!(place_of("", "").is_err());
    }
}
