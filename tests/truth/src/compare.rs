//! Compares our stacks with those of perf's DWARF unwinder (elfutils), which records the same
//! faults of the same process. Pure: perf's output and a recording in, agreement out.

use std::collections::BTreeMap;
use std::fmt::Write;

use super::recording::{ReportedFrame, ReportedPath, ReportedRecording, ReportedSample};

/// Two samples further apart than this are not of one fault, nanoseconds. perf samples before the
/// page is there and memtrace counts it afterwards; perf's copy of the stack and the kernel's work
/// are in between.
const SAME_FAULT_NS: u64 = 100_000;

/// Differing stacks shown in full for each workload.
const SHOWN: usize = 3;

/// A stack that perf unwound.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct PerfStack {
    pid: u64,
    tid: u64,
    boot_ns: u64,
    frames: Vec<ComparedFrame>,
}

/// A frame as both sides know it, without functions inlined into it.
#[derive(Debug, Clone, Default)]
pub(crate) struct ComparedFrame {
    module: String,
    offset: u64,
    symbol: String,
}

impl PartialEq for ComparedFrame {
    /// By instruction: symbol names depend on who resolves them.
    fn eq(&self, other: &Self) -> bool {
        self.offset == other.offset && file_name(&self.module) == file_name(&other.module)
    }
}

impl Eq for ComparedFrame {}

fn file_name(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

/// Arguments of `perf script` for the output that [`stacks`] parses.
pub(crate) const SCRIPT: [&str; 6] =
    ["--ns", "--no-inline", "--max-stack", "1024", "-F", "comm,pid,tid,time,ip,sym,symoff,dso"];

/// Parses the output of `perf script`.
pub(crate) fn stacks(printed: &str) -> Vec<PerfStack> {
    let mut stacks: Vec<PerfStack> = Vec::new();
    let mut open = false;
    for line in printed.lines() {
        if line.trim().is_empty() {
            open = false;
        } else if !open && let Some(stack) = header(line) {
            stacks.push(stack);
            open = true;
        } else if let Some(stack) = stacks.last_mut()
            && let Some(step) = step(line)
        {
            stack.frames.push(step);
        }
    }
    stacks
}

/// Parses `comm pid/tid seconds.nanoseconds:`; `comm` may contain anything.
fn header(line: &str) -> Option<PerfStack> {
    let mut words = line.trim_end().strip_suffix(':')?.rsplit(' ').filter(|word| !word.is_empty());
    let (seconds, nanos) = words.next()?.split_once('.')?;
    let (pid, tid) = words.next()?.split_once('/')?;
    let nanos: u64 = (nanos.len() == 9).then(|| nanos.parse().ok())??;
    let boot_ns = seconds.parse::<u64>().ok()?.checked_mul(1_000_000_000)?.checked_add(nanos)?;
    Some(PerfStack { pid: pid.parse().ok()?, tid: tid.parse().ok()?, boot_ns, frames: Vec::new() })
}

/// Parses `offset symbol+0x1 (module)`. `None` for frames of the kernel.
fn step(line: &str) -> Option<ComparedFrame> {
    let (address, rest) = line.trim().split_once(' ')?;
    let offset = u64::from_str_radix(address, 16).ok().filter(|offset| offset >> 48 == 0)?;
    let (symbol, module) = rest.strip_suffix(')')?.rsplit_once(" (").unwrap_or(("", rest.strip_suffix(')')?));
    if module.starts_with("[kernel") {
        return None;
    }
    let symbol = symbol.rsplit_once("+0x").map_or(symbol, |(name, _)| name);
    Some(ComparedFrame { module: module.to_owned(), offset, symbol: symbol.to_owned() })
}

/// How far both sides agree.
#[derive(Debug, Default)]
pub(crate) struct Agreement {
    /// Number of our stacks.
    ours: usize,
    /// Number of perf's stacks.
    theirs: usize,
    /// How many of ours have one of perf's of the same fault.
    pub(crate) compared: usize,
    /// How many of those are equal in every frame.
    pub(crate) equal: usize,
    /// Frames compared: of each pair, as many as the longer stack has.
    frames: usize,
    equal_frames: usize,
    differing: Vec<(Vec<ComparedFrame>, Vec<ComparedFrame>, Option<String>)>,
}

/// Compares a recording with perf's stacks of the same run.
pub(crate) fn compare(recording: &ReportedRecording, theirs: &[PerfStack]) -> Agreement {
    let mut by_process: BTreeMap<u64, Vec<&PerfStack>> = BTreeMap::new();
    for stack in theirs {
        by_process.entry(stack.pid).or_default().push(stack);
    }
    for stacks in by_process.values_mut() {
        stacks.sort_by_key(|stack| stack.boot_ns);
    }
    let mut agreement = Agreement { theirs: theirs.len(), ..Agreement::default() };
    for (sample, path) in recording.touching() {
        let Some(stacks) = by_process.get(&path.pid) else { continue };
        agreement.ours += 1;
        let ours: Vec<ComparedFrame> = path.user().filter(|frame| !frame.inlined).map(ComparedFrame::of).collect();
        if let Some(theirs) = of_the_same_fault(sample, path, &ours, stacks) {
            agreement.add(ours, &theirs.frames, path.cut.clone());
        }
    }
    agreement
}

/// Finds perf's stack of the sample's fault: the last one at most [`SAME_FAULT_NS`] before the
/// sample; `stacks` are oldest first. The sample's thread is known unless it is given as the first
/// thread. Otherwise, if several threads fault at once, it is the last stack with the same
/// innermost frame.
fn of_the_same_fault<'a>(
    sample: &ReportedSample,
    path: &ReportedPath,
    ours: &[ComparedFrame],
    stacks: &[&'a PerfStack],
) -> Option<&'a PerfStack> {
    let before = stacks.partition_point(|stack| stack.boot_ns <= sample.boot_ns);
    let recent = stacks.get(..before)?.iter().rev().copied();
    let recent = recent.take_while(|stack| sample.boot_ns - stack.boot_ns <= SAME_FAULT_NS);
    let mut candidates = recent.filter(|stack| path.tid == path.pid || path.tid == stack.tid);
    let nearest = candidates.next()?;
    let same_place = |stack: &&PerfStack| stack.frames.first() == ours.first();
    if same_place(&nearest) { Some(nearest) } else { candidates.find(same_place).or(Some(nearest)) }
}

