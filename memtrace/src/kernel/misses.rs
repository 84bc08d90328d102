//! Calls that the kernel did not run a program for.
//!
//! A program is not run while it is already running on the same CPU: for another task that
//! preempted the first one, or for the same task again (kernel/bpf/trampoline.c
//! `__bpf_prog_enter_recur`; kernel/trace/bpf_trace.c for tracepoints and kprobes). The program
//! cannot notice. From 5.12 on the kernel counts such calls in the program's fdinfo
//! (`recursion_misses`), and they are shown as the loss `HOOK/not_run`.

use std::fs::File;
use std::os::fd::RawFd;
use std::os::unix::fs::FileExt;

use super::hooks::Hook;

/// Bytes of an fdinfo file that are read; it is a dozen short lines.
const MAX_BYTES: usize = 1024;

/// The programs of the attached hooks.
#[derive(Debug, Default)]
pub(super) struct Misses {
    /// Cap: the programs of all hooks, 25.
    programs: Vec<(Hook, File)>,
}

impl Misses {
    /// Opens the fdinfo of these programs, by hook and descriptor; those whose misses the kernel
    /// does not count are left out.
    pub(super) fn of(programs: impl Iterator<Item = (Hook, RawFd)>) -> Self {
        let open = |(hook, fd)| {
            let file = File::open(format!("/proc/self/fdinfo/{fd}")).ok()?;
            read(&file).map(|_| (hook, file))
        };
        Self { programs: programs.filter_map(open).collect() }
    }

    /// Calls missed since the start by hook, without those that are 0.
    pub(super) fn totals(&self) -> Vec<(String, u64)> {
        let of_hook = |hook: Hook| {
            let counts = self.programs.iter().filter(|(of, _)| *of == hook).filter_map(|(_, file)| read(file));
            counts.fold(0, u64::saturating_add)
        };
        let totals = Hook::ALL.into_iter().map(|hook| (hook, of_hook(hook)));
        totals
            .filter(|(_, total)| *total > 0)
            .map(|(hook, total)| (format!("{}/not_run", hook.name()), total))
            .collect()
    }
}

fn read(file: &File) -> Option<u64> {
    let mut bytes = [0; MAX_BYTES];
    let read = file.read_at(&mut bytes, 0).ok()?;
    field(&String::from_utf8_lossy(bytes.get(..read)?), "recursion_misses:")
}

/// A number of an fdinfo file.
pub(super) fn field(fdinfo: &str, name: &str) -> Option<u64> {
    fdinfo.lines().find_map(|line| line.strip_prefix(name))?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_field_is_found_where_there_is_one() {
        let fdinfo = "pos:\t0\nflags:\t02000002\nprog_type:\t26\nrun_time_ns:\t0\nrun_cnt:\t0\nrecursion_misses:\t7\n";
        assert_eq!(field(fdinfo, "recursion_misses:"), Some(7));
        assert_eq!(field("pos:\t0\nprog_type:\t26\n", "recursion_misses:"), None);
        assert_eq!(field("recursion_misses:\tmany\n", "recursion_misses:"), None);
    }

    #[test]
    fn a_descriptor_that_is_no_program_is_left_out() {
        let file = File::open("/dev/null").unwrap();
        let fd = std::os::fd::AsRawFd::as_raw_fd(&file);
        assert!(Misses::of([(Hook::Map, fd), (Hook::Map, -1)].into_iter()).totals().is_empty());
    }
}
