//! What became of a plan: which hooks are on and by which program, what is lost without the others.
//! Pure.
//!
//! The one thing that is shown everywhere: `doctor` prints it, the agent logs it at its start, and
//! every incident file repeats what was not attached.

use serde::Serialize;

use super::hooks::{Hook, HookNeed, Program};
use super::support::{AttachPlan, Problem, ProgramRefusal};

/// What became of a step of the plan.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AttachResult {
    /// A program is loaded and attached.
    Attached {
        /// The program.
        program: Program,
        /// What it took.
        cost: ProgramCost,
        /// Programs that were tried before it. Cap: the hook's programs, three at most.
        refused: Vec<ProgramRefusal>,
    },
    /// None of its programs could be loaded and attached; what the kernel said of each.
    Failed(String),
}

/// Verifier and JIT cost of a program and of what is attached with it. Best effort: what the kernel
/// does not say stays `None`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ProgramCost {
    /// Instructions that the verifier walked through; it allows a million a program. `None` before
    /// 5.16.
    pub verified_instructions: Option<u32>,
    /// Size of the machine code, bytes; `None` where programs are interpreted.
    pub jited_bytes: Option<u32>,
}

/// Whether a hook is on, and why not.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum HookState {
    /// Will be tried.
    Planned {
        /// Its programs, in order of preference.
        programs: Vec<Program>,
    },
    /// One of its programs runs.
    Attached {
        /// The program that runs.
        program: Program,
        /// What it took.
        #[serde(flatten)]
        cost: ProgramCost,
        /// Programs that are preferred to it and cannot run here, the most preferred first.
        #[serde(skip_serializing_if = "Vec::is_empty")]
        refused: Vec<ProgramRefusal>,
    },
    /// Every program was tried, and none runs.
    Failed {
        /// What the kernel said of each.
        error: String,
    },
    /// Cannot be tried here.
    Refused {
        /// What this kernel lacks.
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
    pub need: HookNeed,
    /// Whether it is on, and why not.
    #[serde(flatten)]
    pub state: HookState,
    /// What is lost without it; `None` while it is on.
    pub lost: Option<&'static str>,
}

impl HookStatus {
    /// Whether it runs, or will be tried.
    pub const fn on(&self) -> bool {
        matches!(self.state, HookState::Planned { .. } | HookState::Attached { .. })
    }

    /// One sentence, when a preferred program cannot run here and another one does.
    fn fallback(&self) -> Option<String> {
        let HookState::Attached { program, refused, .. } = &self.state else { return None };
        let refused: Vec<_> =
            refused.iter().map(|refusal| format!("{}: {}", refusal.program, refusal.reason)).collect();
        (!refused.is_empty()).then(|| {
            format!("the {} hook runs by {program}, not by the preferred program: {}", self.hook, refused.join("; "))
        })
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
    /// Joins the plan with what became of its steps. A step without a result stays planned.
    pub fn new(plan: &AttachPlan, results: &[(Hook, AttachResult)]) -> Self {
        let mut fatal = plan.fatal.clone();
        let hooks = Hook::ALL
            .into_iter()
            .map(|hook| {
                let state = state(plan, results, hook);
                if let (HookState::Failed { error }, HookNeed::Required) = (&state, hook.need()) {
                    let what = format!("the {hook} hook is needed and could not be attached: {error}");
                    fatal.push(Problem::new(what, None));
                }
                let on = matches!(state, HookState::Planned { .. } | HookState::Attached { .. });
                if let (Hook::Charge, HookState::Failed { error }, true) =
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

    /// A sentence for each hook that runs by another program than the preferred one: which, and
    /// why.
    pub fn fallbacks(&self) -> Vec<String> {
        self.hooks.iter().filter_map(HookStatus::fallback).collect()
    }

    /// The hooks that are off with what is lost, and the notes: one sentence each, for the incident
    /// file.
    pub fn degraded(&self) -> Vec<String> {
        let hooks = self.hooks.iter().filter_map(|status| Some(format!("{}: {}", status.hook, status.lost?)));
        hooks.chain(self.notes.iter().map(|note| note.what.clone())).collect()
    }
}

fn state(plan: &AttachPlan, results: &[(Hook, AttachResult)], hook: Hook) -> HookState {
    if plan.left_out.contains(&hook) {
        return HookState::LeftOut;
    }
    if let Some((_, reason)) = plan.refused.iter().find(|(refused, _)| *refused == hook) {
        return HookState::Refused { reason: reason.clone() };
    }
    match results.iter().find(|(tried, _)| *tried == hook) {
        Some((_, AttachResult::Attached { program, cost, refused })) => {
            HookState::Attached { program: *program, cost: *cost, refused: preferred(plan, hook, program, refused) }
        }
        Some((_, AttachResult::Failed(error))) => HookState::Failed { error: error.clone() },
        None => {
            let step = plan.steps.iter().find(|step| step.hook == hook);
            HookState::Planned { programs: step.map(|step| step.programs.clone()).unwrap_or_default() }
        }
    }
}

/// The programs that are preferred to the one that runs and cannot run here, from the plan and from
/// trying.
fn preferred(plan: &AttachPlan, hook: Hook, used: &Program, tried: &[ProgramRefusal]) -> Vec<ProgramRefusal> {
    let step = plan.steps.iter().find(|step| step.hook == hook);
    let refused = || step.into_iter().flat_map(|step| &step.passed_over).chain(tried);
    let better = hook.programs().iter().take_while(|program| *program != used);
    better.filter_map(|program| refused().find(|refusal| refusal.program == *program)).cloned().collect()
}

#[cfg(test)]
#[path = "status_tests.rs"]
mod tests;
