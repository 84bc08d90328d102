//! The workloads with known truth: how each is built, as it would be shipped, and how it is run.
//! Sources are beside this crate, in tests/truth/LANGUAGE.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use memtrace_harness::checkout::{Checkout, in_path};
use memtrace_harness::run::{cargo, run as run_command};

/// A workload.
pub(crate) struct Workload {
    /// Name on the command line and in the table.
    pub(crate) name: &'static str,
    /// How it is built and shipped, in words.
    pub(crate) shipped: &'static str,
    /// Whether it is compiled ahead of time. If so, its stacks must reach the outermost frame.
    pub(crate) native: bool,
    /// Environment variables for the run.
    pub(crate) env: &'static [(&'static str, &'static str)],
    build: fn(&WorkloadBuilder) -> Result<()>,
    command: fn(&WorkloadBuilder) -> Result<Vec<PathBuf>>,
}

/// All workloads, in the order of the table.
pub(crate) const WORKLOADS: [Workload; 17] = [
    native("nested", "gcc -O2", |builder| builder.gcc("nested", &[]), |builder| builder.program("nested")),
    native("phases", "gcc -O2", |builder| builder.gcc("phases", &[]), |builder| builder.program("phases")),
    native("recursive", "gcc -O2", |builder| builder.gcc("recursive", &[]), |builder| builder.program("recursive")),
    native(
        "reading",
        "gcc -O2 -g, stripped, debug file beside it",
        |builder| builder.gcc("reading", &["-g"]).and_then(|()| builder.split("reading")),
        |builder| builder.program("reading"),
    ),
    native("threads", "gcc -O2", |builder| builder.gcc("threads", &["-pthread"]), |builder| builder.program("threads")),
    native("huge", "gcc -O2", |builder| builder.gcc("huge", &[]), |builder| builder.program("huge")),
    native(
        "library",
        "gcc -O2; the library -g, stripped, debug file beside it",
        |builder| {
            builder.gcc("loader", &["-ldl"])?;
            builder.compile("gcc", "c/library.c", "library.so", &["-shared", "-fPIC", "-g"])?;
            builder.split("library.so")
        },
        |builder| Ok(vec![builder.out.join("loader"), builder.out.join("library.so")]),
    ),
    native(
        "musl",
        "musl-gcc -static -O2",
        |builder| builder.compile("musl-gcc", "c/nested.c", "musl", &["-static"]),
        |builder| builder.program("musl"),
    ),
    native(
        "exceptions",
        "g++ -O2",
        |builder| builder.compile("g++", "cpp/exceptions.cc", "exceptions", &[]),
        |builder| builder.program("exceptions"),
    ),
    native(
        "rust_system",
        "cargo --release",
        |builder| builder.rust("release"),
        |builder| Ok(vec![builder.rust_bin("system")]),
    ),
    native(
        "jemalloc",
        "cargo --release",
        |builder| builder.rust("release"),
        |builder| Ok(vec![builder.rust_bin("jemalloc")]),
    ),
    Workload {
        // With huge pages, the function that touches a byte is not the one that made it resident;
        // that is whichever touched the 2 MiB first. The workload `huge` knows the truth about
        // that.
        env: &[("MIMALLOC_ALLOW_THP", "0")],
        ..native(
            "mimalloc",
            "cargo --release",
            |builder| builder.rust("release"),
            |builder| Ok(vec![builder.rust_bin("mimalloc")]),
        )
    },
    native(
        "generic",
        "cargo, release with line tables",
        |builder| builder.rust("lines"),
        |builder| Ok(vec![builder.rust_dir().join("lines/generic")]),
    ),
    native(
        "split",
        "cargo, release with line tables, stripped, debug file beside it",
        |builder| {
            builder.rust("lines")?;
            let (from, to) = (builder.rust_dir().join("lines/split"), builder.out.join("split"));
            std::fs::copy(&from, &to).with_context(|| format!("failed to copy {}", from.display()))?;
            builder.split("split")
        },
        |builder| builder.program("split"),
    ),
    Workload {
        native: false,
        ..native(
            "python",
            "Debian's python3; the ctypes library gcc -O2",
            |builder| builder.compile("gcc", "python/native.c", "native.so", &["-shared", "-fPIC"]),
            |builder| Ok(vec![python()?, builder.source.join("python/touching.py"), builder.out.join("native.so")]),
        )
    },
    Workload {
        native: false,
        ..native(
            "node",
            "node --perf-basic-prof --interpreted-frames-native-stack",
            |_| Ok(()),
            |builder| {
                let node = in_path("node").context("no node in PATH")?;
                let flags = ["--perf-basic-prof", "--interpreted-frames-native-stack"].map(PathBuf::from);
                Ok([vec![node], flags.to_vec(), vec![builder.source.join("node/touching.js")]].concat())
            },
        )
    },
    native("go", "go build", |builder| builder.go(), |builder| builder.program("touching-go")),
];

