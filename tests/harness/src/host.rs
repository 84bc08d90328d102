//! Hardware, kernel and date, as written into generated documents.

use std::process::Command;

use anyhow::{Context, Result};

use crate::run::output;

/// Number of CPUs, their model, and memory in GiB, from /proc.
pub fn machine() -> Result<String> {
    let (cpus, memory) = (read("/proc/cpuinfo")?, read("/proc/meminfo")?);
    let model = cpus.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or("unknown CPU");
    let count = cpus.lines().filter(|line| line.starts_with("processor")).count();
    let kib = memory.lines().find_map(|line| line.strip_prefix("MemTotal:")?.split_ascii_whitespace().next());
    let gib = kib.and_then(|kib| kib.parse::<u64>().ok()).context("no MemTotal in /proc/meminfo")? >> 20;
    Ok(format!("{count} CPUs ({}), {gib} GiB", model.trim_start_matches([' ', '\t', ':'])))
}

/// Release of the running kernel (`uname -r`).
pub fn kernel() -> Result<String> {
    Ok(read("/proc/sys/kernel/osrelease")?.trim().to_owned())
}

/// Today's date in UTC, YYYY-MM-DD.
pub fn today() -> Result<String> {
    Ok(output(Command::new("date").args(["-u", "+%F"]))?.trim().to_owned())
}

fn read(path: &str) -> Result<String> {
    std::fs::read_to_string(path).with_context(|| format!("failed to read {path}"))
}
