//! `cargo xtask truth`: records programs that know which of their functions touched how many bytes,
//! and compares that with what memtrace attributed.

mod compare;
mod entry;
mod recording;
mod table;
mod workloads;

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use self::compare::Agreement;
use self::recording::{ReportedRecording, Truth};
use self::table::{TruthRow, TruthRun};
use self::workloads::{WORKLOADS, Workload, WorkloadBuilder};
use memtrace_harness::built::Built;
use memtrace_harness::checkout::{Checkout, Profile, has_btf, is_root};
use memtrace_harness::run::{output, say, shown};
use memtrace_harness::{build, host, setup};

/// The document that `--markdown` writes.
const DOCUMENT: &str = "docs/truth.md";

/// Workloads compared with perf: (name, divisor of their bytes, pause between pages in
/// microseconds). They are slowed down because perf copies 32 KiB at each fault; eight threads at
/// once need more.
const COMPARED: [(&str, &str, &str); 5] = [
    ("nested", "16", "150"),
    ("recursive", "16", "150"),
    ("exceptions", "16", "150"),
    ("generic", "16", "150"),
    ("threads", "32", "2000"),
];

/// Number of stacks that must have been compared.
const LEAST_COMPARED: usize = 1000;

/// Options for as many stacks as possible: the smallest sample intervals, and no budget.
const FINEST: [&str; 6] = ["--quantum", "16K", "--sample", "16K", "--stack-budget", "100%"];

/// Arguments of `cargo xtask truth`.
#[derive(clap::Args)]
#[command(after_help = "\
`cargo xtask truth --compare --markdown` writes docs/truth.md. Needs root, as `memtrace record` does; what the \
workloads are built with is installed by apt when it is missing.")]
pub struct Args {
    /// Only these workloads [default: all]
    #[arg(value_name = "NAME")]
    names: Vec<String>,
    /// Also compare stacks frame by frame with those of perf's DWARF unwinder
    #[arg(long)]
    compare: bool,
    /// Write docs/truth.md, as it came out
    #[arg(long, conflicts_with_all = ["names", "dev"])]
    markdown: bool,
    /// Write the rows here, as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// The build that is quick to make, not the one that ships
    #[arg(long)]
    dev: bool,
    /// One more argument for `memtrace record`; may be repeated
    #[arg(long = "option", value_name = "ARG", allow_hyphen_values = true, conflicts_with = "markdown")]
    options: Vec<String>,
}

/// Runs the verb.
pub fn run(checkout: &Checkout, args: &Args) -> Result<()> {
    let chosen = choose(&args.names)?;
    if !is_root() {
        bail!("`memtrace record` needs root: sudo -E env PATH=$PATH cargo xtask truth");
    }
    if !has_btf() {
        bail!("this kernel publishes no BTF at /sys/kernel/btf/vmlinux, so memtrace cannot run here");
    }
    setup::bpf(checkout)?;
    setup::truth()?;
    let profile = Profile::of(!args.dev);
    let object = build::ebpf(checkout)?;
    let built = Built::programs(checkout, profile, &object)?;
    let builder = WorkloadBuilder::open(checkout)?;
    let mut unbuilt = BTreeMap::new();
    for workload in &chosen {
        if let Err(error) = workload.build(&builder) {
            say(format_args!("{error:#}"));
            unbuilt.insert(workload.name, format!("{error:#}"));
        }
    }
    let tracer = Tracer { memtrace: built.program("memtrace")?.to_path_buf(), options: &args.options };

    let mut rows = Vec::new();
    for workload in &chosen {
        let measured = match unbuilt.remove(workload.name) {
            Some(why) => Err(anyhow::anyhow!(why)),
            None => measure(&tracer, &builder, workload),
        };
        rows.extend(measured.unwrap_or_else(|error| vec![table::broken(workload.name, format!("{error:#}"))]));
    }
    let (comparison, compared) =
        if args.compare { compare_all(&tracer, &builder, &chosen, &mut rows) } else { (None, None) };

    let _ = write!(std::io::stdout(), "{}", table::render(&rows));
    if let Some(text) = &comparison {
        let _ = write!(std::io::stdout(), "\n{text}");
    }
    if let Some(file) = &args.json {
        let text = format!("{:#}\n", table::to_json(&rows));
        std::fs::write(file, text).with_context(|| format!("failed to write {}", file.display()))?;
    }
    if args.markdown {
        let file = checkout.root.join(DOCUMENT);
        let document = table::document(&about(args)?, &rows, &chosen, comparison.as_deref());
        std::fs::write(&file, document).with_context(|| format!("failed to write {}", file.display()))?;
        say(format_args!("wrote {DOCUMENT}"));
    }
    verdict(&rows, compared)
}

