//! Instructions that the agent adds to an operation, computed as differences between what the loops
//! printed, each with its noise. Pure.

use std::collections::BTreeMap;

use serde_json::Value;

use memtrace_vm::snapshot::Count;

/// Growth allowed before it is a failure, percent.
const TOLERANCE: f64 = 8.0;
/// The same against another version of the kernel.
const TOLERANCE_OTHER: f64 = 20.0;
/// The same for the agent with stacks: they are sampled at random, and as often as a share of the
/// CPU allows.
const TOLERANCE_STACKS: f64 = 30.0;
/// Growth that is always allowed, instructions.
const ALWAYS: f64 = 10.0;

/// Standard errors of a difference that count as noise.
const ERRORS: f64 = 3.0;

/// Loops that are reported but not compared: their operations are so long that the agent's turns
/// fall into them, or they make work for the agent.
pub(crate) const UNSTEADY: [&str; 3] = ["kill", "fork", "exec"];

/// What the agent adds to an operation.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Added {
    /// Instructions added to one operation.
    pub(crate) instructions: f64,
    /// Noise of that number: plus or minus so many instructions.
    pub(crate) noise: f64,
}

impl std::fmt::Display for Added {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:+.0} ± {:.0}", self.instructions, self.noise.max(1.0))
    }
}

impl Count for Added {
    const FILE: &'static str = "tests/kernels/instructions.txt";
    const HEADER: &'static str = "\
# Instructions that the agent adds to one operation on each kernel, and what of that may be noise. `full` is the agent at
# defaults, `no-stacks` without stacks, `required` without those and with its required hooks alone, `charges` without
# stacks and with charges in place of the rss hook, `hook:NAME` what `no-stacks` takes more than without that hook.
# `cargo xtask test` and `cargo xtask bench instructions` compare with it, the latter with --bless writes it.
# kernel, cgroup version, package version, operation, what, instructions, noise
";
    const BLESS: &'static str = "cargo xtask bench instructions --bless";
    const NAME_WORDS: usize = 2;

    fn read(words: &[&str]) -> Option<Self> {
        let [instructions, noise] = words else { return None };
        Some(Self { instructions: instructions.parse().ok()?, noise: noise.parse().ok()? })
    }

    fn write(&self) -> String {
        format!("{:.0} {:.0}", self.instructions, self.noise.ceil())
    }

    fn grown(&self, name: &str, new: &Self, same_version: bool) -> Option<String> {
        let percent = if same_version { TOLERANCE } else { TOLERANCE_OTHER };
        let percent = if name.ends_with(" full") { TOLERANCE_STACKS } else { percent };
        // a difference has the noise of both operands
        let allowed = ALWAYS.max(self.noise.hypot(new.noise)).max(self.instructions * percent / 100.0);
        (new.instructions - self.instructions > allowed).then(|| format!("{name}: {new} instructions, {self} before"))
    }
}

/// Configurations of the agent: name in `bench counted`, and in words.
pub(crate) const PARTS: [(&str, &str); 4] = [
    ("full", "memtrace at defaults"),
    ("no-stacks", "memtrace without stacks"),
    ("required", "its required hooks alone, without stacks"),
    ("charges", "memtrace without stacks, charges in place of rss"),
];

/// Other tracers of page faults: name in `bench counted`, and in words.
pub(crate) const PEERS: [(&str, &str); 3] = [
    ("bpftrace-tracepoint", "bpftrace, page faults by name (tracepoint)"),
    ("bpftrace-software", "bpftrace, page faults by name (every one)"),
    ("perf-record", "perf record -e page-faults -c 1 -g -a"),
];

/// Cost of one loop in one configuration, instructions an operation.
#[derive(Debug, Clone, Copy)]
struct LoopCount {
    mean: f64,
    /// Standard error of the mean.
    error: f64,
}

/// The loops of one machine.
#[derive(Debug, Default)]
pub(crate) struct Loops {
    /// Instructions of each operation without the agent.
    pub(crate) alone: BTreeMap<String, f64>,
    /// What is added, by `OPERATION CONFIGURATION` or `OPERATION hook:NAME`.
    pub(crate) added: BTreeMap<String, Added>,
}

impl Loops {
    /// Reads what `bench counted` printed.
    pub(crate) fn of(figures: &Value) -> Self {
        let mut loops = Self::default();
        let Some(none) = figures.pointer("/configurations/none").and_then(Value::as_object) else { return loops };
        for (operation, alone) in none {
            let with = |what: &str| took(figures.pointer(&format!("/configurations/{what}/{operation}"))?);
            let (Some(alone), Some(again)) = (took(alone), with("none-again")) else { continue };
            loops.alone.insert(operation.clone(), alone.mean);
            // the same configuration twice: how far the machine itself drifts
            let drift = (again.mean - alone.mean).abs();
            let mut add = |what: &str, more: LoopCount, less: LoopCount| {
                let noise = (ERRORS * more.error.hypot(less.error)).max(drift);
                let added = Added { instructions: more.mean - less.mean, noise };
                loops.added.insert(format!("{operation} {what}"), added);
            };
            for (what, _) in PARTS.iter().chain(&PEERS) {
                with(what).into_iter().for_each(|more| add(what, more, alone));
            }
            let Some(whole) = with("no-stacks") else { continue };
            for hook in hooks(figures) {
                let without = with(&format!("without-{hook}"));
                without.into_iter().for_each(|less| add(&format!("{HOOK}{hook}"), whole, less));
            }
        }
        loops
    }

