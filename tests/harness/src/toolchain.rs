//! The compiler and linker for the eBPF programs: facts about this machine in, the next set-up step
//! out.
//!
//! Two recipes work. (a) rustup's nightly with `rust-src`, and bpf-linker. (b) Debian's own rustc,
//! which ships `core` for the BPF target, and bpf-linker built against the same LLVM.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Result, bail};

use crate::checkout::{Checkout, in_path};
use crate::run::output;

/// Rust target of the eBPF programs.
pub(crate) const BPF_TARGET: &str = "bpfel-unknown-none";

/// Pinned version of bpf-linker: the compiler passes it options that vary by version.
pub(crate) const LINKER_VERSION: &str = "0.13.0";

/// Debian packages: the compiler, `core` for BPF (compiled and as source), and the LLVM of that
/// compiler for the linker.
pub(crate) const PACKAGES: [&str; 5] =
    ["rustc-web", "cargo-web", "rust-web-src", "libstd-rust-web-dev-bpf", "llvm-22-dev"];

/// LLVM version of those packages.
pub(crate) const DEBIAN_LLVM: u32 = 22;

/// Both recipes, for error messages.
pub(crate) const RECIPES: &str = "\
building the eBPF programs takes one of
  (a) rustup toolchain install nightly --component rust-src && cargo install bpf-linker
  (b) on Debian or Ubuntu: apt-get install rustc-web cargo-web rust-web-src libstd-rust-web-dev-bpf llvm-22-dev
then run `cargo xtask setup` again";

/// A compiler and a linker that fit together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Toolchain {
    /// The compiler.
    pub(crate) compiler: Compiler,
    /// Path of bpf-linker.
    pub(crate) linker: PathBuf,
}

/// Compilers that can build for BPF.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Compiler {
    /// rustup's nightly, which builds `core` from `rust-src`.
    Nightly,
    /// Debian's `rustc-web`.
    Debian {
        /// Whether `core` for BPF is installed compiled; otherwise it is built from source.
        prebuilt_core: bool,
    },
}

/// What was found on this machine.
#[derive(Debug, Clone, Default)]
pub(crate) struct ToolchainFacts {
    /// Major LLVM version of rustup's nightly, if that has the source of `core`.
    pub(crate) nightly_llvm: Option<u32>,
    /// A bpf-linker the user installed.
    pub(crate) user_linker: Option<PathBuf>,
    /// The bpf-linker that `setup` built earlier, if it has the pinned version.
    pub(crate) own_linker: Option<PathBuf>,
    /// Major versions of the LLVMs with headers under /usr/lib.
    pub(crate) llvm_dev: Vec<u32>,
    /// Whether this is a Debian-like system, with dpkg and apt-get.
    pub(crate) debian: bool,
    /// Packages of [`PACKAGES`] that are not installed.
    pub(crate) missing: Vec<&'static str>,
}

/// The next step of `setup`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum SetupStep {
    /// Nothing is missing.
    Ready(Toolchain),
    /// Build bpf-linker against this LLVM version.
    Linker(u32),
    /// Install these packages, then plan again.
    Packages(Vec<&'static str>),
    /// Neither recipe works on this machine.
    Impossible,
}

/// Plans the next step. Checks come in order of preference.
pub(crate) fn plan(facts: &ToolchainFacts) -> SetupStep {
    if let Some(llvm) = facts.nightly_llvm {
        if let Some(linker) = facts.user_linker.as_ref().or(facts.own_linker.as_ref()) {
            return SetupStep::Ready(Toolchain { compiler: Compiler::Nightly, linker: linker.clone() });
        }
        if facts.llvm_dev.contains(&llvm) {
            return SetupStep::Linker(llvm);
        }
    }
    if !facts.debian {
        return SetupStep::Impossible;
    }
    if !facts.missing.is_empty() {
        return SetupStep::Packages(facts.missing.clone());
    }
    match &facts.own_linker {
        Some(linker) => {
            let compiler = Compiler::Debian { prebuilt_core: debian_core() };
            SetupStep::Ready(Toolchain { compiler, linker: linker.clone() })
        }
        None => SetupStep::Linker(DEBIAN_LLVM),
    }
}

/// Gathers the facts about this machine.
pub(crate) fn facts(checkout: &Checkout) -> ToolchainFacts {
    let debian = in_path("apt-get").is_some() && in_path("dpkg-query").is_some();
    ToolchainFacts {
        nightly_llvm: nightly_llvm(),
        user_linker: in_path("bpf-linker").or_else(cargo_home_linker),
        own_linker: Some(checkout.tool("bpf-linker")).filter(|linker| is_pinned(linker)),
        llvm_dev: (21..40).filter(|n| llvm_prefix(*n).join("include/llvm-c").is_dir()).collect(),
        debian,
        missing: if debian { missing(&PACKAGES) } else { Vec::new() },
    }
}

/// The toolchain; fails with instructions if it is not complete.
pub(crate) fn find(checkout: &Checkout) -> Result<Toolchain> {
    match plan(&facts(checkout)) {
        SetupStep::Ready(toolchain) => Ok(toolchain),
        SetupStep::Linker(_) | SetupStep::Packages(_) => {
            bail!("the eBPF toolchain is incomplete: run `cargo xtask setup`")
        }
        SetupStep::Impossible => bail!("no eBPF toolchain here: {RECIPES}"),
    }
}

/// Where Debian installs an LLVM version.
pub(crate) fn llvm_prefix(major: u32) -> PathBuf {
    PathBuf::from(format!("/usr/lib/llvm-{major}"))
}