fn choose(names: &[String]) -> Result<Vec<&'static Workload>> {
    if let Some(unknown) = names.iter().find(|name| WORKLOADS.iter().all(|workload| workload.name != *name)) {
        let known: Vec<&str> = WORKLOADS.iter().map(|workload| workload.name).collect();
        bail!("no workload {unknown}; there are {}", known.join(", "));
    }
    let wanted = |workload: &&Workload| names.is_empty() || names.iter().any(|name| name == workload.name);
    Ok(WORKLOADS.iter().filter(wanted).collect())
}

fn verdict(rows: &[TruthRow], compared: Option<usize>) -> Result<()> {
    let missed: Vec<String> = rows
        .iter()
        .filter(|row| row.fails())
        .map(|row| format!("{} {}: {}", row.workload, row.function, row.misses.join("; ")))
        .collect();
    if !missed.is_empty() {
        bail!("{} of {} rows miss:\n  {}", missed.len(), rows.len(), missed.join("\n  "));
    }
    match compared {
        Some(compared) if compared < LEAST_COMPARED => {
            bail!("only {compared} stacks could be compared, {LEAST_COMPARED} at least are wanted")
        }
        _ => Ok(()),
    }
}

/// The memtrace binary that records.
struct Tracer<'a> {
    memtrace: PathBuf,
    options: &'a [String],
}

impl Tracer<'_> {
    /// Records a command. Returns what the command printed, and the recording.
    fn record(
        &self,
        more: &[&str],
        file: &Path,
        command: &[PathBuf],
        env: &[(&str, &str)],
    ) -> Result<(String, ReportedRecording)> {
        let mut record = Command::new(&self.memtrace);
        record.args(["record", "--quiet"]).args(self.options).args(more).arg("-o").arg(file).arg("--").args(command);
        record.envs(env.iter().copied()).stdin(Stdio::null()).stderr(Stdio::inherit());
        // node writes a log into its working directory
        record.current_dir(file.parent().unwrap_or(Path::new(".")));
        // record as root, whoever called sudo: the files are below target/
        record.env_remove("SUDO_UID").env_remove("SUDO_GID");
        say(format_args!("running {}", shown(&record)));
        let printed = output(&mut record)?;
        let mut report = Command::new(&self.memtrace);
        report.arg("report").arg(file).args(["--format", "json"]);
        let report = output(&mut report)?;
        let report = serde_json::from_str(&report).context("`memtrace report --format json` printed something else")?;
        Ok((printed, ReportedRecording::of(&report)?))
    }
}

fn measure(tracer: &Tracer<'_>, builder: &WorkloadBuilder<'_>, workload: &Workload) -> Result<Vec<TruthRow>> {
    let file = builder.out.join(format!("{}.memtrace", workload.name));
    let (printed, recording) = tracer.record(&[], &file, &workload.command(builder)?, workload.env)?;
    let truth = Truth::of(&printed)?;
    // just-in-time compilers write the names of their code there, for profilers
    for pid in recording.paths.iter().map(|path| path.pid).collect::<BTreeSet<u64>>() {
        let _ = std::fs::remove_file(format!("/tmp/perf-{pid}.map"));
    }
    let mut entries = BTreeMap::new();
    let mut entry = |module: &str| {
        let read = || entry::offset(&std::fs::read(module).ok()?);
        *entries.entry(module.to_owned()).or_insert_with(read)
    };
    let sums = recording.found(&truth, &mut entry);
    for (why, bytes) in &recording.unattributed {
        say(format_args!("{}: {} KiB without a stack: {why}", workload.name, bytes >> 10));
    }
    if recording.thinned > 0 {
        say(format_args!("{}: {} stacks left out by the budget", workload.name, recording.thinned));
    }
    Ok(table::rows(workload, &truth, &recording, &sums))
}

