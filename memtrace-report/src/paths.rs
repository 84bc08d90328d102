//! Allocation paths weighed in a window and grouped by the function to blame; shared by all formats
//! that show them.
//!
//! The incident stores each path once, and samples (time, path, bytes) that refer to it. So any
//! window can be weighed afterwards: the last 100 ms of a burst are `GrowthWindow::before(incident,
//! 100 ms)`. Growth that has no path is kept apart as "without a stack", and all parts add up to
//! the growth.

use std::collections::HashMap;

use memtrace_incident::{AllocationPath, Cause, Frame, Incident, Kind};

use super::frames::{self, CodeOwner};

/// Paths that are grouped into culprits, of those in a file. memtrace writes at most 2048; a file
/// from elsewhere may hold more, and those are ignored.
const MAX_PATHS: usize = 4096;
/// Reasons for growth without a stack; the bytes of more go to "reason not known".
const MAX_REASONS: usize = 64;
/// Functions of a caller chain; the outermost and the innermost ones are kept.
const MAX_CHAIN: usize = 6;
/// Callers of an inlined closure that are searched for its full name.
const CLOSURE_CALLERS: usize = 4;

/// A part of the boot clock whose growth is weighed; both ends belong to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GrowthWindow {
    /// First nanosecond, on the boot clock of the incident's host.
    pub from_ns: u64,
    /// Last nanosecond, on the same clock.
    pub until_ns: u64,
}

impl GrowthWindow {
    /// Every sample of the file, and paths of files that have no samples.
    pub const WHOLE: Self = Self { from_ns: 0, until_ns: u64::MAX };

    /// The last `span_ns` up to the event; of a recording, up to its highest usage.
    pub fn before(incident: &Incident, span_ns: u64) -> Self {
        let until_ns = anchor(incident);
        Self { from_ns: until_ns.saturating_sub(span_ns), until_ns }
    }

    fn contains(&self, boot_ns: u64) -> bool {
        (self.from_ns..=self.until_ns).contains(&boot_ns)
    }
}

/// The boot-clock time that windows end at: the event; for a recording the highest usage of its
/// curve, else its end.
pub(super) fn anchor(incident: &Incident) -> u64 {
    if incident.kind != Kind::Recording {
        return incident.at.boot_ns;
    }
    let columns = &incident.timeline.columns;
    let readings = columns.boot_ns.iter().zip(&columns.usage_bytes);
    let mut highest = None;
    for (boot_ns, usage) in readings {
        let Some(usage) = usage else { continue };
        if highest.is_none_or(|(most, _)| *usage > most) {
            highest = Some((*usage, *boot_ns));
        }
    }
    highest.map_or(incident.at.boot_ns, |(_, boot_ns)| boot_ns)
}

/// Bytes in a window for each path of `allocation_paths`; 0 for paths of other causes.
pub(super) fn weights(incident: &Incident, window: &GrowthWindow, cause: Cause) -> Vec<u64> {
    let of_cause = |path: &AllocationPath| path.cause == cause;
    let Some(allocations) = &incident.allocations else {
        let whole = *window == GrowthWindow::WHOLE;
        let weight = |path: &AllocationPath| if whole && of_cause(path) { path.weight_bytes } else { 0 };
        return incident.allocation_paths.iter().map(weight).collect();
    };
    let mut weights = vec![0u64; incident.allocation_paths.len()];
    for (boot_ns, path, weight) in allocations.samples.rows() {
        let Some(at) = path.and_then(|path| usize::try_from(path).ok()) else { continue };
        let (Some(path), Some(sum)) = (incident.allocation_paths.get(at), weights.get_mut(at)) else { continue };
        if of_cause(path) && window.contains(boot_ns) {
            *sum = sum.saturating_add(weight);
        }
    }
    weights
}

/// Growth of resident memory in a window that has no stack, bytes. Samples that refer to a path
/// the file does not hold count as such.
pub(super) fn without_stack(incident: &Incident, window: &GrowthWindow) -> u64 {
    let Some(allocations) = &incident.allocations else { return 0 };
    let known = |path: u32| usize::try_from(path).is_ok_and(|path| path < incident.allocation_paths.len());
    (allocations.samples.rows())
        .filter(|(boot_ns, path, _)| window.contains(*boot_ns) && !path.is_some_and(known))
        .fold(0, |sum, (_, _, weight)| sum.saturating_add(weight))
}

