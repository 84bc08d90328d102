//! What each thread of the agent may do once it has started, and the way there.
//!
//! Capabilities and filters belong to a thread, and a thread or process that is started takes those of
//! the thread that starts it. So the recorder gives up what none of its threads and processes needs
//! before it starts them, and each gives up more when it begins; those that are started earlier, for
//! the log and the disk, give up everything themselves. Two sets
//! matter: what a thread can use (permitted), which bounds the processes that it starts, and what it
//! uses now (effective). The recorder starts the stack worker and the process that names functions, so
//! it is permitted what those keep; used by itself is less.
//!
//! `no_new_privs` is what makes it final: a program that root starts would else get every capability of
//! the bounding set (security/commoncap.c, `cap_bprm_creds_from_file`).

use std::io;

use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, clear_ambient_capability_set, remove_capability_from_bounding_set,
    set_capabilities, set_no_new_privs,
};
use tracing::warn;

use super::syscalls::Filter;

/// Capability numbers that a kernel can know; 41 of them exist in Linux 6.18.
const CAPABILITY_NUMBERS: u32 = 64;

/// What a thread keeps, as far as it has it.
#[derive(Clone, Copy, Debug)]
pub struct ThreadRights {
    /// Name of the thread (`comm`).
    pub thread: &'static str,
    /// What it does.
    pub does: &'static str,
    /// Permitted and bounding set.
    pub permitted: CapabilitySet,
    /// Effective set.
    pub effective: CapabilitySet,
    /// System calls.
    pub filter: Filter,
    /// Below 0: programs that keep the CPUs busy are not to keep it from them.
    pub niceness: i32,
    /// Whether it may interrupt who runs when it wakes up. What it starts may not either.
    pub interrupts: bool,
}

/// Of the thread that everything waits for: 87 times the share of an ordinary one.
const FIRST: i32 = -20;
/// Of the threads that take over from it: 9 times.
const EARLY: i32 = -10;
/// Of the thread that answers: 3 times. More would be a way to take CPU time from others by asking.
const PROMPT: i32 = -5;

/// Every thread has it: memory that is taken while the agent's is locked counts against
/// RLIMIT_MEMLOCK without (mm/mmap.c, `mlock_future_ok`), and would soon be refused.
const LOCK: CapabilitySet = CapabilitySet::IPC_LOCK;
const READ: CapabilitySet = CapabilitySet::DAC_READ_SEARCH;

/// What the stack worker keeps: read /proc/PID and files of every process, open /proc/PID/map_files
/// (SYS_ADMIN before Linux 5.9), and see addresses in /proc/kallsyms.
pub const STACK_WORKER: CapabilitySet = CapabilitySet::SYS_PTRACE
    .union(CapabilitySet::DAC_READ_SEARCH)
    .union(CapabilitySet::CHECKPOINT_RESTORE)
    .union(CapabilitySet::SYSLOG);

/// What the process that names functions uses to become `nobody`.
const CHANGE_USER: CapabilitySet = CapabilitySet::SETUID.union(CapabilitySet::SETGID).union(CapabilitySet::SETPCAP);

/// The agent's loop. BPF: maps; before Linux 6.0 the kernel asks for it even to read one where
/// `kernel.unprivileged_bpf_disabled` is set.
pub const RECORDER: ThreadRights = ThreadRights {
    thread: "memtrace",
    does: "the recorder: rings, journal, ledgers; starts the stack worker",
    permitted: CapabilitySet::BPF.union(LOCK).union(STACK_WORKER).union(CHANGE_USER).union(CapabilitySet::KILL),
    effective: CapabilitySet::BPF.union(LOCK).union(READ),
    filter: Filter::Agent,
    niceness: FIRST,
    interrupts: true,
};
/// Starts the process that names functions.
pub const NAMING: ThreadRights = ThreadRights {
    thread: "naming",
    does: "starts and ends the process that names functions, rewrites incidents",
    permitted: CHANGE_USER.union(CapabilitySet::KILL).union(LOCK).union(READ),
    effective: CapabilitySet::KILL.union(LOCK).union(READ),
    filter: Filter::Agent,
    niceness: 0,
    interrupts: false,
};
/// Finds out what happened between two runs.
pub const KEEPER: ThreadRights = ThreadRights {
    thread: "kills",
    does: "the keeper: counters of cgroups, the kernel log of before the start, `watched.json`",
    permitted: CapabilitySet::SYSLOG.union(LOCK).union(READ),
    effective: CapabilitySet::SYSLOG.union(LOCK).union(READ),
    filter: Filter::Agent,
    niceness: 0,
    interrupts: false,
};
/// Looks cgroups up.
pub const ASKER: ThreadRights = ThreadRights {
    thread: "cgroups",
    does: "the asker: cgroups by their id",
    permitted: LOCK.union(READ),
    effective: LOCK.union(READ),
    filter: Filter::Agent,
    niceness: 0,
    interrupts: false,
};
/// Talks to clients.
pub const SERVER: ThreadRights = ThreadRights {
    thread: "http",
    does: "the server: connections",
    permitted: LOCK,
    effective: LOCK,
    filter: Filter::Server,
    niceness: PROMPT,
    interrupts: true,
};
/// Reads incidents for the server.
pub const INCIDENTS: ThreadRights = ThreadRights {
    thread: "incidents",
    does: "reads incidents for the server",
    permitted: LOCK.union(READ),
    effective: LOCK.union(READ),
    filter: Filter::Reader,
    niceness: 0,
    interrupts: false,
};

