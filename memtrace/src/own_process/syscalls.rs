//! Filters of system calls (seccomp) for threads of the agent.
//!
//! A call that is refused gives EPERM and nothing ends: it fails as it would without the capability,
//! where its caller handles that, counts it or logs it. A filter is inherited by threads and processes
//! that are started, and can only be narrowed. So what every thread of the agent, the stack worker and
//! the process that names functions have in common is a list of calls that are refused
//! ([`Filter::Agent`]): which calls a C library makes changes with its version, and what an attacker
//! would want does not. The server alone, which reads what strangers send and does little, has a list
//! of calls that are allowed ([`Filter::Server`]).

use std::collections::BTreeMap;

use anyhow::Context;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
};

/// System calls, each with the rules of which one must hold; none: always.
pub type Rules = BTreeMap<i64, Vec<SeccompRule>>;

/// Which calls a thread of the agent cannot make.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filter {
    /// What no part of the agent needs after its start.
    Agent,
    /// Also whatever changes a file, runs a program, or opens a connection.
    Reader,
    /// Everything but connections that are there or come, memory, waiting and time.
    Server,
}

impl Filter {
    /// Sets it for the calling thread, for good, with `no_new_privs`. Fails on a kernel without seccomp
    /// filters.
    pub fn apply(self) -> anyhow::Result<()> {
        seccompiler::apply_filter(&self.program()?).context("failed to set the filter")
    }

    /// What stands in the table of the documentation.
    pub const fn summary(self) -> &'static str {
        match self {
            Self::Agent => "refuses what no part needs",
            Self::Reader => "refuses also changes of files, programs, connections",
            Self::Server => "allows connections, memory, waiting and time only",
        }
    }

    fn program(self) -> anyhow::Result<BpfProgram> {
        let refused = SeccompAction::Errno(libc::EPERM.unsigned_abs());
        match self {
            Self::Agent => program(of_agent()?, SeccompAction::Allow, refused),
            Self::Reader => program(of_reader()?, SeccompAction::Allow, refused),
            Self::Server => program(for_server()?, refused, SeccompAction::Allow),
        }
    }
}

/// Compiles a filter for this architecture. A call of another one ends the process.
pub fn program(rules: Rules, otherwise: SeccompAction, matched: SeccompAction) -> anyhow::Result<BpfProgram> {
    let arch = std::env::consts::ARCH.try_into().context("no filter for this architecture")?;
    let filter = SeccompFilter::new(rules, otherwise, matched, arch).context("failed to make a filter")?;
    filter.try_into().context("failed to compile a filter")
}

/// Holds if this comparison of an argument, counted from 0, does.
pub fn when(argument: u8, operator: SeccompCmpOp, value: u64) -> anyhow::Result<SeccompRule> {
    Ok(SeccompRule::new(vec![condition(argument, operator, value)?])?)
}

fn condition(argument: u8, operator: SeccompCmpOp, value: u64) -> anyhow::Result<SeccompCondition> {
    Ok(SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operator, value)?)
}

/// What no part of the agent, and no process that it starts, calls once the programs are attached.
const REFUSED_TO_AGENT: &[i64] = &[
    // other processes' memory and descriptors
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_process_madvise,
    libc::SYS_pidfd_getfd,
    libc::SYS_kcmp,
    // file systems and namespaces
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_move_mount,
    libc::SYS_open_tree,
    libc::SYS_fsopen,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fspick,
    libc::SYS_mount_setattr,
    libc::SYS_setns,
    libc::SYS_unshare,
    libc::SYS_mknodat,
    libc::SYS_fanotify_init,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_quotactl,
    libc::SYS_acct,
    // the kernel and the machine
    libc::SYS_kexec_load,
    libc::SYS_kexec_file_load,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_reboot,
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    libc::SYS_clock_adjtime,
    libc::SYS_adjtimex,
    libc::SYS_sethostname,
    libc::SYS_setdomainname,
    libc::SYS_syslog,
    libc::SYS_vhangup,
    libc::SYS_personality,
    // what has been a way into the kernel
    libc::SYS_keyctl,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_perf_event_open,
    libc::SYS_userfaultfd,
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_mknod,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_iopl,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_ioperm,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_modify_ldt,
];

/// Commands of bpf(2) (include/uapi/linux/bpf.h, `enum bpf_cmd`) that are left: an element of a map is
/// looked up, set, deleted, the next one found; what a descriptor is (the stack worker opens its ring by
/// it). Nothing is loaded, attached or made any more.
const BPF_COMMANDS: [u64; 5] = [1, 2, 3, 4, 15];

