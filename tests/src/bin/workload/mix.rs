//! Mixed work in steps with pauses between them: file cache, tmpfs, sockets, anonymous memory and
//! children come and go.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{BufRead, Read, Seek, SeekFrom, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::Context;
use memmap2::MmapMut;
use memtrace_tests::disk;
use memtrace_tests::random::SeededRandom;
use serde_json::json;

use crate::{kernel_side, memory};

const MIB: usize = 1 << 20;
/// Most items of one kind at a time; with their sizes, this bounds the total.
const KINDS_CAP: usize = 4;
/// Largest item, MiB.
const THING_MIB: u64 = 24;
/// Growth at the end of a step, MiB: many times the RSS threshold.
const LAST_MIB: usize = 4;
/// Changes in one step.
const DEEDS: usize = 3;

/// Items held at the moment, oldest first.
struct Held {
    files: VecDeque<(File, usize)>,
    shmem: VecDeque<File>,
    sockets: VecDeque<Vec<(UnixStream, UnixStream)>>,
    anon: VecDeque<Vec<MmapMut>>,
    children: VecDeque<Grown>,
    serial: u64,
}

/// A child that holds memory; ends when dropped.
struct Grown(Child);

impl Drop for Grown {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        // it exits when its stdin closes
        let _ = self.0.wait();
    }
}

/// Makes one step for every line on stdin. Prints `quiet` after each, and whether the step ended
/// with growth of its own resident memory, which every second one does.
pub(crate) fn run(seed: u64, dir: &Path, tmpfs: &Path) -> anyhow::Result<()> {
    let mut random = SeededRandom::new(seed);
    let mut held = Held {
        files: VecDeque::new(),
        shmem: VecDeque::new(),
        sockets: VecDeque::new(),
        anon: VecDeque::new(),
        children: VecDeque::new(),
        serial: 0,
    };
    crate::say("ready", &json!({}))?;
    let mut last = Vec::new();
    for (step, line) in std::io::stdin().lock().lines().enumerate() {
        line.context("failed to read stdin")?;
        for _ in 0..DEEDS {
            held.change(&mut random, dir, tmpfs)?;
        }
        let grown = step % 2 == 1;
        if grown {
            last.clear();
            last = memory::burst(LAST_MIB, 1, true)?;
        }
        crate::say("quiet", &json!({ "grown": grown }))?;
    }
    drop(last);
    Ok(())
}

impl Held {
    fn change(&mut self, random: &mut SeededRandom, dir: &Path, tmpfs: &Path) -> anyhow::Result<()> {
        let mib = usize::try_from(random.between(1, THING_MIB))?;
        match random.between(0, 9) {
            0 => {
                let file = self.write(dir, mib)?;
                push(&mut self.files, (file, mib));
            }
            1 => drop(self.files.pop_front()),
            2 => self.read_again()?,
            3 => {
                let file = self.write(tmpfs, mib)?;
                push(&mut self.shmem, file);
            }
            4 => drop(self.shmem.pop_front()),
            5 => push(&mut self.sockets, kernel_side::filled_sockets(mib.div_ceil(4))?.0),
            6 => drop(self.sockets.pop_front()),
            7 => push(&mut self.anon, memory::burst(mib, 1, true)?),
            8 => push(&mut self.children, child(mib)?),
            _ => {
                drop(self.anon.pop_front());
                drop(self.children.pop_front());
            }
        }
        Ok(())
    }

    /// A new file of `mib`, already unlinked, that lives as long as it is open.
    fn write(&mut self, dir: &Path, mib: usize) -> anyhow::Result<File> {
        self.serial += 1;
        let path: PathBuf = dir.join(format!("mix-{}-{}", std::process::id(), self.serial));
        let mut file = disk::unlinked(&path)?;
        let chunk = vec![1u8; MIB];
        (0..mib).try_for_each(|_| file.write_all(&chunk)).context("failed to fill a file")?;
        Ok(file)
    }

    /// Drops a file's pages and reads it from the disk.
    fn read_again(&mut self) -> anyhow::Result<()> {
        let Some((file, mib)) = self.files.front_mut() else { return Ok(()) };
        file.sync_data().context("failed to sync a file")?;
        rustix::fs::fadvise(&*file, 0, None, rustix::fs::Advice::DontNeed)
            .context("failed to let a file's pages go")?;
        file.seek(SeekFrom::Start(0)).context("failed to rewind a file")?;
        let mut chunk = vec![0u8; MIB];
        (0..*mib).try_for_each(|_| file.read_exact(&mut chunk)).context("failed to read a file")
    }
}

fn push<T>(things: &mut VecDeque<T>, thing: T) {
    if things.len() >= KINDS_CAP {
        things.pop_front();
    }
    things.push_back(thing);
}

/// A child that holds `mib`.
fn child(mib: usize) -> anyhow::Result<Grown> {
    let own = std::env::current_exe().context("failed to find this program")?;
    let mut command = Command::new(own);
    command.args(["member", "--comm", "mix-child", "--wait", "--mib", &mib.to_string()]);
    let child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().context("failed to start a child")?;
    let mut grown = Grown(child);
    let mut said = std::io::BufReader::new(grown.0.stdout.take().context("a child has no stdout")?).lines();
    while let Some(line) = said.next().transpose().context("failed to listen to a child")? {
        if line.contains("\"ready\"") {
            break;
        }
    }
    Ok(grown)
}
