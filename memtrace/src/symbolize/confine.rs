//! Locks the process that names frames in, before it reads the first byte of a file.
//!
//! Debug information comes with the traced programs and is read by a large parser. Whoever finds a
//! hole in it must gain nothing: the process that reads it has every file open that it needs, and
//! then gives up whatever it could do with more. Three walls, each of which holds alone:
//!
//! 1. [`limit`]: resource limits. No file grows, no process is made, memory and CPU time end.
//! 2. `drop_identity`: if root started it, the user and group `nobody`, no other groups, no
//!    capabilities in any set, and no way to gain some.
//! 3. `filter`: a seccomp filter. Reading what is open, memory, and writing to standard output
//!    are allowed; a path leads to no file; any other system call ends the process.
//!
//! A user who starts it, for `memtrace report`, has no other identity to take and keeps their own.

use std::io;

use anyhow::Context;
use rustix::process::{DumpableBehavior, Gid, Resource, Uid};
use rustix::thread::{CapabilitySet, CapabilitySets};
use seccompiler::{SeccompAction, SeccompCmpOp};

use crate::own_process::lower_limit;
use crate::own_process::rights::cut_bounding_set;
use crate::own_process::syscalls::{Rules, program, when};

/// User and group `nobody`: they own no file (kernel/sys.c, `DEFAULT_OVERFLOWUID`).
const NOBODY: u32 = 65_534;
/// CPU time, seconds.
const MAX_CPU_S: u64 = 40;
/// Private memory (RLIMIT_DATA); mapped files do not count.
const MAX_PRIVATE_BYTES: u64 = 512 << 20;
/// Address space, mapped files included: room for the largest debug files, of some GiB each.
const MAX_ADDRESS_SPACE_BYTES: u64 = 64 << 30;
/// Stack, as most systems set it.
const MAX_STACK_BYTES: u64 = 8 << 20;

/// Bounds memory, CPU time, files and processes. Best effort: the names are wanted even where a
/// limit cannot be set.
pub fn limit() {
    let _ = std::fs::write("/proc/self/oom_score_adj", "1000");
    let _ = rustix::process::nice(10);
    for (resource, most) in [
        (Resource::Data, MAX_PRIVATE_BYTES),
        (Resource::As, MAX_ADDRESS_SPACE_BYTES),
        (Resource::Stack, MAX_STACK_BYTES),
        (Resource::Cpu, MAX_CPU_S),
        (Resource::Core, 0),
        (Resource::Fsize, 0),
        (Resource::Nproc, 0),
    ] {
        lower_limit(resource, most);
    }
}

/// Keeps of root's abilities only that of reading any file: for a search, in which headers are read
/// before [`enter`]. Best effort: where root has no such capability, it stays root until then.
pub fn only_read() {
    let reading = CapabilitySet::DAC_READ_SEARCH;
    let has = |sets: CapabilitySets| sets.permitted.contains(reading);
    if !rustix::process::geteuid().is_root() || !rustix::thread::capabilities(None).is_ok_and(has) {
        return;
    }
    // SETPCAP: for `enter`, to empty the bounding set.
    let kept = CapabilitySets {
        effective: reading | CapabilitySet::SETPCAP,
        permitted: reading | CapabilitySet::SETPCAP,
        inheritable: CapabilitySet::empty(),
    };
    let _ = rustix::thread::set_keep_capabilities(true);
    let _ = become_nobody();
    let _ = rustix::thread::set_keep_capabilities(false);
    if !rustix::process::geteuid().is_root() {
        let _ = rustix::thread::set_capabilities(None, kept);
    }
}

/// Gives up identity, capabilities and all system calls but those that reading what is open takes.
/// Irrevocable. The process must have one thread: identity and filter are a thread's own.
///
/// Fails if capabilities remain, or if root's identity remains and there is no filter either.
pub fn enter() -> anyhow::Result<()> {
    let identity = drop_identity();
    // What is open stays open; there will be no other descriptor.
    lower_limit(Resource::Nofile, 0);
    let kept = rustix::thread::capabilities(None).context("failed to read capabilities")?;
    anyhow::ensure!(is_empty(&kept), "failed to drop capabilities: {kept:?} are left");
    match (identity, filter()) {
        (Err(identity), Err(filter)) => Err(filter.context(format!("failed to drop privileges: {identity:#}"))),
        _ => Ok(()),
    }
}

