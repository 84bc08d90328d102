//! The loaded programs: attaches them one by one, drains the rings, reads the counters.
//!
//! With `object` and its own parts the only file that names aya.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::path::Path;
use std::time::Duration;

use aya::maps::{Array, HashMap, Map, MapData, PerCpuArray, RingBuf};
use aya::programs::{FEntry, FExit, KProbe, Program as AyaProgram, ProgramError, ProgramInfo, RawTracePoint};
use aya::{Btf, Ebpf, EbpfLoader};
use aya_log::EbpfLogger;
use memtrace_common::control::{
    CONTROL, Control, LAYOUT, LOSS_LABELS, LOSS_REASONS, MAX_CPUS, RINGS, Ring, StackBudget,
};
use memtrace_common::event::{Header, MAX_RECORD_BYTES};
use memtrace_common::layout::KernelLayout;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tracing::debug;
use zerocopy::{FromBytes, IntoBytes};

use super::hooks::{Attach, Hook, Program};
use super::misses::{Misses, field};
use super::status::{AttachResult, ProgramCost};
use super::support::{AttachPlan, ProgramRefusal};

pub mod stack_ring;

/// Bytes a single [`Probe::drain`] takes out of the rings at most, so that a storm cannot grow the agent.
const MAX_BATCH_BYTES: usize = 4 << 20;
/// The map of the ring that is drained by [`stack_ring::StackRing`].
const STACKS: &str = "STACKS";
/// How long to wait for the per-CPU offsets to be learnt.
const PERCPU_PATIENCE: Duration = Duration::from_millis(500);
/// Longest reason for which a program was refused, bytes. A verifier log can be 16 MiB.
const MAX_REASON_BYTES: usize = 1024;

/// What the kernel side is given, beside the layout.
#[derive(Clone, Copy, Debug)]
pub struct ProbeSettings {
    /// Settings that are frozen into the programs.
    pub control: Control,
    /// Size of the ledger ring, bytes (a power of two of pages).
    pub ledger_bytes: u32,
    /// Size of the samples ring, bytes (likewise).
    pub samples_bytes: u32,
    /// Size of the stacks ring, bytes (likewise).
    pub stacks_bytes: u32,
    /// Address spaces that are followed at most.
    pub max_processes: u32,
}

