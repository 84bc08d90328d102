//! The kill a second, and when its line was in the ledger.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::MetadataExt;
use std::process::Stdio;
use std::sync::atomic::Ordering;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use anyhow::Context;
use memtrace_tests::cage::Cage;
use memtrace_tests::claims::MIB;
use memtrace_tests::{process, programs};
use serde_json::Value;

use crate::{Yard, figures};

/// Between the starts of two victims.
const EVERY: Duration = Duration::from_secs(1);
/// Polling interval of the ledger.
const LOOK: Duration = Duration::from_millis(1);
/// How long a victim may take to be killed, in a machine that has other things to do.
const KILL_LIMIT: Duration = Duration::from_secs(120);
/// Most kills of a soak: a day of them.
const MAX_KILLS: usize = 100_000;

/// Kills that were made, by pid and path of the cgroup.
#[derive(Default)]
pub(crate) struct Kills(Mutex<State>);

#[derive(Default)]
struct State {
    /// When it was in the ledger after it happened; `None`: it is not there yet.
    made: BTreeMap<(u64, String), Option<Duration>>,
    /// Lines of the ledger, also of kills that are not made here, by the same key; some are read
    /// before the victim is known to have ended.
    read: BTreeMap<(u64, String), Duration>,
    /// Lines of the ledger in all.
    lines: usize,
    /// Bytes of the ledger that were read.
    read_bytes: u64,
    /// Inode of the ledger: another one after a rotation.
    inode: u64,
}

impl Kills {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes kills until the end.
    pub(crate) fn make(&self, yard: &Yard) {
        let begin = Instant::now();
        let mut due = Duration::ZERO;
        while !yard.is_over() && self.state().made.len() < MAX_KILLS {
            if let Err(error) = self.make_one() {
                yard.fault(format!("no kill: {error:#}"));
            }
            // No hurry after a late one: a kill a second is the most.
            due = (due + EVERY).max(begin.elapsed().saturating_sub(EVERY));
            yard.rest(due.saturating_sub(begin.elapsed()));
        }
    }

    fn make_one(&self) -> anyhow::Result<()> {
        let cage = Cage::new("soak", 16 * MIB)?;
        let mut command = cage.command(programs::path("workload")?)?;
        command.args(["burst", "--mib", "64", "--threads", "1"]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut child = command.spawn().context("failed to start a victim")?;
        let status = process::wait_at_most(&mut child, KILL_LIMIT)?;
        anyhow::ensure!(process::shell_code(status) == 137, "the victim ended with {status}");
        let key = (u64::from(child.id()), cage.path().to_owned());
        let mut state = self.state();
        let read = state.read.get(&key).copied();
        state.made.insert(key, read);
        drop(state);
        cage.remove()
    }

    /// Reads the ledger as it grows.
    pub(crate) fn follow_ledger(&self, yard: &Yard) {
        while !yard.settled.load(Ordering::Relaxed) {
            if let Err(error) = self.read_ledger(yard) {
                yard.fault(format!("the ledger: {error:#}"));
            }
            std::thread::sleep(LOOK);
        }
    }

    /// Takes in what is new in the ledger. The time of a line is that of the last write of the file,
    /// as the kernel noted it, so that it does not matter how soon this thread gets a CPU.
    fn read_ledger(&self, yard: &Yard) -> anyhow::Result<()> {
        let path = yard.state_dir.join("kills.jsonl");
        let Ok(mut file) = File::open(&path) else { return Ok(()) };
        let about = file.metadata()?;
        let mut state = self.state();
        if state.inode != about.ino() {
            (state.inode, state.read_bytes) = (about.ino(), 0);
        }
        if about.len() <= state.read_bytes {
            return Ok(());
        }
        file.seek(SeekFrom::Start(state.read_bytes))?;
        let mut new = Vec::new();
        file.take(about.len() - state.read_bytes).read_to_end(&mut new)?;
        let whole = new.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
        state.read_bytes += whole as u64;
        let written_ns = boot_ns_of(about.modified()?);
        for line in new.get(..whole).unwrap_or_default().split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
            let line: Value = serde_json::from_slice(line).context("a line is no JSON")?;
            state.lines += 1;
            let number = |key| line.get(key).and_then(Value::as_u64);
            let (Some(pid), Some(killed_ns)) = (number("pid"), number("boot_ns")) else { continue };
            let Some(cgroup) = line.get("cgroup_path").and_then(Value::as_str) else { continue };
            let late = Duration::from_nanos(written_ns.saturating_sub(killed_ns));
            let key = (pid, cgroup.to_owned());
            if let Some(made) = state.made.get_mut(&key) {
                made.get_or_insert(late);
            }
            state.read.entry(key).or_insert(late);
        }
        Ok(())
    }

    /// Kills without a line, as pid and path.
    pub(crate) fn missing(&self) -> Vec<String> {
        let state = self.state();
        let missing = state.made.iter().filter(|(_, late)| late.is_none());
        missing.map(|((pid, cgroup), _)| format!("{pid} in {cgroup}")).collect()
    }

    /// The kills that took longest to be in the ledger.
    pub(crate) fn latest(&self) -> String {
        let state = self.state();
        let mut late: Vec<_> = state.made.iter().filter_map(|(key, late)| Some(((*late)?, key))).collect();
        late.sort_unstable();
        let shown = late.iter().rev().take(5).map(|(late, (pid, _))| format!("{pid} after {late:.1?}"));
        shown.collect::<Vec<_>>().join(", ")
    }

    /// How many, how soon.
    pub(crate) fn summary(&self) -> String {
        let state = self.state();
        let late: Vec<Duration> = state.made.values().flatten().copied().collect();
        let (made, found, lines) = (state.made.len(), late.len(), state.lines);
        drop(state);
        format!("{found} of {made} in the ledger (which has {lines}), {}", figures::spread(late))
    }
}

/// Boot clock of a wall time, nanoseconds.
fn boot_ns_of(wall: SystemTime) -> u64 {
    let ago = SystemTime::now().duration_since(wall).unwrap_or_default();
    process::boot_ns().saturating_sub(u64::try_from(ago.as_nanos()).unwrap_or(u64::MAX))
}
