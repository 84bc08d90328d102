//! Records, facts and an engine for the engine's own tests.

use memtrace_common::event::*;
use memtrace_incident::{Host, Incident, KillEntry};
use zerocopy::{FromZeros, IntoBytes};

use crate::Engine;
use crate::input::{Fact, Input, Settings};
use crate::output::{Finding, Out, Output, Request};

pub(crate) const MIB: u64 = 1 << 20;
pub(crate) const MS: u64 = 1_000_000;
pub(crate) const SEC: u64 = 1_000_000_000;

/// Start of a test process on the boot clock. Starts differ by ten clock ticks at least.
pub(crate) fn start(pid: u32) -> u64 {
    u64::from(pid) * 100 * MS + 3
}

fn header<T: WireRecord>(boot_ns: u64) -> Header {
    Header { kind: T::KIND, size: size_of::<T>() as u16, cpu: 0, boot_ns }
}

pub(crate) fn task(pid: u32) -> Task {
    named(pid, &format!("p{pid}"))
}

pub(crate) fn named(pid: u32, name: &str) -> Task {
    let mut comm = [0u8; 16];
    comm[..name.len()].copy_from_slice(name.as_bytes());
    Task { tgid: pid, tid: pid, start_boot_ns: start(pid), comm }
}

/// A reading without a limit.
pub(crate) fn memcg(id: u64, usage: u64) -> Memcg {
    Memcg {
        cgroup_id: id,
        usage_bytes: usage,
        limit_bytes: NO_LIMIT,
        watermark_bytes: usage,
        failcnt: 0,
        swap_usage_bytes: 0,
        swap_limit_bytes: NO_LIMIT,
        high_bytes: NO_LIMIT,
    }
}

/// A cgroup whose counters could not be read.
fn unread(id: u64) -> Memcg {
    Memcg {
        cgroup_id: id,
        usage_bytes: UNKNOWN,
        limit_bytes: UNKNOWN,
        watermark_bytes: UNKNOWN,
        failcnt: UNKNOWN,
        swap_usage_bytes: UNKNOWN,
        swap_limit_bytes: UNKNOWN,
        high_bytes: UNKNOWN,
    }
}

pub(crate) fn limited(id: u64, usage: u64, limit: u64) -> Memcg {
    Memcg { limit_bytes: limit, ..memcg(id, usage) }
}

pub(crate) fn no_memcg() -> Memcg {
    Memcg { cgroup_id: UNKNOWN, usage_bytes: UNKNOWN, limit_bytes: UNKNOWN, ..memcg(UNKNOWN, UNKNOWN) }
}

fn anon(bytes: u64) -> Rss {
    Rss { anon_bytes: bytes, file_bytes: 0, shmem_bytes: 0, swap_bytes: 0 }
}

/// `usage` equals what this process holds; no limit.
pub(crate) fn rss(boot_ns: u64, pid: u32, cgroup: u64, mm_id: u64, bytes: u64) -> RssChange {
    RssChange {
        header: header::<RssChange>(boot_ns),
        task: task(pid),
        mm_id,
        memcg: memcg(cgroup, bytes),
        rss: anon(bytes),
        peak_bytes: bytes,
        reason: RSS_MOVED,
        ..RssChange::new_zeroed()
    }
}

/// Small changes to a record.
pub(crate) trait Tweak: Sized {
    fn owned_by(self, tid: u32) -> Self;
    fn reading(self, memcg: Memcg) -> Self;
}

impl Tweak for RssChange {
    fn owned_by(mut self, tid: u32) -> Self {
        self.task.tid = tid;
        self
    }
    fn reading(mut self, memcg: Memcg) -> Self {
        self.memcg = memcg;
        self
    }
}

pub(crate) fn fork(boot_ns: u64, parent: u32, child: u32, cgroup_id: u64, flags: u32) -> Fork {
    Fork { header: header::<Fork>(boot_ns), parent: task(parent), child: task(child), cgroup_id, flags, reserved: 0 }
}

pub(crate) fn exec(boot_ns: u64, pid: u32, cgroup_id: u64, name: &str, _: u32, mm_id: u64) -> Exec {
    Exec { header: header::<Exec>(boot_ns), task: named(pid, name), cgroup_id, mm_id }
}

pub(crate) fn exit(boot_ns: u64, pid: u32, cgroup_id: u64, exit_code: u32) -> Exit {
    Exit {
        header: header::<Exit>(boot_ns),
        task: task(pid),
        memcg: unread(cgroup_id),
        max_rss_bytes: 123 * MIB,
        exit_code,
        reserved: 0,
    }
}

pub(crate) fn mm_gone(boot_ns: u64, pid: u32, mm_id: u64, peak_bytes: u64) -> MmGone {
    MmGone { header: header::<MmGone>(boot_ns), task: task(pid), mm_id, cgroup_id: 0, peak_bytes, grown_bytes: UNKNOWN }
}

pub(crate) fn attach(boot_ns: u64, pid: u32, cgroup_id: u64) -> CgroupAttach {
    CgroupAttach { header: header::<CgroupAttach>(boot_ns), task: task(pid), cgroup_id, whole_process: 1 }
}

