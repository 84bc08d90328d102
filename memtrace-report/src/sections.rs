//! The sections of the text report below its facts: curve, processes, mappings, composition,
//! losses.
//!
//! Each `add_` function appends its section to a [`TextPage`]. A file may hold any number of rows,
//! so each section has a cap and says how many of how many it shows.

use memtrace_incident::{Growth, Incident, Kind, Loss, LossNote, MappingNote, Oom, Recording, Scope, TaskRow, units};

use super::table::{Align, TextTable};
use super::text::{name, signal_name};
use super::{Paint, Style, StyledLine, curve, plain, plot};

/// Rows of a process table.
const PROCESS_ROWS: usize = 8;
/// The fastest growing processes are shown even if they are small: so many of them.
const GROWERS: usize = 3;
/// Tasks and growth notes that are ranked; the others only count as left out.
const CONSIDERED: usize = 1024;
/// Mapping calls shown, the largest.
const MAPPINGS: usize = 4;
/// Losses shown, in the order of the file; the others are counted.
const LOSSES: usize = 4;
/// Columns for the labels of a plot's axis: `limit 1023.9 MiB`.
const GUTTER: usize = 16;
/// Rows of a plot.
const PLOT_ROWS: u64 = 8;

/// The report being written, line by line.
pub(super) struct TextPage<'a> {
    pub(super) style: &'a Style,
    /// Cap: each section has one; a whole report stays below 110 lines.
    lines: Vec<StyledLine>,
}

impl<'a> TextPage<'a> {
    /// Column at which the text of a fact starts, behind its label.
    pub(super) const LABEL: usize = 14;

    pub(super) fn new(style: &'a Style) -> Self {
        Self { style, lines: Vec::new() }
    }

    pub(super) fn finish(self) -> String {
        self.lines.iter().flat_map(|line| [line.text.trim_end(), "\n"]).collect()
    }

    pub(super) fn blank(&mut self) {
        self.lines.push(StyledLine::default());
    }

    /// Adds a paragraph. Escapes `text`.
    pub(super) fn wrapped(&mut self, paint: Paint, text: &str, indent: usize) {
        for part in plain::wrap(text, self.style.columns().saturating_sub(indent)) {
            let mut line = StyledLine::default();
            line.pad(indent);
            line.add(self.style, paint, &part);
            self.lines.push(line);
        }
    }

    /// Adds a list item. Escapes `text`.
    pub(super) fn item(&mut self, text: &str) {
        for (number, part) in plain::wrap(text, self.style.columns().saturating_sub(4)).into_iter().enumerate() {
            let mut line = StyledLine::default();
            line.add(self.style, Paint::Plain, if number == 0 { "  - " } else { "    " });
            line.add(self.style, Paint::Plain, &part);
            self.lines.push(line);
        }
    }

    /// Adds a paragraph with a label. Escapes `text`.
    pub(super) fn fact(&mut self, label: &str, text: &str) {
        let parts = plain::wrap(text, self.style.columns().saturating_sub(Self::LABEL));
        for (number, part) in parts.into_iter().enumerate() {
            self.fact_unbroken(if number == 0 { label } else { "" }, &part);
        }
    }

    /// Adds one line with a label. `text` must be escaped; it is not broken, so that it can be
    /// copied.
    pub(super) fn fact_unbroken(&mut self, label: &str, text: &str) {
        let mut line = StyledLine::default();
        line.add(self.style, Paint::Faint, &format!("  {label}"));
        line.pad(Self::LABEL);
        line.add(self.style, Paint::Plain, text);
        self.lines.push(line);
    }

    /// Adds a line, whose text must be escaped.
    pub(super) fn line(&mut self, line: StyledLine) {
        self.lines.push(line);
    }

    pub(super) fn table(&mut self, table: &TextTable, indent: usize) {
        self.lines.extend(table.lines(self.style, indent));
    }

    /// Adds the title of a section. `text` must be escaped.
    pub(super) fn title(&mut self, text: &str) {
        let mut line = StyledLine::default();
        line.add(self.style, Paint::Strong, text);
        self.lines.push(line);
    }
}

