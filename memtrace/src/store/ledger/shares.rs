//! Who keeps how much of the SIGKILL ledger when it is full. Anybody can kill their own children
//! and so write to it; if the oldest lines went first, a user could end everybody else's evidence
//! in minutes.
//!
//! So the room is shared: half each for root with the kernel and for everybody else, within that
//! between users, and then between the cgroups they sent from. Whoever needs less than a share
//! leaves the rest to the others. Each keeps its newest lines, and the oldest of these says how
//! many more there were. Example: user 1000 sent 40,000 and root three; root keeps three lines, and
//! user 1000 what fits in the rest.

use std::collections::{BTreeMap, BTreeSet};

use memtrace_incident::{MoreSigkills, SigkillCause, SigkillEntry};

/// Users, or cgroups of one user, that have a share of their own, those first that have been there
/// the longest; the others share one.
const MOST: usize = 24;
/// Levels at which the room is shared: root or not, user, cgroup.
const LEVELS: usize = 3;

/// An entry, and the bytes of its line.
struct Line {
    entry: SigkillEntry,
    bytes: u64,
}

/// What of `entries`, oldest first, is kept in about `room` bytes, in the same order. One line is
/// kept for each share.
pub(super) fn keep(entries: Vec<SigkillEntry>, room: u64) -> Vec<SigkillEntry> {
    // After a crash between two renames the same entry is in both files.
    let mut seen = BTreeSet::new();
    let lines: Vec<Line> = entries
        .into_iter()
        .filter(|entry| seen.insert((entry.boot_ns, entry.pid, entry.start_boot_ns, entry.wall.clone())))
        .map(|entry| Line { bytes: serde_json::to_vec(&entry).map_or(0, |line| line.len() as u64 + 1), entry })
        .collect();
    let mut kept = Vec::new();
    share(lines, room, 0, true, &mut kept);
    kept.sort_by(|a, b| (&a.wall, a.boot_ns).cmp(&(&b.wall, b.boot_ns)));
    kept
}

/// Shares `room` between what differs at this level.
fn share(lines: Vec<Line>, room: u64, level: usize, same: bool, kept: &mut Vec<SigkillEntry>) {
    if level >= LEVELS || !same {
        kept.extend(newest(lines, room, same));
        return;
    }
    let mut groups: BTreeMap<String, (bool, Vec<Line>)> = BTreeMap::new();
    for line in lines {
        let key = key(&line.entry, level);
        let alone = groups.contains_key(&key) || groups.len() < MOST;
        let key = if alone { key } else { "others".to_owned() };
        groups.entry(key).or_insert_with(|| (alone, Vec::new())).1.push(line);
    }
    let bytes = |lines: &[Line]| lines.iter().fold(0, |sum: u64, line| sum.saturating_add(line.bytes));
    let mut groups: Vec<(u64, bool, Vec<Line>)> =
        groups.into_values().map(|(alone, lines)| (bytes(&lines), alone, lines)).collect();
    groups.sort_by_key(|(needed, ..)| *needed);
    let (mut left, mut sharing) = (room, groups.len() as u64);
    for (needed, alone, lines) in groups {
        let own = left.checked_div(sharing).unwrap_or(0).min(needed);
        (left, sharing) = (left.saturating_sub(own), sharing.saturating_sub(1));
        share(lines, own, level + 1, alone, kept);
    }
}

/// What tells senders apart at a level.
fn key(entry: &SigkillEntry, level: usize) -> String {
    let kernel = matches!(entry.cause, SigkillCause::Oom | SigkillCause::Kernel);
    let user = entry.sender_uid.filter(|_| !kernel);
    let cgroup = |path: &Option<String>, id: Option<u64>| path.clone().unwrap_or_else(|| format!("{id:?}"));
    match level {
        0 => user.is_some_and(|user| user != 0).to_string(),
        1 if kernel => "kernel".to_owned(),
        1 => format!("{user:?}"),
        _ if kernel => cgroup(&entry.cgroup_path, entry.cgroup_id),
        _ => cgroup(&entry.sender_cgroup_path, entry.sender_cgroup_id),
    }
}

/// The newest entries that fit, one at least, the oldest of them with the number of those that do
/// not.
fn newest(mut lines: Vec<Line>, room: u64, same: bool) -> Vec<SigkillEntry> {
    let mut used = 0u64;
    let fit = lines.iter().rev().take_while(|line| {
        used = used.saturating_add(line.bytes);
        used <= room
    });
    let fit = fit.count().max(1);
    let dropped = lines.drain(..lines.len().saturating_sub(fit)).fold(None, |sum, line| add(sum, &line.entry, same));
    let mut kept: Vec<SigkillEntry> = lines.into_iter().map(|line| line.entry).collect();
    if let (Some(mut sum), Some(oldest)) = (dropped, kept.first_mut()) {
        if let Some(more) = oldest.more.take() {
            sum = joined(sum, more);
        }
        oldest.more = Some(sum);
    }
    kept
}

