//! A real container (runc) below a kubelet-style path dies moments after its creation, and the
//! incident names it.

#![allow(clippy::indexing_slicing, reason = "a panic is how a test fails")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use memtrace_tests::cage;
use memtrace_tests::claims::{self, MIB};
use memtrace_tests::deadline::Deadline;
use memtrace_tests::figures::say;
use memtrace_tests::trial::Trial;
use memtrace_tests::{json, programs};
use serde_json::{Value, json};

const POD: &str = "0c5a3f9e-7a52-4d0a-9d0e-6f3a1c9b8e27";
const LIMIT: u64 = 24 * MIB;

/// An OCI bundle: the host's libraries, read only, and a workload.
fn bundle(dir: &Path, cgroup: &str) -> anyhow::Result<()> {
    for place in ["lib", "lib64", "usr", "proc", "dev"] {
        fs::create_dir_all(dir.join("rootfs").join(place)).context("failed to make a root file system")?;
    }
    fs::copy(programs::path("workload")?, dir.join("rootfs/workload")).context("failed to copy the workload")?;
    let bind = |from: &Path, to: &str| json!({ "destination": to, "type": "bind", "source": from, "options": ["rbind", "ro"] });
    let config = json!({
        "ociVersion": "1.0.2",
        "process": {
            "terminal": false, "user": { "uid": 0, "gid": 0 }, "cwd": "/", "env": ["PATH=/"],
            "args": ["/workload", "burst", "--mib", "96", "--threads", "1"], "noNewPrivileges": true,
        },
        "root": { "path": "rootfs", "readonly": true },
        "hostname": "short-lived",
        "mounts": [
            { "destination": "/proc", "type": "proc", "source": "proc" },
            bind(Path::new("/lib"), "/lib"), bind(Path::new("/lib64"), "/lib64"), bind(Path::new("/usr"), "/usr"),
        ],
        "linux": {
            "cgroupsPath": cgroup,
            "resources": { "memory": { "limit": LIMIT, "swap": LIMIT } },
            "namespaces": [{ "type": "pid" }, { "type": "mount" }, { "type": "ipc" }, { "type": "uts" }],
        },
    });
    fs::write(dir.join("config.json"), config.to_string()).context("failed to write config.json")
}

/// Removes the empty directories that runc made above its cgroup, in every hierarchy.
fn remove_parents(path: &str, keep: &str) {
    let hierarchies = fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten().map(|entry| entry.path());
    let tops: Vec<PathBuf> = hierarchies.chain([PathBuf::from("/sys/fs/cgroup")]).filter(|top| top.is_dir()).collect();
    for top in tops {
        let mut below = PathBuf::from(path.trim_start_matches('/'));
        while below.as_os_str() != keep.trim_matches('/') && below.pop() && !below.as_os_str().is_empty() {
            // rmdir fails where it is in use or missing: then it is not ours to remove
            if fs::remove_dir(top.join(&below)).is_err() {
                break;
            }
        }
    }
}

#[test]
fn a_container_that_dies_at_once_is_named_with_its_pod() -> anyhow::Result<()> {
    // runc is many processes, which take stacks too: this test is about names, not the budget
    let trial = Trial::begin(&["--sample", "64K", "--stack-budget", "100%"])?;
    let own = cage::own_place()?;
    let dir = tempfile::tempdir()?;
    let id: String =
        (0..64).map(|at| char::from(b"0123456789abcdef"[(at * 7 + std::process::id() as usize) % 16])).collect();
    let above = own.path.trim_end_matches('/');
    let path = format!("{above}/kubepods/burstable/pod{POD}/{id}");
    bundle(dir.path(), &path)?;

    let begin = Instant::now();
    let mut runc = Command::new("runc");
    runc.arg("--root").arg(dir.path().join("state")).arg("run").arg("--bundle").arg(dir.path()).arg(&id);
    let output = runc.stdin(Stdio::null()).output().context("failed to run runc: install it")?;
    let took = begin.elapsed();
    remove_parents(&path, above);
    // its file system is gone before the incident is closed and named
    fs::remove_dir_all(dir.path().join("rootfs")).context("failed to remove the container's file system")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.code() == Some(137), "runc ended with {}; it said {said}", output.status);

    let about = |i: &&Value| i["cgroup"]["container"]["id"] == id.as_str();
    let deadline = Duration::from_secs(60);
    trial.wait_for(deadline, |listed| listed.iter().any(|i| about(&i)))?;
    let listed = trial.options().incidents()?;
    let mut of_it = listed.iter().filter(about);
    let (Some(listed), None) = (of_it.next(), of_it.next()) else {
        anyhow::bail!(
            "not exactly one incident of the container in {listed:?}; the agent said:\n{}",
            trial.agent.stderr()
        );
    };
    let incident = trial.options().report(json::text(listed, "/id")?)?;
    claims::says(&incident, "/cgroup/path", &path)?;
    claims::says(&incident, "/cgroup/kubernetes/pod_uid", POD)?;
    claims::says(&incident, "/cgroup/kubernetes/qos", "burstable")?;
    claims::says(&incident, "/oom/scope", "cgroup")?;
    claims::counts(&incident, "/cgroup/limit_bytes", LIMIT)?;
    let victims = claims::killed(&incident)?;
    ensure!(victims.len() == 1 && victims[0].1 == "workload", "killed are {victims:?}");
    claims::ends_near_the_limit(&incident, LIMIT)?;
    let named = named(&trial, json::text(listed, "/id")?)?;
    say(format_args!("named after its file system was gone: {named}"));
    say(format_args!("runc: created, killed and removed in {} ms", took.as_millis()));
    trial.end()
}

/// Time until names are in the incident.
const NAMING: Duration = Duration::from_secs(60);

/// The frame of the workload's own code that took the memory, once it has a name.
fn named(trial: &Trial, id: &str) -> anyhow::Result<Value> {
    let deadline = Deadline::after(NAMING);
    loop {
        let incident = trial.options().report(id)?;
        let frames = json::list(&incident, "/allocation_paths")?.iter().filter_map(|path| path["frames"].as_array());
        let own = frames.flatten().find(|frame| {
            let of = |key: &str, part: &str| frame[key].as_str().is_some_and(|text| text.contains(part));
            of("symbol", "take_share") && of("file", "memory.rs") && of("module", "/workload")
        });
        if let Some(own) = own.filter(|own| own["line"].is_u64()) {
            return Ok(own.clone());
        }
        ensure!(!deadline.has_passed(), "no name in {}", json::excerpt(&incident["allocation_paths"]));
        std::thread::sleep(Duration::from_millis(100));
    }
}
