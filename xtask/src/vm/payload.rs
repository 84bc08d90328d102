//! What goes into the machines: one archive for all of them, unpacked by the kernel into its memory at boot.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use cpio::newc::{Builder, ModeFileType, trailer};
use serde_json::Value;

use super::kernels::Ready;
use crate::place::{Place, Profile};
use crate::run::{cargo, output, say, shown};

/// Test targets that run in the machines, by the start of their names.
const TARGETS: [&str; 2] = ["kernel_", "vm_"];

/// Those that do not, and why.
pub(crate) const LEFT_OUT: [(&str, &str); 6] = [
    ("kernel_bad_input", "flags and files, which are the same on every kernel"),
    ("kernel_container", "runs runc, which needs a userland"),
    ("kernel_crash", "recovery is userspace's own, and is measured against a real disk"),
    ("kernel_paths", "builds its programs with gcc, and the machines have no userland"),
    ("kernel_stack_budget", "holds processor time against a budget, which emulated processors have no measure for"),
    ("kernel_record", "records gcc and python3, and the machines have no userland"),
];

/// A file of the archive: where it goes, where it is, its permissions.
struct Entry {
    to: String,
    from: PathBuf,
    mode: u32,
}

/// Makes the archive `dir/initramfs.cpio` of the agent, what was built of the tests, these kernels' modules, and programs
/// of this machine, which have the same place there.
pub(crate) fn pack(
    place: &Place,
    agent: &Path,
    built: &Built,
    dir: &Path,
    kernels: &[&Ready],
    borrowed: &[&str],
) -> Result<PathBuf> {
    let stage = dir.join("stage");
    std::fs::create_dir_all(&stage).with_context(|| format!("failed to create {}", stage.display()))?;

    let mut programs = vec![("memtrace/memtrace".to_owned(), agent.to_path_buf())];
    for (name, path) in &built.programs {
        let to = if name == "guest" { "init".to_owned() } else { format!("memtrace/{name}") };
        programs.push((to, path.clone()));
    }
    programs.extend(borrowed.iter().map(|from| (from.trim_start_matches('/').to_owned(), PathBuf::from(from))));
    programs.extend(built.tests.iter().map(|(name, path)| (format!("memtrace/tests/{name}"), path.clone())));

    let mut libraries = BTreeSet::new();
    let mut entries = Vec::new();
    for (to, from) in programs {
        let stripped = stage.join(to.replace('/', "-"));
        output(Command::new("strip").arg("--strip-debug").arg("-o").arg(&stripped).arg(&from))?;
        libraries.extend(libraries_of(&output(Command::new("ldd").arg(&from))?));
        entries.push(Entry { to, from: stripped, mode: 0o755 });
    }
    let shim = stage.join("verifier_log.so");
    let source = place.root.join("tests/src/verifier_log.c");
    output(Command::new("gcc").args(["-shared", "-fPIC", "-O2", "-o"]).arg(&shim).arg(&source).arg("-ldl"))?;
    entries.push(Entry { to: "memtrace/verifier_log.so".to_owned(), from: shim, mode: 0o755 });
    for library in libraries {
        entries.push(Entry { to: library.trim_start_matches('/').to_owned(), from: library.into(), mode: 0o755 });
    }
    for kernel in kernels {
        for module in &kernel.modules {
            let name = module.file_name().unwrap_or_default().to_string_lossy();
            let to = format!("modules/{}/{name}", kernel.release);
            entries.push(Entry { to, from: module.clone(), mode: 0o644 });
        }
    }
    let archive = dir.join("initramfs.cpio");
    write(&archive, &entries).with_context(|| format!("failed to write {}", archive.display()))?;
    let size = std::fs::metadata(&archive).map_or(0, |meta| meta.len());
    say(format_args!("initramfs: {} test executables, {} MiB", built.tests.len(), size >> 20));
    Ok(archive)
}

/// What cargo built of the tests' package.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Built {
    programs: BTreeMap<String, PathBuf>,
    tests: BTreeMap<String, PathBuf>,
}

impl Built {
    /// Builds all of it.
    pub(crate) fn with_tests(place: &Place, profile: Profile) -> Result<Self> {
        Self::make(place, profile, &["test", "--no-run"])
    }

    /// Builds the programs alone.
    pub(crate) fn programs(place: &Place, profile: Profile) -> Result<Self> {
        Self::make(place, profile, &["build", "--bins"])
    }

    fn make(place: &Place, profile: Profile, how: &[&str]) -> Result<Self> {
        let mut build = cargo(place);
        build.args(how).args(["--package", "memtrace-tests", "--message-format=json-render-diagnostics"]);
        build.args(profile.args());
        say(format_args!("running {}", shown(&build)));
        let output = build.stderr(Stdio::inherit()).output().context("failed to start cargo")?;
        if !output.status.success() {
            bail!("{} ended with {}", shown(&build), output.status);
        }
        let built = executables(&String::from_utf8_lossy(&output.stdout));
        for needed in ["bench", "guest", "oomcage", "workload"] {
            if !built.programs.contains_key(needed) {
                bail!("cargo built no program {needed} in memtrace-tests");
            }
        }
        Ok(built)
    }

