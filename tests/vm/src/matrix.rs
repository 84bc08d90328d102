//! `cargo xtask vm`: the tests that need a kernel, on the kernels that memtrace is for, in emulated machines.

use std::io::Write;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use memtrace_harness::built::Built;
use memtrace_harness::checkout::{Checkout, Profile};
use memtrace_harness::libtest::{SecondTry, Tally};
use memtrace_harness::run::say;
use memtrace_harness::{build, host, setup};
use serde_json::Value;

use crate::apt::Apt;
use crate::kernels::{self, BootableKernel, CgroupVersion, KERNELS, Kernel};
use crate::machine::{self, EmulatedMachine, MachineOutcome, MachineParts, Processors};
use crate::payload;
use crate::selection::Selection;
use crate::slots::{Slots, boot};
use crate::snapshot::{Count, CountSnapshot, MeasuredCounts};
use crate::table::{self, HookPlan, KernelRow};
use crate::verifier::{self, VerifierCost};

/// Arguments of `cargo xtask vm`.
#[derive(clap::Args, Clone)]
pub struct Args {
    /// Kernels by name, all of them when none is given: 5.10-old 5.10 6.1 6.12 sid backports
    kernels: Vec<String>,
    /// Only machines with the memory controller on this version of cgroups
    #[arg(long)]
    cgroup: Option<CgroupVersion>,
    /// Memory of a machine
    #[arg(long, default_value = "1G", value_parser = mebibytes)]
    memory: u32,
    /// Only tests whose name contains this
    #[arg(long)]
    filter: Option<String>,
    /// Take the verifier's counts into tests/kernels/verifier.txt and, without --filter, the table into the README
    #[arg(long)]
    bless: bool,
    /// Machines at a time, as many as there are processors unless given
    #[arg(long)]
    jobs: Option<usize>,
    /// Keep the disk each machine's tests wrote to, as target/vm/MACHINE.img
    #[arg(long)]
    keep: bool,
}

impl Args {
    /// All machines of the matrix, for `cargo xtask test`.
    pub fn whole(filter: Option<String>, bless: bool) -> Self {
        let (kernels, cgroup, jobs) = (Vec::new(), None, None);
        Self { kernels, cgroup, memory: 1024, filter, bless, jobs, keep: false }
    }
}

/// Result of one machine, or of a kernel that could not be fetched.
pub struct MachineReport {
    /// Name of the machine, or of the kernel.
    pub name: String,
    /// Results of its tests; everything else that went wrong counts as failures.
    pub tally: Tally,
    /// Failed tests and everything else that went wrong.
    pub failures: Vec<String>,
    /// What could not run on it or is left out, and why.
    pub remarks: Vec<String>,
    /// Tests that were run once more.
    pub second_tries: Vec<SecondTry>,
    /// Run time by the host's clock.
    pub took: Duration,
    row: Option<KernelRow>,
    measured: Option<MeasuredCounts<VerifierCost>>,
    notes: Vec<String>,
}

/// Runs the verb.
pub fn run(checkout: &Checkout, args: &Args) -> Result<()> {
    choose(args)?;
    setup::bpf(checkout)?;
    setup::machines()?;
    let object = build::ebpf(checkout)?;
    let built = Built::with_tests(checkout, Profile::Dev, &object)?;
    let Some(reports) = run_matrix(checkout, &built, args, Selection::All, &Slots::new(args.jobs))? else {
        bail!("no test of the machines has `{}` in its name", args.filter.as_deref().unwrap_or(""));
    };
    say(format_args!("summary"));
    let mut total = Tally::default();
    for report in &reports {
        say(format_args!("  {}: {} in {} s", report.name, report.tally, report.took.as_secs()));
        for what in &report.failures {
            say(format_args!("    FAILED {what}"));
        }
        for remark in &report.remarks {
            say(format_args!("    {remark}"));
        }
        for second_try in &report.second_tries {
            say(format_args!("    {second_try}"));
        }
        total = total.plus(report.tally);
    }
    let _ = writeln!(std::io::stdout(), "memtrace in machines: {total}");
    let bad: Vec<&str> = reports.iter().filter(|report| report.tally.failed > 0).map(|r| r.name.as_str()).collect();
    if !bad.is_empty() {
        bail!("failures on {}; consoles are in {}", bad.join(", "), checkout.target.join("vm").display());
    }
    Ok(())
}

