//! The kernel log read back: kills of a time in which nobody read it.
//!
//! The kernel keeps its last records, 128 KiB to a few MiB of them, numbered since the boot. So a
//! reader that knows the number of the last record it read, in an earlier run too, gets exactly
//! what came since, or learns how many records were overwritten. The last line about a kill has
//! its process (mm/oom_kill.c, `__oom_kill_process`):
//!
//! ```text
//! Memory cgroup out of memory: Killed process 7 (x) total-vm:9kB, anon-rss:5kB, file-rss:1kB, shmem-rss:0kB, UID:0 pgtables:40kB oom_score_adj:0
//! ```
//!
//! Its cgroup is in the `oom-kill:` line before it, which the kernel writes for ten decisions in
//! five seconds at most, and for the first victim of a group alone.

use super::{KernelLogEvent, KmsgReader, RECORD, Sequence, parse_kmsg};

/// Kills that are kept; further ones are counted.
pub const KILLS_CAP: usize = 4096;
/// Records that are read. A buffer of 128 MiB holds as many; one that is larger, or that is written
/// to as fast as it is read, has its newest ones counted as lost.
const MAX_RECORDS: usize = 1 << 20;

/// A kill in the log.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KilledProcess {
    /// Sequence number of its last line.
    pub seq: u64,
    /// printk's clock, nanoseconds.
    pub printk_ns: u64,
    /// Process or thread id.
    pub pid: u32,
    /// Name.
    pub comm: String,
    /// Real user id; `None` when the line does not say.
    pub uid: Option<u32>,
    /// Anonymous memory; `None` as above.
    pub anon_bytes: Option<u64>,
    /// File memory; `None` as above.
    pub file_bytes: Option<u64>,
    /// Shared memory; `None` as above.
    pub shmem_bytes: Option<u64>,
    /// Its cgroup; `None` when the log does not name it.
    pub cgroup_path: Option<String>,
    /// The cgroup that ran out; `None` when the log does not name it, or the machine ran out.
    pub oom_cgroup_path: Option<String>,
}

/// What the log has.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Backlog {
    /// Kills, oldest first. Cap: [`KILLS_CAP`].
    pub kills: Vec<KilledProcess>,
    /// Kills beyond the cap.
    pub left_out: u64,
    /// Records that were overwritten before they were read, and at least one when there were too
    /// many to read them all; `None` when it is not known from which one on they were wanted.
    pub lost: Option<u64>,
    /// Number of the record after the last one that was read; `None` when there is none at all.
    pub next_seq: Option<u64>,
}

/// Process and cgroups of an `oom-kill:` line.
struct Chosen {
    pid: u32,
    task_memcg: Option<String>,
    oom_memcg: Option<String>,
}

/// Takes records, and puts both lines of a kill together.
#[derive(Default)]
struct Collector {
    backlog: Backlog,
    chosen: Option<Chosen>,
}

impl Collector {
    /// Takes the text of one record. Those before `from_seq` were read by an earlier run.
    fn add(&mut self, text: &str, from_seq: u64) {
        let Some(record) = parse_kmsg(text) else { return };
        if record.seq < from_seq {
            return;
        }
        match record.event {
            Some(KernelLogEvent::OomKill { pid, task_memcg, oom_memcg, .. }) => {
                self.chosen = Some(Chosen { pid, task_memcg, oom_memcg });
            }
            Some(KernelLogEvent::Killed { pid, comm }) => {
                let chosen = self.chosen.take().filter(|chosen| chosen.pid == pid);
                let (cgroup_path, oom_cgroup_path) = chosen.map_or((None, None), |c| (c.task_memcg, c.oom_memcg));
                if self.backlog.kills.len() >= KILLS_CAP {
                    self.backlog.left_out = self.backlog.left_out.saturating_add(1);
                    return;
                }
                let message = text.lines().next().unwrap_or_default();
                let bytes = |key: &str| figure(message, key).and_then(|kib| kib.checked_mul(1024));
                self.backlog.kills.push(KilledProcess {
                    seq: record.seq,
                    printk_ns: record.printk_ns,
                    pid,
                    comm,
                    uid: figure(message, " UID:").and_then(|uid| uid.try_into().ok()),
                    anon_bytes: bytes(" anon-rss:"),
                    file_bytes: bytes(" file-rss:"),
                    shmem_bytes: bytes(" shmem-rss:"),
                    cgroup_path,
                    oom_cgroup_path,
                });
            }
            _ => {}
        }
    }
}

