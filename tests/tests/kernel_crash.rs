//! kill -9 during a storm of kills: listed incidents stay, the one in progress is recovered, a torn
//! journal is reported.

#![allow(clippy::indexing_slicing, reason = "a panic is how a test fails")]

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, ensure};
use memtrace_tests::agent::{Agent, AgentOptions, successful};
use memtrace_tests::cage::Cage;
use memtrace_tests::deadline::Deadline;
use memtrace_tests::disk::TinyDisk;
use memtrace_tests::figures::say;
use memtrace_tests::json;
use memtrace_tests::process::boot_ns;
use memtrace_tests::programs::{self, require_root};
use serde_json::Value;

/// Number of rounds unless `MEMTRACE_TESTS_ROUNDS` is set: emulated machines do fewer.
const ROUNDS: u64 = 10;
/// Time after a victim is reaped at which the agent has the kill in its journal.
const JOURNAL_NS: u64 = 250_000_000;

/// Serializes the tests: hooks are shared, and a kill of one test must not be seen by another's
/// agent.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// A kill that the test caused: the victim's cgroup and when it was reaped.
#[derive(Clone, Copy, Debug)]
struct Kill {
    cage_id: u64,
    begun_boot_ns: u64,
    reaped_boot_ns: u64,
    /// Round of the storm, and time from reaping the victim to the crash.
    round: u64,
    before_crash_ns: u64,
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
    Ok(Kill { cage_id, begun_boot_ns, reaped_boot_ns, round: 0, before_crash_ns: 0 })
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

/// Kills one process after another until the agent is killed, after `pause`. Returns the incidents listed before,
/// the time of the crash (boot clock, ns), and the kills.
fn crash_in_a_storm(
    options: &AgentOptions,
    agent: &mut Agent,
    pause: Duration,
) -> anyhow::Result<(BTreeSet<String>, u64, Vec<Kill>)> {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
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
    })
}

