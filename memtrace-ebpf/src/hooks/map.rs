//! Mapping calls (mmap, munmap, mremap, brk, madvise), decided at successful exit.
//!
//! Where functions can be hooked, at the exit of each of the five: other system calls pay nothing. Else one program on
//! sys_exit, where the registers still hold the call's arguments: it runs for every system call, so its guard is one read
//! and one compare.

use aya_ebpf::EbpfContext;
use aya_ebpf::macros::{fexit, raw_tracepoint};
use aya_ebpf::programs::{FExitContext, RawTracePointContext};
use memtrace_common::control::{Loss, Ring};
use memtrace_common::event::{
    CALL_BRK, CALL_MADVISE, CALL_MMAP, CALL_MREMAP, CALL_MUNMAP, CAUSE_BRK, CAUSE_MAP, Mapping,
};
use memtrace_common::layout::ABSENT;

use super::charge::given_back;
use crate::emit::{boot_ns, emit, lose};
use crate::kernel::{self, current, pointer, read};
use crate::maps::{MMS, MmState, Pending};
use crate::stack::{self, Growth};
use crate::{control, layout};

/// Least time between two records of one address space.
const MAPPING_INTERVAL_NS: u64 = 1_000_000;
/// Madvise advices that give memory back (include/uapi/asm-generic/mman-common.h).
const MADV_DONTNEED: u64 = 4;
const MADV_FREE: u64 = 8;
const MADV_REMOVE: u64 = 9;
/// `__USER32_CS` on x86.
const USER32_CS: u64 = 0x23;
/// `PSR_MODE32_BIT` on arm64.
const PSR_MODE32_BIT: u64 = 0x10;

/// Which of our calls a system call number is on x86_64.
#[inline(always)]
fn call_x86(number: i64) -> u32 {
    match number {
        9 => CALL_MMAP,
        11 => CALL_MUNMAP,
        12 => CALL_BRK,
        25 => CALL_MREMAP,
        28 => CALL_MADVISE,
        _ => 0,
    }
}

/// Which of our calls a system call number is on arm64.
#[inline(always)]
fn call_arm64(number: i64) -> u32 {
    match number {
        222 => CALL_MMAP,
        215 => CALL_MUNMAP,
        214 => CALL_BRK,
        216 => CALL_MREMAP,
        233 => CALL_MADVISE,
        _ => 0,
    }
}

/// `sys_exit(regs, ret)`.
#[raw_tracepoint(tracepoint = "sys_exit")]
fn sys_exit(ctx: RawTracePointContext) -> i32 {
    let regs: u64 = ctx.arg(0);
    let x86 = layout!(regs_orig_ax) != ABSENT;
    let call = if x86 {
        call_x86(read(regs, layout!(regs_orig_ax)).unwrap_or(-1))
    } else {
        call_arm64(read::<i32>(regs, layout!(regs_syscallno)).unwrap_or(-1) as i64)
    };
    if call == 0 {
        return 0;
    }
    // A 32-bit caller has other numbers for these calls.
    let compat = if x86 {
        read::<u64>(regs, layout!(regs_cs)).unwrap_or(0) & 0xffff == USER32_CS
    } else {
        read::<u64>(regs, layout!(regs_pstate)).unwrap_or(0) & PSR_MODE32_BIT != 0
    };
    if compat {
        lose(Ring::Samples, Loss::Compat);
        return 0;
    }
    returned(&ctx, regs, call, ctx.arg(1));
    0
}

/// `__x64_sys_mmap(regs)`, or as it is called on this machine, has returned; below likewise.
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

/// One of our calls returned.
#[inline(always)]
fn returned(ctx: &impl EbpfContext, regs: u64, call: u32, ret: i64) {
    if (-4095..0).contains(&ret) {
        return;
    }
    let mm = pointer(current(), layout!(task_mm));
    let Some(state) = MMS.get_ptr_mut(mm) else { return };
    let state = unsafe { &mut *state };
    note(ctx, regs, layout!(regs_orig_ax) != ABSENT, call, ret as u64, mm, state);
}

/// One argument of the call, 0-based.
#[inline(always)]
fn argument(regs: u64, x86: bool, index: u32) -> u64 {
    if x86 {
        let offset = match index {
            0 => layout!(regs_di),
            1 => layout!(regs_si),
            2 => layout!(regs_dx),
            _ => layout!(regs_r10),
        };
        read(regs, offset).unwrap_or(0)
    } else if index == 0 {
        read(regs, layout!(regs_orig_x0)).unwrap_or(0)
    } else {
        read(regs, layout!(regs_regs) + 8 * index).unwrap_or(0)
    }
}

/// Takes a stack when enough address space was asked for since the last one of its kind.
#[inline(always)]
fn grown(ctx: &impl EbpfContext, regs: u64, call: u32, address: u64, size: u64, mm: u64, state: &mut MmState) {
    let (cause, pending, size_bytes) = if call == CALL_BRK {
        let pending = &raw mut state.broken;
        Pending::add(pending, size as i64);
        (CAUSE_BRK, pending, Pending::grown(pending) as u64)
    } else {
        let pending = &raw mut state.mapped;
        // A reservation of the whole address space must not overflow it.
        Pending::add(pending, size.min(1 << 48) as i64);
        (CAUSE_MAP, pending, size)
    };
    if !stack::due(pending) {
        return;
    }
    let growth = Growth {
        cause,
        mm_id: mm ^ control!(mm_salt),
        cgroup_id: state.cgroup_id,
        memcg: 0,
        grown_bytes: 0,
        // The heap grows at its end: small steps that were not sampled are below.
        address: if call == CALL_BRK { address.wrapping_sub(size_bytes) } else { address },
        size_bytes,
        shift: 0,
    };
    stack::sample(ctx, regs, pending, &growth);
}

/// Adds a successful call to the state and sends a record when it is large or many small ones add up.
#[inline(always)]
fn note(ctx: &impl EbpfContext, regs: u64, x86: bool, call: u32, ret: u64, mm: u64, state: &mut MmState) {
    let first = argument(regs, x86, 0);
    let length = argument(regs, x86, 1);
    let mut extra = 0;
    let (address, size, grew) = match call {
        CALL_MMAP => {
            extra = argument(regs, x86, 3);
            (ret, length, true)
        }
        CALL_MUNMAP => (first, length, false),
        CALL_MREMAP => {
            let new_length = argument(regs, x86, 2);
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
            extra = argument(regs, x86, 2);
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
        // Only after a fall that was told: address space that was never touched gives nothing back.
        if state.fell != 0 {
            state.fell = 0;
            given_back();
        }
    }
    if size < control!(mapping_bytes)
        && state.mapped_bytes < control!(mapping_bytes) << 2
        && state.unmapped_bytes < control!(mapping_bytes) << 2
    {
        return;
    }
    // A loop of large mappings adds up instead of flooding the ring; a huge one is told at once.
    let now = boot_ns();
    if now.saturating_sub(state.mapping_ns) < MAPPING_INTERVAL_NS && size < control!(mapping_bytes) << 6 {
        return;
    }
    state.mapping_ns = now;
    emit::<Mapping>(Ring::Samples, now, |record| unsafe {
        kernel::read_task(current(), &raw mut (*record).task);
        (*record).cgroup_id = state.cgroup_id;
        (*record).address = address;
        (*record).size_bytes = size;
        (*record).mapped_bytes = state.mapped_bytes;
        (*record).unmapped_bytes = state.unmapped_bytes;
        (*record).call = call;
        (*record).grew = grew as u32;
        (*record).argument = extra;
    });
    state.mapped_bytes = 0;
    state.unmapped_bytes = 0;
}
