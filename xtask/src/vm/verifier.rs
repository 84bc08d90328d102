//! What the programs cost on each kernel, and the committed snapshot that new counts are held against. Pure.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use serde_json::Value;

/// The snapshot, in the repository.
pub(crate) const SNAPSHOT: &str = "tests/kernels/verifier.txt";

/// A count may grow by so much, in percent, before that is a failure.
const TOLERANCE: u64 = 2;
/// The same where it is another version of the kernel: its verifier may count otherwise.
const TOLERANCE_OTHER: u64 = 10;

const HEADER: &str = "\
# What each program takes on each kernel: instructions the verifier processes (it allows 1000000), bytes of machine
# code. `cargo xtask vm` compares with it, and with --bless writes it.
# kernel, cgroup version, package version, program, instructions, bytes
";

/// What a program takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Cost {
    pub(crate) instructions: u64,
    /// `None` where the program is unloaded before anybody could ask.
    pub(crate) bytes: Option<u64>,
}

/// By program.
pub(crate) type Costs = BTreeMap<String, Cost>;

/// What was measured on one machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Measured {
    /// Version of Debian's package.
    pub(crate) version: String,
    /// By program.
    pub(crate) costs: Costs,
}

/// By kernel of the matrix and cgroup version.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct Snapshot(BTreeMap<(String, String), Measured>);

/// Joins the verifier's log of a run of doctor with what doctor said.
///
/// The log has names of at most 15 bytes. What the loader itself tries out has a name of its own, or none.
pub(crate) fn costs(log: &str, doctor: &Value) -> Costs {
    let mut attached = BTreeMap::new();
    for hook in doctor.pointer("/hooks").and_then(Value::as_array).into_iter().flatten() {
        if let Some(name) = hook.pointer("/program/name").and_then(Value::as_str) {
            attached.insert(name, hook.pointer("/jited_bytes").and_then(Value::as_u64));
        }
    }
    let line = |line: &str| {
        let (name, rest) = line.split_once(" processed ")?;
        let instructions = rest.split_ascii_whitespace().next()?.parse().ok()?;
        let known = !name.is_empty() && !name.starts_with("aya_");
        let whole = attached.keys().copied().find(|whole| whole.get(..15).unwrap_or(whole) == name).unwrap_or(name);
        let bytes = attached.get(whole).copied().flatten();
        known.then(|| (whole.to_owned(), Cost { instructions, bytes }))
    };
    log.lines().filter_map(line).collect()
}

/// All programs together.
pub(crate) fn sum(costs: &Costs) -> Cost {
    let bytes = costs.values().filter_map(|cost| cost.bytes).sum();
    Cost { instructions: costs.values().map(|cost| cost.instructions).sum(), bytes: Some(bytes) }
}

/// A table of instructions and bytes, a row a program and a column a machine.
pub(crate) fn render(machines: &[(&str, &Costs)]) -> String {
    let programs: std::collections::BTreeSet<&String> = machines.iter().flat_map(|(_, costs)| costs.keys()).collect();
    let mut text = format!("{:<20}", "program");
    machines.iter().for_each(|(name, _)| text.push_str(&format!(" {name:>14}")));
    for program in programs {
        text.push_str(&format!("\n{program:<20}"));
        for (_, costs) in machines {
            let cell = costs.get(program).map_or_else(|| "-".to_owned(), Cost::to_string);
            text.push_str(&format!(" {cell:>14}"));
        }
    }
    text
}

/// Instructions and, where they are known, bytes.
impl std::fmt::Display for Cost {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.bytes {
            Some(bytes) => write!(f, "{}/{bytes}", self.instructions),
            None => write!(f, "{}/?", self.instructions),
        }
    }
}

/// What became of a comparison.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Compared {
    /// Programs that grew too much or are gone, one sentence each.
    pub(crate) worse: Vec<String>,
    /// What else is to be said.
    pub(crate) note: Option<String>,
}

impl Snapshot {
    /// Reads it from its file's text.
    pub(crate) fn read(text: &str) -> Result<Self> {
        let mut snapshot = Self::default();
        for line in text.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
            snapshot.entry(line).with_context(|| format!("bad line in {SNAPSHOT}: {line}"))?;
        }
        Ok(snapshot)
    }

    fn entry(&mut self, line: &str) -> Option<()> {
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        let [kernel, cgroup, version, program, instructions, bytes] = words.as_slice() else { return None };
        let cost = Cost { instructions: instructions.parse().ok()?, bytes: bytes.parse().ok() };
        let key = ((*kernel).to_owned(), (*cgroup).to_owned());
        let fresh = || Measured { version: (*version).to_owned(), costs: Costs::new() };
        self.0.entry(key).or_insert_with(fresh).costs.insert((*program).to_owned(), cost);
        Some(())
    }

    /// The text of its file.
    pub(crate) fn text(&self) -> String {
        let mut text = HEADER.to_owned();
        for ((kernel, cgroup), Measured { version, costs }) in &self.0 {
            text.push('\n');
            for (program, cost) in costs {
                let bytes = cost.bytes.map_or_else(|| "-".to_owned(), |bytes| bytes.to_string());
                text.push_str(&format!("{kernel} {cgroup} {version} {program} {} {bytes}\n", cost.instructions));
            }
        }
        text
    }

    /// Takes in what was measured.
    pub(crate) fn bless(&mut self, kernel: &str, cgroup: &str, measured: Measured) {
        self.0.insert((kernel.to_owned(), cgroup.to_owned()), measured);
    }

    /// Holds what was measured against it.
    pub(crate) fn compare(&self, kernel: &str, cgroup: &str, measured: &Measured) -> Compared {
        let (version, costs) = (&measured.version, &measured.costs);
        let mut compared = Compared::default();
        let old = self.0.get(&(kernel.to_owned(), cgroup.to_owned()));
        let Some(old) = old.filter(|old| series(&old.version) == series(version)) else {
            compared.note = Some(format!("{SNAPSHOT} has nothing of the series of {version} to compare with"));
            return compared;
        };
        let tolerance = if old.version == *version { TOLERANCE } else { TOLERANCE_OTHER };
        if old.version != *version {
            compared.note = Some(format!("{version} is compared with the verifier counts of {}", old.version));
        }
        for (program, old) in &old.costs {
            let what = match costs.get(program) {
                None => format!("{program} was loaded before, and is not any more"),
                Some(new) if new.instructions * 100 > old.instructions * (100 + tolerance) => format!(
                    "{program}: the verifier processes {} instructions, {} before",
                    new.instructions, old.instructions
                ),
                Some(_) => continue,
            };
            compared.worse.push(format!("{what}; if it is meant to be so, run `cargo xtask vm --bless`"));
        }
        compared
    }
}

