//! System calls that have no safe wrapper: shared address spaces, fork without exec, code, swap; and a
//! wild read. All unsafe code is here.
#![allow(unsafe_code, reason = "system calls and a fault that are unsafe by nature")]

use std::ffi::CString;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use anyhow::{Context, ensure};
use rustix::mount::MountPropagationFlags;

/// Somebody without rights.
const SOMEBODY: libc::uid_t = 12_345;
/// Room for code that was compiled.
const CODE_BYTES: usize = 4096;

/// Starts a process in this address space (CLONE_VM without CLONE_THREAD) that waits until it is
/// killed.
pub(crate) fn sharer() -> anyhow::Result<u32> {
    extern "C" fn pause(_: *mut libc::c_void) -> libc::c_int {
        wait_for_the_end()
    }
    let stack = Box::leak(vec![0u128; 4096].into_boxed_slice());
    let top = stack.as_mut_ptr_range().end;
    // SAFETY: the stack is never freed and grows down from its end, which is aligned; the function it runs only pauses,
    // so that nothing of the runtime it shares with its parent is used.
    let child = unsafe { libc::clone(pause, top.cast(), libc::CLONE_VM | libc::SIGCHLD, std::ptr::null_mut()) };
    ensure!(child > 0, "failed to clone: {}", std::io::Error::last_os_error());
    u32::try_from(child).context("not a process id")
}

/// Maps a file as code, for as long as this process lives.
pub(crate) fn map_code(file: &File, bytes: usize) -> anyhow::Result<()> {
    map_file(file, bytes).map(drop)
}

fn map_file(file: &File, bytes: usize) -> anyhow::Result<*mut libc::c_void> {
    let (access, fd) = (libc::PROT_READ | libc::PROT_EXEC, file.as_raw_fd());
    // SAFETY: a new mapping, which nobody reads or runs.
    let mapped = unsafe { libc::mmap(std::ptr::null_mut(), bytes, access, libc::MAP_PRIVATE, fd, 0) };
    ensure!(mapped != libc::MAP_FAILED, "failed to map a file: {}", std::io::Error::last_os_error());
    Ok(mapped)
}

/// Maps the beginning of a file as code, for as long as this process lives, and returns the function of which it has
/// the code, `bytes` at `at`: it takes the beginning and the end of what it touches.
pub(crate) fn code_in(file: &File, at: usize, bytes: usize) -> anyhow::Result<extern "C" fn(*mut u8, *const u8)> {
    ensure!(at + bytes <= CODE_BYTES && (at + bytes) as u64 <= file.metadata()?.len(), "no code at {at}");
    let mapped = map_file(file, CODE_BYTES)?;
    // SAFETY: within the mapping and the file, which the caller wrote and does not make shorter.
    Ok(unsafe { std::mem::transmute::<*mut libc::c_void, extern "C" fn(*mut u8, *const u8)>(mapped.byte_add(at)) })
}

/// Has whoever opens the file wait (a write lease), until this process ends or 45 s are over.
pub(crate) fn lease(file: &File) -> anyhow::Result<()> {
    // SAFETY: takes numbers only; the signal that tells of somebody who waits would end this process.
    let result = unsafe {
        libc::signal(libc::SIGIO, libc::SIG_IGN);
        libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, libc::F_WRLCK)
    };
    ensure!(result == 0, "no lease: {}", std::io::Error::last_os_error());
    Ok(())
}

