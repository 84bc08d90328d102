//! The programs that tests measure and kill. Each reaches a known memory state in a known way.
//!
//! Every subcommand prints JSON lines on stdout: first `start` (pid, start in clock ticks, comm),
//! then its events.

use std::io::{Read, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::{Parser, Subcommand};
use memtrace_tests::process;
use rustix::event::{PollFd, PollFlags, Timespec};
use serde_json::{Value, json};

mod change;
mod counted;
mod family;
mod hostile;
mod kernel_side;
mod loops;
mod memory;
mod mix;
mod raw;
mod secret;
mod silent;
mod spikes;

#[derive(Parser)]
#[command(about = "Programs the memtrace tests measure and kill")]
struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Grow steadily, then wait for the end of stdin
    Slow {
        #[arg(long)]
        mib: usize,
        #[arg(long)]
        mib_per_s: usize,
    },
    /// Take memory as fast as the kernel gives it
    Burst {
        #[arg(long)]
        mib: usize,
        /// Threads that take it; default one a CPU
        #[arg(long)]
        threads: Option<usize>,
        /// Touch page by page instead of asking the kernel to populate
        #[arg(long)]
        touch: bool,
        /// Say `gated` and wait for a line on stdin, or its end, before
        #[arg(long)]
        gate: bool,
    },
    /// Many small processes: K copies that each touch some and wait
    Many {
        #[arg(long)]
        processes: usize,
        #[arg(long)]
        mib_each: usize,
    },
    /// Fill a file on tmpfs
    Tmpfs {
        #[arg(long)]
        mib: usize,
        #[arg(long, default_value = "/dev/shm")]
        dir: PathBuf,
    },
    /// A small parent whose child grows until it is done or killed
    ForkChild {
        #[arg(long)]
        mib: usize,
    },
    /// Reach a known quiet state, print `ready`, wait for the end of stdin
    Hold {
        #[arg(long, default_value_t = 0)]
        anon_mib: usize,
        #[arg(long, default_value_t = 0)]
        file_mib: usize,
        #[arg(long, default_value_t = 0)]
        shmem_mib: usize,
        #[arg(long, default_value_t = 1)]
        threads: usize,
        /// Each thread on a processor of its own, as far as there are some
        #[arg(long)]
        pinned: bool,
        /// Where the mapped file is made
        #[arg(long, default_value = "/var/tmp")]
        dir: PathBuf,
    },
    /// Parent and child each hold memory; wait for the end of stdin
    Forked {
        #[arg(long)]
        mib: usize,
    },
    /// Take some memory, wait, exit with a code
    ExitAfter {
        #[arg(long)]
        ms: u64,
        #[arg(long, default_value_t = 0)]
        mib: usize,
        #[arg(long, default_value_t = 0)]
        code: u8,
    },
    /// Fill the buffers of sockets that nobody reads: kernel memory, no page of which is mapped
    Sockets {
        #[arg(long)]
        mib: usize,
    },
    /// Read a file or block device through the page cache, then perhaps take memory of its own
    Cache {
        #[arg(long)]
        file: PathBuf,
        #[arg(long)]
        mib: usize,
        /// How often to read it
        #[arg(long, default_value_t = 1)]
        rounds: usize,
        #[arg(long, default_value_t = 0)]
        then_anon_mib: usize,
    },
    /// Map, touch and give back as fast as the kernel lets, for a time
    Churn {
        #[arg(long)]
        ms: u64,
    },
    /// Take memory in small steps with a random secret all over the stack; prints the secret first
    Secret {
        #[arg(long)]
        mib: usize,
    },
    /// Over a base level, take memory, hold it for a moment, give it back; says when and how much
    Spikes {
        #[arg(long, default_value_t = 32)]
        base_mib: usize,
        /// One after the other: MIB:HOLD_MS:PAUSE_MS, the pause before it
        #[arg(required = true)]
        spikes: Vec<spikes::SpikeShape>,
    },
    /// Mixed work (file cache, tmpfs, sockets, anonymous memory, children) in steps: one for every line on stdin
    Mix {
        #[arg(long)]
        seed: u64,
        /// Where files are kept
        #[arg(long)]
        dir: PathBuf,
        /// Where files on tmpfs are kept
        #[arg(long)]
        tmpfs: PathBuf,
    },
    /// Touch one byte of every 2 MiB of memory that wants huge pages
    Huge {
        #[arg(long)]
        mib: usize,
    },
    /// Two processes with one address space (CLONE_VM without CLONE_THREAD), the first of which grows
    ShareMm {
        #[arg(long)]
        mib: usize,
    },
    /// A child that grows without ever having called exec
    ForkOnly {
        #[arg(long)]
        mib: usize,
    },
    /// Take memory, then become another program, which takes some too
    ExecGrow {
        #[arg(long)]
        first_mib: usize,
        #[arg(long)]
        mib: usize,
    },
    /// Take memory, move into another cgroup (and a cgroup namespace of it), take more
    MoveGrow {
        #[arg(long)]
        first_mib: usize,
        #[arg(long)]
        to: PathBuf,
        #[arg(long)]
        mib: usize,
    },
    /// Go through cgroups whose directories are PREFIX and a number, and take some memory in each
    Wander {
        #[arg(long)]
        prefix: String,
        #[arg(long)]
        from: usize,
        #[arg(long)]
        to: usize,
    },
    /// Run into RLIMIT_AS, which is no OOM
    LimitAs {
        #[arg(long)]
        mib: usize,
    },
    /// End by reading an address that is not mapped
    Segv,
    /// Swap to a disk with a swap signature, or no longer
    Swap {
        #[arg(long)]
        device: PathBuf,
        #[arg(long)]
        off: bool,
    },
    /// Fork children and kill each with SIGKILL, one after the other
    KillChildren {
        #[arg(long)]
        count: usize,
    },
    /// Fork, as does every child, until there are so many processes of this user
    ForkBomb {
        #[arg(long)]
        most: u64,
        #[arg(long)]
        ms: u64,
    },
    /// Map so much as nobody has and touch a little everywhere, until killed
    Sparse {
        #[arg(long)]
        gib: usize,
    },
    /// Map a file of a FUSE file system that stops to answer; after a line on stdin take memory, wait for another
    Silent {
        /// Where it is mounted; those that are hidden are in a /tmp of their own
        #[arg(long)]
        dir: PathBuf,
        #[arg(long)]
        mib: usize,
        /// What it is hidden behind
        #[arg(long, value_enum, default_value_t = silent::Behind::Detached)]
        behind: silent::Behind,
        /// From then on answer after so long, instead of never
        #[arg(long)]
        answer_ms: Option<u64>,
    },
    /// Take memory from code it compiled itself, beside a perf map that grows
    PerfMap {
        /// Size of the map at the start
        #[arg(long)]
        map_mib: usize,
        #[arg(long)]
        ms: u64,
        /// Put another file in its place with each step
        #[arg(long)]
        replace: bool,
    },
    /// As somebody without rights, take memory from code that is named by a perf map of these lines
    NamedBy {
        /// Where they are
        #[arg(long)]
        map: PathBuf,
        /// The perf map is a link to them, not a copy
        #[arg(long)]
        link: bool,
    },
    /// Map code of thousands of links to one ELF file with the longest headers, and take memory
    LinkedModules {
        /// Where the links are made, unless they are there
        #[arg(long)]
        dir: PathBuf,
        #[arg(long)]
        count: usize,
        #[arg(long)]
        ms: u64,
    },
    /// Map a file as code that nobody else can open, by a lease, and take memory
    Leased {
        /// Where the file is made
        #[arg(long)]
        dir: PathBuf,
        #[arg(long)]
        ms: u64,
    },
    /// Take memory, with the own address space locked most of the time
    Locked {
        #[arg(long)]
        mappings: usize,
        #[arg(long)]
        ms: u64,
    },
    /// Take memory in a mount namespace of its own with many mounts
    Mounts {
        /// Below which it mounts
        #[arg(long)]
        dir: PathBuf,
        #[arg(long)]
        count: usize,
        #[arg(long)]
        ms: u64,
    },
    /// Take memory from code in a file with debug information that grows without end
    DebugBomb {
        /// Where the file is made
        #[arg(long)]
        dir: PathBuf,
        #[arg(long)]
        mib: usize,
    },
    /// End by SIGKILL from itself, which is no OOM kill
    KillSelf,
    /// One thing over and over for a time; says how often
    Loop(loops::LoopArgs),
    /// Fork children that each touch some memory and end, up to 64 at a time
    Passing {
        #[arg(long)]
        processes: usize,
        #[arg(long)]
        kib_each: usize,
    },
    /// Children that are forked and wait, until the end of stdin; says who they are
    Crowd {
        #[arg(long)]
        processes: usize,
        /// Each maps, touches and gives back 1 MiB every second
        #[arg(long)]
        swing: bool,
    },
    /// Rounds of one operation, and how long it took in each
    Rounds {
        #[arg(value_enum)]
        operation: counted::Operation,
        #[arg(long, default_value_t = 20)]
        rounds: usize,
        /// Where the file to read is made
        #[arg(long, default_value = "/var/tmp/memtrace-tests.page")]
        file: PathBuf,
    },
    /// Take memory page by page until killed, and keep in a file when the last page was there
    UntilKilled {
        #[arg(long)]
        stamp: PathBuf,
    },
    /// Print the kernel's watermark of the memory cgroup this runs in
    OwnPeak,
    /// What the families spawn: take memory under another name, then wait for the end of stdin or exit
    #[command(hide = true)]
    Member {
        #[arg(long)]
        mib: usize,
        #[arg(long)]
        comm: String,
        #[arg(long)]
        wait: bool,
    },
}

