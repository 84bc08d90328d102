//! One honest sentence about what happened, with the numbers it rests on. Pure, and a table of cases below.

use super::census::resident;
use memtrace_incident::{Columns, Composition, Growth, Pressure, PressureLimit, Scope, TaskRow, Verdict};

const SEC: u64 = 1_000_000_000;
/// A process this young at the event makes it a start-up.
const YOUNG_NS: u64 = 5 * SEC;

/// What the sentence is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum About<'a> {
    Oom { scope: Scope, killed: bool },
    Spike,
    Pressure(&'a Pressure),
    Recording,
}

/// What is known about it.
pub(super) struct Case<'a> {
    pub(super) about: About<'a>,
    /// Path of the cgroup that ran out, spiked or was recorded.
    pub(super) path: Option<&'a str>,
    /// The event, or a recording's peak.
    pub(super) at_ns: u64,
    pub(super) usage: Option<u64>,
    pub(super) limit: Option<u64>,
    pub(super) curve: &'a Columns,
    pub(super) tasks: &'a [TaskRow],
    pub(super) growth: &'a [Growth],
    pub(super) composition: &'a Composition,
}

/// How memory came to be where it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shape {
    /// Within a second.
    Burst { rise: u64, over_ns: u64 },
    /// Over the window.
    Growth { rise: u64, over_ns: u64 },
    /// It was there all the time.
    Level { over_ns: u64 },
    /// Too few readings.
    Unknown,
}

/// Who holds it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Holder {
    /// One process more than half.
    One {
        pid: u32,
        comm: String,
        bytes: u64,
    },
    /// Nobody more than half.
    Many {
        processes: usize,
        largest: u64,
    },
    /// Shared memory or tmpfs mapped by processes.
    Shared(u64),
    /// No process: page cache, unmapped tmpfs, kernel memory.
    Nobody(u64),
    Unknown,
}

pub(super) fn judge(case: &Case<'_>) -> Verdict {
    let shape = shape(case.curve, case.at_ns, case.limit);
    let holder = holder(case);
    let mut summary = subject(case);
    if let About::Pressure(pressure) = case.about {
        // What to do about it has the place of how it came to be, which is in the evidence.
        summary.push_str(&holder_clause(&holder));
        summary.push_str(&outcome(pressure));
    } else {
        summary.push_str(&shape_clause(case, shape));
        summary.push_str(&holder_clause(&holder));
        summary.push_str(&young(case, &holder).unwrap_or_default());
    }
    if case.about_mark_only() {
        summary.push_str("; the kernel killed nobody: the victim was chosen while it was already exiting");
    }
    summary.push('.');
    Verdict { summary, evidence: evidence(case, shape, &holder) }
}

impl Case<'_> {
    fn about_mark_only(&self) -> bool {
        matches!(self.about, About::Oom { killed: false, .. })
    }
}

fn subject(case: &Case<'_>) -> String {
    // The file names the cgroup beside this sentence; an ancestor is worth naming here.
    let name = match (case.about, case.path) {
        (About::Oom { scope: Scope::Ancestor, .. }, Some(path)) => format!("The ancestor cgroup {path}"),
        (About::Oom { scope: Scope::Ancestor, .. }, None) => "An ancestor cgroup".to_owned(),
        _ => "The cgroup".to_owned(),
    };
    let limit = case.limit.map_or_else(String::new, |l| format!(" at its limit of {}", bytes(l)));
    match case.about {
        About::Oom { scope: Scope::Cgroup | Scope::Ancestor, .. } => format!("{name} ran out of memory{limit}"),
        About::Oom { scope: Scope::Global, .. } => "The machine ran out of memory".to_owned(),
        About::Oom { scope: Scope::Cpuset, .. } => "The memory nodes of a cpuset ran out of memory".to_owned(),
        About::Oom { scope: Scope::Unknown, .. } => "Memory ran out, where was not found".to_owned(),
        About::Spike => {
            let peak = case.usage.map_or_else(|| "close to the limit".to_owned(), bytes);
            let of = case.limit.map_or_else(String::new, |l| format!(" of its limit of {}", bytes(l)));
            format!("{name} rose to {peak}{of} and fell again without a kill")
        }
        About::Pressure(pressure) => {
            let bytes = case.limit.map_or_else(String::new, |l| format!(" of {}", bytes(l)));
            match pressure.limit {
                PressureLimit::Max if let Some(ns) = pressure.under_oom_ns => {
                    format!("{name} was stuck at its limit{bytes} for {}", duration(ns))
                }
                PressureLimit::Max => format!("{name} hit its limit{bytes}"),
                PressureLimit::High => format!("{name} was slowed down at its memory.high{bytes}"),
            }
        }
        About::Recording => match case.usage {
            Some(peak) => format!("Memory peaked at {}", bytes(peak)),
            None => "No reading of memory was taken".to_owned(),
        },
    }
}

