//! `cargo xtask bench`: is what memtrace reports true, and what does it cost, compared with the
//! tools people use today.

mod added;
mod cpus;
mod instructions;
mod oomkill;
mod page;

use std::fmt::{Display, Formatter};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use memtrace_harness::built::Built;
use memtrace_harness::checkout::{Checkout, Profile, has_btf, is_root};
use memtrace_harness::run::{output, say};
use memtrace_harness::{build, host, setup};
use memtrace_vm::Slots;
use serde_json::{Value, json};

pub use self::instructions::{InstructionCounts, InstructionExtent, count_instructions};
use self::page::PrintedChapter;

/// Document that `--markdown` writes by default.
const DOCUMENT: &str = "docs/benchmarks.md";

/// The benchmarks in the order of the document, each with the question it answers.
const BENCHES: &[(&str, &str)] = &[
    ("spikes", "does the curve show every spike, how high, from when to when"),
    ("peaks", "is the recorded peak of a cgroup the kernel's watermark"),
    ("kills", "is each of many kills at once reported once, and rightly"),
    ("reconcile", "does what is attributed and what is not add up, for long"),
    ("programs", "what does each eBPF program cost, beside an empty one on the same hook"),
    ("slowdown", "what does work lose while it is traced, beside other tracers"),
    ("agent", "what CPU and memory does the agent take, and does it count what it loses"),
    ("durable", "how soon after a kill is it on disk"),
    ("instructions", "which operations take how many instructions more, on each kernel, hook by hook (in machines)"),
    ("cpus", "is resident memory summed right over 8 and 64 processors (in machines)"),
    ("oomkill", "is every OOM kill reported, beside oomkill on a kernel where it runs (in a machine)"),
];

/// Arguments of `cargo xtask bench`.
#[derive(clap::Args)]
#[command(after_help = "\
Needs root, as the agent does; the tools it compares with are installed by apt when they are missing. Every result is a \
ratio or a difference inside one run. `cargo xtask bench --markdown` writes docs/benchmarks.md, and \
`cargo xtask bench reconcile --minutes 60 --markdown=docs/reconciliation.md` what an hour has to say.")]
pub struct Args {
    /// Only these benchmarks [default: all]
    #[arg(value_name = "NAME")]
    names: Vec<String>,
    /// Fewer rounds: under 5 minutes instead of 40
    #[arg(long)]
    quick: bool,
    /// Write what was found here, as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write the document, as it came out [default: docs/benchmarks.md, of all benchmarks]
    #[arg(long, value_name = "FILE", require_equals = true, num_args = 0..=1, default_missing_value = DOCUMENT)]
    markdown: Option<PathBuf>,
    /// How long `reconcile` runs [default: 3, quick 20 s]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    minutes: Option<u32>,
    /// Take the counts of `instructions` into tests/kernels/instructions.txt
    #[arg(long, conflicts_with = "quick")]
    bless: bool,
}

/// Runs the verb.
pub fn run(checkout: &Checkout, args: &Args) -> Result<()> {
    let chosen = choose(&args.names)?;
    if !args.names.is_empty() && args.markdown.as_deref() == Some(Path::new(DOCUMENT)) {
        bail!("{DOCUMENT} is of all benchmarks: --markdown=FILE writes some of them to another file");
    }
    if !is_root() {
        bail!("the agent needs root: sudo -E env PATH=$PATH cargo xtask bench");
    }
    if !has_btf() {
        bail!("this kernel publishes no BTF at /sys/kernel/btf/vmlinux, so memtrace cannot run here");
    }
    setup::bpf(checkout)?;
    setup::tests()?;
    setup::bench()?;
    let object = build::ebpf(checkout)?;
    let built = Built::programs(checkout, Profile::Release, &object)?;

    let begin = Instant::now();
    let (mut chapters, mut complaints) = (Vec::new(), Vec::new());
    for name in chosen {
        say(format_args!("bench {name}, after {} s", begin.elapsed().as_secs()));
        let found = measure(checkout, &built, name, args, &mut complaints)
            .unwrap_or_else(|error| PrintedChapter::broken(name, &error));
        say(format_args!("\n{}", page::chapter(&found)));
        chapters.push((name, found));
        if let Some(document) = &args.markdown {
            // written after each chapter, so that an interrupted run leaves what it measured
            write_document(&checkout.root.join(document), args, begin, chapters.iter().map(|(_, chapter)| chapter))?;
        }
    }
    if let Some(file) = &args.json {
        let all: serde_json::Map<String, Value> =
            chapters.iter().map(|(name, chapter)| ((*name).to_owned(), chapter.json.clone())).collect();
        let text = format!("{:#}\n", json!(all));
        std::fs::write(file, text).with_context(|| format!("failed to write {}", file.display()))?;
    }
    let chapters: Vec<PrintedChapter> = chapters.into_iter().map(|(_, chapter)| chapter).collect();
    if let Some(document) = &args.markdown {
        say(format_args!("wrote {}", document.display()));
    }
    if !complaints.is_empty() {
        bail!("worse than before:\n{}", complaints.join("\n"));
    }
    let broken: Vec<&str> = chapters.iter().filter(|c| c.is_broken).map(|c| c.title.as_str()).collect();
    if !broken.is_empty() {
        bail!("could not be measured: {}", broken.join(", "));
    }
    Ok(())
}

