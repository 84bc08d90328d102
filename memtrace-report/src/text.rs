//! The text report: a post-mortem on one screen (two with stacks), most important first.
//!
//! It starts with one sentence about what happened, then the verdict, the facts, the curve, the
//! processes, the code that grew memory, and what is missing.

use memtrace_incident::{Cgroup, Incident, KernelLogKill, Kind, Oom, Process, Recording, Scope, Victim, units};

use super::sections::{self, TextPage};
use super::table::{Align, TextTable};
use super::{Paint, Style, allocations, plain, pressure};

/// Victims with a row of their own; the others are counted.
const VICTIMS: usize = 4;
/// Sentences of evidence shown; the others are counted.
const EVIDENCE: usize = 4;
/// Most columns that a cgroup's path takes within a sentence.
const PATH_WIDTH: usize = 48;
/// Most characters of a path that is shown to be copied. Those of Kubernetes have about 200.
const WHOLE_PATH_WIDTH: usize = 512;

/// The report, which ends with a line end. For any incident it contains no control characters but
/// line ends and, with `style.colour`, its own colour codes.
pub fn report(incident: &Incident, style: &Style) -> String {
    let mut page = TextPage::new(style);
    let headline = match (incident.kind, &incident.oom, &incident.recording) {
        (Kind::Recording, _, Some(recording)) => recording_headline(incident, recording, style),
        (Kind::Spike, _, _) => spike_headline(incident, style),
        (Kind::NearMiss | Kind::Stuck, _, _) => match &incident.pressure {
            Some(pressure) => pressure::headline(incident, pressure, style),
            None => "A limit was hit without a kill: nothing more is known.".to_owned(),
        },
        (_, Some(oom), _) => kill_headline(incident, oom, style),
        (kind @ Kind::OomKill, None, _) => format!("{}: nothing more is known.", kind.title()),
        (kind @ Kind::Recording, _, None) => format!("{}: nothing is known about the command.", kind.title()),
    };
    page.wrapped(if incident.kind.is_alarm() { Paint::Alarm } else { Paint::Strong }, &headline, 0);
    add_verdict(&mut page, incident);
    page.blank();
    add_time(&mut page, incident);
    add_place(&mut page, incident);
    if let Some(oom) = &incident.oom {
        add_kill(&mut page, incident, oom);
    }
    if let Some(pressure) = &incident.pressure {
        page.fact("pressure", &pressure::fact_line(pressure));
    }
    sections::add_composition(&mut page, incident);
    page.blank();
    sections::add_curve(&mut page, incident);
    page.blank();
    match &incident.recording {
        Some(recording) => sections::add_recorded(&mut page, incident, recording),
        None => sections::add_processes(&mut page, incident),
    }
    allocations::add_section(&mut page, incident);
    sections::add_mappings(&mut page, incident);
    sections::add_losses(&mut page, incident);
    page.finish()
}

fn kill_headline(incident: &Incident, oom: &Oom, style: &Style) -> String {
    let who = match oom.victims.iter().find(|victim| victim.killed).or_else(|| oom.victims.first()) {
        None => "the victim is unknown".to_owned(),
        Some(victim) => match oom.victims.len() - 1 {
            0 => name(&victim.comm, victim.pid),
            others => {
                let group = if oom.group_kill { ", killed as a group (memory.oom.group)," } else { "" };
                let others = units::count(others as u64, "more process", "more processes");
                format!("{} and {others}{group}", name(&victim.comm, victim.pid))
            }
        },
    };
    let killed = oom.victims.is_empty() || oom.victims.iter().any(|victim| victim.killed);
    let what = if killed { Kind::OomKill.title() } else { "OOM, nobody killed" };
    let place = short_place(&incident.cgroup, style);
    let limit = |cgroup: Option<&Cgroup>| match cgroup.and_then(|cgroup| cgroup.limit_bytes) {
        Some(limit) => format!("its limit of {}", units::bytes(limit)),
        None => "its limit (unknown)".to_owned(),
    };
    let why = match oom.scope {
        Scope::Cgroup => {
            format!("the cgroup reached {}", limit(oom.oom_cgroup.as_ref().or(Some(&incident.cgroup))))
        }
        Scope::Ancestor => {
            let ancestor = oom.oom_cgroup.as_ref();
            let ancestor_path = path(ancestor.and_then(|cgroup| cgroup.path.as_deref()), PATH_WIDTH, style);
            format!("its ancestor {ancestor_path} reached {}", limit(ancestor))
        }
        Scope::Global => "the machine ran out of memory".to_owned(),
        Scope::Cpuset => "the memory nodes of its cpuset ran out".to_owned(),
        Scope::Unknown => "what ran out is unknown".to_owned(),
    };
    let chosen = if killed { "" } else { " was chosen while already exiting" };
    format!("{what}: {who}{chosen} in {place} - {why}.")
}

