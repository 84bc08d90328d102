//! The archive that machines boot with. One for all of them; the kernel unpacks it into memory at
//! boot.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use cpio::newc::{Builder, ModeFileType, trailer};

use super::kernels::BootableKernel;
use memtrace_harness::built::{Built, TestExecutable};
use memtrace_harness::checkout::Checkout;
use memtrace_harness::run::{output, say};

/// Prefixes of the test targets that run in machines.
const TARGETS: [&str; 2] = ["kernel_", "vm_"];

/// Test targets that do not although they match, and why.
pub(crate) const LEFT_OUT: [(&str, &str); 7] = [
    ("kernel_bad_input", "flags and files, which are the same on every kernel"),
    ("kernel_container", "runs runc, which needs a userland"),
    ("kernel_crash", "recovery is userspace's own, and is measured against a real disk"),
    ("kernel_paths", "builds its programs with gcc, and the machines have no userland"),
    ("kernel_many_cgroups", "the cap of cgroups is userspace's own, and thousands take long to make under emulation"),
    ("kernel_stack_budget", "holds processor time against a budget, which emulated processors have no measure for"),
    ("kernel_record", "records gcc and python3, and the machines have no userland"),
];

/// A file of the archive: path in the archive, path on the host, permission bits.
struct ArchiveEntry {
    to: String,
    from: PathBuf,
    mode: u32,
}

/// Programs that every machine has, and their paths there. The kernel starts `init`.
const PROGRAMS: [(&str, &str); 5] = [
    ("memtrace", "memtrace/memtrace"),
    ("bench", "memtrace/bench"),
    ("guest", "init"),
    ("oomcage", "memtrace/oomcage"),
    ("workload", "memtrace/workload"),
];

/// Test executables that run in machines.
pub(crate) fn tests(built: &Built) -> Vec<&TestExecutable> {
    let is_ours = |name: &str| {
        TARGETS.iter().any(|start| name.starts_with(start)) && LEFT_OUT.iter().all(|(out, _)| *out != name)
    };
    built.tests.iter().filter(|test| test.is_black_box() && is_ours(&test.name)).collect()
}

/// Whether the name of any test that runs in machines contains `filter`.
pub(crate) fn has_test(built: &Built, filter: &str) -> Result<bool> {
    for test in tests(built) {
        if output(Command::new(&test.path).args(["--list", "--format=terse", filter]))?.contains(": test") {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Makes the archive `dir/initramfs.cpio`: what was built, the modules of these kernels, and
/// programs `borrowed` from the host, at the paths they have there.
pub(crate) fn pack(
    checkout: &Checkout,
    built: &Built,
    dir: &Path,
    kernels: &[&BootableKernel],
    borrowed: &[&str],
) -> Result<PathBuf> {
    let stage = dir.join("stage");
    std::fs::create_dir_all(&stage).with_context(|| format!("failed to create {}", stage.display()))?;

    let mut programs = Vec::new();
    for (name, to) in PROGRAMS {
        programs.push((to.to_owned(), built.program(name)?.to_path_buf()));
    }
    programs.extend(borrowed.iter().map(|from| (from.trim_start_matches('/').to_owned(), PathBuf::from(from))));
    let tests = tests(built);
    programs.extend(tests.iter().map(|test| (format!("memtrace/tests/{}", test.name), test.path.clone())));

    let mut libraries = BTreeSet::new();
    let mut entries = Vec::new();
    for (to, from) in programs {
        let stripped = stage.join(to.replace('/', "-"));
        output(Command::new("strip").arg("--strip-debug").arg("-o").arg(&stripped).arg(&from))?;
        libraries.extend(libraries_of(&output(Command::new("ldd").arg(&from))?));
        entries.push(ArchiveEntry { to, from: stripped, mode: 0o755 });
    }
    let shim = stage.join("verifier_log.so");
    let source = checkout.root.join("tests/vm/verifier_log.c");
    output(Command::new("gcc").args(["-shared", "-fPIC", "-O2", "-o"]).arg(&shim).arg(&source).arg("-ldl"))?;
    entries.push(ArchiveEntry { to: "memtrace/verifier_log.so".to_owned(), from: shim, mode: 0o755 });
    for library in libraries {
        entries.push(ArchiveEntry {
            to: library.trim_start_matches('/').to_owned(),
            from: library.into(),
            mode: 0o755,
        });
    }
    for kernel in kernels {
        for module in &kernel.modules {
            let name = module.file_name().unwrap_or_default().to_string_lossy();
            let to = format!("modules/{}/{name}", kernel.release);
            entries.push(ArchiveEntry { to, from: module.clone(), mode: 0o644 });
        }
    }
    let archive = dir.join("initramfs.cpio");
    write(&archive, &entries).with_context(|| format!("failed to write {}", archive.display()))?;
    let size = std::fs::metadata(&archive).map_or(0, |meta| meta.len());
    say(format_args!("initramfs: {} test executables, {} MiB", tests.len(), size >> 20));
    Ok(archive)
}

/// Paths of the shared libraries that `ldd` lists as `NAME => PATH (ADDRESS)` or `PATH (ADDRESS)`.
fn libraries_of(ldd: &str) -> Vec<String> {
    let path = |line: &str| {
        let line = line.trim();
        let path = line.split_once(" => ").map_or(line, |(_, path)| path).split(" (").next()?;
        path.starts_with('/').then(|| path.to_owned())
    };
    ldd.lines().filter_map(path).collect()
}

/// Writes the archive. Directories first: the kernel does not create missing ones.
fn write(archive: &Path, entries: &[ArchiveEntry]) -> Result<()> {
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
        let message = |name: &str| {
            format!(
                r#"{{"target":{{"kind":["test"],"name":"{name}"}},"manifest_path":"/r/tests/Cargo.toml","profile":{{"test":true}},"executable":"/t/{name}"}}"#
            )
        };
        let messages = ["kernel_kills", "kernel_record", "cli"].map(message).join("\n");
        let built = Built::read(&messages, Path::new("/r"));
        let names: Vec<&str> = tests(&built).iter().map(|test| test.name.as_str()).collect();
        assert_eq!(names, ["kernel_kills"]);
    }

    #[test]
    fn libraries_are_those_with_a_file() {
        let said = "\tlinux-vdso.so.1 (0x00007f)\n\tlibc.so.6 => /lib/x/libc.so.6 (0x00007f)\n\t/lib64/ld.so.2 (0x0)\n";
        assert_eq!(libraries_of(said), ["/lib/x/libc.so.6", "/lib64/ld.so.2"]);
        assert!(libraries_of("\tstatically linked\n").is_empty());
    }
}
