//! `memtrace doctor`: what this kernel and these privileges allow, and what is lost without the rest.
//!
//! As far as privileges allow it does what the agent does at its start, loads and attaches every
//! hook, and detaches them again: whether a kernel takes a program is not to be known in another
//! way.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{IsTerminal, Write as _};

use anyhow::Context;
use memtrace_common::layout::ABSENT;
use serde::Serialize;

use super::VerbResult;
use super::config::{Config, DOCTOR, Flags};
use crate::kernel::hooks::{HookNeed, Program};
use crate::kernel::status::{HookState, HookStatus, Status};
use crate::kernel::support::{self, KernelFacts, MemoryController, Privileges, Problem};
use crate::own_process::capability;
use crate::session::{self, SessionConfig};

/// Version of the `--json` output.
const SCHEMA: u32 = 1;
/// Exit code when memtrace cannot run here.
const UNSUPPORTED: u8 = 3;

/// Arguments of `memtrace doctor`.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  sudo memtrace doctor                     load and attach for a moment, as the agent would
  memtrace doctor                          without root: what would be tried
  sudo memtrace doctor --without map,charge
  sudo memtrace doctor --json | jq .verdict

Exit codes: 0 memtrace can run here, possibly without some hooks, which are named; 3 it cannot.")]
pub struct Args {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    settings: Flags<DOCTOR>,
}

/// Whether memtrace can run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum DoctorVerdict {
    /// It can, with every hook.
    Full,
    /// It can, and something is lost.
    Degraded,
    /// It cannot.
    Impossible,
}

/// The report as `--json` prints it.
#[derive(Clone, Debug, Serialize)]
pub struct DoctorReport {
    /// Version of this output. A new key leaves it as it is.
    pub schema: u32,
    /// Whether memtrace can run.
    pub verdict: DoctorVerdict,
    /// Kernel release (`uname -r`).
    pub kernel: String,
    /// Architecture (`uname -m`).
    pub arch: String,
    /// File the kernel's types were read from; null when they are not known.
    pub btf: Option<String>,
    /// Where the memory controller is; null when there is none.
    pub cgroup: Option<MemoryController>,
    /// Effective privileges of this process.
    pub privileges: Privileges,
    /// Lockdown mode; null when it cannot be read.
    pub lockdown: Option<String>,
    /// Every hook: whether it is on, by which program, why not, what is lost, what to do.
    #[serde(flatten)]
    pub status: Status,
    /// Fields of kernel structs: offset, size or number; null for one this kernel lacks.
    pub layout: BTreeMap<&'static str, Option<u32>>,
}

/// Runs the verb.
pub fn run(args: &Args) -> VerbResult {
    let config = Config::load(None, &args.settings)?.parse()?.session;
    let capabilities = session::detect(config.btf.as_deref());
    let facts = capabilities.facts.clone();
    let plan = support::plan(&facts, &config.without);
    let planned = Status::new(&plan, &[]);
    // The plan names everything that stands in the way; trying would only name the first of it
    // again.
    let status = if planned.can_run() { outcome(planned, tried(capabilities, &config)) } else { planned };
    let report = DoctorReport::new(&facts, status);
    let mut out = std::io::stdout().lock();
    if args.json {
        writeln!(out, "{}", serde_json::to_string_pretty(&report)?)?;
    } else {
        let colour = out.is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
        out.write_all(report.text(colour).as_bytes())?;
    }
    out.flush()?;
    Ok(if report.verdict == DoctorVerdict::Impossible { UNSUPPORTED } else { 0 })
}

/// Loads and attaches as the agent would; the programs are gone when this returns.
fn tried(capabilities: session::Capabilities, config: &SessionConfig) -> anyhow::Result<Status> {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().context("failed to start the runtime")?;
    let _inside = runtime.enter();
    session::attach(capabilities, config).map(|(_, _, status)| status)
}

