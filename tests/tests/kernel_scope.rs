//! Which limit ran out, who was killed and who asked for memory, in every shape of a cgroup tree.

#![allow(clippy::indexing_slicing, reason = "a panic is how a test fails")]

use anyhow::{Context, ensure};
use memtrace_tests::actor::Actor;
use memtrace_tests::cage::{Cage, Version};
use memtrace_tests::claims::{self, MIB};
use memtrace_tests::figures::{not_run_here, say};
use memtrace_tests::json;
use memtrace_tests::trial::Trial;
use serde_json::Value;

/// Processes in a group kill.
const GROUP: usize = 32;

#[test]
fn page_cache_gives_way_to_anonymous_memory_until_that_is_too_much() -> anyhow::Result<()> {
    let trial = Trial::begin(&[])?;
    let cage = Cage::new("cache", 32 * MIB)?;
    let source = memtrace_tests::disk::readable(24)?;
    let file = source.path().to_str().context("a path that is not text")?;
    let victim = Actor::start(Some(&cage), &["cache", "--file", file, "--mib", "24", "--then-anon-mib", "64"])?;
    let ended = victim.finish()?;
    ended.was_killed()?;
    let incident = trial.incident(&cage)?;
    claims::ran_out_itself(&incident, &cage)?;
    claims::only_victim(&incident, ended.pid, "workload")?;
    // the cache was reclaimed first: hardly any is left at the kill
    let column = |name: &str| json::list(&incident, &format!("/timeline/columns/{name}"));
    let (usage, anon) = (column("usage_bytes")?, column("anon_bytes")?);
    let cached = usage.iter().zip(anon).filter_map(|(u, a)| u.as_u64()?.checked_sub(a.as_u64()?)).max();
    let left = json::number(&incident, "/composition/unattributed_bytes")?;
    say(format_args!("page cache: {} KiB at most, {} KiB at the kill", cached.unwrap_or(0) >> 10, left >> 10));
    ensure!(cached >= Some(16 * MIB), "the curve never shows more than {cached:?} of page cache");
    ensure!(left <= 8 * MIB, "{left} bytes are not anonymous at the kill");
    cage.remove()?;
    trial.end()
}

#[test]
fn kernel_memory_counts_though_no_process_holds_it() -> anyhow::Result<()> {
    let trial = Trial::begin(&[])?;
    let cage = Cage::new("sockets", 32 * MIB)?;
    let ended = Actor::start(Some(&cage), &["sockets", "--mib", "128"])?.finish()?;
    ended.was_killed()?;
    let incident = trial.incident(&cage)?;
    claims::ran_out_itself(&incident, &cage)?;
    claims::only_victim(&incident, ended.pid, "workload")?;
    let unattributed = json::number(&incident, "/composition/unattributed_bytes")?;
    say(format_args!("socket buffers: {} of {} MiB in no process", unattributed >> 20, cage.limit() >> 20));
    ensure!(unattributed >= 24 * MIB, "only {unattributed} bytes are in no process");
    cage.remove()?;
    trial.end()
}

#[test]
fn the_parents_limit_kills_in_a_child_without_one() -> anyhow::Result<()> {
    let trial = Trial::begin(&[])?;
    let pod = Cage::new("pod", 48 * MIB)?;
    let (quiet, greedy) = (pod.child("quiet")?, pod.child("greedy")?);
    let mut holder = Actor::start(Some(&quiet), &["member", "--comm", "quiet", "--mib", "12", "--wait"])?;
    holder.until("ready")?;
    let ended = Actor::start(Some(&greedy), &["burst", "--mib", "96", "--touch"])?.finish()?;
    ended.was_killed()?;
    let incident = trial.incident(&greedy)?;
    claims::says(&incident, "/oom/scope", "ancestor")?;
    claims::says(&incident, "/oom/oom_cgroup/path", pod.path())?;
    claims::counts(&incident, "/oom/oom_cgroup/id", pod.id())?;
    claims::counts(&incident, "/oom/oom_cgroup/limit_bytes", pod.limit())?;
    claims::says(&incident, "/cgroup/path", greedy.path())?;
    ensure!(incident["cgroup"]["limit_bytes"].is_null(), "the child has no limit but {}", incident["cgroup"]);
    claims::only_victim(&incident, ended.pid, "workload")?;
    // the curve is of the cgroup that ran out, and the neighbour under the same limit is in the
    // task table
    claims::ends_near_the_limit(&incident, pod.limit())?;
    let tasks = json::list(&incident, "/oom/tasks")?;
    let neighbour = tasks.iter().find(|task| task["pid"] == holder.pid()).context("the neighbour is not listed")?;
    ensure!(neighbour["victim"] == false, "the neighbour is no victim: {neighbour}");
    ensure!(holder.finish()?.status.success(), "the neighbour lives on");
    greedy.remove()?;
    quiet.remove()?;
    pod.remove()?;
    trial.end()
}

