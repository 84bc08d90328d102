//! Recordings of programs with known truth, of programs deleted before they are named, and of
//! hostile programs: confusing names, mappings, stacks and unwind information.

#![allow(clippy::indexing_slicing, reason = "a panic is how a test fails")]

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::{Context, ensure};
use memtrace_tests::agent::{self, successful};
use memtrace_tests::figures::{not_run_here, say};
use memtrace_tests::growth;
use memtrace_tests::programs::{self, require_root};
use serde_json::Value;
use tempfile::TempDir;

/// Exit code of the hostile programs.
const THEIR_CODE: i32 = 7;
/// A name made of markup and terminal escapes.
const EVIL: &str = "<img\u{1b}[31m src=x onerror=alert(1)>\u{1b}]0;owned\u{7}";
/// Small sample intervals and no budget: the test is about correctness, not cost.
const FINE: [&str; 4] = ["--sample", "128K", "--stack-budget", "100%"];
/// For threads that grow at the same time. Not for deep stacks, of which the ring holds too few at
/// this rate.
const FINEST: [&str; 6] = ["--quantum", "16K", "--sample", "64K", "--stack-budget", "100%"];

/// A directory with programs of a test's own.
struct Bench {
    dir: TempDir,
    sources: PathBuf,
}

/// A finished recording.
struct Recorded {
    output: Output,
    incident: Value,
    file: PathBuf,
}

impl Bench {
    /// `None`, and reported as not run, without a compiler or the sources.
    fn open(what: &str) -> anyhow::Result<Option<Self>> {
        require_root()?;
        let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("truth");
        let present = |tool: &&str| Command::new(tool).arg("--version").output().is_ok_and(|o| o.status.success());
        if let Some(missing) = ["gcc", "objcopy", "strip"].iter().find(|tool| !present(tool)) {
            not_run_here(what, format_args!("no {missing}"));
            return Ok(None);
        }
        if !sources.is_dir() {
            not_run_here(what, format_args!("no {}", sources.display()));
            return Ok(None);
        }
        Ok(Some(Self { dir: tempfile::tempdir().context("failed to make a directory")?, sources }))
    }

    fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Compiles as distributions do: optimized, default frame pointers.
    fn compile(&self, source: &str, to: &str, more: &[&str]) -> anyhow::Result<PathBuf> {
        let path = self.path(to);
        let mut gcc = Command::new("gcc");
        gcc.arg("-O2").arg("-o").arg(&path).arg(self.sources.join(source)).args(more);
        successful(gcc)?;
        Ok(path)
    }

    fn library(&self, to: &str, more: &[&str]) -> anyhow::Result<PathBuf> {
        self.compile("c/library.c", to, &[&["-shared", "-fPIC"], more].concat())
    }

    /// Runs a command under `memtrace record`.
    fn record(&self, command: &[&OsStr]) -> anyhow::Result<Recorded> {
        self.record_with(&FINE, command)
    }

    fn record_with(&self, options: &[&str], command: &[&OsStr]) -> anyhow::Result<Recorded> {
        let file = self.path("recording.memtrace");
        let (output, incident) = agent::record(&file, options, command, &[])?;
        Ok(Recorded { output, incident, file })
    }
}

impl Recorded {
    /// Checks exit code, sums, and that growth is at least 95 % of what the program touched.
    fn is_sound(&self, code: i32) -> anyhow::Result<growth::Bytes> {
        let said = String::from_utf8_lossy(&self.output.stderr);
        ensure!(self.output.status.code() == Some(code), "{}; it said:\n{said}", self.output.status);
        ensure!(!said.contains("panicked"), "it said:\n{said}");
        let growth = growth::adds_up(&self.incident)?;
        let truth = growth::truth(&self.output.stdout)?;
        let touched: u64 = truth.values().sum();
        ensure!(growth * 100 >= touched * 95, "{touched} bytes were touched, growth is {growth}");
        Ok(truth)
    }

    fn is_right(&self, name: &str) -> anyhow::Result<()> {
        Self::are_right(std::slice::from_ref(self), name)
    }

    /// Checks several recordings together. If threads grow at once, it is random whose stack stands
    /// for a sample; that evens out over many.
    fn are_right(runs: &[Self], name: &str) -> anyhow::Result<()> {
        let (mut truth, mut found) = (growth::Bytes::new(), growth::Bytes::new());
        for run in runs {
            let of_run = run.is_sound(0)?;
            growth::reaches_the_outermost(&run.incident)?;
            let attributed = growth::by_function(&run.incident, &of_run)?;
            for (sums, bytes) in [(&mut truth, of_run), (&mut found, attributed)] {
                bytes.into_iter().for_each(|(function, bytes)| *sums.entry(function).or_default() += bytes);
            }
        }
        say(format_args!("{name}, {} run(s): truth {truth:?}, attributed {found:?}", runs.len()));
        growth::agrees(&found, &truth)
    }

    /// The report in this format, on a terminal's worth of nothing.
    fn report(&self, format: &str) -> anyhow::Result<Vec<u8>> {
        let mut report = programs::memtrace_command()?;
        report.arg("report").arg(&self.file).args(["--format", format]);
        Ok(successful(report)?.stdout)
    }