/// Why nothing could be loaded.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// The object or its maps were refused.
    #[error("failed to load the eBPF object: {0}")]
    Load(String),
    /// The BTF file could not be used.
    #[error("failed to read kernel type information from {path}: {reason}")]
    Btf {
        /// The file.
        path: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A map is missing from the object or of the wrong kind.
    #[error("the eBPF object has no usable map {0}")]
    Map(&'static str),
}

/// One record of a batch: where it lies in the arena.
#[derive(Clone, Copy)]
struct Slot {
    boot_ns: u64,
    ring: Ring,
    start: usize,
    len: usize,
}

/// The loaded programs and their rings. Dropping it detaches everything.
pub struct Probe {
    ebpf: Ebpf,
    messages: Option<EbpfLogger<&'static dyn log::Log>>,
    rings: Vec<(Ring, AsyncFd<RingBuf<MapData>>)>,
    misses: Misses,
    arena: Vec<u8>,
    slots: Vec<Slot>,
    map_bytes: Option<u64>,
}

impl Probe {
    /// Loads `object` and tries every step of the plan, each by the first of its programs the kernel takes.
    ///
    /// Returns what came of each step; `status::Status` says whether it is enough. Must run inside
    /// a tokio runtime.
    pub fn load(
        object: &[u8],
        layout: &KernelLayout,
        settings: &ProbeSettings,
        plan: &AttachPlan,
        btf: Option<&Path>,
    ) -> Result<(Self, Vec<(Hook, AttachResult)>), ProbeError> {
        let btf = match btf {
            None => Btf::from_sys_fs()
                .map_err(|error| ProbeError::Btf { path: "/sys/kernel/btf/vmlinux".into(), reason: error.to_string() }),
            Some(path) => Btf::parse_file(path, aya::Endianness::default())
                .map_err(|error| ProbeError::Btf { path: path.display().to_string(), reason: error.to_string() }),
        }?;
        let layout = layout_bytes(layout);
        let mut loader = EbpfLoader::new();
        loader
            .btf(Some(&btf))
            .override_global(LAYOUT, layout.as_slice(), true)
            .override_global(CONTROL, settings.control.as_bytes(), true)
            .map_max_entries("LEDGER", settings.ledger_bytes)
            .map_max_entries("SAMPLES", settings.samples_bytes)
            .map_max_entries(STACKS, settings.stacks_bytes)
            .map_max_entries("AYA_LOGS", 1 << 14)
            .map_max_entries("SCRATCH", settings.control.cpus.max(1))
            .map_max_entries("MMS", settings.max_processes);
        let mut ebpf = loader.load(object).map_err(|error| ProbeError::Load(chain(&error)))?;
        // Messages of the programs are rare and for people: without them everything still works.
        let mut messages = EbpfLogger::init(&mut ebpf).inspect_err(|error| debug!("no messages: {error}")).ok();
        learn_percpu_offsets(&mut ebpf, &settings.control)?;
        if let Some(messages) = &mut messages {
            messages.flush();
        }

        // Rings first: a hook may fire as soon as it is attached.
        // The third one, of stacks, is drained elsewhere: see `stack_ring`.
        let mut rings = Vec::new();
        for (ring, map, _) in RINGS.into_iter().filter(|(ring, ..)| *ring != Ring::Stacks) {
            let map = ebpf.take_map(map).ok_or(ProbeError::Map(map))?;
            let buffer = RingBuf::try_from(map).map_err(|error| ProbeError::Load(error.to_string()))?;
            // SAFETY: the ring owns its map's descriptor, which stays open and the same until the ring is dropped.
            #[expect(unsafe_code, reason = "the one call that makes a ring pollable")]
            let buffer = unsafe { AsyncFd::register_with_interest(buffer, Interest::READABLE) }
                .map_err(|error| ProbeError::Load(format!("failed to poll a ring: {error}")))?;
            rings.push((ring, buffer));
        }
        let results: Vec<(Hook, AttachResult)> =
            plan.steps.iter().map(|step| (step.hook, attach_first(&mut ebpf, &step.programs, &btf))).collect();
        let misses = Misses::of(descriptors(&ebpf, &results).into_iter());
        let map_bytes = map_bytes(&ebpf, &rings);
        Ok((Self { ebpf, messages, rings, misses, arena: Vec::new(), slots: Vec::new(), map_bytes }, results))
    }

    /// Waits until a ring has woken its reader.
    pub async fn ready(&mut self) {
        let [(_, ledger), (_, samples)] = self.rings.as_mut_slice() else {
            return std::future::pending().await;
        };
        tokio::select! {
            Ok(mut guard) = ledger.readable_mut() => guard.clear_ready(),
            Ok(mut guard) = samples.readable_mut() => guard.clear_ready(),
        }
    }

    /// Takes what the rings hold, at most 4 MiB, merged by time.
    ///
    /// Returns the records and whether more is waiting.
    pub fn drain(&mut self) -> (impl Iterator<Item = (Ring, &[u8])>, bool) {
        self.arena.clear();
        self.slots.clear();
        let mut more = false;
        for (ring, buffer) in &mut self.rings {
            let buffer = buffer.get_mut();
            loop {
                if self.arena.len() >= MAX_BATCH_BYTES {
                    more = true;
                    break;
                }
                let Some(item) = buffer.next() else { break };
                let bytes = item.get(..item.len().min(MAX_RECORD_BYTES)).unwrap_or_default();
                let boot_ns = Header::read_from_prefix(bytes).map_or(0, |(header, _)| header.boot_ns);
                let slot = Slot { boot_ns, ring: *ring, start: self.arena.len(), len: bytes.len() };
                self.arena.extend_from_slice(bytes);
                self.slots.push(slot);
            }
        }
        // Stable: records of one ring with equal times keep the kernel's order.
        self.slots.sort_by_key(|slot| (slot.boot_ns, slot.ring));
        let arena = &self.arena;
        let records = self
            .slots
            .iter()
            .filter_map(|slot| Some((slot.ring, arena.get(slot.start..slot.start.checked_add(slot.len)?)?)));
        (records, more)
    }

    /// Gives back what the last batches took: those of a storm are large.
    pub fn give_memory_back(&mut self) {
        self.arena = Vec::new();
        self.slots = Vec::new();
    }

    /// The descriptor of the STACKS ring, for [`stack_ring::StackRing`].
    pub fn stacks_fd(&self) -> Option<BorrowedFd<'_>> {
        self.ebpf.maps().find_map(|(name, map)| match map {
            Map::RingBuf(data) if name == STACKS => Some(data.fd().as_fd()),
            _ => None,
        })
    }

    /// Passes messages of the programs (aya-log) to this process' log.
    pub fn pass_messages(&mut self) {
        if let Some(messages) = &mut self.messages {
            messages.flush();
        }
    }

    /// Totals of what the kernel side lost since the start, without those that are 0: records by
    /// `ring/reason`, and calls that a program was not run for by `hook/not_run`.
    pub fn losses(&self) -> Vec<(String, u64)> {
        let Some(Ok(losses)) = self.ebpf.map("LOSSES").map(PerCpuArray::<_, u64>::try_from) else {
            return vec![("counters unreadable".to_owned(), 1)];
        };
        let mut totals = Vec::new();
        for (ring, _, label) in RINGS {
            for (reason, reason_label) in LOSS_LABELS.iter().enumerate() {
                let index = ring as u32 * LOSS_REASONS + reason as u32;
                let total = sum(&losses, index);
                if total > 0 {
                    totals.push((format!("{label}/{reason_label}"), total));
                }
            }
        }
        totals.extend(self.misses.totals());
        totals
    }

    /// Records put into each ring since the start, by ring label.
    pub fn sent(&self) -> Vec<(&'static str, u64)> {
        let Some(Ok(sent)) = self.ebpf.map("SENT").map(PerCpuArray::<_, u64>::try_from) else {
            return Vec::new();
        };
        RINGS.iter().map(|(ring, _, label)| (*label, sum(&sent, *ring as u32))).collect()
    }

    /// Gives a cgroup an RSS threshold of its own.
    pub fn set_rss_threshold(&mut self, cgroup_id: u64, threshold_bytes: u64) -> Result<(), String> {
        self.put("RSS_THRESHOLDS", cgroup_id, threshold_bytes)
    }

    /// Gives a cgroup a sample interval of its own.
    pub fn set_sample_interval(&mut self, cgroup_id: u64, interval_bytes: u64) -> Result<(), String> {
        self.put("SAMPLE_INTERVALS", cgroup_id, interval_bytes)
    }

    /// Sets how much of its threads' stacks is copied for a process.
    pub fn set_stack_copy(&mut self, pid: u32, copy_bytes: u32) -> Result<(), String> {
        self.put("STACK_COPIES", pid, copy_bytes)
    }

    fn put<K: aya::Pod, V: aya::Pod>(&mut self, name: &'static str, key: K, value: V) -> Result<(), String> {
        let map = self.ebpf.map_mut(name).ok_or_else(|| format!("no map {name}"))?;
        let mut map: HashMap<_, K, V> = HashMap::try_from(map).map_err(|error| error.to_string())?;
        map.insert(key, value, 0).map_err(|error| error.to_string())
    }

    /// What stacks have cost in the kernel; `None` when it cannot be read.
    pub fn stack_budget(&self) -> Option<StackBudget> {
        let map: Array<_, [u8; size_of::<StackBudget>()]> = Array::try_from(self.ebpf.map("STACK_BUDGET")?).ok()?;
        StackBudget::read_from_bytes(&map.get(&0, 0).ok()?).ok()
    }

    /// Sets what userspace has spent on stacks since the start, nanoseconds: it counts against the
    /// kernel side's budget.
    pub fn set_user_spent(&mut self, spent_ns: u64) -> Result<(), String> {
        let map = self.ebpf.map_mut("USER_SPENT").ok_or("no map USER_SPENT")?;
        let mut map: Array<_, u64> = Array::try_from(map).map_err(|error| error.to_string())?;
        map.set(0, spent_ns, 0).map_err(|error| error.to_string())
    }

    /// Memory of all maps in bytes, rings included, as the kernel accounts it; `None` when it does
    /// not say.
    pub fn map_bytes(&self) -> Option<u64> {
        self.map_bytes
    }
}

