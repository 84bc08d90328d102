//! What this kernel and these privileges allow: facts in, a plan out. Pure.
//!
//! Nothing is decided by kernel version. A hook is planned when the facts it needs are there;
//! whether the kernel then takes its programs is found out by trying them, one by one, in order of
//! preference. Take `oom_decision`: a kernel whose BTF has `oom_kill_process` gets fentry first and
//! a kprobe second; one whose BTF lacks the function (it is static) gets the kprobe alone, and the
//! plan remembers why fentry was passed over. What became of a plan is in `status`.

use std::collections::{BTreeMap, BTreeSet};

use memtrace_common::layout::{ABSENT, KernelLayout};
use rustix::thread::CapabilitySet;
use serde::ser::SerializeMap;
use serde::{Serialize, Serializer};

use super::hooks::{Attach, Hook, HookNeed, Program};
use crate::own_process::capability::{self, CAPABILITIES, Capability, CapabilityNeed};

/// What was found out about the kernel and this process before anything is loaded.
#[derive(Clone, Debug, Default)]
pub struct KernelFacts {
    /// Kernel release (`uname -r`): shown, nothing is decided by it.
    pub kernel: String,
    /// Architecture (`uname -m`).
    pub arch: String,
    /// Where the kernel's types were read from, or why they were not.
    pub btf: Option<Result<String, String>>,
    /// Offsets of the fields that are read; `None` without BTF.
    pub layout: Option<KernelLayout>,
    /// Required layout fields that this kernel does not have.
    pub missing: Vec<String>,
    /// Those tracepoints of the hooks that the kernel has.
    pub tracepoints: BTreeSet<&'static str>,
    /// False when the BTF is cut down and names no tracepoint at all: then every one is tried.
    pub tracepoints_known: bool,
    /// Those functions of the hooks that the kernel's BTF has, with their numbers of parameters.
    pub functions: BTreeMap<&'static str, u32>,
    /// The kernel has bpf_map_lookup_percpu_elem (5.19), by which per-CPU counters are summed.
    pub percpu_lookup: bool,
    /// The kernel has bpf_task_pt_regs (5.15).
    pub task_pt_regs: bool,
    /// The memory controller's hierarchy, or why there is none.
    pub cgroup: Option<Result<MemoryController, String>>,
    /// What this process may do.
    pub privileges: Privileges,
    /// /sys/kernel/security/lockdown: `none`, `integrity`, `confidentiality`; `None` when it cannot be read.
    pub lockdown: Option<String>,
}

/// Where the memory controller is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct MemoryController {
    /// cgroup version: 1 or 2.
    pub version: u32,
    /// Number of its hierarchy; 0 on version 2.
    pub hierarchy_id: u32,
    /// Where it is mounted.
    pub mount: String,
}

/// Effective privileges.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Privileges {
    /// Effective user id.
    pub euid: u32,
    /// Effective capabilities.
    pub held: CapabilitySet,
}

impl Default for Privileges {
    fn default() -> Self {
        Self { euid: 0, held: CapabilitySet::empty() }
    }
}

/// `euid`, and `cap_NAME` for each capability of the table and for CAP_SYS_ADMIN, which can stand in.
impl Serialize for Privileges {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("euid", &self.euid)?;
        let stands_in = ("SYS_ADMIN", CapabilitySet::SYS_ADMIN);
        for (name, bit) in CAPABILITIES.iter().map(|one| (one.name, one.bit)).chain([stands_in]) {
            map.serialize_entry(&format!("cap_{}", name.to_lowercase()), &self.held.contains(bit))?;
        }
        map.end()
    }
}

impl Privileges {
    /// The capabilities without which nothing works, if one is missing.
    fn required(&self) -> Option<Problem> {
        let missing: Vec<_> = capability::missing(self.held, CapabilityNeed::Required).collect();
        let lost = missing.first()?.lost;
        let names: Vec<_> = missing.iter().map(|one| format!("CAP_{}", one.name)).collect();
        let names = names.join(" and ");
        Some(Problem::new(format!("no {names}: {lost}"), Some(&format!("run as root or give {names}"))))
    }

    /// The others that are missing, with what is lost without each.
    fn lost(&self) -> impl Iterator<Item = Problem> {
        let problem = |one: &Capability| {
            Problem::new(format!("no CAP_{}: {}", one.name, one.lost), Some(&format!("give CAP_{}", one.name)))
        };
        capability::missing(self.held, CapabilityNeed::Optional).map(problem)
    }
}