fn write_document<'a>(
    file: &Path,
    args: &Args,
    begin: Instant,
    chapters: impl Iterator<Item = &'a PrintedChapter>,
) -> Result<()> {
    let head = page::BenchRun {
        command: args.to_string(),
        date: host::today()?,
        machine: format!("{}, Linux {}", host::machine()?, host::kernel()?),
        seconds: begin.elapsed().as_secs(),
    };
    std::fs::write(file, page::document(&head, chapters)).with_context(|| format!("failed to write {}", file.display()))
}

/// The command as it was typed, except for `--json`.
impl Display for Args {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        write!(f, "cargo xtask bench")?;
        self.names.iter().try_for_each(|name| write!(f, " {name}"))?;
        self.minutes.iter().try_for_each(|minutes| write!(f, " --minutes {minutes}"))?;
        for (given, flag) in
            [(self.quick, " --quick"), (self.bless, " --bless"), (self.markdown.is_some(), " --markdown")]
        {
            if given {
                f.write_str(flag)?;
            }
        }
        let other = self.markdown.iter().filter(|file| file.as_path() != Path::new(DOCUMENT));
        other.into_iter().try_for_each(|file| write!(f, "={}", file.display()))
    }
}

fn choose(names: &[String]) -> Result<Vec<&'static str>> {
    let known = || BENCHES.iter().map(|(name, _)| *name).collect::<Vec<_>>();
    if let Some(unknown) = names.iter().find(|name| !known().contains(&name.as_str())) {
        let list: Vec<String> = BENCHES.iter().map(|(name, why)| format!("  {name}: {why}")).collect();
        bail!("no benchmark {unknown}; there are:\n{}", list.join("\n"));
    }
    Ok(known().into_iter().filter(|known| names.is_empty() || names.iter().any(|name| name == known)).collect())
}

/// Runs one benchmark, in machines of its own or on this one. Failures of the whole run go to
/// `complaints`.
fn measure(
    checkout: &Checkout,
    built: &Built,
    name: &str,
    args: &Args,
    complaints: &mut Vec<String>,
) -> Result<PrintedChapter> {
    match name {
        "instructions" => {
            setup::machines()?;
            let extent = if args.quick { InstructionExtent::Two } else { InstructionExtent::Whole };
            let found = count_instructions(checkout, built, &Slots::new(None), extent, args.bless)?;
            complaints.extend(found.failures);
            PrintedChapter::read(found.chapter)
        }
        "cpus" => {
            setup::machines()?;
            PrintedChapter::read(cpus::chapter(checkout, built, args.quick)?)
        }
        "oomkill" => {
            setup::machines()?;
            PrintedChapter::read(oomkill::chapter(checkout, built)?)
        }
        _ => native(built, name, args),
    }
}

/// Runs a benchmark on this machine.
fn native(built: &Built, name: &str, args: &Args) -> Result<PrintedChapter> {
    let mut bench = Command::new(built.program("bench")?);
    bench.arg(name).args(args.quick.then_some("--quick")).env("MEMTRACE_BIN", built.program("memtrace")?);
    if let Some(minutes) = args.minutes.filter(|_| name == "reconcile") {
        bench.args(["--minutes", &minutes.to_string()]);
    }
    bench.stdin(Stdio::null()).stderr(Stdio::inherit());
    let printed = output(&mut bench)?;
    PrintedChapter::read(
        serde_json::from_str(&printed).with_context(|| format!("bench {name} printed something else"))?,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_document_says_how_it_was_asked_for() {
        use clap::Parser;
        #[derive(Parser)]
        struct Line {
            #[command(flatten)]
            args: Args,
        }
        let typed = |line: &str| Line::try_parse_from(line.split(' ').skip(2)).unwrap().args.to_string();
        for line in [
            "cargo xtask bench --quick --markdown",
            "cargo xtask bench --bless --markdown",
            "cargo xtask bench reconcile --minutes 60 --markdown=a.md",
        ] {
            assert_eq!(typed(line), line);
        }
    }

    #[test]
    fn benches_are_chosen_by_name() {
        assert_eq!(choose(&[]).unwrap().len(), BENCHES.len());
        assert!(choose(&["nothing".to_owned()]).is_err());
    }
}
