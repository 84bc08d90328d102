//! Reads a recording as `memtrace report --format json` prints it: its stacks, and how much each
//! function grew. Pure.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail};
use serde_json::Value;

/// The parts of a recording that are compared with the truth.
pub(crate) struct ReportedRecording {
    /// Growth of resident memory, bytes.
    pub(crate) growth: u64,
    /// Part of the growth that has a stack, bytes.
    pub(crate) attributed: u64,
    /// Growth without a stack: (reason, bytes).
    pub(crate) unattributed: Vec<(String, u64)>,
    /// Stacks left out because of the budget.
    pub(crate) thinned: u64,
    /// Samples merged into a neighbour; the time of such a sample is the neighbour's.
    pub(crate) joined: u64,
    /// Allocation paths of any cause.
    pub(crate) paths: Vec<ReportedPath>,
    /// Samples, oldest first.
    pub(crate) samples: Vec<ReportedSample>,
}

/// A stack that grew memory.
pub(crate) struct ReportedPath {
    /// Whether its cause is the first touch of a page; otherwise a mapping of address space.
    pub(crate) touch: bool,
    pub(crate) pid: u64,
    pub(crate) tid: u64,
    /// Frames, innermost first.
    pub(crate) frames: Vec<ReportedFrame>,
    /// Why unwinding stopped early; `None` for a complete stack.
    pub(crate) cut: Option<String>,
}

#[derive(Clone, Default)]
pub(crate) struct ReportedFrame {
    pub(crate) module: Option<String>,
    /// Offset of the instruction in the module's file.
    pub(crate) offset: Option<u64>,
    pub(crate) symbol: Option<String>,
    pub(crate) inlined: bool,
    pub(crate) kernel: bool,
}

pub(crate) struct ReportedSample {
    pub(crate) boot_ns: u64,
    /// Index of its path; `None` for a sample without a stack.
    pub(crate) path: Option<usize>,
    pub(crate) weight: u64,
}

/// What a workload reports about itself.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Truth {
    /// Bytes by function; each byte counts for the innermost function of this list on the stack.
    pub(crate) touch: BTreeMap<String, u64>,
    /// Bytes that a function or its callees touched.
    pub(crate) within: BTreeMap<String, u64>,
}

/// What a recording attributes to one function.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct FunctionGrowth {
    pub(crate) bytes: u64,
    pub(crate) samples: u64,
    /// Number of these samples whose stack reaches the outermost frame.
    pub(crate) outermost: u64,
}

impl Truth {
    /// Parses the last line of JSON that a workload printed.
    pub(crate) fn of(printed: &str) -> Result<Self> {
        let line = printed.lines().rev().find(|line| line.starts_with('{')).context("the workload told no truth")?;
        let told: Value = serde_json::from_str(line).with_context(|| format!("the workload told {line}"))?;
        let list = |name: &str| -> BTreeMap<String, u64> {
            let entries = told.get(name).and_then(Value::as_object).into_iter().flatten();
            entries.filter_map(|(name, bytes)| Some((name.clone(), bytes.as_u64()?))).collect()
        };
        let truth = Self { touch: list("touch"), within: list("within") };
        if truth.touch.is_empty() {
            bail!("the workload told no function: {line}");
        }
        Ok(truth)
    }
}

impl ReportedRecording {
    /// Reads the report's JSON. Fails if samples and paths do not fit together.
    pub(crate) fn of(report: &Value) -> Result<Self> {
        let number = |pointer: &str| {
            report.pointer(pointer).and_then(Value::as_u64).with_context(|| format!("the recording has no {pointer}"))
        };
        let column = |name: &str| {
            let pointer = format!("/allocations/samples/{name}");
            let column = report.pointer(&pointer).and_then(Value::as_array);
            column.with_context(|| format!("the recording has no {pointer}: were stacks taken?"))
        };
        let (times, indices, weights) = (column("boot_ns")?, column("path")?, column("weight_bytes")?);
        if times.len() != indices.len() || times.len() != weights.len() {
            bail!(
                "columns of samples differ: {} times, {} paths, {} weights",
                times.len(),
                indices.len(),
                weights.len()
            );
        }
        let paths = report.pointer("/allocation_paths").and_then(Value::as_array).context("no allocation_paths")?;
        let mut samples = Vec::with_capacity(times.len());
        for ((time, index), weight) in times.iter().zip(indices).zip(weights) {
            let path = index.as_u64().map(usize::try_from).transpose().context("a path's index is too large")?;
            if path.is_some_and(|path| path >= paths.len()) || (path.is_none() && !index.is_null()) {
                bail!("a sample names path {index}, there are {}", paths.len());
            }
            let numbers = time.as_u64().zip(weight.as_u64());
            let (boot_ns, weight) = numbers.with_context(|| format!("a sample at {time} of {weight} bytes"))?;
            samples.push(ReportedSample { boot_ns, path, weight });
        }
        let parts = report.pointer("/allocations/unattributed").and_then(Value::as_array).into_iter().flatten();
        let part = |part: &Value| Some((part.get("why")?.as_str()?.to_owned(), part.get("bytes")?.as_u64()?));
        Ok(Self {
            growth: number("/allocations/growth_bytes")?,
            attributed: number("/allocations/attributed_bytes")?,
            unattributed: parts.filter_map(part).collect(),
            thinned: number("/allocations/thinned")?,
            joined: number("/allocations/joined")?,
            paths: paths.iter().map(ReportedPath::of).collect(),
            samples,
        })
    }

