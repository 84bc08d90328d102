//! The processes that already run when tracing starts.
//!
//! First [`pids`] lists their ids, then [`read_process`] reads each one. A caller reports a process
//! right after reading it: a list of thousands takes a while, and between reading a process and
//! reporting it an exit would be seen in the wrong order.

use std::fs;
use std::io::Read;
use std::path::Path;

use anyhow::Context;
use memtrace_engine::decode::printable;
use memtrace_engine::input::ProcessFound;
use procfs::process::{Process, Stat, Status};
use procfs::{FromBufRead, FromRead};

/// Most processes listed; the rest is counted and left out.
pub const MAX_PROCESSES: usize = 65_536;
/// Bytes read of /proc/PID/stat and /proc/PID/status, which may list 65,536 groups (NGROUPS_MAX).
const FILE_BYTES_CAP: u64 = 1 << 20;
/// `PF_KTHREAD` (include/linux/sched.h) in the flags of /proc/PID/stat.
const KERNEL_THREAD: u32 = 0x0020_0000;

/// The ids of all processes, up to [`MAX_PROCESSES`], and how many were left out. Fails if /proc
/// cannot be listed.
pub fn pids() -> anyhow::Result<(Vec<u32>, usize)> {
    pids_in(Path::new("/proc"))
}

/// Reads one process, which is in the memory cgroup `cgroup_id`; `None` if it has ended, is a
/// zombie, or is a kernel thread.
pub fn read_process(pid: u32, cgroup_id: u64, boot_ns: u64) -> Option<ProcessFound> {
    read_in(Path::new("/proc"), pid, boot_ns).map(|found| ProcessFound { cgroup_id, ..found })
}

fn pids_in(proc: &Path) -> anyhow::Result<(Vec<u32>, usize)> {
    let entries = fs::read_dir(proc).with_context(|| format!("failed to list {}", proc.display()))?;
    let mut pids: Vec<u32> = entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .take(MAX_PROCESSES * 64)
        .collect();
    let left_out = pids.len().saturating_sub(MAX_PROCESSES);
    pids.truncate(MAX_PROCESSES);
    Ok((pids, left_out))
}

fn read_in(proc: &Path, pid: u32, boot_ns: u64) -> Option<ProcessFound> {
    let process = Process::new_with_root(proc.join(pid.to_string())).ok()?;
    let stat_bytes = read_file(&process, "stat")?;
    let stat = Stat::from_read(stat_bytes.as_slice()).ok()?;
    if matches!(stat.state, 'Z' | 'X' | 'x') || stat.flags & KERNEL_THREAD != 0 {
        return None;
    }
    // Its first line has the name, which may be any bytes; `procfs` takes lines of text only.
    let status_bytes = read_file(&process, "status")?;
    let status = Status::from_buf_read(String::from_utf8_lossy(&status_bytes).as_bytes()).ok()?;
    let bytes = |kib: Option<u64>| kib?.checked_mul(1024);
    Some(ProcessFound {
        pid,
        boot_ns,
        comm: comm_in(&stat_bytes)?,
        parent_pid: u32::try_from(stat.ppid).ok()?,
        start_ticks: stat.starttime,
        // Absent without an address space: a kernel thread, or a process that is exiting.
        anon_bytes: bytes(status.rssanon)?,
        file_bytes: bytes(status.rssfile)?,
        shmem_bytes: bytes(status.rssshmem)?,
        // A kernel without CONFIG_SWAP has no such line.
        swap_bytes: bytes(status.vmswap).unwrap_or(0),
        peak_bytes: bytes(status.vmhwm)?,
        ..ProcessFound::default()
    })
}

fn read_file(process: &Process, name: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    process.open_relative(name).ok()?.take(FILE_BYTES_CAP).read_to_end(&mut bytes).ok()?;
    Some(bytes)
}

/// The name in /proc/PID/stat, escaped as hooks' records have it; a parenthesis may be part of it.
fn comm_in(stat: &[u8]) -> Option<String> {
    let begin = stat.iter().position(|byte| *byte == b'(')?.checked_add(1)?;
    let end = stat.iter().rposition(|byte| *byte == b')')?;
    stat.get(begin..end).map(printable)
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;

    use super::*;

    #[test]
    fn this_process_is_found() {
        let (pids, left_out) = pids().unwrap();
        assert!(pids.contains(&std::process::id()) && left_out == 0);
        let found = read_process(std::process::id(), 3, 1).unwrap();
        assert!(found.anon_bytes > 0 && found.peak_bytes >= found.anon_bytes && found.start_ticks > 0);
        assert_eq!((found.cgroup_id, found.boot_ns), (3, 1));
        assert_eq!(read_process(2, 4, 2), None, "kthreadd, or no process");
        assert!(pids_in(Path::new("/proc/none")).is_err());
    }

    #[test]
    fn a_name_may_hold_anything() {
        let dir = tempfile::tempdir().unwrap();
        let names: [(&[u8], &str); 3] =
            [(b") R 1 (", ") R 1 ("), (b"\xff: x\x1b", "\\xff: x\\x1b"), (b"a\nUid:\t0", "a\\x0aUid:\\x090")];
        for (name, shown) in names {
            let path = dir.path().join(OsStr::from_bytes(name));
            std::os::unix::fs::symlink("/bin/sleep", &path).unwrap();
            let mut child = std::process::Command::new(&path).arg("60").spawn().unwrap();
            let found = read_process(child.id(), 4, 2);
            child.kill().unwrap();
            let code = child.wait().unwrap();
            let found = found.expect(shown);
            assert_eq!((found.comm.as_str(), found.parent_pid), (shown, std::process::id()), "{code}");
        }
    }
}
