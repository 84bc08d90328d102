//! Captures of real kills replay to the same bytes in every build. No root.

use std::path::PathBuf;

use anyhow::{Context, ensure};
use memtrace_tests::agent::successful;
use memtrace_tests::figures::say;
use memtrace_tests::programs;

/// Kernel series of the captures from virtual machines, with the cgroup versions of each.
const KERNELS: [(&str, &[&str]); 4] =
    [("5.10", &["v1", "v2"]), ("6.1", &["v1", "v2"]), ("6.12", &["v2"]), ("7.", &["v2"])];

/// A capture, or the directory of those of the kernel matrix.
fn capture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("golden").join(name)
}

fn replay(name: &str, arguments: &[&str]) -> anyhow::Result<String> {
    let mut command = programs::memtrace_command()?;
    command.arg("replay").arg(capture(name)).args(arguments);
    let output = successful(command)?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(said.is_empty(), "the replay of {name} said:\n{said}");
    Ok(String::from_utf8(output.stdout)?)
}

#[test]
fn a_burst_replays_to_the_same_incident() -> anyhow::Result<()> {
    let incidents = replay("burst.mtj", &["--json"])?;
    ensure!(incidents == replay("burst.mtj", &["--json"])?, "two replays differ");
    say(format_args!("burst.mtj: {} B of incidents", incidents.len()));
    insta::assert_snapshot!("burst", incidents);
    Ok(())
}

/// A capture from every kernel replays to the committed result. Curves are compared by checksum.
#[test]
fn every_kernel_replays_to_the_same_incidents() -> anyhow::Result<()> {
    let entries = std::fs::read_dir(capture("kernels")).context("no captures of kernels")?;
    let names = entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
    let mut names = names.collect::<anyhow::Result<Vec<String>>>()?;
    names.retain(|name| name.ends_with(".mtj"));
    names.sort();
    for (series, versions) in KERNELS {
        for version in versions {
            let suffix = format!("-{version}.mtj");
            let is_of = |name: &&String| name.starts_with(series) && name.ends_with(&suffix);
            ensure!(names.iter().any(|name| is_of(&name)), "no capture of {series} with cgroup {version}");
        }
    }
    for name in &names {
        let file = format!("kernels/{name}");
        let text = replay(&file, &["--json"])?;
        ensure!(text == replay(&file, &["--json"])?, "two replays of {name} differ");
        let mut incidents: serde_json::Value = serde_json::from_str(&text)?;
        for incident in incidents.as_array_mut().context("a replay is an array")? {
            for path in incident.get_mut("allocation_paths").and_then(|p| p.as_array_mut()).into_iter().flatten() {
                let frames = path.get_mut("frames").context("a path without frames")?;
                *frames = one_line(frames).into();
            }
            if let Some(samples) = incident.pointer_mut("/allocations/samples") {
                *samples = serde_json::json!({ "crc32": crc32fast::hash(samples.to_string().as_bytes()) });
            }
            let curve = incident.get_mut("timeline").context("no timeline")?;
            let checksum = crc32fast::hash(curve.to_string().as_bytes());
            let rows = curve.pointer("/columns/boot_ns").and_then(|times| times.as_array().map(Vec::len));
            *curve = serde_json::json!({ "rows": rows, "crc32": format!("{checksum:08x}") });
        }
        insta::assert_snapshot!(name.trim_end_matches(".mtj"), serde_json::to_string_pretty(&incidents)?);
    }
    say(format_args!("captures of {} kernels and cgroup versions", names.len()));
    Ok(())
}

#[test]
fn a_burst_is_reported_from_its_capture() -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let out = dir.path().to_str().context("a path that is not text")?;
    let table = replay("burst.mtj", &["-o", out])?;
    let mut files = std::fs::read_dir(dir.path())?.collect::<Result<Vec<_>, _>>()?;
    let file = files.pop().with_context(|| format!("no incident file; the replay printed:\n{table}"))?;
    let mut report = programs::memtrace_command()?;
    report.arg("report").arg(file.path());
    insta::assert_snapshot!("burst_report", String::from_utf8(successful(report)?.stdout)?);
    Ok(())
}

/// Frames in one line of text.
fn one_line(frames: &serde_json::Value) -> String {
    let frames = frames.as_array().into_iter().flatten().map(|frame| {
        let text = |key: &str| frame.get(key).and_then(|value| value.as_str());
        let offset = frame.get("offset").and_then(|offset| offset.as_u64());
        let place = || format!("{}+{:#x}", text("module").unwrap_or("?"), offset.unwrap_or(0));
        text("symbol").map_or_else(place, str::to_owned)
    });
    frames.collect::<Vec<_>>().join(" < ")
}