#[test]
fn nothing_recorded_is_lost_when_the_agent_is_killed() -> anyhow::Result<()> {
    require_root()?;
    let _alone = ONE_AT_A_TIME.lock();
    let dir = tempfile::tempdir()?;
    let options = AgentOptions::below(dir.path());
    // not reproducible on purpose: each run crashes at other moments, printed so that a failure can
    // be understood
    let mut seed = u64::from(SystemTime::now().duration_since(UNIX_EPOCH)?.subsec_nanos()) | 1;
    say(format_args!("seed {seed}"));
    let mut kills = Vec::new();
    let mut due = Vec::new();
    let rounds = std::env::var("MEMTRACE_TESTS_ROUNDS").map_or(Ok(ROUNDS), |rounds| rounds.parse())?;
    for round in 0..rounds {
        let mut agent = options.start().with_context(|| format!("round {round}"))?;
        let ready = boot_ns();
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        // an incident is finished a second after its kill: some rounds end before the first, some
        // among many
        let pause = Duration::from_millis(100 + (seed >> 33) % 2900);
        let (listed, crashed, mut storm) = crash_in_a_storm(&options, &mut agent, pause)?;
        for kill in &mut storm {
            (kill.round, kill.before_crash_ns) = (round, crashed.saturating_sub(kill.reaped_boot_ns));
        }
        let safe = |kill: &&Kill| kill.begun_boot_ns >= ready && kill.before_crash_ns >= JOURNAL_NS;
        due.extend(storm.iter().filter(safe).copied());
        kills.extend(storm);
        say(format_args!(
            "round {round}: killed after {pause:?}, {} kills due so far, {} listed",
            due.len(),
            listed.len()
        ));

        // finished incidents are still there and readable without an agent
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
    let counts = count(&listed, &due);
    let missing: Vec<_> = due.iter().filter(|kill| counts.get(&kill.cage_id) == Some(&0)).collect();
    for kill in &missing {
        say(format_args!("missing: {kill:?}"));
    }
    let missing = missing.len();
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
    let counts = ledger(&options, &due, &listed)?;
    let untold = counts.values().filter(|n| **n != 1).count();
    ensure!(untold == 0, "{untold} kills that are not in the ledger once: {counts:?}");
    agent.stop()?;
    Ok(())
}

/// How often each kill of our cgroups is in the ledger. Each pair of pid and time may be there
/// once.
fn ledger(options: &AgentOptions, kills: &[Kill], listed: &[Value]) -> anyhow::Result<BTreeMap<u64, usize>> {
    let text = std::fs::read_to_string(options.state_dir.join("kills.jsonl")).context("failed to read the ledger")?;
    let mut lines = text.lines().map(serde_json::from_str::<Value>).collect::<Result<Vec<_>, _>>()?;
    // lines with a source are about the time in which no agent watched
    lines.retain(|line| line["source"].is_null());
    let mut told = BTreeSet::new();
    for line in &lines {
        let key = ["boot_ns", "pid", "start_boot_ns"].map(|name| line[name].as_u64());
        ensure!(told.insert(key), "twice in the ledger: {line}");
    }
    // a ledger line has the incident's id, and the incident has the cgroup's
    let cgroup_of = |id: &Value| listed.iter().find(|incident| incident["id"] == *id)?.pointer("/cgroup/id")?.as_u64();
    let mut counts: BTreeMap<u64, usize> = kills.iter().map(|kill| (kill.cage_id, 0)).collect();
    for line in &lines {
        if let Some(count) = cgroup_of(&line["incident"]).and_then(|id| counts.get_mut(&id)) {
            *count += 1;
        }
    }
    Ok(counts)
}

#[test]
fn the_ledger_is_completed_from_the_journal_and_only_once() -> anyhow::Result<()> {
    require_root()?;
    let _alone = ONE_AT_A_TIME.lock();
    let dir = tempfile::tempdir()?;
    let options = AgentOptions::below(dir.path());
    for lost in [false, true] {
        let mut agent = options.start()?;
        let kills = [kill_one()?, kill_one()?];
        let both = |listed: &[Value]| count(listed, &kills).values().all(|n| *n == 1);
        let listed = options.incidents_when(Duration::from_secs(30), both)?;
        ensure!(both(&listed), "the kills were not listed; it said:\n{}", agent.stderr());
        agent.kill_9()?;
        let once = |counts: BTreeMap<u64, usize>| counts.values().all(|n| *n == 1);
        ensure!(
            once(ledger(&options, &kills, &listed)?),
            "the ledger before: {:?}",
            ledger(&options, &kills, &listed)?
        );
        if lost {
            std::fs::remove_file(options.state_dir.join("kills.jsonl"))?;
        }
        let mut agent = options.start()?;
        let counts = ledger(&options, &kills, &listed)?;
        ensure!(once(counts.clone()), "lost {lost}: the ledger after: {counts:?}; it said:\n{}", agent.stderr());
        agent.stop()?;
    }
    Ok(())
}

/// Newest segment of the journal.
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
        let options = AgentOptions::below(dir.path());
        let mut agent = options.start()?;
        let kills = [kill_one()?, kill_one()?];
        let both = |listed: &[Value]| count(listed, &kills).values().all(|n| *n == 1);
        let listed = options.incidents_when(Duration::from_secs(30), both)?;
        ensure!(both(&listed), "the kills were not listed; it said:\n{}", agent.stderr());
        agent.kill_9_at_rest()?;
        let segment = last_segment(&options.journal_dir)?;
        let mut file = std::fs::File::options().write(true).read(true).open(&segment)?;
        let length = file.metadata()?.len();
        // number of lost bytes, where it is known without reading frames
        let given_up = match damage {
            "garbage" => {
                file.seek(SeekFrom::End(0))?;
                file.write_all(&[0xa5; 777])?;
                Some(777)
            }
            _ => {
                file.set_len(length - 3.min(length))?;
                None
            }
        };
        drop(file);
        let mut replay = programs::memtrace_command()?;
        replay.arg("replay").arg(&options.journal_dir).arg("--json");
        let replayed = successful(replay)?;
        let noted = String::from_utf8_lossy(&replayed.stderr).into_owned();
        let bytes = given_up.map_or_else(String::new, |bytes: u64| format!("{bytes} B given up"));
        ensure!(noted.contains("1 segment is torn") && noted.contains(&bytes), "{damage}: the replay said:\n{noted}");
        let incidents: Vec<Value> = serde_json::from_slice(&replayed.stdout)?;
        ensure!(both(&incidents), "{damage}: replayed {:?}", count(&incidents, &kills));

        let mut agent = options.start().with_context(|| format!("{damage}: start on a torn journal"))?;
        let said = agent.stderr();
        let bytes = given_up.map_or_else(String::new, |bytes| format!("a torn tail of {bytes} bytes"));
        let told = said.lines().any(|line| line.contains("dropped a torn tail of ") && line.contains(&bytes));
        ensure!(told, "{damage}: no word and count about the torn journal; it said:\n{said}");
        say(format_args!("{damage}: {}", noted.trim_end()));
        let listed = options.incidents()?;
        ensure!(both(&listed), "{damage}: incidents lost or doubled: {:?}", count(&listed, &kills));
        agent.stop()?;
    }
    Ok(())
}

/// Forks until the first segment of the journal is given up.
fn fill_the_journal(options: &AgentOptions) -> anyhow::Result<()> {
    let first = options.journal_dir.join("journal-00000000000000000001.mtj");
    ensure!(first.exists(), "the journal does not begin with {}", first.display());
    let deadline = Deadline::after(Duration::from_secs(300));
    while first.exists() {
        ensure!(!deadline.has_passed(), "the journal has given up nothing");
        let mut command = std::process::Command::new(programs::path("workload")?);
        command.args(["loop", "fork", "--ms", "500"]);
        successful(command)?;
    }
    Ok(())
}

