//! The kernel log: what it says about OOM kills (pure), and the reader of /dev/kmsg.
//!
//! It is the second witness of a kill. The kernel writes two lines (mm/oom_kill.c
//! `dump_oom_summary`, `__oom_kill_process`), for example
//!
//! ```text
//! oom-kill:constraint=CONSTRAINT_MEMCG,nodemask=(null),cpuset=/,mems_allowed=0,oom_memcg=/a,task_memcg=/a/b,task=x,pid=7,uid=0
//! Memory cgroup out of memory: Killed process 7 (x) total-vm:1kB, ..
//! ```
//!
//! Names of tasks and cgroups are chosen by others and may hold any of the separators. What the
//! kernel writes after them does not, so lines are parsed from the end. Records that programs wrote
//! to /dev/kmsg are recognised by their facility, which the kernel does not let them set to its own
//! (kernel/printk/printk.c `devkmsg_write`).

use std::fs::File;
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;

use anyhow::Context;
use rustix::io::Errno;

use memtrace_engine::decode::printable;
use memtrace_engine::input::{KernelLogEvent, KernelLogLine};

pub mod backlog;

/// The device with the records of the kernel log.
pub const KMSG: &str = "/dev/kmsg";
/// Room for one record, bytes; the kernel's own limit is below it (kernel/printk/printk.c).
const RECORD: usize = 16 << 10;
/// Most records that one call reads; the rest waits for the next.
const MAX_RECORDS: usize = 1 << 16;
/// Most reads for one record: an interrupted one, and one that finds the next record overwritten, are repeated.
const MAX_TRIES: usize = 16;
/// Longest name of a task, bytes (TASK_COMM_LEN without its NUL).
const MAX_COMM: usize = 15;

/// One record of the kernel log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KmsgRecord {
    /// Sequence number: the next record has the next one.
    pub seq: u64,
    /// printk's clock, nanoseconds.
    pub printk_ns: u64,
    /// What it says about an OOM kill; `None` when it is about something else or not from the kernel.
    pub event: Option<KernelLogEvent>,
}

/// Parses one record of /dev/kmsg (Documentation/ABI/testing/dev-kmsg):
/// `priority,number,microseconds,flags;message`, then lines of key and value. `None` when it is not
/// of this form.
pub fn parse_kmsg(record: &str) -> Option<KmsgRecord> {
    let (head, rest) = record.split_once(';')?;
    let mut fields = head.split(',');
    let priority: u32 = fields.next()?.parse().ok()?;
    let seq = fields.next()?.parse().ok()?;
    let micros: u64 = fields.next()?.parse().ok()?;
    let message = rest.split('\n').next().unwrap_or_default();
    // Facility 0 is the kernel.
    let event = if priority < 8 { parse_message(message) } else { None };
    Some(KmsgRecord { seq, printk_ns: micros.saturating_mul(1000), event })
}

/// What a message says about an OOM kill; `None` when it is about something else. It is still
/// escaped, so it is ASCII, and what is found in it is made readable by [`text`].
fn parse_message(message: &str) -> Option<KernelLogEvent> {
    match message.strip_prefix("oom-kill:constraint=") {
        Some(rest) => parse_oom_kill(rest),
        None => parse_killed(message),
    }
}

/// `CONSTRAINT,nodemask=..,cpuset=..,mems_allowed=..[,oom_memcg=..|,global_oom],task_memcg=..,task=..,pid=..,uid=..`
fn parse_oom_kill(rest: &str) -> Option<KernelLogEvent> {
    let (constraint, rest) = rest.split_once(",nodemask=")?;
    let (rest, uid) = rest.rsplit_once(",uid=")?;
    uid.parse::<u32>().ok()?;
    let (rest, pid) = rest.rsplit_once(",pid=")?;
    let pid = pid.parse().ok()?;
    let (rest, comm) = split_comm(rest)?;
    // Without memory cgroups in the kernel neither key is there.
    let (oom_memcg, task_memcg) = match (rest.find(",global_oom,task_memcg="), rest.find(",oom_memcg=")) {
        (Some(global), cgroup) if cgroup.is_none_or(|cgroup| global < cgroup) => {
            (None, rest.get(global..)?.split_once(",task_memcg=").map(|(_, path)| path))
        }
        (_, Some(cgroup)) => {
            let paths = rest.get(cgroup..)?.strip_prefix(",oom_memcg=")?;
            paths.split_once(",task_memcg=").map_or((Some(paths), None), |(oom, task)| (Some(oom), Some(task)))
        }
        _ => (None, None),
    };
    Some(KernelLogEvent::OomKill {
        constraint: constraint.to_owned(),
        oom_memcg: oom_memcg.map(text),
        task_memcg: task_memcg.map(text),
        comm: text(comm),
        pid,
    })
}