fn spike_headline(incident: &Incident, style: &Style) -> String {
    let cgroup = &incident.cgroup;
    let of_limit = match (cgroup.usage_bytes, cgroup.limit_bytes) {
        (Some(usage), Some(limit)) => match units::percent(usage, limit) {
            Some(percent) => format!(" of its limit of {} ({percent})", units::bytes(limit)),
            None => String::new(),
        },
        _ => String::new(),
    };
    let place = short_place(cgroup, style);
    let (title, usage) = (Kind::Spike.title(), units::known(cgroup.usage_bytes));
    format!("{title}: {place} rose to {usage}{of_limit} and fell again; nobody was killed.")
}

fn recording_headline(incident: &Incident, recording: &Recording, style: &Style) -> String {
    let what = if recording.command.is_empty() {
        path(incident.cgroup.path.as_deref(), PATH_WIDTH, style)
    } else {
        format!("`{}`", plain::elide(&recording.command.join(" "), 80, style.unicode))
    };
    let end = match (recording.exit_code, recording.signal) {
        (_, Some(signal)) => format!("and was ended by {}", signal_name(signal)),
        (Some(code), None) => format!("and exited with code {code}"),
        (None, None) => "and was still running".to_owned(),
    };
    let peak = incident.cgroup.peak_bytes.map(|peak| format!("; its cgroup peaked at {}", units::bytes(peak)));
    let (title, duration) = (Kind::Recording.title(), units::duration(recording.duration_ns));
    format!("{title}: {what} ran {duration} {end}{}.", peak.unwrap_or_default())
}

fn add_verdict(page: &mut TextPage<'_>, incident: &Incident) {
    let verdict = &incident.verdict;
    let most = page.style.columns() * 2;
    if !verdict.summary.is_empty() {
        page.wrapped(Paint::Strong, &plain::elide(&verdict.summary, page.style.columns() * 3, page.style.unicode), 2);
    }
    for evidence in verdict.evidence.iter().take(EVIDENCE) {
        page.item(&plain::elide(evidence, most, page.style.unicode));
    }
    if let Some(more) = verdict.evidence.len().checked_sub(EVIDENCE).filter(|more| *more > 0) {
        page.item(&format!("and {more} more"));
    }
}

fn add_time(page: &mut TextPage<'_>, incident: &Incident) {
    let at = &incident.at;
    let plus_minus = if page.style.unicode { "±" } else { "+-" };
    page.fact(
        if incident.kind == Kind::Recording { "ended" } else { "when" },
        &format!(
            "{} ({plus_minus} {}), boot clock {} s",
            plain::elide(&at.wall, 40, page.style.unicode),
            units::duration(at.wall_uncertainty_ns),
            units::seconds(at.boot_ns)
        ),
    );
}

