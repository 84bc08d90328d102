//! Wrong arguments, missing privileges and broken incident files give an exit code and a sentence,
//! never a panic. No root.

#![allow(clippy::indexing_slicing, reason = "a panic is how a test fails")]

use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use anyhow::{Context, ensure};
use memtrace_tests::programs;
use memtrace_tests::sample;

const NOBODY: u32 = 65_534;
const VERBS: [&str; 8] = ["agent", "record", "incidents", "report", "replay", "doctor", "schema", "completions"];
const FORMATS: [&str; 4] = ["text", "json", "firefox", "html"];

/// Runs memtrace and checks what holds for all bad input: it ends by itself and does not panic.
fn run(mut command: Command) -> anyhow::Result<Output> {
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("failed to run {command:?}"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(!said.contains("panicked"), "{command:?} panicked:\n{said}");
    ensure!(output.status.code().is_some(), "{command:?} ended with {}:\n{said}", output.status);
    Ok(output)
}

fn memtrace(arguments: &[&str]) -> anyhow::Result<Command> {
    let mut command = programs::memtrace_command()?;
    command.args(arguments);
    Ok(command)
}

/// Checks that it ends with `code` and its stderr contains each of `words`.
fn refuses(command: Command, code: i32, words: &[&str]) -> anyhow::Result<()> {
    let shown = format!("{command:?}");
    let output = run(command)?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.code() == Some(code), "{shown} ended with {}, not {code}:\n{said}", output.status);
    for word in words {
        ensure!(said.contains(word), "{shown} does not say {word:?}:\n{said}");
    }
    Ok(())
}

/// Runs memtrace without root, whoever runs the test.
fn as_nobody(mut command: Command) -> Command {
    if rustix::process::geteuid().is_root() {
        command.uid(NOBODY).gid(NOBODY);
    }
    command
}

/// `report FILE --format json`.
fn report(file: &Path, format: &str) -> anyhow::Result<Command> {
    let mut command = memtrace(&["report"])?;
    command.arg(file).args(["--format", format]);
    Ok(command)
}

/// A zstd frame with a checksum, as `zstd` writes it.
fn packed(bytes: &[u8]) -> anyhow::Result<Vec<u8>> {
    let mut encoder = zstd::Encoder::new(Vec::new(), 3)?;
    encoder.include_checksum(true)?;
    encoder.write_all(bytes)?;
    Ok(encoder.finish()?)
}

#[test]
fn help_of_every_verb_succeeds() -> anyhow::Result<()> {
    for verb in VERBS {
        let output = run(memtrace(&[verb, "--help"])?)?;
        ensure!(output.status.success(), "{verb} --help: {}", output.status);
        ensure!(!output.stdout.is_empty(), "{verb} --help printed nothing");
    }
    Ok(())
}

#[test]
fn unknown_flags_and_verbs_are_usage_errors() -> anyhow::Result<()> {
    for verb in VERBS {
        refuses(memtrace(&[verb, "--no-such-flag"])?, 2, &["--no-such-flag"])?;
    }
    refuses(memtrace(&["report", "latest", "--format", "no-such-format"])?, 2, &["no-such-format", "json"])?;
    refuses(memtrace(&["no-such-verb"])?, 2, &["no-such-verb"])?;
    refuses(memtrace(&[])?, 2, &[])
}

#[test]
fn the_agent_without_root_says_what_to_do() -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    std::fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o777))?;
    let mut command = memtrace(&["agent", "--listen", "127.0.0.1:0", "--state-dir"])?;
    command.arg(dir.path().join("state")).arg("--journal-dir").arg(dir.path().join("journal"));
    let output = run(as_nobody(command))?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.code() == Some(3), "ended with {}:\n{said}", output.status);
    ensure!(said.contains("root") || said.contains("CAP_"), "does not say what to do:\n{said}");
    Ok(())
}

#[test]
fn an_incident_that_does_not_exist_fails_with_a_hint() -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let mut command = memtrace(&["report", "01J00000000000000000000000", "--state-dir"])?;
    command.arg(dir.path());
    refuses(command, 1, &["01J00000000000000000000000", "memtrace incidents"])?;
    refuses(report(&dir.path().join("absent.memtrace"), "text")?, 1, &["absent.memtrace"])
}

#[test]
fn a_sound_file_is_reported_in_every_format() -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let file = dir.path().join("sound.memtrace");
    std::fs::write(&file, packed(sample::incident().to_string().as_bytes())?)?;
    for format in FORMATS {
        let output = run(report(&file, format)?)?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{format}: {}:\n{said}", output.status);
        ensure!(!output.stdout.is_empty(), "{format}: nothing printed");
    }
    let output = run(report(&file, "json")?)?;
    let again: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    ensure!(again == sample::incident(), "the report as JSON differs from the file: {again}");
    Ok(())
}

#[test]
fn truncated_files_fail() -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let file = dir.path().join("cut.memtrace");
    let whole = packed(sample::incident().to_string().as_bytes())?;
    for length in [0, 1, 3, 4, 9, whole.len() / 3, whole.len() / 2, whole.len() - 5, whole.len() - 1] {
        std::fs::write(&file, &whole[..length])?;
        refuses(report(&file, "text")?, 1, &["cut.memtrace"]).with_context(|| format!("cut to {length} bytes"))?;
    }
    Ok(())
}

