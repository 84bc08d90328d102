//! From what the model's kernel does to the bytes its hooks would put into a ring.

use memtrace_common::event::*;
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes};

/// Which ring a record goes through.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Ring {
    Ledger,
    Samples,
}

impl Ring {
    /// Name in the loss counters.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Ledger => "ledger/ring_full",
            Self::Samples => "samples/ring_full",
        }
    }
}

/// When and where a hook ran.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Hook {
    pub(crate) ns: u64,
    pub(crate) cpu: u32,
}

/// Fields that could not be read in the whole run, as bits: every record has them unknown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Blind(pub(crate) u32);

impl Blind {
    pub(crate) const FAILCNT: u32 = 1;
    pub(crate) const WATERMARK: u32 = 2;
    pub(crate) const SWAP: u32 = 4;
    pub(crate) const HIGH: u32 = 8;
    pub(crate) const VICTIM_RSS: u32 = 16;
    pub(crate) const PAGETABLES: u32 = 32;
    pub(crate) const OOM_SCORE: u32 = 64;
    pub(crate) const USAGE: u32 = 128;

    pub(crate) fn to(self, field: u32) -> bool {
        self.0 & field != 0
    }

    fn or(self, field: u32, value: u64) -> u64 {
        if self.to(field) { UNKNOWN } else { value }
    }

    /// A reading as it comes out of a hook that is blind to some fields.
    pub(crate) fn memcg(self, m: Memcg) -> Memcg {
        Memcg {
            usage_bytes: self.or(Self::USAGE, m.usage_bytes),
            watermark_bytes: self.or(Self::WATERMARK, m.watermark_bytes),
            failcnt: self.or(Self::FAILCNT, m.failcnt),
            swap_usage_bytes: self.or(Self::SWAP, m.swap_usage_bytes),
            swap_limit_bytes: self.or(Self::SWAP, m.swap_limit_bytes),
            high_bytes: self.or(Self::HIGH, m.high_bytes),
            ..m
        }
    }
}

/// A cgroup whose counters cannot be read, known by its id at most.
pub(crate) fn unread(cgroup_id: u64) -> Memcg {
    Memcg {
        cgroup_id,
        usage_bytes: UNKNOWN,
        limit_bytes: UNKNOWN,
        watermark_bytes: UNKNOWN,
        failcnt: UNKNOWN,
        swap_usage_bytes: UNKNOWN,
        swap_limit_bytes: UNKNOWN,
        high_bytes: UNKNOWN,
    }
}

/// Resident memory nobody could read.
pub(crate) const UNREAD_RSS: Rss =
    Rss { anon_bytes: UNKNOWN, file_bytes: UNKNOWN, shmem_bytes: UNKNOWN, swap_bytes: UNKNOWN };

/// A thread, its name cut as the kernel cuts it.
pub(crate) fn task(tgid: u32, tid: u32, start_boot_ns: u64, name: &str) -> Task {
    let mut comm = [0u8; 16];
    comm.iter_mut().take(15).zip(name.bytes()).for_each(|(to, from)| *to = from);
    Task { tgid, tid, start_boot_ns, comm }
}

fn header<T: WireRecord>(hook: Hook) -> Header {
    let size = u16::try_from(size_of::<T>()).unwrap_or(0);
    Header { kind: T::KIND, size, cpu: hook.cpu, boot_ns: hook.ns }
}

/// A record with its header and all else zero.
pub(crate) fn blank<T: WireRecord + FromZeros + HasHeader>(hook: Hook) -> T {
    let mut record = T::new_zeroed();
    *record.header() = header::<T>(hook);
    record
}

/// Bytes of a record.
pub(crate) fn bytes<T: IntoBytes + Immutable>(record: &T) -> Vec<u8> {
    record.as_bytes().to_vec()
}

/// Records begin with a header.
pub(crate) trait HasHeader {
    fn header(&mut self) -> &mut Header;
}

macro_rules! have_headers {
    ($($record:ty),*) => {
        $(impl HasHeader for $record {
            fn header(&mut self) -> &mut Header {
                &mut self.header
            }
        })*
    };
}