/// Adds the curve and, for a fast rise, a second plot of it: beside the first if the page is 90
/// columns wide, else below.
pub(super) fn add_curve(page: &mut TextPage<'_>, incident: &Incident) {
    let columns = &incident.timeline.columns;
    let style = page.style;
    if columns.boot_ns.is_empty() {
        page.title("Memory: no readings");
        return;
    }
    let (overview, closer) = match (&incident.kind, &incident.recording) {
        (Kind::Recording, Some(recording)) => {
            let start_ns = recording.start_boot_ns;
            let end_ns = start_ns.saturating_add(recording.duration_ns);
            (curve::DrawnSpan { start_ns, end_ns, zero_ns: start_ns }, None)
        }
        (Kind::Spike | Kind::NearMiss | Kind::Stuck, _) => {
            curve::choose_spans(columns, incident.at.boot_ns, 1_000_000_000)
        }
        _ => curve::choose_spans(columns, incident.at.boot_ns, 0),
    };
    let gutter = GUTTER;
    let beside = closer.is_some() && style.columns() >= 90;
    // Two axes and the space between the plots.
    let room = style.columns().saturating_sub(gutter + 2);
    let width = if beside { room.saturating_sub(4) / 2 } else { room };
    let mut left = curve::resample(columns, &overview, width);
    let mut right = closer.map(|closer| (closer, curve::resample(columns, &closer, width)));
    // A curve may begin before the limit was first read; the cgroup has it.
    for level in left.iter_mut().chain(right.iter_mut().flat_map(|(_, levels)| levels.iter_mut())) {
        level.limit_bytes = level.limit_bytes.or(incident.cgroup.limit_bytes);
    }
    let top_bytes = plot::top_bytes(&[&left, right.as_ref().map_or(&[][..], |(_, levels)| levels)]);
    let area = plot::PlotArea { rows: PLOT_ROWS, top_bytes, gutter };

    let until = incident.kind.curve_span();
    let drawn = left.iter().any(|level| level.limit_bytes.is_some_and(|limit| limit <= top_bytes));
    let mut title = StyledLine::default();
    let whose = match &incident.oom {
        Some(oom) if oom.scope != Scope::Cgroup => "the victim's cgroup",
        _ => "the cgroup",
    };
    title.add(style, Paint::Strong, &format!("Memory of {whose} {until}"));
    if left.iter().all(|level| level.usage_bytes.is_none()) {
        title.add(style, Paint::Alarm, " (usage unknown, anonymous only)");
    }
    match incident.cgroup.limit_bytes {
        Some(limit) if !drawn => {
            title.add(style, Paint::Faint, &format!(" (limit {} is off the scale)", units::bytes(limit)));
        }
        _ => {}
    }
    let legend = plot::legend(drawn, style);
    title.pad(style.columns().saturating_sub(legend.columns).max(title.columns + 2));
    title.join(&legend);
    page.lines.push(title);

    let mut plot = plot::lines(&left, &overview, &area, style);
    if let Some((closer, levels)) = right {
        let label = if beside { 0 } else { gutter };
        let closer = plot::lines(&levels, &closer, &plot::PlotArea { gutter: label, ..area }, style);
        if beside {
            for (line, closer) in plot.iter_mut().zip(&closer) {
                line.pad(gutter + 2 + width + 3);
                line.join(closer);
            }
        } else {
            plot.extend(closer);
        }
    }
    page.lines.append(&mut plot);
}