/// Boots the chosen machines and runs their tests. `None` if the filter matches no test.
pub fn run_matrix(
    checkout: &Checkout,
    built: &Built,
    args: &Args,
    selection: Selection,
    slots: &Slots,
) -> Result<Option<Vec<MachineReport>>> {
    if std::env::consts::ARCH != "x86_64" {
        bail!("the machines are x86_64, and run what is built for this one");
    }
    let chosen = choose(args)?;
    let dir = checkout.target.join("vm");
    std::fs::create_dir_all(&dir).with_context(|| format!("failed to create {}", dir.display()))?;
    if let Some(filter) = &args.filter
        && !payload::has_test(built, filter)?
    {
        return Ok(None);
    }
    let mut reports = Vec::new();
    let machines = fetch(&chosen, &dir, &mut reports);
    if let (true, Some(first)) = (machines.is_empty(), reports.first()) {
        bail!("no kernel to boot: {}", first.failures.join("; "));
    }
    let kernels: Vec<&BootableKernel> = machines.iter().map(|machine| &machine.ready).collect();
    machine::make_disks(&dir)?;
    let initramfs = payload::pack(checkout, built, &dir, &kernels, &[])?;
    let append = args.filter.as_ref().map(|filter| format!("memtrace.filter={filter}")).unwrap_or_default();
    let (memory, processors, keep) = (args.memory, Processors::Nodes, args.keep);
    let parts = MachineParts { dir, initramfs, memory, processors, append, keep, selection };
    let outcomes = boot(&machines, &parts, slots);

    let path = checkout.root.join(VerifierCost::FILE);
    let text = std::fs::read_to_string(&path).unwrap_or_default();
    let mut snapshot = CountSnapshot::read(&text)?;
    for (machine, outcome) in machines.iter().zip(outcomes) {
        let against = (!args.bless).then_some(&snapshot);
        reports.push(report(machine, outcome, &parts, against)?);
    }
    let rows: Vec<KernelRow> = reports.iter().filter_map(|report| report.row.clone()).collect();
    let _ = writeln!(std::io::stdout(), "{}", table::render(&rows));
    let costs = reports.iter().filter_map(|report| Some((report.name.as_str(), &report.measured.as_ref()?.counts)));
    let costs = verifier::render(&costs.collect::<Vec<_>>());
    let _ = writeln!(std::io::stdout(), "verifier instructions / bytes of machine code\n{costs}\n");
    for rare in selection.rare() {
        say(format_args!("not in all machines: {rare} (--all)"));
    }
    for (test, why) in payload::LEFT_OUT {
        say(format_args!("not in the machines: {test}, {why}"));
    }
    for note in reports.iter().flat_map(|report| &report.notes) {
        say(format_args!("{note}"));
    }
    if args.bless {
        for (machine, report) in machines.iter().filter_map(|m| Some((m, reports.iter().find(|r| r.name == m.name())?)))
        {
            if let Some(measured) = &report.measured {
                snapshot.bless(machine.kernel, &machine.cgroup.to_string(), measured.clone());
            }
        }
        bless(checkout, &snapshot, &rows, args.filter.is_some())?;
    }
    Ok(Some(reports))
}

/// Fetches all kernels of the matrix ahead of time. Failures are reported later, when machines
/// boot.
pub fn prefetch(checkout: &Checkout) -> Result<()> {
    let all: Vec<_> = KERNELS.iter().map(|kernel| (kernel, kernel.cgroups.to_vec())).collect();
    let dir = checkout.target.join("vm");
    std::fs::create_dir_all(&dir).with_context(|| format!("failed to create {}", dir.display()))?;
    fetch(&all, &dir, &mut Vec::new());
    Ok(())
}

/// Serializes fetching: the cache directories are shared.
static FETCHING: Mutex<()> = Mutex::new(());

