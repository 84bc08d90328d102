//! Stacks: of the thread whose charge failed, and of the code that grows memory.
//!
//! A growing process or cgroup is sampled by bytes. Each time another `sample_interval_bytes` have
//! grown, with jitter so that a loop cannot hide between two samples, one stack is taken, and its
//! weight is what has grown since the one before. So the weights add up to what grew, however many
//! stacks the budget leaves out: with an interval of 1 MiB, a process that grew by 3.2 MiB since
//! its last stack gives one sample of 3.2 MiB.

use aya_ebpf::EbpfContext;
use aya_ebpf::helpers::generated::bpf_probe_read_user;
use memtrace_common::control::{LossReason, Ring, StackBudget};
use memtrace_common::event::{KernelStack, MAX_STACK_COPY_BYTES};

use crate::arch::code_registers;
use crate::emit::{boot_ns, emit, emit_sample, lose};
use crate::kernel::{self, current, read, read_task};
use crate::maps::{PendingGrowth, SAMPLE_INTERVALS, SCRATCH, STACK_BUDGET, STACK_COPIES, SampleScratch, USER_SPENT};
use crate::memory::{load, lookup, store};
use crate::{bpf_calls, control, field, layout, set};

/// Seconds that unused budget is saved up for: a spike after a quiet time is sampled in full.
const BURST_S: u64 = 1;
/// An eighth of the budget is kept for growth of this many intervals without a stack: many small
/// processes, such as a build, must not use up what a leak or a spike beside them needs.
const LARGE_INTERVALS: u64 = 16;
/// Reads that a stack copy takes at most: one a page, and one more for a stack pointer in mid-page.
const COPY_PAGES: usize = MAX_STACK_COPY_BYTES / 4096 + 1;

/// What a sample says about the growth it stands for, beside its weight.
pub struct SampleSubject {
    /// `event::CAUSE_*`.
    pub cause: u32,
    /// As `StackSample::mm_id`.
    pub mm_id: u64,
    /// kernfs id of the cgroup.
    pub cgroup_id: u64,
    /// Address of the mem_cgroup, where its id is not known yet; else 0.
    pub memcg: u64,
    /// As `StackSample::grown_bytes`.
    pub grown_bytes: u64,
    /// As `StackSample::address`.
    pub address: u64,
    /// As `StackSample::size_bytes`.
    pub size_bytes: u64,
    /// log2 of the unit of the pending growth in bytes: 0 for bytes, `page_shift` for pages.
    pub shift: u32,
}

/// Whether enough has grown for a stack.
#[inline(always)]
pub fn due(pending: *mut PendingGrowth) -> bool {
    control!(sample_interval_bytes) != 0 && PendingGrowth::grown(pending) >= PendingGrowth::next(pending)
}

/// Whether this much alone would have been enough: another CPU's stack stands for it too.
#[inline(always)]
pub fn taken_by_another(pending: *mut PendingGrowth, bytes: u64) -> bool {
    let next = PendingGrowth::next(pending);
    next > 0 && bytes >= next as u64
}

/// Takes a stack for `pending` when it is due and the budget allows it.
#[inline(always)]
pub fn sample(ctx: &impl EbpfContext, regs: u64, pending: *mut PendingGrowth, subject: &SampleSubject) {
    if !due(pending) {
        return;
    }
    let cgroup_id = if subject.memcg != 0 { kernel::memcg_id(subject.memcg) } else { subject.cgroup_id };
    let interval_bytes = lookup(&SAMPLE_INTERVALS, cgroup_id).unwrap_or(control!(sample_interval_bytes));
    let interval = (interval_bytes >> subject.shift).max(2);
    // Half an interval to one and a half: one on average.
    let jittered = (interval >> 1) + bpf_calls::random() as u64 % interval;
    let jittered = jittered as i64;
    if PendingGrowth::next(pending) == 0 && PendingGrowth::grown(pending) < jittered {
        // Where the first sample falls is left to chance too.
        PendingGrowth::set_next(pending, jittered);
        return;
    }
    let now = boot_ns();
    let Some(budget) = STACK_BUDGET.get_ptr_mut(0) else { return };
    let large = PendingGrowth::grown(pending) as u64 >= interval * LARGE_INTERVALS;
    let account = afford(unsafe { &mut *budget }, now, large);
    if account == Account::None {
        // What is pending stays pending: the next sample has its weight.
        PendingGrowth::set_next(pending, PendingGrowth::grown(pending) + jittered);
        return;
    }
    let Some(scratch) = SCRATCH.get_ptr_mut(bpf_calls::cpu()) else { return };
    let owner = field!(scratch.owner);
    // Another program was interrupted on this CPU in the middle of a sample, by this one.
    if load(owner) != 0 {
        lose(Ring::Stacks, LossReason::RateLimited);
        return;
    }
    let token = now | 1;
    store(owner, token);
    // Taken off first: what other threads add meanwhile is for the next sample.
    let weight = PendingGrowth::grown(pending);
    if weight <= 0 {
        if subject.size_bytes != 0 {
            lose(Ring::Stacks, LossReason::Merged);
        }
        store(owner, 0);
        return;
    }
    PendingGrowth::add(pending, -weight);
    PendingGrowth::set_next(pending, jittered);
    fill(ctx, regs, scratch, subject, cgroup_id, (weight as u64) << subject.shift);
    // Not ours when a program that interrupted this one overwrote it between our look and our mark.
    let ours = load(owner) == token;
    if !ours {
        lose(Ring::Stacks, LossReason::RateLimited);
    }
    let sent = ours && emit_sample(scratch, now, PendingGrowth::taken(pending) == 0);
    if ours {
        store(owner, 0);
    }
    if sent {
        PendingGrowth::count_taken(pending);
    } else {
        // Its weight goes to the next one.
        PendingGrowth::add(pending, weight);
        PendingGrowth::set_next(pending, PendingGrowth::grown(pending) + jittered);
    }
    pay(unsafe { &mut *budget }, account, boot_ns() - now);
}

