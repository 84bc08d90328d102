//! What of the evidence remains when somebody makes very much of it: incidents within
//! `--retain-size`, and the ledger of SIGKILLs.

#![allow(clippy::indexing_slicing, reason = "a panic is how a test fails")]

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, ensure};
use memtrace_tests::actor::Actor;
use memtrace_tests::cage::Cage;
use memtrace_tests::claims::MIB;
use memtrace_tests::deadline::Deadline;
use memtrace_tests::process;
use memtrace_tests::programs;
use memtrace_tests::trial::Trial;
use rustix::process::Signal;
use serde_json::Value;

const WAIT_LIMIT: Duration = Duration::from_secs(90);
const LOOK: Duration = Duration::from_millis(200);
/// Size of the incidents that are kept: a few of them.
const RETAIN: u64 = 100 << 10;
/// Most kills in the loop. It ends when something was deleted.
const KILLS: u32 = 60;
/// Nobody in particular.
const FLOODER: u32 = 54_321;
/// SIGKILLs that the flooder sends: several times what it can have entries for at once.
const FLOOD: u64 = 1000;

fn oom_kill(cage: &Cage) -> anyhow::Result<()> {
    cage.command(programs::path("workload")?)?.args(["burst", "--mib", "24"]).stdout(Stdio::null()).status()?;
    Ok(())
}

/// Incident files: how many, and their size.
fn stored(dir: &Path) -> anyhow::Result<(usize, u64)> {
    let (mut files, mut bytes) = (0, 0);
    for entry in std::fs::read_dir(dir).context("failed to list the state directory")? {
        let entry = entry?;
        if entry.path().extension().is_some_and(|extension| extension == "memtrace") {
            files += 1;
            bytes += entry.metadata()?.len();
        }
    }
    Ok((files, bytes))
}

#[test]
fn a_loop_of_kills_in_one_cgroup_leaves_the_incident_of_another() -> anyhow::Result<()> {
    let trial = Trial::begin(&["--retain-size", &RETAIN.to_string(), "--before", "1s"])?;
    let (once, again) = (Cage::new("once", 12 * MIB)?, Cage::new("again", 12 * MIB)?);
    oom_kill(&once)?;
    let about =
        |listed: &[Value], cage: &Cage| listed.iter().filter(|incident| incident["cgroup"]["id"] == cage.id()).count();
    let listed = trial.options().incidents_when(WAIT_LIMIT, |listed| about(listed, &once) == 1)?;
    ensure!(about(&listed, &once) == 1, "the first kill has no incident");
    let dropped = || Ok::<_, anyhow::Error>(trial.agent.metric("memtrace_incidents_dropped_total")?.unwrap_or(0.0));
    let mut kills = 0;
    while dropped()? < 3.0 {
        ensure!(kills < KILLS, "{kills} kills, and nothing is deleted: {:?}", stored(&trial.options().state_dir)?);
        oom_kill(&again)?;
        kills += 1;
    }
    // All are saved, and what is there is within the size at every look after that.
    let deadline = Deadline::after(WAIT_LIMIT);
    let saved = || trial.agent.metric("memtrace_incidents_saved_total{kind=\"oom_kill\"}");
    while saved()?.is_none_or(|saved| saved < f64::from(kills + 1)) {
        ensure!(!deadline.has_passed(), "not all of {} incidents are saved", kills + 1);
        std::thread::sleep(LOOK);
    }
    let (files, bytes) = stored(&trial.options().state_dir)?;
    ensure!(bytes <= RETAIN && files >= 2, "{files} files of {bytes} bytes");
    let listed = trial.options().incidents()?;
    ensure!(about(&listed, &once) == 1, "the incident of the other cgroup is gone");
    ensure!(about(&listed, &again) >= 1, "the newest incident of the loop is gone");
    for cage in [once, again] {
        cage.remove()?;
    }
    trial.end()
}

/// The entries of a user, and how many SIGKILLs they stand for.
fn of_user(trial: &Trial, uid: u32) -> anyhow::Result<(Vec<Value>, u64)> {
    let entries: Vec<Value> = trial.sigkills()?.into_iter().filter(|entry| entry["sender_uid"] == uid).collect();
    let all = entries.iter().map(|entry| 1 + entry["more"]["count"].as_u64().unwrap_or(0)).sum();
    Ok((entries, all))
}

#[test]
fn a_user_who_floods_the_ledger_has_a_share_and_the_rest_is_counted() -> anyhow::Result<()> {
    let trial = Trial::begin(&[])?;
    // Where everybody may run it.
    let dir = tempfile::tempdir()?;
    std::fs::set_permissions(dir.path(), Permissions::from_mode(0o755))?;
    let program = dir.path().join("workload");
    std::fs::copy(programs::path("workload")?, &program)?;
    let mut flooder = Command::new(&program);
    flooder.args(["kill-children", "--count", &FLOOD.to_string()]).uid(FLOODER).gid(FLOODER).stdout(Stdio::null());
    let mut flooder = flooder.spawn().context("failed to start the flooder")?;
    ensure!(process::wait_at_most(&mut flooder, WAIT_LIMIT)?.success(), "the flooder failed");
    let mut target = Actor::start(None, &["hold"])?;
    target.until("ready")?;
    process::signal(target.pid(), Signal::KILL)?;
    let target = target.finish()?;
    let deadline = Deadline::after(WAIT_LIMIT);
    loop {
        let (entries, all) = of_user(&trial, FLOODER)?;
        let root = trial.sigkills()?.into_iter().find(|entry| entry["pid"] == target.pid);
        let lost = trial.agent.metric("memtrace_lost_total{what=\"samples/ring_full\"}")?.unwrap_or(0.0);
        // How many have a line depends on how fast the flooder is; none goes without being counted.
        if root.as_ref().is_some_and(|root| root["sender_uid"] == 0) && all >= FLOOD - lost as u64 {
            ensure!(entries.iter().all(|entry| entry["sender_comm"] == "workload"), "{:?}", entries.first());
            break;
        }
        ensure!(!deadline.has_passed(), "{all} of {FLOOD} are accounted for, {lost} lost; root's is {root:?}");
        std::thread::sleep(LOOK);
    }
    trial.end()
}
