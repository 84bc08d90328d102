//! What this machine offers a tracer, and attaching to it.
//!
//! Nothing is decided by the kernel's version. [`detect`] gathers facts: the kernel's types, its
//! tracepoints, the memory controller, this process' privileges. The kernel room makes a plan of
//! them: which program serves each hook. [`attach`] carries the plan out, or fails with everything
//! that is missing. `memtrace doctor` runs both halves and shows what they found.

use std::path::Path;

use memtrace_common::control::{Control, MAX_CPUS};
use memtrace_common::layout::{ABSENT, KernelLayout};
use rustix::process::{Resource, getrlimit};
use rustix::thread::CapabilitySet;

use super::SessionConfig;
use crate::cgroup::hierarchy::{CgroupError, Hierarchy, shown};
use crate::error::CommandError;
use crate::host;
use crate::kernel::hooks::Hook;
use crate::kernel::probe::{self, Probe};
use crate::kernel::status::Status;
use crate::kernel::support::{AttachPlan, KernelFacts, MemoryController, plan};
use crate::kernel::{facts, object};

/// Bytes of a user stack that are copied at first, where it is that deep. Most stacks are not;
/// userspace asks for more where one was cut off.
const STACK_COPY_BYTES: u32 = 32 << 10;
/// Sample interval of cgroups whose stacks are not taken: more than any process grows.
const NEVER_BYTES: u64 = 1 << 50;
/// THREAD_SIZE of x86_64 and of aarch64 with 4 KiB pages. Only used without bpf_task_pt_regs: the
/// eBPF side checks the registers that it finds there, so a kernel with another size (KASAN) gets
/// no user stacks, not wrong ones.
const THREAD_BYTES: u32 = 16 << 10;
/// Least time between two reclaim records of one CPU, nanoseconds.
const RECLAIM_INTERVAL_NS: u64 = 5_000_000;
/// Size of the LEDGER ring, bytes.
const LEDGER_BYTES: u32 = 1 << 20;

/// What this machine offers a tracer.
pub struct Capabilities {
    /// The hierarchy of the memory controller, or why there is none.
    pub hierarchy: Result<Hierarchy, CgroupError>,
    /// Everything that a plan is made of.
    pub facts: KernelFacts,
}

/// Looks at the machine; changes nothing, and never fails. `btf` is a file of kernel types to read
/// instead of the running kernel's own.
pub fn detect(btf: Option<&Path>) -> Capabilities {
    let hierarchy = Hierarchy::find();
    let controller = hierarchy.as_ref().map_err(ToString::to_string).map(|hierarchy| MemoryController {
        version: hierarchy.version,
        hierarchy_id: hierarchy.hierarchy_id,
        mount: shown(&hierarchy.mount),
    });
    Capabilities { facts: facts::gather(btf, controller), hierarchy }
}

/// Loads and attaches what the machine allows. Tracing lasts as long as the probe lives.
///
/// Must run inside a tokio runtime. [`CommandError::Unsupported`]: this kernel or these privileges
/// cannot do it.
pub fn attach(capabilities: Capabilities, config: &SessionConfig) -> anyhow::Result<(Hierarchy, Probe, Status)> {
    let Capabilities { hierarchy, facts } = capabilities;
    let plan = plan(&facts, &config.without);
    ensure_runnable(&Status::new(&plan, &[]))?;
    let unsupported = |what: &str| CommandError::Unsupported(what.to_owned());
    // Without a hierarchy or a layout the plan is fatal already.
    let hierarchy = hierarchy.map_err(|error| unsupported(&error.to_string()))?;
    let layout = facts.layout.as_ref().ok_or_else(|| unsupported("the kernel's types are not known"))?;
    let object = object::ebpf_object().ok_or_else(|| {
        unsupported("this binary was built without its eBPF programs; build it with `cargo xtask build`")
    })?;
    // Only while loading: a command that is started later gets the limit as it was.
    let _memlock = host::raise_memlock();
    let settings = probe::ProbeSettings {
        control: control(&hierarchy, &facts, layout, &plan, config),
        ledger_bytes: LEDGER_BYTES,
        samples_bytes: u32::try_from(config.samples_ring_bytes).unwrap_or(4 << 20),
        stacks_bytes: config.stacks_ring_bytes,
        max_processes: config.max_processes,
    };
    let held = facts.privileges.held;
    let (probe, results) = Probe::load(object, layout, &settings, &plan, config.btf.as_deref())
        .map_err(|error| CommandError::Unsupported(format!("{error}{}", locked_memory(held))))?;
    let status = Status::new(&plan, &results);
    ensure_runnable(&status)?;
    Ok((hierarchy, probe, status))
}

/// What may be behind a failure to load.
fn locked_memory(held: CapabilitySet) -> &'static str {
    let is_limited = getrlimit(Resource::Memlock).current.is_some();
    if is_limited && !held.contains(CapabilitySet::SYS_RESOURCE) {
        "; no CAP_SYS_RESOURCE: before Linux 5.11 maps must fit into the limit of locked memory (give \
         CAP_SYS_RESOURCE or raise RLIMIT_MEMLOCK)"
    } else {
        ""
    }
}

/// The constants that the programs are loaded with.
fn control(
    hierarchy: &Hierarchy,
    facts: &KernelFacts,
    layout: &KernelLayout,
    plan: &AttachPlan,
    config: &SessionConfig,
) -> Control {
    Control {
        rss_threshold_bytes: config.rss_threshold_bytes,
        mapping_bytes: config.rss_threshold_bytes.saturating_mul(4),
        mm_salt: host::salt(),
        memory_hierarchy_id: hierarchy.hierarchy_id,
        cpus: host::possible_cpus().min(MAX_CPUS),
        page_shift: rustix::param::page_size().trailing_zeros(),
        percpu_lookup: u32::from(facts.percpu_lookup && sums_slots(layout)),
        exit_mmap: u32::from(plan.steps.iter().any(|step| step.hook == Hook::ExitMmap)),
        task_pt_regs: u32::from(facts.task_pt_regs),
        reclaim_interval_ns: RECLAIM_INTERVAL_NS,
        sample_interval_bytes: match (config.stack_budget_ppm, config.sample_all) {
            (0, _) => 0,
            (_, true) => config.sample_interval_bytes,
            (_, false) => NEVER_BYTES,
        },
        stack_budget_ppm: config.stack_budget_ppm,
        stack_copy_bytes: STACK_COPY_BYTES,
        thread_bytes: THREAD_BYTES,
        rss_from_charges: u32::from(plan.left_out.contains(&Hook::Rss)),
        reserved: 0,
    }
}

/// Whether the RSS counters have a slot for each CPU on this kernel, and all of them can be found.
fn sums_slots(layout: &KernelLayout) -> bool {
    let found = [layout.bpf_array_pptrs, layout.percpu_counter_counters, layout.percpu_counter_size];
    layout.rss_is_percpu == 1 && found.iter().all(|field| *field != ABSENT) && host::possible_cpus() <= MAX_CPUS
}

/// Fails with everything that keeps memtrace from running, and what to do about it.
fn ensure_runnable(status: &Status) -> Result<(), CommandError> {
    if status.can_run() {
        return Ok(());
    }
    let problems: Vec<String> = status.fatal.iter().map(ToString::to_string).collect();
    Err(CommandError::Unsupported(format!("this machine cannot be traced: {}", problems.join("; "))))
}