/// What a limit that was hit came to, and what to do.
fn outcome(pressure: &Pressure) -> String {
    if pressure.under_oom_ns.is_some() {
        return ": its OOM killer is off (memory.oom_control), so tasks waited for memory; raise the limit, end a \
                process or switch it on"
            .to_owned();
    }
    let hits = match pressure.hits {
        1 => "1 hit".to_owned(),
        hits => format!("{hits} hits in {}", duration(pressure.until_boot_ns.saturating_sub(pressure.from_boot_ns))),
    };
    let held_up = match pressure.stalled_ns {
        None | Some(0) => String::new(),
        Some(ns) => format!(", tasks held up {}", duration(ns)),
    };
    match pressure.limit {
        PressureLimit::Max => {
            format!(
                "; reclaim made room without a kill ({hits}{held_up}): raise the limit or let it use less, or the next rise may be killed"
            )
        }
        PressureLimit::High => format!(
            "; nobody is killed for that ({hits}{held_up}): raise memory.high or let it use less to be fast again"
        ),
    }
}

/// The curve is that of what ran out; for the machine it is only that of the victim's cgroup.
fn about_curve(about: About<'_>) -> bool {
    !matches!(about, About::Oom { scope: Scope::Global | Scope::Cpuset | Scope::Unknown, .. })
}

fn shape_clause(case: &Case<'_>, shape: Shape) -> String {
    let it = if about_curve(case.about) { "it" } else { "the victim's cgroup" };
    let to = match (case.about, case.limit) {
        (About::Oom { scope: Scope::Cgroup | Scope::Ancestor, .. }, Some(_)) => " to the limit",
        _ => "",
    };
    match shape {
        Shape::Burst { rise, over_ns } => format!(": {it} rose {} in {}{to}", bytes(rise), duration(over_ns)),
        Shape::Growth { rise, over_ns } => {
            format!(": {it} grew {} over {}, {}/s", bytes(rise), duration(over_ns), bytes(rate(rise, over_ns)))
        }
        Shape::Level { over_ns } if over_ns >= SEC => {
            format!(": {it} hardly grew in the {} before", duration(over_ns))
        }
        Shape::Level { .. } | Shape::Unknown => String::new(),
    }
}

fn holder_clause(holder: &Holder) -> String {
    match holder {
        Holder::One { pid, comm, bytes: held } => format!(", most of it in {comm} (pid {pid}, {})", bytes(*held)),
        Holder::Many { processes, largest } => {
            format!(", spread over {processes} processes, the largest with {}", bytes(*largest))
        }
        Holder::Shared(held) => format!(", {} of it shared memory or tmpfs", bytes(*held)),
        Holder::Nobody(held) => {
            format!(", {} of it resident in no process (page cache, tmpfs or kernel memory)", bytes(*held))
        }
        Holder::Unknown => String::new(),
    }
}

/// The holder had only just started.
fn young(case: &Case<'_>, holder: &Holder) -> Option<String> {
    let Holder::One { pid, .. } = holder else { return None };
    let start = case
        .tasks
        .iter()
        .find(|t| t.pid == *pid)
        .and_then(|t| t.start_boot_ns)
        .or_else(|| case.growth.iter().find(|g| g.pid == *pid).map(|g| g.start_boot_ns))?;
    let age = case.at_ns.checked_sub(start)?;
    (age < YOUNG_NS).then(|| format!(", which had started {} before", duration(age)))
}