    /// Whether a test for the machines has this in its name.
    pub(crate) fn has_test(&self, filter: &str) -> Result<bool> {
        for test in self.tests.values() {
            if output(Command::new(test).args(["--list", "--format=terse", filter]))?.contains(": test") {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

/// Reads cargo's messages: programs, and the test targets that are for the machines.
fn executables(messages: &str) -> Built {
    let mut built = Built::default();
    for message in messages.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok()) {
        let text = |pointer: &str| message.pointer(pointer).and_then(Value::as_str);
        let (Some(kind), Some(name), Some(path)) = (text("/target/kind/0"), text("/target/name"), text("/executable"))
        else {
            continue;
        };
        let harness = message.pointer("/profile/test").and_then(Value::as_bool) == Some(true);
        let ours = TARGETS.iter().any(|start| name.starts_with(start)) && LEFT_OUT.iter().all(|(out, _)| *out != name);
        match (kind, harness) {
            ("bin", false) => drop(built.programs.insert(name.to_owned(), path.into())),
            ("test", true) if ours => drop(built.tests.insert(name.to_owned(), path.into())),
            _ => {}
        }
    }
    built
}

/// The files a program needs to start, of what `ldd` says: `NAME => PATH (ADDRESS)`, `PATH (ADDRESS)`.
fn libraries_of(ldd: &str) -> Vec<String> {
    let path = |line: &str| {
        let line = line.trim();
        let path = line.split_once(" => ").map_or(line, |(_, path)| path).split(" (").next()?;
        path.starts_with('/').then(|| path.to_owned())
    };
    ldd.lines().filter_map(path).collect()
}

/// Directories first: the kernel makes none by itself.
fn write(archive: &Path, entries: &[Entry]) -> Result<()> {
    let mut out = BufWriter::new(File::create(archive)?);
    let mut directories = BTreeSet::new();
    for entry in entries {
        directories.extend(Path::new(&entry.to).ancestors().skip(1).filter(|dir| !dir.as_os_str().is_empty()));
    }
    let mut number = 0;
    let mut header = |name: &str, mode: u32, kind: ModeFileType| {
        number += 1;
        Builder::new(name).ino(number).mode(mode).nlink(1).set_mode_file_type(kind)
    };
    for dir in directories {
        let entry = header(&dir.to_string_lossy(), 0o755, ModeFileType::Directory).write(&mut out, 0);
        entry.finish()?;
    }
    for entry in entries {
        let bytes = std::fs::read(&entry.from).with_context(|| format!("failed to read {}", entry.from.display()))?;
        let size = u32::try_from(bytes.len()).with_context(|| format!("{} is too large", entry.from.display()))?;
        let mut file = header(&entry.to, entry.mode, ModeFileType::Regular).write(&mut out, size);
        file.write_all(&bytes)?;
        file.finish()?;
    }
    trailer(&mut out)?;
    out.flush()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_taken_by_the_start_of_their_name() {
        let messages = r#"{"reason":"compiler-artifact","target":{"kind":["bin"],"name":"workload"},"profile":{"test":false},"executable":"/t/workload"}
{"reason":"compiler-artifact","target":{"kind":["bin"],"name":"workload"},"profile":{"test":true},"executable":"/t/deps/workload-1"}
{"reason":"compiler-artifact","target":{"kind":["test"],"name":"kernel_kills"},"profile":{"test":true},"executable":"/t/deps/kernel_kills-2"}
{"reason":"compiler-artifact","target":{"kind":["test"],"name":"kernel_record"},"profile":{"test":true},"executable":"/t/deps/kernel_record-2"}
{"reason":"compiler-artifact","target":{"kind":["test"],"name":"cli"},"profile":{"test":true},"executable":"/t/deps/cli-2"}
{"reason":"compiler-artifact","target":{"kind":["lib"],"name":"x"},"profile":{"test":false},"executable":null}
not json"#;
        let built = executables(messages);
        assert_eq!(built.programs, BTreeMap::from([("workload".to_owned(), "/t/workload".into())]));
        assert_eq!(built.tests, BTreeMap::from([("kernel_kills".to_owned(), "/t/deps/kernel_kills-2".into())]));
    }

    #[test]
    fn libraries_are_those_with_a_file() {
        let said = "\tlinux-vdso.so.1 (0x00007f)\n\tlibc.so.6 => /lib/x/libc.so.6 (0x00007f)\n\t/lib64/ld.so.2 (0x0)\n";
        assert_eq!(libraries_of(said), ["/lib/x/libc.so.6", "/lib64/ld.so.2"]);
        assert!(libraries_of("\tstatically linked\n").is_empty());
    }
}
