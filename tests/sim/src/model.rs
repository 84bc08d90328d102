//! The model kernel: who exists, who holds what, and what its hooks have told. The ground truth of a story.
//!
//! Memory is counted in bytes of whole pages. Every table is small by construction: the story makes no more processes,
//! cgroups and address spaces than its [`Shape`](crate::story::Shape) allows, and what ends is removed.

use std::collections::{BTreeMap, BTreeSet};

use memtrace_common::event;

use crate::rng::Rng;
use crate::wire::{self, Blind, Hook, Ring};

pub(crate) const MS: u64 = 1_000_000;
pub(crate) const SEC: u64 = 1_000_000_000;
pub(crate) const MIB: u64 = 1 << 20;
/// The root of the memory hierarchy.
pub(crate) const ROOT: u64 = 1;
/// Removed cgroups that are remembered while something is charged to them.
const OFFLINE_CAP: usize = 64;
/// Growth between two readings, as the agent's default.
const THRESHOLD: u64 = 256 * 1024;

/// Process id and start.
pub(crate) type Key = (u32, u64);

/// Resident memory by kind, bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Held {
    pub(crate) anon: u64,
    pub(crate) file: u64,
    pub(crate) shmem: u64,
    pub(crate) swap: u64,
}

impl Held {
    pub(crate) fn resident(&self) -> u64 {
        self.anon + self.file + self.shmem
    }

    pub(crate) fn plus(&self, other: &Self) -> Self {
        Self {
            anon: self.anon + other.anon,
            file: self.file + other.file,
            shmem: self.shmem + other.shmem,
            swap: self.swap + other.swap,
        }
    }

    pub(crate) fn wire(&self) -> event::Rss {
        event::Rss { anon_bytes: self.anon, file_bytes: self.file, shmem_bytes: self.shmem, swap_bytes: self.swap }
    }
}

/// What records have said about an address space: what the engine must believe once all are delivered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Told {
    pub(crate) held: Held,
    pub(crate) owner: Key,
    pub(crate) cgroup: u64,
}

/// An address space.
#[derive(Clone, Debug)]
pub(crate) struct Space {
    /// As the wire names it; used again after the space is gone.
    pub(crate) mm_id: u64,
    pub(crate) held: Held,
    /// `mm->owner`, a process id.
    pub(crate) owner: Option<u32>,
    /// Live processes that use it.
    pub(crate) users: Vec<u32>,
    /// The hook follows it. One that was found running is not followed before it changes.
    pub(crate) followed: bool,
    /// The task and cgroup the hook last saw as its owner.
    pub(crate) seen: event::Task,
    pub(crate) cgroup: u64,
    pub(crate) sent: Held,
    pub(crate) peak: u64,
    pub(crate) grown: u64,
    /// Grown since its last stack.
    pub(crate) unsampled: u64,
    pub(crate) told: Option<Told>,
}

/// A live process.
#[derive(Clone, Debug)]
pub(crate) struct Process {
    pub(crate) pid: u32,
    pub(crate) start_ns: u64,
    pub(crate) parent: u32,
    pub(crate) name: String,
    pub(crate) cgroup: u64,
    /// Serial of its address space.
    pub(crate) space: u64,
    /// Threads besides the first.
    pub(crate) threads: u32,
    /// Its first thread has exited, others live on.
    pub(crate) leader_gone: bool,
    /// Threads that were marked as victims.
    pub(crate) marked: BTreeSet<u32>,
    /// It was sent SIGKILL.
    pub(crate) killed: bool,
    /// When it will be gone.
    pub(crate) dies_ns: Option<u64>,
    /// `oom_score_adj` of -1000.
    pub(crate) spared: bool,
}

impl Process {
    pub(crate) fn key(&self) -> Key {
        (self.pid, self.start_ns)
    }
}

