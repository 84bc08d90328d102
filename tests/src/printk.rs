//! The kernel log as a second witness: /dev/kmsg lines about OOM kills, and the offset between its
//! clock and the boot clock.
//!
//! printk stamps lines with the scheduler's clock: microseconds since boot, by the CPU's counter.
//! NTP corrects the boot clock but not that one, so the offset between them drifts slowly. Tests
//! measure anchors around the kills and use the nearest.

use std::fs::File;
use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, ensure};

use crate::process::boot_ns;

/// One record of the kernel log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelLogRecord {
    /// Sequence number.
    pub seq: u64,
    /// Stamp by printk's clock, nanoseconds (microsecond resolution).
    pub printk_ns: u64,
    /// Text without continuation lines.
    pub text: String,
}

/// What the log says about the OOM kill of one process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KillLines {
    /// Stamp of the `oom-kill:` line, which is rate-limited.
    pub oom_line_ns: Option<u64>,
    /// Stamp of the `Killed process` line.
    pub killed_line_ns: u64,
}

/// Reads /dev/kmsg from where it was opened, and keeps what it read.
#[derive(Debug)]
pub struct KernelLogTail {
    file: File,
    lines: Vec<KernelLogRecord>,
    overruns: u64,
}

impl KernelLogTail {
    /// Opens the log at its end.
    pub fn open_at_end() -> anyhow::Result<Self> {
        Self::open(SeekFrom::End(0))
    }

    /// Opens the log at the oldest line it still holds.
    pub fn open_at_start() -> anyhow::Result<Self> {
        Self::open(SeekFrom::Start(0))
    }

    fn open(at: SeekFrom) -> anyhow::Result<Self> {
        let nonblocking = i32::try_from(rustix::fs::OFlags::NONBLOCK.bits())?;
        let mut file = File::options()
            .read(true)
            .custom_flags(nonblocking)
            .open("/dev/kmsg")
            .context("failed to open /dev/kmsg")?;
        file.seek(at).context("failed to seek in /dev/kmsg")?;
        Ok(Self { file, lines: Vec::new(), overruns: 0 })
    }

    /// Reads what is there now. Returns everything read since the log was opened.
    pub fn drain(&mut self) -> anyhow::Result<&[KernelLogRecord]> {
        let mut record = [0u8; 8192];
        loop {
            match self.file.read(&mut record) {
                Ok(0) => break,
                Ok(length) => {
                    let text = String::from_utf8_lossy(record.get(..length).unwrap_or_default());
                    self.lines.extend(parse(&text));
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                // EPIPE: records were overwritten before they were read; reading continues with the
                // oldest
                Err(error) if error.kind() == ErrorKind::BrokenPipe => self.overruns += 1,
                Err(error) => return Err(error).context("failed to read /dev/kmsg"),
            }
        }
        Ok(&self.lines)
    }

    /// How often records were overwritten before they were read.
    pub fn overruns(&self) -> u64 {
        self.overruns
    }

    /// Everything read so far.
    pub fn lines(&self) -> &[KernelLogRecord] {
        &self.lines
    }

    /// What the lines from sequence number `from` on say about the kill of `pid`.
    pub fn kill_of(&self, pid: u32, from: u64) -> Option<KillLines> {
        kill_of(&self.lines, pid, from)
    }

    /// Pids of the `Killed process` lines from sequence number `from` on, in order.
    pub fn killed_pids(&self, from: u64) -> Vec<u32> {
        self.lines.iter().filter(|line| line.seq >= from).filter_map(|line| killed_pid(&line.text)).collect()
    }

    /// Lower bound of the next line's sequence number.
    pub fn next_seq(&mut self) -> anyhow::Result<u64> {
        Ok(self.drain()?.last().map_or(0, |line| line.seq + 1))
    }

    /// Measures the offset between the two clocks with `markers` lines written to the log and read back.
    pub fn anchor(&mut self, markers: u32) -> anyhow::Result<PrintkAnchor> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let mut best: Option<PrintkAnchor> = None;
        for _ in 0..markers {
            let serial = COUNT.fetch_add(1, Ordering::Relaxed);
            let marker = format!("memtrace-tests: clock anchor {}-{serial}", std::process::id());
            // without a newline, a record stays open for continuation and is not shown
            let record = format!("{marker}\n");
            // userspace lines are rate-limited per open file, so each marker opens its own
            let mut log = File::options().write(true).open("/dev/kmsg").context("failed to open /dev/kmsg to write")?;
            let before = boot_ns();
            let written = log.write(record.as_bytes());
            let after = boot_ns();
            written.context("failed to write a marker to /dev/kmsg")?;
            let from = self.lines.len();
            let read = self.drain()?.get(from..).unwrap_or_default();
            let Some(line) = read.iter().find(|line| line.text == marker) else { continue };
            let anchor = PrintkAnchor::between(before, after, line.printk_ns)?;
            if best.is_none_or(|b| anchor.uncertainty_ns < b.uncertainty_ns) {
                best = Some(anchor);
            }
        }
        best.context("no marker written to /dev/kmsg came back (is printk_devkmsg off?)")
    }
}

