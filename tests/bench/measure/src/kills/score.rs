//! Scores reports of kills against the kills that happened: found, missed, duplicate, wrong. Pure.

use std::collections::BTreeMap;

use memtrace_tests::printk::{KernelLogRecord, killed_pid};

/// A kill that happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Kill {
    /// Process id of the victim.
    pub(super) pid: u32,
    /// Its start, clock ticks since boot.
    pub(super) start_ticks: u64,
    /// Path of its memory cgroup.
    pub(super) path: String,
}

/// A reported kill; `None` for what the report does not contain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ReportedKill {
    /// Process id of the victim.
    pub(super) pid: u32,
    /// Its start, clock ticks since boot.
    pub(super) start_ticks: Option<u64>,
    /// Path of its memory cgroup.
    pub(super) path: Option<String>,
}

/// Quality of reports.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct KillScore {
    /// Kills with exactly one report.
    pub(super) found: usize,
    /// Kills without one.
    pub(super) missed: usize,
    /// Kills with more than one.
    pub(super) double: usize,
    /// Reports about our cgroups or processes that no kill fits: another pid, start or cgroup.
    pub(super) wrong: usize,
    /// Reports that fit and say when the process started.
    pub(super) with_start: usize,
    /// Reports that fit and say the cgroup.
    pub(super) with_path: usize,
}

/// Scores the reports. Other processes may be killed on this machine meanwhile: a report about
/// neither a process nor a cgroup of ours does not count.
pub(super) fn score(truth: &[Kill], reports: &[ReportedKill]) -> KillScore {
    // a pid can be reused; its kills differ by start time
    let mut by_pid: BTreeMap<u32, Vec<(&Kill, usize)>> = BTreeMap::new();
    for kill in truth {
        by_pid.entry(kill.pid).or_default().push((kill, 0));
    }
    let mut score = KillScore::default();
    for report in reports {
        let fits = |kill: &Kill| {
            report.start_ticks.is_none_or(|start| start == kill.start_ticks)
                && report.path.as_ref().is_none_or(|path| *path == kill.path)
        };
        let about = by_pid.get_mut(&report.pid);
        let ours = about.is_some() || report.path.as_ref().is_some_and(|path| truth.iter().any(|k| k.path == *path));
        // of several that fit, one without a report
        match about.and_then(|of| of.iter_mut().filter(|(kill, _)| fits(kill)).min_by_key(|(_, times)| *times)) {
            Some((_, times)) => {
                *times += 1;
                score.with_start += usize::from(report.start_ticks.is_some());
                score.with_path += usize::from(report.path.is_some());
            }
            None => score.wrong += usize::from(ours),
        }
    }
    for (_, times) in by_pid.values().flatten() {
        match times {
            0 => score.missed += 1,
            1 => score.found += 1,
            _ => score.double += 1,
        }
    }
    score
}

/// Reports in the kernel log. The cgroup is missing where its line was rate-limited.
pub(super) fn of_kernel_log(lines: &[KernelLogRecord]) -> Vec<ReportedKill> {
    let mut paths: BTreeMap<u32, String> = BTreeMap::new();
    let mut reports = Vec::new();
    for line in lines {
        if let Some((pid, path)) = oom_kill_line(&line.text) {
            paths.insert(pid, path);
        } else if let Some(pid) = killed_pid(&line.text) {
            reports.push(ReportedKill { pid, start_ticks: None, path: paths.remove(&pid) });
        }
    }
    reports
}

/// Parses `oom-kill:constraint=..,task_memcg=PATH,task=COMM,pid=N,uid=0`.
fn oom_kill_line(text: &str) -> Option<(u32, String)> {
    let fields = text.strip_prefix("oom-kill:")?;
    let (_, rest) = fields.split_once("task_memcg=")?;
    let (path, rest) = rest.split_once(",task=")?;
    let (_, rest) = rest.rsplit_once(",pid=")?;
    Some((rest.split(',').next()?.parse().ok()?, path.to_owned()))
}

/// Parses the output of `oomkill`: `.. OOM kill of PID 22516 ("perl"), ..`.
pub(super) fn of_oomkill(printed: &str) -> Vec<ReportedKill> {
    let pid = |line: &str| {
        let (_, rest) = line.split_once("OOM kill of PID ")?;
        rest.split(' ').next()?.parse().ok()
    };
    printed.lines().filter_map(pid).map(|pid| ReportedKill { pid, start_ticks: None, path: None }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kill(pid: u32, start_ticks: u64, path: &str) -> Kill {
        Kill { pid, start_ticks, path: path.to_owned() }
    }

    fn report(pid: u32, start: u64, path: &str) -> ReportedKill {
        ReportedKill { pid, start_ticks: Some(start), path: Some(path.to_owned()) }
    }

    #[test]
    fn reports_are_counted_once_twice_not_at_all_and_wrong() {
        let truth = [kill(1, 10, "/a"), kill(2, 10, "/b"), kill(3, 10, "/c"), kill(4, 10, "/d")];
        let reports = [
            report(1, 10, "/a"),
            report(2, 10, "/b"),
            report(2, 10, "/b"),
            report(3, 11, "/c"),
            report(9, 10, "/d"),
            report(8, 10, "/elsewhere"),
        ];
        let found = score(&truth, &reports);
        assert_eq!(found, KillScore { found: 1, missed: 2, double: 1, wrong: 2, with_start: 3, with_path: 3 });
    }

    #[test]
    fn a_pid_that_is_used_again_is_two_kills() {
        let truth = [kill(1, 10, "/a"), kill(1, 20, "/a")];
        let bare = ReportedKill { pid: 1, start_ticks: None, path: None };
        assert_eq!(score(&truth, &[bare.clone(), bare.clone()]).found, 2);
        assert_eq!(score(&truth, std::slice::from_ref(&bare)).missed, 1);
        assert_eq!(score(&truth, &[report(1, 20, "/a"), report(1, 20, "/a")]).double, 1);
    }

    #[test]
    fn the_kernel_log_tells_the_cgroup_while_it_may() {
        let line = |text: &str| KernelLogRecord { seq: 0, printk_ns: 0, text: text.to_owned() };
        let lines = [
            line("oom-kill:constraint=CONSTRAINT_MEMCG,nodemask=(null),cpuset=/,task_memcg=/a/b,task=w,pid=7,uid=0"),
            line("Memory cgroup out of memory: Killed process 7 (w) total-vm:1kB"),
            line("Memory cgroup out of memory: Killed process 8 (w) total-vm:1kB"),
        ];
        let expected = [
            ReportedKill { pid: 7, start_ticks: None, path: Some("/a/b".to_owned()) },
            ReportedKill { pid: 8, start_ticks: None, path: None },
        ];
        assert_eq!(of_kernel_log(&lines), expected);
    }

    #[test]
    fn oomkill_names_the_victim() {
        let printed = "Tracing OOM kills... Ctrl-C to stop.\n21:03:39 Triggered by PID 3297 (\"ntpd\"), OOM kill of PID \
                       22516 (\"perl\"), 3850642 pages, loadavg: 0.9 0.4\n";
        assert_eq!(of_oomkill(printed), [ReportedKill { pid: 22516, start_ticks: None, path: None }]);
    }
}
