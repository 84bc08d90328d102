//! The table of kernels, one row for each machine: printed after a run and kept in the README.
//! Pure.

use anyhow::{Context, Result};
use serde_json::Value;

use super::verifier::VerifierCost;
use memtrace_harness::libtest::Tally;

/// The file that contains the table, between the lines BEGIN and END.
pub(crate) const FILE: &str = "README.md";
const BEGIN: &str = "<!-- kernels: begin -->";
const END: &str = "<!-- kernels: end -->";

const HEAD: &str = "\
| kernel | Debian package | cgroup | `oom_decision`, `charge` | hooks off | tests passed, failed, not run | verifier instructions | machine code | date |
|---|---|---|---|---|---|---|---|---|
";

/// Result of one machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct KernelRow {
    pub(crate) kernel: String,
    pub(crate) version: String,
    pub(crate) cgroup: String,
    pub(crate) plan: HookPlan,
    pub(crate) tally: Tally,
    /// Sum over all programs; `None` if it is not known.
    pub(crate) cost: Option<VerifierCost>,
    /// Date of the run.
    pub(crate) date: String,
}

/// The hooks, as `memtrace doctor --json` reports them.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct HookPlan {
    /// How the hooks `oom_decision` and `charge` are attached.
    pub(crate) chosen: String,
    /// Names of the hooks that are not attached.
    pub(crate) off: String,
}

impl HookPlan {
    /// Reads doctor's JSON.
    pub(crate) fn of(doctor: &Value) -> Self {
        let hooks: Vec<&Value> = doctor.pointer("/hooks").and_then(Value::as_array).into_iter().flatten().collect();
        let name = |hook: &Value| hook.get("hook").and_then(Value::as_str).unwrap_or("?").to_owned();
        let kind = |wanted: &str| {
            let hook = hooks.iter().find(|hook| name(hook) == wanted)?;
            hook.pointer("/program/attach/kind").and_then(Value::as_str)
        };
        let chosen = ["oom_decision", "charge"].map(|hook| kind(hook).unwrap_or("off")).join(", ");
        let is_off = |hook: &&&Value| hook.get("state").and_then(Value::as_str) != Some("attached");
        let off: Vec<String> = hooks.iter().filter(is_off).map(|hook| name(hook)).collect();
        let off = if hooks.is_empty() { "unknown".to_owned() } else { or_none(&off.join(", ")) };
        Self { chosen, off }
    }
}

fn or_none(text: &str) -> String {
    if text.is_empty() { "none".to_owned() } else { text.to_owned() }
}

impl std::fmt::Display for KernelRow {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { kernel, version, cgroup, plan, tally, cost, date } = self;
        let (instructions, code) = match cost {
            Some(VerifierCost { instructions, bytes: Some(bytes) }) => {
                (instructions.to_string(), format!("{} KiB", bytes >> 10))
            }
            Some(VerifierCost { instructions, bytes: None }) => (instructions.to_string(), "unknown".to_owned()),
            None => ("unknown".to_owned(), "unknown".to_owned()),
        };
        let Tally { passed, failed, skipped } = tally;
        write!(
            f,
            "| {kernel} | {version} | {cgroup} | {} | {} | {passed}, {failed}, {skipped} | {instructions} | {code} | {date} |",
            plan.chosen, plan.off
        )
    }
}

/// The table in Markdown.
pub(crate) fn render(rows: &[KernelRow]) -> String {
    let rows: String = rows.iter().map(|row| format!("{row}\n")).collect();
    format!("{HEAD}{rows}")
}