/// What [`Probe::map_bytes`] says. Each map takes its memory when it is made.
fn map_bytes(ebpf: &Ebpf, rings: &[(Ring, AsyncFd<RingBuf<MapData>>)]) -> Option<u64> {
    let maps = ebpf.maps().filter_map(|(_, map)| map_fd(map));
    let rings = rings.iter().map(|(_, ring)| ring.get_ref().as_fd().as_raw_fd());
    let mut total = 0u64;
    for fd in maps.chain(rings) {
        let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{fd}")).ok()?;
        total = total.saturating_add(field(&info, "memlock:")?);
    }
    Some(total)
}

/// The layout as the bytes of its frozen global: every field is a `u32`, in order.
fn layout_bytes(layout: &KernelLayout) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(size_of::<KernelLayout>());
    layout.each(|_, value| bytes.extend_from_slice(&value.to_ne_bytes()));
    bytes
}

fn sum<T: std::borrow::Borrow<MapData>>(array: &PerCpuArray<T, u64>, index: u32) -> u64 {
    array.get(&index, 0).map_or(0, |values| values.iter().sum())
}

fn map_fd(map: &Map) -> Option<i32> {
    let data = match map {
        Map::Array(data) | Map::HashMap(data) | Map::LruHashMap(data) | Map::PerCpuArray(data) | Map::RingBuf(data) => {
            data
        }
        _ => return None,
    };
    Some(data.fd().as_fd().as_raw_fd())
}