#[test]
fn flipped_bits_never_change_what_is_reported() -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let file = dir.path().join("flipped.memtrace");
    let whole = packed(sample::incident().to_string().as_bytes())?;
    std::fs::write(&file, &whole)?;
    let sound = run(report(&file, "json")?)?.stdout;
    for at in (0..whole.len()).step_by(whole.len().div_ceil(60)) {
        let mut flipped = whole.clone();
        flipped[at] ^= 1 << (at % 8);
        std::fs::write(&file, &flipped)?;
        let output = run(report(&file, "json")?)?;
        // some bits of the frame header are unused; if one is flipped, the content must be
        // unchanged
        let harmless = output.status.success() && output.stdout == sound;
        ensure!(output.status.code() == Some(1) || harmless, "bit flipped at {at}: {}", output.status);
    }
    Ok(())
}

#[test]
fn hostile_content_fails() -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let file = dir.path().join("hostile.memtrace");
    let mut future = sample::incident();
    future["schema"] = 4_000_000_000_u32.into();
    let mut negative = sample::incident();
    negative["cgroup"]["id"] = (-1).into();
    let mut typed = sample::incident();
    typed["timeline"] = "none".into();
    let id_of = |number: &str| negative.to_string().replace("\"id\":-1", &format!("\"id\":{number}")).into_bytes();
    ensure!(id_of("7") != id_of("8"), "the id is not where it is replaced");
    let contents: [(&str, Vec<u8>); 14] = [
        ("empty", Vec::new()),
        ("not JSON", b"memtrace".to_vec()),
        ("an array", b"[]".to_vec()),
        ("an empty object", b"{}".to_vec()),
        ("deep nesting", [vec![b'['; 200_000], vec![b']'; 200_000]].concat()),
        ("deep nesting in a key", [br#"{"schema":1,"losses":"#.to_vec(), vec![b'['; 200_000]].concat()),
        ("not UTF-8", vec![0xff; 64]),
        ("a future schema", future.to_string().into_bytes()),
        ("a negative id", id_of("-1")),
        ("no number", id_of("NaN")),
        ("infinity", id_of("Infinity")),
        ("a number beyond what fits", id_of("1e999")),
        ("a fraction", id_of("0.5")),
        ("a wrong type", typed.to_string().into_bytes()),
    ];
    for (name, content) in contents {
        std::fs::write(&file, packed(&content)?)?;
        for format in FORMATS {
            refuses(report(&file, format)?, 1, &["hostile.memtrace"]).with_context(|| format!("{name} as {format}"))?;
        }
        // the same without compression
        std::fs::write(&file, &content)?;
        refuses(report(&file, "text")?, 1, &["hostile.memtrace"]).with_context(|| format!("{name}, not packed"))?;
    }
    Ok(())
}

#[test]
fn columns_of_unequal_length_do_not_panic() -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let file = dir.path().join("uneven.memtrace");
    let mut uneven = sample::incident();
    uneven["timeline"]["columns"]["usage_bytes"] = serde_json::json!([1, null, u64::MAX]);
    uneven["timeline"]["columns"]["boot_ns"] = serde_json::json!([u64::MAX, 0]);
    uneven["at"]["boot_ns"] = u64::MAX.into();
    std::fs::write(&file, packed(uneven.to_string().as_bytes())?)?;
    for format in FORMATS {
        let output = run(report(&file, format)?)?;
        ensure!(matches!(output.status.code(), Some(0 | 1)), "{format}: {}", output.status);
    }
    Ok(())
}

#[test]
fn names_in_a_file_cannot_script_the_terminal() -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let file = dir.path().join("names.memtrace");
    let mut named = sample::incident();
    named["oom"]["victims"][0]["comm"] = "a\u{7}\u{9b}2J".into();
    named["cgroup"]["path"] = "/a\u{1b}[2J\r\u{202e}".into();
    named["verdict"]["summary"] = "\u{1b}]0;title\u{7}".into();
    std::fs::write(&file, packed(named.to_string().as_bytes())?)?;
    for format in FORMATS {
        let output = run(report(&file, format)?)?;
        ensure!(output.status.success() && !output.stdout.is_empty(), "{format}: {}", output.status);
        let text = String::from_utf8(output.stdout)?;
        let obeyed = text.chars().find(|c| (c.is_control() && *c != '\n') || *c == '\u{202e}');
        ensure!(obeyed.is_none(), "{format}: {obeyed:?} of the file reached the terminal");
    }
    Ok(())
}

#[test]
fn a_zip_bomb_fails_within_bounded_memory() -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let file = dir.path().join("bomb.memtrace");
    // Two gibibytes of spaces inside valid JSON: about 200 KiB.
    let mut encoder = zstd::Encoder::new(std::fs::File::create(&file)?, 1)?;
    encoder.write_all(br#"{"schema":1,"#)?;
    std::io::copy(&mut std::io::repeat(b' ').take(2 << 30), &mut encoder)?;
    encoder.write_all(b"}")?;
    encoder.finish()?;
    ensure!(std::fs::metadata(&file)?.len() < 4 << 20, "the bomb is too large to be one");
    for format in FORMATS {
        let mut command = Command::new("sh");
        command.args(["-c", "ulimit -v 1048576; exec \"$@\"", "sh"]).arg(programs::memtrace()?);
        command.arg("report").arg(&file).args(["--format", format]);
        refuses(command, 1, &["bomb.memtrace"])?;
    }
    Ok(())
}

#[test]
fn replay_of_nothing_fails() -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let absent = dir.path().join("absent");
    let mut command = memtrace(&["replay"])?;
    command.arg(&absent);
    refuses(command, 1, &["absent"])?;
    let file = dir.path().join("garbage");
    std::fs::write(&file, [0xa5; 4096])?;
    let mut command = memtrace(&["replay"])?;
    command.arg(&file);
    let output = run(command)?;
    ensure!(matches!(output.status.code(), Some(0 | 1)), "replay of garbage ended with {}", output.status);
    Ok(())
}
