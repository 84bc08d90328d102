//! The section "Who took the memory" of the text report: the functions that grew memory, in windows
//! that end at the event, and how they were called.
//!
//! Cause `touch` explains a kill, so it has the table and the stacks. The other causes (`map`,
//! `brk`, `charge`) measure something else and must not be added to it: they get one line each at
//! the end.

use memtrace_incident::{AllocationPath, Allocations, Cause, Cut, Incident, Kind, units};

use super::paths::{self, Culprit, GrowthWindow};
use super::sections::TextPage;
use super::table::{Align, TextTable};
use super::{Paint, StyledLine, plain};

/// Rows of the table; the rest is one row "others".
const TABLE_ROWS: usize = 8;
/// Culprits whose chain of callers is shown.
const SHOWN_CHAINS: usize = 3;
/// Culprits named for each cause other than `touch`.
const OTHER_CAUSE_CULPRITS: usize = 3;
/// Reasons for growth without a stack that are printed; the rest is counted.
const REASONS: usize = 4;
/// Most columns a function's name takes in the table.
const NAME_COLUMNS: usize = 44;
/// What is less than this fraction of the growth (1/200, half a percent) is not worth a line.
const MIN_FRACTION: u64 = 200;

/// Adds the section; nothing if the incident has no `allocations`.
pub(super) fn add_section(page: &mut TextPage<'_>, incident: &Incident) {
    let Some(allocations) = &incident.allocations else {
        return;
    };
    let windows = windows(incident, allocations);
    let spans: Vec<GrowthWindow> = windows.iter().map(|(_, window)| *window).collect();
    let culprits = paths::culprits(incident, &spans, Cause::Touch);
    page.blank();
    if allocations.growth_bytes == 0 && culprits.is_empty() {
        page.title("Who took the memory: no growth was seen");
    } else {
        add_headline(page, incident, &windows, &culprits);
        add_table(page, incident, &windows, &culprits);
        add_chains(page, incident, &culprits);
        add_reasons(page, allocations);
    }
    add_other_causes(page, incident);
    add_accuracy(page, allocations, &culprits);
}

/// Windows with their titles: shortest first, the whole one last. Short windows are left out if
/// the first sample lies inside them, because they would repeat the whole one.
fn windows(incident: &Incident, allocations: &Allocations) -> Vec<(String, GrowthWindow)> {
    let first_ns = allocations.samples.rows().map(|(boot_ns, _, _)| boot_ns).min();
    let last_ns = allocations.samples.rows().map(|(boot_ns, _, _)| boot_ns).max();
    let mut windows: Vec<(String, GrowthWindow)> = [("last 100 ms", 100), ("last 1 s", 1_000), ("last 10 s", 10_000)]
        .map(|(name, ms)| (name.to_owned(), GrowthWindow::before(incident, ms * 1_000_000)))
        .into();
    windows.retain(|(_, window)| first_ns.is_some_and(|first| first < window.from_ns));
    let whole = match (first_ns, last_ns) {
        (Some(first), Some(last)) => {
            let until = if incident.kind == Kind::Recording { last } else { last.max(incident.at.boot_ns) };
            format!("all {}", units::duration(until.saturating_sub(first)))
        }
        _ => "all".to_owned(),
    };
    windows.push((whole, GrowthWindow::WHOLE));
    windows
}

