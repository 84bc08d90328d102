//! Cost of the eBPF programs on each kernel, held against a committed snapshot. Pure.

use std::collections::BTreeMap;

use serde_json::Value;

use super::snapshot::Count;

/// Growth allowed before it is a failure, percent.
const TOLERANCE: u64 = 2;
/// The same against another version of the kernel, whose verifier may count differently.
const TOLERANCE_OTHER: u64 = 10;

const HEADER: &str = "\
# What each program takes on each kernel: instructions the verifier processes (it allows 1000000), bytes of machine
# code. `cargo xtask vm` compares with it, and with --bless writes it.
# kernel, cgroup version, package version, program, instructions, bytes
";

/// Cost of a program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct VerifierCost {
    pub(crate) instructions: u64,
    /// Size of its machine code; `None` if the program was unloaded before it could be asked.
    pub(crate) bytes: Option<u64>,
}

/// Cost by program name.
pub(crate) type VerifierCosts = BTreeMap<String, VerifierCost>;

/// Joins the verifier's log of a run of `doctor` with doctor's JSON.
///
/// Names in the log are cut to 15 bytes. Programs that the loader itself tries out (`aya_..`, or
/// without a name) are ignored.
pub(crate) fn costs(log: &str, doctor: &Value) -> VerifierCosts {
    let mut attached = BTreeMap::new();
    for hook in doctor.pointer("/hooks").and_then(Value::as_array).into_iter().flatten() {
        if let Some(name) = hook.pointer("/program/name").and_then(Value::as_str) {
            attached.insert(name, hook.pointer("/jited_bytes").and_then(Value::as_u64));
        }
    }
    let line = |line: &str| {
        let (name, rest) = line.split_once(" processed ")?;
        // since 7.2 global functions are counted apart: `72024+131`
        let parts = rest.split_ascii_whitespace().next()?.split('+').map(|part| part.parse::<u64>().ok());
        let instructions = parts.sum::<Option<u64>>()?;
        let known = !name.is_empty() && !name.starts_with("aya_");
        let whole = attached.keys().copied().find(|whole| whole.get(..15).unwrap_or(whole) == name).unwrap_or(name);
        let bytes = attached.get(whole).copied().flatten();
        known.then(|| (whole.to_owned(), VerifierCost { instructions, bytes }))
    };
    log.lines().filter_map(line).collect()
}

/// Sum over all programs.
pub(crate) fn sum(costs: &VerifierCosts) -> VerifierCost {
    let bytes = costs.values().filter_map(|cost| cost.bytes).sum();
    VerifierCost { instructions: costs.values().map(|cost| cost.instructions).sum(), bytes: Some(bytes) }
}

/// A table of instructions/bytes: a row for each program, a column for each machine.
pub(crate) fn render(machines: &[(&str, &VerifierCosts)]) -> String {
    let programs: std::collections::BTreeSet<&String> = machines.iter().flat_map(|(_, costs)| costs.keys()).collect();
    let mut text = format!("{:<20}", "program");
    machines.iter().for_each(|(name, _)| text.push_str(&format!(" {name:>14}")));
    for program in programs {
        text.push_str(&format!("\n{program:<20}"));
        for (_, costs) in machines {
            let cell = costs.get(program).map_or_else(|| "-".to_owned(), VerifierCost::to_string);
            text.push_str(&format!(" {cell:>14}"));
        }
    }
    text
}

/// `INSTRUCTIONS/BYTES`, or `INSTRUCTIONS/?`.
impl std::fmt::Display for VerifierCost {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.bytes {
            Some(bytes) => write!(f, "{}/{bytes}", self.instructions),
            None => write!(f, "{}/?", self.instructions),
        }
    }
}

impl Count for VerifierCost {
    const FILE: &'static str = "tests/kernels/verifier.txt";
    const HEADER: &'static str = HEADER;
    const BLESS: &'static str = "cargo xtask vm --bless";
    const NAME_WORDS: usize = 1;

    fn read(words: &[&str]) -> Option<Self> {
        let [instructions, bytes] = words else { return None };
        Some(Self { instructions: instructions.parse().ok()?, bytes: bytes.parse().ok() })
    }

    fn write(&self) -> String {
        let bytes = self.bytes.map_or_else(|| "-".to_owned(), |bytes| bytes.to_string());
        format!("{} {bytes}", self.instructions)
    }

    fn grown(&self, name: &str, new: &Self, same_version: bool) -> Option<String> {
        let tolerance = if same_version { TOLERANCE } else { TOLERANCE_OTHER };
        let (old, new) = (self.instructions, new.instructions);
        (new * 100 > old * (100 + tolerance))
            .then(|| format!("{name}: the verifier processes {new} instructions, {old} before"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn costs_of(program: &str, instructions: u64) -> VerifierCosts {
        VerifierCosts::from([(program.to_owned(), VerifierCost { instructions, bytes: Some(10) })])
    }

    #[test]
    fn the_log_is_joined_with_what_doctor_said() {
        let doctor = serde_json::json!({"hooks": [
            {"hook": "oom_decision", "state": "attached", "program": {"name": "oom_decision_fentry"}, "jited_bytes": 900},
            {"hook": "rss", "state": "attached", "program": {"name": "rss_stat"}, "jited_bytes": null},
            {"hook": "map", "state": "left_out"},
        ]});
        let log = "aya_name_check processed 2 insns (limit 1000000)\n processed 2 insns\npercpu_init processed 30 insns\n\
            rss_stat processed 3900+100 insns (limit 1000000) max\noom_decision_fe processed 50 insns\nnoise\n";
        let costs = costs(log, &doctor);
        let of = |program: &str| costs.get(program).map(|cost| (cost.instructions, cost.bytes));
        assert_eq!(of("oom_decision_fentry"), Some((50, Some(900))));
        assert_eq!(of("rss_stat"), Some((4000, None)));
        assert_eq!(of("percpu_init"), Some((30, None)));
        assert_eq!(costs.len(), 3);
    }

    #[test]
    fn programs_are_rows_and_machines_columns() {
        let (one, two) = (costs_of("rss_stat", 100), costs_of("mark_victim", 7));
        let table = render(&[("6.1-v1", &one), ("6.1-v2", &two)]);
        let rows: Vec<Vec<&str>> = table.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(
            rows,
            [
                ["program", "6.1-v1", "6.1-v2"].as_slice(),
                ["mark_victim", "-", "7/10"].as_slice(),
                ["rss_stat", "100/10", "-"].as_slice(),
            ]
        );
        assert_eq!(sum(&one), VerifierCost { instructions: 100, bytes: Some(10) });
    }
}
