//! Times rounds of one operation. Where the clock counts instructions, the times are instruction
//! counts.

use std::fs::File;
use std::hint::black_box;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, ensure};
use memmap2::{Advice, MmapMut, MmapOptions};
use rustix::time::{ClockId, clock_gettime};
use serde_json::json;

use crate::raw;

/// The operation.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub(crate) enum Operation {
    /// Touch a fresh page of anonymous memory
    Fault,
    /// Map and unmap 64 KiB, none of it touched
    Map,
    /// The cheapest system call
    Syscall,
    /// Fork a child that exits, and wait for it
    Fork,
    /// Run a tiny program, and wait for it
    Exec,
    /// Read a page of a cached file
    Read,
}

/// The tiny program.
const TINY: &str = "/bin/true";

/// Rounds before those that count. They fill caches and the linker's tables, and let the agent meet
/// this process.
const WARM_UP: usize = 2;

impl Operation {
    /// Operations in a round. A round must end before the agent's next turn (ten a second) and
    /// mostly before the next timer tick (250 a second, at one nanosecond an instruction). Faults
    /// need many: the agent and the kernel's own accounting act on one in 64.
    fn count(self) -> u32 {
        match self {
            Self::Fault => 512,
            Self::Map => 40,
            Self::Syscall => 2000,
            Self::Fork | Self::Exec => 1,
            Self::Read => 100,
        }
    }
}

/// Runs the rounds and prints the nanoseconds an operation took in each.
pub(crate) fn rounds(operation: Operation, rounds: usize, file: &Path) -> anyhow::Result<()> {
    let count = operation.count();
    let file = match operation {
        Operation::Read => Some(cached(file)?),
        _ => None,
    };
    let mut page = vec![0u8; rustix::param::page_size()];
    let mut found = Vec::with_capacity(rounds);
    for round in 0..rounds + WARM_UP {
        // mapped and unmapped outside the timed part
        let mut fresh = fresh(if matches!(operation, Operation::Fault) { count } else { 1 })?;
        let begin = monotonic_ns();
        match operation {
            Operation::Fault => crate::memory::touch(&mut fresh),
            _ => (0..count).try_for_each(|_| once(operation, file.as_ref(), &mut page))?,
        }
        let took = monotonic_ns() - begin;
        drop(fresh);
        if round >= WARM_UP {
            found.push(took as f64 / f64::from(count));
        }
    }
    crate::say("rounds", &json!({ "operations": count, "ns": found }))
}

fn once(operation: Operation, file: Option<&File>, page: &mut [u8]) -> anyhow::Result<()> {
    match operation {
        Operation::Fault => {}
        Operation::Map => drop(black_box(MmapOptions::new().len(64 << 10).map_anon().context("failed to map")?)),
        Operation::Syscall => drop(black_box(rustix::process::getpid())),
        Operation::Fork => match raw::fork()? {
            // _exit: exit handlers belong to the parent
            0 => raw::leave(),
            child => drop(raw::wait(child)?),
        },
        Operation::Exec => {
            let status = Command::new(TINY).stdin(Stdio::null()).status().with_context(|| format!("no {TINY}"))?;
            ensure!(status.success(), "{TINY} ended with {status}");
        }
        Operation::Read => file.context("no file to read")?.read_exact_at(page, 0).context("failed to read")?,
    }
    Ok(())
}

/// Unpopulated memory that will get small pages.
fn fresh(pages: u32) -> anyhow::Result<MmapMut> {
    let bytes = usize::try_from(pages)? * rustix::param::page_size();
    let memory = MmapOptions::new().len(bytes).map_anon().context("failed to map anonymous memory")?;
    // kernels without huge pages refuse this, and do not need it
    let _ = memory.advise(Advice::NoHugePage);
    Ok(memory)
}

/// A file of one page, in the page cache.
fn cached(path: &Path) -> anyhow::Result<File> {
    let page = vec![1u8; rustix::param::page_size()];
    std::fs::write(path, page).with_context(|| format!("failed to write {}", path.display()))?;
    let file = File::open(path).with_context(|| format!("failed to open {}", path.display()))?;
    std::fs::remove_file(path).with_context(|| format!("failed to remove {}", path.display()))?;
    Ok(file)
}

/// Takes memory page by page until killed, and writes the time of each page over the last one in
/// `stamp`.
pub(crate) fn until_killed(stamp: &Path) -> anyhow::Result<()> {
    const AT_MOST: u32 = 1 << 14;
    let stamp = File::options().write(true).open(stamp).context("failed to open the file for stamps")?;
    let mut memory = fresh(AT_MOST)?;
    for page in memory.chunks_mut(rustix::param::page_size()) {
        crate::memory::touch(page);
        stamp.write_all_at(&monotonic_ns().to_ne_bytes(), 0).context("failed to write a stamp")?;
    }
    anyhow::bail!("{AT_MOST} pages, and nobody killed this")
}

fn monotonic_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    let (seconds, nanos) = (u64::try_from(now.tv_sec).unwrap_or(0), u64::try_from(now.tv_nsec).unwrap_or(0));
    seconds * 1_000_000_000 + nanos
}
