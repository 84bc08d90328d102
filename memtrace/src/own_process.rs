//! What this process takes, and may take.

pub mod capability;
#[cfg(test)]
mod page;
pub mod rights;
pub mod syscalls;

use rustix::process::{Resource, Rlimit, getpriority_process, getrlimit, setpriority_process, setrlimit};
use tracing::warn;

/// Resident memory of this process, bytes; `None` when /proc does not say.
pub fn resident_bytes() -> Option<u64> {
    let statm = std::fs::read_to_string("/proc/self/statm").ok()?;
    let pages: u64 = statm.split_ascii_whitespace().nth(1)?.parse().ok()?;
    pages.checked_mul(rustix::param::page_size() as u64)
}

/// Lowers a limit of this process for good, and raises none. Best effort.
pub fn lower_limit(resource: Resource, most: u64) {
    let most = getrlimit(resource).maximum.map_or(most, |maximum| maximum.min(most));
    let _ = setrlimit(resource, Rlimit { current: Some(most), maximum: Some(most) });
}

/// A setting of the C library's heaps.
#[cfg(target_env = "gnu")]
#[allow(unsafe_code, reason = "it has no safe wrapper")]
fn set_heaps(setting: i32, value: i32) {
    // SAFETY: takes two numbers. The callers are not beside a thread that allocates.
    unsafe { libc::mallopt(setting, value) };
}

/// Makes the C library give memory back that is freed. By itself it raises the size from which an
/// allocation has pages of its own (up to 32 MiB) whenever such a one is freed, and then keeps what
/// lies between others for good; and it has eight heaps for each CPU. Call it before anything else.
pub fn limit_kept_memory() {
    #[cfg(target_env = "gnu")]
    for (setting, value) in
        [(libc::M_MMAP_THRESHOLD, 256 << 10), (libc::M_TRIM_THRESHOLD, 1 << 20), (libc::M_ARENA_MAX, 2)]
    {
        set_heaps(setting, value);
    }
}

/// Instead of [`limit_kept_memory`]: gives each thread a heap of its own, which rarely grows or shrinks; more is kept
/// between two calls of [`trim_memory`]. Whoever uses a heap waits for others that use it, and whoever maps or unmaps
/// pages for all threads that do; each may be a thread that waits for a CPU, for tens of ms. Call it before there are
/// threads.
pub fn give_each_thread_a_heap() {
    #[cfg(target_env = "gnu")]
    for (setting, value) in [
        (libc::M_MMAP_THRESHOLD, 1 << 20),
        (libc::M_TRIM_THRESHOLD, 4 << 20),
        // a heap grows by at least this much: what is not touched costs nothing
        (libc::M_TOP_PAD, 1 << 20),
        // an agent has ten threads
        (libc::M_ARENA_MAX, 16),
    ] {
        set_heaps(setting, value);
    }
}

/// Gives free memory back now that lies between what is in use: after something that took much.
pub fn trim_memory() {
    #[cfg(target_env = "gnu")]
    #[allow(unsafe_code, reason = "it has no safe wrapper")]
    // SAFETY: takes a number; the C library locks its heaps.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Has this thread go before others (CAP_SYS_NICE). `niceness` is negative.
fn raise_priority(thread: &str, niceness: i32) {
    // On Linux this is of the thread alone (kernel/sys.c, setpriority).
    if let Err(error) = setpriority_process(None, niceness) {
        warn!("programs that keep the CPUs busy can make the thread {thread} late ({error}); give CAP_SYS_NICE");
    }
}

/// Has this thread wait for the next tick when it wakes up beside others that run, instead of interrupting one of them
/// (SCHED_BATCH, sched(7)): the recorder wakes it up and goes on. Best effort; its share of the CPU stays the same.
#[cfg(target_env = "gnu")]
fn interrupt_nobody() {
    let priority = libc::sched_param { sched_priority: 0 };
    #[allow(unsafe_code, reason = "it has no safe wrapper")]
    // SAFETY: the kernel reads the parameters during the call.
    unsafe {
        libc::sched_setscheduler(0, libc::SCHED_BATCH, &raw const priority);
    }
}

#[cfg(not(target_env = "gnu"))]
const fn interrupt_nobody() {}

/// Takes back for this thread or process what it has from one that goes before others.
pub fn lower_priority() {
    if getpriority_process(None).is_ok_and(|niceness| niceness < 0) {
        let _ = setpriority_process(None, 0);
    }
}