/// Splits at the first `,task=` behind which there is no more than a name can hold.
fn split_comm(rest: &str) -> Option<(&str, &str)> {
    const KEY: &str = ",task=";
    rest.match_indices(KEY).find_map(|(at, _)| {
        let (before, from) = rest.split_at_checked(at)?;
        let comm = from.strip_prefix(KEY)?;
        (unescape(comm).len() <= MAX_COMM).then_some((before, comm))
    })
}

/// `Memory cgroup out of memory: Killed process 1 (name) total-vm:...` and `Out of memory...: Killed process ...`
fn parse_killed(message: &str) -> Option<KernelLogEvent> {
    if !message.starts_with("Memory cgroup out of memory") && !message.starts_with("Out of memory") {
        return None;
    }
    let (_, rest) = message.split_once(": Killed process ")?;
    let (pid, rest) = rest.split_once(" (")?;
    let pid = pid.parse().ok()?;
    let end = [") total-vm:", "), UID ", ")"].into_iter().find_map(|end| rest.rfind(end))?;
    Some(KernelLogEvent::Killed { pid, comm: text(rest.get(..end)?) })
}

/// A name or a path of a message as the engine has those of hooks' records, so that the two are equal.
fn text(escaped: &str) -> String {
    printable(&unescape(escaped))
}

/// Undoes the escapes of /dev/kmsg: `\xNN` for a backslash and what is not printable ASCII.
fn unescape(message: &str) -> Vec<u8> {
    let mut out = Vec::with_capacity(message.len());
    let mut rest = message.as_bytes();
    loop {
        rest = match rest {
            [] => break,
            [b'\\', b'x', high, low, tail @ ..] if high.is_ascii_hexdigit() && low.is_ascii_hexdigit() => {
                let digit = |byte: u8| (byte as char).to_digit(16).unwrap_or(0) as u8;
                out.push(digit(*high) << 4 | digit(*low));
                tail
            }
            [byte, tail @ ..] => {
                out.push(*byte);
                tail
            }
        };
    }
    out
}

/// Follows the sequence numbers, and so knows how many records are missing.
#[derive(Debug, Default)]
struct Sequence {
    next: Option<u64>,
    overrun: bool,
}

impl Sequence {
    /// Takes the number of the next record; how many are missing before it.
    fn advance(&mut self, seq: u64) -> u64 {
        let jumped = self.next.map_or(0, |next| seq.saturating_sub(next));
        // Overrun before the first record was read: at least one is gone.
        let lost = if std::mem::take(&mut self.overrun) { jumped.max(1) } else { jumped };
        self.next = Some(seq.saturating_add(1));
        lost
    }
}

/// Reads the kernel log from the moment it was opened.
#[derive(Debug)]
pub struct KmsgReader {
    file: File,
    sequence: Sequence,
}

impl KmsgReader {
    /// Opens /dev/kmsg at its end. Needs CAP_SYSLOG where kernel.dmesg_restrict is set.
    pub fn open() -> anyhow::Result<Self> {
        Self::open_at(SeekFrom::End(0))
    }

    /// Opens /dev/kmsg at the oldest record that it has.
    fn open_at_oldest() -> anyhow::Result<Self> {
        Self::open_at(SeekFrom::Start(0))
    }

