//! Typed access to what programs may write: map values and ring records.
//!
//! The verifier proves that a pointer stays inside its map value or record; it does not know
//! fields. These helpers keep the types: a field is written by its name and with its own type. See
//! the rule at the head of the crate.

use core::ptr::{read_volatile, write_volatile};

use aya_ebpf::maps::LruHashMap;

/// Writes fields of the struct behind a pointer, in the order given; the rest is left as it is.
///
/// Ring memory is not initialised, so no reference to a record is ever made:
/// `set!(record => { exit_code: code, reserved: 0 })`, and `rss.anon_bytes: bytes` for a part.
#[macro_export]
macro_rules! set {
    ($target:expr => { $($field:ident $(. $part:ident)* : $value:expr),+ $(,)? }) => {{
        let target: *mut _ = $target;
        $(
            let value = $value;
            unsafe { (*target).$field $(. $part)* = value };
        )+
    }};
}

/// The address of a field of the struct behind a pointer: `field!(record.task)`.
#[macro_export]
macro_rules! field {
    ($target:ident . $field:ident) => {
        unsafe { &raw mut (*$target).$field }
    };
}

/// A map value that was looked up, to be used in place.
///
/// Other CPUs can be at the same value. What they must not overwrite for each other is changed by
/// [`crate::maps::atomic_add`] only; of the rest a lost update costs one coarser reading.
#[inline(always)]
pub fn value<T>(found: Option<*mut T>) -> Option<&'static mut T> {
    match found {
        Some(found) => Some(unsafe { &mut *found }),
        None => None,
    }
}

/// A copy of what a map has under a key.
#[inline(always)]
pub fn lookup<K, V: Copy>(map: &LruHashMap<K, V>, key: K) -> Option<V> {
    unsafe { map.get(key) }.copied()
}

/// Reads anew from memory: what is there may be another CPU's, or must not be known to the
/// verifier.
#[inline(always)]
pub fn load<T: Copy>(from: *const T) -> T {
    unsafe { read_volatile(from) }
}

/// Writes to memory at once, as one store of this type.
#[inline(always)]
pub fn store<T: Copy>(to: *mut T, value: T) {
    unsafe { write_volatile(to, value) };
}
