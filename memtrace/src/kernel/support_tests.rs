//! The decision table: facts in, plan out.

use super::*;

/// A kernel that has everything.
pub(in crate::kernel) fn full() -> KernelFacts {
    let mut layout = KernelLayout::NOTHING;
    layout.rss_is_percpu = 1;
    layout.percpu_counter_size = 40;
    layout.percpu_counter_count = 8;
    layout.percpu_counter_counters = 32;
    layout.bpf_array_pptrs = 264;
    layout.mark_victim_is_task = 1;
    (layout.oom_memcg, layout.oom_chosen) = (16, 40);
    (layout.regs_orig_ax, layout.regs_di, layout.regs_si) = (120, 112, 104);
    (layout.regs_dx, layout.regs_r10) = (96, 56);
    let programs = || Hook::ALL.into_iter().flat_map(Hook::programs).flat_map(Program::all);
    KernelFacts {
        kernel: "6.18.0".into(),
        arch: "x86_64".into(),
        btf: Some(Ok("/sys/kernel/btf/vmlinux".into())),
        layout: Some(layout),
        tracepoints: programs()
            .filter_map(|program| match program.attach {
                Attach::RawTracepoint(name) => Some(name),
                _ => None,
            })
            .collect(),
        tracepoints_known: true,
        functions: programs().filter_map(|p| p.attach.function()).map(|f| (f.name, f.args)).collect(),
        percpu_lookup: true,
        task_pt_regs: true,
        cgroup: Some(Ok(MemoryController { version: 2, hierarchy_id: 0, mount: "/sys/fs/cgroup".into() })),
        privileges: Privileges { euid: 0, held: CapabilitySet::all() },
        ..KernelFacts::default()
    }
}

fn names(plan: &AttachPlan, hook: Hook) -> Vec<&'static str> {
    plan.steps.iter().filter(|s| s.hook == hook).flat_map(|s| &s.programs).map(|p| p.name).collect()
}

fn refusal(plan: &AttachPlan, hook: Hook) -> Option<&str> {
    plan.refused.iter().find(|(refused, _)| *refused == hook).map(|(_, reason)| reason.as_str())
}

#[test]
fn a_full_kernel_gets_every_hook_in_order() {
    let plan = plan(&full(), &[]);
    assert_eq!(plan.steps.iter().map(|s| s.hook).collect::<Vec<_>>(), Hook::ALL);
    assert_eq!((plan.refused.len(), plan.fatal.len(), plan.notes.len()), (0, 0, 0));
    assert_eq!(names(&plan, Hook::OomDecision), ["oom_decision_fentry", "oom_decision_kprobe"]);
    let required: Vec<_> = plan.steps.iter().filter(|s| s.required).map(|s| s.hook.name()).collect();
    assert_eq!(required, ["rss", "oom", "kill", "fork", "exec", "exit"]);
}

#[test]
fn hook_names_are_unique_and_agree_everywhere() {
    for hook in Hook::ALL {
        assert_eq!(Hook::named(hook.name()), Some(hook));
        assert_eq!(serde_json::to_string(&hook).unwrap(), format!("\"{hook}\""));
        let value = <Hook as clap::ValueEnum>::to_possible_value(&hook).unwrap();
        assert_eq!(value.get_name(), hook.name());
        assert!(hook.lost().ends_with('.') && !hook.lost().contains("  "), "{hook}");
        let known = &mut BTreeSet::new();
        KernelLayout::NOTHING.each(|name, _| {
            known.insert(name);
        });
        assert!(hook.fields().iter().flat_map(|set| set.iter()).all(|field| known.contains(field)), "{hook}");
    }
    let programs: BTreeSet<_> =
        Hook::ALL.into_iter().flat_map(|h| h.programs()).flat_map(Program::all).map(|p| p.name).collect();
    assert_eq!(programs.len(), 25);
}

#[test]
fn an_optional_tracepoint_that_is_missing_is_refused_a_required_one_is_fatal() {
    let mut facts = full();
    facts.tracepoints.remove("exit_mmap");
    let first = plan(&facts, &[]);
    assert_eq!(refusal(&first, Hook::ExitMmap), Some("this kernel has no tracepoint exit_mmap"));
    assert!(first.fatal.is_empty());
    facts.tracepoints.remove("mark_victim");
    let second = plan(&facts, &[]);
    assert_eq!(second.fatal.len(), 1);
    assert!(second.fatal[0].what.contains("oom hook"));
}

#[test]
fn a_cut_down_btf_file_makes_every_tracepoint_worth_trying() {
    let facts = KernelFacts { tracepoints: BTreeSet::new(), tracepoints_known: false, ..full() };
    assert!(plan(&facts, &[]).refused.is_empty());
}