    /// Frames of the samples whose function has this name.
    fn frames(&self, function: &str) -> anyhow::Result<Vec<&Value>> {
        let samples = growth::touching(&self.incident)?;
        let frames = samples.into_iter().flat_map(|(path, _)| growth::user_frames(path));
        Ok(frames.filter(|frame| growth::is(frame, function)).collect())
    }
}

#[test]
fn each_function_has_what_it_touched() -> anyhow::Result<()> {
    let Some(bench) = Bench::open("functions and what they touched")? else { return Ok(()) };
    let steps: [(&str, &[&str], usize); 5] = [
        ("nested", &FINE, 1),
        ("phases", &FINE, 1),
        ("recursive", &FINE, 1),
        ("reading", &FINE, 1),
        ("threads", &FINEST, 4),
    ];
    for (name, options, runs) in steps {
        let program = bench.compile(&format!("c/{name}.c"), name, &["-pthread"])?;
        let run = |_| bench.record_with(options, &[program.as_os_str()]);
        let runs = (0..runs).map(run).collect::<anyhow::Result<Vec<_>>>()?;
        Recorded::are_right(&runs, name).with_context(|| format!("in {name}"))?;
    }
    Ok(())
}

#[test]
fn a_stripped_library_is_named_by_the_debug_file_beside_it() -> anyhow::Result<()> {
    let Some(bench) = Bench::open("debug files")? else { return Ok(()) };
    let loader = bench.compile("c/loader.c", "loader", &["-ldl"])?;
    let library = bench.library("library.so", &["-g"])?;
    let debug = bench.path("library.so.debug");
    let mut keep = Command::new("objcopy");
    keep.arg("--only-keep-debug").arg(&library).arg(&debug);
    successful(keep)?;
    let mut strip = Command::new("strip");
    strip.arg("--strip-all").arg(&library);
    successful(strip)?;
    let mut link = Command::new("objcopy");
    link.arg("--add-gnu-debuglink=library.so.debug").arg("library.so").current_dir(bench.dir.path());
    successful(link)?;
    let recorded = bench.record(&[loader.as_os_str(), library.as_os_str()])?;
    recorded.is_right("a stripped library")?;
    let frames = recorded.frames("library_touch")?;
    let lines = frames.iter().filter(|frame| frame["line"].is_u64() && ends(frame, "file", "library.c")).count();
    ensure!(!frames.is_empty() && lines == frames.len(), "{lines} of {} frames have a line", frames.len());
    Ok(())
}

#[test]
fn names_files_and_lines_outlive_the_process_and_its_files() -> anyhow::Result<()> {
    let Some(bench) = Bench::open("deleted programs")? else { return Ok(()) };
    let loader = bench.compile("c/loader.c", "loader", &["-g", "-ldl"])?;
    let library = bench.library("library.so", &["-g"])?;
    let recorded = bench.record(&[loader.as_os_str(), library.as_os_str(), OsStr::new("unlink")])?;
    ensure!(!loader.exists() && !library.exists(), "the program did not delete itself and its library");
    recorded.is_right("a deleted program")?;
    for (function, file) in [("library_touch", "library.c"), ("library_calls_back", "library.c"), ("main", "loader.c")]
    {
        let frames = recorded.frames(function)?;
        ensure!(!frames.is_empty(), "no frame of {function}");
        // `main` is part of other names too; and a path from the moment of the mapping may have
        // none
        let named = frames.iter().filter(|frame| ends(frame, "file", file) && frame["line"].is_u64()).count();
        ensure!(
            named * 10 >= frames.len() * 9 || function == "main" && named > 0,
            "{function}: {named} of {}",
            frames.len()
        );
    }
    for function in ["library_touch", "called_back"] {
        let deleted = recorded.frames(function)?;
        let odd =
            deleted.iter().find(|frame| frame["module"].as_str().is_none_or(|module| module.contains("(deleted)")));
        ensure!(odd.is_none(), "a module without its path: {odd:?}");
    }
    Ok(())
}

fn ends(frame: &Value, key: &str, end: &str) -> bool {
    frame[key].as_str().is_some_and(|text| text.ends_with(end))
}