    /// Growth without a stack, bytes.
    pub(crate) fn unattributed_bytes(&self) -> u64 {
        self.unattributed.iter().map(|(_, bytes)| bytes).sum()
    }

    /// Sums that do not add up, a sentence each.
    pub(crate) fn contradictions(&self) -> Vec<String> {
        let mut found = Vec::new();
        let Self { growth, attributed, .. } = self;
        let without = self.unattributed_bytes();
        if attributed + without != *growth {
            found.push(format!("attributed {attributed} and unattributed {without} are not the growth of {growth}"));
        }
        let weights: u64 = self.touching().map(|(sample, _)| sample.weight).sum();
        if weights != *attributed {
            found.push(format!("the samples with a stack weigh {weights}, attributed are {attributed}"));
        }
        let bare: u64 = self.samples.iter().filter(|sample| sample.path.is_none()).map(|sample| sample.weight).sum();
        if bare != without {
            found.push(format!("the samples without a stack weigh {bare}, unattributed are {without}"));
        }
        found
    }

    /// Samples of resident memory that have a stack, with their paths.
    pub(crate) fn touching(&self) -> impl Iterator<Item = (&ReportedSample, &ReportedPath)> {
        let with_path = |sample| Some((sample, self.paths.get(sample_path(sample)?)?));
        self.samples.iter().filter_map(with_path).filter(|(_, path)| path.touch)
    }

    /// Sums up the samples by the functions of the truth. `entry` returns the file offset of a
    /// module's entry point.
    pub(crate) fn found(&self, truth: &Truth, entry: &mut dyn FnMut(&str) -> Option<u64>) -> GrowthSums {
        let mut sums = GrowthSums::default();
        for (sample, path) in self.touching() {
            let found = FunctionGrowth { bytes: sample.weight, samples: 1, outermost: u64::from(path.is_whole(entry)) };
            sums.all.add(found);
            if let Some(name) = path.innermost(&truth.touch) {
                sums.touch.entry(name.to_owned()).or_default().add(found);
            }
            for name in truth.within.keys().filter(|name| path.user().any(|frame| frame.is(name))) {
                sums.within.entry(name.clone()).or_default().add(found);
            }
            if let Some(cut) = &path.cut {
                *sums.cuts.entry(cut.clone()).or_default() += 1;
            }
        }
        sums
    }
}

fn sample_path(sample: &ReportedSample) -> Option<usize> {
    sample.path
}

/// Sums over one recording.
#[derive(Default)]
pub(crate) struct GrowthSums {
    pub(crate) touch: BTreeMap<String, FunctionGrowth>,
    pub(crate) within: BTreeMap<String, FunctionGrowth>,
    /// All samples that have a stack.
    pub(crate) all: FunctionGrowth,
    /// Number of samples by the reason why their stack was cut.
    pub(crate) cuts: BTreeMap<String, u64>,
}

impl FunctionGrowth {
    fn add(&mut self, more: Self) {
        self.bytes += more.bytes;
        self.samples += more.samples;
        self.outermost += more.outermost;
    }
}

/// Functions in which a thread or process begins, by symbol.
const OUTERMOST: [&str; 5] = ["_start", "__clone3", "clone3", "__clone", "clone"];

/// Length of the code at a module's entry point, bytes; an upper bound.
const ENTRY_CODE: u64 = 96;

