//! OOM kills: who was killed, who triggered it, which cgroup ran out.
//!
//! `current` is the thread whose allocation failed: the trigger, not the victim. A kill is a
//! SIGKILL sent by the kernel followed by mark_victim for the same task; mark_victim alone means
//! "chosen while already exiting" (mm/oom_kill.c: __oom_kill_process, task_will_free_mem).

use aya_ebpf::helpers::bpf_get_current_uid_gid;
use aya_ebpf::macros::{fentry, kprobe, raw_tracepoint};
use aya_ebpf::programs::{FEntryContext, ProbeContext, RawTracePointContext};
use aya_log_ebpf::warn;
use memtrace_common::control::{LossReason, Ring};
use memtrace_common::event::{
    Kill, OomDecision, OomVictim, SCOPE_GLOBAL, SCOPE_MEMCG, SCOPE_UNKNOWN, SENDER_EXITING, SENDER_KERNEL,
    SENDER_NOINFO, SENDER_PARENT, SENDER_PROCESS, UNKNOWN, VICTIM_GROUP, VICTIM_KILLED, VICTIM_RSS_APPROXIMATE,
};

use super::reclaim::reclaimed_lately;
use crate::emit::{boot_ns, emit, lose};
use crate::kernel::{self, bytes, current, pointer, read, read_u32};
use crate::maps::LAST_KILL;
use crate::memory::value;
use crate::stack::emit_trigger_stack;
use crate::{field, layout, set};

const SIGKILL: i32 = 9;
/// How long after a SIGKILL a mark_victim on the same CPU belongs to it. Both are in one task_lock
/// section (mm/oom_kill.c `__oom_kill_process`).
const KILL_TO_MARK_NS: u64 = 1_000_000_000;

/// `signal_generate(sig, info, task, group, result)`.
#[raw_tracepoint(tracepoint = "signal_generate")]
fn signal_generate(ctx: RawTracePointContext) -> i32 {
    if ctx.arg::<i32>(0) != SIGKILL {
        return 0;
    }
    let info: u64 = ctx.arg(1);
    let target: u64 = ctx.arg(2);
    let whole_process = ctx.arg::<i32>(3) != 0;
    // SEND_SIG_NOINFO is (void *)0, SEND_SIG_PRIV is (void *)1 (include/linux/sched/signal.h). In 7.3 a kill(2) has no
    // siginfo either; it goes to a whole process, cgroup.kill to one thread of each (kernel/cgroup/cgroup.c).
    let sender_code = match info {
        0 if whole_process && !kernel::is_exiting(current()) => SENDER_PROCESS,
        0 => SENDER_NOINFO,
        1 => SENDER_KERNEL,
        _ => SENDER_PROCESS,
    };
    let now = boot_ns();
    if sender_code == SENDER_KERNEL
        && let Some(last) = LAST_KILL.get_ptr_mut(0)
    {
        set!(last => {
            target: target,
            tgid: read(target, layout!(task_tgid)).unwrap_or(0),
            boot_ns: now,
        });
    }
    // The init of a pid namespace that exits kills the rest of it in the kernel's name
    // (kernel/pid_namespace.c zap_pid_ns_processes); a parent that exits sends what its children
    // asked for (prctl PR_SET_PDEATHSIG, kernel/exit.c forget_original_parent).
    let sender_code = match sender_code {
        SENDER_KERNEL if kernel::is_exiting(current()) => SENDER_EXITING,
        SENDER_NOINFO if kernel::is_exiting(current()) => SENDER_PARENT,
        code => code,
    };
    // Anybody can send SIGKILL as fast as they like: only the kernel's own go where nothing is lost.
    let ring = if sender_code == SENDER_KERNEL { Ring::Ledger } else { Ring::Samples };
    emit::<Kill>(ring, now, |record| {
        kernel::read_task(current(), field!(record.sender));
        kernel::read_task(target, field!(record.target));
        set!(record => {
            cgroup_id: kernel::memcg_id(kernel::memcg_of(target)),
            sender_code: sender_code,
            result: ctx.arg::<i32>(4) as u32,
            sender_uid: bpf_get_current_uid_gid() as u32,
            reserved: 0,
        });
    });
    0
}

