//! Paths of the repository, its target directory and the tools installed there; privileges of this
//! process.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

/// The repository and its target directory: what every verb starts from.
pub struct Checkout {
    /// Root directory of the repository.
    pub root: PathBuf,
    /// Cargo's target directory.
    pub target: PathBuf,
}

/// How userspace is built.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Profile {
    /// Cargo's dev profile: quick to build.
    Dev,
    /// Cargo's release profile: what ships.
    Release,
}

impl Profile {
    /// [`Profile::Release`] if `release`, else [`Profile::Dev`].
    pub fn of(release: bool) -> Self {
        if release { Self::Release } else { Self::Dev }
    }

    /// Cargo's arguments for this profile.
    pub fn args(self) -> &'static [&'static str] {
        match self {
            Self::Dev => &[],
            Self::Release => &["--release"],
        }
    }
}

impl Checkout {
    /// Finds the repository that this program was built from.
    pub fn find() -> Result<Self> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"))
            .ancestors()
            .nth(2)
            .context("failed to find the repository above tests/harness/")?
            .to_path_buf();
        let target = match std::env::var_os("CARGO_TARGET_DIR") {
            Some(dir) => std::path::absolute(dir).context("failed to resolve CARGO_TARGET_DIR")?,
            None => root.join("target"),
        };
        Ok(Self { root, target })
    }

    /// Root of the cargo programs that `setup` installs. Below the target directory, so that the
    /// user's cargo home is left alone.
    pub fn tools(&self) -> PathBuf {
        self.target.join("tools")
    }

    /// Path of a program that `setup` installs.
    pub fn tool(&self, name: &str) -> PathBuf {
        self.tools().join("bin").join(name)
    }

    /// Target directory of the eBPF build.
    pub fn bpf_target(&self) -> PathBuf {
        self.target.join("bpf")
    }

    /// Path of the eBPF object that `build` makes.
    pub fn ebpf_object(&self) -> PathBuf {
        self.bpf_target().join(crate::toolchain::BPF_TARGET).join("release").join("memtrace-ebpf")
    }
}

/// Whether this process runs as root.
pub fn is_root() -> bool {
    std::fs::metadata("/proc/self").is_ok_and(|meta| meta.uid() == 0)
}

/// Whether the kernel publishes its BTF, which the eBPF programs need.
pub fn has_btf() -> bool {
    Path::new("/sys/kernel/btf/vmlinux").exists()
}

/// Path of the first program of that name in PATH, /usr/sbin or /sbin.
pub fn in_path(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let administrators = ["/usr/sbin", "/sbin"].map(PathBuf::from);
    std::env::split_paths(&path).chain(administrators).map(|dir| dir.join(program)).find(|file| file.is_file())
}

/// A command for a program that may be in /usr/sbin or /sbin.
pub fn administrators(program: &str) -> Command {
    Command::new(in_path(program).unwrap_or_else(|| PathBuf::from(program)))
}
