//! The verdict: one sentence about what happened, with the figures it rests on. All sentences of
//! the engine are here; the facts come from [`super::shape`]. Example: "The cgroup ran out of
//! memory at its limit of 256 MiB: it rose 220 MiB in 48 ms to the limit, most of it in app (pid
//! 42, 230 MiB)."

use memtrace_incident::units::{bytes, duration, growth as signed};
use memtrace_incident::{Pressure, PressureLimit, Scope, Verdict};

pub(crate) use super::shape::{About, VerdictInput};
use super::shape::{Holder, Shape, about_curve, age_if_young, holder, shape};

const SEC: u64 = 1_000_000_000;

pub(crate) fn judge(case: &VerdictInput<'_>) -> Verdict {
    // What a program did is told by its own size: it need not have come near its limit.
    let limit = case.limit.filter(|_| !matches!(case.about, About::Recording));
    let shape = shape(case.curve, case.at_ns, limit);
    let holder = holder(case);
    let mut summary = subject(case);
    if let About::Pressure(pressure) = case.about {
        // The sentence says what to do instead of how memory rose, which is in the evidence.
        summary.push_str(&holder_clause(&holder));
        summary.push_str(&outcome(pressure));
    } else {
        summary.push_str(&shape_clause(case, shape));
        summary.push_str(&holder_clause(&holder));
        summary.push_str(&young_clause(age_if_young(case, &holder)));
    }
    if matches!(case.about, About::Oom { killed: false, .. }) {
        summary.push_str("; the kernel killed nobody: the victim was chosen while it was already exiting");
    }
    summary.push('.');
    Verdict { summary, evidence: evidence(case, shape, &holder) }
}

fn subject(case: &VerdictInput<'_>) -> String {
    // Reports show the path of the incident's cgroup beside this sentence, but not that of an
    // ancestor.
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

/// What followed from a limit that was hit, and what to do.
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

fn shape_clause(case: &VerdictInput<'_>, shape: Shape) -> String {
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
        Holder::NoProcess(held) => {
            format!(", {} of it resident in no process (page cache, tmpfs or kernel memory)", bytes(*held))
        }
        Holder::Unknown => String::new(),
    }
}

/// Says that the holder had just started.
fn young_clause(age_ns: Option<u64>) -> String {
    age_ns.map_or_else(String::new, |age| format!(", which had started {} before", duration(age)))
}

fn evidence(case: &VerdictInput<'_>, shape: Shape, holder: &Holder) -> Vec<String> {
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

#[cfg(test)]
mod tests {
    use memtrace_incident::{Columns, Composition, TaskRow};

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
    fn a_verdict_states_the_rise_and_the_holder() {
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
            let verdict = judge(&VerdictInput {
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

    #[test]
    fn a_recording_is_judged_by_its_own_size_however_far_its_limit_is() {
        let curve = curve(&[(800 * MS, 0), (400 * MS, 20), (0, 47)]);
        let judged = |limit| {
            judge(&VerdictInput {
                about: About::Recording,
                path: Some("/a"),
                at_ns: AT,
                usage: Some(47 * MIB),
                limit,
                curve: &curve,
                tasks: &[],
                growth: &[],
                composition: &Composition::default(),
            })
            .summary
        };
        assert_eq!(judged(Some(256 * MIB)), judged(None));
        assert_eq!(judged(None), "Memory peaked at 47 MiB: it rose 47 MiB in 800 ms.");
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
            let verdict = judge(&VerdictInput {
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
}