const fn native(
    name: &'static str,
    shipped: &'static str,
    build: fn(&WorkloadBuilder) -> Result<()>,
    command: fn(&WorkloadBuilder) -> Result<Vec<PathBuf>>,
) -> Workload {
    Workload { name, shipped, native: true, env: &[], build, command }
}

impl Workload {
    /// Builds it.
    pub(crate) fn build(&self, builder: &WorkloadBuilder) -> Result<()> {
        (self.build)(builder).with_context(|| format!("failed to build the workload {}", self.name))
    }

    /// The program and its arguments.
    pub(crate) fn command(&self, builder: &WorkloadBuilder) -> Result<Vec<PathBuf>> {
        (self.command)(builder)
    }
}

/// Builds the workloads.
pub(crate) struct WorkloadBuilder<'a> {
    checkout: &'a Checkout,
    source: PathBuf,
    /// Directory of the built programs: `target/truth`.
    pub(crate) out: PathBuf,
}

impl<'a> WorkloadBuilder<'a> {
    pub(crate) fn open(checkout: &'a Checkout) -> Result<Self> {
        let builder = Self { checkout, source: checkout.root.join("tests/truth"), out: checkout.target.join("truth") };
        let debug = builder.out.join(".debug");
        std::fs::create_dir_all(&debug).with_context(|| format!("failed to create {}", debug.display()))?;
        Ok(builder)
    }

    fn program(&self, name: &str) -> Result<Vec<PathBuf>> {
        Ok(vec![self.out.join(name)])
    }

    fn gcc(&self, name: &str, more: &[&str]) -> Result<()> {
        self.compile("gcc", &format!("c/{name}.c"), name, more)
    }

    /// Compiles as distributions do: optimized, default frame pointers.
    fn compile(&self, compiler: &str, source: &str, to: &str, more: &[&str]) -> Result<()> {
        let mut command = Command::new(compiler);
        command.arg("-O2").arg("-o").arg(self.out.join(to)).arg(self.source.join(source)).args(more);
        run_command(&mut command)
    }

    /// Moves debug information and symbols into `.debug/NAME.debug`.
    fn split(&self, name: &str) -> Result<()> {
        let (program, debug) = (self.out.join(name), self.out.join(".debug").join(format!("{name}.debug")));
        run_command(Command::new("objcopy").arg("--only-keep-debug").arg(&program).arg(&debug))?;
        run_command(Command::new("strip").arg("--strip-all").arg(&program))?;
        run_command(Command::new("objcopy").arg(link_to(&debug)).arg(&program))
    }

    fn rust_dir(&self) -> PathBuf {
        self.out.join("rust")
    }

    fn rust_bin(&self, name: &str) -> PathBuf {
        self.rust_dir().join("release").join(name)
    }

    fn rust(&self, profile: &str) -> Result<()> {
        let mut build = cargo(self.checkout);
        build.args(["build", "--locked", "--bins", "--profile", profile, "--manifest-path"]);
        build.arg(self.source.join("rust/Cargo.toml")).arg("--target-dir").arg(self.rust_dir());
        // as shipped: with the profile's own flags only
        build.env_remove("RUSTFLAGS").env_remove("CARGO_ENCODED_RUSTFLAGS");
        run_command(&mut build)
    }

    fn go(&self) -> Result<()> {
        let mut build = Command::new("go");
        build.args(["build", "-o"]).arg(self.out.join("touching-go")).arg(self.source.join("go/touching.go"));
        build.env("GOCACHE", self.out.join("go-cache")).env("GOTOOLCHAIN", "local").env("GOPROXY", "off");
        run_command(&mut build)
    }
}

fn link_to(debug: &Path) -> std::ffi::OsString {
    let mut argument = std::ffi::OsString::from("--add-gnu-debuglink=");
    argument.push(debug);
    argument
}

/// The distribution's python before any other in PATH: it is the one that ships.
fn python() -> Result<PathBuf> {
    let own = PathBuf::from("/usr/bin/python3");
    if own.is_file() { Ok(own) } else { in_path("python3").context("no python3 in PATH") }
}