fn add_place(page: &mut TextPage<'_>, incident: &Incident) {
    let host = &incident.host;
    let unicode = page.style.unicode;
    let or_unknown = |text: &str| match text {
        "" => "unknown".to_owned(),
        text => plain::elide(text, 64, unicode),
    };
    page.fact(
        "host",
        &format!(
            "{}, Linux {}, {}, {}",
            or_unknown(&host.hostname),
            or_unknown(&host.kernel),
            match host.cpus {
                0 => "CPUs unknown".to_owned(),
                cpus => units::count(cpus.into(), "CPU", "CPUs"),
            },
            match host.memory_bytes {
                0 => "memory unknown".to_owned(),
                memory => units::bytes(memory),
            }
        ),
    );
    let cgroup = &incident.cgroup;
    // Not broken into lines, so that it can be copied.
    page.fact_unbroken("cgroup", &whole_path(cgroup, page.style));
    let pod = cgroup.kubernetes.as_ref().map(|pod| {
        let qos = pod.qos.as_deref().map(|qos| format!(" ({})", plain::elide(qos, 20, unicode))).unwrap_or_default();
        format!("pod {}{qos}", plain::elide(&pod.pod_uid, 40, unicode))
    });
    let container = cgroup.container.as_ref().map(|container| {
        let runtime = container.runtime.as_deref().map(|runtime| format!(" ({})", plain::elide(runtime, 20, unicode)));
        format!("container {}{}", short_id(&container.id), runtime.unwrap_or_default())
    });
    if pod.is_some() || container.is_some() {
        page.fact("in", &pod.into_iter().chain(container).collect::<Vec<_>>().join(", "));
    }
    page.fact("memory", &memory(cgroup));
}

fn add_kill(page: &mut TextPage<'_>, incident: &Incident, oom: &Oom) {
    let style = *page.style;
    if let (Scope::Ancestor, Some(ancestor)) = (oom.scope, &oom.oom_cgroup) {
        page.fact_unbroken("ancestor", &whole_path(ancestor, &style));
        page.fact("", &memory(ancestor));
    }
    match oom.victims.as_slice() {
        [] => page.fact("killed", "unknown"),
        [victim] => page.fact("killed", &victim_line(victim, &incident.cgroup, &style)),
        victims => page.table(&victim_table(victims, &style), 2),
    }
    page.fact("trigger", &trigger(oom, &style));
    if !oom.trigger_kernel_stack.is_empty() {
        page.fact_unbroken("stack", &stack(&oom.trigger_kernel_stack, style.columns().saturating_sub(TextPage::LABEL)));
    }
    page.fact("kernel log", &kernel_log(oom, &style));
}

/// Kernel functions, innermost first, in one line of at most `width` columns.
fn stack(functions: &[String], width: usize) -> String {
    let mut text = String::new();
    for (number, function) in functions.iter().enumerate() {
        let function = plain::elide(function, 48, false);
        let arrow = if number == 0 { "" } else { " < " };
        // 12 columns for ` < 123 more`.
        if text.chars().count() + arrow.len() + function.chars().count() + 12 > width {
            text.push_str(&format!(" < {} more", functions.len() - number));
            break;
        }
        text.push_str(arrow);
        text.push_str(&function);
    }
    text
}

/// Whether the kernel log names one of the victims and the same cgroup.
fn kernel_log(oom: &Oom, style: &Style) -> String {
    let Some(log) = &oom.kernel_log else {
        return "not read, or silent about this kill".to_owned();
    };
    let agrees = oom.victims.iter().any(|victim| victim.pid == log.pid);
    let verdict = if agrees { "agrees" } else { "DISAGREES" };
    let mut text = format!("{verdict}: killed pid {}", log.pid);
    let KernelLogKill { constraint, oom_memcg, .. } = log;
    if let Some(constraint) = constraint {
        text.push_str(&format!(", {}", plain::elide(constraint, 40, style.unicode)));
    }
    let ours = oom.oom_cgroup.as_ref().and_then(|cgroup| cgroup.path.as_ref());
    if let (Some(theirs), Some(ours)) = (oom_memcg, ours)
        && theirs != ours
    {
        text.push_str(&format!(", but it DISAGREES on what ran out: {}", plain::elide(theirs, 60, style.unicode)));
    }
    if let Some(line) = log.killed_line_ns.or(log.oom_line_ns) {
        let seconds = units::seconds(line);
        // Microseconds, as the kernel log has them (kernel/printk/printk.c, print_time).
        text.push_str(&format!(", printed at [{}]", seconds.get(..seconds.len() - 3).unwrap_or(&seconds)));
    }
    text
}