have_headers!(
    RssChange,
    Mapping,
    Reclaim,
    Charge,
    Kill,
    OomVictim,
    Fork,
    Exec,
    Exit,
    MmGone,
    CgroupChange,
    CgroupAttach,
    OomDecision,
    KernelStack
);

/// A path as a cgroup record holds it: bytes, length, flags.
pub(crate) fn path(text: &str) -> ([u8; PATH_BYTES], u64, u32) {
    let mut path = [0u8; PATH_BYTES];
    path.iter_mut().zip(text.bytes()).for_each(|(to, from)| *to = from);
    let used = text.len().min(PATH_BYTES) as u64;
    (path, used, if text.len() > PATH_BYTES { PATH_CUT } else { 0 })
}

/// A record in one line, for people.
pub(crate) fn readable(bytes: &[u8]) -> String {
    let Ok((header, _)) = Header::read_from_prefix(bytes) else { return format!("{} bytes", bytes.len()) };
    let name = KINDS.iter().find(|(kind, ..)| *kind == header.kind).map_or("unknown", |(_, _, name)| *name);
    let who = |t: &Task| format!("{}/{}@{}", t.tgid, t.tid, t.start_boot_ns);
    let rest = match header.kind {
        KIND_RSS => RssChange::read_from_bytes(bytes).ok().map(|r| {
            let (rss, m) = (r.rss, r.memcg);
            format!(
                "{} mm {:x} anon {} file {} shmem {} swap {} cgroup {} usage {} limit {} reason {} flags {}",
                who(&r.task),
                r.mm_id,
                rss.anon_bytes,
                rss.file_bytes,
                rss.shmem_bytes,
                rss.swap_bytes,
                m.cgroup_id,
                m.usage_bytes,
                m.limit_bytes,
                r.reason,
                r.flags
            )
        }),
        KIND_KILL => Kill::read_from_bytes(bytes)
            .ok()
            .map(|r| format!("{} -> {} code {} result {}", who(&r.sender), who(&r.target), r.sender_code, r.result)),
        KIND_OOM_VICTIM => OomVictim::read_from_bytes(bytes).ok().map(|r| {
            let (from, to) = (who(&r.trigger), who(&r.victim));
            format!(
                "{from} -> {to} oom {} scope {} flags {} after {}",
                r.oom.cgroup_id, r.scope, r.flags, r.after_kill_ns
            )
        }),
        KIND_OOM_DECISION => OomDecision::read_from_bytes(bytes)
            .ok()
            .map(|r| format!("{} -> {} oom {}", who(&r.trigger), who(&r.chosen), r.oom.cgroup_id)),
        KIND_FORK => Fork::read_from_bytes(bytes)
            .ok()
            .map(|r| format!("{} -> {} cgroup {} flags {}", who(&r.parent), who(&r.child), r.cgroup_id, r.flags)),
        KIND_EXEC => Exec::read_from_bytes(bytes)
            .ok()
            .map(|r| format!("{} cgroup {} mm {:x}", who(&r.task), r.cgroup_id, r.mm_id)),
        KIND_EXIT => Exit::read_from_bytes(bytes)
            .ok()
            .map(|r| format!("{} cgroup {} code {}", who(&r.task), r.memcg.cgroup_id, r.exit_code)),
        KIND_MM_GONE => MmGone::read_from_bytes(bytes).ok().map(|r| format!("{} mm {:x}", who(&r.task), r.mm_id)),
        KIND_ATTACH => {
            CgroupAttach::read_from_bytes(bytes).ok().map(|r| format!("{} cgroup {}", who(&r.task), r.cgroup_id))
        }
        KIND_CGROUP => CgroupChange::read_from_bytes(bytes)
            .ok()
            .map(|r| format!("{} below {} change {}", r.memcg.cgroup_id, r.parent_id, r.change)),
        KIND_RECLAIM => Reclaim::read_from_bytes(bytes).ok().map(|r| {
            let m = r.memcg;
            format!(
                "{} cgroup {} usage {} limit {} phase {}",
                who(&r.task),
                m.cgroup_id,
                m.usage_bytes,
                m.limit_bytes,
                r.phase
            )
        }),
        _ => Some(String::new()),
    };
    format!("{} {name} cpu {} {}", header.boot_ns, header.cpu, rest.unwrap_or_else(|| "(of a wrong size)".to_owned()))
}