/// Runs `percpu_init` once, so that RSS counters can be summed; nothing to do where counters are not per CPU.
fn learn_percpu_offsets(ebpf: &mut Ebpf, control: &Control) -> Result<(), ProbeError> {
    if control.percpu_lookup == 0 {
        return Ok(());
    }
    let program: &mut RawTracePoint = ebpf
        .program_mut("percpu_init")
        .ok_or(ProbeError::Map("percpu_init"))?
        .try_into()
        .map_err(|error: ProgramError| ProbeError::Load(chain(&error)))?;
    program.load().map_err(|error| ProbeError::Load(chain(&error)))?;
    let link = program.attach("sched_switch").map_err(|error| ProbeError::Load(chain(&error)))?;
    let begin = std::time::Instant::now();
    let mut learnt = false;
    while !learnt && begin.elapsed() < PERCPU_PATIENCE {
        // Sleeping is a context switch: the program runs.
        std::thread::sleep(Duration::from_millis(1));
        let map = ebpf.map("PERCPU_OFFSETS").ok_or(ProbeError::Map("PERCPU_OFFSETS"))?;
        let offsets: Array<_, u64> = Array::try_from(map).map_err(|error| ProbeError::Load(error.to_string()))?;
        learnt = (0..control.cpus.min(MAX_CPUS)).all(|cpu| offsets.get(&cpu, 0).is_ok_and(|offset| offset != 0));
    }
    if let Some(Ok(program)) = ebpf.program_mut("percpu_init").map(<&mut RawTracePoint>::try_from) {
        program.detach(link).map_err(|error| ProbeError::Load(chain(&error)))?;
        program.unload().map_err(|error| ProbeError::Load(chain(&error)))?;
    }
    if learnt { Ok(()) } else { Err(ProbeError::Load("the per-CPU offsets were not learnt in time".into())) }
}

/// Loads and attaches the first program of the list that the kernel takes.
fn attach_first(ebpf: &mut Ebpf, programs: &[Program], btf: &Btf) -> AttachResult {
    let (mut refused, mut reasons) = (Vec::new(), Vec::new());
    for program in programs {
        let refusal = program.all().find_map(|one| Some((one, attach(ebpf, one, btf).err()?)));
        let Some((one, reason)) = refusal else {
            return AttachResult::Attached { program: *program, cost: cost(ebpf, program), refused };
        };
        let named = format!("{}: {}", one.attach, bounded(&reason));
        let reason = if one == program { bounded(&reason) } else { named.clone() };
        refused.push(ProgramRefusal { program: *program, reason });
        reasons.push(named);
        program.all().for_each(|one| unload(ebpf, one));
    }
    AttachResult::Failed(reasons.join("; "))
}

/// A reason cut to [`MAX_REASON_BYTES`] in the middle: what was tried stands first, what the kernel
/// said last.
fn bounded(reason: &str) -> String {
    let half = MAX_REASON_BYTES / 2;
    if reason.len() <= MAX_REASON_BYTES {
        return reason.to_owned();
    }
    let head = reason.get(..reason.floor_char_boundary(half)).unwrap_or_default();
    let tail = reason.get(reason.ceil_char_boundary(reason.len().saturating_sub(half))..).unwrap_or_default();
    format!("{head} ... {tail}")
}

/// Detaches and unloads a program of a set that could not be attached as a whole.
fn unload(ebpf: &mut Ebpf, program: &Program) {
    // A program that was never loaded is an error here, and nothing to undo.
    let _ = match ebpf.program_mut(program.name) {
        Some(AyaProgram::FEntry(fentry)) => fentry.unload(),
        Some(AyaProgram::FExit(fexit)) => fexit.unload(),
        Some(AyaProgram::KProbe(kprobe)) => kprobe.unload(),
        _ => Ok(()),
    };
}