    fn open_at(place: SeekFrom) -> anyhow::Result<Self> {
        let mut file = File::options()
            .read(true)
            .custom_flags(rustix::fs::OFlags::NONBLOCK.bits() as i32)
            .open(KMSG)
            .with_context(|| format!("failed to open {KMSG}"))?;
        file.seek(place).with_context(|| format!("failed to go to {place:?} of {KMSG}"))?;
        Ok(Self { file, sequence: Sequence::default() })
    }

    /// Number of the record after the last one that was read; `None` while none was.
    pub fn next_seq(&self) -> Option<u64> {
        self.sequence.next
    }

    /// The text of the next record; `None` when there is none yet.
    fn next_text(&mut self, buffer: &mut [u8]) -> anyhow::Result<Option<String>> {
        for _ in 0..MAX_TRIES {
            match self.file.read(buffer) {
                Ok(0) => break,
                Ok(len) => {
                    return Ok(Some(String::from_utf8_lossy(buffer.get(..len).unwrap_or_default()).into_owned()));
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                // The next read begins with the oldest record there is.
                Err(error) if error.raw_os_error() == Some(Errno::PIPE.raw_os_error()) => self.sequence.overrun = true,
                Err(error) => return Err(error).with_context(|| format!("failed to read {KMSG}")),
            }
        }
        Ok(None)
    }

    /// Every record there is about OOM kills, with gaps where records were lost. Never waits.
    /// `boot_ns` is the boot clock: a line is not read before it was written, however long this process
    /// is held up. After an error the records before it are returned first.
    pub fn read_available(&mut self, boot_ns: impl Fn() -> u64) -> anyhow::Result<Vec<KernelLogLine>> {
        let mut lines = Vec::new();
        let mut buffer = vec![0u8; RECORD];
        for _ in 0..MAX_RECORDS {
            let text = match self.next_text(&mut buffer) {
                Err(_) if !lines.is_empty() => break,
                text => text?,
            };
            let Some(text) = text else { break };
            let Some(record) = parse_kmsg(&text) else { continue };
            let mut push = |line| {
                lines.push(KernelLogLine { printk_ns: record.printk_ns, read_boot_ns: boot_ns(), line });
            };
            let lost = self.sequence.advance(record.seq);
            if lost > 0 {
                push(KernelLogEvent::Gap { lines: lost });
            }
            if let Some(event) = record.event {
                push(event);
            }
        }
        Ok(lines)
    }
}

impl AsFd for KmsgReader {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl std::os::fd::AsRawFd for KmsgReader {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.file.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::of_machine;

    fn event(message: &str) -> Option<KernelLogEvent> {
        parse_kmsg(&format!("6,1,2,-;{message}\n")).unwrap().event
    }

    fn oom_kill(message: &str) -> (String, Option<String>, Option<String>, String, u32) {
        match event(message) {
            Some(KernelLogEvent::OomKill { constraint, oom_memcg, task_memcg, comm, pid }) => {
                (constraint, oom_memcg, task_memcg, comm, pid)
            }
            other => panic!("{message}: {other:?}"),
        }
    }

    fn killed(message: &str) -> (u32, String) {
        match event(message) {
            Some(KernelLogEvent::Killed { pid, comm }) => (pid, comm),
            other => panic!("{message}: {other:?}"),
        }
    }

    #[test]
    fn the_head_of_a_record() {
        let record = parse_kmsg("6,339,5140900,-;hello; world\n SUBSYSTEM=acpi\n").unwrap();
        assert_eq!(record, KmsgRecord { seq: 339, printk_ns: 5_140_900_000, event: None });
        assert!(parse_kmsg("6,339,5140900,c,caller=T1;more").is_some());
        for bad in ["", ";", "6,339;x", "a,1,2,-;x", "6,1,2,-", "6,-1,2,-;x"] {
            assert_eq!(parse_kmsg(bad), None, "{bad}");
        }
    }