/// How the curve came to its value at a moment. Usage where there are readings of it, else resident memory.
pub(super) fn shape(curve: &Columns, at_ns: u64, limit: Option<u64>) -> Shape {
    let sums = curve.anon_bytes.iter().zip(&curve.file_bytes).zip(&curve.shmem_bytes);
    let rows = curve.boot_ns.iter().zip(&curve.usage_bytes).zip(sums).filter(|((ns, _), _)| **ns <= at_ns);
    let all: Vec<(u64, Option<u64>, u64)> = rows
        .map(|((ns, usage), ((anon, file), shmem))| (*ns, *usage, anon.saturating_add(*file).saturating_add(*shmem)))
        .collect();
    let with_usage: Vec<(u64, u64)> = all.iter().filter_map(|(ns, usage, _)| Some((*ns, (*usage)?))).collect();
    let series: Vec<(u64, u64)> =
        if with_usage.len() >= 2 { with_usage } else { all.iter().map(|(ns, _, sum)| (*ns, *sum)).collect() };
    let (Some(&(first_ns, _)), Some(&(_, end))) = (series.first(), series.last()) else { return Shape::Unknown };
    if series.len() < 2 {
        return Shape::Unknown;
    }
    let reference = limit.unwrap_or(end).max(1);
    let recent = || series.iter().filter(|(ns, _)| *ns >= at_ns.saturating_sub(SEC));
    let low = recent().map(|(_, v)| *v).min().unwrap_or(end);
    let rise = end.saturating_sub(low);
    if rise >= reference / 4 && rise > 0 {
        let began = recent().filter(|(_, v)| *v <= low.saturating_add(rise / 50)).map(|(ns, _)| *ns).max();
        return Shape::Burst { rise, over_ns: at_ns.saturating_sub(began.unwrap_or(at_ns)) };
    }
    let Some(&(low_ns, low)) = series.iter().rev().min_by_key(|(_, v)| *v) else { return Shape::Unknown };
    let (rise, over_ns) = (end.saturating_sub(low), at_ns.saturating_sub(low_ns));
    if rise >= reference / 10 && over_ns >= SEC {
        return Shape::Growth { rise, over_ns };
    }
    Shape::Level { over_ns: at_ns.saturating_sub(first_ns) }
}

/// Who holds most of it.
pub(super) fn holder(case: &Case<'_>) -> Holder {
    let c = case.composition;
    let shmem = c.shmem_bytes.unwrap_or(0);
    if let Some(usage) = case.usage.filter(|u| *u > 0 && about_curve(case.about)) {
        let nobody = c.unattributed_bytes.and_then(|b| u64::try_from(b).ok()).unwrap_or(0);
        if nobody.saturating_mul(2) >= usage {
            return Holder::Nobody(nobody);
        }
        if shmem.saturating_mul(2) >= usage {
            return Holder::Shared(shmem);
        }
    }
    let from_growth = || case.growth.iter().map(|g| (g.rss_bytes, g.pid, g.comm.as_str()));
    let from_tasks = || case.tasks.iter().map(|t| (resident(t), t.pid, t.comm.as_str()));
    let held: Vec<(u64, u32, &str)> =
        if case.tasks.is_empty() { from_growth().collect() } else { from_tasks().collect() };
    let total: u64 = held.iter().fold(0, |sum, (b, ..)| sum.saturating_add(*b));
    match held.iter().max_by_key(|(b, pid, _)| (*b, std::cmp::Reverse(*pid))) {
        Some((most, pid, comm)) if *most > 0 && most.saturating_mul(2) >= total => {
            Holder::One { pid: *pid, comm: (*comm).to_owned(), bytes: *most }
        }
        Some((most, ..)) if *most > 0 => Holder::Many { processes: held.len(), largest: *most },
        _ => Holder::Unknown,
    }
}

fn evidence(case: &Case<'_>, shape: Shape, holder: &Holder) -> Vec<String> {
    let mut out = Vec::new();
    if !about_curve(case.about) {
        out.push("usage, curve and composition are those of the victim's cgroup".to_owned());
    }
    match (case.usage, case.limit) {
        (Some(usage), Some(limit)) => {
            let high = matches!(case.about, About::Pressure(p) if p.limit == PressureLimit::High);
            let which = if high { "memory.high" } else { "limit" };
            out.push(format!("usage {} of {which} {}", bytes(usage), bytes(limit)));
        }
        (Some(usage), None) => out.push(format!("usage {}, no limit of its own", bytes(usage))),
        (None, _) => out.push("usage was not read".to_owned()),
    }
    out.push(format!(
        "{} readings of the curve, {}",
        case.curve.boot_ns.len(),
        match shape {
            Shape::Burst { rise, over_ns } => format!("up {} in the last {}", bytes(rise), duration(over_ns)),
            Shape::Growth { rise, over_ns } => format!("up {} in {}", bytes(rise), duration(over_ns)),
            Shape::Level { over_ns } => format!("level for {}", duration(over_ns)),
            Shape::Unknown => "too few to tell its shape".to_owned(),
        }
    ));
    let c = case.composition;
    let parts = [
        (c.anon_bytes, "anonymous"),
        (c.file_bytes, "file"),
        (c.shmem_bytes, "shared"),
        (c.unattributed_bytes.and_then(|b| u64::try_from(b).ok()), "unattributed"),
    ];
    let parts: Vec<String> = parts.iter().filter_map(|(b, what)| Some(format!("{} {what}", bytes((*b)?)))).collect();
    if !parts.is_empty() {
        out.push(parts.join(", "));
    }
    if let Some(g) = case.growth.first() {
        let grown = |b: Option<i64>| b.map_or_else(|| "unknown".to_owned(), signed);
        out.push(format!(
            "{} (pid {}) grew most: {} in 100 ms, {} in 1 s, {} in 10 s",
            g.comm,
            g.pid,
            grown(g.last_100ms_bytes),
            grown(g.last_1s_bytes),
            grown(g.last_10s_bytes)
        ));
    }
    if let Holder::Many { processes, .. } = holder {
        out.push(format!("no single one of {processes} processes held more than half"));
    }
    out
}