/// Adds the table of the largest processes, the victims and the fastest growers.
pub(super) fn add_processes(page: &mut TextPage<'_>, incident: &Incident) {
    let of_pressure = || incident.pressure.as_ref().map_or(&[][..], |pressure| &pressure.tasks);
    let tasks = incident.oom.as_ref().map_or_else(of_pressure, |oom| &oom.tasks);
    let considered =
        (tasks.get(..CONSIDERED).unwrap_or(tasks), incident.growth.get(..CONSIDERED).unwrap_or(&incident.growth));
    let rows = join(considered.0, considered.1);
    let shown = select(&rows);
    let cut = tasks.len().saturating_sub(CONSIDERED);
    let left_out = rows.len().saturating_sub(shown.len()).saturating_add(cut);
    let more = if left_out > 0 { format!(" ({} of {})", shown.len(), shown.len() + left_out) } else { String::new() };
    if rows.is_empty() {
        page.title("Processes: none known");
        return;
    }
    let mut table = TextTable::new([
        (&*format!("Processes{more}"), Align::Left),
        ("pid", Align::Right),
        ("", Align::Left),
        ("rss", Align::Right),
        ("anon", Align::Right),
        ("file", Align::Right),
        ("shmem", Align::Right),
        ("swap", Align::Right),
        ("peak", Align::Right),
        ("last 100 ms", Align::Right),
        ("last 1 s", Align::Right),
        ("last 10 s", Align::Right),
    ])
    .droppable(&[8, 5, 6, 4, 7, 9]);
    let any = |size: fn(&TaskRow) -> u64| tasks.iter().any(|task| size(task) > 0);
    let (shmem, swap) = (any(|task| task.shmem_bytes), any(|task| task.swap_bytes));
    for row in shown {
        let of = |size: fn(&TaskRow) -> u64| row.task.map_or("-".to_owned(), |task| units::bytes(size(task)));
        let if_any = |any: bool, size: fn(&TaskRow) -> u64| if any { of(size) } else { "-".to_owned() };
        let grown = |change: fn(&Growth) -> Option<i64>| {
            row.growth.and_then(change).map_or_else(|| "unknown".to_owned(), units::growth)
        };
        let (comm, pid) = row.identity();
        let mark = mark(incident.oom.as_ref(), &row);
        table.row(
            if row.is_victim() { Paint::Alarm } else { Paint::Plain },
            [
                plain::elide(comm, 24, page.style.unicode),
                pid.to_string(),
                mark.to_owned(),
                units::bytes(row.rss_bytes()),
                of(|task| task.anon_bytes),
                of(|task| task.file_bytes),
                if_any(shmem, |task| task.shmem_bytes),
                if_any(swap, |task| task.swap_bytes),
                of(|task| task.peak_bytes),
                grown(|growth| growth.last_100ms_bytes),
                grown(|growth| growth.last_1s_bytes),
                grown(|growth| growth.last_10s_bytes),
            ],
        );
    }
    page.table(&table, 0);
}

/// Adds the processes of a recording, in the order of the file: by peak.
pub(super) fn add_recorded(page: &mut TextPage<'_>, incident: &Incident, recording: &Recording) {
    let shown = recording.processes.len().min(PROCESS_ROWS) as u64;
    let all = (recording.processes.len() as u64).saturating_add(recording.processes_left_out);
    let more = if all > shown { format!(" ({shown} of {all})") } else { String::new() };
    let mut table = TextTable::new([
        (&*format!("Processes{more}"), Align::Left),
        ("pid", Align::Right),
        ("peak", Align::Right),
        ("max RSS (time -v)", Align::Right),
        ("started", Align::Right),
        ("ended", Align::Left),
    ]);
    for process in recording.processes.iter().take(PROCESS_ROWS) {
        let ended = match process.exit_code {
            None => "still running".to_owned(),
            Some(status) => match i32::try_from(status & 0x7f).unwrap_or(0) {
                0 => format!("exit code {}", (status >> 8) & 0xff),
                signal => signal_name(signal),
            },
        };
        let max_rss = process.max_rss_bytes.map(|size| format!("{} ({} kB)", units::bytes(size), size / 1024));
        let started = process.start_boot_ns.saturating_sub(recording.start_boot_ns);
        table.row(
            Paint::Plain,
            [
                plain::elide(&process.comm, 24, page.style.unicode),
                process.pid.to_string(),
                units::known(process.peak_bytes),
                max_rss.unwrap_or_else(|| "unknown".to_owned()),
                if started == 0 { "at start".to_owned() } else { format!("+{}", units::duration(started)) },
                ended,
            ],
        );
    }
    if table.is_empty() {
        page.title("Processes: none known");
    } else {
        page.table(&table, 0);
    }
    for id in recording.oom_incidents.iter().take(GROWERS) {
        page.wrapped(
            Paint::Alarm,
            &format!("OOM kill during the recording: incident {}", plain::elide(id, 40, true)),
            0,
        );
    }
    if !incident.growth.is_empty() {
        page.blank();
        add_processes(page, incident);
    }
}

