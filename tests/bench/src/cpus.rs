//! Benchmark `cpus`: in machines with many CPUs, is the agent's sum over all CPUs right, and how
//! much memory does it hold.

use anyhow::Result;
use serde_json::{Value, json};

use memtrace_harness::built::Built;
use memtrace_harness::checkout::Checkout;
use memtrace_vm::Processors;
use memtrace_vm::Slots;
use memtrace_vm::{BenchFigures, BenchTask};

/// 6.1 counts resident memory per thread, the others per CPU.
const KERNELS: [&str; 3] = ["6.1", "6.12", "sid"];
/// Largest error allowed for an idle process, bytes: an address space is reported when it has moved
/// by this much.
const QUANTUM: u64 = 256 << 10;

/// Boots the machines and makes the chapter.
pub(crate) fn chapter(checkout: &Checkout, built: &Built, quick: bool) -> Result<Value> {
    let (mut rows, mut off) = (Vec::new(), Vec::new());
    for (processors, memory) in [(8, 2048), (64, 4096)].into_iter().take(if quick { 1 } else { 2 }) {
        let name = format!("cpus-{processors}");
        let task = BenchTask {
            name: &name,
            arguments: "spread",
            // emulating 64 CPUs takes hours of CPU time, so there the newest kernel stands for the
            // others
            kernels: if processors > 8 || quick { KERNELS.get(2..).unwrap_or_default() } else { &KERNELS },
            borrowed: &[],
            processors: Processors::Many(processors),
            memory,
            slots: &Slots::new(Some(1)),
        };
        for (name, found) in task.run(checkout, built)? {
            match found {
                Ok(found) => {
                    off.push(found.figures.get("worst_off_walked").and_then(Value::as_u64));
                    rows.push(row(&found));
                }
                Err(error) => {
                    off.push(None);
                    let unknown = || json!({ "unknown": "see the first column" });
                    let mut row = vec![json!(format!("{name}: {error:#}")), json!(processors.to_string())];
                    row.extend(std::iter::repeat_with(unknown).take(COLUMNS.len() - 2));
                    rows.push(json!(row));
                }
            }
        }
    }
    let worst = off.iter().copied().collect::<Option<Vec<u64>>>().and_then(|off| off.into_iter().max());
    Ok(json!({
        "title": "Many processors: is the sum over all of them right",
        "text": [
            "Emulated machines of 8 and 64 processors (QEMU on the host's own few: for correctness, not for time). A process \
             with a thread bound to each processor takes 40 MiB of anonymous, 16 MiB of file and 8 MiB of shared memory, each \
             thread its share, and stands still; then a parent and its forked child, each of its own. Three times in each \
             of three rounds, the agent's view of the process is held against a walk of its page tables \
             (/proc/PID/smaps_rollup), and for comparison against the counts of /proc/PID/status, which kernels 6.2 to 6.16 \
             give without what each processor has yet to add. Up to 6.1 each thread keeps up to 64 faults to itself, which neither \
             the kernel's counts nor the agent's have. Maps are as the kernel counts them \
             (`memlock` in /proc/PID/fdinfo), those that the agent holds open.",
        ],
        "tables": [{ "title": "", "columns": COLUMNS, "rows": rows }],
        "goals": [{
            "what": "Recorded resident memory of a quiet process is within a quantum (256 KiB) of its page tables, on 8 and 64 processors",
            "found": worst.map_or_else(|| "not all machines ran".to_owned(), |worst| format!("worst {} KiB", worst >> 10)),
            "met": worst.map(|worst| worst <= QUANTUM),
        }],
    }))
}

const COLUMNS: [&str; 8] = [
    "kernel",
    "processors",
    "looks",
    "worst difference from page tables",
    "from /proc/PID/status",
    "agent, resident",
    "agent, maps",
    "boot to end",
];

fn row(found: &BenchFigures) -> Value {
    let number = |pointer: &str| found.figures.pointer(pointer).and_then(Value::as_f64);
    let exactly = |value: Option<f64>, unit: &str| match value {
        Some(value) => json!({ "median": value, "least": value, "most": value, "unit": unit }),
        None => json!({ "unknown": "not measured" }),
    };
    let figure = |pointer: &str, unit: &str| exactly(number(pointer), unit);
    let kib = |pointer: &str| exactly(number(pointer).map(|bytes| bytes / 1024.0), "KiB");
    json!([
        format!("{} ({})", found.kernel, found.version),
        figure("/cpus", ""),
        figure("/looks", ""),
        kib("/worst_off_walked"),
        kib("/worst_off_status"),
        figure("/agent/rss_bytes", "bytes"),
        figure("/agent/map_bytes", "bytes"),
        exactly(Some(found.took.as_secs() as f64), "s"),
    ])
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn what_was_not_measured_is_unknown() {
        let found = BenchFigures {
            kernel: "sid".to_owned(),
            cgroup: "v2".to_owned(),
            version: "7.2".to_owned(),
            figures: json!({ "cpus": 8, "looks": 27, "worst_off_walked": 0, "agent": { "rss_bytes": 5 } }),
            took: Duration::from_secs(70),
        };
        let row = row(&found);
        assert_eq!(row.as_array().map(Vec::len), Some(COLUMNS.len()));
        assert_eq!(row.pointer("/3/median"), Some(&json!(0.0)));
        assert_eq!(row.pointer("/6/unknown"), Some(&json!("not measured")));
    }
}