/// Growth without a stack by reason, bytes. Samples carry no reason, so only the whole window is
/// split; a shorter one is all "reason not known".
pub(super) fn without_stack_by_reason(incident: &Incident, window: &GrowthWindow) -> Vec<(String, u64)> {
    let mut left = without_stack(incident, window);
    let mut reasons = Vec::new();
    if *window == GrowthWindow::WHOLE {
        for part in incident.allocations.iter().flat_map(|allocations| &allocations.unattributed).take(MAX_REASONS) {
            let bytes = part.bytes.min(left);
            left -= bytes;
            reasons.push((part.why.clone(), bytes));
        }
    }
    reasons.push(("reason not known".to_owned(), left));
    reasons.retain(|(_, bytes)| *bytes > 0);
    reasons
}

/// A boot-clock time as nanoseconds since 1970; `None` if the file's wall time cannot be parsed.
pub(super) fn wall_ns(incident: &Incident, boot_ns: u64) -> Option<i64> {
    let at = incident.at.wall.parse::<jiff::Timestamp>().ok()?;
    let before = i128::from(incident.at.boot_ns) - i128::from(boot_ns);
    i64::try_from(at.as_nanosecond() - before).ok()
}

/// A function of the program, and the growth it is blamed for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Culprit<'a> {
    /// Short name of the function; not escaped.
    pub name: String,
    /// Source file and line of the heaviest path.
    pub place: Option<String>,
    /// Bytes in each of the windows given to [`culprits`].
    pub bytes: Vec<u64>,
    /// The path with most bytes in the last window.
    pub path: &'a AllocationPath,
    /// Number of paths grouped here.
    pub paths: usize,
    /// Bytes of paths that are cut, in the last window.
    pub cut_bytes: u64,
}

/// Groups paths by function, source file and process name. Sorted by bytes in the last window,
/// heaviest first, then by those in the windows before it. Cap: [`MAX_PATHS`].
pub(super) fn culprits<'a>(incident: &'a Incident, windows: &[GrowthWindow], cause: Cause) -> Vec<Culprit<'a>> {
    let weights: Vec<Vec<u64>> = windows.iter().map(|window| weights(incident, window, cause)).collect();
    let mut found: HashMap<(String, Option<&str>, &str), (Culprit<'a>, u64)> = HashMap::new();
    for (at, path) in incident.allocation_paths.iter().enumerate().take(MAX_PATHS) {
        let bytes: Vec<u64> = weights.iter().map(|of| of.get(at).copied().unwrap_or(0)).collect();
        if bytes.iter().all(|bytes| *bytes == 0) {
            continue;
        }
        let most = bytes.last().copied().unwrap_or(0);
        let frame = culprit(path);
        let name = name(path);
        let file = frame.and_then(|frame| frame.file.as_deref());
        let cut_bytes = if path.cut.is_some() { most } else { 0 };
        let new = || {
            let bytes = vec![0; windows.len()];
            (Culprit { name: name.clone(), place: None, bytes, path, paths: 0, cut_bytes: 0 }, 0)
        };
        let key = (name.clone(), file, path.process.comm.as_str());
        let (culprit, heaviest) = found.entry(key).or_insert_with(new);
        for (sum, bytes) in culprit.bytes.iter_mut().zip(&bytes) {
            *sum = sum.saturating_add(*bytes);
        }
        culprit.paths += 1;
        culprit.cut_bytes = culprit.cut_bytes.saturating_add(cut_bytes);
        if culprit.paths == 1 || most > *heaviest {
            (*heaviest, culprit.path, culprit.place) = (most, path, frame.and_then(place));
        }
    }
    let mut culprits: Vec<Culprit<'a>> = found.into_values().map(|(culprit, _)| culprit).collect();
    culprits.sort_by(|one, other| {
        let by = |culprit: &Culprit<'_>| culprit.bytes.iter().rev().copied().collect::<Vec<u64>>();
        by(other).cmp(&by(one)).then_with(|| (&one.name, &one.place).cmp(&(&other.name, &other.place)))
    });
    culprits
}

/// The frame to blame: the innermost of the program, else the innermost of a crate it uses.
pub(super) fn culprit(path: &AllocationPath) -> Option<&Frame> {
    culprit_at(path).and_then(|at| path.frames.get(at))
}

fn culprit_at(path: &AllocationPath) -> Option<usize> {
    let of = |wanted: CodeOwner| path.frames.iter().position(|frame| frames::code_owner(frame) == wanted);
    of(CodeOwner::Program).or_else(|| of(CodeOwner::Dependency))
}

/// Short name of the function to blame; for a path without one, of what it is grouped under. Not
/// escaped.
pub(super) fn name(path: &AllocationPath) -> String {
    culprit_at(path)
        .and_then(|at| frame_name(path, at, frames::short_name))
        .unwrap_or_else(|| name_without_culprit(path))
}

