//! The facts that a verdict rests on, from curve and processes: how memory rose, and which process
//! holds it. [`super::verdict`] makes the sentence.

use memtrace_incident::{Columns, Composition, Growth, Pressure, Scope, TaskRow};

use crate::world::resident;

const SEC: u64 = 1_000_000_000;
/// A holder younger than this at the event is said to have just started.
const YOUNG_NS: u64 = 5 * SEC;

/// The event that the verdict is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum About<'a> {
    Oom { scope: Scope, killed: bool },
    Spike,
    Pressure(&'a Pressure),
    Recording,
}

/// What the verdict is made from.
pub(crate) struct VerdictInput<'a> {
    pub(crate) about: About<'a>,
    /// Path of the cgroup that ran out of memory, spiked or was recorded.
    pub(crate) path: Option<&'a str>,
    /// Time of the event, or of the peak of a recording.
    pub(crate) at_ns: u64,
    pub(crate) usage: Option<u64>,
    pub(crate) limit: Option<u64>,
    pub(crate) curve: &'a Columns,
    pub(crate) tasks: &'a [TaskRow],
    pub(crate) growth: &'a [Growth],
    pub(crate) composition: &'a Composition,
}

/// How memory rose up to the event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shape {
    /// It rose by a quarter of the limit within a second.
    Burst { rise: u64, over_ns: u64 },
    /// It rose by a tenth of the limit within the window.
    Growth { rise: u64, over_ns: u64 },
    /// It hardly rose.
    Level { over_ns: u64 },
    /// There are too few readings.
    Unknown,
}

/// What holds most of the memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Holder {
    /// One process holds at least half.
    One {
        pid: u32,
        comm: String,
        bytes: u64,
    },
    /// No process holds half.
    Many {
        processes: usize,
        largest: u64,
    },
    /// Shared memory and tmpfs that processes map hold at least half: bytes.
    Shared(u64),
    /// At least half is resident in no process (page cache, unmapped tmpfs, kernel memory): bytes.
    NoProcess(u64),
    Unknown,
}

/// How the curve rose to its value at a moment. It uses usage, or resident memory when usage was
/// not read twice.
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

/// What holds most of the memory.
pub(crate) fn holder(case: &VerdictInput<'_>) -> Holder {
    let c = case.composition;
    let shmem = c.shmem_bytes.unwrap_or(0);
    if let Some(usage) = case.usage.filter(|u| *u > 0 && about_curve(case.about)) {
        let no_process = c.unattributed_bytes.and_then(|b| u64::try_from(b).ok()).unwrap_or(0);
        if no_process.saturating_mul(2) >= usage {
            return Holder::NoProcess(no_process);
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

/// Whether the curve is of what ran out of memory. For the machine there is none, and the victim's
/// cgroup is shown.
pub(crate) fn about_curve(about: About<'_>) -> bool {
    !matches!(about, About::Oom { scope: Scope::Global | Scope::Cpuset | Scope::Unknown, .. })
}

/// Age of the holder at the event, nanoseconds, when it is below [`YOUNG_NS`].
pub(crate) fn age_if_young(case: &VerdictInput<'_>, holder: &Holder) -> Option<u64> {
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
