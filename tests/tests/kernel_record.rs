//! `memtrace record`: peaks compared with `/usr/bin/time -v` and the cgroup's own; the child's exit
//! code, output and user.

#![allow(clippy::indexing_slicing, reason = "a panic is how a test fails")]

use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use anyhow::{Context, ensure};
use memtrace_tests::agent;
use memtrace_tests::figures::say;
use memtrace_tests::json;
use memtrace_tests::process;
use memtrace_tests::programs::{self, require_root};
use serde_json::Value;

const QUANTUM: u64 = 256 << 10;
const TIME: &str = "/usr/bin/time";
const NOBODY: &str = "65534";

/// A finished recording.
struct Recorded {
    output: Output,
    incident: Value,
}

/// Runs `memtrace record` with further options before the command.
fn record(dir: &Path, options: &[&str], command: &[&str], env: &[(&str, &str)]) -> anyhow::Result<Recorded> {
    let file = dir.join("recording.memtrace");
    let (output, incident) = agent::record(&file, options, command, env)?;
    std::fs::remove_file(&file)?;
    Ok(Recorded { output, incident })
}

/// Compares a recording of a command with what `time -v` and the cgroup report about the same run.
fn compare_peaks(name: &str, command: &[&str]) -> anyhow::Result<()> {
    require_root()?;
    ensure!(Path::new(TIME).is_file(), "{TIME} is missing: install GNU time");
    let dir = tempfile::tempdir()?;
    let (times, peak) = (dir.path().join("time.txt"), dir.path().join("peak.json"));
    let text = |path: &Path| path.to_str().map(str::to_owned).context("a path that is not text");
    let script = r#"time_file=$1 peak_file=$2 workload=$3; shift 3
        /usr/bin/time -v -o "$time_file" "$@" >/dev/null; code=$?
        "$workload" own-peak >"$peak_file"; exit $code"#;
    let (times_text, peak_text, workload) = (text(&times)?, text(&peak)?, text(&programs::path("workload")?)?);
    let mut whole = vec!["sh", "-c", script, "sh", &times_text, &peak_text, &workload];
    whole.extend(command);
    let recorded = record(dir.path(), &[], &whole, &[])?;
    let said = String::from_utf8_lossy(&recorded.output.stderr);
    ensure!(recorded.output.status.success(), "{name}: {}; it said:\n{said}", recorded.output.status);
    ensure!(recorded.incident["kind"] == "recording", "{name}: kind {}", recorded.incident["kind"]);

    // the same process in both: the largest below `time`, which is started by the test and a shell
    let timed = std::fs::read_to_string(&times).context("failed to read what time wrote")?;
    let kib = timed.lines().find_map(|line| line.trim().strip_prefix("Maximum resident set size (kbytes): "));
    let timed: u64 = kib.context("time -v has no maximum resident set size")?.parse::<u64>()? * 1024;
    let processes = json::list(&recorded.incident, "/recording/processes")?;
    let mut ours = vec!["time", "sh", "dash", "bash", "memtrace"];
    if !name.contains("workload") {
        ours.push("workload");
    }
    let of_command = processes.iter().filter(|p| p["comm"].as_str().is_some_and(|comm| !ours.contains(&comm)));
    let (mut max_rss, mut peak_rss) = (None, 0);
    for process in of_command {
        max_rss = max_rss.max(process["max_rss_bytes"].as_u64());
        peak_rss = peak_rss.max(process["peak_bytes"].as_u64().unwrap_or_default());
    }
    // the kernel's maximum adds per-CPU counters approximately: up to one batch a CPU, three
    // counters
    let cpus = u64::try_from(std::thread::available_parallelism().map_or(1, usize::from))?;
    let page = u64::try_from(rustix::param::page_size())?;
    let approximate = cpus * ((2 * cpus).max(32) - 1) * 3 * page;
    say(format_args!("{name:<8} time -v {timed}, max_rss_bytes {max_rss:?}, peak_bytes {peak_rss}"));
    // unknown is acceptable, wrong is not: the kernel's figure includes what a process was before
    // exec
    let same = max_rss.is_none_or(|max_rss| max_rss.abs_diff(timed) <= page);
    ensure!(same, "{name}: max_rss_bytes {max_rss:?}, time -v {timed}: {processes:?}");
    ensure!(peak_rss.abs_diff(timed) <= QUANTUM + approximate, "{name}: peak_bytes {peak_rss}, time -v {timed}");
    // of every process, including the first, which is memtrace itself until exec
    for process in processes {
        let (max_rss, peak) = (process["max_rss_bytes"].as_u64(), process["peak_bytes"].as_u64());
        let foreign =
            max_rss.zip(peak).is_some_and(|(max_rss, peak)| max_rss > peak + (QUANTUM + approximate).max(1 << 20));
        ensure!(!foreign, "{name}: max_rss_bytes is not the process's own: {process}");
    }

    let own: Value = serde_json::from_slice(&std::fs::read(&peak)?).or_else(|_| last_line(&peak))?;
    let path = json::text(&recorded.incident, "/cgroup/path")?;
    ensure!(own["path"] == path, "{name}: recorded cgroup {path}, the command ran in {}", own["path"]);
    if let Some(own) = own["peak_bytes"].as_u64() {
        let said = json::number(&recorded.incident, "/cgroup/peak_bytes")?;
        say(format_args!("{name:<8} cgroup peak {own}, recorded {said}"));
        ensure!(said.abs_diff(own) <= 64 * page * cpus, "{name}: cgroup peak {said}, the kernel says {own}");
    }
    Ok(())
}

