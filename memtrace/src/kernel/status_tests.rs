//! Plan and results in, status out.

use super::*;
use crate::kernel::support::plan;
use crate::kernel::support::tests::full;

/// The program of a hook by its name.
fn program(hook: Hook, name: &str) -> Program {
    *hook.programs().iter().find(|program| program.name == name).unwrap()
}

fn refusal(hook: Hook, name: &str, reason: &str) -> ProgramRefusal {
    ProgramRefusal { program: program(hook, name), reason: reason.into() }
}

/// Attached by the program of this name, after those of `refused`.
fn attached(hook: Hook, name: &str, refused: &[(&str, &str)]) -> (Hook, AttachResult) {
    let refused = refused.iter().map(|(name, reason)| refusal(hook, name, reason)).collect();
    (hook, AttachResult::Attached { program: program(hook, name), cost: ProgramCost::default(), refused })
}

#[test]
fn the_status_joins_plan_and_results() {
    let plan = plan(&full(), &[Hook::Map]);
    let planned = Status::new(&plan, &[]);
    assert!(planned.can_run() && planned.on(Hook::Charge) && !planned.on(Hook::Map));
    let program = Hook::OomDecision.programs()[1];
    let cost = ProgramCost { verified_instructions: Some(3323), jited_bytes: None };
    let attached = AttachResult::Attached { program, cost, refused: Vec::new() };
    let results = [(Hook::OomDecision, attached), (Hook::Charge, AttachResult::Failed("EPERM".into()))];
    let status = Status::new(&plan, &results);
    assert!(status.can_run() && status.on(Hook::OomDecision) && !status.on(Hook::Charge));
    let degraded = status.degraded();
    assert_eq!(degraded.len(), 2);
    assert!(degraded[0].starts_with("map: ") && degraded[1].starts_with("charge: "));
    let broken = Status::new(&plan, &[(Hook::Kill, AttachResult::Failed("EINVAL".into()))]);
    assert!(!broken.can_run());
    let json = serde_json::to_value(&status).unwrap();
    assert_eq!(json["hooks"][13]["state"], "attached");
    assert_eq!(json["hooks"][13]["verified_instructions"], 3323);
    assert!(json["hooks"][13]["jited_bytes"].is_null());
    assert_eq!(json["hooks"][13]["program"]["attach"]["kind"], "kprobe");
    assert_eq!(json["hooks"][13]["program"]["attach"]["target"], "oom_kill_process");
    assert_eq!(json["hooks"][14]["error"], "EPERM");
}

#[test]
fn the_charge_hook_is_needed_in_place_of_the_rss_hook() {
    let plan = plan(&full(), &[Hook::Rss]);
    assert!(Status::new(&plan, &[]).can_run());
    let failed = Status::new(&plan, &[(Hook::Charge, AttachResult::Failed("EPERM".into()))]);
    assert!(failed.fatal[0].what.contains("charge hook is needed"));
}

#[test]
fn a_fallback_says_which_program_runs_and_which_was_refused_why() {
    let facts = full();
    let mut lacking = full();
    lacking.functions.remove("oom_kill_process");
    let lacks = "the kernel's types have no function oom_kill_process";
    // Facts, what came of the step, the programs that are shown as refused.
    let table = [
        (&facts, attached(Hook::Rss, "rss_stat_btf", &[]), vec![]),
        (
            &facts,
            attached(Hook::Rss, "rss_stat", &[("rss_stat_btf", "EACCES")]),
            vec![refusal(Hook::Rss, "rss_stat_btf", "EACCES")],
        ),
        (
            &facts,
            attached(Hook::Map, "sys_exit", &[("mmap_exit", "EPERM")]),
            vec![refusal(Hook::Map, "mmap_exit", "EPERM")],
        ),
        (&facts, attached(Hook::OomDecision, "oom_decision_fentry", &[]), vec![]),
        (
            &lacking,
            attached(Hook::OomDecision, "oom_decision_kprobe", &[]),
            vec![refusal(Hook::OomDecision, "oom_decision_fentry", lacks)],
        ),
        (&facts, (Hook::Charge, AttachResult::Failed("EPERM".into())), vec![]),
    ];
    for (facts, result, expected) in table {
        let hook = result.0;
        let status = Status::new(&plan(facts, &[]), &[result]);
        let of_hook = status.hooks.iter().find(|status| status.hook == hook).unwrap();
        let shown = match &of_hook.state {
            HookState::Attached { refused, .. } => refused.clone(),
            _ => Vec::new(),
        };
        assert_eq!(shown, expected, "{hook}");
        assert_eq!(status.fallbacks().len(), usize::from(!expected.is_empty()), "{hook}");
        assert!(status.can_run() && (hook == Hook::Charge || status.degraded().is_empty()), "nothing is lost");
    }
}

#[test]
fn a_fallback_is_one_sentence_and_additive_in_json() {
    let results =
        [attached(Hook::Rss, "rss_stat", &[("rss_stat_btf", "EACCES")]), attached(Hook::Oom, "mark_victim", &[])];
    let status = Status::new(&plan(&full(), &[]), &results);
    let sentence = "the rss hook runs by raw tracepoint rss_stat, not by the preferred program: \
                    typed tracepoint rss_stat: EACCES";
    assert_eq!(status.fallbacks(), [sentence]);
    let json = serde_json::to_value(&status).unwrap();
    assert_eq!(json["hooks"][0]["program"]["name"], "rss_stat");
    assert_eq!(json["hooks"][0]["refused"][0]["program"]["name"], "rss_stat_btf");
    assert_eq!(json["hooks"][0]["refused"][0]["reason"], "EACCES");
    assert!(json["hooks"][1].get("refused").is_none());
}
