//! The only writer of rings: reserve, fill, submit. A record that finds no room is counted.

use aya_ebpf::helpers::generated::bpf_ringbuf_output;
use aya_ebpf::maps::RingBuf;
use memtrace_common::control::{LossReason, Ring, loss_index};
use memtrace_common::event::{Header, KIND_STACK_SAMPLE, StackSample, WireRecord};

use crate::bpf_calls::{cpu, ring_state};
use crate::maps::{LEDGER, LOSSES, SAMPLES, SENT, STACKS, SampleScratch};
use crate::memory::{load, value};
use crate::{field, set};

/// `BPF_RB_NO_WAKEUP` (include/uapi/linux/bpf.h): leave the reader asleep.
const NO_WAKEUP: u64 = 1;
/// `BPF_RB_FORCE_WAKEUP`: wake the reader now.
const FORCE_WAKEUP: u64 = 2;

pub use crate::bpf_calls::boot_ns;

/// Counts one loss.
#[inline(always)]
pub fn lose(ring: Ring, reason: LossReason) {
    if let Some(slot) = value(LOSSES.get_ptr_mut(loss_index(ring, reason))) {
        *slot += 1;
    }
}

/// Reserves a record in `ring`, lets `fill` write its fields, stamps the header and submits it.
///
/// `fill` gets a pointer to uninitialised ring memory and must write every field but the header.
#[inline(always)]
pub fn emit<T: WireRecord + 'static>(ring: Ring, at_ns: u64, fill: impl FnOnce(*mut T)) {
    let map: &RingBuf = match ring {
        Ring::Ledger => &LEDGER,
        Ring::Samples => &SAMPLES,
        Ring::Stacks => &STACKS,
    };
    let (waiting, size) = ring_state((map as *const RingBuf).cast_mut());
    // A storm of forks and exits must not take the room of the kills it may end in.
    if matches!(ring, Ring::Ledger) && !T::VITAL && waiting > size / 4 * 3 {
        lose(ring, LossReason::RingFull);
        return;
    }
    let Some(mut entry) = map.reserve::<T>(0) else {
        lose(ring, LossReason::RingFull);
        return;
    };
    let record = entry.as_mut_ptr();
    let header = Header { kind: T::KIND, size: size_of::<T>() as u16, cpu: cpu(), boot_ns: at_ns };
    unsafe { *record.cast::<Header>() = header };
    fill(record);
    // A kill wakes the reader at once. Everything else waits for the reader's timer, unless the
    // ring fills up: a wake-up costs the thread in the hook microseconds, and the reader a turn.
    let flags = if T::VITAL || waiting > size / 4 { FORCE_WAKEUP } else { NO_WAKEUP };
    entry.submit(flags);
    sent(ring);
}

/// Sends a stack sample, with its stack copy right behind it; whether there was room. `first`: the
/// process has no sample yet.
#[inline(always)]
pub fn emit_sample(scratch: *mut SampleScratch, at_ns: u64, first: bool) -> bool {
    let sample = field!(scratch.sample);
    let copied = load(field!(sample.stack_copy_bytes)) & 0xffff;
    let size = size_of::<StackSample>() as u32 + copied;
    let ring = (&raw const STACKS).cast_mut();
    let header = Header { kind: KIND_STACK_SAMPLE, size: size as u16, cpu: cpu(), boot_ns: at_ns };
    set!(sample => { header: header });
    let (waiting, full) = ring_state(ring);
    // The first of a process at once: its mappings have to be read before it is gone.
    let flags = if first || waiting > full / 4 { FORCE_WAKEUP } else { NO_WAKEUP };
    if unsafe { bpf_ringbuf_output(ring.cast(), sample.cast(), size as u64, flags) } != 0 {
        lose(Ring::Stacks, LossReason::RingFull);
        return false;
    }
    sent(Ring::Stacks);
    true
}

/// Counts a record that is in its ring.
#[inline(always)]
fn sent(ring: Ring) {
    if let Some(slot) = value(SENT.get_ptr_mut(ring as u32)) {
        *slot += 1;
    }
}
