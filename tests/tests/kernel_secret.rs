//! Stack contents stay private: a secret around the unwound frames is in nothing that the agent
//! or its stack worker wrote, printed, or keeps in memory that a core dump would contain.

#![allow(clippy::indexing_slicing, reason = "a panic is how a test fails")]

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, ensure};
use memtrace_tests::actor::Actor;
use memtrace_tests::cage::Cage;
use memtrace_tests::claims::MIB;
use memtrace_tests::figures::{not_run_here, say};
use memtrace_tests::trial::Trial;
use memtrace_tests::{growth, json};

/// Small sample intervals and no budget: the more stacks the better.
const FINE: [&str; 4] = ["--sample", "64K", "--stack-budget", "100%"];
/// Bytes read from the agent's memory at a time.
const CHUNK: usize = 1 << 20;
/// Kills of each kind: a host under load can lose the stacks of one.
const KILLS: usize = 3;
/// Most bytes decompressed of one file.
const MOST_CONTENT: u64 = 1 << 30;

/// What is searched for: each half of the secret, and all of it as text.
struct Secret {
    hex: String,
    halves: [Vec<u8>; 2],
}

impl Secret {
    fn of(hex: &str) -> anyhow::Result<Self> {
        let digit = |at: usize| hex.get(at..at + 2).and_then(|two| u8::from_str_radix(two, 16).ok());
        let bytes: Option<Vec<u8>> = (0..hex.len()).step_by(2).map(digit).collect();
        let bytes = bytes.filter(|bytes| bytes.len() == 32).with_context(|| format!("the secret is {hex}"))?;
        let (first, second) = bytes.split_at(16);
        Ok(Self { hex: hex.to_owned(), halves: [first.to_vec(), second.to_vec()] })
    }

    fn is_in(&self, content: &[u8]) -> bool {
        let [first, second] = &self.halves;
        [first.as_slice(), second, self.hex.as_bytes()].into_iter().any(|needle| holds(content, needle))
    }
}

fn holds(content: &[u8], needle: &[u8]) -> bool {
    let Some(first) = needle.first() else { return false };
    let mut rest = content;
    while let Some(at) = rest.iter().position(|byte| byte == first) {
        rest = &rest[at..];
        if rest.starts_with(needle) {
            return true;
        }
        rest = &rest[1..];
    }
    false
}

#[test]
fn a_secret_on_the_stack_stays_on_the_stack() -> anyhow::Result<()> {
    let mut trial = Trial::begin(&FINE)?;
    let cage = Cage::new("secret", 64 * MIB)?;
    let mut actor = Actor::start(Some(&cage), &["secret", "--mib", "256"])?;
    let secret = Secret::of(json::text(actor.until("secret")?, "/hex")?)?;
    actor.finish()?.was_killed()?;
    let incident = trial.incident(&cage)?;

    // stacks were taken where the secret was, and unwound to the end: the search below is not
    // vacuous
    let taken = growth::touching(&incident)?.iter().filter(|(path, _)| growth::user_frames(path).count() >= 3).count();
    ensure!(taken >= 100, "only {taken} stacks were unwound");
    std::thread::sleep(Duration::from_secs(1));

    let state_dir = trial.options().state_dir.as_os_str().as_encoded_bytes().to_vec();
    let worker = trial.stack_worker()?.context("no stack worker runs")?;
    for (whose, pid, marker) in
        [("agent", trial.agent.pid(), state_dir), ("stack worker", worker, b"stack-worker".to_vec())]
    {
        let memory = Memory::search(pid, &secret, &marker)?;
        say(format_args!(
            "{taken} stacks; {} MiB of the {whose}'s memory searched, {} MiB never dumped, {} MiB unreadable",
            memory.searched >> 20,
            memory.undumped >> 20,
            memory.unreadable >> 20
        ));
        ensure!(memory.marked, "the {whose}'s own arguments were not found in its memory: nothing was searched");
        ensure!(memory.found.is_empty(), "the secret is in {:?} of the {whose}", memory.found);
    }

    ensure!(!secret.is_in(trial.agent.stderr().as_bytes()), "the secret is in the log:\n{}", trial.agent.stderr());
    // again, after everything has been written
    let status = trial.agent.stop()?;
    ensure!(status.code() == Some(0), "the agent ended with {status}");
    ensure!(!secret.is_in(trial.agent.stderr().as_bytes()), "the secret is in the log:\n{}", trial.agent.stderr());
    let mut files = Vec::new();
    below(trial.dir(), &mut files)?;
    let mut contents = 0;
    for file in &files {
        let raw = std::fs::read(file).with_context(|| format!("failed to read {}", file.display()))?;
        ensure!(!secret.is_in(&raw), "the secret is in {}", file.display());
        if raw.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) {
            let mut content = Vec::new();
            zstd::Decoder::new(raw.as_slice())?.take(MOST_CONTENT).read_to_end(&mut content)?;
            ensure!(!secret.is_in(&content), "the secret is in {}", file.display());
            contents += 1;
        }
    }
    say(format_args!("{} files searched, {contents} of them compressed", files.len()));
    ensure!(contents > 0 && files.len() > contents, "there are no incidents or no journal among {files:?}");
    cage.remove()
}

