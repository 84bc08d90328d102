//! The capabilities that memtrace uses: what each is for, and what is lost without it.
//!
//! This is the one table of them. `doctor` prints what is lost from it, incidents repeat it, the
//! agent keeps after its start what [`super::rights`] says, and `docs/capabilities.md` is made of it.

use rustix::thread::CapabilitySet;

/// Whether memtrace runs without a capability.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CapabilityNeed {
    /// It does not start: exit code 3.
    Required,
    /// It runs, and something is lost.
    Optional,
}

/// A capability that memtrace uses.
#[derive(Clone, Copy, Debug)]
pub struct Capability {
    /// Its bit.
    pub bit: CapabilitySet,
    /// Name as in capabilities(7), without `CAP_`.
    pub name: &'static str,
    /// Whether memtrace runs without it.
    pub need: CapabilityNeed,
    /// What it is used for.
    pub used_for: &'static str,
    /// What is lost without it.
    pub lost: &'static str,
}

/// Every capability that memtrace uses. CAP_SYS_ADMIN is not among them: it stands in for the
/// required ones ([`missing`]) and is not needed beside them.
pub const CAPABILITIES: [Capability; 14] = [
    Capability {
        bit: CapabilitySet::BPF,
        name: "BPF",
        need: CapabilityNeed::Required,
        used_for: "loading the programs; later reading and writing their maps",
        lost: "no program can be loaded into the kernel",
    },
    Capability {
        bit: CapabilitySet::PERFMON,
        name: "PERFMON",
        need: CapabilityNeed::Required,
        used_for: "programs that read the kernel's memory, and attaching them",
        lost: "no program can read the kernel's memory",
    },
    Capability {
        bit: CapabilitySet::SYSLOG,
        name: "SYSLOG",
        need: CapabilityNeed::Optional,
        used_for: "the kernel log (`/dev/kmsg`) and addresses in `/proc/kallsyms`",
        lost: "where `kernel.dmesg_restrict` is set, kills are not cross-checked with the kernel log; where \
               `kernel.kptr_restrict` or `kernel.perf_event_paranoid` hide addresses, kernel frames have no names",
    },
    Capability {
        bit: CapabilitySet::SYS_RESOURCE,
        name: "SYS_RESOURCE",
        need: CapabilityNeed::Optional,
        used_for: "`oom_score_adj` -999; before Linux 5.11 also the memory of BPF maps, which is locked",
        lost: "memtrace cannot protect itself from a global OOM kill",
    },
    Capability {
        bit: CapabilitySet::IPC_LOCK,
        name: "IPC_LOCK",
        need: CapabilityNeed::Optional,
        used_for: "locking the agent's memory",
        lost: "where locked memory is limited (RLIMIT_MEMLOCK), the agent can be paged out in a global shortage",
    },
    Capability {
        bit: CapabilitySet::SYS_NICE,
        name: "SYS_NICE",
        need: CapabilityNeed::Optional,
        used_for: "the recorder, the packer, the storer and the server go before others (niceness -20, -10 and -5), set once at the start",
        lost: "programs that keep the CPUs busy can make the agent late, its rings run over, incidents be given up, and health be answered late",
    },
    Capability {
        bit: CapabilitySet::SYS_PTRACE,
        name: "SYS_PTRACE",
        need: CapabilityNeed::Optional,
        used_for: "mappings of other users' and of privileged processes (`/proc/PID/maps`)",
        lost: "stacks of other users' and of privileged processes have no user frames",
    },
    Capability {
        bit: CapabilitySet::DAC_READ_SEARCH,
        name: "DAC_READ_SEARCH",
        need: CapabilityNeed::Optional,
        used_for: "programs that only their owner may read; cgroups by their id, without a walk",
        lost: "code in files that only another user may read has no frames, and ids of cgroups are looked up by walks",
    },
    Capability {
        bit: CapabilitySet::CHECKPOINT_RESTORE,
        name: "CHECKPOINT_RESTORE",
        need: CapabilityNeed::Optional,
        used_for: "the files behind mappings (`/proc/PID/map_files`)",
        lost: "code in files that were removed or replaced has no frames",
    },
    Capability {
        bit: CapabilitySet::CHOWN,
        name: "CHOWN",
        need: CapabilityNeed::Optional,
        used_for: "giving the unix socket to its group, once at the start",
        lost: "the unix socket stays with the agent's own group",
    },
    Capability {
        bit: CapabilitySet::SETUID,
        name: "SETUID",
        need: CapabilityNeed::Optional,
        used_for: "the process that names functions becomes `nobody`",
        lost: "the process that names functions keeps the agent's user, behind its filter",
    },
    Capability {
        bit: CapabilitySet::SETGID,
        name: "SETGID",
        need: CapabilityNeed::Optional,
        used_for: "the process that names functions leaves the agent's groups, before it changes its user",
        lost: "the process that names functions keeps the agent's user and groups, behind its filter",
    },
    Capability {
        bit: CapabilitySet::SETPCAP,
        name: "SETPCAP",
        need: CapabilityNeed::Optional,
        used_for: "cutting the bounding sets of the agent and of the processes that it starts",
        lost: "bounding sets stay as they are; `no_new_privs` alone keeps capabilities from coming back",
    },
    Capability {
        bit: CapabilitySet::KILL,
        name: "KILL",
        need: CapabilityNeed::Optional,
        used_for: "ending a process that names functions and hangs, which belongs to `nobody`",
        lost: "a process that names functions and hangs is left behind",
    },
];

/// The capabilities of the table that are missing. CAP_SYS_ADMIN stands in for the required ones.
pub fn missing(held: CapabilitySet, need: CapabilityNeed) -> impl Iterator<Item = &'static Capability> {
    let is_there = move |capability: &Capability| {
        held.contains(capability.bit)
            || (capability.need == CapabilityNeed::Required && held.contains(CapabilitySet::SYS_ADMIN))
    };
    CAPABILITIES.iter().filter(move |capability| capability.need == need && !is_there(capability))
}

/// Names of those in a set, as the table has them, separated by blanks.
pub fn names(set: CapabilitySet) -> String {
    let known = CAPABILITIES.iter().filter(|capability| set.contains(capability.bit)).map(|known| known.name);
    known.chain(set.contains(CapabilitySet::SYS_ADMIN).then_some("SYS_ADMIN")).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_required_ones_can_be_replaced_and_the_others_cannot() {
        let all = CAPABILITIES.iter().fold(CapabilitySet::empty(), |set, one| set | one.bit);
        for need in [CapabilityNeed::Required, CapabilityNeed::Optional] {
            assert_eq!(missing(all, need).count(), 0);
            for one in CAPABILITIES.iter().filter(|one| one.need == need) {
                let names: Vec<_> = missing(all - one.bit, need).map(|one| one.name).collect();
                assert_eq!(names, [one.name]);
                let replaced = missing((all - one.bit) | CapabilitySet::SYS_ADMIN, need).count() == 0;
                assert_eq!(replaced, need == CapabilityNeed::Required, "{}", one.name);
            }
        }
        assert_eq!(names(CapabilitySet::KILL | CapabilitySet::SYS_ADMIN), "KILL SYS_ADMIN");
    }
}
