//! Ways to take memory: page by page, populated by the kernel, file-backed, shared, on tmpfs.

use std::fs::File;
use std::hint::black_box;
use std::io::Write;
use std::path::Path;
use std::sync::Barrier;
use std::time::{Duration, Instant};

use anyhow::Context;
use memmap2::{Advice, MmapMut, MmapOptions, MmapRaw};
use memtrace_tests::disk;
use serde_json::json;

const MIB: usize = 1 << 20;

/// Writes one byte in every page.
pub(crate) fn touch(memory: &mut [u8]) {
    for page in memory.chunks_mut(rustix::param::page_size()) {
        if let Some(byte) = page.first_mut() {
            *byte = 1;
        }
    }
    black_box(memory);
}

/// Anonymous memory with every page touched.
pub(crate) fn touched(mib: usize) -> Vec<u8> {
    let mut memory = vec![0u8; mib * MIB];
    touch(&mut memory);
    memory
}

/// Touches `mib` at a steady rate, in steps of about 5 ms.
pub(crate) fn grow_slowly(mib: usize, mib_per_s: usize) -> Vec<u8> {
    const STEP: Duration = Duration::from_millis(5);
    let mut memory = vec![0u8; mib * MIB];
    let step_bytes = (mib_per_s * MIB / 200).max(rustix::param::page_size());
    let begin = Instant::now();
    for (step, part) in (1u32..).zip(memory.chunks_mut(step_bytes)) {
        touch(part);
        std::thread::sleep((STEP * step).saturating_sub(begin.elapsed()));
    }
    memory
}

/// Maps memory and fills it. A function of its own, so that its name is in stacks.
#[inline(never)]
fn take_share(bytes: usize, touching: bool) -> anyhow::Result<MmapMut> {
    let mut options = MmapOptions::new();
    options.len(bytes);
    if !touching {
        options.populate();
    }
    let mut memory = options.map_anon().context("failed to map anonymous memory")?;
    if touching {
        touch(&mut memory);
    }
    Ok(memory)
}

/// Takes `mib` at once in `threads` threads.
pub(crate) fn burst(mib: usize, threads: usize, touching: bool) -> anyhow::Result<Vec<MmapMut>> {
    let share = (mib * MIB).div_ceil(threads.max(1));
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..threads.max(1)).map(|_| scope.spawn(move || take_share(share, touching))).collect();
        threads.into_iter().map(|t| t.join().map_err(|_| anyhow::anyhow!("a thread panicked"))?).collect()
    })
}

/// Maps, touches and unmaps as fast as it can until the time is up. Prints the bytes touched.
pub(crate) fn churn(time: Duration) -> anyhow::Result<()> {
    const PIECE: usize = 4 * MIB;
    let begin = Instant::now();
    let mut bytes = 0usize;
    while begin.elapsed() < time {
        let mut memory = MmapOptions::new().len(PIECE).map_anon().context("failed to map anonymous memory")?;
        touch(&mut memory);
        bytes += PIECE;
    }
    let micros = u64::try_from(begin.elapsed().as_micros()).unwrap_or(u64::MAX);
    crate::say("churned", &json!({ "bytes": bytes, "elapsed_us": micros }))
}

/// Touches one byte in each of its huge pages, then waits for the end of stdin.
pub(crate) fn huge(mib: usize) -> anyhow::Result<()> {
    const HUGE: usize = 2 * MIB;
    let mut memory = MmapOptions::new().len(mib * MIB + HUGE).map_anon().context("failed to map anonymous memory")?;
    memory.advise(memmap2::Advice::HugePage).context("failed to ask for huge pages")?;
    let skip = memory.as_ptr().align_offset(HUGE);
    for page in memory.iter_mut().skip(skip).step_by(HUGE).take(mib / 2) {
        *page = 1;
    }
    crate::say("ready", &json!({ "anon_mib": mib }))?;
    crate::wait_for_end_of_stdin()?;
    drop(memory);
    Ok(())
}

/// Asks for more address space than RLIMIT_AS gives: the call fails, nobody is killed.
pub(crate) fn limit_as(mib: usize) -> anyhow::Result<()> {
    let bytes = (mib * MIB) as u64;
    let limit = rustix::process::Rlimit { current: Some(bytes), maximum: Some(bytes) };
    rustix::process::setrlimit(rustix::process::Resource::As, limit).context("failed to set RLIMIT_AS")?;
    let refused = MmapOptions::new().len(2 * mib * MIB).map_anon().is_err();
    crate::say("limited", &json!({ "refused": refused }))?;
    anyhow::ensure!(refused, "RLIMIT_AS did not hold");
    anyhow::bail!("no more address space, as was asked for")
}

/// Writes a file of `mib` in `dir` and removes it.
pub(crate) fn fill_tmpfs(mib: usize, dir: &Path) -> anyhow::Result<()> {
    let path = dir.join(format!("memtrace-tests-{}.fill", std::process::id()));
    crate::say("tmpfs", &json!({ "file": path }))?;
    let mut file = File::create(&path).with_context(|| format!("failed to create {}", path.display()))?;
    let chunk = vec![1u8; 64 << 10];
    let written = (0..mib * 16).try_for_each(|_| file.write_all(&chunk));
    let removed = std::fs::remove_file(&path);
    written.with_context(|| format!("failed to write {}", path.display()))?;
    removed.with_context(|| format!("failed to remove {}", path.display()))?;
    crate::say("done", &json!({ "tmpfs_mib": mib }))
}

