//! Stories of a stretch without an agent, with its two witnesses and what the ledger has.

use super::*;
use crate::cgroup::oom_kills::CgroupOomKills;

const SEC: u64 = 1_000_000_000;
/// The agent had last read counters and log at 100 s, died at 105 s, and another began at 200 s.
const BEFORE: u64 = 100 * SEC;
const AFTER: u64 = 200 * SEC;
const CLOCK: LogClock = LogClock { boot_ns: AFTER, raw_ns: AFTER - 3 * SEC };

fn at(boot_id: &str, sec: u64) -> Moment {
    Moment {
        boot_id: boot_id.into(),
        boot_ns: sec * SEC,
        wall: format!("2026-03-01T00:{:02}:{:02}Z", sec / 60, sec % 60),
    }
}

fn hook(pid: u32, sec: u64, path: &str) -> KillLine {
    KillLine::Kill(KillEntry {
        incident: "01ARZ3NDEKTSV4RRFFQ69G5FAV".into(),
        boot_ns: sec * SEC,
        wall: String::new(),
        pid,
        tid: None,
        start_boot_ns: 1,
        comm: "x".into(),
        cgroup_path: Some(path.into()),
        usage_bytes: None,
        limit_bytes: None,
        trigger_pid: 1,
        killed: true,
        boot_id: Some("b".into()),
    })
}

/// A kill in the log, with printk's clock three seconds behind.
fn line(seq: u64, pid: u32, sec: u64, path: Option<&str>) -> KilledProcess {
    let cgroup_path = path.map(str::to_owned);
    KilledProcess {
        seq,
        printk_ns: (sec - 3) * SEC,
        pid,
        comm: "e\x1bt".into(),
        cgroup_path,
        ..KilledProcess::default()
    }
}

fn counts(rows: &[(u64, &str, u64)], read_boot_ns: u64) -> OomKillCounts {
    let row = |(id, path, kills): &(u64, &str, u64)| CgroupOomKills {
        id: *id,
        path: (*path).into(),
        kills: *kills,
        read_boot_ns,
        read_until_ns: read_boot_ns,
    };
    OomKillCounts { cgroups: rows.iter().map(row).collect(), complete: true }
}

fn gathered(before: &[(u64, &str, u64)], lines: Vec<KilledProcess>, now: &[(u64, &str, u64)]) -> Gathered {
    let baseline = Baseline {
        boot_id: "b".into(),
        since_boot_ns: BEFORE,
        kernel_log_seq: Some(50),
        counts: counts(before, BEFORE),
    };
    let backlog = Backlog { kills: lines, lost: Some(0), next_seq: Some(99), left_out: 0 };
    Gathered { baseline, backlog: Some(backlog), log_wanted: true, counts: counts(now, AFTER), clock: CLOCK }
}

/// pids of the log's lines, counts by cgroup, and the total.
fn account(gathered: &Gathered, ledger: &[KillLine]) -> (Vec<u32>, Vec<(String, u64)>, Option<u64>) {
    let (mut pids, mut counted, mut total) = (Vec::new(), Vec::new(), None);
    for entry in gathered.account(ledger, |ns| ns.to_string()) {
        match entry {
            UnwatchedEntry::KernelLog(kill) => pids.push(kill.pid),
            UnwatchedEntry::Counter(kills) => counted.push((kills.cgroup_path, kills.kills)),
            UnwatchedEntry::UnwatchedKills(kills) => total = Some(kills.kills),
            UnwatchedEntry::NotWatched(gap) => panic!("{gap:?}"),
        }
    }
    (pids, counted, total)
}

fn count(path: &str, kills: u64) -> (String, u64) {
    (path.into(), kills)
}

#[test]
fn what_the_log_has_not_is_a_count_and_what_hooks_saw_is_neither() {
    let lines = vec![line(60, 5, 102, Some("/a")), line(61, 6, 150, Some("/a")), line(62, 7, 150, Some("/a"))];
    let gathered = gathered(&[(1, "/a", 2), (2, "/b", 4)], lines, &[(1, "/a", 7), (2, "/b", 4), (3, "/new", 1)]);
    // pid 5 was seen: its line came after the counters and the number of the log were read.
    let ledger = [hook(5, 102, "/a"), hook(9, 40, "/a")];
    assert_eq!(account(&gathered, &ledger), (vec![6, 7], vec![count("/a", 2), count("/new", 1)], Some(5)));
    let all = gathered.account(&ledger, |ns| ns.to_string());
    let UnwatchedEntry::KernelLog(kill) = &all[0] else { panic!() };
    assert_eq!((kill.boot_ns, kill.comm.as_str(), kill.kernel_log_seq), (150 * SEC, "e\\x1bt", 61));
}