pub(crate) fn cgroup(boot_ns: u64, memcg: Memcg, parent_id: u64, name: &str, change: u32) -> CgroupChange {
    let mut path = [0u8; PATH_BYTES];
    path[..name.len()].copy_from_slice(name.as_bytes());
    CgroupChange {
        header: header::<CgroupChange>(boot_ns),
        memcg,
        parent_id,
        change,
        flags: 0,
        path_len: name.len() as u64,
        path,
    }
}

pub(crate) fn mapping(boot_ns: u64, pid: u32, cgroup_id: u64, call: u32, size_bytes: u64) -> Mapping {
    Mapping {
        header: header::<Mapping>(boot_ns),
        task: task(pid),
        cgroup_id,
        size_bytes,
        call,
        ..Mapping::new_zeroed()
    }
}

pub(crate) fn reclaim(boot_ns: u64, pid: u32, memcg: Memcg, phase: u32, duration_ns: u64) -> Reclaim {
    Reclaim { header: header::<Reclaim>(boot_ns), task: task(pid), memcg, duration_ns, phase, ..Reclaim::new_zeroed() }
}

/// A SIGKILL from the kernel while `sender` was running.
pub(crate) fn kill(boot_ns: u64, sender: u32, target: u32, cgroup_id: u64) -> Kill {
    Kill {
        header: header::<Kill>(boot_ns),
        sender: task(sender),
        target: task(target),
        cgroup_id,
        sender_code: SENDER_KERNEL,
        result: 0,
        sender_uid: 0,
        reserved: 0,
    }
}

/// A mark without [`VICTIM_KILLED`]; the cgroup that ran out is `oom`.
pub(crate) fn victim(boot_ns: u64, trigger: u32, pid: u32, own: Memcg, oom: Memcg, bytes: u64) -> OomVictim {
    OomVictim {
        header: header::<OomVictim>(boot_ns),
        trigger: task(trigger),
        victim: task(pid),
        trigger_memcg: own,
        victim_memcg: own,
        oom,
        rss: anon(bytes),
        pagetable_bytes: 4096,
        oom_score_adj: 0,
        scope: if oom.cgroup_id == UNKNOWN { SCOPE_GLOBAL } else { SCOPE_MEMCG },
        flags: 0,
        after_kill_ns: 0,
    }
}

/// A mark that SIGKILL preceded by so many nanoseconds.
pub(crate) fn after_kill(mark: OomVictim, after_kill_ns: u32) -> OomVictim {
    OomVictim { flags: mark.flags | VICTIM_KILLED, after_kill_ns, ..mark }
}

pub(crate) fn decision(boot_ns: u64, trigger: u32, chosen: u32, oom: Memcg, constraint: u32) -> OomDecision {
    OomDecision {
        header: header::<OomDecision>(boot_ns),
        trigger: task(trigger),
        chosen: task(chosen),
        oom,
        constraint,
        order: 0,
    }
}

pub(crate) fn start_fact(settings: Settings) -> Fact {
    let host = Host {
        hostname: "test".into(),
        boot_id: "boot-1".into(),
        cpus: 2,
        page_bytes: 4096,
        charge_batch_bytes: 64 * 4096,
        huge_page_bytes: None,
        ..Host::default()
    };
    Fact::Start { host, settings }
}

/// An engine with everything that it emitted.
pub(crate) struct TestEngine {
    pub(crate) engine: Engine,
    pub(crate) out: Out,
}

impl TestEngine {
    pub(crate) fn new() -> Self {
        Self::with(Settings::default())
    }

    pub(crate) fn with(settings: Settings) -> Self {
        let mut engine = Self { engine: Engine::new(), out: Out::default() };
        engine.fact(start_fact(settings));
        engine.fact(Fact::Anchor { boot_ns: 0, wall_ns: 1_700_000_000_000_000_000, uncertainty_ns: 100 });
        engine
    }

    pub(crate) fn fact(&mut self, fact: Fact) -> &mut Self {
        self.engine.apply(&Input::Fact(fact), &mut self.out);
        self
    }

    pub(crate) fn feed<T: IntoBytes + zerocopy::Immutable>(&mut self, record: &T) -> &mut Self {
        self.engine.apply(&Input::Record(record.as_bytes()), &mut self.out);
        self
    }

    pub(crate) fn tick(&mut self, boot_ns: u64) -> &mut Self {
        self.fact(Fact::Tick { boot_ns })
    }

    pub(crate) fn saved(&self) -> Vec<Incident> {
        let saved = |o: &Output| if let Output::Save(i) = o { Some((**i).clone()) } else { None };
        self.out.outputs.iter().filter_map(saved).collect()
    }

    pub(crate) fn kills(&self) -> Vec<KillEntry> {
        let kill = |o: &Output| if let Output::Kill(k) = o { Some(k.clone()) } else { None };
        self.out.outputs.iter().filter_map(kill).collect()
    }

    pub(crate) fn alerts(&self) -> Vec<Finding> {
        let alert = |o: &Output| if let Output::Alert(f) = o { Some(f.clone()) } else { None };
        self.out.outputs.iter().filter_map(alert).collect()
    }

    pub(crate) fn requests(&self) -> &[Request] {
        &self.out.requests
    }
}
