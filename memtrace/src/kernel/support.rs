//! What this kernel and these privileges allow: facts in, a plan out, and what became of the plan. Pure.
//!
//! Nothing is decided by kernel version. A hook is planned when the facts it needs are there; whether
//! the kernel then takes its programs is found out by trying them, one by one, in order.

use std::collections::{BTreeMap, BTreeSet};

use memtrace_common::layout::{ABSENT, KernelLayout};
use serde::Serialize;

pub use super::hooks::{Attach, Function, Hook, Need, Program};

/// What was found out about the machine before anything is loaded.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    /// Kernel release, shown and never decided by.
    pub kernel: String,
    /// Machine, as uname says.
    pub arch: String,
    /// Where the kernel's types were read from, or why they were not.
    pub btf: Option<Result<String, String>>,
    /// Where the kernel keeps what is read; `None` without BTF.
    pub layout: Option<KernelLayout>,
    /// Required layout fields that were not found.
    pub missing: Vec<String>,
    /// Tracepoints of the hooks that the kernel has.
    pub tracepoints: BTreeSet<&'static str>,
    /// False when the BTF is cut down and names no tracepoint at all: then each is tried.
    pub tracepoints_known: bool,
    /// Functions of the hooks that the kernel's BTF has, with how many parameters each has.
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
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Privileges {
    /// Effective user id.
    pub euid: u32,
    /// CAP_BPF.
    pub cap_bpf: bool,
    /// CAP_PERFMON.
    pub cap_perfmon: bool,
    /// CAP_SYS_ADMIN.
    pub cap_sys_admin: bool,
    /// CAP_SYS_PTRACE.
    pub cap_sys_ptrace: bool,
    /// CAP_SYSLOG.
    pub cap_syslog: bool,
    /// CAP_SYS_RESOURCE.
    pub cap_sys_resource: bool,
    /// CAP_DAC_READ_SEARCH.
    pub cap_dac_read_search: bool,
    /// CAP_CHECKPOINT_RESTORE.
    pub cap_checkpoint_restore: bool,
}

impl Privileges {
    /// Whether tracing programs may be loaded at all.
    pub const fn may_load(&self) -> bool {
        self.cap_sys_admin || (self.cap_bpf && self.cap_perfmon)
    }

    /// The capabilities that are missing, with what is lost without each.
    pub fn lost(&self) -> Vec<Problem> {
        let admin = self.cap_sys_admin;
        [
            (
                self.may_load(),
                "no CAP_BPF and CAP_PERFMON: no program can be loaded into the kernel",
                "run as root or give CAP_BPF and CAP_PERFMON",
            ),
            (
                self.cap_syslog || admin,
                "no CAP_SYSLOG: the kernel log may not be readable and kernel frames stay without names",
                "give CAP_SYSLOG",
            ),
            (
                self.cap_sys_resource,
                "no CAP_SYS_RESOURCE: memtrace cannot protect itself from a global OOM kill",
                "give CAP_SYS_RESOURCE",
            ),
        ]
        .into_iter()
        .filter(|(have, ..)| !have)
        .map(|(_, what, remedy)| Problem::new(what, Some(remedy)))
        .collect()
    }
}

/// Something that is not as it should be, and what to do about it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Problem {
    /// What is the matter.
    pub what: String,
    /// What to do; `None` when nothing helps on this kernel.
    pub remedy: Option<String>,
}

impl Problem {
    fn new(what: impl Into<String>, remedy: Option<&str>) -> Self {
        Self { what: what.into(), remedy: remedy.map(Into::into) }
    }
}

impl std::fmt::Display for Problem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.what)?;
        self.remedy.as_ref().map_or(Ok(()), |remedy| write!(f, " ({remedy})"))
    }
}

/// One hook to attach.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// The hook.
    pub hook: Hook,
    /// Programs to try, in order.
    pub programs: Vec<Program>,
    /// Without it memtrace does not run.
    pub required: bool,
}