fn of_agent() -> anyhow::Result<Rules> {
    let mut rules: Rules = REFUSED_TO_AGENT.iter().map(|call| (*call, Vec::new())).collect();
    let other = BPF_COMMANDS.into_iter().map(|command| condition(0, SeccompCmpOp::Ne, command));
    rules.insert(libc::SYS_bpf, vec![SeccompRule::new(other.collect::<Result<_, _>>()?)?]);
    Ok(with_x32(rules))
}

/// What changes a file, runs a program or opens a connection.
const REFUSED_TO_READER: &[i64] = &[
    libc::SYS_execve,
    libc::SYS_execveat,
    libc::SYS_kill,
    libc::SYS_socket,
    libc::SYS_connect,
    libc::SYS_bind,
    libc::SYS_openat2,
    libc::SYS_unlinkat,
    libc::SYS_renameat2,
    libc::SYS_mkdirat,
    libc::SYS_linkat,
    libc::SYS_symlinkat,
    libc::SYS_fchmod,
    libc::SYS_fchmodat,
    libc::SYS_fchown,
    libc::SYS_fchownat,
    libc::SYS_truncate,
    libc::SYS_ftruncate,
    libc::SYS_utimensat,
    libc::SYS_setxattr,
    libc::SYS_lsetxattr,
    libc::SYS_fsetxattr,
    libc::SYS_bpf,
    // renameat(2), which libc does not name on every architecture
    #[cfg(target_arch = "x86_64")]
    264,
    #[cfg(target_arch = "aarch64")]
    38,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_open,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_creat,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_unlink,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_rename,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_mkdir,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_rmdir,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_link,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_symlink,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_chmod,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_chown,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_lchown,
];

fn of_reader() -> anyhow::Result<Rules> {
    let mut rules: Rules = REFUSED_TO_READER.iter().map(|call| (*call, Vec::new())).collect();
    let set = |mask: libc::c_int, value: libc::c_int| {
        when(2, SeccompCmpOp::MaskedEq(u64::from(mask.unsigned_abs())), u64::from(value.unsigned_abs()))
    };
    let to_change = [
        (libc::O_ACCMODE, libc::O_WRONLY),
        (libc::O_ACCMODE, libc::O_RDWR),
        (libc::O_CREAT, libc::O_CREAT),
        (libc::O_TRUNC, libc::O_TRUNC),
    ];
    let to_change = to_change.into_iter().map(|(mask, value)| set(mask, value));
    rules.insert(libc::SYS_openat, to_change.collect::<Result<_, _>>()?);
    Ok(with_x32(rules))
}

/// The same calls by their numbers in the x32 ABI, which x86_64 kernels can have beside their own
/// (arch/x86/include/uapi/asm/unistd.h, `__X32_SYSCALL_BIT`).
fn with_x32(mut rules: Rules) -> Rules {
    if cfg!(target_arch = "x86_64") {
        let x32: Vec<_> = rules.iter().map(|(call, conditions)| (call | 0x4000_0000, conditions.clone())).collect();
        rules.extend(x32);
    }
    rules
}

/// What serving takes.
const ALLOWED_TO_SERVER: &[i64] = &[
    // connections
    libc::SYS_accept4,
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
    libc::SYS_shutdown,
    libc::SYS_close,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    libc::SYS_fstat,
    // waiting, other threads, and time
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_eventfd2,
    libc::SYS_ppoll,
    libc::SYS_futex,
    libc::SYS_sched_yield,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_nanosleep,
    libc::SYS_gettimeofday,
    libc::SYS_restart_syscall,
    libc::SYS_membarrier,
    // memory
    libc::SYS_brk,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_getrandom,
    // How many arenas glibc's malloc makes, once it is out of memory.
    libc::SYS_sched_getaffinity,
    // the thread's end, and the process' if it aborts
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_gettid,
    libc::SYS_getpid,
    libc::SYS_tgkill,
    libc::SYS_exit,
    libc::SYS_exit_group,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_epoll_wait,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_poll,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_time,
];