/// What only root may read does not come out under the name of a perf map, which everybody may write.
#[test]
fn a_perf_map_that_links_to_a_file_of_root_tells_nothing() -> anyhow::Result<()> {
    const NAME: &str = "only-root-may-read-this";
    if !cfg!(target_arch = "x86_64") {
        not_run_here("a perf map that is a link", "its program has code for x86-64 only");
        return Ok(());
    }
    let trial = Trial::begin(&FINE)?;
    let dir = tempfile::tempdir()?;
    std::fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o755))?;
    let map = dir.path().join("map");
    std::fs::write(&map, format!("0 7fffffffffff {NAME}\n"))?;
    std::fs::set_permissions(&map, PermissionsExt::from_mode(0o600))?;
    let map = map.to_str().context("a path that is not text")?;
    let copied = (0..KILLS).any(|_| named_kill(&trial, map, &[]).is_ok_and(|told| told.contains(NAME)));
    // that is the proof that a perf map is read at all
    ensure!(copied, "none of {KILLS} kills has the name that is in the copy");
    for _ in 0..KILLS {
        let told = named_kill(&trial, map, &["--link"])?;
        ensure!(!told.contains(NAME), "it is told: {told}");
    }
    ensure!(!trial.agent.stderr().contains(NAME), "it is in the log:\n{}", trial.agent.stderr());
    trial.end()
}

/// The incident of a kill of a program that has the lines of `map` as its perf map.
fn named_kill(trial: &Trial, map: &str, more: &[&str]) -> anyhow::Result<String> {
    let cage = Cage::new("named", 32 * MIB)?;
    let mut actor = Actor::start(Some(&cage), &[&["named-by", "--map", map], more].concat())?;
    let path = json::text(actor.until("ready")?, "/perf_map")?.to_owned();
    let ended = actor.finish();
    std::fs::remove_file(path)?;
    ended?.was_killed()?;
    let incident = trial.kills(&[&cage], 1)?.pop().context("no incident")?;
    cage.remove()?;
    Ok(incident.to_string())
}

/// Every file below a directory.
fn below(dir: &Path, files: &mut Vec<PathBuf>) -> anyhow::Result<()> {
    for entry in std::fs::read_dir(dir).with_context(|| format!("failed to read {}", dir.display()))? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            below(&entry.path(), files)?;
        } else {
            files.push(entry.path());
        }
    }
    Ok(())
}

/// Result of a search in a process' memory; sizes in bytes.
#[derive(Default)]
struct Memory {
    searched: u64,
    /// Mappings that are excluded from core dumps.
    undumped: u64,
    unreadable: u64,
    /// Mappings that contain the secret.
    found: Vec<String>,
    /// A marker that must be found, to prove that the search works.
    marked: bool,
}

