//! The facts a verdict rests on, from the curve and the processes: how memory came to be where it was,
//! and who holds it. No words here; [`super::verdict`] has those.

use memtrace_incident::{Columns, Composition, Growth, Pressure, Scope, TaskRow};

use crate::world::resident;

const SEC: u64 = 1_000_000_000;
/// A process this young at the event makes it a start-up.
const YOUNG_NS: u64 = 5 * SEC;

/// What the sentence is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum About<'a> {
    Oom { scope: Scope, killed: bool },
    Spike,
    Pressure(&'a Pressure),
    Recording,
}

/// What is known about it.
pub(crate) struct Judged<'a> {
    pub(crate) about: About<'a>,
    /// Path of the cgroup that ran out, spiked or was recorded.
    pub(crate) path: Option<&'a str>,
    /// The event, or a recording's peak.
    pub(crate) at_ns: u64,
    pub(crate) usage: Option<u64>,
    pub(crate) limit: Option<u64>,
    pub(crate) curve: &'a Columns,
    pub(crate) tasks: &'a [TaskRow],
    pub(crate) growth: &'a [Growth],
    pub(crate) composition: &'a Composition,
}

/// How memory came to be where it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shape {
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
pub(crate) enum Holder {
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

/// How the curve came to its value at a moment. Usage where there are readings of it, else resident memory.
pub(crate) fn shape(curve: &Columns, at_ns: u64, limit: Option<u64>) -> Shape {
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
pub(crate) fn holder(case: &Judged<'_>) -> Holder {
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

/// The curve is that of what ran out; for the machine it is only that of the victim's cgroup.
pub(crate) fn about_curve(about: About<'_>) -> bool {
    !matches!(about, About::Oom { scope: Scope::Global | Scope::Cpuset | Scope::Unknown, .. })
}

/// The age of a holder that had only just started, nanoseconds.
pub(crate) fn age_if_young(case: &Judged<'_>, holder: &Holder) -> Option<u64> {
    let Holder::One { pid, .. } = holder else { return None };
    let start = case
        .tasks
        .iter()
        .find(|t| t.pid == *pid)
        .and_then(|t| t.start_boot_ns)
        .or_else(|| case.growth.iter().find(|g| g.pid == *pid).map(|g| g.start_boot_ns))?;
    let age = case.at_ns.checked_sub(start)?;
    (age < YOUNG_NS).then_some(age)
}