/// One sentence about the heaviest culprit, in the shortest window (of 1 s or more) that holds at
/// least a quarter of the growth.
fn add_headline(
    page: &mut TextPage<'_>,
    incident: &Incident,
    windows: &[(String, GrowthWindow)],
    culprits: &[Culprit<'_>],
) {
    page.title(&format!("Who took the memory (windows end {})", incident.kind.moment()));
    let growths: Vec<u64> = windows.iter().enumerate().map(|(at, _)| growth(incident, windows, culprits, at)).collect();
    let whole = growths.last().copied().unwrap_or(0);
    // 100 ms is left to the table: one sample decides who is first in it.
    let chosen = (windows.iter().zip(&growths).enumerate())
        .find(|(_, ((name, _), growth))| name != "last 100 ms" && **growth > 0 && **growth >= whole / 4);
    let Some((at, ((name, _), growth))) = chosen else { return };
    let mut ranked: Vec<&Culprit<'_>> = culprits.iter().collect();
    let bytes = |culprit: &Culprit<'_>| culprit.bytes.get(at).copied().unwrap_or(0);
    ranked.sort_by_key(|culprit| std::cmp::Reverse(bytes(culprit)));
    let when = match name.as_str() {
        "last 1 s" => "in the last second".to_owned(),
        "last 10 s" => "in the last 10 s".to_owned(),
        all => format!("in {}", all.replace("all", "the whole window of")),
    };
    let Some(first) = ranked.first().filter(|first| bytes(first) > 0) else {
        let text = format!("Memory grew by {} {when}, all of it without a stack.", units::bytes(*growth));
        page.wrapped(Paint::Strong, &text, 2);
        return;
    };
    let unicode = page.style.unicode;
    let place = first.place.as_deref().map(|place| format!(" ({})", plain::elide(place, 60, unicode)));
    let via = paths::via(first.path).map(|via| format!(", via {}", plain::elide(&via, 40, unicode)));
    let text = format!(
        "`{}`{} touched {} of the {} {when}{}.",
        plain::elide(&first.name, 80, unicode),
        place.unwrap_or_default(),
        units::bytes(bytes(first)),
        units::bytes(*growth),
        via.unwrap_or_default(),
    );
    page.wrapped(Paint::Strong, &text, 2);
}

/// Growth of resident memory in the window `at`, with and without a stack, bytes.
fn growth(incident: &Incident, windows: &[(String, GrowthWindow)], culprits: &[Culprit<'_>], at: usize) -> u64 {
    let attributed =
        culprits.iter().filter_map(|culprit| culprit.bytes.get(at)).fold(0, |s: u64, b| s.saturating_add(*b));
    let without = windows.get(at).map_or(0, |(_, window)| paths::without_stack(incident, window));
    attributed.saturating_add(without)
}

fn add_table(
    page: &mut TextPage<'_>,
    incident: &Incident,
    windows: &[(String, GrowthWindow)],
    culprits: &[Culprit<'_>],
) {
    let unicode = page.style.unicode;
    let several = culprits.iter().any(|culprit| culprit.path.process.comm != first_comm(culprits));
    let whole = growth(incident, windows, culprits, windows.len().saturating_sub(1));
    // A culprit is shown if it matters in any window: the heaviest of the whole one may have been
    // idle at the end.
    let worth = |culprit: &&Culprit<'_>| {
        (0..windows.len()).any(|at| {
            let least = growth(incident, windows, culprits, at) / MIN_FRACTION;
            culprit.bytes.get(at).is_some_and(|bytes| *bytes > 0 && *bytes >= least)
        })
    };
    let mut shown: Vec<&Culprit<'_>> = culprits.iter().filter(worth).take(TABLE_ROWS).collect();
    if shown.is_empty() {
        shown = culprits.iter().take(1).collect();
    }
    let room =
        page.style.columns().saturating_sub(windows.len() * 12 + if several { 22 } else { 10 }).clamp(20, NAME_COLUMNS);
    let mut head: Vec<(String, Align)> = vec![("  touched by".to_owned(), Align::Left)];
    head.push((if several { "process" } else { "" }.to_owned(), Align::Left));
    head.extend(windows.iter().map(|(name, _)| (name.clone(), Align::Right)));
    head.push(("share".to_owned(), Align::Right));
    let mut table = TextTable::of(head).droppable(&[windows.len() + 2, 1]);
    let sums = |of: &dyn Fn(usize) -> u64| (0..windows.len()).map(|at| units::bytes(of(at))).collect::<Vec<_>>();
    let mut row = |paint: Paint, name: String, comm: String, bytes: Vec<String>, percent: String| {
        table.push(paint, [vec![format!("  {name}"), comm], bytes, vec![percent]].concat());
    };
    for culprit in &shown {
        let comm = if several { plain::elide(&culprit.path.process.comm, 16, unicode) } else { "-".to_owned() };
        let last = culprit.bytes.last().copied().unwrap_or(0);
        row(
            Paint::Plain,
            plain::elide(&culprit.name, room, unicode),
            comm,
            culprit.bytes.iter().map(|bytes| units::bytes(*bytes)).collect(),
            units::percent(last, whole).unwrap_or_else(|| "-".to_owned()),
        );
    }
    let other = |at: usize| {
        let of = |culprits: &mut dyn Iterator<Item = &Culprit<'_>>| {
            culprits.filter_map(|culprit| culprit.bytes.get(at)).fold(0u64, |sum, bytes| sum.saturating_add(*bytes))
        };
        of(&mut culprits.iter()).saturating_sub(of(&mut shown.iter().copied()))
    };
    let last = windows.len().saturating_sub(1);
    let percent = |bytes: u64| units::percent(bytes, whole).unwrap_or_else(|| "-".to_owned());
    if culprits.len() > shown.len() {
        let name = units::count((culprits.len() - shown.len()) as u64, "other", "others");
        row(Paint::Plain, name, String::new(), sums(&other), percent(other(last)));
    }
    let without = |at: usize| windows.get(at).map_or(0, |(_, window)| paths::without_stack(incident, window));
    row(Paint::Plain, "without a stack".to_owned(), String::new(), sums(&without), percent(without(last)));
    let all = |at: usize| growth(incident, windows, culprits, at);
    row(Paint::Strong, "growth".to_owned(), String::new(), sums(&all), String::new());
    page.table(&table, 0);
}

fn first_comm<'a>(culprits: &'a [Culprit<'_>]) -> &'a str {
    culprits.first().map_or("", |culprit| &culprit.path.process.comm)
}

/// The callers of the heaviest culprits, and who mapped what they touched.
fn add_chains(page: &mut TextPage<'_>, incident: &Incident, culprits: &[Culprit<'_>]) {
    let heaviest = culprits.first().and_then(|culprit| culprit.bytes.last()).copied().unwrap_or(0);
    // Less than a twentieth of the heaviest does not change the conclusion.
    let worth = |culprit: &&Culprit<'_>| {
        let heavy = culprit.bytes.last().is_some_and(|bytes| *bytes > 0 && *bytes >= heaviest / 20);
        heavy && paths::culprit(culprit.path).is_some()
    };
    for culprit in culprits.iter().filter(worth).take(SHOWN_CHAINS) {
        let unicode = page.style.unicode;
        let bytes = culprit.bytes.last().copied().unwrap_or(0);
        let process = &culprit.path.process;
        let who = format!("{} ({})", plain::elide(&process.comm, 24, unicode), process.pid);
        let more = match culprit.paths {
            0 | 1 => String::new(),
            paths => format!(", the heaviest of {paths} stacks"),
        };
        let chain = chain(culprit, unicode);
        let mut line = StyledLine::default();
        line.add(page.style, Paint::Strong, &format!("  {:>9}  ", units::bytes(bytes)));
        line.add(
            page.style,
            Paint::Plain,
            &format!("{} in {who}{more}", plain::elide(&culprit.name, NAME_COLUMNS, unicode)),
        );
        page.line(line);
        page.wrapped(Paint::Plain, &chain, 13);
        let mut notes = Vec::new();
        if let Some(mapping) = paths::mapped_by(incident, culprit.path) {
            notes.push(mapped(mapping, unicode));
        }
        if let Some(cut) = culprit.path.cut {
            notes.push(format!("callers unknown: {}", why_cut(cut)));
        }
        if !notes.is_empty() {
            page.wrapped(Paint::Faint, &notes.join("; "), 13);
        }
    }
}