impl Memory {
    fn search(pid: u32, secret: &Secret, marker: &[u8]) -> anyhow::Result<Self> {
        let smaps = std::fs::read_to_string(format!("/proc/{pid}/smaps")).context("failed to read smaps")?;
        let memory = File::open(format!("/proc/{pid}/mem")).context("failed to open the agent's memory")?;
        let mut found = Self::default();
        for mapping in mappings(&smaps) {
            let size = mapping.end - mapping.begin;
            if mapping.undumped {
                found.undumped += size;
            } else if !mapping.readable {
                found.unreadable += size;
            } else {
                found.look(&memory, &mapping, secret, marker);
            }
        }
        Ok(found)
    }

    /// Reads in overlapping chunks, so that no match is split.
    fn look(&mut self, memory: &File, mapping: &Mapping<'_>, secret: &Secret, marker: &[u8]) {
        let overlap = secret.hex.len().max(marker.len()) as u64;
        let mut chunk = vec![0; CHUNK];
        let mut at = mapping.begin;
        while at < mapping.end {
            let length = usize::try_from(mapping.end - at).unwrap_or(CHUNK).min(CHUNK);
            let content = &mut chunk[..length];
            // part of a mapping may be gone meanwhile, and [vvar] cannot be read
            if memory.read_exact_at(content, at).is_err() {
                self.unreadable += length as u64;
            } else {
                self.searched += length as u64;
                self.marked |= holds(content, marker);
                if secret.is_in(content) {
                    self.found.push(mapping.line.to_owned());
                }
            }
            let next = at + length as u64;
            at = if next < mapping.end { next - overlap } else { next };
        }
    }
}

struct Mapping<'a> {
    begin: u64,
    end: u64,
    readable: bool,
    /// `dd` of its VmFlags.
    undumped: bool,
    line: &'a str,
}

fn mappings(smaps: &str) -> Vec<Mapping<'_>> {
    let mut found: Vec<Mapping<'_>> = Vec::new();
    for line in smaps.lines() {
        if let Some(flags) = line.strip_prefix("VmFlags:") {
            if let Some(last) = found.last_mut() {
                last.undumped = flags.split_ascii_whitespace().any(|flag| flag == "dd");
            }
        } else if let Some(mapping) = begins(line) {
            found.push(mapping);
        }
    }
    found
}

/// `begin-end rwxp ...`; the other lines of smaps are `Name: value`.
fn begins(line: &str) -> Option<Mapping<'_>> {
    let mut words = line.split_ascii_whitespace();
    let (begin, end) = words.next()?.split_once('-')?;
    let (begin, end) = (u64::from_str_radix(begin, 16).ok()?, u64::from_str_radix(end, 16).ok()?);
    Some(Mapping { begin, end, readable: words.next()?.starts_with('r'), undumped: false, line })
}

#[test]
fn a_secret_is_found_where_it_is() -> anyhow::Result<()> {
    let secret = Secret::of(&"0123456789abcdef".repeat(4))?;
    let mut bytes: Vec<u8> = secret.halves.concat();
    let own = std::process::id();
    let memory = Memory::search(own, &secret, b"a_secret_is_found_where_it_is")?;
    ensure!(memory.marked && !memory.found.is_empty(), "this test's own secret was not found");
    ensure!(secret.is_in(&bytes) && secret.is_in(&bytes[8..]), "half a secret is one");
    bytes[3] = 0;
    bytes[20] = 0;
    ensure!(!secret.is_in(&bytes), "what is no secret was found");
    let smaps =
        "1000-2000 rw-p 00000000 00:00 0 [heap]\nRss: 4 kB\nVmFlags: rd wr dd\n3000-4000 ---p 0 00:00 0\nVmFlags: mr\n";
    let told: Vec<_> = mappings(smaps).iter().map(|m| (m.begin, m.end, m.readable, m.undumped)).collect();
    ensure!(told == [(0x1000, 0x2000, true, true), (0x3000, 0x4000, false, false)], "{told:x?}");
    Ok(())
}