impl ReportedPath {
    fn of(path: &Value) -> Self {
        let number = |pointer: &str| path.pointer(pointer).and_then(Value::as_u64).unwrap_or_default();
        let text = |value: &Value, name: &str| value.get(name).and_then(Value::as_str).map(str::to_owned);
        let flag = |value: &Value, name: &str| value.get(name).and_then(Value::as_bool).unwrap_or_default();
        let frames = path.get("frames").and_then(Value::as_array).into_iter().flatten();
        let frame = |frame: &Value| ReportedFrame {
            module: text(frame, "module"),
            offset: frame.get("offset").and_then(Value::as_u64),
            symbol: text(frame, "symbol"),
            inlined: flag(frame, "inlined"),
            kernel: flag(frame, "kernel"),
        };
        Self {
            touch: path.get("cause").and_then(Value::as_str) == Some("touch"),
            pid: number("/process/pid"),
            tid: number("/process/tid"),
            frames: frames.map(frame).collect(),
            cut: text(path, "cut"),
        }
    }

    /// Its frames outside the kernel, innermost first.
    pub(crate) fn user(&self) -> impl DoubleEndedIterator<Item = &ReportedFrame> {
        self.frames.iter().filter(|frame| !frame.kernel)
    }

    /// The innermost of these functions on the stack; of several that match one frame, the longest
    /// name.
    fn innermost<'a>(&self, names: &'a BTreeMap<String, u64>) -> Option<&'a str> {
        let in_frame = |frame: &ReportedFrame| names.keys().filter(|name| frame.is(name)).max_by_key(|name| name.len());
        self.user().find_map(in_frame).map(String::as_str)
    }

    /// Whether the stack is not cut and ends where a process or thread begins. The end is checked
    /// because an uncut stack might still have stopped early.
    fn is_whole(&self, entry: &mut dyn FnMut(&str) -> Option<u64>) -> bool {
        let mut outward = self.user().rev();
        let Some(last) = outward.next() else { return false };
        if self.cut.is_some() {
            return false;
        }
        match (&last.symbol, &last.module, last.offset) {
            (Some(symbol), ..) if OUTERMOST.contains(&symbol.as_str()) || symbol.starts_with("runtime.goexit") => true,
            (Some(symbol), ..) if symbol.starts_with("runtime.mstart") || symbol.starts_with("runtime.rt0_go") => true,
            (_, Some(module), Some(offset)) => {
                let entered = entry(module).is_some_and(|entry| (entry..entry + ENTRY_CODE).contains(&offset));
                // A stripped C library has no symbol where it starts threads. No other stack ends
                // in two nameless frames of libc: the only other caller of user code is the one
                // that calls `main`, and its caller is exported.
                let nameless = |frame: &ReportedFrame| {
                    frame.module.as_ref().is_some_and(|module| module.contains("/libc.so."))
                        && frame.symbol.as_ref().is_none_or(|symbol| symbol == "start_thread")
                };
                entered || (nameless(last) && outward.next().is_some_and(nameless))
            }
            _ => false,
        }
    }
}