/// The name of a frame, shortened by `shorten`. DWARF names an inlined closure only `{closure#0}`;
/// a caller has the full name among its generic arguments.
fn frame_name(path: &AllocationPath, at: usize, shorten: fn(&str) -> String) -> Option<String> {
    let frame = path.frames.get(at)?;
    let Some(symbol) = &frame.symbol else { return Some(frames::label(frame)) };
    let short = shorten(symbol);
    if let Some(number) = short.strip_prefix("{closure").filter(|rest| !rest.contains("::")) {
        let environment = format!("::{{closure_env{number}");
        let callers = path.frames.iter().skip(at + 1).take(CLOSURE_CALLERS);
        let whole = callers.filter_map(|caller| caller.symbol.as_deref()).find_map(|caller| {
            let before = caller.get(..caller.find(&environment)?)?;
            let from = before.rfind(['<', ' ', ',', '(', '&']).map_or(0, |from| from + 1);
            before.get(from..)
        });
        if let Some(whole) = whole.filter(|whole| !whole.is_empty()) {
            return Some(shorten(&format!("{whole}::{short}")));
        }
    }
    Some(short)
}

/// The group of a path without a culprit: the dynamic linker, the innermost function and its
/// module, or a note in brackets.
fn name_without_culprit(path: &AllocationPath) -> String {
    let users: Vec<&Frame> = path.frames.iter().filter(|frame| !frame.kernel).collect();
    fn module<'a>(frame: &&'a Frame) -> Option<&'a str> {
        frame.module.as_deref().map(frames::file_name)
    }
    let of_linker = |name: &str| name.starts_with("ld-") || name.starts_with("ld.so") || name.starts_with("ld64");
    if users.iter().rev().find_map(module).is_some_and(of_linker) {
        return "the dynamic linker".to_owned();
    }
    match users.iter().find(|frame| frames::code_owner(frame) != CodeOwner::Unknown) {
        Some(frame) => match module(frame) {
            Some(module) => format!("{} in {module}", frames::called_name(frame)),
            None => frames::called_name(frame),
        },
        None => match path.frames.is_empty() {
            true => "[no frames]".to_owned(),
            false => "[unknown code]".to_owned(),
        },
    }
}

/// `file:line` of a frame, with a short file name; `None` without a file.
pub(super) fn place(frame: &Frame) -> Option<String> {
    let file = frames::short_file(frame.file.as_deref().filter(|file| !file.is_empty())?);
    Some(frame.line.map_or_else(|| file.to_owned(), |line| format!("{file}:{line}")))
}

/// The call of the culprit that took the memory: `Vec::with_capacity`, or `Vec::resize (memset)` if
/// the innermost function says what it did with the memory.
pub(super) fn via(path: &AllocationPath) -> Option<String> {
    let folded = path.frames.get(..culprit_at(path)?)?;
    let folded: Vec<&Frame> = folded.iter().filter(|frame| !frame.kernel).collect();
    let (innermost, called) = (folded.first()?, folded.last()?);
    let (innermost, called) = (frames::called_name(innermost), frames::called_name(called));
    let says_how = ["memset", "memcpy", "memcpy/memmove", "read", "pread64", "recv"].contains(&innermost.as_str());
    Some(if says_how && innermost != called { format!("{called} ({innermost})") } else { called })
}

/// The program's functions on a path with their places, outermost first; other functions are left
/// out. Cap: [`MAX_CHAIN`]: the outermost and the innermost are kept, `None` stands for the rest.
pub(super) fn chain(path: &AllocationPath) -> Vec<Option<(String, Option<String>)>> {
    let wanted = culprit(path).map(frames::code_owner);
    let mut chain: Vec<(String, Option<String>)> = Vec::new();
    for (at, frame) in path.frames.iter().enumerate().rev() {
        if Some(frames::code_owner(frame)) != wanted {
            continue;
        }
        let name = frame_name(path, at, frames::brief_name).unwrap_or_default();
        let place = place(frame);
        match chain.last_mut() {
            // Recursion.
            Some(last) if last.0 == name => last.1 = place,
            _ => chain.push((name, place)),
        }
    }
    let mut chain: Vec<_> = chain.into_iter().map(Some).collect();
    if chain.len() > MAX_CHAIN {
        let until = chain.len() - (MAX_CHAIN - 1);
        chain.splice(1..until, [None]);
    }
    chain
}

