//! Facts of the host that an incident names, and what this process takes from it.
//!
//! Nothing here may depend on the limits of this process. `std::thread::available_parallelism`
//! obeys CPU affinity and the cgroup's CPU quota: in a pod with a limit of one CPU it is 1 on a
//! host of 64. But the kernel charges memory in batches a CPU, and a near miss is a cgroup whose
//! usage is within those batches, and a huge page, of its limit. So CPUs are counted as the kernel counts them.

use std::fs::File;
use std::io::Read as _;

use memtrace_incident::Host;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tracing::debug;

use crate::clock;

/// The limit of locked memory as it was before; it is set again when this is dropped.
#[derive(Debug)]
#[must_use = "the limit is set again when this is dropped"]
pub struct Memlock {
    before: Rlimit,
}

/// Lifts the limit of locked memory. 5.10 accounts BPF maps and programs to it when they are made;
/// from 5.11 on they are charged to the memory cgroup (kernel/bpf/syscall.c `bpf_map_alloc`), so a
/// failure only matters on older kernels. `None` when there was no limit, or it could not be
/// lifted.
pub fn raise_memlock() -> Option<Memlock> {
    let before = getrlimit(Resource::Memlock);
    before.current?;
    match setrlimit(Resource::Memlock, Rlimit { current: None, maximum: None }) {
        Ok(()) => Some(Memlock { before }),
        Err(error) => {
            debug!("RLIMIT_MEMLOCK stays as it is: {error}");
            None
        }
    }
}

impl Drop for Memlock {
    fn drop(&mut self) {
        // Lowering is always allowed.
        if let Err(error) = setrlimit(Resource::Memlock, self.before) {
            debug!("RLIMIT_MEMLOCK stays lifted: {error}");
        }
    }
}

/// Largest part of /etc/group that is read, bytes.
const GROUPS_MAX: u64 = 1 << 20;

/// The number of a group in /etc/group. Groups from a directory service are not there.
pub fn group_id(name: &str) -> Option<u32> {
    groups().lines().find_map(|line| group(line).filter(|(known, _)| *known == name)).map(|(_, gid)| gid)
}

/// The name of a group in /etc/group.
pub fn group_name(gid: u32) -> Option<String> {
    groups().lines().find_map(|line| group(line).filter(|(_, known)| *known == gid)).map(|(name, _)| name.to_owned())
}

fn groups() -> String {
    let mut bytes = Vec::new();
    // Without the file there are no names. One name that is not text does not hide the others.
    let _ = File::open("/etc/group").and_then(|file| file.take(GROUPS_MAX).read_to_end(&mut bytes));
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Name and number of a line of group(5): `name:password:number:members`.
fn group(line: &str) -> Option<(&str, u32)> {
    let mut fields = line.split(':');
    Some((fields.next()?, fields.nth(1)?.parse().ok()?))
}

/// A number to XOR kernel addresses with, so that identities of address spaces do not reveal them.
/// It need not be a secret of high quality, only differ from run to run.
pub fn salt() -> u64 {
    let mut bytes = [0u8; 8];
    match rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty()) {
        Ok(8) => u64::from_ne_bytes(bytes),
        _ => clock::boot_ns().wrapping_mul(0x9e37_79b9_7f4a_7c15),
    }
}

/// Longest CPU list that is read, bytes: a file of sysfs is one page (4 KiB, on some machines 64
/// KiB).
const MAX_LIST_BYTES: u64 = 64 << 10;
/// Highest CPU number that is believed; NR_CPUS is 8192 at most (arch/x86/Kconfig).
const MAX_CPU_NUMBER: u32 = (1 << 16) - 1;
/// Longest part of /proc/stat that is searched for CPUs, bytes.
const MAX_STAT_BYTES: u64 = 8 << 20;

/// A list of CPUs as sysfs writes it (lib/vsprintf.c `bitmap_list_string`): `0-3,8,10-11`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct CpuList {
    /// How many CPUs are in it.
    count: u32,
    /// The highest number in it.
    highest: u32,
}

impl CpuList {
    /// `None` for an empty list and for anything that the kernel would not write: numbers that do
    /// not rise, or are above [`MAX_CPU_NUMBER`].
    fn parse(text: &str) -> Option<Self> {
        let mut list: Option<Self> = None;
        for range in text.trim().split(',') {
            let (first, last) = range.split_once('-').unwrap_or((range, range));
            let (first, last) = (cpu_number(first)?, cpu_number(last)?);
            if last < first || list.is_some_and(|list| first <= list.highest) {
                return None;
            }
            let count = list.map_or(0, |list| list.count).checked_add(last - first)?.checked_add(1)?;
            list = Some(Self { count, highest: last });
        }
        list
    }

    fn read(path: &str) -> Option<Self> {
        Self::parse(&read_head(path, MAX_LIST_BYTES)?)
    }
}

/// Digits only: `parse` alone would take a sign.
fn cpu_number(text: &str) -> Option<u32> {
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    if digits { text.parse().ok().filter(|number| *number <= MAX_CPU_NUMBER) } else { None }
}

/// The first `most` bytes of a text file.
fn read_head(path: &str, most: u64) -> Option<String> {
    let mut text = String::new();
    File::open(path).ok()?.take(most).read_to_string(&mut text).ok()?;
    Some(text)
}

/// CPUs that can ever come online, which is how many slots a per-CPU counter has; 1 when it cannot
/// be read.
pub fn possible_cpus() -> u32 {
    CpuList::read("/sys/devices/system/cpu/possible").map_or(1, |list| list.highest.saturating_add(1))
}

