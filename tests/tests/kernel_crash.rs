//! kill -9 in a storm of kills: what was listed stays, what was under way is recovered, a torn journal is said so.

#![allow(clippy::indexing_slicing, reason = "a panic is how a test fails")]

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, ensure};
use memtrace_tests::agent::{Options, successful};
use memtrace_tests::cage::Cage;
use memtrace_tests::figures::say;
use memtrace_tests::json;
use memtrace_tests::process::boot_ns;
use memtrace_tests::programs::{self, require_root};
use serde_json::Value;

const ROUNDS: u64 = 10;
/// The agent has the kill in its journal this long after the victim is reaped.
const JOURNAL_NS: u64 = 250_000_000;

/// Agents share the machine's hooks; kills of one test are not the other's.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// One kill the harness caused: the cgroup it was in and when the victim was reaped.
#[derive(Clone, Copy)]
struct Kill {
    cage_id: u64,
    begun_boot_ns: u64,
    reaped_boot_ns: u64,
}

fn kill_one() -> anyhow::Result<Kill> {
    let begun_boot_ns = boot_ns();
    let cage = Cage::new("crash", 24 << 20)?;
    let mut command = cage.command(programs::path("workload")?)?;
    let output = command.args(["burst", "--mib", "48"]).stdin(Stdio::null()).output()?;
    let reaped_boot_ns = boot_ns();
    ensure!(cage.oom_kills()? == 1, "nobody was killed: {}", output.status);
    let cage_id = cage.id();
    cage.remove()?;
    Ok(Kill { cage_id, begun_boot_ns, reaped_boot_ns })
}

/// How many OOM incidents each of our cgroups has.
fn count(listed: &[Value], kills: &[Kill]) -> BTreeMap<u64, usize> {
    let mut counts: BTreeMap<u64, usize> = kills.iter().map(|kill| (kill.cage_id, 0)).collect();
    for incident in listed.iter().filter(|incident| incident["kind"] == "oom_kill") {
        let id = incident.pointer("/cgroup/id").and_then(Value::as_u64);
        if let Some(count) = id.and_then(|id| counts.get_mut(&id)) {
            *count += 1;
        }
    }
    counts
}

fn ids(listed: &[Value]) -> anyhow::Result<BTreeSet<String>> {
    listed.iter().map(|incident| json::text(incident, "/id").map(str::to_owned)).collect()
}

#[test]
fn nothing_recorded_is_lost_when_the_agent_is_killed() -> anyhow::Result<()> {
    require_root()?;
    let _alone = ONE_AT_A_TIME.lock();
    let dir = tempfile::tempdir()?;
    let options = Options::below(dir.path());
    // Not a secret and not repeatable on purpose: another moment every run, printed so that a failure can be told.
    let mut seed = u64::from(SystemTime::now().duration_since(UNIX_EPOCH)?.subsec_nanos()) | 1;
    say(format_args!("seed {seed}"));
    let mut kills = Vec::new();
    let mut due = Vec::new();
    for round in 0..ROUNDS {
        let mut agent = options.start().with_context(|| format!("round {round}"))?;
        let ready = boot_ns();
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let pause = Duration::from_millis(100 + (seed >> 33) % 900);
        let stop = AtomicBool::new(false);
        let (listed, crashed, storm) = std::thread::scope(|scope| -> anyhow::Result<_> {
            let storm = scope.spawn(|| -> anyhow::Result<Vec<Kill>> {
                let mut kills = Vec::new();
                while !stop.load(Ordering::Relaxed) {
                    kills.push(kill_one()?);
                }
                Ok(kills)
            });
            std::thread::sleep(pause);
            let listed = options.incidents();
            let crashed = boot_ns();
            let killed = agent.kill_9();
            stop.store(true, Ordering::Relaxed);
            let storm = storm.join().map_err(|_| anyhow::anyhow!("the storm panicked"))??;
            killed?;
            Ok((ids(&listed?)?, crashed, storm))
        })?;
        let safe = |kill: &&Kill| kill.begun_boot_ns >= ready && kill.reaped_boot_ns + JOURNAL_NS <= crashed;
        due.extend(storm.iter().filter(safe).copied());
        kills.extend(storm);
        say(format_args!(
            "round {round}: killed after {pause:?}, {} kills due so far, {} listed",
            due.len(),
            listed.len()
        ));

        // What was finished is still there and readable, with nobody running.
        let after = ids(&options.incidents()?)?;
        let gone: Vec<_> = listed.difference(&after).collect();
        ensure!(gone.is_empty(), "round {round}: incidents gone after kill -9: {gone:?}");
        for id in &listed {
            options.report(id).with_context(|| format!("round {round}: incident {id} no longer readable"))?;
        }
    }
    let mut agent = options.start().context("the last start")?;
    let complete = |listed: &[Value]| count(listed, &due).values().all(|n| *n == 1);
    let listed = options.incidents_when(Duration::from_secs(30), complete)?;
    let missing = count(&listed, &due).values().filter(|n| **n == 0).count();
    let doubled = count(&listed, &kills).values().filter(|n| **n > 1).count();
    say(format_args!(
        "{} kills, {} while an agent watched, {missing} missing, {doubled} doubled",
        kills.len(),
        due.len()
    ));
    ensure!(missing == 0 && doubled == 0, "{missing} missing, {doubled} doubled; it said:\n{}", agent.stderr());
    for id in ids(&listed)? {
        options.report(&id)?;
    }
    agent.stop()?;
    Ok(())
}