/// Waits for the disk.
pub const STORER: ThreadRights = ThreadRights {
    thread: "storer",
    does: "the storer: writes and deletes incidents, syncs the ledger of kills",
    permitted: LOCK.union(READ),
    effective: LOCK.union(READ),
    filter: Filter::Agent,
    niceness: EARLY,
    interrupts: false,
};
/// Needs a CPU for what the storer writes.
pub const PACKER: ThreadRights = ThreadRights {
    thread: "packer",
    does: "the packer: incidents as the bytes of their files",
    permitted: LOCK,
    effective: LOCK,
    filter: Filter::Agent,
    niceness: EARLY,
    interrupts: false,
};
/// Writes the log.
pub const LOG: ThreadRights = ThreadRights {
    thread: "log",
    does: "writes the log",
    permitted: LOCK,
    effective: LOCK,
    filter: Filter::Agent,
    niceness: 0,
    interrupts: false,
};

/// Every thread of an agent that has started.
pub const THREADS: [ThreadRights; 9] = [RECORDER, PACKER, STORER, LOG, NAMING, KEEPER, ASKER, SERVER, INCIDENTS];

impl ThreadRights {
    /// Gives up everything else, for good, in the calling thread. What cannot be given up is logged:
    /// an agent with more rights than it needs is better than none.
    pub fn enter(&self) {
        self.keep_capabilities();
        if let Err(error) = self.filter.apply() {
            warn!("the thread {} has no filter of system calls: {error:#}", self.thread);
        }
    }

    /// The same without the filter: for a thread that has the recorder's already.
    pub fn keep_capabilities(&self) {
        match self.niceness {
            0.. => super::lower_priority(),
            niceness => super::raise_priority(self.thread, niceness),
        }
        if !self.interrupts {
            super::interrupt_nobody();
        }
        if let Err(error) = self.drop_capabilities() {
            warn!("the thread {} keeps capabilities that it does not need: {error}", self.thread);
        }
    }

    fn drop_capabilities(&self) -> io::Result<()> {
        let held = capabilities(None)?;
        // Where CAP_BPF was not given, CAP_SYS_ADMIN loaded the programs, and maps need it still.
        let stands_in = match held.permitted.contains(CapabilitySet::BPF) {
            false if self.permitted.contains(CapabilitySet::BPF) => CapabilitySet::SYS_ADMIN,
            _ => CapabilitySet::empty(),
        };
        let (permitted, effective) = (self.permitted | stands_in, self.effective | stands_in);
        // The bounding set first: that needs a capability.
        set_capabilities(None, CapabilitySets { effective: held.permitted, ..held })?;
        cut_bounding_set(permitted);
        // Root's programs get theirs by their user; those of another user inherit them.
        let root = rustix::process::geteuid().is_root();
        let inheritable = if root { CapabilitySet::empty() } else { held.inheritable & permitted };
        if root {
            let _ = clear_ambient_capability_set();
        }
        let kept = held.permitted & permitted;
        set_capabilities(None, CapabilitySets { permitted: kept, effective: kept & effective, inheritable })?;
        Ok(set_no_new_privs(true)?)
    }
}

/// Takes everything but `kept` out of the calling thread's bounding set, if it has CAP_SETPCAP.
pub fn cut_bounding_set(kept: CapabilitySet) {
    for bit in (0..CAPABILITY_NUMBERS).map_while(|number| 1_u64.checked_shl(number)) {
        let capability = CapabilitySet::from_bits_retain(bit);
        // EINVAL: the kernel knows no capability of this number, nor of a higher one.
        if !kept.contains(capability) && remove_capability_from_bounding_set(capability).is_err() {
            break;
        }
    }
}

#[cfg(test)]
mod tests {
    use rustix::thread::{capability_is_in_bounding_set, no_new_privs};

    use super::*;

    #[test]
    fn a_thread_has_what_it_uses_and_no_more_than_the_recorder() {
        for rights in THREADS {
            assert!(rights.permitted.contains(rights.effective), "{}", rights.thread);
            assert!(RECORDER.permitted.contains(rights.permitted), "{}", rights.thread);
            assert!(rights.permitted.contains(LOCK), "{}", rights.thread);
        }
    }

    #[test]
    fn what_is_given_up_is_gone_and_the_rest_is_there() {
        for rights in THREADS {
            std::thread::spawn(move || {
                let before = capabilities(None).unwrap();
                rights.drop_capabilities().unwrap();
                let after = capabilities(None).unwrap();
                assert_eq!(after.permitted, before.permitted & rights.permitted, "{}", rights.thread);
                assert_eq!(after.effective, before.permitted & rights.effective, "{}", rights.thread);
                assert!(after.inheritable.is_empty() || !rustix::process::geteuid().is_root());
                assert!(no_new_privs().unwrap());
                if before.permitted.contains(CapabilitySet::SETPCAP) {
                    assert!(!capability_is_in_bounding_set(CapabilitySet::SYS_ADMIN).unwrap());
                }
            })
            .join()
            .unwrap();
        }
    }
}