#[test]
fn a_line_of_a_kill_long_before_that_was_read_late_is_known() {
    // The agent was stopped from 70 s on; at 100 s the log was read up to record 50 still.
    let gathered = gathered(&[(1, "/a", 1)], vec![line(55, 5, 75, None)], &[(1, "/a", 1)]);
    assert_eq!(account(&gathered, &[hook(5, 75, "/a")]), (vec![], vec![], None));
}

#[test]
fn lines_without_a_cgroup_and_counts_can_be_the_same_kills() {
    let lines = vec![line(60, 5, 150, Some("/a")), line(61, 6, 150, None), line(62, 7, 150, None)];
    let now = [(1, "/a", 1), (2, "/b", 1), (3, "/c", 1)];
    let three = gathered(&[(1, "/a", 0), (2, "/b", 0), (3, "/c", 0)], lines.clone(), &now);
    assert_eq!(account(&three, &[]), (vec![5, 6, 7], vec![count("/b", 1), count("/c", 1)], Some(3)));
    // The cgroups are gone, and their counters with them.
    assert_eq!(account(&gathered(&[(1, "/a", 0)], lines, &[]), &[]), (vec![5, 6, 7], vec![], Some(3)));
}

#[test]
fn whoever_could_not_leave_its_state_does_not_make_the_next_run_tell_it_again() {
    let gathered = gathered(&[(1, "/a", 0)], vec![line(60, 5, 150, Some("/a"))], &[(1, "/a", 3)]);
    let first = gathered.account(&[], |ns| ns.to_string());
    assert_eq!(first.len(), 3);
    let ledger: Vec<KillLine> = first.into_iter().map(KillLine::Unwatched).collect();
    assert!(gathered.account(&ledger, |ns| ns.to_string()).is_empty());
}

#[test]
fn the_next_run_goes_on_where_this_one_has_looked() {
    let gathered = gathered(&[(1, "/a", 0)], vec![line(60, 5, 150, None)], &[(1, "/a", 3)]);
    let next = gathered.into_baseline();
    assert_eq!((next.since_boot_ns, next.kernel_log_seq), (AFTER, Some(99)));
    let clock = LogClock { boot_ns: 2 * AFTER, raw_ns: 2 * AFTER };
    let again = Gathered {
        baseline: next,
        backlog: Some(Backlog { lost: Some(0), ..Backlog::default() }),
        log_wanted: true,
        counts: counts(&[(1, "/a", 3)], 2 * AFTER),
        clock,
    };
    assert!(again.account(&[], |ns| ns.to_string()).is_empty());
}

#[test]
fn kills_of_the_new_run_are_in_the_counters_too() {
    let gathered = gathered(&[(1, "/a", 0)], vec![line(60, 5, 199, Some("/a"))], &[(1, "/a", 1)]);
    assert!(account(&gathered, &[hook(5, 199, "/a")]).0.is_empty());
    // One that was killed after the counters were read is not in them.
    let later = hook(8, 201, "/a");
    assert_eq!(account(&gathered, &[later]), (vec![5], vec![], Some(1)));
}

#[test]
fn what_is_not_known_is_not_claimed() {
    let mut short = gathered(&[(1, "/a", 0)], vec![], &[(1, "/a", 0), (2, "/b", 5)]);
    short.baseline.counts.complete = false;
    assert_eq!(account(&short, &[]), (vec![], vec![], None), "/b may have had 5 before");
    let renamed = gathered(&[(1, "/a", 5)], vec![], &[(1, "/other", 5)]);
    assert_eq!(account(&renamed, &[]), (vec![], vec![], None));
    let reused = gathered(&[(1, "/a", 5)], vec![], &[(1, "/a", 2)]);
    assert_eq!(account(&reused, &[]).1, [count("/a", 2)]);
    // Without a number of the log its time decides.
    let mut timed = gathered(&[], vec![line(10, 5, 90, None), line(11, 6, 120, None)], &[]);
    timed.baseline = Baseline::at(&at("b", 105));
    assert_eq!(account(&timed, &[]), (vec![6], vec![], Some(1)));
}

#[test]
fn the_stretch_is_between_the_last_sign_of_the_run_before_and_the_hooks_of_the_next() {
    let now = at("b", 200);
    let state = |boot: &str, sec| WatchState { watched_until: at(boot, sec), baseline: None };
    let run = |boot: &str, sec| LastRun { watched_until: at(boot, sec), stopped: true };
    assert_eq!(not_watched(None, None, &now), None);
    let both = not_watched(Some(&state("b", 100)), Some(&run("b", 105)), &now).unwrap();
    assert_eq!((both.from.boot_ns, both.duration_ns, both.rebooted), (105 * SEC, Some(95 * SEC), false));
    assert_eq!(both.stopped, Some(true));
    assert_eq!(not_watched(Some(&state("b", 100)), None, &now).unwrap().stopped, None);
    // Another boot: the wall clock alone, and none of its kills.
    let boot = not_watched(Some(&state("old", 100)), Some(&run("old", 90)), &now).unwrap();
    assert_eq!((boot.from.boot_ns, boot.duration_ns, boot.rebooted), (100 * SEC, Some(100 * SEC), true));
    assert_eq!(baseline(Some(state("old", 100)), &boot), Baseline::of_boot("b"));
    let backwards = not_watched(Some(&state("old", 900)), None, &now).unwrap();
    assert_eq!(backwards.duration_ns, None);
    assert_eq!(baseline(Some(state("b", 100)), &both), Baseline::at(&at("b", 105)));
}