/// The sum with an entry that is dropped, and with what that stood for.
fn add(sum: Option<MoreSigkills>, entry: &SigkillEntry, same_sender: bool) -> Option<MoreSigkills> {
    let one = MoreSigkills { count: 1, from: entry.wall.clone(), until: entry.wall.clone(), same_sender };
    let one = match entry.more.clone() {
        Some(more) => joined(one, more),
        None => one,
    };
    Some(match sum {
        Some(sum) => joined(sum, one),
        None => one,
    })
}

fn joined(a: MoreSigkills, b: MoreSigkills) -> MoreSigkills {
    MoreSigkills {
        count: a.count.saturating_add(b.count),
        // UTC with all its digits sorts as text.
        from: a.from.min(b.from),
        until: a.until.max(b.until),
        same_sender: a.same_sender && b.same_sender,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(uid: u32, cgroup: &str, second: u64) -> SigkillEntry {
        SigkillEntry {
            boot_ns: second,
            wall: format!("2026-03-01T{:02}:{:02}:{:02}.000000000Z", second / 3600, second / 60 % 60, second % 60),
            pid: 1,
            start_boot_ns: second,
            comm: "x".into(),
            cgroup_id: None,
            cgroup_path: Some("/target".into()),
            cause: SigkillCause::Process,
            sender_pid: 2,
            sender_start_boot_ns: 3,
            sender_comm: "sh".into(),
            sender_uid: Some(uid),
            sender_cgroup_id: None,
            sender_cgroup_path: Some(cgroup.into()),
            incident: None,
            more: None,
        }
    }

    fn bytes(entries: &[SigkillEntry]) -> usize {
        entries.iter().map(|entry| serde_json::to_vec(entry).unwrap().len() + 1).sum()
    }

    fn accounted(entries: &[SigkillEntry]) -> u64 {
        entries.iter().map(|entry| 1 + entry.more.as_ref().map_or(0, |more| more.count)).sum()
    }

    #[test]
    fn a_flood_ends_nobody_elses_entries() {
        let mut entries = vec![entry(0, "/", 0), entry(1001, "/user", 1)];
        entries.extend((2..5000).map(|second| entry(1000, "/", second)));
        for _ in 0..3 {
            let kept = keep(entries, 100_000);
            assert!(bytes(&kept) <= 100_200, "{}", bytes(&kept));
            assert_eq!(kept[..2], [entry(0, "/", 0), entry(1001, "/user", 1)]);
            assert_eq!(kept.last(), Some(&entry(1000, "/", 4999)), "the newest of the flood are there too");
            assert_eq!(accounted(&kept), 5000, "and all are accounted for");
            let more = kept[2].more.clone().unwrap();
            assert!(more.same_sender && more.from == entry(1000, "/", 2).wall && more.until < kept[2].wall);
            // After a crash some are there twice.
            entries = kept.iter().chain(&kept[5..]).cloned().collect();
        }
    }

    #[test]
    fn many_users_and_cgroups_of_others_take_nothing_of_root() {
        let mut entries: Vec<_> = (0..40).map(|second| entry(0, &format!("/pod{}", second % 4), second)).collect();
        // 3,000 users, each in a cgroup of its own, and one in 3,000 cgroups.
        for second in 40..3040 {
            entries.push(entry(100_000 + second as u32, &format!("/c{second}"), second));
            entries.push(SigkillEntry { pid: 2, ..entry(1000, &format!("/d{second}"), second) });
        }
        let all = accounted(&entries);
        let kept = keep(entries.clone(), 100_000);
        assert!(bytes(&kept) <= 110_000, "{}", bytes(&kept));
        assert_eq!(kept[..40], entries[..40]);
        assert_eq!(accounted(&kept), all);
        assert!(kept.iter().any(|entry| entry.more.as_ref().is_some_and(|more| !more.same_sender)));
        // With little room one line of each share remains, and what it stands for.
        let kept = keep(entries, 0);
        assert!(kept.len() <= 2 + MOST * (MOST + 1) && accounted(&kept) == all, "{}", kept.len());
    }

    #[test]
    fn what_the_kernel_kills_is_shared_by_the_cgroup_of_the_victim() {
        let oom = |cgroup: &str, second| SigkillEntry {
            cause: SigkillCause::Oom,
            sender_uid: None,
            cgroup_path: Some(cgroup.into()),
            ..entry(0, "/", second)
        };
        let mut entries = vec![oom("/quiet", 0), entry(0, "/", 1)];
        entries.extend((2..2000).map(|second| oom("/loop", second)));
        let kept = keep(entries, 50_000);
        assert_eq!(kept[..2], [oom("/quiet", 0), entry(0, "/", 1)]);
    }
}