/// What to attach.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Hooks to attach, in order.
    pub steps: Vec<Step>,
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
pub fn plan(facts: &Facts, without: &[Hook]) -> Plan {
    let mut plan = Plan { fatal: obstacles(facts), notes: notes(facts), ..Plan::default() };
    for hook in Hook::ALL {
        let required = hook.need() == Need::Required;
        if without.contains(&hook) {
            plan.left_out.push(hook);
            // Charges can tell of memory in its place.
            let replaced =
                hook == Hook::Rss && !without.contains(&Hook::Charge) && programs(facts, Hook::Charge).is_ok();
            if required && !replaced {
                let what = format!("the {hook} hook cannot be left out. {}", hook.lost());
                plan.fatal.push(Problem::new(what, Some(&format!("leave `--without {hook}` away"))));
            }
            continue;
        }
        match programs(facts, hook) {
            Ok(programs) => plan.steps.push(Step { hook, programs, required }),
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
fn obstacles(facts: &Facts) -> Vec<Problem> {
    let mut fatal = Vec::new();
    if !facts.privileges.may_load() {
        fatal.extend(facts.privileges.lost().into_iter().take(1));
    }
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
fn notes(facts: &Facts) -> Vec<Problem> {
    let mut notes: Vec<Problem> =
        facts.privileges.lost().into_iter().skip(usize::from(!facts.privileges.may_load())).collect();
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

/// The programs worth trying for a hook, or why there are none.
fn programs(facts: &Facts, hook: Hook) -> Result<Vec<Program>, String> {
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
    let mut reason = String::new();
    let programs: Vec<Program> = hook
        .programs()
        .iter()
        .filter(|program| match program.all().try_for_each(|program| fits(facts, program)) {
            Ok(()) => true,
            Err(why) => {
                reason = why;
                false
            }
        })
        .copied()
        .collect();
    if programs.is_empty() { Err(reason) } else { Ok(programs) }
}

/// What the best of the hook's sets of fields lacks.
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

fn fits(facts: &Facts, program: &Program) -> Result<(), String> {
    match program.attach {
        // It makes every update cheaper, and before 6.2 there are few.
        Attach::TypedTracepoint(name) if facts.layout.is_none_or(|layout| layout.rss_is_percpu != 1) => {
            Err(format!("{name} needs no types here"))
        }
        Attach::RawTracepoint(name) | Attach::TypedTracepoint(name) => {
            if facts.tracepoints.contains(name) || !facts.tracepoints_known {
                Ok(())
            } else {
                Err(format!("this kernel has no tracepoint {name}"))
            }
        }
        Attach::Fentry(function) | Attach::Fexit(function) | Attach::Kprobe(function) => {
            match facts.functions.get(function.name) {
                Some(args) if *args == function.args => Ok(()),
                Some(args) => Err(format!("{} takes {args} arguments here, not {}", function.name, function.args)),
                // BTF of some kernels leaves out static functions; a breakpoint goes by the symbol.
                None if matches!(program.attach, Attach::Kprobe(_)) => Ok(()),
                None => Err(format!("the kernel's types have no function {}", function.name)),
            }
        }
    }
}

/// What became of a step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AttachResult {
    /// This program runs, and this is what it took.
    Attached(Program, Cost),
    /// None of its programs could be loaded and attached.
    Failed(String),
}

/// What the kernel tells about a program it has loaded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Cost {
    /// Instructions the verifier went through, out of the million it allows; `None` before 5.16, which does not say.
    pub verified_instructions: Option<u32>,
    /// Bytes of machine code; `None` where programs are interpreted.
    pub jited_bytes: Option<u32>,
}

/// Where a hook stands.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum State {
    /// Will be tried.
    Planned {
        /// The programs, in order.
        programs: Vec<Program>,
    },
    /// Runs.
    Attached {
        /// The program.
        program: Program,
        /// What it took.
        #[serde(flatten)]
        cost: Cost,
    },
    /// Was tried in vain.
    Failed {
        /// What the kernel said.
        error: String,
    },
    /// Cannot be tried here.
    Refused {
        /// Why.
        reason: String,
    },
    /// Left out on request.
    LeftOut,
}

/// One hook, what became of it and what is lost.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct HookStatus {
    /// The hook.
    pub hook: Hook,
    /// Whether memtrace runs without it.
    pub need: Need,
    /// Where it stands.
    #[serde(flatten)]
    pub state: State,
    /// What is lost without it; `None` while it is on.
    pub lost: Option<&'static str>,
}

impl HookStatus {
    /// Whether it runs, or will be tried.
    pub const fn on(&self) -> bool {
        matches!(self.state, State::Planned { .. } | State::Attached { .. })
    }
}

/// The whole report: what is on, what is off, why, what is lost, what to do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Status {
    /// Every hook, in order.
    pub hooks: Vec<HookStatus>,
    /// Why memtrace cannot run; empty when it can.
    pub fatal: Vec<Problem>,
    /// What else is lost.
    pub notes: Vec<Problem>,
}