/// Offset from printk's clock to the boot clock, measured at one moment.
#[derive(Clone, Copy, Debug)]
pub struct PrintkAnchor {
    /// When it was measured (boot clock, ns).
    pub at_boot_ns: u64,
    /// Boot clock minus printk's clock, ns.
    pub offset_ns: i64,
    /// Uncertainty of the offset in either direction, ns.
    pub uncertainty_ns: u64,
}

impl PrintkAnchor {
    /// Computes the offset from a line stamped `printk_ns` (cut to microseconds) and written
    /// between two readings of the boot clock.
    fn between(before: u64, after: u64, printk_ns: u64) -> anyhow::Result<Self> {
        const STAMP_NS: u64 = 1000;
        let width = after.saturating_sub(before) + STAMP_NS;
        // True stamp in [printk, printk + 1 µs), so the offset lies in (before - printk - 1 µs, after - printk].
        let highest = i64::try_from(after)? - i64::try_from(printk_ns)?;
        let half = width.div_ceil(2);
        Ok(Self { at_boot_ns: after, offset_ns: highest - i64::try_from(half)?, uncertainty_ns: half })
    }

    /// The boot-clock time of a printk stamp.
    pub fn boot_ns(&self, printk_ns: u64) -> anyhow::Result<u64> {
        printk_ns.checked_add_signed(self.offset_ns).context("the clock offset is larger than the stamp")
    }
}

/// The anchor nearest to a boot-clock moment.
pub fn nearest(anchors: &[PrintkAnchor], boot_ns: u64) -> anyhow::Result<PrintkAnchor> {
    let nearest = anchors.iter().min_by_key(|anchor| anchor.at_boot_ns.abs_diff(boot_ns));
    nearest.copied().context("no clock anchor was taken")
}

/// How far the offset moved across all anchors, and the largest uncertainty among them, ns.
pub fn drift(anchors: &[PrintkAnchor]) -> anyhow::Result<(u64, u64)> {
    ensure!(!anchors.is_empty(), "no clock anchor was taken");
    let (mut low, mut high, mut unsure) = (i64::MAX, i64::MIN, 0);
    for anchor in anchors {
        (low, high, unsure) =
            (low.min(anchor.offset_ns), high.max(anchor.offset_ns), unsure.max(anchor.uncertainty_ns));
    }
    Ok((high.abs_diff(low), unsure))
}

fn parse(record: &str) -> Option<KernelLogRecord> {
    let (head, body) = record.split_once(';')?;
    let mut fields = head.split(',').skip(1);
    let seq = fields.next()?.parse().ok()?;
    let micros: u64 = fields.next()?.parse().ok()?;
    Some(KernelLogRecord { seq, printk_ns: micros * 1000, text: body.lines().next().unwrap_or_default().to_owned() })
}

/// Pid in a `Killed process` line.
pub fn killed_pid(text: &str) -> Option<u32> {
    let (_, rest) = text.split_once("Killed process ")?;
    rest.split(' ').next()?.parse().ok()
}

fn kill_of(lines: &[KernelLogRecord], pid: u32, from: u64) -> Option<KillLines> {
    let killed = lines.iter().position(|line| line.seq >= from && killed_pid(&line.text) == Some(pid))?;
    let field = format!(",pid={pid},");
    let before = lines.get(..killed)?.iter().rev().take_while(|line| line.seq >= from);
    let oom = before.clone().find(|line| line.text.starts_with("oom-kill:") && line.text.contains(&field));
    Some(KillLines { oom_line_ns: oom.map(|line| line.printk_ns), killed_line_ns: lines.get(killed)?.printk_ns })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(seq: u64, text: &str) -> KernelLogRecord {
        parse(&format!("6,{seq},{},-;{text}\n SUBSYSTEM=x\n", seq * 10)).unwrap()
    }

    #[test]
    fn reads_the_lines_of_a_kill() {
        let lines = [
            line(1, "Memory cgroup out of memory: Killed process 42 (old) total-vm:1kB"),
            line(2, "oom-kill:constraint=CONSTRAINT_MEMCG,task_memcg=/a,task=workload,pid=42,uid=0"),
            line(3, "Memory cgroup out of memory: Killed process 42 (workload) total-vm:1kB, UID:0"),
            line(4, "Memory cgroup out of memory: Killed process 43 (workload) total-vm:1kB, UID:0"),
        ];
        assert_eq!(kill_of(&lines, 42, 2), Some(KillLines { oom_line_ns: Some(20_000), killed_line_ns: 30_000 }));
        assert_eq!(kill_of(&lines, 43, 2), Some(KillLines { oom_line_ns: None, killed_line_ns: 40_000 }));
        assert_eq!(kill_of(&lines, 44, 0), None);
        assert_eq!(parse("garbage"), None);
    }

    #[test]
    fn an_anchor_holds_the_true_offset() {
        // True offset 500: the line was stamped at printk 9_700, shown as 9_000, boot clock 10_200.
        let anchor = PrintkAnchor::between(10_000, 10_400, 9_000).unwrap();
        assert!(anchor.offset_ns.abs_diff(500) <= anchor.uncertainty_ns, "{anchor:?}");
        assert_eq!(anchor.uncertainty_ns, 700);
    }
}