impl ComparedFrame {
    fn of(frame: &ReportedFrame) -> Self {
        Self {
            module: frame.module.clone().unwrap_or_default(),
            offset: frame.offset.unwrap_or(u64::MAX),
            symbol: frame.symbol.clone().unwrap_or_default(),
        }
    }

    fn shown(&self) -> String {
        let symbol = if self.symbol.is_empty() { "?" } else { &self.symbol };
        format!("{}+{:#x} {symbol}", file_name(&self.module), self.offset)
    }
}

impl Agreement {
    fn add(&mut self, ours: Vec<ComparedFrame>, theirs: &[ComparedFrame], cut: Option<String>) {
        self.compared += 1;
        self.frames += ours.len().max(theirs.len());
        self.equal_frames += ours.iter().zip(theirs).filter(|(a, b)| a == b).count();
        if ours == theirs {
            self.equal += 1;
        } else if self.differing.len() < SHOWN {
            self.differing.push((ours, theirs.to_vec(), cut));
        }
    }
}

fn percent(part: usize, whole: usize) -> String {
    if whole == 0 { "-".to_owned() } else { format!("{:.3}", part as f64 * 100.0 / whole as f64) }
}

/// The agreement as a Markdown section, and the number of stacks compared.
pub(crate) fn render(agreements: &[(&str, Agreement)]) -> (String, usize) {
    let mut text = "## Unwinding against perf's DWARF unwinder\n\n\
        The same runs under `memtrace record` and `perf record -e page-faults -c 1 --call-graph dwarf,32768`, paced so \
        that perf can follow. A stack of ours is compared with perf's last of the same process that is at most 100 µs \
        older (of several, the last whose innermost frame is the same, if there is one), frame by frame: module and file offset of the instruction, frames that are inlined left out. Stacks \
        without such a one (perf lost it) are not compared.\n\n\
        | workload | our stacks | perf's stacks | compared | equal | equal % | frames | equal frames % |\n\
        |---|---:|---:|---:|---:|---:|---:|---:|\n"
        .to_owned();
    let mut all = Agreement::default();
    for (name, agreement) in agreements {
        let _ = writeln!(text, "{}", line(name, agreement));
        all.ours += agreement.ours;
        all.theirs += agreement.theirs;
        all.compared += agreement.compared;
        all.equal += agreement.equal;
        all.frames += agreement.frames;
        all.equal_frames += agreement.equal_frames;
    }
    let _ = writeln!(text, "{}", line("all", &all));
    for (name, agreement) in agreements {
        for (ours, theirs, cut) in &agreement.differing {
            let cut = cut.as_ref().map_or_else(String::new, |cut| format!(" (cut: {cut})"));
            let _ = writeln!(text, "\nOne that differs, of {name}{cut}:\n\n```text");
            for index in 0..ours.len().max(theirs.len()) {
                let (a, b) = (ours.get(index), theirs.get(index));
                let mark = if a == b { ' ' } else { '!' };
                let shown = |step: Option<&ComparedFrame>| step.map_or_else(|| "-".to_owned(), ComparedFrame::shown);
                let _ = writeln!(text, "{mark} {index:>3} {:<56} {}", shown(a), shown(b));
            }
            let _ = writeln!(text, "```");
        }
    }
    (text, all.compared)
}

