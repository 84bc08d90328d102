//! Runs once: learns where each CPU keeps its per-CPU memory, so that RSS counters can be summed.
//!
//! From 6.2 on resident memory is counted in `struct percpu_counter`s, whose slots programs cannot
//! reach: a `__percpu` pointer must be moved by `__per_cpu_offset[cpu]`, which is no symbol of BTF.

use aya_ebpf::helpers::bpf_probe_read_kernel;
use aya_ebpf::helpers::generated::bpf_map_lookup_percpu_elem;
use aya_ebpf::macros::raw_tracepoint;
use aya_ebpf::programs::RawTracePointContext;
use aya_log_ebpf::warn;
use memtrace_common::control::MAX_CPUS;
use memtrace_common::layout::ABSENT;

use crate::maps::{PERCPU_OFFSETS, PERCPU_PROBE};
use crate::memory::{load, store};
use crate::{control, layout};

/// Attached to any busy tracepoint until PERCPU_OFFSETS is filled, then detached.
///
/// A per-CPU array holds the allocation's address (`bpf_array.pptrs`); the helper gives each CPU's
/// own address of the same element. Their difference is `__per_cpu_offset[cpu]`.
#[raw_tracepoint(tracepoint = "sched_switch")]
fn percpu_init(ctx: RawTracePointContext) -> i32 {
    if control!(percpu_lookup) == 0 || layout!(bpf_array_pptrs) == ABSENT {
        return 0;
    }
    let Some(first) = PERCPU_OFFSETS.get_ptr_mut(0) else { return 0 };
    let map = forget_pointer(first, (&raw const PERCPU_PROBE) as u64);
    let pptrs = map + layout!(bpf_array_pptrs) as u64;
    let Ok(base) = (unsafe { bpf_probe_read_kernel(pptrs as *const u64) }) else { return 0 };
    for cpu in 0..MAX_CPUS {
        if cpu >= control!(cpus) {
            break;
        }
        let key = 0u32;
        let element = unsafe {
            bpf_map_lookup_percpu_elem((&raw const PERCPU_PROBE).cast_mut().cast(), (&raw const key).cast(), cpu)
        };
        if element.is_null() {
            warn!(&ctx, "no per-CPU memory for CPU {}: RSS sums stay unknown", cpu);
            return 0;
        }
        let Some(slot) = PERCPU_OFFSETS.get_ptr_mut(cpu) else { return 0 };
        let address = forget_pointer(slot, element as u64);
        unsafe { *slot = address.wrapping_sub(base) };
    }
    0
}

/// Passes an address through memory, so that the verifier takes it for a number and allows arithmetic on it.
#[inline(always)]
fn forget_pointer(through: *mut u64, address: u64) -> u64 {
    store(through, address);
    load(through)
}