    /// Counts that are compared with the snapshot.
    pub(crate) fn steady(&self) -> BTreeMap<String, Added> {
        let ours = |name: &str| PEERS.iter().all(|(peer, _)| !name.ends_with(peer));
        let is_steady = |name: &&String| UNSTEADY.iter().all(|what| !name.starts_with(what)) && ours(name);
        self.added.iter().filter(|(name, _)| is_steady(name)).map(|(name, added)| (name.clone(), *added)).collect()
    }

    /// A table row: what is added to each of these operations.
    pub(crate) fn row(&self, what: &str, operations: &[String]) -> Vec<String> {
        let cell = |operation: &String| match self.added.get(&format!("{operation} {what}")) {
            Some(added) => added.to_string(),
            None => "not measured".to_owned(),
        };
        operations.iter().map(cell).collect()
    }
}

/// Prefix of a hook's name in `added`.
pub(crate) const HOOK: &str = "hook:";

/// Names of the hooks, as doctor reported them.
pub(crate) fn hooks(figures: &Value) -> Vec<&str> {
    let hooks = figures.get("hooks").and_then(Value::as_array).into_iter().flatten();
    hooks.filter_map(|hook| hook.get("hook").and_then(Value::as_str)).collect()
}

fn took(found: &Value) -> Option<LoopCount> {
    let number = |key: &str| found.get(key).and_then(Value::as_f64);
    Some(LoopCount { mean: number("mean")?, error: number("error")? })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn figures() -> Value {
        let took = |fault: f64, kill: f64| {
            json!({
                "fault": { "mean": fault, "error": 0.0 },
                "kill": { "mean": kill, "error": 100.0 },
            })
        };
        json!({
            "hooks": [{ "hook": "rss" }, { "hook": "fault" }],
            "configurations": {
                "none": took(7000.0, 100.0), "full": took(7300.0, 200.0), "required": took(7200.0, 200.0),
                "no-stacks": took(7250.0, 200.0), "without-fault": took(7210.0, 200.0), "none-again": took(7002.0, 100.0),
            },
        })
    }

    #[test]
    fn what_is_added_is_a_difference_and_no_surer_than_the_machine() {
        let loops = Loops::of(&figures());
        let of = |name: &str| loops.added.get(name).map(|added| (added.instructions, added.noise));
        assert_eq!(loops.alone.get("fault"), Some(&7000.0));
        assert_eq!(of("fault full"), Some((300.0, 2.0)));
        assert_eq!(of("fault hook:fault"), Some((40.0, 2.0)));
        assert_eq!(of("fault hook:rss"), None);
        assert!(of("kill full").is_some_and(|(added, noise)| added == 100.0 && noise > 400.0));
        assert!(!loops.steady().contains_key("kill full"));
        let row = loops.row("full", &["fault".to_owned(), "map".to_owned()]);
        assert_eq!(row, ["+300 ± 2", "not measured"]);
        assert!(Loops::of(&json!({})).added.is_empty());
    }

    #[test]
    fn growth_counts_beyond_ten_instructions_eight_percent_and_noise() {
        let grown = |old: (f64, f64), new: (f64, f64), same: bool| {
            let added = |(instructions, noise)| Added { instructions, noise };
            added(old).grown("fault no-stacks", &added(new), same)
        };
        assert_eq!(grown((100.0, 1.0), (110.0, 1.0), true), None);
        assert_eq!(grown((100.0, 1.0), (130.0, 40.0), true), None);
        assert_eq!(grown((1000.0, 1.0), (1080.0, 1.0), true), None);
        let said = grown((1000.0, 1.0), (1081.0, 1.0), true).unwrap();
        assert_eq!(said, "fault no-stacks: +1081 ± 1 instructions, +1000 ± 1 before");
        assert_eq!(grown((1000.0, 1.0), (1081.0, 1.0), false), None);
        assert_eq!(grown((1000.0, 1.0), (200.0, 1.0), true), None);
        let added = |instructions| Added { instructions, noise: 1.0 };
        assert_eq!(added(1000.0).grown("fault full", &added(1290.0), true), None);
        assert!(added(1000.0).grown("fault full", &added(1310.0), true).is_some());
    }

    #[test]
    fn it_is_written_as_it_is_read() {
        let added = Added { instructions: 300.4, noise: 1.2 };
        assert_eq!(added.write(), "300 2");
        assert_eq!(Added::read(&["300", "2"]), Some(Added { instructions: 300.0, noise: 2.0 }));
        assert_eq!(Added::read(&["300"]), None);
    }
}