#[test]
fn a_static_function_missing_from_btf_leaves_the_kprobe() {
    let mut facts = full();
    facts.functions.remove("oom_kill_process");
    assert_eq!(names(&plan(&facts, &[]), Hook::OomDecision), ["oom_decision_kprobe"]);
    facts.functions.insert("page_counter_try_charge", 4);
    let reason = "page_counter_try_charge takes 4 arguments here, not 3";
    assert_eq!(refusal(&plan(&facts, &[]), Hook::Charge), Some(reason));
}

#[test]
fn charges_stand_in_for_the_rss_hook() {
    let without = plan(&full(), &[Hook::Rss]);
    assert!(without.fatal.is_empty() && without.left_out == [Hook::Rss]);
    let mut facts = full();
    facts.functions.remove("page_counter_uncharge");
    let kprobe = plan(&facts, &[]);
    assert_eq!(names(&kprobe, Hook::Charge), ["charge_kprobe"], "what is attached together is planned together");
    facts.functions.insert("page_counter_uncharge", 3);
    assert_eq!(plan(&facts, &[Hook::Rss]).fatal.len(), 1);
}

#[test]
fn registers_are_needed_in_full_for_one_architecture() {
    let mut facts = full();
    let mut layout = facts.layout.unwrap();
    layout.regs_r10 = ABSENT;
    facts.layout = Some(layout);
    assert_eq!(refusal(&plan(&facts, &[]), Hook::Map), Some("the kernel's types have no regs_r10"));
    (layout.regs_syscallno, layout.regs_orig_x0, layout.regs_regs) = (280, 272, 0);
    facts.layout = Some(layout);
    assert_eq!(refusal(&plan(&facts, &[]), Hook::Map), None);
    layout.oom_chosen = ABSENT;
    layout.mark_victim_is_task = ABSENT;
    facts.layout = Some(layout);
    let plan = plan(&facts, &[]);
    assert!(refusal(&plan, Hook::OomDecision).is_some());
    assert_eq!(plan.fatal.len(), 1, "a mark_victim whose argument is not known would be misread");
}

#[test]
fn without_btf_there_is_one_reason_and_a_remedy() {
    let facts = KernelFacts { btf: Some(Err("no such file".into())), layout: None, ..full() };
    let plan = plan(&facts, &[]);
    assert_eq!(plan.refused.len(), Hook::ALL.len());
    assert_eq!(plan.fatal.len(), 1);
    assert!(plan.fatal[0].what.contains("no such file"));
    assert!(plan.fatal[0].remedy.as_ref().unwrap().contains("--btf FILE"));
}

#[test]
fn privileges() {
    let with = |held| plan(&KernelFacts { privileges: Privileges { euid: 1000, held }, ..full() }, &[]);
    let optional = CAPABILITIES.iter().filter(|one| one.need == CapabilityNeed::Optional).count();
    let none = with(CapabilitySet::empty());
    assert_eq!(none.fatal[0].to_string().split(": ").next(), Some("no CAP_BPF and CAP_PERFMON"));
    assert_eq!(none.fatal[0].remedy.as_deref(), Some("run as root or give CAP_BPF and CAP_PERFMON"));
    assert_eq!((none.fatal.len(), none.notes.len()), (1, optional));
    let root = Privileges { euid: 0, ..Privileges::default() };
    let root = plan(&KernelFacts { privileges: root, ..full() }, &[]);
    assert_eq!(root.fatal.len(), 1, "the user id gives nothing");
    let enough = with(CapabilitySet::BPF | CapabilitySet::PERFMON);
    assert_eq!((enough.fatal.len(), enough.notes.len()), (0, optional));
    let admin = with(CapabilitySet::SYS_ADMIN);
    assert_eq!((admin.fatal.len(), admin.notes.len()), (0, optional), "it stands in for these two only");
    for one in CAPABILITIES {
        let plan = with(CapabilitySet::all() - one.bit - CapabilitySet::SYS_ADMIN);
        let (fatal, notes) = match one.need {
            CapabilityNeed::Required => (1, 0),
            CapabilityNeed::Optional => (0, 1),
        };
        assert_eq!((plan.fatal.len(), plan.notes.len()), (fatal, notes), "{}", one.name);
        let problem = plan.fatal.iter().chain(&plan.notes).next().unwrap();
        assert_eq!(problem.what, format!("no CAP_{}: {}", one.name, one.lost));
    }
}

#[test]
fn privileges_are_shown_by_name() {
    let privileges = Privileges { euid: 7, held: CapabilitySet::BPF | CapabilitySet::KILL };
    let shown = serde_json::to_value(privileges).unwrap();
    assert_eq!((&shown["euid"], &shown["cap_bpf"], &shown["cap_sys_admin"]), (&7.into(), &true.into(), &false.into()));
    assert_eq!(shown.as_object().unwrap().len(), CAPABILITIES.len() + 2);
}