fn victim_line(victim: &Victim, cgroup: &Cgroup, style: &Style) -> String {
    let mut text = format!("{}: anon {}", name(&victim.comm, victim.pid), units::known(victim.anon_bytes));
    for (what, size) in [
        ("file", victim.file_bytes),
        ("shmem", victim.shmem_bytes),
        ("swap", victim.swap_bytes),
        ("page tables", victim.pagetable_bytes),
    ] {
        // A known 0 is left out; an unknown value is not.
        if size == Some(0) {
            continue;
        }
        text.push_str(&format!(", {what} {}", units::known(size)));
    }
    match victim.oom_score_adj {
        Some(adj) => text.push_str(&format!(", oom_score_adj {adj}")),
        None => text.push_str(", oom_score_adj unknown"),
    }
    if victim.cgroup_id.is_some_and(|id| id != cgroup.id) {
        text.push_str(&format!("; in {}", path(victim.cgroup_path.as_deref(), PATH_WIDTH, style)));
    }
    text.push_str(&format!("; {}", fate(victim)));
    text
}

fn victim_table(victims: &[Victim], style: &Style) -> TextTable {
    let shown = victims.len().min(VICTIMS);
    let title =
        if shown < victims.len() { format!("killed ({shown} of {})", victims.len()) } else { "killed".to_owned() };
    let mut table = TextTable::new([
        (&*title, Align::Left),
        ("pid", Align::Right),
        ("anon", Align::Right),
        ("file", Align::Right),
        ("shmem", Align::Right),
        ("swap", Align::Right),
        ("page tables", Align::Right),
        ("adj", Align::Right),
        ("then", Align::Left),
    ])
    .droppable(&[4, 3, 6, 5]);
    for victim in victims.iter().take(VICTIMS) {
        // `-` in every row makes the table leave the column out.
        let size = |of: fn(&Victim) -> Option<u64>| {
            let all_zero = victims.iter().all(|victim| of(victim) == Some(0));
            if all_zero { "-".to_owned() } else { units::known(of(victim)) }
        };
        table.row(
            Paint::Plain,
            [
                plain::elide(&victim.comm, 24, style.unicode),
                victim.pid.to_string(),
                size(|victim| victim.anon_bytes),
                size(|victim| victim.file_bytes),
                size(|victim| victim.shmem_bytes),
                size(|victim| victim.swap_bytes),
                size(|victim| victim.pagetable_bytes),
                victim.oom_score_adj.map_or_else(|| "unknown".to_owned(), |adj| adj.to_string()),
                fate(victim),
            ],
        );
    }
    table
}

/// How a victim ended, and how long after it was chosen.
fn fate(victim: &Victim) -> String {
    let how = match (victim.killed, victim.shares_mm) {
        (false, _) => "only chosen, was exiting; ",
        (true, true) => "shares a victim's memory; ",
        (true, false) => "",
    };
    match victim.exit_boot_ns {
        Some(exit) => format!("{how}gone {} later", units::duration(exit.saturating_sub(victim.at_boot_ns))),
        None => format!("{how}exit not seen"),
    }
}

fn trigger(oom: &Oom, style: &Style) -> String {
    let trigger = &oom.trigger;
    let thread = if trigger.tid == trigger.pid { String::new() } else { format!(", thread {}", trigger.tid) };
    let who = name(&trigger.comm, trigger.pid);
    let among = oom.victims.iter().position(|victim| is_same(victim, trigger));
    match among {
        Some(0) if oom.victims.len() == 1 => format!("the victim itself asked for the memory{thread}"),
        Some(_) => format!("{who}{thread} asked for the memory; it is among the victims"),
        None => {
            let place = oom.trigger_cgroup.as_ref().map(|cgroup| match &cgroup.path {
                Some(known) => format!(" in {}", path(Some(known), PATH_WIDTH, style)),
                None => format!(" in {}", unknown_path(cgroup.id)),
            });
            format!("{who}{thread}{} asked for the memory; not a victim", place.unwrap_or_default())
        }
    }
}