/// Adds the largest mapping calls, by time.
pub(super) fn add_mappings(page: &mut TextPage<'_>, incident: &Incident) {
    let notes = &incident.mappings;
    if notes.is_empty() {
        return;
    }
    let origin = match &incident.recording {
        Some(recording) => recording.start_boot_ns,
        None => incident.at.boot_ns,
    };
    let sum = |size: fn(&MappingNote) -> u64| notes.iter().map(size).fold(0u64, u64::saturating_add);
    let mapped = sum(|note| u64::try_from(note.change_bytes).unwrap_or(0).saturating_add(note.small_mapped_bytes));
    let given_back = sum(|note| {
        let large = if note.change_bytes < 0 { note.change_bytes.unsigned_abs() } else { 0 };
        large.saturating_add(note.small_unmapped_bytes)
    });
    let mut largest: Vec<&MappingNote> = notes.iter().collect();
    largest.sort_by_key(|note| std::cmp::Reverse(note.change_bytes.unsigned_abs()));
    largest.truncate(MAPPINGS);
    largest.sort_by_key(|note| note.boot_ns);
    page.blank();
    let which = if notes.len() > MAPPINGS {
        format!("; the largest {MAPPINGS} of {} calls", notes.len())
    } else {
        String::new()
    };
    page.title(&format!("Mapped {}, given back {}{which}", units::bytes(mapped), units::bytes(given_back)));
    for note in largest {
        let mut line = StyledLine::default();
        line.add(page.style, Paint::Plain, &format!("  {:>10}", offset(note.boot_ns, origin)));
        line.add(page.style, Paint::Plain, &format!("  {:<7}", plain::elide(&note.call, 10, page.style.unicode)));
        line.add(page.style, Paint::Strong, &format!("  {:>10}", units::growth(note.change_bytes)));
        let at = note.address.map(|address| format!("at {address:#x} ")).unwrap_or_default();
        line.add(page.style, Paint::Plain, &format!("  {at}by "));
        line.add(page.style, Paint::Plain, &name(&note.comm, note.pid));
        page.lines.push(line);
    }
}

/// Adds the fact "made of": memory by kind, and usage that no process accounts for.
pub(super) fn add_composition(page: &mut TextPage<'_>, incident: &Incident) {
    let parts = &incident.composition;
    // Shares are of the sum of the parts, not of `cgroup.usage_bytes`: the parts of a recording are
    // those at its highest usage, not at its end.
    let unattributed = parts.unattributed_bytes.and_then(|bytes| u64::try_from(bytes).ok());
    let usage = [parts.anon_bytes, parts.shmem_bytes, unattributed].into_iter().sum::<Option<u64>>();
    let share = |size: Option<u64>| {
        let percent = size.zip(usage).and_then(|(size, usage)| units::percent(size, usage));
        format!("{}{}", units::known(size), percent.map(|percent| format!(" ({percent})")).unwrap_or_default())
    };
    let unattributed = match parts.unattributed_bytes {
        None => "unknown".to_owned(),
        Some(bytes) => match u64::try_from(bytes) {
            Ok(bytes) => share(Some(bytes)),
            Err(_) => units::growth(bytes),
        },
    };
    let mut text = format!("anon {}", share(parts.anon_bytes));
    for (what, size) in [
        ("shmem", share(parts.shmem_bytes)),
        ("file mapped", units::known(parts.file_bytes)),
        ("swapped out", units::known(parts.swap_bytes)),
    ] {
        if !size.starts_with("0 B") {
            text.push_str(&format!(", {what} {size}"));
        }
    }
    page.fact("made of", &format!("{text}, unattributed {unattributed}"));
}

/// Adds what is missing from the file with a sentence per loss, or "lost: nothing".
pub(super) fn add_losses(page: &mut TextPage<'_>, incident: &Incident) {
    page.blank();
    let name = |text: &str| plain::elide(text, 60, page.style.unicode);
    // A note without a count is no loss but a hook or source that is off: `NAME: reason`.
    let (lost, off): (Vec<&LossNote>, Vec<&LossNote>) =
        incident.losses.iter().partition(|note| note.count.is_some() || Loss::of(&note.what).is_some());
    let mut texts: Vec<String> = (lost.iter().take(LOSSES))
        .map(|note| match note.count {
            Some(count) => format!("{}: {count}", name(&note.what)),
            None => name(&note.what),
        })
        .collect();
    if let Some(more) = lost.len().checked_sub(LOSSES).filter(|more| *more > 0) {
        texts.push(format!("and {more} more"));
    }
    let off: Vec<String> =
        off.iter().take(LOSSES).map(|note| name(note.what.split(": ").next().unwrap_or(""))).collect();
    let off = if off.is_empty() { String::new() } else { format!("; off: {} (see memtrace doctor)", off.join(", ")) };
    let paint = if texts.is_empty() { Paint::Faint } else { Paint::Alarm };
    let text = if texts.is_empty() { "nothing".to_owned() } else { texts.join("; ") };
    let sentences: Vec<String> = (lost.iter().take(LOSSES))
        .filter_map(|note| Some(format!("{}: {}", name(&note.what), Loss::of(&note.what)?.sentence())))
        .collect();
    page.wrapped(paint, &format!("lost: {text}{off}"), 0);
    for sentence in sentences {
        page.wrapped(Paint::Faint, &sentence, 2);
    }
    let id = plain::elide(&incident.id, 40, page.style.unicode);
    // A recording is wherever its user put it; the others are found by their id.
    let line = match incident.kind {
        Kind::Recording => format!("incident {id}; everything in it: memtrace report FILE --format json"),
        _ => format!("everything in it: memtrace report {id} --format json"),
    };
    page.wrapped(Paint::Faint, &line, 0);
}

