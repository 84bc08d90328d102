//! Mapping calls that succeeded: mmap, munmap, mremap, brk, madvise.
//!
//! Where functions can be hooked, there is a program at the exit of each of the five, and other
//! system calls pay nothing. Else one program is on sys_exit, where the registers still hold the
//! arguments. It runs for every system call, so its guard is one read and one compare.

use aya_ebpf::EbpfContext;
use aya_ebpf::macros::{fexit, raw_tracepoint};
use aya_ebpf::programs::{FExitContext, RawTracePointContext};
use memtrace_common::control::{LossReason, Ring};
use memtrace_common::event::{
    CALL_BRK, CALL_MADVISE, CALL_MMAP, CALL_MREMAP, CALL_MUNMAP, CAUSE_BRK, CAUSE_MAP, Mapping,
};

use super::charge::given_back;
use crate::arch::Arch;
use crate::emit::{boot_ns, emit, lose};
use crate::kernel::{self, current, pointer};
use crate::maps::{MMS, MmState, PendingGrowth};
use crate::memory::value;
use crate::stack::{self, SampleSubject};
use crate::{control, field, layout, set};

/// Least time between two records of one address space.
const MAPPING_INTERVAL_NS: u64 = 1_000_000;
/// Madvise advices that give memory back (include/uapi/asm-generic/mman-common.h).
const MADV_DONTNEED: u64 = 4;
const MADV_FREE: u64 = 8;
const MADV_REMOVE: u64 = 9;
/// `sys_exit(regs, ret)`.
#[raw_tracepoint(tracepoint = "sys_exit")]
fn sys_exit(ctx: RawTracePointContext) -> i32 {
    let regs: u64 = ctx.arg(0);
    let arch = Arch::running();
    let call = arch.mapping_call(regs);
    if call == 0 {
        return 0;
    }
    if arch.is_compat(regs) {
        lose(Ring::Samples, LossReason::Compat);
        return 0;
    }
    returned(&ctx, regs, call, ctx.arg(1));
    0
}

/// `__x64_sys_mmap(regs)` has returned. Userspace attaches it to the function's name on this
/// machine (`__arm64_sys_mmap`), and so the four below.
#[fexit(function = "__x64_sys_mmap")]
fn mmap_exit(ctx: FExitContext) -> i32 {
    returned(&ctx, ctx.arg(0), CALL_MMAP, ctx.arg(1));
    0
}

#[fexit(function = "__x64_sys_munmap")]
fn munmap_exit(ctx: FExitContext) -> i32 {
    returned(&ctx, ctx.arg(0), CALL_MUNMAP, ctx.arg(1));
    0
}

#[fexit(function = "__x64_sys_mremap")]
fn mremap_exit(ctx: FExitContext) -> i32 {
    returned(&ctx, ctx.arg(0), CALL_MREMAP, ctx.arg(1));
    0
}

#[fexit(function = "__x64_sys_brk")]
fn brk_exit(ctx: FExitContext) -> i32 {
    returned(&ctx, ctx.arg(0), CALL_BRK, ctx.arg(1));
    0
}

#[fexit(function = "__x64_sys_madvise")]
fn madvise_exit(ctx: FExitContext) -> i32 {
    returned(&ctx, ctx.arg(0), CALL_MADVISE, ctx.arg(1));
    0
}

/// One of the five calls returned `ret`; a failed one changed nothing.
#[inline(always)]
fn returned(ctx: &impl EbpfContext, regs: u64, call: u32, ret: i64) {
    if (-4095..0).contains(&ret) {
        return;
    }
    let mm = pointer(current(), layout!(task_mm));
    let Some(state) = value(MMS.get_ptr_mut(mm)) else { return };
    note(ctx, regs, Arch::running(), call, ret as u64, mm, state);
}

/// Takes a stack when enough address space was asked for since the last one for the same cause.
#[inline(always)]
fn grown(ctx: &impl EbpfContext, regs: u64, call: u32, address: u64, size: u64, mm: u64, state: &mut MmState) {
    let (cause, pending, size_bytes) = if call == CALL_BRK {
        let pending = &raw mut state.broken;
        PendingGrowth::add(pending, size as i64);
        (CAUSE_BRK, pending, PendingGrowth::grown(pending) as u64)
    } else {
        let pending = &raw mut state.mapped;
        // A reservation of the whole address space must not overflow it.
        PendingGrowth::add(pending, size.min(1 << 48) as i64);
        (CAUSE_MAP, pending, size)
    };
    if !stack::due(pending) {
        if stack::taken_by_another(pending, size_bytes) {
            lose(Ring::Stacks, LossReason::Merged);
        }
        return;
    }
    let subject = SampleSubject {
        cause,
        mm_id: mm ^ control!(mm_salt),
        cgroup_id: state.cgroup_id,
        memcg: 0,
        grown_bytes: 0,
        // The heap grows at its end: growth that was not sampled lies below.
        address: if call == CALL_BRK { address.wrapping_sub(size_bytes) } else { address },
        size_bytes,
        shift: 0,
    };
    stack::sample(ctx, regs, pending, &subject);
}

/// Adds a successful call to the record of its address space. Sends one when it is large, or when
/// many small ones add up.
#[inline(always)]
fn note(ctx: &impl EbpfContext, regs: u64, arch: Arch, call: u32, ret: u64, mm: u64, state: &mut MmState) {
    let first = arch.argument(regs, 0);
    let length = arch.argument(regs, 1);
    let mut extra = 0;
    let (address, size, grew) = match call {
        CALL_MMAP => {
            extra = arch.argument(regs, 3);
            (ret, length, true)
        }
        CALL_MUNMAP => (first, length, false),
        CALL_MREMAP => {
            let new_length = arch.argument(regs, 2);
            (ret, new_length.abs_diff(length), new_length >= length)
        }
        CALL_BRK => {
            let old = state.brk;
            state.brk = ret;
            // A failed brk returns the old break; the first one seen has nothing to compare with.
            if old == 0 || old == ret {
                return;
            }
            (ret, ret.abs_diff(old), ret > old)
        }
        _ => {
            extra = arch.argument(regs, 2);
            if extra != MADV_DONTNEED && extra != MADV_FREE && extra != MADV_REMOVE {
                return;
            }
            (first, length, false)
        }
    };
    if grew {
        state.mapped_bytes = state.mapped_bytes.wrapping_add(size);
        grown(ctx, regs, call, address, size, mm, state);
    } else {
        state.unmapped_bytes = state.unmapped_bytes.wrapping_add(size);
        // Only after a fall that was reported: what was never touched gives nothing back.
        if state.fall_reported != 0 {
            state.fall_reported = 0;
            given_back();
        }
    }
    if size < control!(mapping_bytes)
        && state.mapped_bytes < control!(mapping_bytes) << 2
        && state.unmapped_bytes < control!(mapping_bytes) << 2
    {
        return;
    }
    // A loop of large mappings adds up and does not flood the ring; a huge one is sent at once.
    let now = boot_ns();
    if now.saturating_sub(state.mapping_ns) < MAPPING_INTERVAL_NS && size < control!(mapping_bytes) << 6 {
        return;
    }
    state.mapping_ns = now;
    emit::<Mapping>(Ring::Samples, now, |record| {
        kernel::read_task(current(), field!(record.task));
        set!(record => {
            cgroup_id: state.cgroup_id,
            address: address,
            size_bytes: size,
            mapped_bytes: state.mapped_bytes,
            unmapped_bytes: state.unmapped_bytes,
            call: call,
            grew: grew as u32,
            argument: extra,
        });
    });
    state.mapped_bytes = 0;
    state.unmapped_bytes = 0;
}