fn is_same(victim: &Victim, process: &Process) -> bool {
    victim.pid == process.pid && victim.start_boot_ns == process.start_boot_ns
}

fn memory(cgroup: &Cgroup) -> String {
    let mut text = match (cgroup.usage_bytes, cgroup.limit_bytes) {
        (usage, None) => format!("usage {}, no limit", units::known(usage)),
        (usage, Some(limit)) => {
            let percent = usage.and_then(|usage| units::percent(usage, limit));
            let percent = percent.map(|percent| format!(" ({percent})")).unwrap_or_default();
            format!("usage {} of limit {}{percent}", units::known(usage), units::bytes(limit))
        }
    };
    text.push_str(&format!(", peak {}", units::known(cgroup.peak_bytes)));
    // Left out if 0: with a v1 limit on memory and swap (memsw), hits are counted there.
    if let Some(hits) = cgroup.failcnt.filter(|hits| *hits > 0) {
        text.push_str(&format!(", limit hit {}", units::count(hits, "time", "times")));
    }
    if let Some(high) = cgroup.high_bytes {
        text.push_str(&format!(", memory.high {}", units::bytes(high)));
    }
    if let Some(swap) = cgroup.swap_usage_bytes {
        let what = if cgroup.version == 1 { "memory and swap" } else { "swap" };
        match cgroup.swap_limit_bytes {
            Some(0) => text.push_str(", no swap allowed"),
            Some(limit) => text.push_str(&format!(", {what} {} of {}", units::bytes(swap), units::bytes(limit))),
            None => text.push_str(&format!(", {what} {}", units::bytes(swap))),
        }
    }
    text
}

/// `` `worker` (pid 4242) ``.
pub(super) fn name(comm: &str, pid: u32) -> String {
    format!("`{}` (pid {pid})", plain::elide(comm, 32, false))
}

/// The cgroup's path if it is short, else its container and pod, else the path cut in the middle.
pub(super) fn short_place(cgroup: &Cgroup, style: &Style) -> String {
    let short = cgroup.path.as_deref().is_some_and(|path| path.chars().count() <= PATH_WIDTH);
    match (&cgroup.container, &cgroup.kubernetes) {
        (Some(container), pod) if !short => {
            let pod = pod.as_ref().map(|pod| format!(" of pod {}", plain::elide(&pod.pod_uid, 36, style.unicode)));
            format!("container {}{}", short_id(&container.id), pod.unwrap_or_default())
        }
        _ => path(cgroup.path.as_deref(), PATH_WIDTH, style),
    }
}

/// The first 12 digits, as `docker ps` and `crictl ps` print container ids.
fn short_id(id: &str) -> String {
    plain::escape(&id.chars().take(12).collect::<String>())
}

fn path(path: Option<&str>, width: usize, style: &Style) -> String {
    path.map_or_else(|| "an unknown cgroup".to_owned(), |path| plain::elide(path, width, style.unicode))
}

/// The path to copy; one that no runtime makes is cut in the middle.
fn whole_path(cgroup: &Cgroup, style: &Style) -> String {
    match &cgroup.path {
        Some(path) => plain::elide(path, WHOLE_PATH_WIDTH, style.unicode),
        None => unknown_path(cgroup.id),
    }
}

fn unknown_path(id: u64) -> String {
    format!("unknown path (id {id})")
}

/// `SIGKILL`; `signal 35` for a signal without an entry here.
pub(super) fn signal_name(signal: i32) -> String {
    let name = match signal {
        1 => "SIGHUP",
        2 => "SIGINT",
        3 => "SIGQUIT",
        4 => "SIGILL",
        6 => "SIGABRT",
        7 => "SIGBUS",
        8 => "SIGFPE",
        9 => "SIGKILL",
        11 => "SIGSEGV",
        13 => "SIGPIPE",
        14 => "SIGALRM",
        15 => "SIGTERM",
        _ => return format!("signal {signal}"),
    };
    name.to_owned()
}

#[cfg(test)]
mod tests;