    #[test]
    fn an_oom_in_a_cgroup() {
        let line = "oom-kill:constraint=CONSTRAINT_MEMCG,nodemask=(null),cpuset=/,mems_allowed=0,\
                    oom_memcg=/a,task_memcg=/a/b,task=stress,pid=123,uid=0";
        let (constraint, oom, task, comm, pid) = oom_kill(line);
        assert_eq!((constraint.as_str(), comm.as_str(), pid), ("CONSTRAINT_MEMCG", "stress", 123));
        assert_eq!((oom.as_deref(), task.as_deref()), (Some("/a"), Some("/a/b")));
    }

    #[test]
    fn a_global_oom_and_a_kernel_without_memory_cgroups() {
        let (constraint, oom, task, comm, pid) = oom_kill(
            "oom-kill:constraint=CONSTRAINT_NONE,nodemask=0-1,3,cpuset=user.slice,mems_allowed=0-1,3,global_oom,\
             task_memcg=/user.slice/x,task=python3,pid=9,uid=1000",
        );
        assert_eq!((constraint.as_str(), oom, task.as_deref()), ("CONSTRAINT_NONE", None, Some("/user.slice/x")));
        assert_eq!((comm.as_str(), pid), ("python3", 9));
        let (_, oom, task, comm, _) =
            oom_kill("oom-kill:constraint=CONSTRAINT_NONE,nodemask=(null),cpuset=/,mems_allowed=0,task=a,pid=1,uid=0");
        assert_eq!((oom, task, comm.as_str()), (None, None, "a"));
    }

    #[test]
    fn names_full_of_separators() {
        let head =
            "oom-kill:constraint=CONSTRAINT_MEMCG,nodemask=(null),cpuset=/x,global_oom,mems_allowed=0,oom_memcg=";
        let (_, oom, task, comm, pid) =
            oom_kill(&format!("{head}/a=1,b=2,task_memcg=/a=1,b=2/c,pid=7,task=x,pid=1,uid=0,pid=55,uid=0"));
        assert_eq!((oom.as_deref(), task.as_deref()), (Some("/a=1,b=2"), Some("/a=1,b=2/c,pid=7")));
        assert_eq!((comm.as_str(), pid), ("x,pid=1,uid=0", 55));
        let (.., comm, pid) = oom_kill(&format!("{head}/a,task_memcg=/a,task=y,task=z,pid=3,uid=0"));
        assert_eq!((comm.as_str(), pid), ("y,task=z", 3));
        let long = format!("{head}/a,task_memcg=/a,task=not-this-one-too-long,task=z,pid=3,uid=0");
        let (_, _, task, comm, _) = oom_kill(&long);
        assert_eq!((task.as_deref(), comm.as_str()), (Some("/a,task=not-this-one-too-long"), "z"));
        let tail = "total-vm:1kB, anon-rss:2kB, file-rss:0kB, shmem-rss:0kB, UID:0 pgtables:4kB oom_score_adj:0";
        let line = |comm: &str| format!("Memory cgroup out of memory: Killed process 12 ({comm}) {tail}");
        for comm in ["a", "a) total-vm:1", ") (", "(sd-pam)", "", "Killed process ", "a b", "), UID 1"] {
            assert_eq!(killed(&line(comm)), (12, comm.to_owned()));
        }
    }

    #[test]
    fn every_kind_of_kill_line() {
        let rest = "Killed process 4 (x) total-vm:1kB, anon-rss:0kB";
        for head in ["Memory cgroup out of memory", "Out of memory", "Out of memory (oom_kill_allocating_task)"] {
            assert_eq!(killed(&format!("{head}: {rest}")), (4, "x".to_owned()));
        }
        assert_eq!(killed("Out of memory: Killed process 5 (old), UID 0, total-vm:1kB"), (5, "old".to_owned()));
        assert_eq!(event("Tasks in /a are going to be killed due to memory.oom.group set"), None);
        assert_eq!(event("Out of memory and no killable processes..."), None);
        assert_eq!(event("systemd[1]: Out of memory: Killed process 4 (x) total-vm"), None);
    }

