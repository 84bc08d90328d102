//! The only writer of rings: reserve, fill, submit; no room is counted, never silent.

use aya_ebpf::helpers::generated::{bpf_get_smp_processor_id, bpf_ktime_get_boot_ns, bpf_ringbuf_query};
use aya_ebpf::maps::RingBuf;
use memtrace_common::control::{Loss, Ring, loss_index};
use memtrace_common::event::{Header, Record};

use crate::maps::{LEDGER, LOSSES, SAMPLES, SENT, STACKS};

pub const BPF_RB_NO_WAKEUP: u64 = 1;
pub const BPF_RB_FORCE_WAKEUP: u64 = 2;
pub const BPF_RB_AVAIL_DATA: u64 = 0;
pub const BPF_RB_RING_SIZE: u64 = 1;

/// Boot-clock nanoseconds.
#[inline(always)]
pub fn boot_ns() -> u64 {
    unsafe { bpf_ktime_get_boot_ns() }
}

/// Counts one loss.
#[inline(always)]
pub fn lose(ring: Ring, reason: Loss) {
    if let Some(slot) = LOSSES.get_ptr_mut(loss_index(ring, reason)) {
        unsafe { *slot += 1 };
    }
}

/// Reserves a record in `ring`, lets `fill` write its fields, stamps the header and submits it.
///
/// `fill` gets a pointer to uninitialised ring memory and must write every field but the header.
#[inline(always)]
pub fn emit<T: Record + 'static>(ring: Ring, at_ns: u64, fill: impl FnOnce(*mut T)) {
    let map: &RingBuf = match ring {
        Ring::Ledger => &LEDGER,
        Ring::Samples => &SAMPLES,
        Ring::Stacks => &STACKS,
    };
    let raw = (map as *const RingBuf).cast_mut().cast();
    let (waiting, size) =
        unsafe { (bpf_ringbuf_query(raw, BPF_RB_AVAIL_DATA), bpf_ringbuf_query(raw, BPF_RB_RING_SIZE)) };
    // A storm of forks and exits must not take the room of the kills it may end in.
    if matches!(ring, Ring::Ledger) && !T::VITAL && waiting > size / 4 * 3 {
        lose(ring, Loss::RingFull);
        return;
    }
    let Some(mut entry) = map.reserve::<T>(0) else {
        lose(ring, Loss::RingFull);
        return;
    };
    let record = entry.as_mut_ptr();
    unsafe {
        *record.cast::<Header>() = Header {
            kind: T::KIND,
            size: size_of::<T>() as u16,
            cpu: bpf_get_smp_processor_id() as u32,
            boot_ns: at_ns,
        };
    }
    fill(record);
    // A kill wakes the reader at once. The rest is drained by a timer, unless it fills up: a wake-up costs whoever is
    // in the hook microseconds, and the reader a turn.
    let flags = if T::VITAL || waiting > size / 4 { BPF_RB_FORCE_WAKEUP } else { BPF_RB_NO_WAKEUP };
    entry.submit(flags);
    sent(ring);
}

/// Counts a record that is in its ring.
#[inline(always)]
pub fn sent(ring: Ring) {
    if let Some(slot) = SENT.get_ptr_mut(ring as u32) {
        unsafe { *slot += 1 };
    }
}
