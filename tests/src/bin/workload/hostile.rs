//! Programs that want to keep a stack worker busy.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use memmap2::{Advice, MmapOptions};
use memtrace_tests::elf_bomb;
use rustix::mount::{MountFlags, mount};
use serde_json::json;

use crate::raw;

/// Bytes that are taken and given back.
const TAKEN_BYTES: usize = 64 << 20;
/// How long what is to be killed goes on without.
const KILLED_WITHIN: Duration = Duration::from_secs(60);
/// Bytes taken in a row, and the pause after them.
const STEP_BYTES: usize = 1 << 20;
const STEP_PAUSE: Duration = Duration::from_millis(10);
/// Program and section headers of the ELF file: the most of them that a reader would want to read.
const PROGRAM_HEADERS: u16 = 60_000;
const SECTION_HEADERS: u64 = 100_000;
/// Forks between two steps.
const FORKS: usize = 8;
/// What debug information grows to.
const BOMB_BYTES: u64 = 1 << 30;

/// Touches a byte of each page from its first argument up to its second, with a frame pointer.
#[cfg(target_arch = "x86_64")]
const TOUCH: &[u8] = &[
    0x55, // push rbp
    0x48, 0x89, 0xe5, // mov rbp, rsp
    0x48, 0x39, 0xf7, // cmp rdi, rsi
    0x73, 0x0c, // jae the end
    0xc6, 0x07, 0x01, // mov byte [rdi], 1
    0x48, 0x81, 0xc7, 0x00, 0x10, 0x00, 0x00, // add rdi, 4096
    0xeb, 0xef, // jmp to the comparison
    0x5d, // the end: pop rbp
    0xc3, // ret
];
#[cfg(not(target_arch = "x86_64"))]
const TOUCH: &[u8] = &[];

/// Takes memory from code that it wrote itself. Its perf map has `map_mib` from the start, and a
/// line more with each step, or another file in its place.
pub(crate) fn perf_map(map_mib: usize, time: Duration, replace: bool) -> anyhow::Result<()> {
    ensure!(!TOUCH.is_empty(), "there is code for x86-64 only");
    let path = PathBuf::from(format!("/tmp/perf-{}.map", std::process::id()));
    let mut content = Vec::new();
    for n in 0.. {
        if content.len() >= map_mib << 20 {
            break;
        }
        // One that is replaced has as many lines as fit, and none that fills what is kept.
        match replace {
            true => content.extend(b"0 0 x\n"),
            false => writeln!(content, "{:x} 10 f{n}", 0x10000 + n * 16)?,
        }
    }
    // of an earlier process with this id
    let _ = std::fs::remove_file(&path);
    let mut map = made(&path, &content)?;
    // Two files that take turns cost nothing to put there.
    let spares = [path.with_extension("a"), path.with_extension("b")];
    for spare in spares.iter().filter(|_| replace) {
        made(spare, &content)?;
    }
    drop(content);
    let code = raw::compiled(TOUCH)?;
    let (begin, mut turns) = (Instant::now(), spares.iter().cycle());
    let ended = take(begin, time, |step| {
        let pages = step.as_mut_ptr_range();
        code(pages.start, pages.end);
        match turns.next().filter(|_| replace) {
            Some(spare) => put(spare, &path),
            None => map.write_all(b"1 1 x\n").context("failed to write a perf map"),
        }
    });
    for file in spares.iter().filter(|_| replace).chain([&path]) {
        std::fs::remove_file(file).with_context(|| format!("failed to remove {}", file.display()))?;
    }
    ended
}

/// As somebody without rights, takes memory from code that it wrote itself, until it is killed. Its
/// perf map is a copy of `map`, or a link to it.
pub(crate) fn named_by(map: &Path, link: bool) -> anyhow::Result<()> {
    let path = PathBuf::from(format!("/tmp/perf-{}.map", std::process::id()));
    let content = if link { Vec::new() } else { std::fs::read(map)? };
    // of an earlier process with this id
    let _ = std::fs::remove_file(&path);
    raw::become_somebody()?;
    match link {
        true => std::os::unix::fs::symlink(map, &path)?,
        false => std::fs::write(&path, content)?,
    }
    crate::say("ready", &json!({ "perf_map": path }))?;
    let code = raw::compiled(TOUCH)?;
    // step by step: the perf map is looked for when the first stack is unwound
    take(Instant::now(), KILLED_WITHIN, |step| {
        let pages = step.as_mut_ptr_range();
        code(pages.start, pages.end);
        Ok(())
    })
}

/// Memory that was touched by code that this program wrote itself.
pub(crate) fn touched_by_compiled_code(mib: usize) -> anyhow::Result<Vec<u8>> {
    ensure!(!TOUCH.is_empty(), "there is code for x86-64 only");
    let mut memory = vec![0; mib << 20];
    let pages = memory.as_mut_ptr_range();
    raw::compiled(TOUCH)?(pages.start, pages.end);
    Ok(memory)
}

fn made(path: &Path, content: &[u8]) -> anyhow::Result<File> {
    let mut file = File::create(path).with_context(|| format!("failed to make {}", path.display()))?;
    file.write_all(content).with_context(|| format!("failed to write {}", path.display()))?;
    Ok(file)
}

/// Gives a file the name of another one as well, which loses it.
fn put(file: &Path, path: &Path) -> anyhow::Result<()> {
    let next = path.with_extension("next");
    std::fs::hard_link(file, &next).with_context(|| format!("failed to make {}", next.display()))?;
    std::fs::rename(&next, path).with_context(|| format!("failed to replace {}", path.display()))
}

