//! Without a hook, exactly what `doctor` announces is missing, and nothing else.

#![allow(clippy::indexing_slicing, reason = "a panic is how a test fails")]

use anyhow::{Context, ensure};
use memtrace_tests::actor::Actor;
use memtrace_tests::agent::json_of;
use memtrace_tests::cage::Cage;
use memtrace_tests::claims::{self, MIB};
use memtrace_tests::figures::{not_run_here, say};
use memtrace_tests::trial::Trial;
use memtrace_tests::{disk, json, programs};
use serde_json::Value;

/// Facts that are compared: about a kill, a kill by an ancestor's limit, and a near miss.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Facts {
    kill: String,
    /// Path of a cgroup that was removed immediately.
    path_known: bool,
    /// Whether mapping calls are listed.
    mappings: bool,
    ancestor: String,
    /// The near miss, if there is one, and whether it says how long tasks were held up.
    near_miss: Option<bool>,
}

/// What `doctor` says when these hooks are left out.
fn doctor(without: &[&str]) -> anyhow::Result<Value> {
    let mut command = programs::memtrace_command()?;
    command.args(["doctor", "--json"]);
    if !without.is_empty() {
        command.args(["--without", &without.join(",")]);
    }
    json_of(command)
}

fn brief(incident: &Value, pid: u32) -> String {
    let victims = incident["oom"]["victims"].as_array().cloned().unwrap_or_default();
    let victims: Vec<String> = victims
        .iter()
        .map(|v| format!("{} {} killed {} shares {}", v["comm"], v["pid"] == pid, v["killed"], v["shares_mm"]))
        .collect();
    format!(
        "{} scope {} limit {} victims {victims:?} trigger {} group {} verdict {}",
        incident["kind"],
        incident["oom"]["scope"],
        incident["oom"]["oom_cgroup"]["limit_bytes"],
        incident["oom"]["trigger"]["pid"] == pid,
        incident["oom"]["group_kill"],
        incident["verdict"]["class"],
    )
}

/// The three scenarios under one agent.
fn facts(without: Option<&str>, expected_losses: &[String]) -> anyhow::Result<Facts> {
    let trial = match without {
        Some(hook) => Trial::begin(&["--without", hook])?,
        None => Trial::begin(&[])?,
    };
    let near = Cage::new("near", 24 * MIB)?;
    let source = disk::readable(48)?;
    let file = source.path().to_str().context("a path that is not text")?;
    let reader = Actor::start(Some(&near), &["cache", "--file", file, "--mib", "48", "--rounds", "2"])?.finish()?;
    ensure!(reader.status.success(), "the reader ended with {}", reader.status);

    let greedy = ["burst", "--mib", "64", "--threads", "1"];
    let pod = Cage::new("pod", 24 * MIB)?;
    let inner = pod.child("inner")?;
    let in_pod = Actor::start(Some(&inner), &greedy)?.finish()?;
    in_pod.was_killed()?;
    let below = trial.incident(&inner)?;
    ensure!(
        claims::degraded(&below)? == expected_losses,
        "{:?} is lost, announced is {expected_losses:?}",
        claims::degraded(&below)?
    );
    claims::says(&below, "/oom/oom_cgroup/path", pod.path())?;
    let ancestor = brief(&below, in_pod.pid);
    inner.remove()?;
    pod.remove()?;

    let cage = Cage::new("leaf", 16 * MIB)?;
    let (id, path) = (cage.id(), cage.path().to_owned());
    let victim = Actor::start(Some(&cage), &greedy)?.finish()?;
    cage.remove()?;
    victim.was_killed()?;
    let ours = |i: &&Value| i["cgroup"]["id"] == id;
    let deadline = std::time::Duration::from_secs(60);
    trial.wait_for(deadline, |listed| listed.iter().any(|i| ours(&i)))?;
    let listed = trial.options().incidents()?;
    let listed = listed.iter().find(ours).context("no incident of the kill")?;
    let whole = trial.options().report(json::text(listed, "/id")?)?;
    let told = whole["cgroup"]["path"].as_str();
    ensure!(told.is_none_or(|told| told == path), "the path is {told:?}, not {path}");

    // without reclaim records there is no near miss; otherwise it comes within the detector's five
    // seconds
    let deadline = std::time::Duration::from_secs(if without == Some("reclaim_begin") { 8 } else { 60 });
    // the rise may be a spike, too
    let of_near = |i: &&Value| i["cgroup"]["id"] == near.id() && i["kind"] != "spike";
    trial.wait_for(deadline, |listed| listed.iter().any(|i| of_near(&i)))?;
    let all = trial.options().incidents()?;
    let near_miss = all.iter().find(of_near);
    ensure!(near_miss.is_none_or(|i| i["kind"] == "near_miss"), "{near_miss:?}");
    let facts = Facts {
        kill: brief(&whole, victim.pid),
        path_known: told.is_some(),
        mappings: !json::list(&whole, "/mappings")?.is_empty(),
        ancestor,
        near_miss: near_miss.map(|i| !i["pressure"]["stalled_ns"].is_null()),
    };
    near.remove()?;
    trial.end()?;
    Ok(facts)
}

#[test]
fn without_a_hook_what_doctor_announces_is_lost_and_nothing_else() -> anyhow::Result<()> {
    programs::require_root()?;
    let report = doctor(&[])?;
    let base_losses = claims::announced(&report)?;
    let base = facts(None, &base_losses)?;
    ensure!(base.path_known && base.mappings && base.near_miss == Some(true), "with every hook: {base:?}");
    let hooks = json::list(&report, "/hooks")?;
    let optional: Vec<&str> = hooks
        .iter()
        .filter(|h| h["need"] == "optional" && h["state"] == "attached")
        .filter_map(|h| h["hook"].as_str())
        .collect();
    ensure!(optional.len() >= 7, "only {optional:?} can be left out");
    for off in hooks.iter().filter(|h| h["need"] == "optional" && h["state"] != "attached") {
        not_run_here(format!("without {}", off["hook"]), "the kernel has no place for it anyway");
    }
    let mut problems = Vec::new();
    let without_all = claims::announced(&doctor(&optional)?)?;
    for hook in &optional {
        let sentence = without_all.iter().find(|lost| lost.starts_with(&format!("{hook}: ")));
        let mut losses = base_losses.clone();
        losses.push(sentence.with_context(|| format!("doctor does not say what {hook} is for"))?.clone());
        losses.sort();
        let found = facts(Some(hook), &losses)?;
        let mut expected = base.clone();
        match *hook {
            // it may live too short to be looked up, or just long enough
            "cgroup_mkdir" => expected.path_known = found.path_known,
            "map" => expected.mappings = false,
            "reclaim_begin" => expected.near_miss = None,
            "reclaim_end" => expected.near_miss = Some(false),
            _ => {}
        }
        if found != expected {
            problems.push(format!("without {hook}:\n  found    {found:?}\n  expected {expected:?}"));
        }
    }
    say(format_args!("left out one by one: {}", optional.join(", ")));
    ensure!(problems.is_empty(), "{}", problems.join("\n"));
    Ok(())
}