/// The status after trying. An error is one more problem beside those of the plan.
fn outcome(planned: Status, tried: anyhow::Result<Status>) -> Status {
    tried.unwrap_or_else(|error| {
        let mut fatal = planned.fatal;
        fatal.push(Problem { what: format!("{error:#}"), remedy: None });
        Status { fatal, ..planned }
    })
}

impl DoctorReport {
    /// Joins the facts with the status of the hooks.
    pub fn new(facts: &KernelFacts, status: Status) -> Self {
        let verdict = match (status.can_run(), status.degraded().is_empty()) {
            (false, _) => DoctorVerdict::Impossible,
            (true, false) => DoctorVerdict::Degraded,
            (true, true) => DoctorVerdict::Full,
        };
        let mut layout = BTreeMap::new();
        if let Some(found) = &facts.layout {
            found.each(|name, value| {
                layout.insert(name, (value != ABSENT).then_some(value));
            });
        }
        Self {
            schema: SCHEMA,
            verdict,
            kernel: facts.kernel.clone(),
            arch: facts.arch.clone(),
            btf: facts.btf.clone().and_then(Result::ok),
            cgroup: facts.cgroup.clone().and_then(Result::ok),
            privileges: facts.privileges.clone(),
            lockdown: facts.lockdown.clone(),
            status,
            layout,
        }
    }

