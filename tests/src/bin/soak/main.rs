//! A soak: one agent, everything that is known to hurt one at the same time, and beside that a kill
//! every second. At the end: how many kills are in the ledger and how soon, how long health took,
//! how much memory the agent took. Fails if a kill is missing, the agent ended, or it once was not
//! healthy.

mod attacks;
mod figures;
mod kills;
mod watch;

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::Parser;
use memtrace_tests::agent::{Agent, AgentOptions};
use memtrace_tests::figures::say;
use memtrace_tests::{process, programs};

/// Connections of the attacks, files of their workloads, and some more.
const FILES: u64 = 4096;
/// Time in which what happened last gets into the ledger.
const SETTLE: Duration = Duration::from_secs(10);
/// Between two lines about how it goes.
const PROGRESS: Duration = Duration::from_secs(60);

#[derive(Parser)]
#[command(about = "Everything that hurts an agent at once, beside a kill a second")]
struct Args {
    /// How long
    #[arg(long, default_value_t = 60)]
    minutes: u64,
    /// Only these attacks; none with `none` [default: all]
    #[arg(long, value_delimiter = ',')]
    attacks: Vec<String>,
    /// One more argument for the agent; may be repeated
    #[arg(long = "option", value_name = "ARG", allow_hyphen_values = true)]
    options: Vec<String>,
    /// Where the agent writes what it says
    #[arg(long, value_name = "FILE")]
    log: Option<PathBuf>,
}

/// What the threads share.
struct Yard {
    /// A directory that everybody can read, for what the attacks need.
    dir: PathBuf,
    /// The program of the attackers, where everybody may run it.
    workload: PathBuf,
    /// Port of the agent.
    port: u16,
    /// Process id of the agent.
    agent: u32,
    state_dir: PathBuf,
    /// Set at the end.
    over: AtomicBool,
    /// Set when what happened last has had time to get into the ledger.
    settled: AtomicBool,
    /// What must not have happened.
    faults: Mutex<Vec<String>>,
}

impl Yard {
    fn is_over(&self) -> bool {
        self.over.load(Ordering::Relaxed)
    }

    /// Sleeps, but no longer than until the end.
    fn rest(&self, time: Duration) {
        let begin = Instant::now();
        while !self.is_over() && begin.elapsed() < time {
            std::thread::sleep(Duration::from_millis(50).min(time));
        }
    }

    fn fault(&self, what: String) {
        if let Ok(mut faults) = self.faults.lock() {
            say(format_args!("FAULT {what}"));
            faults.push(what);
        }
    }
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("soak: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Whether all went as it should.
fn run(args: &Args) -> anyhow::Result<bool> {
    programs::require_root()?;
    process::allow_files(FILES)?;
    let chosen = attacks::chosen(&args.attacks)?;
    let dir = tempfile::Builder::new().prefix("memtrace-soak-").tempdir_in("/var/tmp").context("no directory")?;
    std::fs::set_permissions(dir.path(), Permissions::from_mode(0o755))?;
    let workload = dir.path().join("workload");
    std::fs::copy(programs::path("workload")?, &workload).context("failed to copy the workload")?;
    let extra: Vec<&str> = args.options.iter().map(String::as_str).collect();
    let mut options = AgentOptions::below(dir.path()).with(&extra);
    // a file system in memory, as the default is
    let journal = tempfile::Builder::new().prefix("memtrace-soak-").tempdir_in("/dev/shm").context("no directory")?;
    options.journal_dir = journal.path().join("journal");
    let mut agent = options.start()?;
    let yard = Yard {
        dir: dir.path().to_owned(),
        workload,
        port: agent.port(),
        agent: agent.pid(),
        state_dir: options.state_dir.clone(),
        over: AtomicBool::new(false),
        settled: AtomicBool::new(false),
        faults: Mutex::default(),
    };
    let (kills, watch) = (kills::Kills::default(), watch::Watch::default());
    let rounds: Vec<attacks::Rounds> = chosen.iter().map(|attack| attacks::Rounds::of(attack)).collect();
    let begin = Instant::now();
    std::thread::scope(|scope| {
        let mut making: Vec<_> = rounds.iter().map(|rounds| scope.spawn(|| rounds.run(&yard))).collect();
        making.push(scope.spawn(|| kills.make(&yard)));
        scope.spawn(|| kills.follow_ledger(&yard));
        scope.spawn(|| watch.health(&yard));
        scope.spawn(|| watch.memory(&yard));
        while begin.elapsed() < Duration::from_secs(args.minutes * 60) && !yard.is_over() {
            let left = Duration::from_secs(args.minutes * 60).saturating_sub(begin.elapsed());
            yard.rest(PROGRESS.min(left));
            say(format_args!("{:4} s: {}; {}", begin.elapsed().as_secs(), kills.summary(), watch.summary()));
        }
        yard.over.store(true, Ordering::Relaxed);
        let panicked = making.into_iter().filter_map(|thread| thread.join().err()).count();
        if panicked > 0 {
            yard.fault(format!("{panicked} threads panicked"));
        }
        std::thread::sleep(SETTLE);
        yard.settled.store(true, Ordering::Relaxed);
    });
    rounds.iter().for_each(|rounds| say(format_args!("attack {}", rounds.summary())));
    say(format_args!("kills: {}", kills.summary()));
    say(format_args!("the latest: {}", kills.latest()));
    say(format_args!("agent: {}", watch.summary()));
    say(format_args!("memory over time, MiB (recorder + worker): {}", watch.memory_over_time()));
    end(&mut agent, args, &yard, &kills)?;
    let faults = yard.faults.into_inner().map_err(|_| anyhow::anyhow!("a thread panicked"))?;
    say(format_args!("{} faults", faults.len()));
    Ok(faults.is_empty())
}

/// Asks the agent what it lost and stops it.
fn end(agent: &mut Agent, args: &Args, yard: &Yard, kills: &kills::Kills) -> anyhow::Result<()> {
    let lost = agent.get("/metrics").map(|(_, text)| figures::losses(&text));
    say(format_args!("losses: {}", lost.unwrap_or_else(|error| format!("{error:#}"))));
    for missing in kills.missing() {
        yard.fault(format!("the kill of {missing} is in no ledger with its path"));
    }
    match agent.stop() {
        Ok(status) if status.success() => {}
        Ok(status) => yard.fault(format!("the agent ended with {status}")),
        Err(error) => yard.fault(format!("{error:#}")),
    }
    if let Some(log) = &args.log {
        std::fs::write(log, agent.stderr()).with_context(|| format!("failed to write {}", log.display()))?;
    }
    Ok(())
}