/// Puts a sample together in `scratch`: what it stands for, the user stack, the task and the frames.
#[inline(always)]
fn fill(
    ctx: &impl EbpfContext,
    regs: u64,
    scratch: *mut SampleScratch,
    subject: &SampleSubject,
    cgroup_id: u64,
    weight_bytes: u64,
) {
    let sample = field!(scratch.sample);
    set!(sample => {
        weight_bytes: weight_bytes,
        cause: subject.cause,
        mm_id: subject.mm_id,
        cgroup_id: cgroup_id,
        grown_bytes: subject.grown_bytes,
        address: subject.address,
        size_bytes: subject.size_bytes,
        reserved: 0,
    });
    read_user(regs, scratch);
    let sample = field!(scratch.sample);
    read_task(current(), field!(sample.task));
    set!(sample => {
        kernel_frames: bpf_calls::kernel_stack(ctx, field!(sample.kernel)),
        user_frames: bpf_calls::user_stack(ctx, field!(sample.user)),
    });
}

/// Takes what a stack has cost off the part of the budget that it is paid from.
#[inline(always)]
fn pay(budget: &mut StackBudget, account: Account, spent_ns: u64) {
    budget.spent_ns += spent_ns;
    budget.taken += 1;
    if account == Account::Large {
        budget.large_tokens_ns -= spent_ns as i64;
    } else {
        budget.tokens_ns -= spent_ns as i64;
    }
}

/// What a stack is paid from.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Account {
    /// Nothing is left.
    None,
    /// The budget for everything.
    All,
    /// The part that is kept for large growth.
    Large,
}

/// Adds to the budget what time has passed for, and says what a stack is paid from. CPUs may do so
/// at once: what one overwrites of another's is little.
#[inline(always)]
fn afford(budget: &mut StackBudget, now: u64, large: bool) -> Account {
    let elapsed_us = now.saturating_sub(budget.filled_ns).min(BURST_S * 1_000_000_000) / 1000;
    if elapsed_us != 0 {
        budget.filled_ns = now;
        let full = (BURST_S * 1000 * control!(stack_budget_ppm)) as i64;
        let more = (elapsed_us * control!(stack_budget_ppm) / 1000) as i64;
        let tokens = budget.tokens_ns + more - (more >> 3);
        budget.tokens_ns = if tokens > full { full } else { tokens };
        let tokens = budget.large_tokens_ns + (more >> 3);
        budget.large_tokens_ns = if tokens > full >> 3 { full >> 3 } else { tokens };
    }
    // What userspace spends is known a little later: a spike is not cut short by it, what follows
    // pays.
    let user_spent_ns = USER_SPENT.get(0).copied().unwrap_or(0);
    if user_spent_ns > budget.user_spent_ns {
        budget.tokens_ns -= (user_spent_ns - budget.user_spent_ns) as i64;
        budget.user_spent_ns = user_spent_ns;
    }
    if budget.tokens_ns > 0 {
        return Account::All;
    }
    if large && budget.large_tokens_ns > 0 {
        return Account::Large;
    }
    budget.thinned += 1;
    Account::None
}

/// Reads the user registers and copies the stack they point to, as far as it can be read.
#[inline(always)]
fn read_user(regs: u64, scratch: *mut SampleScratch) {
    let sample = field!(scratch.sample);
    let code = code_registers(regs);
    let own = lookup(&STACK_COPIES, read::<u32>(current(), layout!(task_tgid)).unwrap_or(0));
    let cap = own.unwrap_or(control!(stack_copy_bytes)).min(MAX_STACK_COPY_BYTES as u32);
    set!(sample => {
        ip: code.ip,
        sp: code.sp,
        bp: code.bp,
        lr: code.lr,
        stack_copy_cap_bytes: cap,
    });
    // Lengths pass through memory that the compiler and the verifier know nothing of: masks stay in
    // the code, and bounds are found anew for every page.
    store(field!(sample.stack_copy_bytes), 0);
    if code.ip == 0 || code.sp == 0 {
        return;
    }
    for _ in 0..COPY_PAGES {
        let copied = load(field!(sample.stack_copy_bytes)) & 0xffff;
        let from = code.sp + copied as u64;
        // Page by page: a read that meets a hole copies nothing.
        let page = 4096 - (from & 4095) as u32;
        if copied >= cap {
            break;
        }
        store(field!(scratch.length), if page > cap - copied { cap - copied } else { page } as u64);
        let length = load(field!(scratch.length)) as u32 & 0x1fff;
        let into = field!(scratch.stack_copy).cast::<u8>().wrapping_add(copied as usize);
        if unsafe { bpf_probe_read_user(into.cast(), length, from as *const _) } != 0 {
            break;
        }
        store(field!(sample.stack_copy_bytes), copied + length);
    }
}

/// Sends the running thread's kernel stack as that of the trigger of a kill.
#[inline(always)]
pub fn emit_trigger_stack(ctx: &impl EbpfContext, at_ns: u64, victim_tgid: u32, victim_start_boot_ns: u64) {
    emit::<KernelStack>(Ring::Stacks, at_ns, |record| {
        read_task(current(), field!(record.task));
        set!(record => {
            victim_tgid: victim_tgid,
            victim_start_boot_ns: victim_start_boot_ns,
            reserved: 0,
            frames: bpf_calls::kernel_stack(ctx, field!(record.addresses)),
        });
    });
}
