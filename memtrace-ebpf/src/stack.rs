//! Stacks: of the thread whose charge failed, and of the code that grows memory.
//!
//! A growing process or cgroup is sampled by bytes: at every step of `sample_bytes`, with jitter so that a loop cannot
//! hide between two samples, one stack is taken, and it stands for what grew since the one before. So the weights add up
//! to what grew, however many stacks the budget leaves out.

use core::ptr::{read_volatile, write_volatile};

use aya_ebpf::EbpfContext;
use aya_ebpf::bindings::BPF_F_USER_STACK;
use aya_ebpf::helpers::generated::{
    bpf_get_current_task_btf, bpf_get_prandom_u32, bpf_get_smp_processor_id, bpf_get_stack, bpf_probe_read_user,
    bpf_ringbuf_output, bpf_ringbuf_query, bpf_task_pt_regs,
};
use aya_ebpf::maps::RingBuf;
use memtrace_common::control::{Loss, Ring, StackBudget};
use memtrace_common::event::{
    Header, KERNEL_FRAMES, KIND_STACK_SAMPLE, KernelStack, MAX_SLICE_BYTES, StackSample, USER_FRAMES,
};
use memtrace_common::layout::ABSENT;

use crate::emit::{BPF_RB_AVAIL_DATA, BPF_RB_FORCE_WAKEUP, BPF_RB_NO_WAKEUP, BPF_RB_RING_SIZE};
use crate::emit::{boot_ns, emit, lose, sent};
use crate::kernel::{self, current, pointer, read, read_task};
use crate::maps::{Pending, SCRATCH, SLICES, STACK_BUDGET, STACKS, STEPS, Scratch, USER_SPENT};
use crate::{control, layout};

/// Unused time is saved up for this long: a spike after a quiet while is sampled in full.
const BURST_S: u64 = 1;
/// An eighth of the budget is for who has grown by so many steps without a stack: many small processes, a build, must not
/// use up what a leak or a spike beside them needs to be told of.
const LARGE_STEPS: u64 = 16;
/// Pages a slice is copied in at most: with a stack pointer in mid-page one more than it has.
const SLICE_PAGES: usize = MAX_SLICE_BYTES / 4096 + 1;
/// The two privilege bits of a code segment: 3 in user mode.
const USER_MODE: u64 = 3;

/// What grew, for a sample of it.
pub struct Growth {
    /// `event::CAUSE_*`.
    pub cause: u32,
    /// As `StackSample::mm_id`.
    pub mm_id: u64,
    /// kernfs id of the cgroup.
    pub cgroup_id: u64,
    /// The cgroup, where its id is not known yet.
    pub memcg: u64,
    /// As `StackSample::grown_bytes`.
    pub grown_bytes: u64,
    /// As `StackSample::address`.
    pub address: u64,
    /// As `StackSample::size_bytes`.
    pub size_bytes: u64,
    /// log2 of the unit of the pending growth, bytes.
    pub shift: u32,
}

/// Whether enough has grown for a stack.
#[inline(always)]
pub fn due(pending: *mut Pending) -> bool {
    control!(sample_bytes) != 0 && Pending::grown(pending) >= Pending::next(pending)
}

/// Address of the running thread's user registers, 0 when they are not found: at the end of its kernel stack.
#[inline(always)]
pub fn user_registers() -> u64 {
    if control!(task_pt_regs) == 1 {
        return unsafe { bpf_task_pt_regs(bpf_get_current_task_btf()) } as u64;
    }
    let stack = pointer(current(), layout!(task_stack));
    if stack == 0 || control!(thread_bytes) == 0 || layout!(regs_size) == ABSENT {
        return 0;
    }
    let regs = stack + control!(thread_bytes) as u64 - layout!(regs_size) as u64;
    // Kernel stacks of another size have something else there.
    let plausible = read::<u64>(regs, layout!(regs_cs)).is_some_and(|cs| cs & USER_MODE == USER_MODE);
    if layout!(regs_cs) != ABSENT && !plausible { 0 } else { regs }
}

/// Whether the running thread is in a system call, by its user registers: else it is in an exception, where there is no
/// system call number (arch/x86/entry: orig_ax is -1).
#[inline(always)]
pub fn in_system_call(regs: u64) -> bool {
    if layout!(regs_orig_ax) != ABSENT {
        return read::<i64>(regs, layout!(regs_orig_ax)).unwrap_or(-1) >= 0;
    }
    read::<i32>(regs, layout!(regs_syscallno)).unwrap_or(-1) >= 0
}

