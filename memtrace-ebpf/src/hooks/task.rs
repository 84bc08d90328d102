//! The life of processes: fork, exec, exit.

use aya_ebpf::macros::raw_tracepoint;
use aya_ebpf::programs::RawTracePointContext;
use memtrace_common::control::Ring;
use memtrace_common::event::{Exec, Exit, FORK_SHARES_MM, Fork, UNKNOWN};

use super::rss::follow;
use crate::emit::{boot_ns, emit};
use crate::kernel::{self, bytes, is_kthread, pointer, read, read_u32};
use crate::{control, field, layout, set};

/// `sched_process_fork(parent, child)`, threads included; runs when the child is complete.
#[raw_tracepoint(tracepoint = "sched_process_fork")]
fn process_fork(ctx: RawTracePointContext) -> i32 {
    let (parent, child): (u64, u64) = (ctx.arg(0), ctx.arg(1));
    if read_u32(child, layout!(task_tgid)) == read_u32(parent, layout!(task_tgid)) {
        return 0;
    }
    let mm = pointer(child, layout!(task_mm));
    if mm == 0 {
        return 0;
    }
    let shares = mm == pointer(parent, layout!(task_mm));
    emit::<Fork>(Ring::Ledger, boot_ns(), |record| {
        kernel::read_task(parent, field!(record.parent));
        kernel::read_task(child, field!(record.child));
        set!(record => {
            cgroup_id: kernel::memcg_id(kernel::memcg_of(child)),
            flags: if shares { FORK_SHARES_MM } else { 0 },
            reserved: 0,
        });
    });
    if !shares {
        follow(mm, child, true);
    }
    0
}

/// `sched_process_exec(task, old_pid, bprm)`: the new address space is in place.
#[raw_tracepoint(tracepoint = "sched_process_exec")]
fn process_exec(ctx: RawTracePointContext) -> i32 {
    let task: u64 = ctx.arg(0);
    let mm = pointer(task, layout!(task_mm));
    emit::<Exec>(Ring::Ledger, boot_ns(), |record| {
        kernel::read_task(task, field!(record.task));
        set!(record => {
            cgroup_id: kernel::memcg_id(kernel::memcg_of(task)),
            mm_id: mm ^ control!(mm_salt),
        });
    });
    follow(mm, task, true);
    0
}

/// `sched_process_exit(task)`, from 6.16 `(task, group_dead)`. The last thread reports for the process.
#[raw_tracepoint(tracepoint = "sched_process_exit")]
fn process_exit(ctx: RawTracePointContext) -> i32 {
    let task: u64 = ctx.arg(0);
    if is_kthread(task) {
        return 0;
    }
    let signal = pointer(task, layout!(task_signal));
    let last = if layout!(exit_args) == 2 {
        ctx.arg::<i32>(1) as u8 != 0
    } else {
        // Decremented before the tracepoint (kernel/exit.c do_exit).
        read::<i32>(signal, layout!(signal_live)).unwrap_or(0) == 0
    };
    if !last {
        return 0;
    }
    let group_code = read::<i32>(signal, layout!(signal_group_exit_code)).unwrap_or(0);
    let code = if group_code != 0 { group_code } else { read(task, layout!(task_exit_code)).unwrap_or(0) };
    emit::<Exit>(Ring::Ledger, boot_ns(), |record| {
        kernel::read_task(task, field!(record.task));
        kernel::read_memcg(kernel::memcg_of(task), field!(record.memcg));
        set!(record => {
            max_rss_bytes: bytes(read(signal, layout!(signal_maxrss)).unwrap_or(UNKNOWN)),
            exit_code: code as u32,
            reserved: 0,
        });
    });
    0
}