fn attach(ebpf: &mut Ebpf, program: &Program, btf: &Btf) -> Result<(), String> {
    let loaded = ebpf.program_mut(program.name).ok_or("not in the eBPF object")?;
    let result = match (loaded, program.attach) {
        (AyaProgram::RawTracePoint(raw), Attach::RawTracepoint(name)) => {
            raw.load().and_then(|()| raw.attach(name)).map(|_| ())
        }
        (AyaProgram::BtfTracePoint(typed), Attach::TypedTracepoint(name)) => {
            typed.load(name, btf).and_then(|()| typed.attach()).map(|_| ())
        }
        (AyaProgram::FEntry(fentry), Attach::Fentry(function)) => {
            fentry.load(function.name, btf).and_then(|()| FEntry::attach(fentry)).map(|_| ())
        }
        (AyaProgram::FExit(fexit), Attach::Fexit(function)) => {
            fexit.load(function.name, btf).and_then(|()| FExit::attach(fexit)).map(|_| ())
        }
        (AyaProgram::KProbe(kprobe), Attach::Kprobe(function)) => {
            kprobe.load().and_then(|()| KProbe::attach(kprobe, function.name, 0)).map(|_| ())
        }
        _ => return Err("is of another kind in the eBPF object".to_owned()),
    };
    result.map_err(|error| chain(&error))
}

/// Descriptors of the programs that are attached, by hook.
fn descriptors(ebpf: &Ebpf, results: &[(Hook, AttachResult)]) -> Vec<(Hook, RawFd)> {
    let mut found = Vec::new();
    for (hook, result) in results {
        let AttachResult::Attached { program, .. } = result else { continue };
        let fds = program.all().filter_map(|one| Some(ebpf.program(one.name)?.fd().ok()?.as_fd().as_raw_fd()));
        found.extend(fds.map(|fd| (*hook, fd)));
    }
    found
}

/// Verifier and JIT cost of a program and of what is attached with it. Best effort: what the kernel
/// does not say stays `None`.
fn cost(ebpf: &Ebpf, program: &Program) -> ProgramCost {
    let infos: Option<Vec<_>> = program.all().map(|one| ebpf.program(one.name)?.info().ok()).collect();
    let Some(infos) = infos else { return ProgramCost::default() };
    let sum = |of: fn(&ProgramInfo) -> Option<u32>| infos.iter().map(of).sum();
    ProgramCost {
        verified_instructions: sum(ProgramInfo::verified_instruction_count),
        jited_bytes: sum(|info| Some(info.size_jitted()).filter(|bytes| *bytes > 0)),
    }
}

/// An error with its causes on one line. Of a verifier log the first line and the last three that
/// are no statistics: what the verifier objects to is at the end.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = String::new();
    let mut next = Some(error);
    while let Some(error) = next {
        let message = error.to_string();
        // The statistics a verifier log ends with are behind what it objects to.
        let statistics = ["verification time", "stack depth", "processed "];
        let telling = |line: &&str| !line.is_empty() && !statistics.iter().any(|text| line.starts_with(text));
        let lines: Vec<&str> = message.lines().map(str::trim).filter(telling).collect();
        let message = match lines.as_slice() {
            [first, .., third, second, last] => format!("{first} ... {third} | {second} | {last}"),
            lines => lines.join(" | "),
        };
        // A refusal before the verifier looked has an empty log.
        let message = message.trim_end_matches(" Verifier output:");
        if !text.contains(message) {
            if !text.is_empty() {
                text.push_str(": ");
            }
            text.push_str(message);
        }
        next = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("the BPF_PROG_LOAD syscall failed. Verifier output: {0}")]
    struct Refused(String);

    #[test]
    fn of_a_verifier_log_what_it_objects_to_is_left() {
        let log = "func#0 @0\n0: R1=ctx()\n1: (79) r1 = *(u64 *)(r1 +0)\ninvalid access to map value\n\
                   verification time 3 usec\nstack depth 16\nprocessed 2 insns\n";
        let text = chain(&Refused(log.into()));
        assert!(text.starts_with("the BPF_PROG_LOAD syscall failed. Verifier output: func#0 @0 ... "), "{text}");
        assert!(text.ends_with("| invalid access to map value"), "{text}");
        assert_eq!(chain(&Refused(String::new())), "the BPF_PROG_LOAD syscall failed.");
    }

    #[test]
    fn a_reason_is_bounded_and_keeps_both_ends() {
        assert_eq!(bounded("Operation not permitted"), "Operation not permitted");
        let text = bounded(&format!("load: {}: invalid access", "\u{e4}".repeat(10_000)));
        assert!(text.starts_with("load: ") && text.ends_with(": invalid access"));
        assert!(text.len() <= MAX_REASON_BYTES + " ... ".len());
    }
}