/// Compares the chosen workloads with perf: the section of the document and the number of stacks,
/// or `None` if none of them was chosen. A workload that fails becomes a row.
fn compare_all(
    tracer: &Tracer<'_>,
    builder: &WorkloadBuilder<'_>,
    chosen: &[&'static Workload],
    rows: &mut Vec<TruthRow>,
) -> (Option<String>, Option<usize>) {
    let mut agreements = Vec::new();
    for (name, scale, pace) in COMPARED {
        let Some(workload) = chosen.iter().find(|workload| workload.name == name) else { continue };
        match compare_one(tracer, builder, workload, &[("TRUTH_SCALE", scale), ("TRUTH_PACE_US", pace)]) {
            Ok(agreement) => agreements.push((name, agreement)),
            Err(error) => rows.push(table::broken(name, format!("not compared with perf: {error:#}"))),
        }
    }
    if agreements.is_empty() {
        return (None, None);
    }
    let (text, compared) = compare::render(&agreements);
    (Some(text), Some(compared))
}

/// Records a workload that runs under `perf record`, and compares the stacks of both.
fn compare_one(
    tracer: &Tracer<'_>,
    builder: &WorkloadBuilder<'_>,
    workload: &Workload,
    env: &[(&str, &str)],
) -> Result<Agreement> {
    let file = builder.out.join(format!("{}.compared.memtrace", workload.name));
    let data = builder.out.join("perf.data");
    let perf = ["perf", "record", "-q", "-m", "4096", "-e", "page-faults", "-c", "1", "-k", "CLOCK_BOOTTIME"];
    let perf = perf.into_iter().chain(["--call-graph", "dwarf,32768", "-o"]).map(PathBuf::from);
    let command: Vec<PathBuf> = perf.chain([data.clone(), "--".into()]).chain(workload.command(builder)?).collect();
    let (_, recording) = tracer.record(&FINEST, &file, &command, env)?;
    let mut script = Command::new("perf");
    script.arg("script").args(compare::SCRIPT).arg("-i").arg(&data).stderr(Stdio::null());
    say(format_args!("running {}", shown(&script)));
    let printed = script.output().context("failed to start perf script")?;
    let theirs = compare::stacks(&String::from_utf8_lossy(&printed.stdout));
    std::fs::remove_file(&data).with_context(|| format!("failed to remove {}", data.display()))?;
    if recording.joined > 0 {
        say(format_args!("{}: {} samples were joined, and have the time of others", workload.name, recording.joined));
    }
    Ok(compare::compare(&recording, &theirs))
}

/// Where, when and how this run was made.
fn about(args: &Args) -> Result<TruthRun> {
    let compare = if args.compare { " --compare" } else { "" };
    Ok(TruthRun {
        machine: host::machine()?,
        kernel: host::kernel()?,
        date: host::today()?,
        command: format!("cargo xtask truth{compare} --markdown"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn workloads_are_chosen_by_name() {
        assert_eq!(choose(&[]).unwrap().len(), WORKLOADS.len());
        assert_eq!(choose(&["go".to_owned()]).unwrap().len(), 1);
        assert!(choose(&["nothing".to_owned()]).is_err_and(|error| error.to_string().contains("nested")));
    }

    #[test]
    fn what_is_compared_is_there() {
        let known = |name: &str| WORKLOADS.iter().any(|workload| workload.name == name && workload.native);
        assert!(COMPARED.iter().all(|(name, ..)| known(name)));
    }

    #[test]
    fn a_miss_and_too_few_stacks_fail() {
        assert!(verdict(&[], None).is_ok());
        assert!(verdict(&[table::broken("x", "y".to_owned())], None).is_err());
        assert!(verdict(&[], Some(LEAST_COMPARED - 1)).is_err());
        assert!(verdict(&[], Some(LEAST_COMPARED)).is_ok());
    }
}