fn line(name: &str, agreement: &Agreement) -> String {
    let Agreement { ours, theirs, compared, equal, frames, equal_frames, .. } = agreement;
    format!(
        "| {name} | {ours} | {theirs} | {compared} | {equal} | {} | {frames} | {} |",
        percent(*equal, *compared),
        percent(*equal_frames, *frames)
    )
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::recording::tests::report;
    use super::*;

    const PRINTED: &str = "\
x y (z)  7/7   0.000000001: 
\tffffffffa1234567 handle_mm_fault+0x1 ([kernel.kallsyms])
\t            1100 inner_touch+0x10 (/elsewhere/x)
\t            1200 outer_touch(int, std::pair<int, int>)+0x2 (/bin/x)
\t            1020 [unknown] (/bin/x)

x y 7/8 14883.164716816: 
\t            1300 outer_touch+0x1 (/bin/x)
";

    #[test]
    fn what_perf_prints_is_read() {
        let stacks = stacks(PRINTED);
        assert_eq!(stacks.len(), 2);
        assert_eq!((stacks[0].tid, stacks[0].boot_ns, stacks[0].frames.len()), (7, 1, 3));
        assert_eq!(stacks[0].frames[1].symbol, "outer_touch(int, std::pair<int, int>)");
        assert_eq!(stacks[0].frames[2].module, "/bin/x");
        assert_eq!((stacks[1].tid, stacks[1].boot_ns), (8, 14_883_164_716_816));
        assert!(super::stacks("nonsense\n\tmore nonsense\n").is_empty());
    }

    #[test]
    fn stacks_of_one_fault_are_compared_frame_by_frame() {
        let recording = ReportedRecording::of(&report()).unwrap();
        let agreement = compare(&recording, &stacks(PRINTED));
        // two samples of thread 7 follow perf's; thread 8's are hours apart
        assert_eq!((agreement.ours, agreement.compared, agreement.equal), (3, 2, 2));
        assert_eq!((agreement.frames, agreement.equal_frames), (6, 6));
    }

    #[test]
    fn of_threads_that_fault_at_once_the_one_in_the_same_place_is_taken() {
        let printed = "a 7/9 0.000000000:\n\t1100 inner_touch (/bin/x)\n\nb 7/8 0.000000001:\n\t4444 other (/bin/x)\n";
        let stacks = stacks(printed);
        let recording = ReportedRecording::of(&report()).unwrap();
        // two of the first thread, or of none known; one of thread 8
        let agreement = compare(&recording, &stacks);
        assert_eq!((agreement.ours, agreement.compared, agreement.equal, agreement.equal_frames), (3, 3, 0, 2));
    }

    #[test]
    fn a_difference_is_counted_and_shown() {
        let mut other = report();
        other["allocation_paths"][0]["frames"][3]["offset"] = json!(0x1204);
        let agreement = compare(&ReportedRecording::of(&other).unwrap(), &stacks(PRINTED));
        assert_eq!((agreement.compared, agreement.equal, agreement.equal_frames), (2, 0, 4));
        let (text, compared) = render(&[("x", agreement)]);
        assert_eq!(compared, 2);
        assert!(text.contains("!   1 x+0x1204 outer_touch"), "{text}");
        assert!(text.contains("| all | 3 | 2 | 2 | 0 | 0.000 | 6 | 66.667 |"), "{text}");
    }
}
