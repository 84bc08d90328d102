//! With `object` the only file that names aya: loads the programs, attaches them one by one, drains the rings, reads the counters.

use std::os::fd::{AsFd, AsRawFd, RawFd};
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
use super::support::{AttachResult, Cost, Plan};

/// Bytes a single [`Probe::drain`] takes out of the rings at most, so that a storm cannot grow the agent.
const MAX_BATCH_BYTES: usize = 4 << 20;
/// How long to wait for the per-CPU offsets to be learnt.
const PERCPU_PATIENCE: Duration = Duration::from_millis(500);

/// What the kernel side is told, beyond the layout.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Frozen settings.
    pub control: Control,
    /// Size of the ledger ring, bytes (a power of two of pages).
    pub ledger_bytes: u32,
    /// Size of the samples ring, bytes.
    pub samples_bytes: u32,
    /// Size of the stacks ring, bytes.
    pub stacks_bytes: u32,
    /// Address spaces followed at most.
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
        /// File.
        path: String,
        /// Why.
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
}

impl Probe {
    /// Loads `object` and tries every step of the plan, each by the first of its programs the kernel takes.
    ///
    /// What came of each is in the answer; `support::Status` tells whether it is enough. Must run inside a tokio
    /// runtime.
    pub fn load(
        object: &[u8],
        layout: &KernelLayout,
        settings: &Settings,
        plan: &Plan,
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
            .map_max_entries("STACKS", settings.stacks_bytes)
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
        let mut rings = Vec::new();
        for (ring, map, _) in RINGS {
            let map = ebpf.take_map(map).ok_or(ProbeError::Map(map))?;
            let buffer = RingBuf::try_from(map).map_err(|error| ProbeError::Load(error.to_string()))?;
            // SAFETY: the ring owns its map's descriptor, which stays open and the same until the ring is dropped.
            #[expect(unsafe_code, reason = "the one call that makes a ring pollable")]
            let buffer = unsafe { AsyncFd::register_with_interest(buffer, Interest::READABLE) }
                .map_err(|error| ProbeError::Load(format!("failed to poll a ring: {error}")))?;
            rings.push((ring, buffer));
        }
        let results: Vec<(Hook, AttachResult)> = plan
            .steps
            .iter()
            .map(|step| match attach_first(&mut ebpf, &step.programs, &btf) {
                Ok(program) => (step.hook, AttachResult::Attached(program, cost(&ebpf, &program))),
                Err(reason) => (step.hook, AttachResult::Failed(reason)),
            })
            .collect();
        let misses = Misses::of(descriptors(&ebpf, &results).into_iter());
        Ok((Self { ebpf, messages, rings, misses, arena: Vec::new(), slots: Vec::new() }, results))
    }

    /// Waits until a ring wants to be drained.
    pub async fn ready(&mut self) {
        let [(_, ledger), (_, samples), (_, stacks)] = self.rings.as_mut_slice() else {
            return std::future::pending().await;
        };
        tokio::select! {
            Ok(mut guard) = ledger.readable_mut() => guard.clear_ready(),
            Ok(mut guard) = samples.readable_mut() => guard.clear_ready(),
            Ok(mut guard) = stacks.readable_mut() => guard.clear_ready(),
        }
    }