/// A memory cgroup.
#[derive(Clone, Debug)]
pub(crate) struct Cgroup {
    pub(crate) parent: Option<u64>,
    pub(crate) path: String,
    pub(crate) max: u64,
    pub(crate) high: u64,
    /// Of its whole subtree.
    pub(crate) usage: u64,
    pub(crate) watermark: u64,
    pub(crate) failcnt: u64,
    pub(crate) swap: u64,
    /// Page cache of its own.
    pub(crate) cache: u64,
    /// `memory.oom.group`.
    pub(crate) group: bool,
    /// v1 `oom_kill_disable`.
    pub(crate) kill_disabled: bool,
    pub(crate) under_oom: bool,
    pub(crate) removed: bool,
}

/// A process that the OOM killer killed or chose.
#[derive(Clone, Debug)]
pub(crate) struct Victim {
    /// The decisions it was part of, first to last.
    pub(crate) decisions: Vec<usize>,
    /// The OOM killer sent it SIGKILL.
    pub(crate) killed: bool,
    /// It was marked.
    pub(crate) marked: bool,
    /// A record about it was lost.
    pub(crate) lost: bool,
    /// The record of its SIGKILL was read after the incident was closed before its time.
    pub(crate) late: bool,
}

/// A record on its way to the rings.
#[derive(Clone, Debug)]
pub(crate) struct Emitted {
    pub(crate) ns: u64,
    pub(crate) ring: Ring,
    pub(crate) bytes: Vec<u8>,
    /// The decision of the OOM killer it belongs to.
    pub(crate) decision: Option<usize>,
    /// The victim it is about.
    pub(crate) victim: Option<Key>,
}

/// A line of the kernel log about a kill.
#[derive(Clone, Debug)]
pub(crate) struct LogNote {
    pub(crate) ns: u64,
    pub(crate) pid: u32,
    pub(crate) comm: String,
    /// constraint, oom_memcg, task_memcg of an `oom-kill:` line; none for a "Killed process" line.
    pub(crate) oom: Option<(&'static str, Option<String>, String)>,
}

/// A stack of a process that grew.
#[derive(Clone, Debug)]
pub(crate) struct StackNote {
    pub(crate) ns: u64,
    pub(crate) task: event::Task,
    pub(crate) mm_id: u64,
    pub(crate) cgroup: u64,
    pub(crate) weight: u64,
    pub(crate) grown: u64,
}

/// Switches of a run that the model looks at.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Switches {
    pub(crate) v1: bool,
    /// `oom_kill_process` is hooked.
    pub(crate) decisions: bool,
    /// 6.16 and newer: the exit is told before the memory is torn down.
    pub(crate) exit_first: bool,
    /// Bytes between two stacks; 0: none are taken.
    pub(crate) sample_bytes: u64,
    pub(crate) blind: Blind,
    /// Process ids come from this many.
    pub(crate) pids: u32,
}

/// The machine.
#[derive(Debug)]
pub(crate) struct World {
    pub(crate) now: u64,
    pub(crate) rng: Rng,
    pub(crate) switches: Switches,
    pub(crate) processes: BTreeMap<u32, Process>,
    pub(crate) spaces: BTreeMap<u64, Space>,
    pub(crate) cgroups: BTreeMap<u64, Cgroup>,
    /// Address spaces nobody uses that something else still holds, with their end.
    pub(crate) lingering: Vec<(u64, u64)>,
    /// Readings by cgroup, where they are not the usual.
    pub(crate) thresholds: BTreeMap<u64, u64>,
    pub(crate) out: Vec<Emitted>,
    pub(crate) log: Vec<LogNote>,
    pub(crate) stacks: Vec<StackNote>,
    pub(crate) victims: BTreeMap<Key, Victim>,
    pub(crate) decisions: usize,
    /// Processes that were sent SIGKILL by others.
    pub(crate) others: BTreeSet<Key>,
    free_mms: Vec<u64>,
    next_pid: u32,
    next_id: u64,
    next_serial: u64,
}