fn for_server() -> anyhow::Result<Rules> {
    let mut rules: Rules = ALLOWED_TO_SERVER.iter().map(|call| (*call, Vec::new())).collect();
    let equals = |argument, value: libc::c_int| when(argument, SeccompCmpOp::Eq, u64::from(value.unsigned_abs()));
    // The runtime copies descriptors; the standard library asks whether one is open before it closes it.
    let fcntl = [libc::F_DUPFD_CLOEXEC, libc::F_GETFD, libc::F_SETFD, libc::F_GETFL, libc::F_SETFL];
    rules.insert(libc::SYS_fcntl, fcntl.into_iter().map(|command| equals(1, command)).collect::<Result<_, _>>()?);
    // FIONBIO (include/uapi/asm-generic/ioctls.h): whether reading waits.
    rules.insert(libc::SYS_ioctl, vec![when(1, SeccompCmpOp::Eq, 0x5421)?]);
    let no_code = SeccompCmpOp::MaskedEq(u64::from(libc::PROT_EXEC.unsigned_abs()));
    for call in [libc::SYS_mmap, libc::SYS_mprotect] {
        rules.insert(call, vec![when(2, no_code.clone(), 0)?]);
    }
    Ok(rules)
}

#[cfg(test)]
mod tests {
    use std::fs::{File, OpenOptions};
    use std::io::{ErrorKind, Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::process::Command;

    use super::*;

    /// What `attempt` says in a thread with the filter.
    fn behind<T: Send>(filter: Filter, attempt: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| {
            let confined = scope.spawn(|| {
                filter.apply().unwrap();
                attempt()
            });
            confined.join().unwrap()
        })
    }

    fn refused<T>(result: std::io::Result<T>) -> bool {
        result.is_err_and(|error| error.kind() == ErrorKind::PermissionDenied)
    }

    #[test]
    #[allow(deprecated, reason = "the replacement is unsafe, since it can take descriptors away")]
    fn what_no_part_needs_is_refused_to_each() {
        for filter in [Filter::Agent, Filter::Server] {
            let unshared = behind(filter, || rustix::thread::unshare(rustix::thread::UnshareFlags::FS));
            assert_eq!(unshared, Err(rustix::io::Errno::PERM), "{filter:?}");
        }
        // Allowed to anybody without the filter.
        let unshared = std::thread::spawn(|| rustix::thread::unshare(rustix::thread::UnshareFlags::FS)).join();
        assert_eq!(unshared.unwrap(), Ok(()));
    }

    #[test]
    fn the_agent_still_writes_and_starts_programs() {
        behind(Filter::Agent, || {
            let dir = tempfile::tempdir().unwrap();
            std::fs::write(dir.path().join("a"), "x").unwrap();
            std::fs::rename(dir.path().join("a"), dir.path().join("b")).unwrap();
            assert!(Command::new("/proc/self/exe").arg("--list").output().unwrap().status.success());
            std::thread::spawn(|| ()).join().unwrap();
        });
    }

    #[test]
    fn the_reader_reads_and_changes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let (old, new) = (dir.path().join("old"), dir.path().join("new"));
        std::fs::write(&old, "x").unwrap();
        behind(Filter::Reader, || {
            assert_eq!(std::fs::read_to_string(&old).unwrap(), "x");
            assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
            assert!(refused(File::create(&new)));
            assert!(refused(OpenOptions::new().write(true).open(&old)));
            assert!(refused(OpenOptions::new().append(true).open(&old)));
            assert!(refused(std::fs::remove_file(&old)));
            assert!(refused(std::fs::rename(&old, &new)));
            assert!(refused(std::fs::create_dir(&new)));
            assert!(refused(TcpListener::bind("127.0.0.1:0")));
            assert!(refused(Command::new("/proc/self/exe").arg("--list").output()));
        });
        assert_eq!(std::fs::read_to_string(&old).unwrap(), "x");
    }

    #[test]
    fn the_server_serves_and_does_nothing_else() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let client = std::thread::spawn(move || {
            let mut stream = TcpStream::connect(address).unwrap();
            stream.write_all(b"ping").unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).unwrap();
            answer
        });
        behind(Filter::Server, || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut asked = [0; 4];
            stream.read_exact(&mut asked).unwrap();
            stream.write_all(&asked).unwrap();
            drop(stream);
            drop(vec![7_u8; 64 << 20]);
            assert!(refused(File::open("/proc/self/status")));
            assert!(refused(std::fs::metadata("/proc/self/status")));
            assert!(refused(TcpStream::connect(address)));
            assert!(refused(Command::new("/proc/self/exe").arg("--list").output()));
            assert!(std::thread::Builder::new().spawn(|| ()).is_err());
        });
        assert_eq!(client.join().unwrap(), "ping");
    }
}