/// Something that is missing or in the way, and what to do about it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Problem {
    /// What is wrong, one sentence.
    pub what: String,
    /// What to do; `None` when nothing helps on this kernel.
    pub remedy: Option<String>,
}

impl Problem {
    pub(super) fn new(what: impl Into<String>, remedy: Option<&str>) -> Self {
        Self { what: what.into(), remedy: remedy.map(Into::into) }
    }
}

impl std::fmt::Display for Problem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.what)?;
        self.remedy.as_ref().map_or(Ok(()), |remedy| write!(f, " ({remedy})"))
    }
}

/// A program that cannot run here, though it belongs to this machine's hooks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ProgramRefusal {
    /// The program.
    pub program: Program,
    /// What the kernel lacks, or what it said when the program was loaded or attached.
    pub reason: String,
}

/// One hook to attach.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AttachStep {
    /// The hook.
    pub hook: Hook,
    /// Programs to try, in order of preference. Cap: the hook's programs, three at most.
    pub programs: Vec<Program>,
    /// Programs that need something this kernel lacks. Cap: likewise.
    pub passed_over: Vec<ProgramRefusal>,
    /// Without it memtrace does not run.
    pub required: bool,
}

/// What to attach.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AttachPlan {
    /// Hooks to attach, in order.
    pub steps: Vec<AttachStep>,
    /// Hooks that cannot be attached here, with the reason.
    pub refused: Vec<(Hook, String)>,
    /// Hooks left out on request.
    pub left_out: Vec<Hook>,
    /// Why memtrace cannot run here at all; empty when it can.
    pub fatal: Vec<Problem>,
    /// What else is lost.
    pub notes: Vec<Problem>,
}

/// Decides what to attach, leaving out what the user asked to leave out.
pub fn plan(facts: &KernelFacts, without: &[Hook]) -> AttachPlan {
    let mut plan = AttachPlan { fatal: obstacles(facts), notes: notes(facts), ..AttachPlan::default() };
    for hook in Hook::ALL {
        let required = hook.need() == HookNeed::Required;
        if without.contains(&hook) {
            plan.left_out.push(hook);
            // Charges say when to read an address space in its place.
            let replaced =
                hook == Hook::Rss && !without.contains(&Hook::Charge) && programs(facts, Hook::Charge).is_ok();
            if required && !replaced {
                let what = format!("the {hook} hook cannot be left out. {}", hook.lost());
                plan.fatal.push(Problem::new(what, Some(&format!("leave `--without {hook}` away"))));
            }
            continue;
        }
        match programs(facts, hook) {
            Ok((programs, passed_over)) => plan.steps.push(AttachStep { hook, programs, passed_over, required }),
            Err(reason) => {
                // Without BTF every hook is refused for the same reason, which is already said.
                if required && facts.layout.is_some() {
                    plan.fatal.push(Problem::new(format!("the {hook} hook is needed: {reason}"), None));
                }
                plan.refused.push((hook, reason));
            }
        }
    }
    plan
}

/// What stands in the way of every hook.
fn obstacles(facts: &KernelFacts) -> Vec<Problem> {
    let mut fatal = Vec::new();
    fatal.extend(facts.privileges.required());
    if facts.lockdown.as_deref() == Some("confidentiality") {
        let remedy = "boot with lockdown=integrity or without Secure Boot's confidentiality mode";
        fatal.push(Problem::new(
            "the kernel is locked down (confidentiality): programs may not read its memory",
            Some(remedy),
        ));
    }
    let remedy = "pass --btf FILE with this kernel's types (made by `pahole --btf_encode_detached`, or from BTFHub)";
    match (&facts.btf, &facts.layout) {
        (_, Some(_)) => {}
        (Some(Err(error)), None) => {
            fatal.push(Problem::new(format!("the kernel's types (BTF) are not known: {error}"), Some(remedy)));
        }
        _ => fatal.push(Problem::new("the kernel's types (BTF) are not known", Some(remedy))),
    }
    if !facts.missing.is_empty() {
        let what = format!("this kernel has no {}", facts.missing.join(", no "));
        fatal.push(Problem::new(what, Some("report it with the output of `memtrace doctor --json`")));
    }
    match &facts.cgroup {
        Some(Ok(_)) => {}
        Some(Err(error)) => fatal.push(Problem::new(
            format!("no memory controller: {error}"),
            Some("mount the cgroup file system, or boot with cgroup_enable=memory"),
        )),
        None => fatal.push(Problem::new("no memory controller was looked for", None)),
    }
    fatal
}