/// Takes a stack for `pending`, when it is due and there is budget for it; its weight is what is pending.
#[inline(always)]
pub fn sample(ctx: &impl EbpfContext, regs: u64, pending: *mut Pending, growth: &Growth) {
    if !due(pending) {
        return;
    }
    let cgroup_id = if growth.memcg != 0 { kernel::memcg_id(growth.memcg) } else { growth.cgroup_id };
    let step = (unsafe { STEPS.get(cgroup_id) }.copied().unwrap_or(control!(sample_bytes)) >> growth.shift).max(2);
    // Half a step to one and a half: one on average.
    let jittered = (step >> 1) + unsafe { bpf_get_prandom_u32() } as u64 % step;
    let jittered = jittered as i64;
    if Pending::next(pending) == 0 && Pending::grown(pending) < jittered {
        // Where the first sample falls is left to chance too.
        Pending::set_next(pending, jittered);
        return;
    }
    let now = boot_ns();
    let Some(budget) = STACK_BUDGET.get_ptr_mut(0) else { return };
    let large = Pending::grown(pending) as u64 >= step * LARGE_STEPS;
    let account = afford(unsafe { &mut *budget }, now, large);
    if account == Account::None {
        // What is pending stays pending: the next sample has its weight.
        Pending::set_next(pending, Pending::grown(pending) + jittered);
        return;
    }
    let Some(scratch) = SCRATCH.get_ptr_mut(unsafe { bpf_get_smp_processor_id() } as u32) else { return };
    let owner = unsafe { &raw mut (*scratch).owner };
    // Somebody was interrupted in the middle of a sample, on this CPU, by us.
    if unsafe { read_volatile(owner) } != 0 {
        lose(Ring::Stacks, Loss::RateLimited);
        return;
    }
    let token = now | 1;
    unsafe { write_volatile(owner, token) };
    // Claimed first: what other threads add meanwhile is for the next one.
    let weight = Pending::grown(pending);
    if weight <= 0 {
        unsafe { write_volatile(owner, 0) };
        return;
    }
    Pending::add(pending, -weight);
    Pending::set_next(pending, jittered);
    unsafe {
        let sample = &raw mut (*scratch).sample;
        (*sample).weight_bytes = (weight as u64) << growth.shift;
        (*sample).cause = growth.cause;
        (*sample).mm_id = growth.mm_id;
        (*sample).cgroup_id = cgroup_id;
        (*sample).grown_bytes = growth.grown_bytes;
        (*sample).address = growth.address;
        (*sample).size_bytes = growth.size_bytes;
        (*sample).reserved = 0;
    }
    read_user(regs, scratch);
    let record = unsafe { &raw mut (*scratch).sample };
    unsafe {
        read_task(current(), &raw mut (*record).task);
        let got = bpf_get_stack(ctx.as_ptr(), (&raw mut (*record).kernel).cast(), (KERNEL_FRAMES * 8) as u32, 0);
        (*record).kernel_frames = if got > 0 { got as u32 / 8 } else { 0 };
        let size = (USER_FRAMES * 8) as u32;
        let got = bpf_get_stack(ctx.as_ptr(), (&raw mut (*record).user).cast(), size, BPF_F_USER_STACK as u64);
        (*record).user_frames = if got > 0 { got as u32 / 8 } else { 0 };
    }
    // Not when written over by whoever had it between our look and our mark.
    let ours = unsafe { read_volatile(owner) } == token;
    if !ours {
        lose(Ring::Stacks, Loss::RateLimited);
    }
    let sent = ours && send(scratch, now, unsafe { (*pending).taken } == 0);
    if ours {
        unsafe { write_volatile(owner, 0) };
    }
    if sent {
        unsafe { (*pending).taken += 1 };
    } else {
        // Its weight goes to the next one.
        Pending::add(pending, weight);
        Pending::set_next(pending, Pending::grown(pending) + jittered);
    }
    let budget = unsafe { &mut *budget };
    let spent = boot_ns() - now;
    budget.spent_ns += spent;
    budget.taken += 1;
    if account == Account::Large {
        budget.large_tokens_ns -= spent as i64;
    } else {
        budget.tokens_ns -= spent as i64;
    }
}

/// What a stack is paid from.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Account {
    None,
    All,
    Large,
}

/// Fills up the budget; what there is of it. CPUs may do so at once: what one overwrites of another's is little.
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
    // What userspace spends is known a little later: a spike is not cut short by it, what follows pays.
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