/// What one thread of `hold` keeps.
struct Share {
    anon: Vec<u8>,
    maps: Vec<MmapRaw>,
}

/// The threads of `hold`.
pub(crate) struct HoldThreads {
    /// Number of threads.
    pub(crate) count: usize,
    /// Whether each is bound to a CPU of its own.
    pub(crate) pinned: bool,
}

/// Binds the calling thread to one of the CPUs it may run on.
fn pin(index: usize) -> anyhow::Result<()> {
    use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
    let allowed = sched_getaffinity(None).context("failed to ask for processors")?;
    let cpus: Vec<usize> = (0..CpuSet::MAX_CPU).filter(|cpu| allowed.is_set(*cpu)).collect();
    let cpu = cpus.get(index % cpus.len().max(1)).context("no processor to run on")?;
    let mut one = CpuSet::new();
    one.set(*cpu);
    sched_setaffinity(None, &one).with_context(|| format!("failed to run on processor {cpu}"))
}

/// Reaches the requested state with threads that stay alive, then waits for the end of stdin.
pub(crate) fn hold(anon: usize, file: usize, shmem: usize, threads: HoldThreads, dir: &Path) -> anyhow::Result<()> {
    let HoldThreads { count: threads, pinned } = threads;
    let threads = threads.max(1);
    let page = rustix::param::page_size();
    // whole pages a thread, the last one takes the rest, so that the sums are exact
    let share = |mib: usize, index: usize| {
        let each = mib * MIB / threads / page * page;
        if index + 1 == threads { mib * MIB - each * (threads - 1) } else { each }
    };
    let reached = Barrier::new(threads + 1);
    let leave = Barrier::new(threads + 1);
    let take = |index: usize| -> anyhow::Result<Share> {
        if pinned {
            pin(index)?;
        }
        let mut anon = vec![0u8; share(anon, index)];
        touch(&mut anon);
        let mut maps = Vec::new();
        if share(file, index) > 0 {
            maps.push(map_new_file(share(file, index), index, dir)?);
        }
        if share(shmem, index) > 0 {
            maps.push(map_new_shmem(share(shmem, index))?);
        }
        Ok(Share { anon, maps })
    };
    std::thread::scope(|scope| -> anyhow::Result<()> {
        let handles: Vec<_> = (0..threads)
            .map(|index| {
                let (take, reached, leave) = (&take, &reached, &leave);
                scope.spawn(move || {
                    let share = take(index);
                    reached.wait();
                    leave.wait();
                    share.map(|share| black_box((share.anon.len(), share.maps.len())))
                })
            })
            .collect();
        reached.wait();
        let failed =
            crate::say("ready", &json!({ "anon_mib": anon, "file_mib": file, "shmem_mib": shmem, "threads": threads }))
                .and_then(|()| crate::wait_for_end_of_stdin());
        leave.wait();
        for handle in handles {
            handle.join().map_err(|_| anyhow::anyhow!("a thread panicked"))??;
        }
        failed
    })
}

/// A new, unlinked file in `dir`, mapped shared and read-only, with every page present.
fn map_new_file(bytes: usize, index: usize, dir: &Path) -> anyhow::Result<MmapRaw> {
    let path = dir.join(format!("memtrace-tests-{}-{index}.map", std::process::id()));
    let mut file = disk::unlinked(&path)?;
    let chunk = vec![1u8; 64 << 10];
    let mut left = bytes;
    while left > 0 {
        let part = chunk.get(..left.min(chunk.len())).unwrap_or(&chunk);
        file.write_all(part).context("failed to fill the file to map")?;
        left -= part.len();
    }
    MmapOptions::new().populate().map_raw_read_only(&file).context("failed to map a file")
}

/// Anonymous shared memory, mapped writable, with every page present.
fn map_new_shmem(bytes: usize) -> anyhow::Result<MmapRaw> {
    let memory = rustix::fs::memfd_create("memtrace-tests", rustix::fs::MemfdFlags::CLOEXEC)
        .context("failed to create shared memory")?;
    let file = File::from(memory);
    file.set_len(u64::try_from(bytes)?).context("failed to size shared memory")?;
    MmapOptions::new().populate().map_raw(&file).context("failed to map shared memory")
}

/// Maps so much as nobody has, and touches a page of every 2 MiB of it, until it is killed.
pub(crate) fn sparse(gib: usize) -> anyhow::Result<()> {
    let mut memory = MmapOptions::new().len(gib << 30).no_reserve_swap().map_anon().context("failed to map memory")?;
    // a kernel without huge pages refuses this advice and does not need it
    let _ = memory.advise(Advice::NoHugePage);
    for step in memory.chunks_mut(2 << 20) {
        if let Some(first) = step.first_mut() {
            *first = 1;
        }
    }
    Ok(())
}
