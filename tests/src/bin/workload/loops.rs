//! Repeats one operation, as fast as possible or at a fixed rate, for benchmarks.

use std::fs::File;
use std::hint::black_box;
use std::io::Read;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use memmap2::{Advice, MmapMut, MmapOptions};
use serde_json::json;

use crate::{is_over, memory, raw, say};

/// How far ahead of its rate a loop may be before it sleeps.
const AHEAD: Duration = Duration::from_millis(1);

#[derive(clap::Args)]
pub(crate) struct LoopArgs {
    what: LoopKind,
    /// How long; 0: until stdin is closed
    #[arg(long)]
    ms: u64,
    #[arg(long, default_value_t = 1)]
    threads: usize,
    /// Size of a region of `fresh`
    #[arg(long, default_value_t = 16)]
    mib: usize,
    /// Units a second and thread at most
    #[arg(long)]
    per_s: Option<u32>,
    /// Units a thread at most
    #[arg(long, default_value_t = u64::MAX)]
    most: u64,
    /// Name of the process and its children, 15 bytes at most
    #[arg(long)]
    comm: Option<String>,
}

#[derive(Clone, Copy, PartialEq, clap::ValueEnum)]
pub(crate) enum LoopKind {
    /// Map a region, touch every page, give it back; a unit is a page
    Fresh,
    /// Map 64 KiB, touch every page, give it back; a unit is a page
    Small,
    /// Map 1 MiB, touch every page, give it back; a unit is the whole
    Swing,
    /// Map 64 KiB and give it back untouched
    Map,
    /// getpid(2)
    Getpid,
    /// read(2) of one byte of /dev/zero
    Read,
    /// Fork a child that ends at once, and wait for it
    Fork,
    /// Start /bin/true and wait for it
    Exec,
    /// malloc and free of 16 bytes to 8 KiB, a thousand kept
    Malloc,
}

/// Runs the loop in each thread and prints how many units it did.
pub(crate) fn run(args: &LoopArgs) -> anyhow::Result<()> {
    if let Some(comm) = &args.comm {
        std::fs::write("/proc/self/comm", comm).context("failed to set the process name")?;
    }
    if args.ms == 0 {
        say("attacking", &json!({}))?;
    }
    let (begin, cpu) = (Instant::now(), raw::cpu_ns());
    let units = if args.threads <= 1 {
        // in this thread: only a single-threaded process may fork here
        repeat(args, begin)?
    } else {
        std::thread::scope(|scope| -> anyhow::Result<u64> {
            let threads: Vec<_> = (0..args.threads).map(|_| scope.spawn(|| repeat(args, begin))).collect();
            let each = threads.into_iter().map(|t| t.join().map_err(|_| anyhow!("a thread panicked"))?);
            Ok(each.collect::<anyhow::Result<Vec<_>>>()?.into_iter().sum())
        })?
    };
    let elapsed_ns = u64::try_from(begin.elapsed().as_nanos()).unwrap_or(u64::MAX);
    let cpu_ns = raw::cpu_ns().saturating_sub(cpu);
    say("looped", &json!({ "units": units, "elapsed_ns": elapsed_ns, "cpu_ns": cpu_ns }))
}

fn repeat(args: &LoopArgs, begin: Instant) -> anyhow::Result<u64> {
    let time = Duration::from_millis(args.ms);
    let mut step = stepper(args)?;
    let mut units = 0;
    while units < args.most && !is_over(begin, time) {
        units += step()?;
        if let Some(per_s) = args.per_s {
            let due = begin + Duration::from_secs_f64(units as f64 / f64::from(per_s.max(1)));
            let early = due.saturating_duration_since(Instant::now());
            if early > AHEAD {
                std::thread::sleep(early);
            }
        }
    }
    Ok(units)
}

/// A closure that does some units and returns how many: enough that reading the clock costs little
/// in comparison.
fn stepper(args: &LoopArgs) -> anyhow::Result<Box<dyn FnMut() -> anyhow::Result<u64>>> {
    let bytes = args.mib << 20;
    Ok(match args.what {
        LoopKind::Fresh => Box::new(move || touch_region(bytes)),
        LoopKind::Small => Box::new(|| (0..16).map(|_| touch_region(64 << 10)).sum()),
        LoopKind::Swing => Box::new(|| swing().map(|()| 1)),
        LoopKind::Map => Box::new(|| {
            for _ in 0..64 {
                black_box(map(64 << 10)?);
            }
            Ok(64)
        }),
        LoopKind::Getpid => Box::new(|| {
            for _ in 0..256 {
                black_box(rustix::process::getpid());
            }
            Ok(256)
        }),
        LoopKind::Read => {
            let mut zeros = File::open("/dev/zero").context("failed to open /dev/zero")?;
            let mut byte = [1u8];
            Box::new(move || {
                for _ in 0..256 {
                    zeros.read_exact(black_box(&mut byte)).context("failed to read /dev/zero")?;
                }
                Ok(256)
            })
        }
        LoopKind::Fork => Box::new(|| match raw::fork()? {
            0 => raw::leave(),
            child => raw::wait(child).map(|_| 1),
        }),
        LoopKind::Exec => Box::new(|| {
            let mut command = Command::new("/bin/true");
            command.stdin(Stdio::null()).stdout(Stdio::null());
            command.status().context("failed to run /bin/true").map(|_| 1)
        }),
        LoopKind::Malloc => {
            let mut kept: Vec<Vec<u8>> = Vec::new();
            kept.resize_with(1000, Vec::new);
            let mut random = 0x9e37_79b9_7f4a_7c15_u64;
            Box::new(move || {
                for place in &mut kept {
                    random ^= random << 13;
                    random ^= random >> 7;
                    random ^= random << 17;
                    // sizes 2^4 to 2^13, each equally often
                    let size = 16usize << (random % 10);
                    *place = black_box(Vec::with_capacity(size));
                }
                Ok(1000)
            })
        }
    })
}

/// Takes and returns 1 MiB.
pub(crate) fn swing() -> anyhow::Result<()> {
    touch_region(1 << 20).map(drop)
}

fn map(bytes: usize) -> anyhow::Result<MmapMut> {
    MmapOptions::new().len(bytes).map_anon().context("failed to map anonymous memory")
}

/// Asks for small pages, whatever this machine's default is. Returns their number.
fn touch_region(bytes: usize) -> anyhow::Result<u64> {
    let mut memory = map(bytes)?;
    // a kernel without huge pages refuses this advice and does not need it
    let _ = memory.advise(Advice::NoHugePage);
    memory::touch(&mut memory);
    Ok(u64::try_from(bytes / rustix::param::page_size())?)
}