/// User registers and the stack they point to, as far as it can be read.
#[inline(always)]
fn read_user(regs: u64, scratch: *mut Scratch) {
    let sample = unsafe { &raw mut (*scratch).sample };
    let x86 = layout!(regs_ip) != ABSENT;
    let ip = read(regs, if x86 { layout!(regs_ip) } else { layout!(regs_pc) }).unwrap_or(0u64);
    let sp = read(regs, layout!(regs_sp)).unwrap_or(0u64);
    let (bp, lr) = if x86 {
        (read(regs, layout!(regs_bp)).unwrap_or(0u64), 0)
    } else {
        (arm64_register(regs, 29), arm64_register(regs, 30))
    };
    let own = unsafe { SLICES.get(read::<u32>(current(), layout!(task_tgid)).unwrap_or(0)) };
    let cap = own.copied().unwrap_or(control!(slice_bytes)).min(MAX_SLICE_BYTES as u32);
    unsafe {
        (*sample).ip = ip;
        (*sample).sp = sp;
        (*sample).bp = bp;
        (*sample).lr = lr;
        (*sample).slice_cap_bytes = cap;
        // In memory that the compiler and the verifier know nothing of, as the length below: masks stay, bounds are found
        // anew for every page.
        write_volatile(&raw mut (*sample).slice_bytes, 0);
    }
    if ip == 0 || sp == 0 {
        return;
    }
    for _ in 0..SLICE_PAGES {
        let copied = unsafe { read_volatile(&raw const (*sample).slice_bytes) } & 0xffff;
        let from = sp + copied as u64;
        // Page by page: a read that meets a hole copies nothing.
        let page = 4096 - (from & 4095) as u32;
        if copied >= cap {
            break;
        }
        unsafe {
            write_volatile(&raw mut (*scratch).length, if page > cap - copied { cap - copied } else { page } as u64);
            let length = read_volatile(&raw const (*scratch).length) as u32 & 0x1fff;
            let into = (&raw mut (*scratch).slice).cast::<u8>().add(copied as usize);
            if bpf_probe_read_user(into.cast(), length, from as *const _) != 0 {
                break;
            }
            write_volatile(&raw mut (*sample).slice_bytes, copied + length);
        }
    }
}

#[inline(always)]
fn arm64_register(regs: u64, number: u32) -> u64 {
    if layout!(regs_regs) == ABSENT { 0 } else { read(regs, layout!(regs_regs) + 8 * number).unwrap_or(0) }
}

/// Puts the sample into its ring; whether there was room.
#[inline(always)]
fn send(scratch: *mut Scratch, at_ns: u64, first: bool) -> bool {
    let sample = unsafe { &raw mut (*scratch).sample };
    let slice = unsafe { read_volatile(&raw const (*sample).slice_bytes) } & 0xffff;
    let size = size_of::<StackSample>() as u32 + slice;
    let ring = (&raw const STACKS).cast_mut();
    unsafe {
        (*sample).header = Header {
            kind: KIND_STACK_SAMPLE,
            size: size as u16,
            cpu: bpf_get_smp_processor_id() as u32,
            boot_ns: at_ns,
        };
        let waiting = bpf_ringbuf_query(ring.cast(), BPF_RB_AVAIL_DATA);
        let full = bpf_ringbuf_query(ring.cast(), BPF_RB_RING_SIZE);
        // The first of a process at once: its mappings have to be read before it is gone.
        let flags = if first || waiting > full / 4 { BPF_RB_FORCE_WAKEUP } else { BPF_RB_NO_WAKEUP };
        if bpf_ringbuf_output(ring.cast::<RingBuf>().cast(), sample.cast(), size as u64, flags) != 0 {
            lose(Ring::Stacks, Loss::RingFull);
            return false;
        }
    }
    sent(Ring::Stacks);
    true
}

/// Sends the running thread's kernel stack as that of the trigger of a kill.
#[inline(always)]
pub fn emit_trigger_stack(ctx: &impl EbpfContext, at_ns: u64, victim_tgid: u32, victim_start_boot_ns: u64) {
    emit::<KernelStack>(Ring::Stacks, at_ns, |record| unsafe {
        read_task(current(), &raw mut (*record).task);
        (*record).victim_tgid = victim_tgid;
        (*record).victim_start_boot_ns = victim_start_boot_ns;
        (*record).reserved = 0;
        let size = (KERNEL_FRAMES * 8) as u32;
        let got = bpf_get_stack(ctx.as_ptr(), (&raw mut (*record).addresses).cast(), size, 0);
        (*record).frames = if got > 0 { got as u32 / 8 } else { 0 };
    });
}