fn last_line(file: &Path) -> anyhow::Result<Value> {
    let text = std::fs::read_to_string(file)?;
    let last = text.lines().last().context("own-peak printed nothing")?;
    serde_json::from_str(last).context("own-peak printed something else than JSON")
}

#[test]
fn peak_of_python() -> anyhow::Result<()> {
    compare_peaks("python3", &["python3", "-c", "a = [bytearray(1 << 20) for _ in range(80)]; print(len(a))"])
}

#[test]
fn peak_of_sort() -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let file = dir.path().join("lines.txt");
    let mut seed = 1u64;
    let mut lines = String::new();
    for _ in 0..800_000 {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        lines.push_str(&format!("{seed:020} and some more text to carry\n"));
    }
    std::fs::write(&file, lines)?;
    compare_peaks("sort", &["sort", "-o", "/dev/null", file.to_str().context("path")?])
}

#[test]
fn peak_of_gcc() -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let (source, object) = (dir.path().join("many.c"), dir.path().join("many.o"));
    let text: String = (0..4000)
        .map(|i| format!("int f{i}(int a, int b) {{ int s = {i}; while (a--) s += b * a ^ s; return s; }}\n"))
        .collect();
    std::fs::write(&source, text)?;
    let (source, object) = (source.to_str().context("path")?, object.to_str().context("path")?);
    compare_peaks("gcc", &["gcc", "-O2", "-c", "-o", object, source])
}

#[test]
fn peak_of_cargo_build() -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    std::fs::create_dir(dir.path().join("src"))?;
    std::fs::write(
        dir.path().join("Cargo.toml"),
        "[package]\nname = \"tiny\"\nversion = \"0.0.0\"\nedition = \"2024\"\n[workspace]\n",
    )?;
    std::fs::write(dir.path().join("src/main.rs"), "fn main() { println!(\"{}\", 6 * 7); }\n")?;
    let manifest = dir.path().join("Cargo.toml");
    let manifest = manifest.to_str().context("path")?;
    // cargo itself, not rustup's proxy that starts another program
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned());
    compare_peaks("cargo", &[&cargo, "build", "--quiet", "--offline", "--manifest-path", manifest])
}

#[test]
fn peak_of_a_program_that_forks() -> anyhow::Result<()> {
    let workload = programs::path("workload")?;
    compare_peaks("workload forked", &[workload.to_str().context("path")?, "forked", "--mib", "40"])
}

#[test]
fn peak_of_a_program_of_five_milliseconds() -> anyhow::Result<()> {
    let workload = programs::path("workload")?;
    let command = [workload.to_str().context("path")?, "exit-after", "--ms", "5", "--mib", "20"];
    compare_peaks("workload 5ms", &command)
}

#[test]
fn exit_code_and_stdout_are_the_childs() -> anyhow::Result<()> {
    require_root()?;
    let dir = tempfile::tempdir()?;
    let recorded = record(dir.path(), &[], &["sh", "-c", r"printf 'a\000b\nno newline'; exit 7"], &[])?;
    assert_eq!(recorded.output.status.code(), Some(7));
    assert_eq!(recorded.output.stdout, b"a\0b\nno newline");
    assert_eq!(recorded.incident["recording"]["exit_code"], 7);
    let workload = programs::path("workload")?;
    let recorded = record(dir.path(), &[], &[workload.to_str().context("path")?, "kill-self"], &[])?;
    assert_eq!(recorded.output.status.code(), Some(137));
    assert_eq!(recorded.incident["recording"]["signal"], 9);
    assert_eq!(recorded.incident["recording"]["oom_incidents"], serde_json::json!([]));
    Ok(())
}

