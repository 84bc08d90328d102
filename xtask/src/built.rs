//! What cargo built of the workspace: programs and test executables, from one build, so that nothing is compiled twice
//! with other features.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::build::OBJECT_VARIABLE;
use crate::place::{Place, Profile};
use crate::run::{cargo, say, shown};

/// Every member but the eBPF programs, which only compile for the BPF target.
pub(crate) const USERSPACE: [&str; 3] = ["--workspace", "--exclude", "memtrace-ebpf"];

/// The package of black-box tests, by its directory.
pub(crate) const TESTS_DIR: &str = "tests";

/// What one build made.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct Built {
    /// Programs by name.
    programs: BTreeMap<String, PathBuf>,
    /// Test executables.
    pub(crate) tests: Vec<TestExecutable>,
}

/// An executable of tests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct TestExecutable {
    /// The package's directory, in which cargo runs its tests.
    pub(crate) dir: PathBuf,
    /// Of a test target its name; of unit tests that of the library or program.
    pub(crate) name: String,
    /// A test target, as against unit tests.
    pub(crate) is_target: bool,
    /// The file.
    pub(crate) path: PathBuf,
}

impl TestExecutable {
    /// Whether it is of the package of black-box tests.
    pub(crate) fn is_black_box(&self) -> bool {
        self.is_target && self.is_of(TESTS_DIR)
    }

    /// Whether it is of the package in that directory.
    pub(crate) fn is_of(&self, dir: &str) -> bool {
        self.dir.file_name().is_some_and(|name| name == dir)
    }
}

impl Built {
    /// Builds programs and tests.
    pub(crate) fn with_tests(place: &Place, profile: Profile, object: &Path) -> Result<Self> {
        Self::make(place, profile, object, &[&["test", "--no-run"], USERSPACE.as_slice()].concat())
    }

    /// Builds the agent and the programs of the tests alone.
    pub(crate) fn programs(place: &Place, profile: Profile, object: &Path) -> Result<Self> {
        Self::make(place, profile, object, &["build", "--bins", "--package", "memtrace", "--package", "memtrace-tests"])
    }

    fn make(place: &Place, profile: Profile, object: &Path, how: &[&str]) -> Result<Self> {
        let mut build = cargo(place);
        build.args(how).args(profile.args()).env(OBJECT_VARIABLE, object);
        build.arg("--message-format=json-render-diagnostics");
        say(format_args!("running {}", shown(&build)));
        let output = build.stderr(Stdio::inherit()).output().context("failed to start cargo")?;
        if !output.status.success() {
            bail!("{} ended with {}", shown(&build), output.status);
        }
        Ok(Self::read(&String::from_utf8_lossy(&output.stdout)))
    }

    /// Reads cargo's messages.
    fn read(messages: &str) -> Self {
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
                (_, true) => built.tests.push(TestExecutable {
                    dir: Path::new(manifest).parent().unwrap_or(Path::new("/")).to_path_buf(),
                    name: name.to_owned(),
                    is_target: kind == "test",
                    path: path.into(),
                }),
                _ => {}
            }
        }
        built.tests.sort_by(|a, b| (&a.dir, a.is_target, &a.name).cmp(&(&b.dir, b.is_target, &b.name)));
        built
    }

    /// A program that has to be there.
    pub(crate) fn program(&self, name: &str) -> Result<&Path> {
        self.programs.get(name).map(PathBuf::as_path).with_context(|| format!("cargo built no program {name}"))
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) const MESSAGES: &str = r#"{"target":{"kind":["bin"],"name":"workload"},"manifest_path":"/r/tests/Cargo.toml","profile":{"test":false},"executable":"/t/workload"}
{"target":{"kind":["bin"],"name":"workload"},"manifest_path":"/r/tests/Cargo.toml","profile":{"test":true},"executable":"/t/deps/workload-1"}
{"target":{"kind":["test"],"name":"kernel_kills"},"manifest_path":"/r/tests/Cargo.toml","profile":{"test":true},"executable":"/t/deps/kernel_kills-2"}
{"target":{"kind":["test"],"name":"kernel_record"},"manifest_path":"/r/tests/Cargo.toml","profile":{"test":true},"executable":"/t/deps/kernel_record-2"}
{"target":{"kind":["test"],"name":"cli"},"manifest_path":"/r/tests/Cargo.toml","profile":{"test":true},"executable":"/t/deps/cli-2"}
{"target":{"kind":["lib"],"name":"memtrace"},"manifest_path":"/r/memtrace/Cargo.toml","profile":{"test":true},"executable":"/t/deps/memtrace-3"}
{"target":{"kind":["lib"],"name":"x"},"manifest_path":"/r/x/Cargo.toml","profile":{"test":false},"executable":null}
not json"#;

    /// What those messages are about.
    pub(crate) fn built() -> Built {
        Built::read(MESSAGES)
    }

    #[test]
    fn programs_and_tests_are_told_apart() {
        let built = built();
        assert_eq!(built.program("workload").unwrap(), Path::new("/t/workload"));
        assert!(built.program("guest").unwrap_err().to_string().contains("guest"));
        let named = |wanted: &dyn Fn(&TestExecutable) -> bool| {
            built.tests.iter().filter(|test| wanted(test)).map(|test| test.name.as_str()).collect::<Vec<_>>()
        };
        assert_eq!(named(&TestExecutable::is_black_box), ["cli", "kernel_kills", "kernel_record"]);
        assert_eq!(named(&|test| !test.is_target), ["memtrace", "workload"]);
        assert_eq!(named(&|test| test.is_of("memtrace")), ["memtrace"]);
    }
}
