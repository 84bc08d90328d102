//! Benchmark `instructions`: how many instructions the agent adds to an operation, on every kernel,
//! in machines whose clock counts instructions.

use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use serde_json::{Value, json};

use super::added::{Added, HOOK, Loops, PARTS, PEERS, UNSTEADY, hooks};
use memtrace_harness::built::Built;
use memtrace_harness::checkout::Checkout;
use memtrace_harness::libtest::Tally;
use memtrace_harness::run::say;
use memtrace_vm::Processors;
use memtrace_vm::Slots;
use memtrace_vm::kernel_names;
use memtrace_vm::snapshot::{Count, CountComparison, CountSnapshot, MeasuredCounts};
use memtrace_vm::{BenchFigures, BenchTask, NamedFigures};

/// Programs of the host: one that is run in a loop, and other tracers of page faults.
const BORROWED: [&str; 3] = ["/bin/true", "/usr/bin/bpftrace", "/usr/bin/perf"];

/// Which machines and configurations are wanted.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum InstructionExtent {
    /// Every kernel, hook by hook, and one machine with many possible CPUs: what the snapshot
    /// holds.
    Whole,
    /// The same machines, all hooks together.
    Together,
    /// The oldest kernel, the newest, and the machine with many possible CPUs; all hooks together.
    Ends,
    /// An old and a new kernel; all hooks together.
    Two,
}

/// Results of the benchmark.
pub struct InstructionCounts {
    /// The chapter, as JSON.
    pub chapter: Value,
    /// Counts that were compared with the snapshot.
    pub tally: Tally,
    /// Counts that grew and machines that failed, a line each.
    pub failures: Vec<String>,
    /// Remarks, for example second tries.
    pub remarks: Vec<String>,
    /// Sum of the machines' run times.
    pub took: Duration,
}

/// One machine and its loops.
struct MeasuredMachine {
    found: BenchFigures,
    loops: Loops,
}

/// Possible CPUs of one more machine. What the agent adds there beyond the others is the cost of
/// summing counters over all CPUs.
const MANY: u32 = 64;

/// Machines with the same settings.
struct Lot<'a> {
    /// Names of kernels of the matrix.
    kernels: &'a [&'a str],
    /// Possible CPUs of the kernel.
    possible: u32,
    /// Whether to measure hook by hook, and other tracers of page faults.
    whole: bool,
}

impl Lot<'_> {
    /// Boots the machines for these kernels, of those of the lot.
    fn boot(&self, checkout: &Checkout, built: &Built, slots: &Slots, kernels: &[&str]) -> Result<NamedFigures> {
        // lots boot at the same time and need directories of their own
        let name =
            if self.possible > 1 { format!("instructions-of-{}", self.possible) } else { "instructions".to_owned() };
        let task = BenchTask {
            name: &name,
            arguments: if self.whole { "counted" } else { "counted,--quick" },
            kernels,
            borrowed: if self.whole { &BORROWED } else { BORROWED.get(..1).unwrap_or_default() },
            processors: Processors::Counted { possible: self.possible },
            memory: 1024,
            slots,
        };
        let mut all = task.run(checkout, built)?;
        if self.possible > 1 {
            for (name, found) in &mut all {
                name.push_str(&format!(" of {}", self.possible));
                if let Ok(found) = found {
                    found.kernel.push_str(&format!("-of-{}", self.possible));
                }
            }
        }
        Ok(all)
    }

    /// Boots the lot, and once more the machines whose counts have grown. Rounds are few and the
    /// agent's turns fall into some of them by chance, so a count must have grown twice. Also
    /// returns what grew at first.
    fn measure(
        &self,
        checkout: &Checkout,
        built: &Built,
        slots: &Slots,
        snapshot: &CountSnapshot<Added>,
    ) -> Result<(NamedFigures, Vec<String>)> {
        let mut all = self.boot(checkout, built, slots, self.kernels)?;
        let bad: Vec<String> =
            all.iter().filter_map(|one| complaints(snapshot, one, self.whole).0.into_iter().next()).collect();
        let again: Vec<&str> =
            self.kernels.iter().copied().filter(|kernel| bad.iter().any(|why| is_of(why, kernel))).collect();
        if !again.is_empty() {
            let second = self.boot(checkout, built, slots, &again)?;
            all.retain(|(name, _)| second.iter().all(|(other, _)| other != name));
            all.extend(second);
        }
        Ok((all, bad.iter().map(|why| format!("second try of {why}")).collect()))
    }
}