#[test]
fn a_program_over_its_limit_is_recorded_with_its_kill() -> anyhow::Result<()> {
    require_root()?;
    let dir = tempfile::tempdir()?;
    let workload = programs::path("workload")?;
    let command = [workload.to_str().context("path")?, "burst", "--mib", "128"];
    let recorded = record(dir.path(), &["--limit", "64M"], &command, &[])?;
    let said = String::from_utf8_lossy(&recorded.output.stderr);
    ensure!(recorded.output.status.code() == Some(137), "{}; it said:\n{said}", recorded.output.status);
    let kills = json::list(&recorded.incident, "/recording/oom_incidents")?;
    ensure!(kills.len() == 1, "OOM incidents of the recording: {kills:?}");
    assert_eq!(json::number(&recorded.incident, "/cgroup/limit_bytes")?, 64 << 20);
    assert_eq!(recorded.incident["recording"]["signal"], 9);
    Ok(())
}

#[test]
fn the_command_runs_as_the_invoking_user() -> anyhow::Result<()> {
    require_root()?;
    let dir = tempfile::tempdir()?;
    // the recording belongs to the user, so its directory must too
    chown(dir.path(), Some(NOBODY.parse()?), Some(NOBODY.parse()?))?;
    let user = [("SUDO_UID", NOBODY), ("SUDO_GID", NOBODY)];
    let recorded = record(dir.path(), &[], &["sh", "-c", "id -u; id -g; id -G"], &user)?;
    assert_eq!(String::from_utf8_lossy(&recorded.output.stdout), "65534\n65534\n65534\n");
    let recorded = record(dir.path(), &[], &["id", "-u"], &[])?;
    assert_eq!(String::from_utf8_lossy(&recorded.output.stdout), "0\n");
    Ok(())
}

#[test]
fn a_command_that_does_not_exist_is_said_by_name() -> anyhow::Result<()> {
    require_root()?;
    let dir = tempfile::tempdir()?;
    let file: PathBuf = dir.path().join("recording.memtrace");
    let mut command: Command = programs::memtrace_command()?;
    command.arg("record").arg("-o").arg(&file).args(["--", "/nonexistent/program"]);
    let output = command.stdin(Stdio::null()).output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success(), "it said:\n{said}");
    assert!(said.contains("/nonexistent/program") && !said.contains("panicked"), "it said:\n{said}");
    Ok(())
}

/// Runs `memtrace record -o FILE -- COMMAND` as if not called through sudo.
fn record_for_nobody(file: &Path, command: &[&str]) -> anyhow::Result<Output> {
    let mut record = programs::memtrace_command()?;
    record.envs([("SUDO_UID", NOBODY), ("SUDO_GID", NOBODY)]).env_remove("SUDO_USER");
    record.args(["record", "--quiet", "-o"]).arg(file).arg("--").args(command);
    record.stdin(Stdio::null()).output().context("failed to run memtrace record")
}

#[test]
fn the_recording_is_written_with_the_users_rights() -> anyhow::Result<()> {
    require_root()?;
    let dir = tempfile::tempdir()?;
    std::fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o755))?;
    let theirs = dir.path().join("theirs");
    std::fs::create_dir(&theirs)?;
    let nobody = NOBODY.parse::<u32>()?;
    chown(&theirs, Some(nobody), Some(nobody))?;
    let file = theirs.join("run.memtrace");
    let output = record_for_nobody(&file, &["true"])?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.code() == Some(0), "{}; it said:\n{said}", output.status);
    let meta = std::fs::metadata(&file)?;
    ensure!((meta.uid(), meta.gid()) == (nobody, nobody), "owned by {}:{}", meta.uid(), meta.gid());

    // what a command could do while root waits to write: replace the file by a link to one of
    // root's
    let secret = dir.path().join("secret");
    std::fs::write(&secret, "only root's")?;
    std::fs::set_permissions(&secret, PermissionsExt::from_mode(0o600))?;
    let text = |path: &Path| path.to_str().map(str::to_owned).context("a path that is not text");
    let swap = ["sh", "-c", r#"ln -sf "$1" "$2""#, "sh", &text(&secret)?, &text(&file)?];
    let output = record_for_nobody(&file, &swap)?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(std::fs::symlink_metadata(&file)?.is_symlink(), "the command made no link; it said:\n{said}");
    ensure!(output.status.code() == Some(1), "{}; it said:\n{said}", output.status);
    ensure!(said.contains("run.memtrace"), "it said:\n{said}");
    ensure!(std::fs::read(&secret)? == b"only root's", "the secret was written to");
    let meta = std::fs::metadata(&secret)?;
    ensure!((meta.uid(), meta.mode() & 0o777) == (0, 0o600), "now {}, mode {:o}", meta.uid(), meta.mode());

    // what can be detected beforehand is reported beforehand: such a link, and a directory of
    // root's
    let ran = theirs.join("ran");
    let beside = dir.path().join("run.memtrace");
    for place in [&file, &beside] {
        let output = record_for_nobody(place, &["touch", &text(&ran)?])?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.status.code() == Some(1), "{}; it said:\n{said}", output.status);
        ensure!(said.contains("run.memtrace") && said.contains("-o"), "it said:\n{said}");
        ensure!(!ran.exists() && !beside.exists(), "the command ran; it said:\n{said}");
    }
    Ok(())
}