fn rate(rise: u64, over_ns: u64) -> u64 {
    u64::try_from(u128::from(rise) * u128::from(SEC) / u128::from(over_ns.max(1))).unwrap_or(u64::MAX)
}

/// Bytes for people: three significant digits at most.
pub(super) fn bytes(n: u64) -> String {
    const UNITS: [(u64, &str); 5] =
        [(1 << 50, "PiB"), (1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")];
    match UNITS.iter().find(|(size, _)| n >= *size) {
        None => format!("{n} B"),
        Some((size, unit)) => scaled(n, *size, unit),
    }
}

fn signed(n: i64) -> String {
    format!("{}{}", if n < 0 { "-" } else { "" }, bytes(n.unsigned_abs()))
}

/// A span of time for people.
pub(super) fn duration(ns: u64) -> String {
    const UNITS: [(u64, &str); 4] = [(60 * SEC, "min"), (SEC, "s"), (1_000_000, "ms"), (1_000, "us")];
    match UNITS.iter().find(|(size, _)| ns >= *size) {
        None => format!("{ns} ns"),
        Some((size, unit)) => scaled(ns, *size, unit),
    }
}

fn scaled(n: u64, size: u64, unit: &str) -> String {
    let tenths = u128::from(n) * 10 / u128::from(size.max(1));
    if tenths >= 100 || tenths % 10 == 0 {
        format!("{} {unit}", tenths / 10)
    } else {
        format!("{}.{} {unit}", tenths / 10, tenths % 10)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;
    const MS: u64 = 1_000_000;
    const AT: u64 = 100 * SEC;

    fn curve(points: &[(u64, u64)]) -> Columns {
        let n = points.len();
        Columns {
            boot_ns: points.iter().map(|(ago, _)| AT - ago).collect(),
            usage_bytes: points.iter().map(|(_, v)| Some(v * MIB)).collect(),
            limit_bytes: vec![None; n],
            watermark_bytes: vec![None; n],
            anon_bytes: vec![0; n],
            file_bytes: vec![0; n],
            shmem_bytes: vec![0; n],
            swap_bytes: vec![0; n],
            swap_usage_bytes: vec![None; n],
            swap_limit_bytes: vec![None; n],
        }
    }

    fn task(pid: u32, mib: u64, age: u64) -> TaskRow {
        TaskRow {
            pid,
            start_boot_ns: Some(AT - age),
            comm: format!("p{pid}"),
            anon_bytes: mib * MIB,
            file_bytes: 0,
            shmem_bytes: 0,
            swap_bytes: 0,
            peak_bytes: 0,
            victim: false,
        }
    }

    #[test]
    fn the_decision_table_of_verdicts() {
        let anon = Composition { anon_bytes: Some(250 * MIB), ..Composition::default() };
        let cache = Composition { unattributed_bytes: Some(200 * MIB as i64), ..Composition::default() };
        let tmpfs = Composition { shmem_bytes: Some(180 * MIB), ..Composition::default() };
        let burst = curve(&[(2000 * MS, 35), (500 * MS, 36), (48 * MS, 36), (20 * MS, 150), (0, 256)]);
        let slow = curve(&[(20 * SEC, 16), (10 * SEC, 136), (SEC, 244), (0, 256)]);
        let level = curve(&[(20 * SEC, 250), (0, 256)]);
        let one = [task(42, 230, 60 * SEC), task(43, 10, 60 * SEC)];
        let young = [task(42, 230, 1200 * MS)];
        let many: Vec<TaskRow> = (1..=50).map(|pid| task(pid, 5, 60 * SEC)).collect();
        let cases: &[(&str, &Columns, &[TaskRow], &Composition, &str)] = &[
            (
                "burst",
                &burst,
                &one,
                &anon,
                ": it rose 220 MiB in 48 ms to the limit, most of it in p42 (pid 42, 230 MiB).",
            ),
            ("slow", &slow, &one, &anon, ": it grew 240 MiB over 20 s, 12 MiB/s, most of it in p42 (pid 42, 230 MiB)."),
            (
                "start-up",
                &burst,
                &young,
                &anon,
                ": it rose 220 MiB in 48 ms to the limit, most of it in p42 (pid 42, 230 MiB), which had started 1.2 s before.",
            ),
            (
                "many",
                &slow,
                &many,
                &anon,
                ": it grew 240 MiB over 20 s, 12 MiB/s, spread over 50 processes, the largest with 5 MiB.",
            ),
            (
                "page cache",
                &slow,
                &one,
                &cache,
                ": it grew 240 MiB over 20 s, 12 MiB/s, 200 MiB of it resident in no process (page cache, tmpfs or kernel memory).",
            ),
            (
                "tmpfs",
                &slow,
                &one,
                &tmpfs,
                ": it grew 240 MiB over 20 s, 12 MiB/s, 180 MiB of it shared memory or tmpfs.",
            ),
            ("level", &level, &one, &anon, ": it hardly grew in the 20 s before, most of it in p42 (pid 42, 230 MiB)."),
            ("no readings", &curve(&[]), &[], &Composition::default(), "."),
        ];
        for (name, curve, tasks, composition, rest) in cases {
            let verdict = judge(&Case {
                about: About::Oom { scope: Scope::Cgroup, killed: true },
                path: Some("/a"),
                at_ns: AT,
                usage: Some(256 * MIB),
                limit: Some(256 * MIB),
                curve,
                tasks,
                growth: &[],
                composition,
            });
            assert_eq!(
                verdict.summary,
                format!("The cgroup ran out of memory at its limit of 256 MiB{rest}"),
                "{name}"
            );
            assert!(!verdict.evidence.is_empty(), "{name}");
        }
    }

    fn pressure(limit: PressureLimit, hits: u64) -> Pressure {
        Pressure {
            from_boot_ns: AT,
            until_boot_ns: AT + 2 * SEC,
            limit,
            hits,
            stalled_ns: Some(30 * MS),
            oom_kill_disabled: None,
            under_oom_ns: None,
            tasks: Vec::new(),
        }
    }

    #[test]
    fn the_subject_says_what_ran_out() {
        let all = [
            (About::Oom { scope: Scope::Global, killed: true }, "The machine ran out of memory."),
            (About::Oom { scope: Scope::Cpuset, killed: true }, "The memory nodes of a cpuset ran out of memory."),
            (About::Oom { scope: Scope::Unknown, killed: true }, "Memory ran out, where was not found."),
            (
                About::Oom { scope: Scope::Ancestor, killed: false },
                "The ancestor cgroup /a ran out of memory at its limit of 8 MiB; the kernel killed nobody: the victim was chosen \
                 while it was already exiting.",
            ),
            (About::Spike, "The cgroup rose to 7.5 MiB of its limit of 8 MiB and fell again without a kill."),
            (
                About::Pressure(&pressure(PressureLimit::Max, 5)),
                "The cgroup hit its limit of 8 MiB; reclaim made room without a kill (5 hits in 2 s, tasks held up 30 ms): raise the limit or let it use less, or the next rise may be killed.",
            ),
            (
                About::Pressure(&pressure(PressureLimit::High, 1)),
                "The cgroup was slowed down at its memory.high of 8 MiB; nobody is killed for that (1 hit, tasks held up 30 ms): raise memory.high or let it use less to be fast again.",
            ),
            (About::Recording, "Memory peaked at 7.5 MiB."),
        ];
        for (about, expected) in all {
            let verdict = judge(&Case {
                about,
                path: Some("/a"),
                at_ns: AT,
                usage: Some(15 * MIB / 2),
                limit: Some(8 * MIB),
                curve: &Columns::default(),
                tasks: &[],
                growth: &[],
                composition: &Composition::default(),
            });
            assert_eq!(verdict.summary, expected);
        }
    }

    #[test]
    fn numbers_are_short() {
        let all = [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (220 << 20, "220 MiB"), (u64::MAX, "16383 PiB")];
        all.iter().for_each(|(n, text)| assert_eq!(bytes(*n), *text));
        let all = [(5, "5 ns"), (48_000_000, "48 ms"), (1_200_000_000, "1.2 s"), (90 * SEC, "1.5 min")];
        all.iter().for_each(|(n, text)| assert_eq!(duration(*n), *text));
        assert_eq!(signed(-2048), "-2 KiB");
    }
}
