//! The programs and test executables that one cargo build of the workspace produced. One build for
//! everything, so that nothing is compiled twice with different features.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::build::OBJECT_VARIABLE;
use crate::checkout::{Checkout, Profile};
use crate::run::{cargo, say, shown};

/// Cargo arguments for every member except the eBPF programs, which only compile for the BPF
/// target.
pub const USERSPACE: [&str; 3] = ["--workspace", "--exclude", "memtrace-ebpf"];

/// Directory of the package of black-box tests. The harness packages are in directories below it.
const TESTS_DIR: &str = "tests";

/// Packages whose programs the verbs run: the agent, the workloads, process 1 of a machine, the
/// benchmarks.
const PROGRAM_PACKAGES: [&str; 4] = ["memtrace", "memtrace-tests", "memtrace-guest", "memtrace-measure"];

/// Executables that one build produced.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Built {
    /// Paths by program name.
    programs: BTreeMap<String, PathBuf>,
    /// Sorted by package directory, unit tests before test targets, then by name.
    pub tests: Vec<TestExecutable>,
}

/// A test executable.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TestExecutable {
    /// Absolute directory of its package: cargo's working directory for its tests.
    pub dir: PathBuf,
    /// The same directory, relative to the repository.
    pub package: PathBuf,
    /// Name of the test target; for unit tests, name of the library or program.
    pub name: String,
    /// True for a test target (`tests/*.rs`), false for unit tests.
    pub is_target: bool,
    /// Path of the executable.
    pub path: PathBuf,
}

impl TestExecutable {
    /// Whether it is a test target of the black-box package.
    pub fn is_black_box(&self) -> bool {
        self.is_target && self.package == Path::new(TESTS_DIR)
    }

    /// Whether it holds unit tests of the black-box package or of a harness.
    pub fn is_of_harness(&self) -> bool {
        !self.is_black_box() && self.package.starts_with(TESTS_DIR)
    }
}

impl Built {
    /// Builds every userspace program and test; `object` is the eBPF object to embed.
    pub fn with_tests(checkout: &Checkout, profile: Profile, object: &Path) -> Result<Self> {
        Self::make(checkout, profile, object, &[&["test", "--no-run"], USERSPACE.as_slice()].concat())
    }

    /// Builds the agent and the programs that verbs run, without tests; `object` is the eBPF object
    /// to embed.
    pub fn programs(checkout: &Checkout, profile: Profile, object: &Path) -> Result<Self> {
        let packages = PROGRAM_PACKAGES.iter().flat_map(|package| ["--package", package]);
        Self::make(checkout, profile, object, &["build", "--bins"].into_iter().chain(packages).collect::<Vec<_>>())
    }

    fn make(checkout: &Checkout, profile: Profile, object: &Path, how: &[&str]) -> Result<Self> {
        let mut build = cargo(checkout);
        build.args(how).args(profile.args()).env(OBJECT_VARIABLE, object);
        build.arg("--message-format=json-render-diagnostics");
        say(format_args!("running {}", shown(&build)));
        let output = build.stderr(Stdio::inherit()).output().context("failed to start cargo")?;
        if !output.status.success() {
            bail!("{} ended with {}", shown(&build), output.status);
        }
        Ok(Self::read(&String::from_utf8_lossy(&output.stdout), &checkout.root))
    }

    /// Reads cargo's JSON messages, one a line, from a build of the repository at `root`. Other
    /// lines are ignored.
    pub fn read(messages: &str, root: &Path) -> Self {
        let mut built = Self::default();
        for message in messages.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok()) {
            let text = |pointer: &str| message.pointer(pointer).and_then(Value::as_str);
            let (Some(kind), Some(name), Some(path), Some(manifest)) =
                (text("/target/kind/0"), text("/target/name"), text("/executable"), text("/manifest_path"))
            else {
                continue;
            };
            let is_harness = message.pointer("/profile/test").and_then(Value::as_bool) == Some(true);
            match (kind, is_harness) {
                ("bin", false) => drop(built.programs.insert(name.to_owned(), path.into())),
                (_, true) => {
                    let dir = Path::new(manifest).parent().unwrap_or(Path::new("/"));
                    built.tests.push(TestExecutable {
                        dir: dir.to_path_buf(),
                        package: dir.strip_prefix(root).unwrap_or(dir).to_path_buf(),
                        name: name.to_owned(),
                        is_target: kind == "test",
                        path: path.into(),
                    });
                }
                _ => {}
            }
        }
        built.tests.sort_by(|a, b| (&a.dir, a.is_target, &a.name).cmp(&(&b.dir, b.is_target, &b.name)));
        built
    }

    /// Path of a program. Fails when the build did not produce it.
    pub fn program(&self, name: &str) -> Result<&Path> {
        self.programs.get(name).map(PathBuf::as_path).with_context(|| format!("cargo built no program {name}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MESSAGES: &str = r#"{"target":{"kind":["bin"],"name":"workload"},"manifest_path":"/r/tests/Cargo.toml","profile":{"test":false},"executable":"/t/workload"}
{"target":{"kind":["bin"],"name":"workload"},"manifest_path":"/r/tests/Cargo.toml","profile":{"test":true},"executable":"/t/deps/workload-1"}
{"target":{"kind":["bin"],"name":"bench"},"manifest_path":"/r/tests/bench/measure/Cargo.toml","profile":{"test":true},"executable":"/t/deps/bench-1"}
{"target":{"kind":["test"],"name":"kernel_kills"},"manifest_path":"/r/tests/Cargo.toml","profile":{"test":true},"executable":"/t/deps/kernel_kills-2"}
{"target":{"kind":["test"],"name":"kernel_record"},"manifest_path":"/r/tests/Cargo.toml","profile":{"test":true},"executable":"/t/deps/kernel_record-2"}
{"target":{"kind":["test"],"name":"cli"},"manifest_path":"/r/tests/Cargo.toml","profile":{"test":true},"executable":"/t/deps/cli-2"}
{"target":{"kind":["lib"],"name":"memtrace"},"manifest_path":"/r/memtrace/Cargo.toml","profile":{"test":true},"executable":"/t/deps/memtrace-3"}
{"target":{"kind":["lib"],"name":"x"},"manifest_path":"/r/x/Cargo.toml","profile":{"test":false},"executable":null}
not json"#;

    #[test]
    fn programs_and_tests_are_told_apart() {
        let built = Built::read(MESSAGES, Path::new("/r"));
        assert_eq!(built.program("workload").unwrap(), Path::new("/t/workload"));
        assert!(built.program("guest").unwrap_err().to_string().contains("guest"));
        let named = |wanted: &dyn Fn(&TestExecutable) -> bool| {
            built.tests.iter().filter(|test| wanted(test)).map(|test| test.name.as_str()).collect::<Vec<_>>()
        };
        assert_eq!(named(&TestExecutable::is_black_box), ["cli", "kernel_kills", "kernel_record"]);
        assert_eq!(named(&|test| !test.is_target), ["memtrace", "workload", "bench"]);
        assert_eq!(named(&TestExecutable::is_of_harness), ["workload", "bench"]);
    }
}