impl Status {
    /// Joins the plan with what became of its steps; a step without a result stays planned.
    pub fn new(plan: &Plan, results: &[(Hook, AttachResult)]) -> Self {
        let mut fatal = plan.fatal.clone();
        let hooks = Hook::ALL
            .into_iter()
            .map(|hook| {
                let state = state(plan, results, hook);
                if let (State::Failed { error }, Need::Required) = (&state, hook.need()) {
                    let what = format!("the {hook} hook is needed and could not be attached: {error}");
                    fatal.push(Problem::new(what, None));
                }
                let on = matches!(state, State::Planned { .. } | State::Attached { .. });
                if let (Hook::Charge, State::Failed { error }, true) =
                    (hook, &state, plan.left_out.contains(&Hook::Rss))
                {
                    let what =
                        format!("the charge hook is needed without the rss hook, and could not be attached: {error}");
                    fatal.push(Problem::new(what, Some("leave `--without rss` away")));
                }
                HookStatus { hook, need: hook.need(), state, lost: (!on).then(|| hook.lost()) }
            })
            .collect();
        Self { hooks, fatal, notes: plan.notes.clone() }
    }

    /// Whether memtrace can run.
    pub const fn can_run(&self) -> bool {
        self.fatal.is_empty()
    }

    /// Whether a hook runs (or, before attaching, will be tried).
    pub fn on(&self, hook: Hook) -> bool {
        self.hooks.iter().any(|status| status.hook == hook && status.on())
    }

    /// The hooks that are off with what is lost, and the notes: one sentence each, for the incident file.
    pub fn degraded(&self) -> Vec<String> {
        let hooks = self.hooks.iter().filter_map(|status| Some(format!("{}: {}", status.hook, status.lost?)));
        hooks.chain(self.notes.iter().map(|note| note.what.clone())).collect()
    }
}

fn state(plan: &Plan, results: &[(Hook, AttachResult)], hook: Hook) -> State {
    if plan.left_out.contains(&hook) {
        return State::LeftOut;
    }
    if let Some((_, reason)) = plan.refused.iter().find(|(refused, _)| *refused == hook) {
        return State::Refused { reason: reason.clone() };
    }
    match results.iter().find(|(tried, _)| *tried == hook) {
        Some((_, AttachResult::Attached(program, cost))) => State::Attached { program: *program, cost: *cost },
        Some((_, AttachResult::Failed(error))) => State::Failed { error: error.clone() },
        None => {
            let step = plan.steps.iter().find(|step| step.hook == hook);
            State::Planned { programs: step.map(|step| step.programs.clone()).unwrap_or_default() }
        }
    }
}

#[cfg(test)]
#[path = "support_tests.rs"]
mod tests;