/// What is lost besides hooks.
fn notes(facts: &KernelFacts) -> Vec<Problem> {
    let mut notes: Vec<Problem> = facts.privileges.lost().collect();
    if let Some(layout) = &facts.layout {
        let summable = facts.percpu_lookup
            && ![layout.percpu_counter_counters, layout.bpf_array_pptrs, layout.percpu_counter_size].contains(&ABSENT);
        if layout.rss_is_percpu == 1 && !summable {
            notes.push(Problem::new(
                "the per-CPU part of the memory counters cannot be read: \
                 readings are off by up to 31 pages a CPU, or more on machines with many CPUs",
                None,
            ));
        }
        if layout.rss_is_percpu == 0 {
            notes.push(Problem::new(
                "this kernel counts pages in every thread before it adds them up: \
                 readings are behind by up to 64 page faults a thread",
                None,
            ));
        }
    }
    notes
}

/// Why a program is not tried.
enum Unfit {
    /// It needs something that this kernel lacks.
    Lacking(String),
    /// It is not meant for this machine: another one serves as well.
    NotMeant(String),
}

/// The programs worth trying for a hook and those that were passed over, or why there are none to
/// try.
fn programs(facts: &KernelFacts, hook: Hook) -> Result<(Vec<Program>, Vec<ProgramRefusal>), String> {
    let Some(layout) = &facts.layout else {
        return Err("the kernel's types (BTF) are not known".into());
    };
    if hook == Hook::Rss
        && layout.rss_is_percpu == 1
        && [layout.percpu_counter_size, layout.percpu_counter_count].contains(&ABSENT)
    {
        return Err("the kernel's types do not describe percpu_counter".into());
    }
    let absent = absent_fields(layout, hook);
    if !absent.is_empty() {
        return Err(format!("the kernel's types have no {}", absent.join(", ")));
    }
    let (mut programs, mut passed_over, mut last) = (Vec::new(), Vec::new(), String::new());
    for program in hook.programs() {
        match program.all().try_for_each(|one| fits(facts, one)) {
            Ok(()) => programs.push(*program),
            Err(Unfit::NotMeant(reason)) => last = reason,
            Err(Unfit::Lacking(reason)) => {
                last.clone_from(&reason);
                passed_over.push(ProgramRefusal { program: *program, reason });
            }
        }
    }
    if programs.is_empty() { Err(last) } else { Ok((programs, passed_over)) }
}

/// What this kernel lacks of the hook's sets of fields: of the set that it lacks least of.
fn absent_fields(layout: &KernelLayout, hook: Hook) -> Vec<&'static str> {
    let mut absent = BTreeSet::new();
    layout.each(|name, value| {
        if value == ABSENT {
            absent.insert(name);
        }
    });
    hook.fields()
        .iter()
        .map(|set| set.iter().copied().filter(|field| absent.contains(field)).collect::<Vec<_>>())
        .min_by_key(Vec::len)
        .unwrap_or_default()
}

fn fits(facts: &KernelFacts, program: &Program) -> Result<(), Unfit> {
    match program.attach {
        // It makes every update of a per-CPU counter cheaper. Before 6.2 there are none, and few
        // updates.
        Attach::TypedTracepoint(name) if facts.layout.is_none_or(|layout| layout.rss_is_percpu != 1) => {
            Err(Unfit::NotMeant(format!("{name} needs no types here")))
        }
        Attach::RawTracepoint(name) | Attach::TypedTracepoint(name) => {
            if facts.tracepoints.contains(name) || !facts.tracepoints_known {
                Ok(())
            } else {
                Err(Unfit::Lacking(format!("this kernel has no tracepoint {name}")))
            }
        }
        Attach::Fentry(function) | Attach::Fexit(function) | Attach::Kprobe(function) => {
            let reason = match facts.functions.get(function.name) {
                Some(args) if *args == function.args => return Ok(()),
                Some(args) => format!("{} takes {args} arguments here, not {}", function.name, function.args),
                // BTF of some kernels leaves out static functions; a breakpoint goes by the symbol.
                None if matches!(program.attach, Attach::Kprobe(_)) => return Ok(()),
                None => format!("the kernel's types have no function {}", function.name),
            };
            let foreign = function.arch.is_some_and(|arch| arch != facts.arch);
            Err(if foreign { Unfit::NotMeant(reason) } else { Unfit::Lacking(reason) })
        }
    }
}

#[cfg(test)]
#[path = "support_tests.rs"]
pub(super) mod tests;
