//! Where things are: the repository, its target directory, the tools installed there; and who runs us.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

/// The paths every verb starts from.
pub struct Checkout {
    /// The repository.
    pub root: PathBuf,
    /// Cargo's target directory.
    pub target: PathBuf,
}

/// The two ways to build userspace.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Profile {
    /// Quick to build.
    Dev,
    /// What ships.
    Release,
}

impl Profile {
    /// `Release` when asked for.
    pub fn of(release: bool) -> Self {
        if release { Self::Release } else { Self::Dev }
    }

    /// The arguments cargo takes for it.
    pub fn args(self) -> &'static [&'static str] {
        match self {
            Self::Dev => &[],
            Self::Release => &["--release"],
        }
    }
}

impl Checkout {
    /// Finds the repository that this xtask was built from.
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

    /// Where `setup` installs cargo programs: never in the user's own cargo home.
    pub fn tools(&self) -> PathBuf {
        self.target.join("tools")
    }

    /// A program that `setup` installs.
    pub fn tool(&self, name: &str) -> PathBuf {
        self.tools().join("bin").join(name)
    }

    /// The target directory of the eBPF build.
    pub fn bpf_target(&self) -> PathBuf {
        self.target.join("bpf")
    }

    /// The eBPF object that `build` makes.
    pub fn ebpf_object(&self) -> PathBuf {
        self.bpf_target().join(crate::toolchain::BPF_TARGET).join("release").join("memtrace-ebpf")
    }
}

/// Whether this process is root's.
pub fn is_root() -> bool {
    std::fs::metadata("/proc/self").is_ok_and(|meta| meta.uid() == 0)
}

/// Whether the kernel publishes its types, which the eBPF programs need.
pub fn has_btf() -> bool {
    Path::new("/sys/kernel/btf/vmlinux").exists()
}

/// The first program of that name in PATH, or where administrators' programs are.
pub fn in_path(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let administrators = ["/usr/sbin", "/sbin"].map(PathBuf::from);
    std::env::split_paths(&path).chain(administrators).map(|dir| dir.join(program)).find(|file| file.is_file())
}

/// A program that may be where only administrators look for programs.
pub fn administrators(program: &str) -> Command {
    Command::new(in_path(program).unwrap_or_else(|| PathBuf::from(program)))
}