/// A process of the table: its state at the event (`task`), its growth, or both.
#[derive(Clone, Copy)]
struct ProcessRow<'a> {
    task: Option<&'a TaskRow>,
    growth: Option<&'a Growth>,
}

impl ProcessRow<'_> {
    fn identity(&self) -> (&str, u32) {
        match (self.task, self.growth) {
            (Some(task), _) => (&task.comm, task.pid),
            (None, Some(growth)) => (&growth.comm, growth.pid),
            (None, None) => ("", 0),
        }
    }

    fn rss_bytes(&self) -> u64 {
        match (self.task, self.growth) {
            (Some(task), _) => task.anon_bytes.saturating_add(task.file_bytes).saturating_add(task.shmem_bytes),
            (None, growth) => growth.map_or(0, |growth| growth.rss_bytes),
        }
    }

    fn is_victim(&self) -> bool {
        self.task.is_some_and(|task| task.victim)
    }
}

fn join<'a>(tasks: &'a [TaskRow], growth: &'a [Growth]) -> Vec<ProcessRow<'a>> {
    let same = |task: &TaskRow, growth: &Growth| {
        task.pid == growth.pid && task.start_boot_ns.is_none_or(|start| start == growth.start_boot_ns)
    };
    let mut rows: Vec<ProcessRow<'a>> = (tasks.iter())
        .map(|task| ProcessRow { task: Some(task), growth: growth.iter().find(|growth| same(task, growth)) })
        .collect();
    let gone = growth.iter().filter(|growth| !tasks.iter().any(|task| same(task, growth)));
    rows.extend(gone.map(|growth| ProcessRow { task: None, growth: Some(growth) }));
    rows.sort_by_key(|row| std::cmp::Reverse(row.rss_bytes()));
    rows
}

/// Chooses the rows to show: victims, the fastest growers, then the largest; sorted by size.
fn select<'a>(rows: &[ProcessRow<'a>]) -> Vec<ProcessRow<'a>> {
    let mut growers: Vec<(i64, usize)> = (rows.iter().enumerate())
        .filter_map(|(at, row)| Some((row.growth?.last_1s_bytes.or(row.growth?.last_10s_bytes)?, at)))
        .filter(|(grown, _)| *grown > 0)
        .collect();
    growers.sort_by_key(|(grown, _)| std::cmp::Reverse(*grown));
    let victims = (0..rows.len()).filter(|at| rows.get(*at).is_some_and(ProcessRow::is_victim));
    let mut chosen: Vec<usize> = Vec::new();
    for at in victims
        .take(PROCESS_ROWS - GROWERS)
        .chain(growers.into_iter().take(GROWERS).map(|(_, at)| at))
        .chain(0..rows.len())
    {
        if chosen.len() < PROCESS_ROWS && !chosen.contains(&at) {
            chosen.push(at);
        }
    }
    chosen.sort_unstable();
    chosen.into_iter().filter_map(|at| rows.get(at).copied()).collect()
}

fn mark(oom: Option<&Oom>, row: &ProcessRow<'_>) -> &'static str {
    let Some(oom) = oom else { return "" };
    let (_, pid) = row.identity();
    let trigger = oom.trigger.pid == pid;
    match (row.is_victim(), trigger) {
        (true, true) if oom.victims.len() > 1 => "victim, trigger",
        (true, _) => "victim",
        (false, true) => "trigger",
        (false, false) => "",
    }
}

/// The distance of two boot-clock times: `-213 ms`, `+1.2 s`.
fn offset(moment_ns: u64, origin_ns: u64) -> String {
    if moment_ns < origin_ns {
        format!("-{}", units::duration(origin_ns - moment_ns))
    } else {
        format!("+{}", units::duration(moment_ns - origin_ns))
    }
}
