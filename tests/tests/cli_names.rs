//! `memtrace name-frames`, the process that names frames for the agent: it names what it can and
//! survives bad input.

#![allow(clippy::indexing_slicing, reason = "a panic is how a test fails")]

use std::io::Write;
use std::process::{Output, Stdio};

use anyhow::{Context, ensure};
use memtrace_tests::programs;
use serde_json::{Value, json};

fn name_frames(job: &[u8]) -> anyhow::Result<Output> {
    let mut command = programs::memtrace_command()?;
    command.arg("name-frames").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn()?;
    let written = child.stdin.take().context("no stdin")?.write_all(job);
    let output = child.wait_with_output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(!said.contains("panicked") && output.status.code().is_some(), "{}: {said}", output.status);
    // it may exit before it has read everything
    ensure!(written.is_ok() || !output.status.success());
    Ok(output)
}

/// File offset of this program's own function.
fn own_offset() -> anyhow::Result<u64> {
    let here = own_offset as *const () as u64;
    let maps = std::fs::read_to_string("/proc/self/maps")?;
    let held = maps.lines().find_map(|line| {
        let mut words = line.split_whitespace();
        let (start, end) = words.next()?.split_once('-')?;
        let number = |text| u64::from_str_radix(text, 16).ok();
        let (start, end, offset) = (number(start)?, number(end)?, number(words.nth(1)?)?);
        (start..end).contains(&here).then(|| here - start + offset)
    });
    held.context("this function is not mapped")
}

#[test]
fn names_a_function_and_says_when_it_cannot() -> anyhow::Result<()> {
    let own = std::env::current_exe()?;
    let dir = tempfile::tempdir()?;
    let garbage = dir.path().join("garbage");
    std::fs::write(&garbage, [0x7f; 5000])?;
    let offset = own_offset()?;
    let job = json!({
        "unnamed": [[["/garbage", null], [64]], [["/own", null], [offset, u64::MAX]], [["/none", null], [1]]],
        "modules": [[["/own", null], own], [["/garbage", null], garbage]],
        "debug_dirs": [],
        "search": false,
    });
    let output = name_frames(job.to_string().as_bytes())?;
    ensure!(output.status.success(), "{output:?}");
    let lines = String::from_utf8(output.stdout)?;
    let lines: Vec<Value> = lines.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    ensure!(lines.len() == 3 && lines[0] == json!([["/garbage", null], []]), "{lines:?}");
    ensure!(lines[2] == json!([["/none", null], []]), "{lines:?}");
    let named = lines[1][1].as_array().context("no names")?;
    ensure!(named.len() == 1 && named[0][0] == offset, "{named:?}");
    let outermost = named[0][1].as_array().and_then(|names| names.last()).context("no name")?;
    ensure!(outermost["symbol"].as_str().is_some_and(|name| name.contains("cli_names::own_offset")), "{outermost}");
    ensure!(outermost["file"].as_str().is_some_and(|file| file.ends_with("cli_names.rs")), "{outermost}");
    Ok(())
}

#[test]
fn what_is_no_job_is_refused() -> anyhow::Result<()> {
    for job in [&b""[..], b"{", b"[]", b"{\"unnamed\":[[[\"/a\",null],[-1]]]}", &[0xff; 100_000]] {
        let output = name_frames(job)?;
        ensure!(output.status.code() == Some(1) && output.stdout.is_empty(), "{output:?}");
    }
    Ok(())
}