/// `mark_victim(task, uid)`, or `mark_victim(pid)` on older builds. Runs under the victim's task_lock.
#[raw_tracepoint(tracepoint = "mark_victim")]
fn mark_victim(ctx: RawTracePointContext) -> i32 {
    let now = boot_ns();
    let Some(last) = value(LAST_KILL.get_ptr_mut(0)) else { return 0 };
    let victim: u64 = if layout!(mark_victim_is_task) == 1 {
        ctx.arg(0)
    } else {
        // The pid variant: the SIGKILL just sent on this CPU names the task, else it is the trigger itself.
        let pid: u32 = ctx.arg::<i32>(0) as u32;
        if read_u32(last.target, layout!(task_pid)) == pid {
            last.target
        } else if read_u32(current(), layout!(task_pid)) == pid {
            current()
        } else {
            lose(Ring::Ledger, LossReason::NoOwner);
            warn!(&ctx, "mark_victim({}): no such task on this CPU", pid);
            return 0;
        }
    };
    let tgid: u32 = read(victim, layout!(task_tgid)).unwrap_or(0);
    let since_kill = now.saturating_sub(last.boot_ns);
    let killed = last.tgid == tgid && since_kill < KILL_TO_MARK_NS;
    last.tgid = 0;
    last.target = 0;

    let trigger_memcg = kernel::memcg_of(current());
    let victim_memcg = kernel::memcg_of(victim);
    // A thread that has just reclaimed for a cgroup hit a cgroup's limit, whatever others have
    // given back meanwhile. When the machine itself runs short, reclaim takes another path.
    let at_limit = kernel::memcg_that_ran_out(trigger_memcg, reclaimed_lately(now));
    let mm = pointer(victim, layout!(task_mm));
    if mm == 0 {
        lose(Ring::Ledger, LossReason::Unreadable);
    }
    let mut flags = if killed { VICTIM_KILLED } else { 0 };
    if kernel::oom_group(victim_memcg, at_limit) {
        flags |= VICTIM_GROUP;
    }
    if !kernel::rss_is_exact() {
        flags |= VICTIM_RSS_APPROXIMATE;
    }
    emit::<OomVictim>(Ring::Ledger, now, |record| {
        kernel::read_task(current(), field!(record.trigger));
        kernel::read_task(victim, field!(record.victim));
        kernel::read_memcg(trigger_memcg, field!(record.trigger_memcg));
        kernel::read_memcg(victim_memcg, field!(record.victim_memcg));
        kernel::read_memcg(at_limit, field!(record.oom));
        set!(record => {
            rss.anon_bytes: victim_bytes(mm, layout!(mm_anonpages)),
            rss.file_bytes: victim_bytes(mm, layout!(mm_filepages)),
            rss.shmem_bytes: victim_bytes(mm, layout!(mm_shmempages)),
            rss.swap_bytes: victim_bytes(mm, layout!(mm_swapents)),
            pagetable_bytes: read(mm, layout!(mm_pgtables_bytes)).unwrap_or(UNKNOWN),
            oom_score_adj: kernel::oom_score_adj(victim),
            scope: if at_limit != 0 {
                SCOPE_MEMCG
            } else if trigger_memcg != 0 {
                SCOPE_GLOBAL
            } else {
                SCOPE_UNKNOWN
            },
            flags: flags,
            after_kill_ns: if killed { since_kill as u32 } else { 0 },
        });
    });
    let leader = pointer(victim, layout!(task_group_leader));
    let start = read(leader, layout!(task_start_boottime)).unwrap_or(UNKNOWN);
    emit_trigger_stack(&ctx, now, tgid, start);
    0
}

/// One RSS member of the victim in bytes.
#[inline(always)]
fn victim_bytes(mm: u64, member: u32) -> u64 {
    if mm == 0 { UNKNOWN } else { bytes(kernel::rss_pages(mm, member, kernel::NOT_REPORTED).max(0) as u64) }
}

/// `oom_kill_process(oc, message)` by fentry.
#[fentry(function = "oom_kill_process")]
fn oom_decision_fentry(ctx: FEntryContext) -> i32 {
    decision(ctx.arg(0));
    0
}

/// `oom_kill_process(oc, message)` by kprobe, where fentry cannot attach.
#[kprobe]
fn oom_decision_kprobe(ctx: ProbeContext) -> u32 {
    decision(ctx.arg(0).unwrap_or(0));
    0
}

/// Reports what the kernel decided, from its oom_control.
#[inline(always)]
fn decision(oom_control: u64) {
    let memcg = pointer(oom_control, layout!(oom_memcg));
    let chosen = pointer(oom_control, layout!(oom_chosen));
    emit::<OomDecision>(Ring::Ledger, boot_ns(), |record| {
        kernel::read_task(current(), field!(record.trigger));
        kernel::read_task(chosen, field!(record.chosen));
        kernel::read_memcg(memcg, field!(record.oom));
        set!(record => {
            constraint: read(oom_control, layout!(oom_constraint)).unwrap_or(u32::MAX),
            order: read(oom_control, layout!(oom_order)).unwrap_or(i32::MIN),
        });
    });
}