/// Becomes `nobody` if this is root, and drops all capabilities for good.
fn drop_identity() -> anyhow::Result<()> {
    // This needs capabilities, so it comes before they go; without them there is nothing to bound.
    cut_bounding_set(CapabilitySet::empty());
    let identity = if rustix::process::geteuid().is_root() { become_nobody() } else { Ok(()) };
    let _ = rustix::thread::clear_ambient_capability_set();
    let none = CapabilitySet::empty();
    let sets = CapabilitySets { effective: none, permitted: none, inheritable: none };
    rustix::thread::set_capabilities(None, sets).context("failed to drop capabilities")?;
    rustix::thread::set_no_new_privs(true).context("failed to set no_new_privs")?;
    // Other processes of `nobody` must not trace this one.
    let _ = rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable);
    identity.context("failed to change user")
}

fn become_nobody() -> io::Result<()> {
    let (user, group) = (Uid::from_raw(NOBODY), Gid::from_raw(NOBODY));
    rustix::thread::set_thread_groups(&[])?;
    rustix::thread::set_thread_res_gid(group, group, group)?;
    Ok(rustix::thread::set_thread_res_uid(user, user, user)?)
}

fn is_empty(sets: &CapabilitySets) -> bool {
    (sets.effective | sets.permitted | sets.inheritable).is_empty()
}

/// Installs the filter. Two programs, since each knows one answer beside "allowed": the kernel runs
/// both and takes the stricter answer (kernel/seccomp.c, `seccomp_run_filters`).
fn filter() -> anyhow::Result<()> {
    let programs = [
        program(by_path()?, SeccompAction::Allow, SeccompAction::Errno(libc::ENOENT.unsigned_abs()))?,
        program(allowed()?, SeccompAction::KillProcess, SeccompAction::Allow)?,
    ];
    programs.iter().try_for_each(|program| seccompiler::apply_filter(program)).context("failed to set the filter")
}

/// Calls that take a path: to the symbolizer no file exists. It looks for debug files by itself, and
/// carries on without those that it does not find.
fn by_path() -> anyhow::Result<Rules> {
    let mut rules: Rules = PATH_CALLS.iter().map(|call| (*call, Vec::new())).collect();
    // With AT_EMPTY_PATH they ask for an open file.
    for (call, flags) in [(libc::SYS_newfstatat, 3), (libc::SYS_statx, 2)] {
        rules.insert(call, vec![when(flags, without(libc::AT_EMPTY_PATH), 0)?]);
    }
    Ok(rules)
}

/// Calls by path that answer "no such file".
const PATH_CALLS: &[i64] = &[
    libc::SYS_openat,
    libc::SYS_openat2,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_readlinkat,
    libc::SYS_getcwd,
    libc::SYS_statfs,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_open,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_stat,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_lstat,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_readlink,
];