#[test]
fn a_user_who_cannot_be_told_is_refused_before_anything_runs() -> anyhow::Result<()> {
    require_root()?;
    let dir = tempfile::tempdir()?;
    let (ran, file) = (dir.path().join("ran"), dir.path().join("recording.memtrace"));
    for (uid, gid) in [("1000x", Some("1000")), ("1000", None), ("4294967295", Some("1000"))] {
        let mut record = programs::memtrace_command()?;
        record.env("SUDO_UID", uid).env_remove("SUDO_GID").envs(gid.map(|gid| ("SUDO_GID", gid)));
        record.args(["record", "-o"]).arg(&file).args(["--", "touch"]).arg(&ran);
        let output = record.stdin(Stdio::null()).output()?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.status.code() == Some(2), "SUDO_UID {uid:?}: {}; it said:\n{said}", output.status);
        ensure!(said.contains("SUDO_"), "SUDO_UID {uid:?}: it said:\n{said}");
        ensure!(!ran.exists() && !file.exists(), "SUDO_UID {uid:?}: the command ran");
    }
    Ok(())
}

#[test]
fn what_the_command_leaves_behind_costs_neither_its_code_nor_the_recording() -> anyhow::Result<()> {
    require_root()?;
    let dir = tempfile::tempdir()?;
    let script = "sleep 30 </dev/null >/dev/null 2>&1 & cat /proc/self/cgroup; echo pid $!; exit 3";
    let recorded = record(dir.path(), &[], &["sh", "-c", script], &[])?;
    let (said, printed) =
        (String::from_utf8_lossy(&recorded.output.stderr), String::from_utf8_lossy(&recorded.output.stdout));
    let pid = printed.lines().find_map(|line| line.strip_prefix("pid ")).context("the command printed no pid")?;
    let pid: u32 = pid.parse()?;
    let moved = std::fs::read_to_string(format!("/proc/{pid}/cgroup"));
    process::signal(pid, rustix::process::Signal::KILL)?;
    ensure!(recorded.output.status.code() == Some(3), "{}; it said:\n{said}", recorded.output.status);
    ensure!(said.contains("1 process(es) of the command still run"), "it said:\n{said}");
    let cage = json::text(&recorded.incident, "/cgroup/path")?.to_owned();
    ensure!(printed.contains(&cage), "the command ran elsewhere than in {cage}:\n{printed}");
    let (moved, own) = (moved?, std::fs::read_to_string("/proc/self/cgroup")?);
    ensure!(moved == own, "the process left behind is in\n{moved}, we are in\n{own}");
    ensure!(!said.contains("cgroup stays"), "it said:\n{said}");
    Ok(())
}

#[test]
fn the_command_has_the_limits_it_would_have_without() -> anyhow::Result<()> {
    require_root()?;
    let dir = tempfile::tempdir()?;
    let file = dir.path().join("recording.memtrace");
    let mut limited = Command::new("sh");
    limited.args(["-c", r#"ulimit -l 8192; exec "$@""#, "sh"]).arg(programs::memtrace()?);
    limited.args(["record", "--quiet", "-o"]).arg(&file).args(["--", "grep", "locked", "/proc/self/limits"]);
    limited.env_remove("SUDO_UID").env_remove("SUDO_GID");
    let output = limited.stdin(Stdio::null()).output()?;
    let (said, printed) = (String::from_utf8_lossy(&output.stderr), String::from_utf8_lossy(&output.stdout));
    ensure!(output.status.success(), "{}; it said:\n{said}", output.status);
    let words: Vec<&str> = printed.split_ascii_whitespace().collect();
    assert_eq!(words, ["Max", "locked", "memory", "8388608", "8388608", "bytes"]);
    Ok(())
}