#[test]
fn after_a_boot_everything_the_kernel_has_is_unwatched() {
    let (lines, now) = (vec![line(3, 5, 20, Some("/a"))], [(1, "/a", 2)]);
    let gathered = Gathered { baseline: Baseline::of_boot("b"), ..gathered(&[], lines, &now) };
    let mut other = hook(5, 20, "/a");
    if let KillLine::Kill(kill) = &mut other {
        kill.boot_id = Some("old".into());
    }
    assert_eq!(account(&gathered, &[other]), (vec![5], vec![count("/a", 1)], Some(2)));
}

#[test]
fn a_victim_that_the_log_knows_by_a_thread_is_one() {
    let mut thread = hook(5, 150, "/a");
    if let KillLine::Kill(kill) = &mut thread {
        kill.tid = Some(77);
    }
    let gathered = gathered(&[(1, "/a", 0)], vec![line(60, 77, 150, Some("/a"))], &[(1, "/a", 1)]);
    assert_eq!(account(&gathered, &[thread]), (vec![], vec![], None));
    assert_eq!(account(&gathered, &[hook(5, 150, "/a")]).0, [77], "another process");
}

#[test]
fn a_path_that_the_hook_has_cut_is_that_of_its_cgroup() {
    let long = format!("/{}", "é".repeat(400));
    // 511 bytes end inside a character, whose first byte is escaped.
    let cut = format!("{}\\xc3…", &long[..509]);
    let gathered = gathered(&[(1, &long, 0), (2, "/x", 0)], vec![], &[(1, &long, 2), (2, "/x", 1)]);
    let ledger = [hook(5, 150, &cut), hook(6, 150, "/…")];
    assert_eq!(account(&gathered, &ledger), (vec![], vec![count("/x", 1), count(&long, 1)], Some(2)));
}

#[test]
fn a_kill_during_a_reading_is_neither_counted_twice_nor_in_place_of_another() {
    // Both readings took half a second.
    let reading = |before: u64, now: u64| {
        let mut gathered = gathered(&[(1, "/a", before)], vec![], &[(1, "/a", now)]);
        gathered.baseline.counts.cgroups[0].read_until_ns = BEFORE + SEC / 2;
        gathered.counts.cgroups[0].read_until_ns = AFTER + SEC / 2;
        gathered
    };
    let at = |ns: u64| {
        let mut kill = hook(5, 0, "/a");
        if let KillLine::Kill(kill) = &mut kill {
            kill.boot_ns = ns;
        }
        kill
    };
    for during in [BEFORE + SEC / 4, AFTER + SEC / 4] {
        assert_eq!(account(&reading(0, 1), &[at(during)]), (vec![], vec![], None), "{during}");
        // It is in the difference or not: two are at least one more.
        assert_eq!(account(&reading(0, 2), &[at(during)]).1, [count("/a", 1)], "{during}");
        let all = reading(0, 2).account(&[at(during)], |ns| ns.to_string());
        let Some(UnwatchedEntry::UnwatchedKills(total)) = all.last() else { panic!() };
        assert_eq!(total.cgroups_not_compared, 1, "what was not told apart is said");
    }
    // Before the first reading, or after the last: it is in both, or in neither.
    for outside in [BEFORE - SEC, AFTER + SEC] {
        assert_eq!(account(&reading(0, 1), &[at(outside)]).1, [count("/a", 1)], "{outside}");
    }
}

#[test]
fn nothing_found_is_not_nothing_lost() {
    let mut gathered = gathered(&[], vec![], &[]);
    assert!(gathered.account(&[], |ns| ns.to_string()).is_empty());
    for lost in [Some(7), None] {
        gathered.backlog = Some(Backlog { lost, ..Backlog::default() });
        let all = gathered.account(&[], |ns| ns.to_string());
        let [UnwatchedEntry::UnwatchedKills(total)] = &all[..] else { panic!("{all:?}") };
        assert_eq!((total.kills, total.kernel_log_lines_lost), (0, lost));
    }
    // The log could not be read, or is not wanted.
    gathered.backlog = None;
    assert_eq!(gathered.account(&[], |ns| ns.to_string()).len(), 1);
    gathered.log_wanted = false;
    assert!(gathered.account(&[], |ns| ns.to_string()).is_empty());
}