#[test]
fn lockdown_cgroup_and_missing_fields() {
    let locked = |mode: &str| plan(&KernelFacts { lockdown: Some(mode.into()), ..full() }, &[]).fatal.len();
    assert_eq!((locked("none"), locked("integrity"), locked("confidentiality")), (0, 0, 1));
    let no_cgroup = KernelFacts { cgroup: Some(Err("it is not mounted".into())), ..full() };
    assert!(plan(&no_cgroup, &[]).fatal[0].what.contains("it is not mounted"));
    let missing = KernelFacts { missing: vec!["task_mm".into(), "task_tgid".into()], ..full() };
    assert_eq!(plan(&missing, &[]).fatal[0].what, "this kernel has no task_mm, no task_tgid");
}

#[test]
fn inexact_counters_are_said() {
    let facts = KernelFacts { percpu_lookup: false, ..full() };
    assert!(plan(&facts, &[]).notes[0].what.contains("per-CPU part"));
    let mut old = full();
    old.percpu_lookup = false;
    old.layout.as_mut().unwrap().rss_is_percpu = 0;
    let notes = plan(&old, &[]).notes;
    assert_eq!(notes.len(), 1);
    assert!(notes[0].what.contains("64 page faults"));
}

#[test]
fn leaving_out() {
    let plan = plan(&full(), &[Hook::Charge, Hook::Rss]);
    assert_eq!(plan.left_out, [Hook::Rss, Hook::Charge]);
    assert_eq!(plan.fatal.len(), 1, "a required hook cannot be left out");
    assert_eq!(plan.steps.len(), Hook::ALL.len() - 2);
}

/// Reasons for which programs of the hook were passed over, by program.
fn passed_over(facts: &KernelFacts, hook: Hook) -> Vec<(&'static str, String)> {
    let plan = plan(facts, &[]);
    let step = plan.steps.into_iter().find(|step| step.hook == hook);
    let passed_over = step.into_iter().flat_map(|step| step.passed_over);
    passed_over.map(|refusal| (refusal.program.name, refusal.reason)).collect()
}

#[test]
fn which_programs_are_tried_and_which_are_passed_over() {
    let x86 = || {
        let mut facts = full();
        facts.functions.retain(|name, _| !name.starts_with("__arm64_"));
        facts
    };
    let lacking = |function: &str| {
        let mut facts = x86();
        facts.functions.remove(function);
        facts
    };
    let without_types = |name: &str| format!("the kernel's types have no function {name}");
    let mut atomics = x86();
    atomics.layout.as_mut().unwrap().rss_is_percpu = 0;
    let mut arm = full();
    arm.arch = "aarch64".into();
    arm.functions.retain(|name, _| !name.starts_with("__x64_"));
    let mut arm_without = arm.clone();
    arm_without.functions.remove("__arm64_sys_brk");
    let mut other_signature = x86();
    other_signature.functions.insert("oom_kill_process", 3);
    let trampoline = |name: &'static str, reason: String| vec![(name, reason)];
    // Facts, hook, programs that are tried, programs that were passed over. What belongs to the
    // other architecture, or is no better here, is not passed over: nothing is lost without it.
    let table = [
        (x86(), Hook::Map, vec!["mmap_exit", "sys_exit"], vec![]),
        (arm, Hook::Map, vec!["mmap_exit", "sys_exit"], vec![]),
        (
            lacking("__x64_sys_brk"),
            Hook::Map,
            vec!["sys_exit"],
            trampoline("mmap_exit", without_types("__x64_sys_brk")),
        ),
        (arm_without, Hook::Map, vec!["sys_exit"], trampoline("mmap_exit", without_types("__arm64_sys_brk"))),
        (x86(), Hook::Rss, vec!["rss_stat_btf", "rss_stat"], vec![]),
        (atomics, Hook::Rss, vec!["rss_stat"], vec![]),
        (
            lacking("oom_kill_process"),
            Hook::OomDecision,
            vec!["oom_decision_kprobe"],
            trampoline("oom_decision_fentry", without_types("oom_kill_process")),
        ),
        (other_signature, Hook::OomDecision, vec![], vec![]),
        (
            lacking("page_counter_uncharge"),
            Hook::Charge,
            vec!["charge_kprobe"],
            trampoline("charge_fentry", without_types("page_counter_uncharge")),
        ),
    ];
    for (facts, hook, tried, over) in table {
        assert_eq!(names(&plan(&facts, &[]), hook), tried, "{hook} on {}", facts.arch);
        assert_eq!(passed_over(&facts, hook), over, "{hook} on {}", facts.arch);
    }
}
