//! Runs a command in a temporary memory cgroup with a limit and exits with its code (128 plus the
//! signal if killed).

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

use anyhow::Context;
use clap::Parser;
use memtrace_tests::{cage, privileges, process};

#[derive(Parser)]
#[command(about = "Run a command in a transient memory cgroup with a limit")]
struct Args {
    /// Limit, with K, M or G
    #[arg(long, value_parser = size, required_unless_present_any = ["enter", "keep"])]
    limit: Option<u64>,
    /// Enter this cgroup directory and become the command (used on itself)
    #[arg(long, conflicts_with = "limit")]
    enter: Option<PathBuf>,
    /// Keep only the capabilities of this mask (hexadecimal) and little locked memory, and become the command
    #[arg(long, conflicts_with_all = ["limit", "enter"])]
    keep: Option<String>,
    /// Say on stderr what the cgroup counted, as a JSON line
    #[arg(long)]
    stats: bool,
    /// Program and arguments
    #[arg(last = true, required = true)]
    command: Vec<OsString>,
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("oomcage: {error:#}");
            ExitCode::from(125)
        }
    }
}

fn run(args: &Args) -> anyhow::Result<u8> {
    let (program, rest) = args.command.split_first().context("no command")?;
    if let Some(dir) = &args.enter {
        cage::enter(dir)?;
        let error = Command::new(program).args(rest).exec();
        return Err(error).with_context(|| format!("failed to run {}", program.display()));
    }
    if let Some(mask) = &args.keep {
        privileges::keep(u64::from_str_radix(mask, 16).context("not a mask")?)?;
        let error = Command::new(program).args(rest).exec();
        return Err(error).with_context(|| format!("failed to run {}", program.display()));
    }
    let cage = cage::Cage::new("cage", args.limit.context("no limit")?)?;
    let status = cage.command(program)?.args(rest).status().context("failed to start the command")?;
    if args.stats {
        let stats = serde_json::json!({
            "path": cage.path(), "id": cage.id(), "limit": cage.limit(), "peak": cage.peak()?,
            "usage": cage.usage()?, "failcnt": cage.failcnt()?, "oom_kills": cage.oom_kills()?,
        });
        eprintln!("{stats}");
    }
    cage.remove()?;
    Ok(u8::try_from(process::shell_code(status)).unwrap_or(u8::MAX))
}

fn size(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.trim_end_matches(['i', 'B']).strip_suffix(['K', 'M', 'G', 'k', 'm', 'g']) {
        None => (text, 0),
        Some(digits) if text.contains(['K', 'k']) => (digits, 10),
        Some(digits) if text.contains(['M', 'm']) => (digits, 20),
        Some(digits) => (digits, 30),
    };
    let number: u64 = digits.parse().map_err(|_| format!("{text} is not a size such as 120M"))?;
    number.checked_mul(1 << shift).ok_or_else(|| format!("{text} is too large"))
}