/// Outermost caller first: `main (src/main.rs:10) > load (src/load.rs:5) > fill (src/cache.rs:42),
/// via memset`.
fn chain(culprit: &Culprit<'_>, unicode: bool) -> String {
    let mark = if unicode { "…" } else { "..." };
    let parts: Vec<String> = (paths::chain(culprit.path).into_iter())
        .map(|part| match part {
            None => mark.to_owned(),
            Some((name, None)) => plain::elide(&name, 60, unicode),
            Some((name, Some(place))) => {
                format!("{} ({})", plain::elide(&name, 60, unicode), plain::elide(&place, 60, unicode))
            }
        })
        .collect();
    let via = paths::via(culprit.path).map(|via| format!(", via {}", plain::elide(&via, 60, unicode)));
    let chain = if parts.is_empty() { "no function of the program itself".to_owned() } else { parts.join(" > ") };
    format!("{chain}{}", via.unwrap_or_default())
}

/// `mapped by grow (src/a.rs:7), via malloc`.
fn mapped(path: &AllocationPath, unicode: bool) -> String {
    let name = paths::name(path);
    let place =
        paths::culprit(path).and_then(paths::place).map(|place| format!(" ({})", plain::elide(&place, 60, unicode)));
    let via = paths::via(path).map(|via| format!(", via {}", plain::elide(&via, 40, unicode)));
    let call = if path.cause == Cause::Brk { "brk" } else { "mmap" };
    format!("{call} by {}{}{}", plain::elide(&name, 60, unicode), place.unwrap_or_default(), via.unwrap_or_default())
}