/// Calls that are allowed whatever their arguments: to read, to have memory, to end.
const CALLS: &[i64] = &[
    libc::SYS_read,
    libc::SYS_pread64,
    libc::SYS_lseek,
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_close,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_brk,
    libc::SYS_futex,
    libc::SYS_getrandom,
    libc::SYS_clock_gettime,
    libc::SYS_sched_yield,
    // How many arenas glibc's malloc makes, once it is out of memory.
    libc::SYS_sched_getaffinity,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

fn allowed() -> anyhow::Result<Rules> {
    let mut rules: Rules = CALLS.iter().chain(PATH_CALLS).map(|call| (*call, Vec::new())).collect();
    // Names go to standard output; what panics writes to standard error.
    rules.insert(libc::SYS_write, vec![when(0, SeccompCmpOp::Eq, 1)?, when(0, SeccompCmpOp::Eq, 2)?]);
    // The standard library asks whether a descriptor is open before it closes it, in debug builds.
    rules.insert(libc::SYS_fcntl, vec![when(1, SeccompCmpOp::Eq, u64::from(libc::F_GETFD.unsigned_abs()))?]);
    for call in [libc::SYS_mmap, libc::SYS_mprotect] {
        rules.insert(call, vec![when(2, without(libc::PROT_EXEC), 0)?]);
    }
    Ok(rules)
}

/// Equal to 0 in these bits.
fn without(bits: libc::c_int) -> SeccompCmpOp {
    SeccompCmpOp::MaskedEq(u64::from(bits.unsigned_abs()))
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Write;
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::process::ExitStatusExt;
    use std::process::{Command, ExitStatus};

    use memtrace_unwind::proc_dir::fd_path;

    use super::*;

    /// Says to [`attempt`] what to try; empty otherwise.
    const DEED: &str = "MEMTRACE_TEST_DEED";
    /// Exit codes of [`attempt`].
    const REFUSED: u8 = 40;
    const DONE: u8 = 41;

    /// Something that a confined process must not be able to do; true if it could.
    type Deed = fn(&File) -> bool;

    /// With all walls. A path is refused, as is growing a file; anything else ends the process.
    const BEHIND_ALL: [(&str, bool, Deed); 12] = [
        ("read a file", false, |_| std::fs::read("/etc/passwd").is_ok()),
        ("make a file", false, |_| File::create(std::env::temp_dir().join("memtrace-confined")).is_ok()),
        ("ask for a file's size", false, |_| std::fs::metadata("/etc/passwd").is_ok()),
        ("open a link of its own", false, |file| File::open(fd_path(file)).is_ok()),
        ("write to an open file", true, |mut file| file.write_all(b"x").is_ok()),
        ("change a file", true, |file| file.set_len(0).is_ok()),
        ("list a directory", false, |_| std::fs::read_dir("/").is_ok()),
        ("make a socket", true, |_| std::os::unix::net::UnixDatagram::unbound().is_ok()),
        ("run a program", true, |_| Command::new("/bin/true").status().is_ok()),
        ("start a thread", true, |_| std::thread::Builder::new().spawn(|| ()).is_ok()),
        ("become root", true, |_| rustix::thread::set_thread_uid(Uid::ROOT).is_ok()),
        ("signal a process", true, |_| {
            rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::CONT).is_ok()
        }),
    ];

    /// While a search reads headers, as root.
    const BEHIND_READING: [(&str, bool, Deed); 3] = [
        ("append to root's file", false, |_| File::options().append(true).open("/etc/passwd").is_ok()),
        ("set the user id", false, |_| rustix::thread::set_thread_uid(Uid::ROOT).is_ok()),
        ("fork", false, |_| Command::new("/bin/true").status().is_ok()),
    ];

    /// Without the filter, as root: what identity and limits refuse by themselves.
    const BEHIND_IDENTITY: [(&str, bool, Deed); 5] = [
        ("read a file of root", false, |file| File::open(fd_path(file)).is_ok()),
        ("become root again", false, |_| rustix::thread::set_thread_uid(Uid::ROOT).is_ok()),
        ("change root's file", false, |_| File::options().append(true).open("/etc/passwd").is_ok()),
        ("start a process", false, |_| Command::new("/bin/true").status().is_ok()),
        ("open one more file", false, |_| {
            lower_limit(Resource::Nofile, 0);
            File::open("/etc/passwd").is_ok()
        }),
    ];

    fn is_root() -> bool {
        rustix::process::geteuid().is_root()
    }

    /// What the child does: this test again, in a process that may end.
    fn attempt(named: &str) -> ! {
        let file = tempfile::tempfile().unwrap();
        file.set_permissions(PermissionsExt::from_mode(0o600)).unwrap();
        limit();
        let find = |deeds: &[(&str, bool, Deed)]| deeds.iter().find(|(name, ..)| *name == named).map(|found| found.2);
        let deed = if let Some(deed) = find(&BEHIND_ALL) {
            enter().unwrap();
            deed
        } else if let Some(deed) = find(&BEHIND_READING) {
            only_read();
            // It can still do what it is there for.
            File::open(fd_path(&file)).unwrap();
            deed
        } else {
            drop_identity().unwrap();
            find(&BEHIND_IDENTITY).unwrap()
        };
        std::process::exit(i32::from(if deed(&file) { DONE } else { REFUSED }));
    }

    fn child(test: &str, deed: &str) -> ExitStatus {
        let mut command = Command::new("/proc/self/exe");
        command.args(["--exact", test, "--nocapture"]).env(DEED, deed);
        command.stdout(std::process::Stdio::null()).status().unwrap()
    }

    fn each_is_stopped(test: &str, deeds: &[(&str, bool, Deed)]) {
        for (name, fatal, _) in deeds {
            let status = child(test, name);
            let expected = if *fatal { (None, Some(libc::SIGSYS)) } else { (Some(i32::from(REFUSED)), None) };
            assert_eq!((status.code(), status.signal()), expected, "{name}: {status}");
        }
    }

    #[test]
    fn a_confined_process_can_do_nothing_but_read_what_is_open() {
        if let Ok(deed) = std::env::var(DEED) {
            attempt(&deed);
        }
        let test = "symbolize::confine::tests::a_confined_process_can_do_nothing_but_read_what_is_open";
        each_is_stopped(test, &BEHIND_ALL);
    }

    #[test]
    fn without_the_filter_identity_and_limits_still_hold() {
        if let Ok(deed) = std::env::var(DEED) {
            attempt(&deed);
        }
        let test = "symbolize::confine::tests::without_the_filter_identity_and_limits_still_hold";
        // A user is who they were; the limits are the same.
        let from = if is_root() { 0 } else { 3 };
        each_is_stopped(test, &BEHIND_IDENTITY[from..]);
        // Else it stays root: in containers root often has no such capability.
        if is_root() && rustix::thread::capabilities(None).unwrap().permitted.contains(CapabilitySet::DAC_READ_SEARCH) {
            each_is_stopped(test, &BEHIND_READING);
        }
    }
}