impl World {
    pub(crate) fn new(rng: Rng, switches: Switches) -> Self {
        let root = Cgroup {
            parent: None,
            path: "/".to_owned(),
            max: event::NO_LIMIT,
            high: event::NO_LIMIT,
            usage: 0,
            watermark: 0,
            failcnt: 0,
            swap: 0,
            cache: 0,
            group: false,
            kill_disabled: false,
            under_oom: false,
            removed: false,
        };
        Self {
            now: 1_000 * SEC,
            rng,
            switches,
            processes: BTreeMap::new(),
            spaces: BTreeMap::new(),
            cgroups: BTreeMap::from([(ROOT, root)]),
            lingering: Vec::new(),
            thresholds: BTreeMap::new(),
            out: Vec::new(),
            log: Vec::new(),
            stacks: Vec::new(),
            victims: BTreeMap::new(),
            decisions: 0,
            others: BTreeSet::new(),
            free_mms: (1..=4u64).map(|n| 0xffff_8880_0000_0000 | (n << 12)).collect(),
            next_pid: 300,
            next_id: 100,
            next_serial: 0,
        }
    }

    /// A hook runs now, on some CPU. Now and then two of them at the same nanosecond.
    pub(crate) fn hook(&mut self) -> Hook {
        self.now += 700 * self.rng.below(6);
        Hook { ns: self.now, cpu: self.rng.below(8) as u32 }
    }

    pub(crate) fn emit(&mut self, hook: Hook, ring: Ring, bytes: Vec<u8>) {
        self.out.push(Emitted { ns: hook.ns, ring, bytes, decision: None, victim: None });
    }

    /// A process id that is free.
    pub(crate) fn new_pid(&mut self) -> u32 {
        loop {
            self.next_pid = if self.next_pid >= 300 + self.switches.pids { 301 } else { self.next_pid + 1 };
            if !self.processes.contains_key(&self.next_pid) {
                return self.next_pid;
            }
        }
    }

    pub(crate) fn new_id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    /// A new address space: its identity may have been another's a moment ago.
    pub(crate) fn new_space(&mut self, owner: u32, cgroup: u64, held: Held) -> u64 {
        let mm_id = match self.free_mms.pop() {
            Some(id) => id,
            None => 0xffff_8881_0000_0000 | ((self.next_serial + 1) << 12),
        };
        self.next_serial += 1;
        let space = Space {
            mm_id,
            held,
            owner: Some(owner),
            users: vec![owner],
            followed: false,
            seen: wire::task(0, 0, 0, ""),
            cgroup,
            sent: Held::default(),
            peak: held.resident(),
            grown: 0,
            unsampled: 0,
            told: None,
        };
        self.spaces.insert(self.next_serial, space);
        self.charge(cgroup, held.resident());
        self.next_serial
    }

    /// Its identity can be used again.
    pub(crate) fn drop_space(&mut self, serial: u64) {
        if let Some(space) = self.spaces.remove(&serial) {
            self.uncharge(space.cgroup, space.held.resident());
            self.free_mms.push(space.mm_id);
        }
    }

    /// A thread of a process; 0 is the first.
    pub(crate) fn thread(&self, pid: u32, number: u32) -> event::Task {
        let Some(p) = self.processes.get(&pid) else { return wire::task(pid, pid, 0, "") };
        let tid = if number == 0 { pid } else { pid * 64 + 1_000_000 + number };
        wire::task(pid, tid, p.start_ns, if number == 0 { &p.name } else { "worker" })
    }

    /// A thread that can run.
    pub(crate) fn some_thread(&mut self, pid: u32) -> event::Task {
        let (threads, gone) = self.processes.get(&pid).map_or((0, false), |p| (p.threads, p.leader_gone));
        let first = u64::from(gone && threads > 0);
        let number = self.rng.range(first, u64::from(threads).max(first)) as u32;
        self.thread(pid, number)
    }

