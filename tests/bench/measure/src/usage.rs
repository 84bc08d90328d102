//! CPU and memory used by a process, from /proc.

use anyhow::{Context, ensure};

/// CPU time of its current threads, nanoseconds. Exact, but without threads that have ended.
pub(crate) fn cpu_ns(pid: u32) -> anyhow::Result<u64> {
    let dir = format!("/proc/{pid}/task");
    let mut total = 0u64;
    for task in std::fs::read_dir(&dir).with_context(|| format!("failed to read {dir}"))? {
        let path = task.with_context(|| format!("failed to read {dir}"))?.path().join("schedstat");
        // a thread may be gone by now
        let Ok(text) = std::fs::read_to_string(&path) else { continue };
        let first = text.split_ascii_whitespace().next().context("an empty schedstat")?;
        total += first.parse::<u64>().with_context(|| format!("{} is not a number", path.display()))?;
    }
    ensure!(total > 0, "{dir} tells no time: this kernel was built without CONFIG_SCHED_INFO");
    Ok(total)
}

/// CPU time of all threads and of children it has waited for, seconds in clock-tick resolution.
pub(crate) fn cpu_seconds(pid: u32) -> anyhow::Result<f64> {
    let path = format!("/proc/{pid}/stat");
    let text = std::fs::read_to_string(&path).with_context(|| format!("failed to read {path}"))?;
    let ticks = ticks(&text).with_context(|| format!("{path} has no times"))?;
    Ok(ticks as f64 / rustix::param::clock_ticks_per_second() as f64)
}

/// utime, stime, cutime and cstime: fields 14 to 17.
fn ticks(stat: &str) -> Option<u64> {
    let (_, after) = stat.rsplit_once(')')?;
    let times: Vec<u64> =
        after.split_ascii_whitespace().skip(11).take(4).filter_map(|field| field.parse().ok()).collect();
    (times.len() == 4).then(|| times.iter().sum())
}

/// A size in /proc/PID/status (`VmRSS`, `VmHWM`, `VmLck`), bytes.
pub(crate) fn status_bytes(pid: u32, name: &str) -> anyhow::Result<u64> {
    let path = format!("/proc/{pid}/status");
    let text = std::fs::read_to_string(&path).with_context(|| format!("failed to read {path}"))?;
    kib(&text, name).map(|kib| kib * 1024).with_context(|| format!("{path} has no {name}"))
}

/// Resident bytes of all mappings whose name contains `part`.
pub(crate) fn mapped_bytes(pid: u32, part: &str) -> anyhow::Result<u64> {
    let path = format!("/proc/{pid}/smaps");
    let text = std::fs::read_to_string(&path).with_context(|| format!("failed to read {path}"))?;
    Ok(resident(&text, part))
}

fn resident(smaps: &str, part: &str) -> u64 {
    let (mut inside, mut total) = (false, 0);
    for line in smaps.lines() {
        // the first line of a mapping begins with addresses, the others with `Name:`
        if line.split_ascii_whitespace().next().is_some_and(|first| !first.ends_with(':')) {
            inside = line.contains(part);
        } else if inside && let Some(kib) = kib(line, "Rss") {
            total += kib * 1024;
        }
    }
    total
}

fn kib(text: &str, name: &str) -> Option<u64> {
    let rest = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    rest.split_ascii_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_and_sizes_are_found() {
        let stat = "7 (a) b) S 1 2 3 4 5 6 7 8 9 10 100 20 3 4 20 0";
        assert_eq!(ticks(stat), Some(127));
        assert_eq!(ticks("7 (a) S"), None);
        assert_eq!(kib("VmPeak:\t  8 kB\nVmRSS:\t  12 kB\n", "VmRSS"), Some(12));
        let smaps = "7f00-7f10 rw-s 00000000 00:0e 9   anon_inode:bpf-map\nSize: 8 kB\nRss:   8 kB\n\
                     7f20-7f30 rw-p 00000000 00:00 0\nRss:   4 kB\n";
        assert_eq!(resident(smaps, "bpf-map"), 8192);
    }
}
