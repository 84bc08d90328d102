//! Runs `workload loop` and reads its result.

use std::process::{Command, Stdio};

use anyhow::{Context, anyhow, ensure};
use memtrace_tests::{json, programs};
use serde_json::Value;

/// Result of a loop.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Looped {
    /// Units done: pages, calls or children, depending on the loop.
    pub(crate) units: u64,
    /// Wall-clock time.
    pub(crate) elapsed_ns: u64,
    /// CPU time, including children.
    pub(crate) cpu_ns: u64,
}

impl Looped {
    /// Nanoseconds of CPU a unit.
    pub(crate) fn cpu_ns_per_unit(self) -> f64 {
        self.cpu_ns as f64 / self.units.max(1) as f64
    }

    /// Units a second.
    pub(crate) fn per_second(self) -> f64 {
        self.units as f64 * 1e9 / self.elapsed_ns.max(1) as f64
    }
}

/// Runs one loop for a time; `words` name the loop and its options.
pub(crate) fn run(words: &[&str], ms: u64) -> anyhow::Result<Looped> {
    let mut command = Command::new(programs::path("workload")?);
    command.args(arguments(words, ms));
    of_command(command)
}

/// Runs several at the same time.
pub(crate) fn run_many(count: usize, words: &[&str], ms: u64) -> anyhow::Result<Vec<Looped>> {
    std::thread::scope(|scope| {
        let running: Vec<_> = (0..count).map(|_| scope.spawn(|| run(words, ms))).collect();
        running.into_iter().map(|thread| thread.join().map_err(|_| anyhow!("a thread panicked"))?).collect()
    })
}

/// Arguments of `workload` for such a loop.
pub(crate) fn arguments(words: &[&str], ms: u64) -> Vec<String> {
    let mut arguments: Vec<String> = ["loop"].iter().chain(words).map(|word| (*word).to_owned()).collect();
    arguments.extend(["--ms".to_owned(), ms.to_string()]);
    arguments
}

/// Runs a command that becomes, or wraps, such a loop.
pub(crate) fn of_command(mut command: Command) -> anyhow::Result<Looped> {
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("failed to run {command:?}"))?;
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    ensure!(output.status.success(), "{command:?} ended with {}: {}", output.status, err.trim());
    found(&out).with_context(|| format!("{command:?} printed {out}"))
}

/// Finds the result among the output; a recorder around the loop may print lines of its own.
fn found(printed: &str) -> anyhow::Result<Looped> {
    let mut said = printed.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let looped = said.find(|said| said.get("event").is_some_and(|event| event == "looped")).context("no loop")?;
    let number = |name: &str| json::number(&looped, name);
    Ok(Looped { units: number("/units")?, elapsed_ns: number("/elapsed_ns")?, cpu_ns: number("/cpu_ns")? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loop_is_found_among_other_lines() {
        let text = "heaptrack output\n{\"event\":\"start\"}\n{\"event\":\"looped\",\"units\":10,\"elapsed_ns\":1000,\"cpu_ns\":900}\n7\n";
        let looped = found(text).unwrap();
        assert_eq!((looped.units, looped.cpu_ns_per_unit(), looped.per_second()), (10, 90.0, 1e7));
        assert!(found("nothing").is_err());
    }
}