    /// The report as text.
    pub fn text(&self, colour: bool) -> String {
        let paint = |code: &str, text: &str| {
            if colour { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
        };
        let mut out = String::new();
        let mut line = |text: String| {
            out.push_str(&text);
            out.push('\n');
        };
        line(format!("kernel      {} {}", self.kernel, self.arch));
        line(format!("types       {}", self.btf.as_deref().unwrap_or("not known")));
        line(match &self.cgroup {
            Some(memory) if memory.version == 1 => {
                format!("cgroup      v1, memory at {} (hierarchy {})", memory.mount, memory.hierarchy_id)
            }
            Some(memory) => format!("cgroup      v{}, memory at {}", memory.version, memory.mount),
            None => "cgroup      no memory controller".to_owned(),
        });
        line(format!("privileges  {}", privileges(&self.privileges)));
        line(format!("lockdown    {}", self.lockdown.as_deref().unwrap_or("not known")));
        line(String::new());
        for hook in &self.status.hooks {
            let word = match (&hook.state, hook.need) {
                (HookState::Planned { .. }, _) => paint("32", "try"),
                (HookState::Attached { .. }, _) => paint("32", "on "),
                (_, HookNeed::Optional) => paint("33", "off"),
                (_, HookNeed::Required) => paint("31", "off"),
            };
            line(format!("{word}  {:<14} {}", hook.hook.name(), how(hook)));
            if let HookState::Attached { refused, .. } = &hook.state {
                for refusal in refused {
                    line(format!("     {:<14} refused: {}: {}", "", refusal.program, refusal.reason));
                }
            }
            if let Some(lost) = hook.lost {
                line(format!("     {:<14} lost: {lost}", ""));
            }
        }
        if self.status.hooks.iter().any(|hook| matches!(hook.state, HookState::Planned { .. })) {
            line(
                "\ntry: kernel types allow it; as root `memtrace doctor` finds out whether the kernel accepts it."
                    .to_owned(),
            );
        }
        let section = |out: &mut String, title: &str, problems: &[Problem]| {
            if problems.is_empty() {
                return;
            }
            let _ = writeln!(out, "\n{title}");
            for problem in problems {
                let _ = writeln!(out, "  {}", problem.what);
                if let Some(remedy) = &problem.remedy {
                    let _ = writeln!(out, "    -> {remedy}");
                }
            }
        };
        section(&mut out, "also lost:", &self.status.notes);
        section(&mut out, "in the way:", &self.status.fatal);
        let _ = writeln!(
            out,
            "\n{}",
            match self.verdict {
                DoctorVerdict::Full => paint("32", "memtrace can run here, with every hook."),
                DoctorVerdict::Degraded => paint("33", "memtrace can run here, without what is named above."),
                DoctorVerdict::Impossible => paint("31", "memtrace cannot run here."),
            }
        );
        out
    }
}

/// Whether a hook is on, in words.
fn how(hook: &HookStatus) -> String {
    match &hook.state {
        HookState::Planned { programs } => programs.iter().map(Program::to_string).collect::<Vec<_>>().join(", else "),
        HookState::Attached { program, .. } => format!("{program} (attached)"),
        HookState::Failed { error } => error.clone(),
        HookState::Refused { reason } => reason.clone(),
        HookState::LeftOut => "left out on request".to_owned(),
    }
}

fn privileges(privileges: &Privileges) -> String {
    let names = capability::names(privileges.held);
    let names = if names.is_empty() { "no capability that memtrace uses" } else { &names };
    format!("uid {}: {names}", privileges.euid)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::hooks::Hook;

    fn report(facts: &KernelFacts, without: &[Hook]) -> DoctorReport {
        DoctorReport::new(facts, Status::new(&support::plan(facts, without), &[]))
    }

    #[test]
    fn nothing_known_is_impossible_and_says_what_to_do() {
        let facts =
            KernelFacts { kernel: "5.10.0".into(), btf: Some(Err("no such file".into())), ..KernelFacts::default() };
        let report = report(&facts, &[]);
        assert_eq!(report.verdict, DoctorVerdict::Impossible);
        let text = report.text(false);
        for part in [
            "run as root or give CAP_BPF and CAP_PERFMON",
            "pass --btf FILE",
            "off  rss",
            "no capability that memtrace uses",
            "memtrace cannot run here.",
        ] {
            assert!(text.contains(part), "{part} is not in\n{text}");
        }
        assert!(!text.contains('\x1b') && report.text(true).contains("\x1b[31moff\x1b[0m"));
    }

    #[test]
    fn a_plan_that_falls_through_is_impossible_and_says_why() {
        let facts = KernelFacts::default();
        let mut planned = Status::new(&support::plan(&facts, &[]), &[]);
        planned.fatal.clear();
        let error = anyhow::anyhow!("Operation not permitted").context("the rss hook is needed");
        let report = DoctorReport::new(&facts, outcome(planned.clone(), Err(error)));
        assert_eq!(report.verdict, DoctorVerdict::Impossible);
        let text = report.text(false);
        assert!(text.contains("in the way:\n  the rss hook is needed: Operation not permitted\n"), "{text}");
        assert_eq!(outcome(planned.clone(), Ok(planned.clone())), planned);
    }

    #[test]
    fn a_program_that_is_second_best_stands_beside_what_was_refused() {
        let facts = KernelFacts::default();
        let mut status = Status::new(&support::plan(&facts, &[]), &[]);
        let [best, second] = Hook::Rss.programs() else { panic!("the rss hook has two programs") };
        let refusal = support::ProgramRefusal { program: *best, reason: "invalid access to map value".into() };
        status.hooks[0].lost = None;
        status.hooks[0].state =
            HookState::Attached { program: *second, cost: Default::default(), refused: vec![refusal] };
        let text = DoctorReport::new(&facts, status).text(false);
        let lines = "on   rss            raw tracepoint rss_stat (attached)\n     \
                     \x20              refused: typed tracepoint rss_stat: invalid access to map value\n";
        assert!(text.contains(lines), "{text}");
    }

    #[test]
    fn this_machine_gets_a_verdict() {
        let facts = session::detect(None).facts;
        let report = report(&facts, &[Hook::Charge]);
        assert_ne!(report.verdict, DoctorVerdict::Full);
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!(json["hooks"][14]["hook"], "charge");
        assert_eq!(json["hooks"][14]["state"], "left_out");
        assert!(json["layout"].is_object() && json["fatal"].is_array());
        assert!(report.text(false).contains("off  charge         left out on request"));
    }
}