/// Makes so many mappings of a page each, and as many between them, for as long as this process lives.
pub(crate) fn many_mappings(count: usize) -> anyhow::Result<()> {
    let page = rustix::param::page_size();
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: a new mapping, of which nobody reads or writes anything.
    unsafe {
        let mapped = libc::mmap(std::ptr::null_mut(), 2 * count * page, libc::PROT_NONE, flags, -1, 0);
        ensure!(mapped != libc::MAP_FAILED, "failed to map memory: {}", std::io::Error::last_os_error());
        for n in 0..count {
            let result = libc::mprotect(mapped.byte_add(2 * n * page), page, libc::PROT_READ);
            ensure!(result == 0, "no more than {n} mappings: {}", std::io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Maps bytes as code, for as long as this process lives, and returns the function that they are: it
/// takes the beginning and the end of what it touches.
pub(crate) fn compiled(code: &[u8]) -> anyhow::Result<extern "C" fn(*mut u8, *const u8)> {
    let access = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
    // SAFETY: a new mapping; the code fits into it, as is looked at first, and nothing else is there.
    unsafe {
        ensure!(code.len() <= CODE_BYTES, "more code than fits");
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let mapped = libc::mmap(std::ptr::null_mut(), CODE_BYTES, access, flags, -1, 0);
        ensure!(mapped != libc::MAP_FAILED, "failed to map code: {}", std::io::Error::last_os_error());
        std::ptr::copy_nonoverlapping(code.as_ptr(), mapped.cast(), code.len());
        Ok(std::mem::transmute::<*mut libc::c_void, extern "C" fn(*mut u8, *const u8)>(mapped))
    }
}

/// fork(2): 0 in the child, the child's id in the parent.
pub(crate) fn fork() -> anyhow::Result<u32> {
    // SAFETY: this process has one thread, so the child may go on as it is.
    let child = unsafe { libc::fork() };
    ensure!(child >= 0, "failed to fork: {}", std::io::Error::last_os_error());
    u32::try_from(child).context("not a process id")
}

/// Ends a forked child without running exit handlers of its parent.
pub(crate) fn leave() -> ! {
    // SAFETY: takes a number and never comes back.
    unsafe { libc::_exit(0) }
}

/// Waits until a signal ends this process.
pub(crate) fn wait_for_the_end() -> ! {
    loop {
        // SAFETY: pause takes nothing and touches nothing but this thread's errno.
        unsafe { libc::pause() };
    }
}

/// CPU time of this process and the children it has waited for, nanoseconds with microsecond
/// resolution.
pub(crate) fn cpu_ns() -> u64 {
    let of = |who| {
        let mut usage = std::mem::MaybeUninit::<libc::rusage>::zeroed();
        // SAFETY: `usage` outlives the call, and all zeros is a valid one should the call fail.
        let usage = unsafe {
            libc::getrusage(who, usage.as_mut_ptr());
            usage.assume_init()
        };
        let ns = |time: libc::timeval| {
            u64::try_from(time.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(time.tv_usec).unwrap_or(0) * 1000
        };
        ns(usage.ru_utime) + ns(usage.ru_stime)
    };
    of(libc::RUSAGE_SELF) + of(libc::RUSAGE_CHILDREN)
}

/// Waits for a child.
pub(crate) fn wait(child: u32) -> anyhow::Result<i32> {
    let mut status = 0;
    // SAFETY: `status` outlives the call.
    let waited = unsafe { libc::waitpid(i32::try_from(child)?, &raw mut status, 0) };
    ensure!(waited > 0, "failed to wait for {child}: {}", std::io::Error::last_os_error());
    Ok(status)
}

/// Gives this process mounts of its own: what it mounts nobody else sees.
pub(crate) fn own_mount_namespace() -> anyhow::Result<()> {
    // SAFETY: takes a number only; other threads there are none.
    let result = unsafe { libc::unshare(libc::CLONE_NEWNS) };
    ensure!(result == 0, "no mount namespace of its own: {}", std::io::Error::last_os_error());
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    rustix::mount::mount_change("/", private).context("mounts are shared with others")
}

/// Gives up all rights, as somebody whom nobody knows.
pub(crate) fn become_somebody() -> anyhow::Result<()> {
    // SAFETY: take numbers only; other threads there are none.
    let result = unsafe {
        [
            libc::setgroups(0, std::ptr::null()),
            libc::setresgid(SOMEBODY, SOMEBODY, SOMEBODY),
            libc::setresuid(SOMEBODY, SOMEBODY, SOMEBODY),
            // or its files in /proc would be root's
            libc::prctl(libc::PR_SET_DUMPABLE, 1),
        ]
    };
    ensure!(result == [0; 4], "it keeps its rights: {result:?}, {}", std::io::Error::last_os_error());
    Ok(())
}

/// The same, in a user and a mount namespace of his own, in which he is root.
pub(crate) fn become_somebody_in_own_namespaces() -> anyhow::Result<()> {
    become_somebody()?;
    // SAFETY: takes a number only; other threads there are none.
    let result = unsafe { libc::unshare(libc::CLONE_NEWUSER | libc::CLONE_NEWNS) };
    ensure!(result == 0, "no namespaces of its own: {}", std::io::Error::last_os_error());
    std::fs::write("/proc/self/setgroups", "deny")?;
    std::fs::write("/proc/self/uid_map", format!("0 {SOMEBODY} 1"))?;
    std::fs::write("/proc/self/gid_map", format!("0 {SOMEBODY} 1"))?;
    Ok(())
}

/// Enters a cgroup namespace whose root is the current cgroup.
pub(crate) fn own_cgroup_namespace() -> anyhow::Result<()> {
    // SAFETY: takes a number; only this process' view of paths changes.
    let result = unsafe { libc::unshare(libc::CLONE_NEWCGROUP) };
    ensure!(result == 0, "failed to enter a cgroup namespace: {}", std::io::Error::last_os_error());
    Ok(())
}

/// Starts or stops swapping to a device.
pub(crate) fn swap(device: &Path, off: bool) -> anyhow::Result<()> {
    let path = CString::new(device.as_os_str().as_bytes()).context("a device name with a zero byte")?;
    // SAFETY: the path is a C string that outlives the call.
    let result = unsafe { if off { libc::swapoff(path.as_ptr()) } else { libc::swapon(path.as_ptr(), 0) } };
    ensure!(result == 0, "failed to swap to {}: {}", device.display(), std::io::Error::last_os_error());
    Ok(())
}

/// Reads an unmapped address.
pub(crate) fn segv() {
    // SAFETY: none: the fault is what it is for.
    unsafe { std::ptr::read_volatile(std::ptr::dangling::<u64>()) };
}