impl ReportedFrame {
    fn is(&self, name: &str) -> bool {
        self.symbol.as_ref().is_some_and(|symbol| symbol.contains(name))
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use serde_json::json;

    use super::*;

    /// Two touch paths, one path of address space, one sample without a path.
    pub(crate) fn report() -> Value {
        let frame = |module: &str, offset: u64, symbol: Option<&str>, inlined: bool, kernel: bool| {
            json!({ "module": if kernel { Value::Null } else { json!(module) }, "build_id": null, "offset": offset,
                "symbol": symbol, "file": null, "line": null, "inlined": inlined, "kernel": kernel })
        };
        let path = |cause: &str, tid: u64, frames: Vec<Value>, cut: Value| {
            json!({ "weight_bytes": 1, "cause": cause, "process": { "pid": 7, "tid": tid, "comm": "x" },
                "frames": frames, "cut": cut, "mapped_by": null })
        };
        let start = || frame("/bin/x", 0x1020, None, false, false);
        json!({
            "allocation_paths": [
                path("touch", 7, vec![
                    frame("", 1, Some("handle_mm_fault"), false, true),
                    frame("/bin/x", 0x1100, Some("dirty"), true, false),
                    frame("/bin/x", 0x1100, Some("inner_touch"), false, false),
                    frame("/bin/x", 0x1200, Some("outer_touch"), false, false),
                    start(),
                ], Value::Null),
                path("touch", 8, vec![
                    frame("/bin/x", 0x1300, Some("ns::outer_touch(int)"), false, false),
                ], json!("unwind")),
                path("map", 7, vec![frame("/bin/x", 0x1100, Some("inner_touch"), false, false), start()], Value::Null),
            ],
            "allocations": {
                "growth_bytes": 1100, "attributed_bytes": 1000, "unattributed": [{ "why": "thinned", "bytes": 100 }],
                "sample_bytes": 64, "thinned": 2, "joined": 0,
                "samples": { "boot_ns": [1, 2, 3, 4, 5], "path": [0, 1, null, 0, 2],
                    "weight_bytes": [300, 600, 100, 100, 4096] },
            },
        })
    }

    fn truth() -> Truth {
        Truth::of("noise\n{\"workload\": \"x\", \"touch\": {\"inner_touch\": 400, \"outer_touch\": 600}, \"within\": {\"outer_touch\": 1000}}\n")
            .unwrap()
    }

    #[test]
    fn bytes_are_the_innermost_functions() {
        let recording = ReportedRecording::of(&report()).unwrap();
        assert_eq!(recording.contradictions(), Vec::<String>::new());
        let sums = recording.found(&truth(), &mut |module| (module == "/bin/x").then_some(0x1000));
        assert_eq!(sums.touch["inner_touch"], FunctionGrowth { bytes: 400, samples: 2, outermost: 2 });
        assert_eq!(sums.touch["outer_touch"], FunctionGrowth { bytes: 600, samples: 1, outermost: 0 });
        assert_eq!(sums.within["outer_touch"], FunctionGrowth { bytes: 1000, samples: 3, outermost: 2 });
        assert_eq!(sums.all, FunctionGrowth { bytes: 1000, samples: 3, outermost: 2 });
        assert_eq!(sums.cuts, BTreeMap::from([("unwind".to_owned(), 1)]));
    }

    #[test]
    fn a_stack_is_whole_when_it_is_seen_to_be() {
        let recording = ReportedRecording::of(&report()).unwrap();
        // not cut, but its last frame is not an entry point
        let sums = recording.found(&truth(), &mut |_| Some(0x2000));
        assert_eq!(sums.all.outermost, 0);
        let mut named = report();
        named["allocation_paths"][0]["frames"][4]["symbol"] = json!("_start");
        let sums = ReportedRecording::of(&named).unwrap().found(&truth(), &mut |_| None);
        assert_eq!(sums.all.outermost, 2);
        // a thread in a C library without symbols; and one whose stack stops short of it
        let mut thread = report();
        for at in [3, 4] {
            thread["allocation_paths"][0]["frames"][at]["module"] = json!("/lib/libc.so.6");
            thread["allocation_paths"][0]["frames"][at]["symbol"] = Value::Null;
        }
        let outermost =
            |report: &Value| ReportedRecording::of(report).unwrap().found(&truth(), &mut |_| None).all.outermost;
        assert_eq!(outermost(&thread), 2);
        thread["allocation_paths"][0]["frames"][3]["module"] = json!("/bin/x");
        assert_eq!(outermost(&thread), 0);
    }

    #[test]
    fn what_does_not_add_up_is_said() {
        let mut wrong = report();
        wrong["allocations"]["attributed_bytes"] = json!(900);
        assert_eq!(ReportedRecording::of(&wrong).unwrap().contradictions().len(), 2);
        let mut wrong = report();
        wrong["allocations"]["samples"]["weight_bytes"][2] = json!(99);
        assert_eq!(ReportedRecording::of(&wrong).unwrap().contradictions().len(), 1);
    }

    #[test]
    fn a_recording_without_stacks_or_with_a_broken_table_is_refused() {
        assert!(ReportedRecording::of(&json!({ "allocation_paths": [] })).is_err());
        let mut broken = report();
        broken["allocations"]["samples"]["path"][0] = json!(3);
        assert!(ReportedRecording::of(&broken).is_err());
        let mut broken = report();
        broken["allocations"]["samples"]["boot_ns"].as_array_mut().unwrap().pop();
        assert!(ReportedRecording::of(&broken).is_err());
    }

    #[test]
    fn a_workload_without_truth_is_refused() {
        assert!(Truth::of("nothing").is_err());
        assert!(Truth::of("{\"touch\": {}}").is_err());
        assert_eq!(truth().touch["inner_touch"], 400);
    }
}
