//! Taking stock at start: the processes that already run, read once from /proc.

use std::fs;
use std::path::Path;

use anyhow::Context;

use crate::engine::input::ProcessFound;

/// Most processes taken stock of; more are counted and left out.
pub const MAX_PROCESSES: usize = 65_536;
/// `PF_KTHREAD` of the flags in /proc/PID/stat.
const KERNEL_THREAD: u64 = 0x0020_0000;

/// What was found running.
#[derive(Clone, Debug, Default)]
pub struct Stock {
    /// The processes, kernel threads left out.
    pub found: Vec<ProcessFound>,
    /// Processes beyond [`MAX_PROCESSES`].
    pub left_out: usize,
}

/// Walks /proc. `cgroup_of` answers with the kernfs id of a process' memory cgroup, `now` with the
/// boot clock. A process that goes away meanwhile is left out.
pub fn take(cgroup_of: impl FnMut(u32) -> Option<u64>, now: impl FnMut() -> u64) -> anyhow::Result<Stock> {
    take_from(Path::new("/proc"), cgroup_of, now)
}

/// One process, as [`take`] reads it; `None` when it is gone, a zombie or a kernel thread.
pub fn one(pid: u32, cgroup_id: u64, boot_ns: u64) -> Option<ProcessFound> {
    read(Path::new("/proc"), pid, boot_ns).map(|found| ProcessFound { cgroup_id, ..found })
}

fn take_from(
    proc: &Path,
    mut cgroup_of: impl FnMut(u32) -> Option<u64>,
    mut now: impl FnMut() -> u64,
) -> anyhow::Result<Stock> {
    let entries = fs::read_dir(proc).with_context(|| format!("failed to list {}", proc.display()))?;
    let pids = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let mut stock = Stock::default();
    for pid in pids {
        if stock.found.len() >= MAX_PROCESSES {
            stock.left_out += 1;
            continue;
        }
        let Some(found) = read(proc, pid, now()) else { continue };
        let Some(cgroup_id) = cgroup_of(pid) else { continue };
        stock.found.push(ProcessFound { cgroup_id, ..found });
    }
    Ok(stock)
}

fn read(proc: &Path, pid: u32, boot_ns: u64) -> Option<ProcessFound> {
    let file = |name: &str| fs::read(proc.join(pid.to_string()).join(name)).ok();
    let found = parse_stat(&String::from_utf8_lossy(&file("stat")?))?;
    let found = parse_status(&String::from_utf8_lossy(&file("status")?), found)?;
    Some(ProcessFound { pid, boot_ns, ..found })
}

/// `pid (comm) state ppid ...`; the name may hold anything, parentheses too. `None` for a kernel
/// thread and for what has ended.
fn parse_stat(stat: &str) -> Option<ProcessFound> {
    let (before, after) = stat.rsplit_once(')')?;
    let (_, comm) = before.split_once('(')?;
    // Field 3 is the first behind the name.
    let fields: Vec<&str> = after.split_whitespace().collect();
    let field = |number: usize| fields.get(number.checked_sub(3)?).copied();
    let ended = matches!(field(3)?, "Z" | "X" | "x");
    let flags: u64 = field(9)?.parse().ok()?;
    if ended || flags & KERNEL_THREAD != 0 {
        return None;
    }
    Some(ProcessFound {
        comm: comm.to_owned(),
        parent_pid: field(4)?.parse().ok()?,
        start_ticks: field(22)?.parse().ok()?,
        ..ProcessFound::default()
    })
}