/// Waits until the ledger has so many kills of this program: then the journal has them too.
fn until_recorded(options: &AgentOptions, agent: &Agent, kills: usize) -> anyhow::Result<()> {
    let ours = format!("/memtrace-tests-{}-", std::process::id());
    let deadline = Deadline::after(Duration::from_secs(60));
    loop {
        let text = std::fs::read_to_string(options.state_dir.join("kills.jsonl")).unwrap_or_default();
        let found = text.lines().filter(|line| line.contains(&ours)).count();
        if found >= kills {
            return Ok(());
        }
        ensure!(!deadline.has_passed(), "{found} of {kills} kills in the ledger; it said:\n{}", agent.stderr());
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn a_journal_that_fills_its_file_system_gives_up_its_oldest() -> anyhow::Result<()> {
    require_root()?;
    let _alone = ONE_AT_A_TIME.lock();
    let dir = tempfile::tempdir()?;
    let disk = TinyDisk::mount(3 << 10)?;
    // no incident is finished before the agent is killed
    let mut options = AgentOptions::below(dir.path()).with(&["--after", "10m"]);
    disk.path().clone_into(&mut options.journal_dir);
    let previous = disk.path().join("previous");
    let mut agent = options.start()?;
    let mut kills = Vec::new();
    for round in 0..2 {
        fill_the_journal(&options).with_context(|| format!("round {round}; it said:\n{}", agent.stderr()))?;
        // what the run before has left goes first
        let left = std::fs::read_dir(&previous).map_or(0, Iterator::count);
        ensure!(left == 0, "round {round}: {left} segments of the run before are left");
        let lost = agent.metric("memtrace_journal_write_failures_total")?;
        ensure!(lost == Some(0.0), "round {round}: {lost:?} frames were not written");
        kills.push(kill_one()?);
        until_recorded(&options, &agent, kills.len())?;
        let early = count(&options.incidents()?, &kills[round..]);
        ensure!(early.values().all(|n| *n == 0), "round {round}: an incident is saved too early");
        agent.kill_9()?;
        agent = options.start().with_context(|| format!("round {round}: start with a full journal"))?;
        let counts = count(&options.incidents()?, &kills);
        ensure!(counts.values().all(|n| *n == 1), "round {round}: {counts:?}; it said:\n{}", agent.stderr());
        say(format_args!("round {round}: {} segments of the run before", std::fs::read_dir(&previous)?.count()));
    }
    agent.stop()?;
    Ok(())
}

#[test]
fn a_replay_of_the_journal_gives_the_same_incidents() -> anyhow::Result<()> {
    require_root()?;
    let _alone = ONE_AT_A_TIME.lock();
    let dir = tempfile::tempdir()?;
    let options = AgentOptions::below(dir.path());
    let mut agent = options.start()?;
    let kills = (0..5).map(|_| kill_one()).collect::<anyhow::Result<Vec<_>>>()?;
    let all = |listed: &[Value]| count(listed, &kills).values().all(|n| *n == 1);
    let listed = options.incidents_when(Duration::from_secs(60), all)?;
    ensure!(all(&listed), "the kills were not listed; it said:\n{}", agent.stderr());
    agent.stop()?;
    let saved = ids(&options.incidents()?)?;
    let again = dir.path().join("again");
    let mut replay = programs::memtrace_command()?;
    replay.arg("replay").arg(&options.journal_dir).arg("--json").arg("-o").arg(&again);
    let printed = String::from_utf8(successful(replay)?.stdout)?;
    let mut replayed = printed_incidents(&printed)?;
    let (mut json_bytes, mut file_bytes) = (0, 0);
    for id in &saved {
        let again = replayed.remove(id).with_context(|| format!("the replay has no {id}"))?;
        // names are added after an incident is saved and a replay has none; without them both are
        // the same, byte for byte
        let saved = json::without_names(&options.report(id)?);
        let again: Value = serde_json::from_str(&again).context("a replay printed no JSON")?;
        let (saved, again) = (serde_json::to_string_pretty(&saved)?, serde_json::to_string_pretty(&again)?);
        ensure!(saved == again, "{id} differs at {}", difference(&saved, &again));
        json_bytes += saved.len();
        file_bytes += std::fs::metadata(dir.path().join("again").join(format!("{id}.memtrace")))?.len();
    }
    ensure!(replayed.is_empty(), "the replay has more incidents: {:?}", replayed.keys());
    say(format_args!("{} incidents replayed: {json_bytes} B of JSON and {file_bytes} B of files", saved.len()));
    Ok(())
}

/// Incidents of a printed array by id, each with the indentation it has when printed alone.
fn printed_incidents(array: &str) -> anyhow::Result<BTreeMap<String, String>> {
    let (mut incidents, mut one) = (BTreeMap::new(), String::new());
    for line in array.lines().filter_map(|line| line.strip_prefix("  ")) {
        let end = line.starts_with('}');
        one.push_str(if end { "}" } else { line });
        one.push('\n');
        if end {
            let incident: Value = serde_json::from_str(&one).context("memtrace replay --json did not print JSON")?;
            incidents.insert(json::text(&incident, "/id")?.to_owned(), std::mem::take(&mut one));
        }
    }
    Ok(incidents)
}

fn difference(left: &str, right: &str) -> String {
    let at = left.bytes().zip(right.bytes()).take_while(|(l, r)| l == r).count();
    let around = |text: &str| text.chars().skip(at.saturating_sub(60)).take(160).collect::<String>();
    format!("byte {at}:\nsaved    …{}…\nreplayed …{}…", around(left), around(right))
}