/// The youngest file of the journal.
fn last_segment(dir: &Path) -> anyhow::Result<PathBuf> {
    let mut youngest: Option<(SystemTime, PathBuf)> = None;
    for entry in std::fs::read_dir(dir).with_context(|| format!("failed to list {}", dir.display()))? {
        let entry = entry?;
        let meta = entry.metadata()?;
        if !meta.is_file() || meta.len() == 0 {
            continue;
        }
        let found = (meta.modified()?, entry.path());
        if youngest.as_ref().is_none_or(|y| found > *y) {
            youngest = Some(found);
        }
    }
    Ok(youngest.with_context(|| format!("no journal segment in {}", dir.display()))?.1)
}

#[test]
fn a_torn_journal_is_said_and_read_as_far_as_it_goes() -> anyhow::Result<()> {
    require_root()?;
    let _alone = ONE_AT_A_TIME.lock();
    for damage in ["garbage", "truncated"] {
        let dir = tempfile::tempdir()?;
        let options = Options::below(dir.path());
        let mut agent = options.start()?;
        let kills = [kill_one()?, kill_one()?];
        let both = |listed: &[Value]| count(listed, &kills).values().all(|n| *n == 1);
        let listed = options.incidents_when(Duration::from_secs(30), both)?;
        ensure!(both(&listed), "the kills were not listed; it said:\n{}", agent.stderr());
        agent.kill_9()?;
        let segment = last_segment(&options.journal_dir)?;
        let mut file = std::fs::File::options().write(true).read(true).open(&segment)?;
        let length = file.metadata()?.len();
        match damage {
            "garbage" => {
                use std::io::Seek;
                file.seek(std::io::SeekFrom::End(0))?;
                file.write_all(&[0xa5; 777])?;
            }
            _ => file.set_len(length - 3.min(length))?,
        }
        drop(file);
        let mut agent = options.start().with_context(|| format!("{damage}: start on a torn journal"))?;
        let said = agent.stderr().to_lowercase();
        let words = ["torn", "truncated", "damaged", "corrupt", "cut"];
        let told = said
            .lines()
            .any(|line| words.iter().any(|word| line.contains(word)) && line.contains(|c: char| c.is_ascii_digit()));
        ensure!(told, "{damage}: no word and count about the torn journal; it said:\n{said}");
        let listed = options.incidents()?;
        ensure!(both(&listed), "{damage}: incidents lost or doubled: {:?}", count(&listed, &kills));
        agent.stop()?;
    }
    Ok(())
}

#[test]
fn a_replay_of_the_journal_gives_the_same_incidents() -> anyhow::Result<()> {
    require_root()?;
    let _alone = ONE_AT_A_TIME.lock();
    let dir = tempfile::tempdir()?;
    let options = Options::below(dir.path());
    let mut agent = options.start()?;
    let kills = (0..5).map(|_| kill_one()).collect::<anyhow::Result<Vec<_>>>()?;
    let all = |listed: &[Value]| count(listed, &kills).values().all(|n| *n == 1);
    let listed = options.incidents_when(Duration::from_secs(60), all)?;
    ensure!(all(&listed), "the kills were not listed; it said:\n{}", agent.stderr());
    agent.stop()?;
    let saved = ids(&options.incidents()?)?;
    let mut replay = programs::memtrace_command()?;
    replay.arg("replay").arg(&options.journal_dir).arg("--json");
    let output = successful(replay)?;
    let replayed: BTreeMap<String, Value> = incidents_in(&output.stdout)?
        .into_iter()
        .map(|incident| Ok((json::text(&incident, "/id")?.to_owned(), incident)))
        .collect::<anyhow::Result<_>>()?;
    for id in &saved {
        let again = replayed.get(id).with_context(|| format!("the replay has no {id}"))?;
        // Both through the same printer with sorted keys: equal bytes are equal content, key for key.
        let (saved, again) = (options.report(id)?.to_string(), again.to_string());
        ensure!(saved == again, "{id} differs at {}", difference(&saved, &again));
    }
    let more: Vec<_> = replayed.keys().filter(|id| !saved.contains(*id)).collect();
    ensure!(more.is_empty(), "the replay has more incidents: {more:?}");
    Ok(())
}

/// An array of incidents, or one a line.
fn incidents_in(stdout: &[u8]) -> anyhow::Result<Vec<Value>> {
    let values = serde_json::Deserializer::from_slice(stdout).into_iter::<Value>();
    let mut incidents = Vec::new();
    for value in values {
        match value.context("memtrace replay --json did not print JSON")? {
            Value::Array(list) => incidents.extend(list),
            other => incidents.push(other),
        }
    }
    Ok(incidents)
}

fn difference(left: &str, right: &str) -> String {
    let at = left.bytes().zip(right.bytes()).take_while(|(l, r)| l == r).count();
    let around = |text: &str| text.chars().skip(at.saturating_sub(60)).take(160).collect::<String>();
    format!("byte {at}:\nsaved    …{}…\nreplayed …{}…", around(left), around(right))
}