/// The memory lines of /proc/PID/status. `None` without an address space.
fn parse_status(status: &str, found: ProcessFound) -> Option<ProcessFound> {
    let bytes = |key: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
        line.split_whitespace().next()?.parse::<u64>().ok()?.checked_mul(1024)
    };
    Some(ProcessFound {
        anon_bytes: bytes("RssAnon")?,
        file_bytes: bytes("RssFile")?,
        shmem_bytes: bytes("RssShmem")?,
        // Kernels without swap have no such line, and no swap.
        swap_bytes: bytes("VmSwap").unwrap_or(0),
        peak_bytes: bytes("VmHWM")?,
        ..found
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const STATUS: &str = "Name:\tx\nVmHWM:\t    2048 kB\nVmRSS:\t 100 kB\nRssAnon:\t 64 kB\n\
                          RssFile:\t 32 kB\nRssShmem:\t 4 kB\nVmSwap:\t 8 kB\n";

    fn stat(comm: &str, state: &str, flags: u64) -> String {
        format!("7 ({comm}) {state} 1 7 7 0 -1 {flags} 1 2 3 4 5 6 7 8 20 0 1 0 4711 1000 10 18446744073709551615\n")
    }

    fn make(proc: &Path, pid: u32, stat: &str, status: &str) {
        let dir = proc.join(pid.to_string());
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join("stat"), stat).unwrap();
        fs::write(dir.join("status"), status).unwrap();
    }

    #[test]
    fn a_name_may_hold_anything() {
        for comm in ["a", "a b", ") R 1 (", "((sd-pam))", ""] {
            let found = parse_stat(&stat(comm, "S", 0)).unwrap();
            assert_eq!((found.comm.as_str(), found.parent_pid, found.start_ticks), (comm, 1, 4711));
        }
        for bad in ["", "7 (a", "7 (a) S", ")("] {
            assert_eq!(parse_stat(bad), None, "{bad}");
        }
    }

    #[test]
    fn kernel_threads_and_the_ended_are_left_out() {
        assert_eq!(parse_stat(&stat("kthreadd", "S", KERNEL_THREAD)), None);
        assert_eq!(parse_stat(&stat("gone", "Z", 0)), None);
        assert_eq!(parse_status("Name:\tx\n", ProcessFound::default()), None);
    }

    #[test]
    fn sizes_are_bytes() {
        let found = parse_status(STATUS, ProcessFound::default()).unwrap();
        assert_eq!((found.anon_bytes, found.file_bytes, found.shmem_bytes), (64 << 10, 32 << 10, 4 << 10));
        assert_eq!((found.swap_bytes, found.peak_bytes), (8 << 10, 2 << 20));
        let no_swap = STATUS.replace("VmSwap", "Other");
        assert_eq!(parse_status(&no_swap, ProcessFound::default()).unwrap().swap_bytes, 0);
    }

    #[test]
    fn a_made_up_proc() {
        let proc = tempfile::tempdir().unwrap();
        make(proc.path(), 7, &stat("a) b", "S", 0), STATUS);
        make(proc.path(), 8, &stat("kworker", "S", KERNEL_THREAD), STATUS);
        make(proc.path(), 9, &stat("no-cgroup", "S", 0), STATUS);
        fs::create_dir(proc.path().join("10")).unwrap();
        fs::create_dir(proc.path().join("sys")).unwrap();
        let stock = take_from(proc.path(), |pid| (pid == 7).then_some(99), || 5).unwrap();
        assert_eq!((stock.found.len(), stock.left_out), (1, 0));
        let found = &stock.found[0];
        assert_eq!((found.pid, found.cgroup_id, found.boot_ns, found.comm.as_str()), (7, 99, 5, "a) b"));
        assert!(take_from(&proc.path().join("none"), |_| None, || 0).is_err());
    }

    #[test]
    fn this_process_is_in_the_stock() {
        let stock = take(|_| Some(3), || 1).unwrap();
        let found = stock.found.iter().find(|found| found.pid == std::process::id()).unwrap();
        assert!(found.anon_bytes > 0 && found.peak_bytes >= found.anon_bytes && found.start_ticks > 0);
        assert_eq!(one(found.pid, 4, 2).unwrap().start_ticks, found.start_ticks);
        assert_eq!(one(2, 4, 2), None, "kthreadd, or nobody");
    }

    proptest! {
        #[test]
        fn parsing_is_total(text in "[ -~\n]{0,300}") {
            parse_stat(&text);
            parse_status(&text, ProcessFound::default());
        }
    }
}