/// Replaces the rows of the same kernel and cgroup version in the file's text. `order` lists all
/// kernels of the matrix; rows of other kernels are removed.
pub(crate) fn bless(text: &str, rows: &[KernelRow], order: &[&str]) -> Result<String> {
    let marked = || format!("{FILE} has no lines {BEGIN} and {END} to put the table between");
    let (before, rest) = text.split_once(BEGIN).with_context(marked)?;
    let (old, after) = rest.split_once(END).with_context(marked)?;
    let key = |line: &str| {
        let mut cells = line.strip_prefix("| ")?.split(" | ");
        let (kernel, cgroup) = (cells.next()?.to_owned(), cells.nth(1)?.to_owned());
        let position = order.iter().position(|have| *have == kernel)?;
        Some((position, cgroup))
    };
    let mut lines: Vec<((usize, String), String)> = Vec::new();
    let new = rows.iter().map(KernelRow::to_string);
    for line in new.chain(old.lines().map(str::to_owned)) {
        if let Some(key) = key(&line)
            && lines.iter().all(|(have, _)| *have != key)
        {
            lines.push((key, line));
        }
    }
    lines.sort();
    let table: String = lines.into_iter().map(|(_, line)| format!("{line}\n")).collect();
    Ok(format!("{before}{BEGIN}\n\n{HEAD}{table}\n{END}{after}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(kernel: &str, cgroup: &str, passed: u64) -> KernelRow {
        KernelRow {
            kernel: kernel.to_owned(),
            version: "6.1.192-2".to_owned(),
            cgroup: cgroup.to_owned(),
            plan: HookPlan { chosen: "fentry, kprobe".to_owned(), off: "none".to_owned() },
            tally: Tally { passed, failed: 0, skipped: 1 },
            cost: Some(VerifierCost { instructions: 1000, bytes: Some(4096) }),
            date: "2026-01-02".to_owned(),
        }
    }

    #[test]
    fn the_plan_is_read_off_what_doctor_said() {
        let doctor = serde_json::json!({"hooks": [
            {"hook": "exit_mmap", "state": "refused", "reason": "x"},
            {"hook": "oom_decision", "state": "attached", "program": {"name": "a", "attach": {"kind": "fentry"}}},
            {"hook": "charge", "state": "failed", "error": "y"},
        ]});
        let plan = HookPlan::of(&doctor);
        assert_eq!(plan, HookPlan { chosen: "fentry, off".to_owned(), off: "exit_mmap, charge".to_owned() });
        assert_eq!(HookPlan::of(&Value::Null).off, "unknown");
    }

    #[test]
    fn rows_replace_those_of_the_same_machine_and_keep_the_others() {
        let empty = format!("before\n{BEGIN}\n{END}\nafter\n");
        let order = ["5.10", "6.1"];
        let first = bless(&empty, &[row("6.1", "v2", 1), row("5.10", "v1", 2)], &order).unwrap();
        let second = bless(&first, &[row("6.1", "v2", 7), row("6.1", "v1", 3)], &order).unwrap();
        let rows: Vec<&str> = second.lines().filter(|line| line.contains("6.1.192")).collect();
        assert_eq!(
            rows,
            [
                "| 5.10 | 6.1.192-2 | v1 | fentry, kprobe | none | 2, 0, 1 | 1000 | 4 KiB | 2026-01-02 |",
                "| 6.1 | 6.1.192-2 | v1 | fentry, kprobe | none | 3, 0, 1 | 1000 | 4 KiB | 2026-01-02 |",
                "| 6.1 | 6.1.192-2 | v2 | fentry, kprobe | none | 7, 0, 1 | 1000 | 4 KiB | 2026-01-02 |",
            ]
        );
        assert!(second.starts_with("before\n") && second.ends_with("\nafter\n"));
        assert_eq!(bless(&second, &[], &order).unwrap(), second);
        assert!(!bless(&second, &[], &["6.1"]).unwrap().contains("| 5.10 |"));
        assert!(bless("no marks", &[], &order).is_err());
    }

    #[test]
    fn the_table_is_what_the_file_gets() {
        let rows = [row("6.1", "v2", 1)];
        let file = bless(&format!("{BEGIN}{END}"), &rows, &["6.1"]).unwrap();
        assert!(file.contains(&render(&rows)));
    }
}