/// Makes the kernels ready to boot. One that cannot be fetched becomes a failed report.
pub(crate) fn fetch(
    chosen: &[(&'static Kernel, Vec<CgroupVersion>)],
    dir: &Path,
    reports: &mut Vec<MachineReport>,
) -> Vec<EmulatedMachine> {
    let _alone = FETCHING.lock().unwrap_or_else(PoisonError::into_inner);
    let mut suites: Vec<&str> = KERNELS.iter().flat_map(|kernel| kernel.suites.iter().copied()).collect();
    suites.sort_unstable();
    suites.dedup();
    let apt = Apt::open(&dir.join("apt"), &suites);
    let mut machines = Vec::new();
    for (kernel, cgroups) in chosen {
        match kernels::fetch(kernel, &apt, &dir.join("kernels")) {
            Ok(ready) => machines.extend(cgroups.iter().map(|cgroup| EmulatedMachine {
                kernel: kernel.name,
                cgroup: *cgroup,
                ready: ready.clone(),
            })),
            Err(error) => {
                reports.push(MachineReport::failed(kernel.name, format!("this kernel could not be had: {error:#}")))
            }
        }
    }
    machines
}

/// Joins what the console said with the files that the machine left behind.
fn report(
    machine: &EmulatedMachine,
    outcome: Result<MachineOutcome>,
    parts: &MachineParts,
    against: Option<&CountSnapshot<VerifierCost>>,
) -> Result<MachineReport> {
    let name = machine.name();
    let MachineOutcome { said, took, own } = match outcome {
        Ok(outcome) => outcome,
        Err(error) => return Ok(MachineReport::failed(&name, format!("{error:#}"))),
    };
    say(format_args!("{name}: {} s, {} s by its own clock", took.as_secs(), own.as_secs()));
    let mut report = MachineReport { tally: said.tally, took, ..MachineReport::named(&name) };
    report.remarks.extend(said.not_run.iter().map(|what| format!("not run: {what}")));
    let left_out = parts.selection.left_out(machine.kernel, machine.cgroup);
    let left_out: Vec<&str> = left_out.iter().map(|rare| rare.executable).collect();
    if !left_out.is_empty() {
        report.remarks.push(format!("left out unless --all: {}", left_out.join(", ")));
    }
    report.second_tries = said.second_tries;
    report.failures.extend(said.failed);
    report.failures.extend(said.troubles);
    report.failures.extend((!said.tail.is_empty()).then(|| format!("the console ends with\n{}", said.tail.join("\n"))));

    let out = machine.out(parts);
    let read = |file: &str| std::fs::read_to_string(out.join(file)).ok();
    let doctor: Option<Value> = read("doctor.json").and_then(|text| serde_json::from_str(&text).ok());
    let version = machine.ready.version.clone();
    if let (Some(doctor), Some(log)) = (&doctor, read("verifier.log")) {
        let measured = MeasuredCounts { version: version.clone(), counts: verifier::costs(&log, doctor) };
        if let Some(snapshot) = against {
            let compared = snapshot.compare(machine.kernel, &machine.cgroup.to_string(), &measured, |_| true);
            report.notes.extend(compared.note.map(|note| format!("{name}: {note}")));
            report.tally.failed += compared.worse.len() as u64;
            report.failures.extend(compared.worse);
        }
        report.measured = Some(measured);
    } else if report.failures.is_empty() {
        report.tally.failed += 1;
        report.failures.push("doctor and the verifier's log left nothing behind".to_owned());
    }
    report.row = Some(KernelRow {
        kernel: machine.kernel.to_owned(),
        version,
        cgroup: machine.cgroup.to_string(),
        plan: HookPlan::of(&doctor.unwrap_or_default()),
        tally: report.tally,
        cost: report.measured.as_ref().map(|measured| verifier::sum(&measured.counts)),
        date: host::today()?,
    });
    Ok(report)
}

/// Writes the verifier's counts and, unless `filtered`, the table of kernels into the repository.
fn bless(
    checkout: &Checkout,
    snapshot: &CountSnapshot<VerifierCost>,
    rows: &[KernelRow],
    filtered: bool,
) -> Result<()> {
    let write = |path: &Path, text: &str| {
        std::fs::write(path, text).with_context(|| format!("failed to write {}", path.display()))
    };
    write(&checkout.root.join(VerifierCost::FILE), &snapshot.text())?;
    say(format_args!("wrote {}", VerifierCost::FILE));
    if filtered {
        say(format_args!("the table of {} stays: not all tests ran", table::FILE));
        return Ok(());
    }
    let path = checkout.root.join(table::FILE);
    let text = std::fs::read_to_string(&path).with_context(|| format!("failed to read {}", path.display()))?;
    write(&path, &table::bless(&text, rows, &KERNELS.map(|kernel| kernel.name))?)?;
    say(format_args!("wrote the table of {}", table::FILE));
    Ok(())
}

impl MachineReport {
    fn named(name: &str) -> Self {
        let (tally, took) = (Tally::default(), Duration::ZERO);
        let (failures, remarks, second_tries, notes) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        Self { name: name.to_owned(), tally, failures, remarks, second_tries, took, row: None, measured: None, notes }
    }

    fn failed(name: &str, why: String) -> Self {
        let tally = Tally { failed: 1, ..Tally::default() };
        Self { tally, failures: vec![why], ..Self::named(name) }
    }
}

fn choose(args: &Args) -> Result<Vec<(&'static Kernel, Vec<CgroupVersion>)>> {
    let known = || KERNELS.iter().map(|kernel| kernel.name).collect::<Vec<_>>().join(", ");
    if let Some(name) = args.kernels.iter().find(|name| KERNELS.iter().all(|kernel| kernel.name != name.as_str())) {
        bail!("no kernel `{name}` in the matrix; there are: {}", known());
    }
    let wanted = |kernel: &&Kernel| args.kernels.is_empty() || args.kernels.iter().any(|name| name == kernel.name);
    let cgroups = |kernel: &Kernel| {
        kernel
            .cgroups
            .iter()
            .copied()
            .filter(|cgroup| args.cgroup.is_none_or(|only| only == *cgroup))
            .collect::<Vec<_>>()
    };
    let chosen: Vec<(&Kernel, Vec<CgroupVersion>)> =
        KERNELS.iter().filter(wanted).map(|kernel| (kernel, cgroups(kernel))).filter(|(_, c)| !c.is_empty()).collect();
    if chosen.is_empty() {
        bail!("none of these kernels has a memory controller on that version of cgroups");
    }
    Ok(chosen)
}

fn mebibytes(text: &str) -> Result<u32, String> {
    let (digits, factor) = match (text.strip_suffix('G'), text.strip_suffix('M')) {
        (Some(digits), _) => (digits, 1024),
        (_, Some(digits)) => (digits, 1),
        _ => return Err("say it like 1G or 1536M".to_owned()),
    };
    let amount = digits.parse::<u32>().ok().and_then(|amount| amount.checked_mul(factor));
    amount.filter(|mib| *mib >= 256).ok_or_else(|| "at least 256M".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(kernels: &[&str], cgroup: Option<CgroupVersion>) -> Result<Vec<String>> {
        let kernels = kernels.iter().map(|name| (*name).to_owned()).collect();
        let chosen = choose(&Args { kernels, cgroup, ..Args::whole(None, false) })?;
        let names = chosen.iter().flat_map(|(kernel, on)| on.iter().map(move |on| format!("{}-{on}", kernel.name)));
        Ok(names.collect())
    }

    #[test]
    fn machines_are_chosen_by_kernel_and_cgroup_version() {
        assert_eq!(chosen(&["6.1", "5.10"], None).unwrap(), ["5.10-v1", "5.10-v2", "6.1-v1", "6.1-v2"]);
        assert_eq!(chosen(&["6.1", "6.12"], Some(CgroupVersion::V1)).unwrap(), ["6.1-v1"]);
        assert!(chosen(&[], None).unwrap().len() > 5);
        assert!(chosen(&["6.12"], Some(CgroupVersion::V1)).is_err());
        let error = chosen(&["4.4"], None).unwrap_err().to_string();
        assert!(error.contains("`4.4`") && error.contains("backports"), "{error}");
    }

    #[test]
    fn memory_is_said_in_mebibytes_or_gibibytes() {
        assert_eq!((mebibytes("1G"), mebibytes("1536M")), (Ok(1024), Ok(1536)));
        assert!(mebibytes("1").is_err() && mebibytes("16M").is_err() && mebibytes("xG").is_err());
    }
}