/// Boots the machines and compares their counts with the snapshot; with `bless`, replaces the
/// snapshot.
pub fn count_instructions(
    checkout: &Checkout,
    built: &Built,
    slots: &Slots,
    extent: InstructionExtent,
    bless: bool,
) -> Result<InstructionCounts> {
    let every = kernel_names();
    let whole = extent == InstructionExtent::Whole;
    let of_many = Lot { kernels: &["sid"], possible: MANY, whole: false };
    let lots = match extent {
        InstructionExtent::Ends => vec![Lot { kernels: &["5.10", "backports"], possible: 1, whole }, of_many],
        InstructionExtent::Two => vec![Lot { kernels: &["6.1", "sid"], possible: 1, whole }],
        InstructionExtent::Together | InstructionExtent::Whole => {
            vec![Lot { kernels: &every, possible: 1, whole }, of_many]
        }
    };
    let path = checkout.root.join(Added::FILE);
    let mut snapshot = CountSnapshot::<Added>::read(&std::fs::read_to_string(&path).unwrap_or_default())?;
    let (mut failures, mut remarks, mut took) = (Vec::new(), Vec::new(), Duration::ZERO);
    let mut machines = Vec::new();
    let mut counts = 0;
    let measure = |lot: &Lot<'_>| {
        if bless {
            return lot.boot(checkout, built, slots, lot.kernels).map(|all| (all, Vec::new()));
        }
        lot.measure(checkout, built, slots, &snapshot)
    };
    let measured = std::thread::scope(|scope| {
        let running: Vec<_> = lots.iter().map(|lot| scope.spawn(move || measure(lot))).collect();
        let ended = running.into_iter().map(|lot| lot.join().unwrap_or_else(|_| Err(anyhow!("its thread panicked"))));
        ended.collect::<Result<Vec<_>>>()
    })?;
    for (lot, (all, tries)) in lots.iter().zip(measured) {
        remarks.extend(tries);
        for one in all {
            if !bless {
                let (worse, note) = complaints(&snapshot, &one, lot.whole);
                failures.extend(worse);
                remarks.extend(note);
            }
            match one {
                (_, Ok(found)) => {
                    let loops = Loops::of(&found.figures);
                    let measured = MeasuredCounts { version: found.version.clone(), counts: loops.steady() };
                    counts += measured.counts.len() as u64;
                    took += found.took;
                    if bless {
                        snapshot.bless(&found.kernel, &found.cgroup, measured);
                    }
                    machines.push(MeasuredMachine { loops, found });
                }
                (name, Err(error)) if bless => failures.push(format!("{name}: {error:#}")),
                (_, Err(_)) => {}
            }
        }
    }
    if bless {
        std::fs::write(&path, snapshot.text()).with_context(|| format!("failed to write {}", path.display()))?;
        say(format_args!("wrote {}", Added::FILE));
    }
    let failed = failures.len() as u64;
    let tally = Tally { passed: counts.saturating_sub(failed), failed, skipped: 0 };
    Ok(InstructionCounts { chapter: chapter(&machines, &failures, bless), tally, failures, remarks, took })
}

/// Failures of one machine, a line each that begins with its name; and a remark, if there is one.
fn complaints(
    snapshot: &CountSnapshot<Added>,
    (name, found): &(String, Result<BenchFigures>),
    whole: bool,
) -> (Vec<String>, Option<String>) {
    let found = match found {
        Ok(found) => found,
        Err(error) => return (vec![format!("{name}: {error:#}")], None),
    };
    let measured = MeasuredCounts { version: found.version.clone(), counts: Loops::of(&found.figures).steady() };
    let expected = |name: &str| whole || PARTS.iter().any(|(what, _)| name.ends_with(&format!(" {what}")));
    let CountComparison { worse, note } = snapshot.compare(&found.kernel, &found.cgroup, &measured, expected);
    (worse.into_iter().map(|what| format!("{name}: {what}")).collect(), note.map(|note| format!("{name}: {note}")))
}

/// Whether a line of [`complaints`] is about this kernel of the matrix.
fn is_of(complaint: &str, kernel: &str) -> bool {
    let rest = complaint.strip_prefix(kernel);
    rest.is_some_and(|rest| {
        ["", "-v1", "-v2"].iter().any(|cgroup| {
            rest.strip_prefix(cgroup).is_some_and(|rest| rest.starts_with(": ") || rest.starts_with(" of "))
        })
    })
}

const TEXT: [&str; 4] = [
    "Emulated machines of one processor whose clock advances by a nanosecond an instruction (QEMU, `-icount \
     shift=0,sleep=off`): what a program measures in nanoseconds are the instructions that were executed, in the kernel and \
     outside, whatever the host is and does. Each loop does one operation over and over: touch a fresh page (4 KiB), map and \
     unmap 64 KiB, getpid, fork a child that exits, run /bin/true, read a page of a cached file; and a process in a cgroup of \
     8 MiB takes memory until it is killed, from its last page to when its parent knows.",
    "A cell is the mean of the middle half of the rounds with the agent less the same without: rounds are short, so that the \
     agent's own turns, ten a second, fall into few of them, and cost on the path of the operation is what is left. After ± is \
     what may be noise: three standard errors, or how far the loop differs from itself before and after all else. A kill \
     wakes the agent, which runs on the same processor: its own work on the incident is in that column. A hook's row is \
     the agent without stacks less the same without that hook: stacks are taken at random, and would blur it. Required hooks \
     cannot be left out.",
    "The last machine's kernel (`-of-64`) makes room for 64 processors, of which one is there: what more is added there is \
     what it takes to sum a counter over 64 slots.",
    "An instruction is no unit of time: a cache miss costs a hundred of them. What is left out: tracing by others on the same \
     hooks, which would share the cost of entering them.",
];