/// CPUs that are online on the host, whatever this process may use of them.
///
/// From /sys/devices/system/cpu/online. Where sysfs is not mounted, the `cpuN` lines of /proc/stat
/// are counted, one for each CPU that is online (fs/proc/stat.c `show_stat`); where that cannot be
/// read either, it is 1.
pub fn online_cpus() -> u32 {
    CpuList::read("/sys/devices/system/cpu/online")
        .map(|list| list.count)
        .or_else(|| count_stat_cpus(&read_head("/proc/stat", MAX_STAT_BYTES)?))
        .unwrap_or(1)
}

/// The `cpuN` lines of /proc/stat; `None` when there is none. The line `cpu`, without a number, is
/// their sum.
fn count_stat_cpus(stat: &str) -> Option<u32> {
    let is_cpu =
        |line: &&str| line.strip_prefix("cpu").is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()));
    u32::try_from(stat.lines().filter(is_cpu).count()).ok().filter(|count| *count > 0)
}

/// Id of this boot, which tells its boot clock from that of another; empty when it cannot be read.
pub fn boot_id() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
}

/// The host as an incident names it. A value that cannot be read is empty, or 0.
pub fn describe() -> Host {
    let uname = rustix::system::uname();
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let page_bytes = rustix::param::page_size() as u64;
    let total_kib = read("/proc/meminfo")
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:")?.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
    Host {
        hostname: uname.nodename().to_string_lossy().into_owned(),
        kernel: uname.release().to_string_lossy().into_owned(),
        boot_id: boot_id(),
        cpus: online_cpus(),
        memory_bytes: total_kib.unwrap_or(0).saturating_mul(1024),
        page_bytes,
        // include/linux/memcontrol.h MEMCG_CHARGE_BATCH: 64 pages since 5.15, 32 before; the larger
        // one bounds both.
        charge_batch_bytes: page_bytes.saturating_mul(64),
        // mm/huge_memory.c `hpage_pmd_size_show`; include/linux/pagemap.h bounds folios of the page
        // cache by the same order
        huge_page_bytes: read("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size").trim().parse().ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_has_a_name_and_a_number() {
        assert_eq!(group("adm:x:4:syslog,me"), Some(("adm", 4)));
        assert_eq!((group("adm:x"), group("+"), group("adm:x:four:")), (None, None, None));
        assert_eq!(group_name(0).and_then(|root| group_id(&root)), group_name(0).map(|_| 0));
        assert_eq!(group_id("no such group"), None);
    }

    #[test]
    fn cpu_lists_are_counted() {
        let parse = |text: &str| CpuList::parse(text).map(|list| (list.count, list.highest));
        for (text, found) in [
            ("0\n", (1, 0)),
            ("0-3\n", (4, 3)),
            ("0-63", (64, 63)),
            ("0,2-3,7\n", (4, 7)),
            ("1-2,4,6-8,65535", (7, 65_535)),
            ("0-65535", (65_536, 65_535)),
        ] {
            assert_eq!(parse(text), Some(found), "{text}");
        }
    }

    #[test]
    fn what_is_no_cpu_list_is_not_believed() {
        for text in [
            "",
            "\n",
            ",",
            "0,",
            ",0",
            "-",
            "0-",
            "-3",
            "+1",
            "a",
            "0x3",
            "0-3-5",
            "0 1",
            "3-0",
            "0-3,2",
            "2,1",
            "1,1",
            "0-65536",
            "4294967296",
            "99999999999999999999",
            "0-4294967295",
            "\u{0661}",
        ] {
            assert_eq!(CpuList::parse(text), None, "{text:?}");
        }
        let long: Vec<String> = (0..100_000).map(|cpu| cpu.to_string()).collect();
        assert_eq!(CpuList::parse(&long.join(",")), None, "more CPUs than any kernel has");
    }

    #[test]
    fn cpus_of_proc_stat_are_counted() {
        let stat = "cpu  10 0 5\ncpu0 5 0 2\ncpu12 5 0 3\nintr 7\ncpus 3\n";
        assert_eq!(count_stat_cpus(stat), Some(2));
        assert_eq!(count_stat_cpus("cpu  10 0 5\n"), None);
        assert_eq!(count_stat_cpus(""), None);
    }

    #[test]
    fn affinity_does_not_change_the_host() {
        let before = online_cpus();
        assert!((1..=possible_cpus()).contains(&before));
        assert_eq!(count_stat_cpus(&std::fs::read_to_string("/proc/stat").unwrap()), Some(before));
        // A thread of its own: affinity goes by thread, and is not given back.
        let pinned = std::thread::spawn(|| {
            let allowed = rustix::thread::sched_getaffinity(None).unwrap();
            let first = (0..rustix::thread::CpuSet::MAX_CPU).find(|cpu| allowed.is_set(*cpu)).unwrap();
            let mut one = rustix::thread::CpuSet::new();
            one.set(first);
            rustix::thread::sched_setaffinity(None, &one).unwrap();
            (std::thread::available_parallelism().unwrap().get(), describe().cpus)
        });
        assert_eq!(pinned.join().unwrap(), (1, before));
    }

    #[test]
    fn the_limit_of_locked_memory_comes_back() {
        let found = getrlimit(Resource::Memlock);
        // Raising needs a privilege that not even every root has; giving back never does.
        drop(raise_memlock());
        assert_eq!(getrlimit(Resource::Memlock), found);
        drop(Memlock { before: Rlimit { current: Some(4096), maximum: found.maximum } });
        assert_eq!(getrlimit(Resource::Memlock).current, Some(4096));
        drop(Memlock { before: found });
        assert_eq!(getrlimit(Resource::Memlock), found);
    }
}
