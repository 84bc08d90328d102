//! Both sides of memtrace's wire: records the kernel side emits, the kernel layout it is given,
//! and the control block userspace steers it with.
#![cfg_attr(not(test), no_std)]

pub mod control;
pub mod event;
pub mod layout;
