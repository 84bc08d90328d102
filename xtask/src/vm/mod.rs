//! `cargo xtask vm`: the tests that need a kernel, on the kernels that memtrace is for, in emulated machines.

mod added;
mod apt;
mod bench;
mod console;
pub(crate) mod cpus;
pub(crate) mod instructions;
mod kernels;
mod machine;
pub(crate) mod oomkill;
mod payload;
pub(crate) mod selection;
mod snapshot;
mod table;
mod verifier;
mod watch;

use std::collections::BTreeSet;
use std::io::Write;
use std::path::Path;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use self::apt::Apt;
use self::kernels::{Cgroup, KERNELS, Kernel, Ready};
use self::machine::{Machine, Outcome, Parts, Processors};
use self::selection::Selection;
use self::snapshot::{Count, Measured, Snapshot};
use self::table::{Plan, Row};
use self::verifier::Cost;
use crate::built::Built;
use crate::libtest::{SecondTry, Tally};
use crate::place::{Place, Profile};
use crate::run::say;
use crate::{build, host, setup};

/// Arguments of `cargo xtask vm`.
#[derive(clap::Args, Clone)]
pub(crate) struct Args {
    /// Kernels by name, all of them when none is given: 5.10-old 5.10 6.1 6.12 sid backports
    kernels: Vec<String>,
    /// Only machines with the memory controller on this version of cgroups
    #[arg(long)]
    cgroup: Option<Cgroup>,
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
    /// All machines of the matrix, as `cargo xtask test` boots them.
    pub(crate) fn whole(filter: Option<String>, bless: bool) -> Self {
        let (kernels, cgroup, jobs) = (Vec::new(), None, None);
        Self { kernels, cgroup, memory: 1024, filter, bless, jobs, keep: false }
    }
}

/// One machine, or a kernel that could not be had, and what came of it.
pub(crate) struct Report {
    /// Its name.
    pub(crate) name: String,
    /// Its tests, with what else went wrong counted as failures.
    pub(crate) tally: Tally,
    /// Tests that failed and what else went wrong.
    pub(crate) failures: Vec<String>,
    /// What could not run on it or is left out, and why.
    pub(crate) remarks: Vec<String>,
    /// What ran once more.
    pub(crate) second_tries: Vec<SecondTry>,
    /// How long it took.
    pub(crate) took: Duration,
    row: Option<Row>,
    measured: Option<Measured<Cost>>,
    notes: Vec<String>,
}

/// Runs the verb.
pub(crate) fn run(place: &Place, args: &Args) -> Result<()> {
    choose(args)?;
    setup::bpf(place)?;
    setup::machines()?;
    let object = build::ebpf(place)?;
    let built = Built::with_tests(place, Profile::Dev, &object)?;
    let Some(reports) = matrix(place, &built, args, Selection::All, &Slots::new(args.jobs))? else {
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
        bail!("failures on {}; consoles are in {}", bad.join(", "), place.target.join("vm").display());
    }
    Ok(())
}

/// Boots the machines asked for and runs their tests; `None` when none of the tests is asked for.
pub(crate) fn matrix(
    place: &Place,
    built: &Built,
    args: &Args,
    selection: Selection,
    slots: &Slots,
) -> Result<Option<Vec<Report>>> {
    if std::env::consts::ARCH != "x86_64" {
        bail!("the machines are x86_64, and run what is built for this one");
    }
    let chosen = choose(args)?;
    let dir = place.target.join("vm");
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
    let kernels: Vec<&Ready> = machines.iter().map(|machine| &machine.ready).collect();
    machine::make_disks(&dir)?;
    let initramfs = payload::pack(place, built, &dir, &kernels, &[])?;
    let append = args.filter.as_ref().map(|filter| format!("memtrace.filter={filter}")).unwrap_or_default();
    let (memory, processors, keep) = (args.memory, Processors::Nodes, args.keep);
    let parts = Parts { dir, initramfs, memory, processors, append, keep, selection };
    let outcomes = boot(&machines, &parts, slots);

    let path = place.root.join(Cost::FILE);
    let text = std::fs::read_to_string(&path).unwrap_or_default();
    let mut snapshot = Snapshot::read(&text)?;
    for (machine, outcome) in machines.iter().zip(outcomes) {
        let against = (!args.bless).then_some(&snapshot);
        reports.push(report(machine, outcome, &parts, against)?);
    }
    let rows: Vec<Row> = reports.iter().filter_map(|report| report.row.clone()).collect();
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
        bless(place, &snapshot, &rows, args.filter.is_some())?;
    }
    Ok(Some(reports))
}

