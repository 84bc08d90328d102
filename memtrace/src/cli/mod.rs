//! The command line: one file per verb, arguments in, text out; and the one place that decides exit codes.

use std::io::Write;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::error::CommandError;

pub mod agent;
pub mod completions;
pub mod doctor;
pub mod exec_in;
pub mod incidents;
pub mod invoker;
mod listing;
pub mod man;
pub mod name_frames;
pub mod record;
pub mod replay;
pub mod report;
pub mod schema;
pub mod terminal;
pub mod values;

/// Where the agent keeps incidents unless told otherwise.
pub const STATE_DIR: &str = "/var/lib/memtrace";

/// The memory flight recorder for Linux: what happened at an OOM kill, how it got there, who did it.
#[derive(Parser, Debug)]
#[command(name = "memtrace", version, max_term_width = 100, propagate_version = true)]
#[command(after_help = "Exit codes: 0 done, 1 failed, 2 usage, 3 this kernel or these privileges cannot do it.")]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub verb: Verb,
}

/// The verbs.
#[derive(Subcommand, Debug)]
pub enum Verb {
    /// The daemon: records an incident for every OOM kill and spike on this machine
    Agent(agent::Args),
    /// Run one program under the tracer and see where memory went
    Record(record::Args),
    /// Show what this kernel and these privileges allow, and what is lost without the rest
    Doctor(doctor::Args),
    /// List what the agent recorded
    Incidents(incidents::Args),
    /// The post-mortem of one incident or recording; works anywhere, without root
    Report(report::Args),
    /// Run a journal through the engine again
    Replay(replay::Args),
    /// Print the JSON Schema of the incident file
    Schema(schema::Args),
    /// Enter a cgroup and become a command (what `record` starts)
    #[command(hide = true)]
    ExecIn(exec_in::Args),
    /// Name the frames that standard input asks for (what the agent starts)
    #[command(hide = true)]
    NameFrames(name_frames::Args),
    /// Print a completion script for a shell
    Completions(completions::Args),
    /// Print the manual page, or write all of them
    #[command(hide = true)]
    Man(man::Args),
}

/// What a verb ends with; `record` passes its child's code on.
pub type Outcome = anyhow::Result<u8>;

/// Runs the verb and turns its outcome into the process's exit code.
pub fn run(cli: Cli) -> ExitCode {
    let outcome = match cli.verb {
        Verb::Agent(args) => agent::run(args),
        Verb::Record(args) => record::run(&args),
        Verb::Doctor(args) => doctor::run(&args),
        Verb::Incidents(args) => incidents::run(&args),
        Verb::Report(args) => report::run(&args),
        Verb::Replay(args) => replay::run(&args),
        Verb::Schema(args) => schema::run(&args),
        Verb::ExecIn(args) => exec_in::run(&args),
        Verb::NameFrames(args) => name_frames::run(&args),
        Verb::Completions(args) => completions::run(&args),
        Verb::Man(args) => man::run(&args),
    };
    match outcome {
        Ok(code) => ExitCode::from(code),
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "memtrace: {error:#}");
            ExitCode::from(match error.downcast_ref::<CommandError>() {
                Some(CommandError::Usage(_)) => 2,
                Some(CommandError::Unsupported(_)) => 3,
                None => 1,
            })
        }
    }
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error
        .chain()
        .filter_map(|cause| cause.downcast_ref::<std::io::Error>())
        .any(|io| io.kind() == std::io::ErrorKind::BrokenPipe)
}
