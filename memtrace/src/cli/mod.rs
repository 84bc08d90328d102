//! The command line: one file for each verb, arguments in and text out, and the one place that decides exit codes.
//!
//! What several verbs share: `config` has every setting, [`values`] the sizes and times that people type, [`terminal`]
//! how text looks and where it goes.

use std::io::Write;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::error::CommandError;
use crate::own_process;

pub mod agent;
mod agent_client;
pub mod completions;
mod config;
pub mod doctor;
pub mod exec_in;
pub mod incidents;
pub mod invoker;
mod kills_listing;
mod listing;
pub mod man;
pub mod name_frames;
pub mod record;
#[cfg(test)]
mod reference;
pub mod replay;
pub mod report;
pub mod schema;
pub mod stack_worker;
pub mod terminal;
pub mod values;

/// Memory flight recorder for Linux: what was killed, how memory got there, and which code took it
#[derive(Parser, Debug)]
#[command(name = "memtrace", version, max_term_width = 100, propagate_version = true)]
#[command(after_help = "Exit codes: 0 done, 1 failed, 2 usage, 3 this kernel or these privileges cannot do it.")]
pub struct Cli {
    /// The verb and its arguments.
    #[command(subcommand)]
    pub verb: Verb,
}

/// What memtrace is asked to do.
#[derive(Subcommand, Debug)]
pub enum Verb {
    /// Run the daemon: record every OOM kill, spike and near miss on this machine
    Agent(agent::Args),
    /// Run a command, or watch a process or cgroup, and report where its memory went
    Record(record::Args),
    /// Check what memtrace can do on this kernel with these privileges
    Doctor(doctor::Args),
    /// List the incidents that the agent recorded
    Incidents(incidents::Args),
    /// Show an incident or a recording; works on any machine, without root
    Report(report::Args),
    /// Run a journal through the engine again and list its incidents
    Replay(replay::Args),
    /// Print the JSON Schema of the incident file
    Schema(schema::Args),
    /// Enter a cgroup and become a command; started by `record`
    #[command(hide = true)]
    ExecIn(exec_in::Args),
    /// Name the stack frames that standard input asks for; started by the agent
    #[command(hide = true)]
    NameFrames(name_frames::Args),
    /// Unwind the stacks of a ring that comes with standard input; started by `agent` and `record`
    #[command(hide = true)]
    StackWorker(stack_worker::Args),
    /// Print a completion script for a shell
    Completions(completions::Args),
    /// Print the manual page, or write one for every verb
    #[command(hide = true)]
    Man(man::Args),
}

/// The exit code of a verb that did what it could: 0, or the code of `record`'s command. An error becomes 1, 2 or 3.
pub type VerbResult = anyhow::Result<u8>;

/// Runs the verb and turns its result into the exit code of the process.
pub fn run(cli: Cli) -> ExitCode {
    own_process::limit_kept_memory();
    let outcome = match cli.verb {
        Verb::Agent(args) => agent::run(&args),
        Verb::Record(args) => record::run(&args),
        Verb::Doctor(args) => doctor::run(&args),
        Verb::Incidents(args) => incidents::run(&args),
        Verb::Report(args) => report::run(&args),
        Verb::Replay(args) => replay::run(&args),
        Verb::Schema(args) => schema::run(&args),
        Verb::ExecIn(args) => exec_in::run(&args),
        Verb::NameFrames(args) => name_frames::run(&args),
        Verb::StackWorker(args) => stack_worker::run(&args),
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