    /// Takes what the rings hold, at most 4 MiB, merged by time.
    ///
    /// Returns the records and whether more is waiting.
    pub fn drain(&mut self) -> (impl Iterator<Item = (Ring, &[u8])>, bool) {
        self.arena.clear();
        self.slots.clear();
        let mut more = false;
        for (ring, buffer) in self.rings.iter_mut().filter(|(ring, _)| *ring != Ring::Stacks) {
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

    /// Lends every record of the stacks ring to `take`, at most `most` of them, in the ring's own memory: what is on a
    /// stack is nobody's to copy. Whether more is waiting.
    pub fn drain_stacks(&mut self, most: usize, mut take: impl FnMut(&[u8])) -> bool {
        let Some((_, buffer)) = self.rings.iter_mut().find(|(ring, _)| *ring == Ring::Stacks) else { return false };
        let buffer = buffer.get_mut();
        for _ in 0..most {
            let Some(item) = buffer.next() else { return false };
            take(&item);
        }
        true
    }

    /// Passes on what the programs have to say (aya-log).
    pub fn pass_messages(&mut self) {
        if let Some(messages) = &mut self.messages {
            messages.flush();
        }
    }

    /// Totals of what the kernel side lost, by `ring/reason` and, of calls that our programs were not run for, by
    /// `hook/not_run`; only those that are not 0.
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

    /// Gives a cgroup a quantum of its own.
    pub fn set_quantum(&mut self, cgroup_id: u64, quantum_bytes: u64) -> Result<(), String> {
        self.put("QUANTA", cgroup_id, quantum_bytes)
    }

    /// Gives a cgroup a sampling step of its own, bytes.
    pub fn set_step(&mut self, cgroup_id: u64, step_bytes: u64) -> Result<(), String> {
        self.put("STEPS", cgroup_id, step_bytes)
    }

    /// Copies this much of the stacks of a process.
    pub fn set_slice(&mut self, pid: u32, slice_bytes: u32) -> Result<(), String> {
        self.put("SLICES", pid, slice_bytes)
    }

    fn put<K: aya::Pod, V: aya::Pod>(&mut self, name: &'static str, key: K, value: V) -> Result<(), String> {
        let map = self.ebpf.map_mut(name).ok_or_else(|| format!("no map {name}"))?;
        let mut map: HashMap<_, K, V> = HashMap::try_from(map).map_err(|error| error.to_string())?;
        map.insert(key, value, 0).map_err(|error| error.to_string())
    }

    /// What stacks have cost; `None` when it cannot be read.
    pub fn stack_budget(&self) -> Option<StackBudget> {
        let map: Array<_, [u8; size_of::<StackBudget>()]> = Array::try_from(self.ebpf.map("STACK_BUDGET")?).ok()?;
        StackBudget::read_from_bytes(&map.get(&0, 0).ok()?).ok()
    }

    /// Tells the kernel side what has been spent here on stacks since the start, nanoseconds.
    pub fn set_user_spent(&mut self, spent_ns: u64) -> Result<(), String> {
        let map = self.ebpf.map_mut("USER_SPENT").ok_or("no map USER_SPENT")?;
        let mut map: Array<_, u64> = Array::try_from(map).map_err(|error| error.to_string())?;
        map.set(0, spent_ns, 0).map_err(|error| error.to_string())
    }

    /// Memory of every map, rings included, as the kernel accounts it; `None` when it does not say.
    pub fn map_bytes(&self) -> Option<u64> {
        let mut total = 0u64;
        let maps = self.ebpf.maps().filter_map(|(_, map)| map_fd(map));
        let rings = self.rings.iter().map(|(_, ring)| ring.get_ref().as_fd().as_raw_fd());
        for fd in maps.chain(rings) {
            let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{fd}")).ok()?;
            total = total.saturating_add(field(&info, "memlock:")?);
        }
        Some(total)
    }
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

/// Loads and attaches the first program of the list the kernel takes; else every refusal.
fn attach_first(ebpf: &mut Ebpf, programs: &[Program], btf: &Btf) -> Result<Program, String> {
    let mut refusals = Vec::new();
    for program in programs {
        let refused = program.all().find_map(|one| Some(format!("{}: {}", one.attach, attach(ebpf, one, btf).err()?)));
        match refused {
            None => return Ok(*program),
            Some(reason) => refusals.push(reason),
        }
        program.all().for_each(|one| unload(ebpf, one));
    }
    Err(refusals.join("; "))
}

/// Takes back what was attached of a set that is not complete.
fn unload(ebpf: &mut Ebpf, program: &Program) {
    // Of what was never loaded there is nothing to take back.
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
        let AttachResult::Attached(program, _) = result else { continue };
        let fds = program.all().filter_map(|one| Some(ebpf.program(one.name)?.fd().ok()?.as_fd().as_raw_fd()));
        found.extend(fds.map(|fd| (*hook, fd)));
    }
    found
}

/// Of a program with what is attached with it. Nothing hangs on it: what the kernel does not tell is unknown.
fn cost(ebpf: &Ebpf, program: &Program) -> Cost {
    let infos: Option<Vec<_>> = program.all().map(|one| ebpf.program(one.name)?.info().ok()).collect();
    let Some(infos) = infos else { return Cost::default() };
    let sum = |of: fn(&ProgramInfo) -> Option<u32>| infos.iter().map(of).sum();
    Cost {
        verified_instructions: sum(ProgramInfo::verified_instruction_count),
        jited_bytes: sum(|info| Some(info.size_jitted()).filter(|bytes| *bytes > 0)),
    }
}

/// An error with its causes on one line; of a verifier log only the end.
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
        if !text.contains(&message) {
            if !text.is_empty() {
                text.push_str(": ");
            }
            text.push_str(&message);
        }
        next = error.source();
    }
    text
}