/// Maps links to one ELF file as code, all under names of their own, and takes memory.
pub(crate) fn linked_modules(dir: &Path, count: usize, time: Duration) -> anyhow::Result<()> {
    let original = dir.join("elf");
    if !original.exists() {
        write_elf(&original)?;
    }
    for n in 0..count {
        let link = dir.join(format!("l{n}"));
        if !link.exists() {
            std::fs::hard_link(&original, &link).with_context(|| format!("failed to make {}", link.display()))?;
        }
        raw::map_code(&File::open(&link)?, 4096)?;
    }
    take_and_touch(time, |_| Ok(()))
}

/// Takes memory with a file mapped as code that nobody else can open.
pub(crate) fn leased(dir: &Path, time: Duration) -> anyhow::Result<()> {
    let path = dir.join(format!("leased-{}", std::process::id()));
    write_elf(&path)?;
    let file = File::open(&path)?;
    raw::map_code(&file, 4096)?;
    raw::lease(&file)?;
    take_and_touch(time, |_| Ok(()))?;
    Ok(std::fs::remove_file(&path)?)
}

/// Takes memory, and keeps the own address space locked in between: each fork copies thousands of mappings under its
/// lock.
pub(crate) fn locked(mappings: usize, time: Duration) -> anyhow::Result<()> {
    raw::many_mappings(mappings)?;
    take_and_touch(time, |_| {
        for _ in 0..FORKS {
            let child = raw::fork()?;
            if child == 0 {
                raw::leave();
            }
            raw::wait(child)?;
        }
        Ok(())
    })
}

/// Takes memory beside so many mounts that their list has megabytes, with code of the last of them.
pub(crate) fn mounts(dir: &Path, count: usize, time: Duration) -> anyhow::Result<()> {
    raw::own_mount_namespace()?;
    for n in 0..count {
        let on = dir.join(format!("{n:0>200}"));
        std::fs::create_dir_all(&on)?;
        mount("many", &on, "tmpfs", MountFlags::empty(), None).context("failed to mount a tmpfs")?;
    }
    let program = dir.join(format!("{:0>200}/elf", count - 1));
    write_elf(&program)?;
    raw::map_code(&File::open(&program)?, 4096)?;
    take_and_touch(time, |_| Ok(()))
}

/// Takes memory from code in a file with debug information that grows without end.
pub(crate) fn debug_bomb(dir: &Path, mib: usize) -> anyhow::Result<()> {
    ensure!(!TOUCH.is_empty(), "there is code for x86-64 only");
    let mut id = [0; 20];
    id.iter_mut().zip(std::process::id().to_le_bytes()).for_each(|(byte, of_pid)| *byte = of_pid);
    let (content, at) = elf_bomb::file(id, BOMB_BYTES, TOUCH)?;
    let path = dir.join(format!("bomb-{}", std::process::id()));
    std::fs::write(&path, content)?;
    let code = raw::code_in(&File::open(&path)?, at, TOUCH.len())?;
    let mut memory = MmapOptions::new().len(mib << 20).map_anon().context("failed to map memory")?;
    for step in memory.chunks_mut(STEP_BYTES) {
        let pages = step.as_mut_ptr_range();
        code(pages.start, pages.end);
        std::thread::sleep(STEP_PAUSE);
    }
    Ok(())
}

fn take_and_touch(time: Duration, mut more: impl FnMut(&mut [u8]) -> anyhow::Result<()>) -> anyhow::Result<()> {
    take(Instant::now(), time, |step| {
        crate::memory::touch(step);
        more(step)
    })
}

/// Says `attacking`, takes memory step by step and gives it back, again and again, until that is
/// over ([`crate::is_over`]).
fn take(begin: Instant, time: Duration, mut touch: impl FnMut(&mut [u8]) -> anyhow::Result<()>) -> anyhow::Result<()> {
    crate::say("attacking", &json!({}))?;
    while !crate::is_over(begin, time) {
        let mut memory = MmapOptions::new().len(TAKEN_BYTES).map_anon().context("failed to map memory")?;
        // a kernel without huge pages refuses this advice and does not need it
        let _ = memory.advise(Advice::NoHugePage);
        for step in memory.chunks_mut(STEP_BYTES) {
            touch(step)?;
            std::thread::sleep(STEP_PAUSE);
            if crate::is_over(begin, time) {
                break;
            }
        }
    }
    Ok(())
}

/// An ELF file for x86-64 that is almost all hole: one program header and two section headers are
/// written, of very many.
fn write_elf(path: &Path) -> anyhow::Result<()> {
    let sections_at = 64 + u64::from(PROGRAM_HEADERS) * 56;
    let size = sections_at + SECTION_HEADERS * 64 + 4096;
    let mut head = b"\x7fELF\x02\x01\x01".to_vec();
    head.resize(16, 0);
    for half in [3u16, 62] {
        head.extend(half.to_le_bytes());
    }
    head.extend(1u32.to_le_bytes());
    for long in [0x1000u64, 64, sections_at] {
        head.extend(long.to_le_bytes());
    }
    head.extend(0u32.to_le_bytes());
    // The number of sections stands in the first one, since it does not fit here.
    for half in [64u16, 56, PROGRAM_HEADERS, 64, 0, 1] {
        head.extend(half.to_le_bytes());
    }
    for word in [1u32, 5] {
        head.extend(word.to_le_bytes());
    }
    for long in [0u64, 0, 0, size, size, 0x1000] {
        head.extend(long.to_le_bytes());
    }
    let mut sections = [0; 128];
    sections[32..40].copy_from_slice(&SECTION_HEADERS.to_le_bytes());
    sections[40] = 1;
    (sections[64], sections[68], sections[96]) = (1, 3, 1);
    let file = File::create(path).with_context(|| format!("failed to make {}", path.display()))?;
    file.write_all_at(&head, 0)?;
    file.write_all_at(&sections, sections_at)?;
    file.set_len(size).context("failed to size an ELF file")
}