fn chapter(machines: &[MeasuredMachine], failures: &[String], bless: bool) -> Value {
    let mut operations: Vec<String> = machines.iter().flat_map(|machine| machine.loops.alone.keys().cloned()).collect();
    operations.sort();
    operations.dedup();
    let head =
        |first: &[&str]| first.iter().map(|text| (*text).to_owned()).chain(operations.clone()).collect::<Vec<_>>();
    let mut rows = Vec::new();
    for MeasuredMachine { found, loops } in machines {
        let alone = operations.iter().map(|operation| match loops.alone.get(operation) {
            Some(alone) => format!("{alone:.0}"),
            None => "not measured".to_owned(),
        });
        let row = |what: &str, cells: Vec<String>| {
            [found.kernel.clone(), what.to_owned()].into_iter().chain(cells).map(Value::String).collect::<Vec<_>>()
        };
        rows.push(row("the operation, untraced", alone.collect()));
        for (name, what) in PARTS {
            rows.push(row(&format!("added by {what}"), loops.row(name, &operations)));
        }
        let has = |name: &str| found.figures.pointer(&format!("/configurations/{name}")).is_some();
        let with_peers = PEERS.iter().any(|(name, _)| has(name));
        for (name, what) in PEERS.iter().filter(|_| with_peers) {
            let cells = match found.figures.pointer(&format!("/configurations/{name}/unknown")) {
                Some(why) => vec![json!({ "unknown": why }); operations.len()],
                None => loops.row(name, &operations).into_iter().map(Value::String).collect(),
            };
            rows.push([vec![json!(found.kernel), json!(format!("added by {what}"))], cells].concat());
        }
    }
    let mut tables = vec![json!({
        "title": "Instructions an operation", "columns": head(&["kernel", "instructions"]), "rows": rows,
    })];
    for MeasuredMachine { found, loops } in machines {
        let row = |hook: &&str| {
            let what = format!("{HOOK}{hook}");
            let measured = operations.iter().any(|operation| loops.added.contains_key(&format!("{operation} {what}")));
            measured.then(|| [vec![(*hook).to_owned()], loops.row(&what, &operations)].concat())
        };
        let rows: Vec<Vec<String>> = hooks(&found.figures).iter().filter_map(row).collect();
        if !rows.is_empty() {
            let title = format!("Hook by hook, Linux {} of Debian ({})", found.version, found.kernel);
            tables.push(json!({ "title": title, "columns": head(&["hook"]), "rows": rows }));
        }
    }
    let found = match (bless, failures) {
        (true, _) => "this run became the snapshot".to_owned(),
        (false, []) => "none".to_owned(),
        (false, some) => some.join("; "),
    };
    json!({
        "title": "Instructions that the agent adds, counted exactly",
        "text": TEXT,
        "tables": tables,
        "goals": [{
            "what": format!("No operation but {} takes more instructions than {} says", UNSTEADY.join(", "), Added::FILE),
            "found": found,
            "met": if bless { Value::Null } else { json!(failures.is_empty()) },
        }],
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_complaint_names_its_kernel() {
        assert!(is_of("6.1-v2: fault full: +9", "6.1") && is_of("sid: not to be had", "sid"));
        assert!(is_of("sid-v2 of 64: fault full: +9", "sid"));
        assert!(!is_of("5.10-old-v1: x", "5.10") && !is_of("6.12-v2: x", "6.1"));
    }

    #[test]
    fn a_machine_has_its_rows_and_a_table_of_its_hooks() {
        let took = |fault: f64| json!({ "fault": { "mean": fault, "error": 1.0 } });
        let figures = json!({
            "hooks": [{ "hook": "rss" }, { "hook": "fault" }],
            "configurations": {
                "none": took(7000.0), "full": took(7300.0), "no-stacks": took(7250.0), "required": took(7200.0),
                "without-fault": took(7210.0), "none-again": took(7000.0), "perf-record": { "unknown": "not here" },
            },
        });
        let found = BenchFigures {
            kernel: "6.1".to_owned(),
            cgroup: "v2".to_owned(),
            version: "6.1.192-2".to_owned(),
            took: Duration::ZERO,
            figures,
        };
        let machines = [MeasuredMachine { loops: Loops::of(&found.figures), found }];
        let chapter = chapter(&machines, &["6.1: fault full: more".to_owned()], false);
        let at = |pointer: &str| chapter.pointer(pointer).cloned().unwrap_or_default();
        assert_eq!(at("/tables/0/columns"), json!(["kernel", "instructions", "fault"]));
        assert_eq!(at("/tables/0/rows/0"), json!(["6.1", "the operation, untraced", "7000"]));
        assert_eq!(at("/tables/0/rows/1"), json!(["6.1", "added by memtrace at defaults", "+300 ± 4"]));
        assert_eq!(at("/tables/0/rows/4/2"), json!("not measured"));
        assert_eq!(at("/tables/0/rows/7/2/unknown"), json!("not here"));
        assert_eq!(at("/tables/1/rows"), json!([["fault", "+40 ± 4"]]));
        assert_eq!(at("/goals/0/met"), json!(false));
    }
}