#[test]
fn names_made_of_markup_and_escapes_are_told_as_text() -> anyhow::Result<()> {
    let Some(bench) = Bench::open("hostile names")? else { return Ok(()) };
    let plain = bench.compile("hostile/names.c", "plain", &[])?;
    let dir = bench.path(OsString::from_vec([EVIL.as_bytes(), b"\xff.d"].concat()));
    std::fs::create_dir(&dir)?;
    let program = dir.join(EVIL);
    let mut rename = Command::new("objcopy");
    rename.arg("--redefine-sym").arg(format!("renamed_later={EVIL}")).arg(&plain).arg(&program);
    successful(rename)?;
    ensure!(program.as_os_str().as_bytes().contains(&0x1b), "the name has no escape");
    let recorded = bench.record(&[program.as_os_str()])?;
    recorded.is_sound(THEIR_CODE)?;
    let said = &recorded.output.stderr;
    ensure!(!said.contains(&0x1b), "an escape at the end of record:\n{}", String::from_utf8_lossy(said));
    // it must be reported, or the checks below would mean nothing; escapes themselves may be shown
    // in another form
    let function = "src=x onerror=alert(1)>";
    let (frames, samples) = (recorded.frames(function)?.len(), growth::touching(&recorded.incident)?.len());
    ensure!(frames * 2 >= samples, "{frames} of {samples} stacks have the function {function}");
    for format in ["text", "json", "html", "folded"] {
        let printed = recorded.report(format)?;
        ensure!(!printed.is_empty(), "nothing as {format}");
        let raw = printed.iter().find(|byte| matches!(byte, 0x1b | 0x07 | 0x9b));
        ensure!(raw.is_none(), "{raw:x?} in the report as {format}");
        let markup = printed.windows(4).any(|window| window == b"<img");
        ensure!(format != "html" || !markup, "<img in the report as {format}");
    }
    let profile = recorded.report("pprof")?;
    ensure!(profile.starts_with(&[0x1f, 0x8b]), "a pprof profile is gzip, this begins with {:x?}", profile.get(..2));
    Ok(())
}

#[test]
fn ten_thousand_mappings_cost_neither_the_code_nor_the_sums() -> anyhow::Result<()> {
    let Some(bench) = Bench::open("many mappings")? else { return Ok(()) };
    let program = bench.compile("hostile/mappings.c", "mappings", &[])?;
    let recorded = bench.record(&[program.as_os_str()])?;
    let truth = recorded.is_sound(THEIR_CODE)?;
    growth::within_five_percent(&recorded.incident, &truth)
}

#[test]
fn a_stack_from_the_heap_is_known_at_least_by_its_innermost_frame() -> anyhow::Result<()> {
    let Some(bench) = Bench::open("an alternative stack")? else { return Ok(()) };
    let program = bench.compile("hostile/alternate.c", "alternate", &[])?;
    let recorded = bench.record(&[program.as_os_str()])?;
    let truth = recorded.is_sound(THEIR_CODE)?;
    growth::within_five_percent(&recorded.incident, &truth)
}

#[test]
fn a_stack_pointer_into_nothing_is_no_loss_of_sums() -> anyhow::Result<()> {
    let Some(bench) = Bench::open("a lost stack")? else { return Ok(()) };
    let program = bench.compile("hostile/lost.c", "lost", &[])?;
    let recorded = bench.record(&[program.as_os_str()])?;
    recorded.is_sound(THEIR_CODE)?;
    let whole = |(path, _): &&(&Value, u64)| path["cut"].is_null() && growth::user_frames(path).count() > 0;
    let samples = growth::touching(&recorded.incident)?;
    // calls before and after have a stack; the touching call has none that can be unwound
    let bytes: u64 = samples.iter().filter(whole).map(|(_, weight)| weight).sum();
    ensure!(bytes <= 16 << 20, "{bytes} bytes have a whole stack, and the program had none");
    Ok(())
}

#[test]
fn a_library_rewritten_under_a_running_program_is_no_loss_of_sums() -> anyhow::Result<()> {
    let Some(bench) = Bench::open("a rewritten library")? else { return Ok(()) };
    let program = bench.compile("hostile/rewritten.c", "rewritten", &["-ldl"])?;
    let library = bench.library("copy.so", &[])?;
    let recorded = bench.record(&[program.as_os_str(), library.as_os_str()])?;
    ensure!(std::fs::metadata(&library)?.len() == 0, "the program did not cut its library");
    let truth = recorded.is_sound(THEIR_CODE)?;
    growth::within_five_percent(&recorded.incident, &truth)
}

#[test]
fn broken_unwind_information_is_no_loss_of_sums() -> anyhow::Result<()> {
    let Some(bench) = Bench::open("broken unwind information")? else { return Ok(()) };
    let plain = bench.compile("hostile/names.c", "plain", &[])?;
    let noise = bench.path("noise");
    // reproducible noise; lengths are rarely valid, but some of 200 are
    let mut state = 0x2545_f491_u64;
    for round in 0..4 {
        let bytes: Vec<u8> = (0..200 + round * 50)
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                if round % 2 == 0 { (state >> 56) as u8 } else { (state >> 56) as u8 & 0x1f }
            })
            .collect();
        std::fs::write(&noise, bytes)?;
        let broken = bench.path(format!("broken{round}"));
        let mut update = Command::new("objcopy");
        let section = |name: &str| format!("--update-section={name}={}", noise.display());
        update.arg(section(".eh_frame"));
        if round >= 2 {
            update.arg("--remove-section=.eh_frame_hdr");
        }
        update.arg(&plain).arg(&broken);
        successful(update)?;
        let recorded = bench.record(&[broken.as_os_str()])?;
        let truth = recorded.is_sound(THEIR_CODE).with_context(|| format!("round {round}"))?;
        growth::within_five_percent(&recorded.incident, &truth).with_context(|| format!("round {round}"))?;
    }
    Ok(())
}