/// 5.10 of 5.10.262-1.
fn series(version: &str) -> &str {
    let end = version.match_indices(|c: char| !c.is_ascii_digit()).nth(1).map_or(version.len(), |(at, _)| at);
    version.get(..end).unwrap_or(version)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measured(version: &str, program: &str, instructions: u64) -> Measured {
        let costs = Costs::from([(program.to_owned(), Cost { instructions, bytes: Some(10) })]);
        Measured { version: version.to_owned(), costs }
    }

    #[test]
    fn the_log_is_joined_with_what_doctor_said() {
        let doctor = serde_json::json!({"hooks": [
            {"hook": "oom_decision", "state": "attached", "program": {"name": "oom_decision_fentry"}, "jited_bytes": 900},
            {"hook": "rss", "state": "attached", "program": {"name": "rss_stat"}, "jited_bytes": null},
            {"hook": "map", "state": "left_out"},
        ]});
        let log = "aya_name_check processed 2 insns (limit 1000000)\n processed 2 insns\npercpu_init processed 30 insns\n\
            rss_stat processed 4000 insns (limit 1000000) max\noom_decision_fe processed 50 insns\nnoise\n";
        let costs = costs(log, &doctor);
        let of = |program: &str| costs.get(program).map(|cost| (cost.instructions, cost.bytes));
        assert_eq!(of("oom_decision_fentry"), Some((50, Some(900))));
        assert_eq!(of("rss_stat"), Some((4000, None)));
        assert_eq!(of("percpu_init"), Some((30, None)));
        assert_eq!(costs.len(), 3);
    }

    #[test]
    fn it_is_written_as_it_is_read() {
        let mut snapshot = Snapshot::default();
        snapshot.bless("6.1", "v2", measured("6.1.192-2", "rss_stat", 100));
        snapshot.bless("5.10", "v1", measured("5.10.262-1", "percpu_init", 7));
        let text = snapshot.text();
        assert!(
            text.ends_with("\n\n5.10 v1 5.10.262-1 percpu_init 7 10\n\n6.1 v2 6.1.192-2 rss_stat 100 10\n"),
            "{text}"
        );
        assert_eq!(Snapshot::read(&text).unwrap(), snapshot);
        assert!(Snapshot::read("6.1 v2 rss_stat 100\n").is_err());
    }

    #[test]
    fn programs_are_rows_and_machines_columns() {
        let (one, two) = (measured("6.1", "rss_stat", 100).costs, measured("6.1", "mark_victim", 7).costs);
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
        assert_eq!(sum(&one), Cost { instructions: 100, bytes: Some(10) });
    }

    #[test]
    fn two_percent_more_are_borne_and_no_more() {
        let mut snapshot = Snapshot::default();
        snapshot.bless("6.1", "v2", measured("6.1.192-2", "rss_stat", 1000));
        let worse = |now: u64| snapshot.compare("6.1", "v2", &measured("6.1.192-2", "rss_stat", now)).worse;
        assert!(worse(1020).is_empty() && worse(900).is_empty());
        let said = worse(1021);
        let [said] = said.as_slice() else { panic!("{said:?}") };
        for part in ["rss_stat", "1021", "1000", "--bless"] {
            assert!(said.contains(part), "{said}");
        }
        let gone = snapshot.compare("6.1", "v2", &measured("6.1.192-2", "other", 1)).worse;
        assert!(gone.len() == 1 && gone[0].contains("not any more"), "{gone:?}");
    }

    #[test]
    fn another_version_of_the_series_is_compared_and_said() {
        let mut snapshot = Snapshot::default();
        snapshot.bless("sid", "v2", measured("7.2.13-1", "rss_stat", 1000));
        assert!(snapshot.compare("sid", "v2", &measured("7.2.20-1", "rss_stat", 1100)).worse.is_empty());
        let compared = snapshot.compare("sid", "v2", &measured("7.2.20-1", "rss_stat", 1101));
        assert_eq!(compared.worse.len(), 1);
        assert!(compared.note.is_some_and(|note| note.contains("7.2.20-1") && note.contains("7.2.13-1")));
        let compared = snapshot.compare("sid", "v2", &measured("7.20.1-1", "rss_stat", 2000));
        assert!(compared.worse.is_empty() && compared.note.is_some());
    }
}