/// The path of the `mmap` or `brk` call that made the memory a path touched; `None` if unknown.
pub(super) fn mapped_by<'a>(incident: &'a Incident, path: &AllocationPath) -> Option<&'a AllocationPath> {
    incident.allocation_paths.get(usize::try_from(path.mapped_by?).ok()?)
}

#[cfg(test)]
mod tests {
    use memtrace_incident::fixtures;

    use super::*;

    const SECOND: u64 = 1_000_000_000;

    fn of(frames: &[(&str, &str)]) -> AllocationPath {
        let frame = |(symbol, file): &(&str, &str)| Frame {
            module: Some("/app".into()),
            symbol: Some((*symbol).into()),
            file: Some((*file).into()).filter(|file: &String| !file.is_empty()),
            line: Some(7),
            ..Frame::default()
        };
        AllocationPath { frames: frames.iter().map(frame).collect(), ..fixtures::burst().allocation_paths[0].clone() }
    }

    #[test]
    fn every_window_adds_up() {
        let burst = fixtures::burst();
        let mut before = 0;
        for span_ns in [SECOND / 10, SECOND, 10 * SECOND, u64::MAX] {
            let window = GrowthWindow::before(&burst, span_ns);
            let growth = weights(&burst, &window, Cause::Touch).iter().sum::<u64>() + without_stack(&burst, &window);
            assert!(growth > before, "{span_ns}");
            before = growth;
            let by_culprit: u64 = culprits(&burst, &[window], Cause::Touch).iter().map(|of| of.bytes[0]).sum();
            assert_eq!(by_culprit + without_stack(&burst, &window), growth);
            let by_reason: u64 = without_stack_by_reason(&burst, &window).iter().map(|(_, bytes)| bytes).sum();
            assert_eq!(by_reason, without_stack(&burst, &window));
        }
        assert_eq!(before, burst.allocations.unwrap().growth_bytes);
    }

    #[test]
    fn who_is_to_blame() {
        let burst = fixtures::burst();
        let named: Vec<String> = burst.allocation_paths.iter().map(name).collect();
        assert_eq!(
            named,
            [
                "app::cache::Cache::fill",
                "codec.so+0x1f3c0",
                // A crate is on the stack further in, but the program is blamed.
                "app::supervise",
                "app::cache::Cache::fill",
                "app::cache::Cache::fill",
                "app::supervise",
            ]
        );
        assert_eq!(via(&burst.allocation_paths[0]).unwrap(), "Vec::resize (memset)");
        assert_eq!(via(&burst.allocation_paths[1]), None);
        assert_eq!(via(&burst.allocation_paths[2]).unwrap(), "grow");
        assert_eq!(via(&burst.allocation_paths[4]).unwrap(), "Vec::with_capacity");
        let registry = "/home/ci/.cargo/registry/src/index/ringlog-1.4.2/src/buffer.rs";
        assert_eq!(name(&of(&[("malloc", ""), ("grow", registry), ("start_thread", "")])), "grow");
        assert_eq!(name(&of(&[("malloc", ""), ("_start", "")])), "malloc in app");
        assert_eq!(name(&of(&[])), "[no frames]");
    }

    #[test]
    fn a_closure_has_the_name_of_who_made_it() {
        let path = of(&[
            ("{closure#1}<u8>", "/build/src/load.rs"),
            ("call_once<app::load::all::{closure_env#1}<u8>, ()>", "/rustc/1/library/core/src/ops/function.rs"),
        ]);
        assert_eq!(name(&path), "app::load::all::{closure#1}");
        assert_eq!(name(&of(&[("{closure#0}", "/build/src/load.rs")])), "{closure#0}");
    }

    #[test]
    fn chains_are_short() {
        let file = "/build/src/a.rs";
        let path = of(&[
            ("a::g", file),
            ("a::f", file),
            ("a::f", file),
            ("std::x", ""),
            ("a::e", file),
            ("a::d", file),
            ("a::c", file),
            ("a::b", file),
            ("a::main", file),
        ]);
        let names = |path: &AllocationPath| -> Vec<String> {
            chain(path).into_iter().map(|part| part.map_or("..".to_owned(), |(name, _)| name)).collect()
        };
        assert_eq!(names(&path), ["main", "..", "c", "d", "e", "f", "g"]);
    }

    #[test]
    fn windows_of_a_recording_end_at_its_peak() {
        let mut recording = fixtures::recording();
        let columns = &mut recording.timeline.columns;
        (columns.boot_ns, columns.usage_bytes) = (vec![1, 5, 9], vec![None, Some(7), Some(3)]);
        assert_eq!(GrowthWindow::before(&recording, 4), GrowthWindow { from_ns: 1, until_ns: 5 });
    }
}
