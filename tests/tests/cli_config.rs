//! The configuration of the agent: `--print-config`, the file, the order of sources, and what is said about wrong values.
//! Nothing is started, so no root.

use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use anyhow::{Context, ensure};
use memtrace_tests::programs;

const NOBODY: u32 = 65_534;

/// `memtrace agent` with these arguments, without root whoever runs the test.
fn agent(file: Option<&Path>, arguments: &[&str]) -> anyhow::Result<Output> {
    let mut command: Command = programs::memtrace_command()?;
    command.arg("agent").args(arguments).stdin(Stdio::null());
    if let Some(file) = file {
        command.arg("--config").arg(file);
    }
    if rustix::process::geteuid().is_root() {
        command.uid(NOBODY).gid(NOBODY);
    }
    command.output().context("failed to run memtrace agent")
}

/// What `--print-config` prints.
fn printed(file: Option<&Path>, arguments: &[&str]) -> anyhow::Result<String> {
    let output = agent(file, &[arguments, &["--print-config"]].concat())?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success() && said.is_empty(), "{arguments:?} ended with {}:\n{said}", output.status);
    Ok(String::from_utf8(output.stdout)?)
}

/// It is a usage error, and stderr has each of `words`.
fn refuses(file: Option<&Path>, arguments: &[&str], words: &[&str]) -> anyhow::Result<()> {
    let output = agent(file, arguments)?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.code() == Some(2), "{arguments:?} ended with {}:\n{said}", output.status);
    for word in words {
        ensure!(said.contains(word), "{arguments:?} does not say {word:?}:\n{said}");
    }
    Ok(())
}

/// A directory that everybody can read.
fn open_dir() -> anyhow::Result<tempfile::TempDir> {
    let dir = tempfile::tempdir()?;
    std::fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o755))?;
    Ok(dir)
}

#[test]
fn the_printed_configuration_is_accepted_and_says_the_same() -> anyhow::Result<()> {
    let dir = open_dir()?;
    let file = dir.path().join("memtrace.toml");
    for arguments in [
        &[][..],
        &["--quantum", "64K", "--without", "map", "--without", "charge", "--listen", "off", "--no-spikes"],
        &["--state-dir", "/a b/\"c\"", "--max-processes", "1000", "--stack-budget", "0.5%", "--retain-age", "36h"],
    ] {
        let first = printed(None, arguments)?;
        std::fs::write(&file, &first)?;
        let second = printed(Some(&file), &[])?;
        ensure!(first == second, "{arguments:?} printed\n{first}\nand from that\n{second}");
    }
    Ok(())
}

#[test]
fn a_flag_wins_over_the_file_and_the_file_over_the_default() -> anyhow::Result<()> {
    let dir = open_dir()?;
    let file = dir.path().join("memtrace.toml");
    std::fs::write(&file, "quantum = \"1M\"\nbefore = \"5s\"\nwithout = [\"map\"]\nno_near_misses = true\n")?;
    let text = printed(Some(&file), &["--quantum", "128K"])?;
    for line in [
        "quantum = \"128K\"",
        "before = \"5s\"",
        "after = \"500ms\"",
        "without = [\"map\"]",
        "no_near_misses = true",
        "# no_spikes = false",
        "# btf = \"\"",
        "state_dir = \"/var/lib/memtrace\"",
    ] {
        ensure!(text.lines().any(|printed| printed == line), "{line} is not in\n{text}");
    }
    Ok(())
}

#[test]
fn a_value_out_of_bounds_names_the_flag_or_the_file_and_the_key() -> anyhow::Result<()> {
    let dir = open_dir()?;
    let file = dir.path().join("memtrace.toml");
    for (key, value, bounds) in [
        ("before", "\"601s\"", "at most 10m"),
        ("after", "\"11m\"", "at most 10m"),
        ("max_processes", "32769", "1 to 32768"),
        ("quantum", "\"1\"", "to 1G"),
        ("sample", "\"2G\"", "to 1G"),
        ("samples_ring", "\"3M\"", "a power of two from "),
        ("journal_size", "\"1K\"", "at least 1M"),
        ("stack_budget", "\"101%\"", "0 to 100"),
    ] {
        std::fs::write(&file, format!("{key} = {value}\n"))?;
        for print in [&[][..], &["--print-config"]] {
            refuses(Some(&file), print, &[&format!("memtrace.toml: {key}: `{}`", value.trim_matches('"')), bounds])?;
        }
        let flag = format!("--{}", key.replace('_', "-"));
        refuses(None, &[&flag, value.trim_matches('"')], &[&format!("'{flag} <"), bounds])?;
    }
    std::fs::write(&file, "without = [\"oom\"]\n")?;
    refuses(Some(&file), &[], &["memtrace.toml: without: ", "oom"])?;
    refuses(None, &["--without", "oom"], &["--without: ", "oom"])?;
    refuses(None, &["--listen", "nowhere"], &["'--listen <ADDR>'", "nowhere", "127.0.0.1:9469"])
}

#[test]
fn a_file_that_is_wrong_is_named_with_what_to_do() -> anyhow::Result<()> {
    let dir = open_dir()?;
    let file = dir.path().join("memtrace.toml");
    for (content, words) in [
        ("no_such_key = 1\n", ["memtrace.toml: unknown key `no_such_key`", "--print-config"]),
        ("state-dir = \"/x\"\n", ["memtrace.toml: unknown key `state-dir`", "write `state_dir`"]),
        ("before = 5\n", ["memtrace.toml: before: ", "\"30s\""]),
        ("[agent]\nbefore = \"5s\"\n", ["memtrace.toml: unknown key `agent`", "--print-config"]),
        ("this is not = = toml\n", ["memtrace.toml: not TOML", "line 1"]),
    ] {
        std::fs::write(&file, content)?;
        refuses(Some(&file), &[], &words)?;
    }
    let output = agent(Some(&dir.path().join("absent.toml")), &["--print-config"])?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.code() == Some(1) && said.contains("absent.toml"), "{}:\n{said}", output.status);
    Ok(())
}

#[test]
fn every_setting_is_in_the_help_the_printed_file_and_the_documentation() -> anyhow::Result<()> {
    let flags = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/flags.md");
    let help = String::from_utf8(agent(None, &["--help"])?.stdout)?;
    let text = printed(None, &[])?;
    // Where the sources are not beside the test, as in an emulated machine, there is no documentation.
    let documented = std::fs::read_to_string(flags).ok();
    let keys: Vec<&str> = text
        .lines()
        .filter_map(|line| line.trim_start_matches("# ").split_once(" = ")?.0.into())
        .filter(|key| key.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_'))
        .collect();
    ensure!(keys.len() == 22, "{keys:?}");
    for key in keys {
        let flag = format!("--{}", key.replace('_', "-"));
        ensure!(help.contains(&flag), "{flag} is not in the help:\n{help}");
        if let Some(documented) = &documented {
            let row = format!("| `{key}` |");
            ensure!(documented.contains(&flag) && documented.contains(&row), "{flag} or {row} is not documented");
        }
    }
    Ok(())
}