/// The number behind the last `key` of a line. What the kernel writes behind the name has each key
/// once, so the last one is never part of the name.
fn figure(message: &str, key: &str) -> Option<u64> {
    let (before, rest) = message.rsplit_once(key)?;
    before.contains(") total-vm:").then_some(())?;
    let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
    rest.get(..digits)?.parse().ok()
}

/// Reads what the log has of OOM kills from record `from_seq` on; `None` for all that it has. Reads
/// a million records at most, and never waits. Needs CAP_SYSLOG where kernel.dmesg_restrict is set.
pub fn read_back(from_seq: Option<u64>) -> anyhow::Result<Backlog> {
    let mut reader = KmsgReader::open_at_oldest()?;
    let mut buffer = vec![0u8; RECORD];
    let next = || Ok((reader.next_text(&mut buffer)?, std::mem::take(&mut reader.sequence.overrun)));
    gather(next, from_seq, MAX_RECORDS)
}

/// The same from a source of records, each with whether others were overwritten before it.
fn gather(
    mut next: impl FnMut() -> anyhow::Result<(Option<String>, bool)>,
    from_seq: Option<u64>,
    most: usize,
) -> anyhow::Result<Backlog> {
    let (mut collector, mut sequence) = (Collector::default(), Sequence::default());
    let (mut oldest, mut missing, mut read) = (None, 0u64, 0usize);
    loop {
        let (text, overrun) = next()?;
        sequence.overrun |= overrun;
        let Some(text) = text else { break };
        if read >= most {
            // How many there are beyond the cap, nobody has counted.
            missing = missing.saturating_add(1);
            break;
        }
        read = read.saturating_add(1);
        let Some(record) = parse_kmsg(&text) else { continue };
        oldest.get_or_insert(record.seq);
        missing = missing.saturating_add(sequence.advance(record.seq));
        collector.add(&text, from_seq.unwrap_or(0));
    }
    let mut backlog = collector.backlog;
    // Without a record there is nothing that could have overwritten others.
    let before = |from: u64| oldest.map_or(0, |oldest: u64| oldest.saturating_sub(from));
    backlog.lost = from_seq.map(|from| before(from).saturating_add(missing));
    backlog.next_seq = sequence.next;
    Ok(backlog)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::of_machine;

    /// As 6.18 wrote it.
    const KILL: &str = "\
6,961,67258842616,-;oom-kill:constraint=CONSTRAINT_MEMCG,nodemask=(null),cpuset=/,mems_allowed=0,oom_memcg=/a,task_memcg=/a/b,task=eat,pid=21514,uid=0
3,962,67258842700,-;Memory cgroup out of memory: Killed process 21514 (eat) total-vm:104904kB, anon-rss:32512kB, file-rss:3068kB, shmem-rss:4kB, UID:1000 pgtables:120kB oom_score_adj:0
3,963,67258842800,-;Memory cgroup out of memory: Killed process 21515 (eat) total-vm:104904kB, anon-rss:1kB, file-rss:0kB, shmem-rss:0kB, UID:0 pgtables:120kB oom_score_adj:-5";

    fn collect(text: &str, from_seq: u64) -> Vec<KilledProcess> {
        let mut collector = Collector::default();
        text.lines().for_each(|line| collector.add(line, from_seq));
        collector.backlog.kills
    }

    #[test]
    fn both_lines_of_a_kill_are_one_and_a_line_alone_has_no_cgroup() {
        let kills = collect(KILL, 0);
        let first = KilledProcess {
            seq: 962,
            printk_ns: 67_258_842_700_000,
            pid: 21514,
            comm: "eat".into(),
            uid: Some(1000),
            anon_bytes: Some(32512 << 10),
            file_bytes: Some(3068 << 10),
            shmem_bytes: Some(4 << 10),
            cgroup_path: Some("/a/b".into()),
            oom_cgroup_path: Some("/a".into()),
        };
        assert_eq!(kills[0], first);
        assert_eq!((kills[1].pid, kills[1].cgroup_path.as_deref(), kills.len()), (21515, None, 2));
        assert_eq!(collect(KILL, 963), kills[1..]);
        // The `oom-kill:` line was read before, so it cannot name the cgroup any longer.
        assert_eq!(collect(KILL, 962)[0].cgroup_path, None);
    }

    #[test]
    fn what_programs_wrote_is_no_kill() {
        let user: String = KILL.lines().map(|line| format!("1{line}\n")).collect();
        assert!(collect(&user, 0).is_empty());
    }

    #[test]
    fn a_name_cannot_pass_for_figures() {
        let line =
            |comm: &str, rest: &str| format!("3,1,2,-;Out of memory: Killed process 5 ({comm}) total-vm:1kB{rest}");
        let all = ", anon-rss:2kB, file-rss:3kB, shmem-rss:0kB, UID:7 pgtables:4kB oom_score_adj:0";
        for comm in [" anon-rss:9kB,", ") total-vm:1", " UID:1 "] {
            let kill = &collect(&line(comm, all), 0)[0];
            assert_eq!((kill.comm.as_str(), kill.anon_bytes, kill.uid), (comm, Some(2048), Some(7)));
        }
        let kill = &collect("3,1,2,-;Out of memory: Killed process 5 ( anon-rss:9kB), UID 0, total-vm:1kB", 0)[0];
        assert_eq!((kill.anon_bytes, kill.uid), (None, None), "a form that is not known");
        let kill = &collect(&line("x", ", anon-rss:99999999999999999999kB"), 0)[0];
        assert_eq!(kill.anon_bytes, None);
    }

    #[test]
    fn too_many_kills_are_counted() {
        let mut collector = Collector::default();
        for seq in 0..KILLS_CAP + 3 {
            collector.add(&format!("3,{seq},2,-;Out of memory: Killed process 5 (x) total-vm:1kB"), 0);
        }
        assert_eq!((collector.backlog.kills.len(), collector.backlog.left_out), (KILLS_CAP, 3));
    }

    #[test]
    fn this_machine_s_log_goes_on_where_it_was_read() {
        let Some(all) = of_machine::found("the kernel log", read_back(Some(0))) else { return };
        let Some(next) = all.next_seq else { return };
        let rest = read_back(Some(next)).unwrap();
        assert!(rest.kills.len() <= all.kills.len() && rest.next_seq >= all.next_seq);
        assert!(read_back(None).unwrap().lost.is_none());
        if let Some(first) = all.kills.first() {
            assert!(first.anon_bytes.is_some() && first.uid.is_some(), "{first:?}");
        }
    }

    #[test]
    fn records_beyond_the_cap_are_lost_and_not_as_if_read() {
        let records = |most: usize| {
            let mut lines = KILL.lines().map(str::to_owned);
            gather(|| Ok((lines.next(), false)), Some(900), most).unwrap()
        };
        let (all, cut) = (records(3), records(2));
        assert_eq!((all.kills.len(), all.lost, all.next_seq), (2, Some(61), Some(964)));
        assert_eq!((cut.kills.len(), cut.lost, cut.next_seq), (1, Some(62), Some(963)));
    }
}