/// Why a part of the growth has no stack; nothing if that part is small.
fn add_reasons(page: &mut TextPage<'_>, allocations: &Allocations) {
    if allocations.unattributed_bytes().saturating_mul(MIN_FRACTION) < allocations.growth_bytes {
        return;
    }
    let mut reasons: Vec<String> = (allocations.unattributed.iter().take(REASONS))
        .map(|part| format!("{} {}", units::bytes(part.bytes), plain::elide(&part.why, 120, page.style.unicode)))
        .collect();
    if let Some(more) = allocations.unattributed.len().checked_sub(REASONS).filter(|more| *more > 0) {
        reasons.push(format!("and {}", units::count(more as u64, "more reason", "more reasons")));
    }
    page.wrapped(Paint::Faint, &format!("without a stack: {}", reasons.join("; ")), 2);
}

/// One line per cause other than `touch`; none of it is part of the growth.
fn add_other_causes(page: &mut TextPage<'_>, incident: &Incident) {
    for (cause, what) in [
        (Cause::Map, "of address space asked for with mmap"),
        (Cause::Brk, "of address space asked for with brk"),
        (Cause::Charge, "charged in system calls (page cache, sockets, kernel memory)"),
    ] {
        let culprits = paths::culprits(incident, &[GrowthWindow::WHOLE], cause);
        let bytes = |culprit: &Culprit<'_>| culprit.bytes.first().copied().unwrap_or(0);
        let total = culprits.iter().fold(0u64, |sum, culprit| sum.saturating_add(bytes(culprit)));
        if total == 0 {
            continue;
        }
        let unicode = page.style.unicode;
        let several = culprits.iter().any(|culprit| culprit.path.process.comm != first_comm(&culprits));
        let mut parts: Vec<String> = (culprits.iter().take(OTHER_CAUSE_CULPRITS))
            .filter(|culprit| bytes(culprit) >= total / MIN_FRACTION)
            .map(|culprit| {
                let place = culprit.place.as_deref().map(|place| format!(" ({})", plain::elide(place, 40, unicode)));
                let name = plain::elide(&culprit.name, NAME_COLUMNS, unicode);
                let comm = plain::elide(&culprit.path.process.comm, 24, unicode);
                let of = if several { format!(" of {comm}") } else { String::new() };
                format!("{} by {name}{of}{}", units::bytes(bytes(culprit)), place.unwrap_or_default())
            })
            .collect();
        if let Some(more) = culprits.len().checked_sub(parts.len()).filter(|more| *more > 0) {
            parts.push(format!("{more} more"));
        }
        page.wrapped(Paint::Plain, &format!("{} {what}: {}", units::bytes(total), parts.join(", ")), 2);
    }
}

/// How accurate the section is: sample interval, thinned and joined samples, cut stacks.
fn add_accuracy(page: &mut TextPage<'_>, allocations: &Allocations, culprits: &[Culprit<'_>]) {
    let mut notes = Vec::new();
    if allocations.sample_bytes > 0 {
        notes.push(format!("a stack every {} a process grew", units::bytes(allocations.sample_bytes)));
    }
    if allocations.thinned > 0 {
        notes.push(format!(
            "{} left out to keep the stack budget, counted with the next of its process",
            units::count(allocations.thinned, "stack", "stacks")
        ));
    }
    if allocations.joined > 0 {
        let samples = units::count(allocations.joined, "sample", "samples");
        notes.push(format!("{samples} joined with a neighbour, so the windows are less exact"));
    }
    let cut = culprits.iter().fold(0u64, |sum, culprit| sum.saturating_add(culprit.cut_bytes));
    if cut > 0 {
        notes.push(format!("{} in stacks that are cut short", units::bytes(cut)));
    }
    if !notes.is_empty() {
        page.wrapped(Paint::Faint, &format!("sampled: {}", notes.join("; ")), 2);
    }
}

/// The same sentences as `CUTS` of the page (`html/data.js`).
pub(super) fn why_cut(cut: Cut) -> &'static str {
    match cut {
        Cut::Slice => "the stack is larger than its copy",
        Cut::Module => "code outside known modules, without frame pointers",
        Cut::Unwind => "unwind information missing or broken",
        Cut::Frames => "more frames than are kept",
        Cut::Registers => "registers or stack could not be read",
        Cut::Gone => "the process had ended",
    }
}
