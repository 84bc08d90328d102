//! bpf(2) without a loader: empty programs to compare with, and the kernel's statistics of program
//! run time.
#![allow(unsafe_code, reason = "bpf(2) has no safe call")]

use std::ffi::CString;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

use anyhow::Context;
use std::os::fd::AsRawFd;

// include/uapi/linux/bpf.h
const PROG_LOAD: libc::c_long = 5;
const RAW_TRACEPOINT_OPEN: libc::c_long = 17;
const ENABLE_STATS: libc::c_long = 32;
const PROG_TYPE_RAW_TRACEPOINT: u32 = 17;
const STATS_RUN_TIME: u32 = 0;

/// `r0 = 0; exit`.
const DO_NOTHING: [[u8; 8]; 2] = [[0xb7, 0, 0, 0, 0, 0, 0, 0], [0x95, 0, 0, 0, 0, 0, 0, 0]];

/// An empty program on a raw tracepoint, attached until dropped.
#[derive(Debug)]
pub(crate) struct Empty {
    program: OwnedFd,
    _link: OwnedFd,
}

#[repr(C)]
struct Load {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
}

#[repr(C)]
struct Open {
    name: u64,
    prog_fd: u32,
    padding: u32,
}

#[repr(C)]
struct Stats {
    kind: u32,
}

impl Empty {
    /// Loads a program and attaches it.
    pub(crate) fn on(tracepoint: &str) -> anyhow::Result<Self> {
        let license = c"GPL";
        let load = Load {
            prog_type: PROG_TYPE_RAW_TRACEPOINT,
            insn_cnt: 2,
            insns: DO_NOTHING.as_ptr() as u64,
            license: license.as_ptr() as u64,
        };
        // SAFETY: instructions and licence are constants.
        let program = unsafe { bpf(PROG_LOAD, &load) }.context("failed to load an empty program")?;
        let name = CString::new(tracepoint).context("a tracepoint with a zero byte")?;
        let open = Open { name: name.as_ptr() as u64, prog_fd: u32::try_from(program.as_raw_fd())?, padding: 0 };
        // SAFETY: the name outlives the call.
        let link = unsafe { bpf(RAW_TRACEPOINT_OPEN, &open) }
            .with_context(|| format!("failed to attach an empty program to {tracepoint}"))?;
        Ok(Self { program, _link: link })
    }

    /// File descriptor of the program.
    pub(crate) fn descriptor(&self) -> RawFd {
        self.program.as_raw_fd()
    }
}

/// Lets the kernel time every program while the returned descriptor is open, as
/// `kernel.bpf_stats_enabled` does permanently.
pub(crate) fn clock_programs() -> anyhow::Result<OwnedFd> {
    // SAFETY: the attribute is a number.
    unsafe { bpf(ENABLE_STATS, &Stats { kind: STATS_RUN_TIME }) }.context("failed to have programs clocked")
}

/// Calls bpf(2) with a command that returns a file descriptor.
///
/// # Safety
/// Addresses in `attribute` must be what the command takes there, and valid during the call.
unsafe fn bpf<T>(command: libc::c_long, attribute: &T) -> std::io::Result<OwnedFd> {
    let address: *const T = attribute;
    // SAFETY: the kernel reads as many bytes as the attribute has; the caller vouches for what it
    // points to.
    let descriptor = unsafe { libc::syscall(libc::SYS_bpf, command, address, size_of::<T>()) };
    if descriptor < 0 {
        return Err(std::io::Error::last_os_error());
    }
    let descriptor = i32::try_from(descriptor).map_err(std::io::Error::other)?;
    // SAFETY: the kernel has just opened this descriptor, and nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}