#[test]
fn a_group_kill_is_one_incident_with_every_process_once() -> anyhow::Result<()> {
    let cage = Cage::new("group", 128 * MIB)?;
    if cage.version() == Version::V1 {
        not_run_here("group kill", "memory.oom.group is a file of cgroup v2");
        return cage.remove();
    }
    let trial = Trial::begin(&[])?;
    cage.set("memory.oom.group", 1)?;
    let mut members = Vec::new();
    for _ in 1..GROUP {
        members.push(Actor::start(Some(&cage), &["member", "--comm", "group-member", "--mib", "1", "--wait"])?);
    }
    members.iter_mut().try_for_each(|member| member.until("ready").map(|_| ()))?;
    let hog = Actor::start(Some(&cage), &["burst", "--mib", "256", "--touch"])?.finish()?;
    hog.was_killed()?;
    let mut expected = vec![hog.pid];
    for member in members {
        let ended = member.finish()?;
        ended.was_killed()?;
        expected.push(ended.pid);
    }
    let incident = trial.incident(&cage)?;
    claims::ran_out_itself(&incident, &cage)?;
    ensure!(incident["oom"]["group_kill"] == true, "it is not called a group kill");
    let mut killed: Vec<u32> = claims::killed(&incident)?.into_iter().map(|(pid, _)| pid).collect();
    killed.sort_unstable();
    expected.sort_unstable();
    ensure!(killed == expected, "killed are {killed:?}, not {expected:?}");
    let listed = json::list(&incident, "/oom/victims")?.len();
    ensure!(listed == GROUP, "{listed} victims are listed");
    cage.remove()?;
    trial.end()
}

#[test]
fn a_worker_is_killed_and_its_parent_lives_on() -> anyhow::Result<()> {
    let trial = Trial::begin(&[])?;
    let cage = Cage::new("worker", 32 * MIB)?;
    let ended = Actor::start(Some(&cage), &["fork-child", "--mib", "64"])?.finish()?;
    ensure!(ended.status.success(), "the parent ended with {}", ended.status);
    let worker = ended.child("child_exit")?;
    let incident = trial.incident(&cage)?;
    claims::ran_out_itself(&incident, &cage)?;
    claims::only_victim(&incident, worker, "grow-child")?;
    let tasks = json::list(&incident, "/oom/tasks")?;
    let row = |pid: u32| tasks.iter().find(|task| task["pid"] == pid).context("a process is not in the task table");
    ensure!(row(worker)?["victim"] == true && row(ended.pid)?["victim"] == false, "{tasks:?}");
    cage.remove()?;
    trial.end()
}

#[test]
fn the_trigger_is_a_thread_of_somebody_else_than_the_victim() -> anyhow::Result<()> {
    let trial = Trial::begin(&[])?;
    let cage = Cage::new("trigger", 64 * MIB)?;
    let mut holder = Actor::start(Some(&cage), &["hold", "--anon-mib", "44", "--threads", "16"])?;
    holder.until("ready")?;
    // another thread takes the memory: the trigger's thread id differs from its process id
    let asks = ["burst", "--mib", "30", "--threads", "1", "--touch"];
    let trigger = Actor::start(Some(&cage), &asks)?.finish()?;
    let victim = holder.finish()?;
    victim.was_killed()?;
    // while the victim is slow to die, the kernel may also kill the trigger: another kill, another
    // incident
    let both = !trigger.status.success();
    let incidents = trial.incidents(&[&cage], 1 + usize::from(both))?;
    let of_victim = |incident: &Value| incident["oom"]["victims"][0]["pid"] == victim.pid;
    let incident = incidents.into_iter().find(of_victim).context("no incident of the victim")?;
    claims::ran_out_itself(&incident, &cage)?;
    claims::only_victim(&incident, victim.pid, "workload")?;
    let listed = json::list(&incident, "/oom/victims")?.len();
    ensure!(listed == 1, "sixteen threads are {listed} victims");
    claims::counts(&incident, "/oom/trigger/pid", trigger.pid.into())?;
    let thread = json::number(&incident, "/oom/trigger/tid")?;
    ensure!(thread != u64::from(trigger.pid), "the trigger is said to be the first thread");
    cage.remove()?;
    trial.end()
}