/// Fetches all kernels of the matrix, so that they are there when machines are to boot. What cannot be had is said then.
pub(crate) fn prefetch(place: &Place) -> Result<()> {
    let all: Vec<_> = KERNELS.iter().map(|kernel| (kernel, kernel.cgroups.to_vec())).collect();
    let dir = place.target.join("vm");
    std::fs::create_dir_all(&dir).with_context(|| format!("failed to create {}", dir.display()))?;
    fetch(&all, &dir, &mut Vec::new());
    Ok(())
}

/// One at a time gets kernels: the directories are the same for all.
static FETCHING: Mutex<()> = Mutex::new(());

/// Makes the kernels ready; one that cannot be had is a failure with its name.
fn fetch(chosen: &[(&'static Kernel, Vec<Cgroup>)], dir: &Path, reports: &mut Vec<Report>) -> Vec<Machine> {
    let _alone = FETCHING.lock().unwrap_or_else(PoisonError::into_inner);
    let mut suites: Vec<&str> = KERNELS.iter().flat_map(|kernel| kernel.suites.iter().copied()).collect();
    suites.sort_unstable();
    suites.dedup();
    let apt = Apt::open(&dir.join("apt"), &suites);
    let mut machines = Vec::new();
    for (kernel, cgroups) in chosen {
        match kernels::fetch(kernel, &apt, &dir.join("kernels")) {
            Ok(ready) => machines.extend(cgroups.iter().map(|cgroup| Machine {
                kernel: kernel.name,
                cgroup: *cgroup,
                ready: ready.clone(),
            })),
            Err(error) => reports.push(Report::failed(kernel.name, format!("this kernel could not be had: {error:#}"))),
        }
    }
    machines
}

/// Joins what the console said with the files that the machine left.
fn report(
    machine: &Machine,
    outcome: Result<Outcome>,
    parts: &Parts,
    against: Option<&Snapshot<Cost>>,
) -> Result<Report> {
    let name = machine.name();
    let Outcome { said, took, own } = match outcome {
        Ok(outcome) => outcome,
        Err(error) => return Ok(Report::failed(&name, format!("{error:#}"))),
    };
    say(format_args!("{name}: {} s, {} s by its own clock", took.as_secs(), own.as_secs()));
    let mut report = Report { tally: said.tally, took, ..Report::named(&name) };
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
        let measured = Measured { version: version.clone(), counts: verifier::costs(&log, doctor) };
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
    report.row = Some(Row {
        kernel: machine.kernel.to_owned(),
        version,
        cgroup: machine.cgroup.to_string(),
        plan: Plan::of(&doctor.unwrap_or_default()),
        tally: report.tally,
        cost: report.measured.as_ref().map(|measured| verifier::sum(&measured.counts)),
        date: host::today()?,
    });
    Ok(report)
}

/// Writes what was measured into the tree.
fn bless(place: &Place, snapshot: &Snapshot<Cost>, rows: &[Row], filtered: bool) -> Result<()> {
    let write = |path: &Path, text: &str| {
        std::fs::write(path, text).with_context(|| format!("failed to write {}", path.display()))
    };
    write(&place.root.join(Cost::FILE), &snapshot.text())?;
    say(format_args!("wrote {}", Cost::FILE));
    if filtered {
        say(format_args!("the table of {} stays: not all tests ran", table::FILE));
        return Ok(());
    }
    let path = place.root.join(table::FILE);
    let text = std::fs::read_to_string(&path).with_context(|| format!("failed to read {}", path.display()))?;
    write(&path, &table::bless(&text, rows, &KERNELS.map(|kernel| kernel.name))?)?;
    say(format_args!("wrote the table of {}", table::FILE));
    Ok(())
}

impl Report {
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

fn choose(args: &Args) -> Result<Vec<(&'static Kernel, Vec<Cgroup>)>> {
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
    let chosen: Vec<(&Kernel, Vec<Cgroup>)> =
        KERNELS.iter().filter(wanted).map(|kernel| (kernel, cgroups(kernel))).filter(|(_, c)| !c.is_empty()).collect();
    if chosen.is_empty() {
        bail!("none of these kernels has a memory controller on that version of cgroups");
    }
    Ok(chosen)
}

/// How often a machine is booted at most, when its emulator ends it.
const BOOTS: usize = 3;

/// How many machines run at a time, whoever boots them. Of those that wait the longest goes first, so that none of them
/// is left to run alone.
pub(crate) struct Slots {
    queue: Mutex<Queue>,
    moved: Condvar,
}

/// Who waits: the rank, and a number of its own.
type Turn = (usize, u64);

#[derive(Default)]
struct Queue {
    free: usize,
    waiting: BTreeSet<Turn>,
    /// Numbers that were given.
    given: u64,
}

impl Slots {
    /// So many, or as many as there are processors.
    pub(crate) fn new(count: Option<usize>) -> Self {
        let count = count.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from));
        Self { queue: Mutex::new(Queue { free: count.max(1), ..Queue::default() }), moved: Condvar::new() }
    }

    /// Begins to wait: whoever does must then take its turn.
    fn line_up(&self, rank: usize) -> Turn {
        let mut queue = self.lock();
        queue.given += 1;
        let turn = (rank, queue.given);
        queue.waiting.insert(turn);
        turn
    }

    /// Does something when one is free and nobody of a lower rank waits for it.
    fn with<T>(&self, turn: Turn, work: impl FnOnce() -> T) -> T {
        let queue = self.lock();
        let not_yet = |queue: &mut Queue| queue.free == 0 || queue.waiting.first() != Some(&turn);
        let mut queue = self.moved.wait_while(queue, not_yet).unwrap_or_else(PoisonError::into_inner);
        queue.waiting.remove(&turn);
        queue.free -= 1;
        drop(queue);
        self.moved.notify_all();
        let done = work();
        self.lock().free += 1;
        self.moved.notify_all();
        done
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Runs the machines as slots become free; the outcomes in the order of the machines.
fn boot(machines: &[Machine], parts: &Parts, slots: &Slots) -> Vec<Result<Outcome>> {
    // all of them first: those that wait are told apart by how long they take, not by which thread is up first
    let turns: Vec<Turn> = machines.iter().map(|machine| slots.line_up(parts.rank(machine))).collect();
    std::thread::scope(|scope| {
        let running: Vec<_> = machines
            .iter()
            .zip(turns)
            .map(|(machine, turn)| scope.spawn(move || slots.with(turn, || booted(machine, parts))))
            .collect();
        let ended = running.into_iter().map(|thread| thread.join());
        ended.map(|ended| ended.unwrap_or_else(|_| Err(anyhow::anyhow!("its thread panicked")))).collect()
    })
}

/// Runs one, once more when its emulator ended it.
fn booted(machine: &Machine, parts: &Parts) -> Result<Outcome> {
    say(format_args!("{}: booting Linux {}", machine.name(), machine.ready.release));
    let mut outcome = machine.run(parts)?;
    let mut tries = Vec::new();
    // What ended like this says nothing about the tests.
    while outcome.said.not_a_test && tries.len() + 1 < BOOTS {
        let why = outcome.said.troubles.join("; ");
        say(format_args!("{}: {why}; no fault of the tests: booting once more", machine.name()));
        outcome = machine.run(parts)?;
        let (test, passed) = ("the machine itself".to_owned(), !outcome.said.not_a_test);
        tries.push(SecondTry { test, said: vec![why], passed });
    }
    outcome.said.second_tries.extend(tries);
    Ok(outcome)
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

    fn chosen(kernels: &[&str], cgroup: Option<Cgroup>) -> Result<Vec<String>> {
        let kernels = kernels.iter().map(|name| (*name).to_owned()).collect();
        let chosen = choose(&Args { kernels, cgroup, ..Args::whole(None, false) })?;
        let names = chosen.iter().flat_map(|(kernel, on)| on.iter().map(move |on| format!("{}-{on}", kernel.name)));
        Ok(names.collect())
    }

    #[test]
    fn machines_are_chosen_by_kernel_and_cgroup_version() {
        assert_eq!(chosen(&["6.1", "5.10"], None).unwrap(), ["5.10-v1", "5.10-v2", "6.1-v1", "6.1-v2"]);
        assert_eq!(chosen(&["6.1", "6.12"], Some(Cgroup::V1)).unwrap(), ["6.1-v1"]);
        assert!(chosen(&[], None).unwrap().len() > 5);
        assert!(chosen(&["6.12"], Some(Cgroup::V1)).is_err());
        let error = chosen(&["4.4"], None).unwrap_err().to_string();
        assert!(error.contains("`4.4`") && error.contains("backports"), "{error}");
    }

    #[test]
    fn of_the_machines_that_wait_the_one_of_the_lowest_rank_is_next() {
        let (slots, order) = (Slots::new(Some(1)), Mutex::new(Vec::new()));
        std::thread::scope(|scope| {
            let (slots, order) = (&slots, &order);
            for turn in [3, 1, 2, 1].map(|rank| slots.line_up(rank)) {
                scope.spawn(move || slots.with(turn, || order.lock().unwrap().push(turn)));
            }
        });
        assert_eq!(order.into_inner().unwrap(), [(1, 2), (1, 4), (2, 3), (3, 1)]);
    }

    #[test]
    fn memory_is_said_in_mebibytes_or_gibibytes() {
        assert_eq!((mebibytes("1G"), mebibytes("1536M")), (Ok(1024), Ok(1536)));
        assert!(mebibytes("1").is_err() && mebibytes("16M").is_err() && mebibytes("xG").is_err());
    }
}