    #[test]
    fn escapes_are_undone() {
        let line = r"Out of memory: Killed process 6 (\x0aa\x5cx41\xc3\xa4) total-vm:1kB";
        assert_eq!(killed(line), (6, "\\x0aa\\x41ä".to_owned()));
        assert_eq!(unescape(r"\x4"), br"\x4");
        assert_eq!(unescape(r"\xzz\x41"), br"\xzzA");
        assert_eq!(unescape(r"\xff"), b"\xff");
    }

    #[test]
    fn names_that_are_not_text_are_those_of_the_hooks() {
        let head = "oom-kill:constraint=CONSTRAINT_MEMCG,nodemask=(null),cpuset=/,mems_allowed=0,oom_memcg=";
        let cgroup = r"/\xff\x1b\x5cx41,task=x,pid=1";
        let name = r"\xff".repeat(15);
        let line = format!("{head}{cgroup},task_memcg={cgroup},task={name},pid=9,uid=0");
        let (_, oom, task, comm, pid) = oom_kill(&line);
        let shown = r"/\xff\x1b\x41,task=x,pid=1".to_owned();
        assert_eq!((oom, task), (Some(shown.clone()), Some(shown)));
        assert_eq!((comm, pid), (name, 9));
    }

    #[test]
    fn what_a_program_wrote_is_not_believed() {
        let record = parse_kmsg("12,1,2,-;Out of memory: Killed process 4 (x) total-vm:1kB").unwrap();
        assert_eq!(record.event, None);
    }

    #[test]
    fn gaps_are_counted() {
        let mut sequence = Sequence::default();
        assert_eq!([sequence.advance(10), sequence.advance(11), sequence.advance(15)], [0, 0, 3]);
        sequence.overrun = true;
        assert_eq!([sequence.advance(20), sequence.advance(21)], [4, 0]);
        assert_eq!(sequence.advance(3), 0, "numbers that go back are no gap");
        let mut fresh = Sequence { overrun: true, next: None };
        assert_eq!(fresh.advance(99), 1);
    }

    #[test]
    fn the_reader_starts_at_the_end_and_never_waits() {
        let Some(mut reader) = of_machine::found("the kernel log", KmsgReader::open()) else { return };
        let lines = reader.read_available(|| 1).unwrap();
        assert!(lines.len() < 1000);
    }

    #[test]
    fn every_kill_this_machine_has_logged_is_understood() {
        let flags = rustix::fs::OFlags::NONBLOCK.bits() as i32;
        let file = File::options().read(true).custom_flags(flags).open(KMSG);
        let Some(mut file) = of_machine::found("the kernel log", file) else { return };
        let mut buffer = vec![0u8; RECORD];
        while let Ok(len) = file.read(&mut buffer) {
            let text = String::from_utf8_lossy(&buffer[..len]);
            let record = parse_kmsg(&text).unwrap();
            let (priority, rest) = text.split_once(',').unwrap();
            let message = rest.split_once(';').unwrap().1;
            let ours = message.starts_with("oom-kill:") || message.contains("out of memory: Killed process ");
            if ours && priority.parse::<u32>().unwrap() < 8 {
                assert!(record.event.is_some(), "{text}");
            }
        }
    }

    proptest! {
        #[test]
        fn parsing_is_total(text in ".{0,200}") {
            parse_kmsg(&text);
            parse_kmsg(&format!("6,1,2,-;oom-kill:constraint={text}"));
            parse_kmsg(&format!("6,1,2,-;oom-kill:constraint=X,nodemask={text},task={text},pid=1,uid=1"));
            parse_kmsg(&format!("6,1,2,-;Out of memory: Killed process 1 ({text}"));
        }

        #[test]
        fn any_name_survives(comm in "[ -~]{0,15}", pid in 0u32..4_194_304) {
            let escaped = comm.replace('\\', "\\x5c");
            let line = format!("Out of memory: Killed process {pid} ({escaped}) total-vm:1kB, UID:0 oom_score_adj:0");
            prop_assert_eq!(killed(&line), (pid, comm));
        }
    }
}