#[test]
fn processes_that_share_their_memory_die_together_and_are_told_apart() -> anyhow::Result<()> {
    let trial = Trial::begin(&[])?;
    let cage = Cage::new("sharers", 32 * MIB)?;
    let ended = Actor::start(Some(&cage), &["share-mm", "--mib", "64"])?.finish()?;
    ended.was_killed()?;
    let sharer = ended.child("sharer")?;
    let incident = trial.incident(&cage)?;
    claims::ran_out_itself(&incident, &cage)?;
    let victims = json::list(&incident, "/oom/victims")?;
    ensure!(victims.len() == 2, "two processes are {} victims", victims.len());
    let of = |pid: u32| victims.iter().find(|v| v["pid"] == pid).with_context(|| format!("{pid} is not listed"));
    let shares = |v: &Value| v["killed"] == true && v["shares_mm"] == true;
    let marked = |v: &Value| v["killed"] == true && v["shares_mm"] == false;
    let (first, second) = (of(ended.pid)?, of(sharer)?);
    // the kernel picks either of the two; the other dies because it shares the memory
    ensure!(
        (marked(first) && shares(second)) || (marked(second) && shares(first)),
        "the two are not told apart: {victims:?}"
    );
    // memory of two holders counts once
    claims::ends_near_the_limit(&incident, cage.limit())?;
    let anon = json::number(&incident, "/composition/anon_bytes")?;
    ensure!(anon <= cage.limit() + MIB, "{anon} anonymous bytes in a cgroup of {}", cage.limit());
    cage.remove()?;
    trial.end()
}

#[test]
fn huge_pages_come_two_mebibytes_at_a_time() -> anyhow::Result<()> {
    let enabled = std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled").unwrap_or_default();
    if enabled.is_empty() || enabled.contains("[never]") {
        not_run_here("huge pages", "this kernel has none, or they are switched off");
        return Ok(());
    }
    let trial = Trial::begin(&[])?;
    let cage = Cage::new("huge", 33 * MIB)?;
    let ended = Actor::start(Some(&cage), &["huge", "--mib", "24"])?.finish()?;
    ensure!(ended.status.success(), "{}", ended.status);
    let ended = Actor::start(Some(&cage), &["huge", "--mib", "256"])?.finish()?;
    ended.was_killed()?;
    let incident = trial.incident(&cage)?;
    claims::says(&incident, "/oom/scope", "cgroup")?;
    claims::only_victim(&incident, ended.pid, "workload")?;
    let times = json::list(&incident, "/timeline/columns/boot_ns")?;
    let anon = json::list(&incident, "/timeline/columns/anon_bytes")?;
    let started = json::number(&incident, "/oom/victims/0/start_boot_ns")?;
    let at = json::number(&incident, "/at/boot_ns")?;
    let within = |time: &Value| time.as_u64().is_some_and(|time| time > started && time <= at);
    let held: Vec<u64> = times.iter().zip(anon).filter(|(t, _)| within(t)).filter_map(|(_, a)| a.as_u64()).collect();
    let steps = held.windows(2).filter(|pair| pair[1].saturating_sub(pair[0]) >= 2 * MIB).count();
    say(format_args!("{steps} steps of 2 MiB and more in {} readings", held.len()));
    // 33 MiB hold fifteen or sixteen of them; near the limit the kernel falls back to small pages
    ensure!(steps >= 12, "only {steps} steps of 2 MiB in {held:?}");
    cage.remove()?;
    trial.end()
}