/// Which of these Debian packages are not installed.
pub(crate) fn missing(packages: &[&'static str]) -> Vec<&'static str> {
    packages.iter().copied().filter(|package| !installed(package)).collect()
}

impl Toolchain {
    /// A command for the cargo of this compiler.
    pub(crate) fn cargo(&self, checkout: &Checkout) -> Command {
        let mut command = match self.compiler {
            Compiler::Nightly => {
                let mut command = Command::new("rustup");
                command.args(["run", "nightly", "cargo"]).env_remove("RUSTC");
                command
            }
            Compiler::Debian { .. } => {
                let mut command = Command::new("/usr/bin/cargo");
                command.env("RUSTC", "/usr/bin/rustc");
                command
            }
        };
        // settings of the outer cargo and rustup would redirect the inner one
        for name in ["RUSTUP_TOOLCHAIN", "CARGO", "RUSTC_WRAPPER", "RUSTC_WORKSPACE_WRAPPER", "RUSTFLAGS"] {
            command.env_remove(name);
        }
        command.current_dir(&checkout.root);
        command
    }

    /// Whether `core` has to be built from source.
    pub(crate) fn builds_core(&self) -> bool {
        match self.compiler {
            Compiler::Nightly => true,
            Compiler::Debian { prebuilt_core } => !prebuilt_core,
        }
    }

    /// Compiler and linker in one line, for people.
    pub(crate) fn shown(&self) -> String {
        let compiler = match self.compiler {
            Compiler::Nightly => "rustup's nightly with rust-src",
            Compiler::Debian { .. } => "Debian's rustc-web",
        };
        format!("{compiler}, {}", self.linker.display())
    }
}

fn nightly_llvm() -> Option<u32> {
    in_path("rustup")?;
    let mut sysroot = Command::new("rustup");
    let sysroot = output(sysroot.args(["run", "nightly", "rustc", "--print", "sysroot"])).ok()?;
    if !Path::new(sysroot.trim()).join("lib/rustlib/src/rust/library").is_dir() {
        return None;
    }
    let mut version = Command::new("rustup");
    llvm_major(&output(version.args(["run", "nightly", "rustc", "-vV"])).ok()?)
}

fn llvm_major(verbose_version: &str) -> Option<u32> {
    let version = verbose_version.lines().find_map(|line| line.strip_prefix("LLVM version: "))?;
    version.split('.').next()?.parse().ok()
}

fn cargo_home_linker() -> Option<PathBuf> {
    let home = match std::env::var_os("CARGO_HOME") {
        Some(home) => PathBuf::from(home),
        None => PathBuf::from(std::env::var_os("HOME")?).join(".cargo"),
    };
    Some(home.join("bin/bpf-linker")).filter(|linker| linker.is_file())
}

fn is_pinned(linker: &Path) -> bool {
    linker.is_file()
        && output(Command::new(linker).arg("--version")).is_ok_and(|version| version.trim().ends_with(LINKER_VERSION))
}

fn debian_core() -> bool {
    let Ok(sysroot) = output(Command::new("/usr/bin/rustc").args(["--print", "sysroot"])) else {
        return false;
    };
    let lib = Path::new(sysroot.trim()).join("lib/rustlib").join(BPF_TARGET).join("lib");
    std::fs::read_dir(lib).is_ok_and(|mut entries| {
        entries.any(|entry| entry.is_ok_and(|entry| entry.file_name().to_string_lossy().starts_with("libcore-")))
    })
}

fn installed(package: &str) -> bool {
    let mut query = Command::new("dpkg-query");
    output(query.args(["--show", "--showformat=${db:Status-Status}", package])).is_ok_and(|s| s.trim() == "installed")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn linker() -> Option<PathBuf> {
        Some(PathBuf::from("/somewhere/bpf-linker"))
    }

    #[test]
    fn nightly_with_source_and_a_linker_is_preferred() {
        let facts =
            ToolchainFacts { nightly_llvm: Some(22), user_linker: linker(), debian: true, ..ToolchainFacts::default() };
        let SetupStep::Ready(toolchain) = plan(&facts) else { panic!("not ready") };
        assert_eq!(toolchain.compiler, Compiler::Nightly);
        assert!(toolchain.builds_core());
    }

    #[test]
    fn nightly_without_a_linker_builds_one_against_its_own_llvm() {
        let facts = ToolchainFacts { nightly_llvm: Some(23), llvm_dev: vec![22, 23], ..ToolchainFacts::default() };
        assert_eq!(plan(&facts), SetupStep::Linker(23));
    }

    #[test]
    fn a_linker_of_unknown_llvm_is_not_trusted_with_debians_compiler() {
        let facts = ToolchainFacts { user_linker: linker(), debian: true, ..ToolchainFacts::default() };
        assert_eq!(plan(&facts), SetupStep::Linker(DEBIAN_LLVM));
    }

    #[test]
    fn debian_installs_only_what_is_missing() {
        let facts = ToolchainFacts { debian: true, missing: vec!["llvm-22-dev"], ..ToolchainFacts::default() };
        assert_eq!(plan(&facts), SetupStep::Packages(vec!["llvm-22-dev"]));
    }

    #[test]
    fn nothing_to_build_with_is_said() {
        assert_eq!(plan(&ToolchainFacts::default()), SetupStep::Impossible);
        assert_eq!(
            plan(&ToolchainFacts { nightly_llvm: Some(22), ..ToolchainFacts::default() }),
            SetupStep::Impossible
        );
    }

    #[test]
    fn llvm_version_is_read_off_the_compiler() {
        assert_eq!(llvm_major("rustc 1.97.0-nightly\nhost: x\nLLVM version: 22.1.8\n"), Some(22));
        assert_eq!(llvm_major("rustc 1.97.0-nightly\n"), None);
    }
}