    pub(crate) fn chain(&self, id: u64) -> Vec<u64> {
        let mut chain = vec![id];
        while let Some(parent) = chain.last().and_then(|id| self.cgroups.get(id)).and_then(|c| c.parent) {
            chain.push(parent);
        }
        chain
    }

    pub(crate) fn in_tree(&self, id: u64, root: u64) -> bool {
        self.chain(id).contains(&root)
    }

    pub(crate) fn charge(&mut self, id: u64, bytes: u64) {
        for id in self.chain(id) {
            if let Some(c) = self.cgroups.get_mut(&id) {
                c.usage += bytes;
                c.watermark = c.watermark.max(c.usage);
            }
        }
    }

    pub(crate) fn uncharge(&mut self, id: u64, bytes: u64) {
        for id in self.chain(id) {
            if let Some(c) = self.cgroups.get_mut(&id) {
                c.usage = c.usage.saturating_sub(bytes);
            }
        }
    }

    /// The lowest cgroup on the way up that has no room for this.
    pub(crate) fn full(&self, id: u64, bytes: u64) -> Option<u64> {
        let over = |id: &u64| self.cgroups.get(id).is_some_and(|c| c.usage.saturating_add(bytes) > c.max);
        self.chain(id).into_iter().find(over)
    }

    /// A reading of a cgroup's counters, as a hook makes it.
    pub(crate) fn memcg(&self, id: u64) -> event::Memcg {
        let Some(c) = self.cgroups.get(&id) else { return wire::unread(id) };
        self.switches.blind.memcg(event::Memcg {
            cgroup_id: id,
            usage_bytes: c.usage,
            limit_bytes: c.max,
            watermark_bytes: c.watermark,
            failcnt: c.failcnt,
            swap_usage_bytes: c.swap,
            swap_limit_bytes: event::NO_LIMIT,
            high_bytes: c.high,
        })
    }

    /// How far an address space of this cgroup moves between two readings.
    pub(crate) fn threshold(&self, cgroup: u64) -> u64 {
        self.thresholds.get(&cgroup).copied().unwrap_or(THRESHOLD)
    }

    pub(crate) fn pids(&self) -> Vec<u32> {
        self.processes.keys().copied().collect()
    }

    /// Cgroups that exist.
    pub(crate) fn live_cgroups(&self) -> Vec<u64> {
        self.cgroups.iter().filter(|(_, c)| !c.removed).map(|(id, _)| *id).collect()
    }

    /// Processes of a cgroup's tree.
    pub(crate) fn inside(&self, root: u64) -> Vec<u32> {
        let inside = self.processes.values().filter(|p| self.in_tree(p.cgroup, root));
        inside.map(|p| p.pid).collect()
    }

    /// Removed cgroups that nothing is charged to any more are gone for good.
    pub(crate) fn reap_cgroups(&mut self) {
        let parents: BTreeSet<u64> = self.cgroups.values().filter_map(|c| c.parent).collect();
        let used: BTreeSet<u64> = self.spaces.values().map(|s| s.cgroup).collect();
        let offline = self.cgroups.values().filter(|c| c.removed).count();
        let over = offline > OFFLINE_CAP;
        self.cgroups.retain(|id, c| {
            let idle = c.usage == 0 || over;
            !c.removed || !idle || parents.contains(id) || used.contains(id)
        });
    }

    /// Sums of resident memory over each cgroup's tree, as records have told them.
    pub(crate) fn told_sums(&self) -> BTreeMap<u64, Held> {
        let mut sums: BTreeMap<u64, Held> = BTreeMap::new();
        for told in self.spaces.values().filter_map(|space| space.told) {
            for id in self.chain(told.cgroup) {
                let sum = sums.entry(id).or_default();
                *sum = sum.plus(&told.held);
            }
        }
        sums
    }
}