fn main() -> ExitCode {
    match run(Args::parse().what) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("workload: {error:#}");
            ExitCode::from(125)
        }
    }
}

fn run(what: What) -> anyhow::Result<ExitCode> {
    if let What::Member { comm, .. } = &what {
        std::fs::write("/proc/self/comm", comm).context("failed to set the process name")?;
    }
    say("start", &json!({}))?;
    match what {
        What::Slow { mib, mib_per_s } => {
            let held = memory::grow_slowly(mib, mib_per_s);
            say("ready", &json!({ "anon_mib": mib }))?;
            wait_for_end_of_stdin()?;
            drop(held);
        }
        What::Burst { mib, threads, touch, gate } => take_at_once(mib, threads, touch, gate)?,
        What::Many { processes, mib_each } => family::many(processes, mib_each)?,
        What::Tmpfs { mib, dir } => memory::fill_tmpfs(mib, &dir)?,
        What::ForkChild { mib } => family::fork_child(mib)?,
        What::Hold { anon_mib, file_mib, shmem_mib, threads, pinned, dir } => {
            memory::hold(anon_mib, file_mib, shmem_mib, memory::HoldThreads { count: threads, pinned }, &dir)?;
        }
        What::Forked { mib } => family::forked(mib)?,
        What::ExitAfter { ms, mib, code } => {
            let held = memory::touched(mib);
            std::thread::sleep(Duration::from_millis(ms));
            drop(held);
            return Ok(ExitCode::from(code));
        }
        What::Sockets { mib } => kernel_side::sockets(mib)?,
        What::Cache { file, mib, rounds, then_anon_mib } => kernel_side::cache(&file, mib, rounds, then_anon_mib)?,
        What::Churn { ms } => memory::churn(Duration::from_millis(ms))?,
        What::Secret { mib } => secret::keep(mib)?,
        What::Spikes { base_mib, spikes } => spikes::run(base_mib, &spikes)?,
        What::Mix { seed, dir, tmpfs } => mix::run(seed, &dir, &tmpfs)?,
        What::Huge { mib } => memory::huge(mib)?,
        What::ShareMm { mib } => change::share_mm(mib)?,
        What::ForkOnly { mib } => change::fork_only(mib)?,
        What::ExecGrow { first_mib, mib } => change::exec_grow(first_mib, mib)?,
        What::MoveGrow { first_mib, to, mib } => change::move_grow(first_mib, &to, mib)?,
        What::Wander { prefix, from, to } => change::wander(&prefix, from..to)?,
        What::LimitAs { mib } => memory::limit_as(mib)?,
        What::Segv => raw::segv(),
        What::Swap { device, off } => raw::swap(&device, off)?,
        What::KillChildren { count } => family::kill_children(count)?,
        What::ForkBomb { most, ms } => family::fork_bomb(most, Duration::from_millis(ms))?,
        What::Sparse { gib } => memory::sparse(gib)?,
        What::Silent { dir, mib, behind, answer_ms } => {
            silent::file_system(&dir, mib, answer_ms.map(Duration::from_millis), behind)?;
        }
        What::PerfMap { map_mib, ms, replace } => hostile::perf_map(map_mib, Duration::from_millis(ms), replace)?,
        What::NamedBy { map, link } => hostile::named_by(&map, link)?,
        What::LinkedModules { dir, count, ms } => hostile::linked_modules(&dir, count, Duration::from_millis(ms))?,
        What::Leased { dir, ms } => hostile::leased(&dir, Duration::from_millis(ms))?,
        What::Locked { mappings, ms } => hostile::locked(mappings, Duration::from_millis(ms))?,
        What::Mounts { dir, count, ms } => hostile::mounts(&dir, count, Duration::from_millis(ms))?,
        What::DebugBomb { dir, mib } => hostile::debug_bomb(&dir, mib)?,
        What::KillSelf => process::signal(std::process::id(), rustix::process::Signal::KILL)?,
        What::Loop(args) => loops::run(&args)?,
        What::Passing { processes, kib_each } => family::passing(processes, kib_each)?,
        What::Crowd { processes, swing } => family::crowd(processes, swing)?,
        What::Rounds { operation, rounds, file } => counted::rounds(operation, rounds, &file)?,
        What::UntilKilled { stamp } => counted::until_killed(&stamp)?,
        What::OwnPeak => {
            let (place, peak) = memtrace_tests::cage::own_peak()?;
            say("own_peak", &json!({ "path": place.path, "peak_bytes": peak }))?;
        }
        What::Member { mib, wait, .. } => {
            let held = memory::touched(mib);
            say("ready", &json!({ "anon_mib": mib }))?;
            if wait {
                wait_for_end_of_stdin()?;
            }
            drop(held);
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// What a gated workload touches before it waits.
const WARM_UP_BYTES: usize = 2 << 20;

/// Takes memory at once; with `gate`, after a line on stdin. The default is a thread for each CPU.
fn take_at_once(mib: usize, threads: Option<usize>, touch: bool, gate: bool) -> anyhow::Result<()> {
    if gate {
        // Grows by more than any sample interval of a test, so that a stack of it was taken, and
        // gives the memory back.
        drop(std::hint::black_box(vec![1u8; WARM_UP_BYTES]));
        say("gated", &json!({}))?;
        wait_for_end_of_stdin()?;
    }
    let threads = threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from));
    let begin = std::time::Instant::now();
    let held = memory::burst(mib, threads, touch)?;
    let micros = u64::try_from(begin.elapsed().as_micros()).unwrap_or(u64::MAX);
    say("done", &json!({ "anon_mib": mib, "threads": threads, "elapsed_us": micros }))?;
    drop(held);
    Ok(())
}

/// Prints an event as a JSON line, with the pid of the process.
fn say(event: &str, more: &Value) -> anyhow::Result<()> {
    let comm = std::fs::read("/proc/self/comm").context("failed to read the process name")?;
    let mut line = json!({
        "event": event, "pid": std::process::id(), "start_ticks": process::start_ticks("self")?,
        "comm": String::from_utf8_lossy(&comm).trim_end_matches('\n'),
    });
    if let (Some(line), Some(more)) = (line.as_object_mut(), more.as_object()) {
        line.extend(more.clone());
    }
    let mut out = std::io::stdout().lock();
    writeln!(out, "{line}").and_then(|()| out.flush()).context("failed to write to stdout")
}

/// Whether so much time is over since `begin`; without a time, whether whoever started this process
/// has closed its stdin.
fn is_over(begin: Instant, time: Duration) -> bool {
    if !time.is_zero() {
        return begin.elapsed() >= time;
    }
    let stdin = std::io::stdin();
    let mut polled = [PollFd::new(&stdin, PollFlags::empty())];
    rustix::event::poll(&mut polled, Some(&Timespec::default())).is_ok()
        && polled.iter().any(|polled| polled.revents().contains(PollFlags::HUP))
}

fn wait_for_end_of_stdin() -> anyhow::Result<()> {
    let mut byte = [0u8; 1];
    // one byte at a time: no buffer may grow while the test looks at an idle process
    while std::io::stdin().read(&mut byte).context("failed to read stdin")? > 0 {
        if byte == *b"\n" {
            break;
        }
    }
    Ok(())
}
